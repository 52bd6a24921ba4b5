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
from pathlib import Path
from typing import Any, overload

from torch import Tensor
from tqdm import tqdm

from neuron_explainer.activations.activation_sources import ActivationSource
from neuron_explainer.activations.tokens import check_same_settings
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
from neuron_explainer.dictionaries.sparse_coding.run_folder import Checkpoint, RunFolder
from neuron_explainer.errors import CheckpointError, InputError
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
            :class:`~neuron_explainer.activations.activation_sources.LiveSource`, which a run that
            goes on need not run again from its beginning; or an iterable of what
            :func:`~neuron_explainer.activations.harvest.harvest` yields, of dicts of tensors
            ``[r, n]`` by location, of tensors ``[r, n]``, or of pairs of these and token ids
            ``[r]``. They are gone through ``config.epochs`` times, in the same order each time; pads
            must not be among them.
        folder: of checkpoints, log and results (:mod:`.run_folder`); a run that is found there goes
            on. None: nothing is kept.
        token_counts: how often each token id stands in the training set, ``[v]``
            (:func:`~neuron_explainer.dictionaries.sparse_coding.frequency.count_tokens`); rows are
            weighted by its inverse root. None: all rows weigh the same.
        model_name: recorded with the results.
        progress: show a bar, where there is a terminal, with ``snr``, largest and smallest mean
            latent (``l1``) and ``l0`` of the first dictionary.

    Returns:
        The dictionary as an autoencoder; by location, where batches have locations. The key of a
        dictionary of several layers is their location without a layer.
    """
    run = _Run(config, describe_source(batches), token_counts, model_name)
    disk = None if folder is None else RunFolder(folder, config)
    if disk is not None and (checkpoint := disk.resume()) is not None:
        run.load(checkpoint)
    stream = BatchStream(batches, config.epochs, *run.place)
    saved = run.place
    with tqdm(initial=run.batches, unit="batch", disable=None if progress else True) as bar:
        for batch in stream:
            run.learn(batch)
            run.place = stream.epoch, stream.batch
            bar.update()
            if run.batches % config.log_every == 0:
                records = run.records()
                bar.set_postfix_str(_postfix(records[0]))
                if disk is not None:
                    disk.log(records)
            if disk is not None and run.batches % config.checkpoint_every == 0:
                disk.save(*run.checkpoint())
                saved = run.place
    if not run.learners:
        raise InputError("sparse coding: there are no rows of activations in any batch.")
    run.place = stream.epoch, stream.batch
    autoencoders = run.autoencoders()
    if disk is not None:
        if saved != run.place:
            disk.save(*run.checkpoint())
        disk.save_autoencoders(autoencoders)
    return autoencoders.get(None, autoencoders)


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
        self.place = (0, 0)
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

    def records(self) -> list[dict[str, Any]]:
        """A line of the log for every dictionary."""
        return [
            {"batches": self.batches, "dictionary": _name(place), **learner.statistics()}
            for place, learner in self.learners.items()
        ]

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

    def checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Facts for JSON and all tensors."""
        facts = {
            "batches": self.batches,
            "epoch": self.place[0],
            "batch": self.place[1],
            "source": self.source,
            "token_counts": _digest(self.token_counts),
            "dictionaries": [[_text(m) for m in members] for members in self.groups.values()],
            "places": [_text(place) for place in self.groups],
        }
        tensors = {
            f"{number}.{name}": tensor
            for number, learner in enumerate(self.learners.values())
            for name, tensor in learner.tensors().items()
        }
        return facts, tensors

    def load(self, checkpoint: Checkpoint) -> None:
        """The inverse of :meth:`checkpoint`."""
        facts, tensors = checkpoint
        check_same_settings(facts["source"], self.source, "activations")
        if facts["token_counts"] != _digest(self.token_counts):
            raise CheckpointError(
                "sparse coding: the run was started with other token_counts. Give the same ones to "
                "go on, or another folder to begin anew."
            )
        self.batches, self.place = facts["batches"], (facts["epoch"], facts["batch"])
        if self.place > (self.config.epochs, 0):
            raise CheckpointError(
                f"sparse coding: the run is in epoch {self.place[0]} (from 0), beyond the "
                f"{self.config.epochs} asked for now. Raise epochs, or give another folder."
            )
        places = [_place(text) for text in facts["places"]]
        for number, (place, members) in enumerate(zip(places, facts["dictionaries"], strict=True)):
            prefix = f"{number}."
            own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            device = own["dictionary"].device
            self.groups[place] = [_place(text) for text in members]
            self.learners[place] = DictionaryLearner.from_tensors(self.config, own, device)


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


def _postfix(record: dict[str, Any]) -> str:
    snr = "-" if record["snr"] is None else f"{record['snr']:.3g}"
    smallest, largest = record["act_l1_min"], record["act_l1_max"]
    return f"snr={snr} l1={smallest:.2g}-{largest:.2g} l0={record['l0']:.1f}"
