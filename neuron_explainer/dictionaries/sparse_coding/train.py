"""Learning dictionaries for sparse coding ("transformer factors"): codes and steps, in turn.

    for every part of every batch:  a ← argmin_{a >= 0} ½ ‖x - Φ a‖² + penalty · Σ a    (FISTA)
                                    Φ ← quasi-Newton step, columns of length 1

Inputs are neither centred nor scaled. The result is a tied autoencoder whose activation is FISTA:
its latents are the codes.

A run with a folder goes on where it was, with the Hessian, the statistics and the place in the data;
on a CPU with the same number of threads, the dictionaries are bit for bit those of a run that was
never interrupted, given that the batches come again in the same order.

Yun et al. 2021, "Transformer visualization via dictionary learning: contextualized embedding as a
linear superposition of transformer factors".
"""

import hashlib
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

from torch import Tensor
from tqdm import tqdm

from neuron_explainer.activations.chunks import ActivationSource
from neuron_explainer.dictionaries.logs import JsonLines
from neuron_explainer.dictionaries.run_folder import RunFolder
from neuron_explainer.dictionaries.sparse_coding.config import SparseCodingConfig
from neuron_explainer.dictionaries.sparse_coding.data import (
    Batch,
    BatchStream,
    LocatedBatch,
    Place,
    PlainBatch,
    describe_source,
    group_locations,
    shuffled_parts,
)
from neuron_explainer.dictionaries.sparse_coding.learner import DictionaryLearner
from neuron_explainer.dictionaries.train import ONLY, result_folder
from neuron_explainer.errors import InputError
from neuron_explainer.kernels.denormals import flush_denormals
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation


@overload
def train_sparse_coding(
    config: SparseCodingConfig,
    batches: Iterable[LocatedBatch] | ActivationSource,
    folder: str | Path | None = None,
    *,
    token_counts: Tensor | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> dict[ActivationLocation, Autoencoder]: ...


@overload
def train_sparse_coding(
    config: SparseCodingConfig,
    batches: Iterable[PlainBatch],
    folder: str | Path | None = None,
    *,
    token_counts: Tensor | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> Autoencoder: ...


def train_sparse_coding(
    config: SparseCodingConfig,
    batches: Iterable[Any] | ActivationSource,
    folder: str | Path | None = None,
    *,
    token_counts: Tensor | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> Any:
    """Learn one dictionary, or several side by side, from batches of activations.

    Args:
        config: settings.
        batches: an activation source such as
            :class:`~neuron_explainer.activations.chunks.LiveSource`, which a run that
            goes on need not run again from its beginning; or an iterable of what
            :func:`~neuron_explainer.activations.harvest.harvest` yields, of dicts of tensors
            ``[r, n]`` by location, of tensors ``[r, n]``, or of pairs of these and token ids
            ``[r]``. They are gone through ``config.epochs`` times, in the same order each time; pads
            must not be among them.
        folder: for config, log, checkpoints and results, as
            :mod:`~neuron_explainer.dictionaries.run_folder` has them. An unfinished run with the
            same settings goes on, and a finished one if ``config.epochs`` was raised. None: nothing is kept.
        token_counts: how often each token id stands in the training set, ``[v]``
            (:func:`~neuron_explainer.dictionaries.sparse_coding.frequency.count_tokens`); rows are
            weighted by its inverse root. None: all rows weigh the same.
        model_name: recorded with the results.
        progress: show a bar, where there is a terminal, with ``snr``, smallest and largest mean
            latent (``l1``) and ``l0`` of the first dictionary.

    Returns:
        The dictionary as an autoencoder; by location, where batches have locations. The key of a
        dictionary of several layers is their location without a layer.
    """
    run = _Run(config, describe_source(batches), token_counts, model_name)
    with flush_denormals():
        if folder is None:
            run.to_end(batches, None, progress)
            found = run.autoencoders()
        else:
            place = RunFolder(folder, run.settings(), config.keep_checkpoints, extensible=True)
            with place.open():
                if (state := place.load_checkpoint()) is not None:
                    run.load(state)
                place.begin()
                run.to_end(batches, place, progress)
                found = run.autoencoders()
                for name, autoencoder in found.items():
                    target = result_folder(folder, ONLY if name is None else str(name))
                    autoencoder.save(target, overwrite=True)
                place.finish(run.batches, run.statistics())
    return found.get(None, found)


class _Run:
    """All dictionaries of a run and the place reached."""

    def __init__(
        self,
        config: SparseCodingConfig,
        source: dict[str, Any],
        token_counts: Tensor | None,
        model_name: str | None,
    ) -> None:
        self.config, self.source = config, source
        self.token_counts, self.model_name = token_counts, model_name
        self.groups: dict[Place, list[Place]] = {}
        self.learners: dict[Place, DictionaryLearner] = {}
        self.batches = 0
        self.place: tuple[int, int] = (0, 0)
        """Epoch, and batches of it that have been learned from."""

    def learn(self, batch: Batch) -> None:
        """Take every dictionary through a batch."""
        groups = group_locations(batch, self.config.across_layers)
        if not self.groups:
            self.groups = groups
        elif groups != self.groups:
            raise InputError(
                "sparse coding: every batch must have activations of the same locations; found "
                f"{_names(groups)} after {_names(self.groups)}."
            )
        for place, members in groups.items():
            parts = shuffled_parts(batch, members, self.config, self.batches, self.token_counts)
            for x, weights in parts:
                self._learner(place, x).learn(x, weights)
        self.batches += 1

    def _learner(self, place: Place, x: Tensor) -> DictionaryLearner:
        """Of a place; made, or brought to the device of the rows, at the first of them."""
        learner = self.learners.get(place)
        if learner is None:
            learner = DictionaryLearner(self.config, x.shape[1], x)
        elif learner.dictionary.device != x.device:
            learner = DictionaryLearner.from_tensors(self.config, learner.tensors(), x.device)
        self.learners[place] = learner
        expected = len(learner.dictionary), learner.dictionary.dtype
        if (x.shape[1], x.dtype) != expected:
            raise InputError(
                f"sparse coding: expected rows of width {expected[0]} and {expected[1]} for "
                f"{_name(place)}, found width {x.shape[1]} and {x.dtype}."
            )
        return learner

    def to_end(
        self, batches: Iterable[Any] | ActivationSource, place: RunFolder | None, progress: bool
    ) -> None:
        """Learn from all batches that are left."""
        c, stream = self.config, BatchStream(batches, self.config.epochs, *self.place)
        lines = None if place is None else JsonLines(place.path / "log.jsonl", self.batches)
        saved = self.batches
        with (
            tqdm(initial=self.batches, unit="batch", disable=None if progress else True) as bar,
            nullcontext() if lines is None else closing(lines),
        ):
            for batch in stream:
                # Before a batch and not after one: at the last there is another checkpoint.
                if self.batches % c.checkpoint_every == 0 and self.batches > saved:
                    self._save(place, lines)
                    saved = self.batches
                self.learn(batch)
                self.place = stream.epoch, stream.batch
                bar.update()
                if self.batches % c.log_every == 0:
                    statistics = self.statistics()
                    bar.set_postfix_str(_postfix(next(iter(statistics.values()), {})))
                    if lines is not None:
                        lines.write(self.batches, {"epoch": stream.epoch}, statistics)
            if not self.learners:
                raise InputError("sparse coding: there are no rows of activations in any batch.")
            self.place = stream.epoch, stream.batch
            if self.batches > saved:
                self._save(place, lines)

    def _save(self, place: RunFolder | None, lines: JsonLines | None) -> None:
        if place is not None and lines is not None:
            lines.sync()
            place.save_checkpoint(self.batches, self.state())

    def statistics(self) -> dict[str, dict[str, float]]:
        """Of every dictionary, by name."""
        return {_name(place): learner.statistics() for place, learner in self.learners.items()}

    def autoencoders(self) -> dict[Place, Autoencoder]:
        """The dictionaries as they are now."""
        return {
            place: learner.autoencoder(
                place,
                self.model_name,
                {
                    "locations": [_name(member) for member in self.groups[place]],
                    "frequency_weights": self.token_counts is not None,
                    "source": self.source,
                },
            )
            for place, learner in self.learners.items()
        }

    def settings(self) -> dict[str, Any]:
        """What the run was given."""
        return {
            "method": "sparse coding",
            "config": asdict(self.config),
            "source": self.source,
            "token_counts": _digest(self.token_counts),
        }

    def state(self) -> dict[str, Any]:
        """All that :meth:`load` needs: tensors and plain values."""
        return {
            "batches": self.batches,
            "place": list(self.place),
            "groups": [[_text(m) for m in (name, *group)] for name, group in self.groups.items()],
            "learners": [learner.tensors() for learner in self.learners.values()],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        epoch, batch = self.place = tuple(state["place"])
        if (epoch, batch) > (self.config.epochs, 0):
            raise InputError(
                f"sparse coding: the run is in epoch {epoch} (from 0), beyond the "
                f"{self.config.epochs} asked for now. Raise epochs, or give another folder."
            )
        self.batches = state["batches"]
        for texts, tensors in zip(state["groups"], state["learners"], strict=True):
            name, *members = (_place(text) for text in texts)
            self.groups[name] = members
            learner = DictionaryLearner.from_tensors(
                self.config, tensors, tensors["dictionary"].device
            )
            self.learners[name] = learner


def _text(place: Place) -> str | None:
    return None if place is None else str(place)


def _place(text: str | None) -> Place:
    return None if text is None else ActivationLocation.parse(text)


def _name(place: Place) -> str:
    return "activations" if place is None else str(place)


def _names(groups: dict[Place, list[Place]]) -> str:
    return ", ".join(_name(member) for members in groups.values() for member in members)


def _digest(counts: Tensor | None) -> str | None:
    if counts is None:
        return None
    return hashlib.sha256(counts.cpu().contiguous().numpy().tobytes()).hexdigest()


def _postfix(found: dict[str, float]) -> str:
    short = {"snr": "snr", "act_l1_min": "min l1", "act_l1_max": "max l1", "l0": "l0"}
    return " ".join(f"{text}={found[name]:.3g}" for name, text in short.items() if name in found)
