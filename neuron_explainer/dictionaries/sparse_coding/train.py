"""Learning dictionaries for sparse coding ("transformer factors"): codes and steps alternate.

    for every part of every batch:  a ← argmin_{a >= 0} ½ ‖x - Φ a‖² + penalty · Σ a    (FISTA)
                                    Φ ← quasi-Newton step, columns of length 1

Inputs are neither centred nor scaled. The result is a tied autoencoder whose nonlinearity is FISTA:
its latents are the codes.

A run with a folder resumes with the same Hessian, statistics and place in the data. On a CPU with the same
number of threads, its dictionaries are bit for bit those of a run that was never interrupted, if the batches
come in the same order again.

Yun et al. 2021, "Transformer visualization via dictionary learning: contextualized embedding as a
linear superposition of transformer factors".
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, overload

from torch import Tensor

from neuron_explainer.activations.chunks import ActivationSource
from neuron_explainer.dictionaries.batches import BatchSource, ChunkBatches
from neuron_explainer.dictionaries.loop import Loop, Plan
from neuron_explainer.dictionaries.runs import SINGLE_NAME
from neuron_explainer.dictionaries.sparse_coding.config import SparseCodingConfig
from neuron_explainer.dictionaries.sparse_coding.data import (
    LocatedBatch,
    Place,
    PlainBatch,
    describe_source,
    group_locations,
    read_batch,
    shuffled_parts,
)
from neuron_explainer.dictionaries.sparse_coding.learner import DictionaryLearner
from neuron_explainer.errors import InputError
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
    record: Mapping[str, Any] | None = None,
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
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Autoencoder: ...


def train_sparse_coding(
    config: SparseCodingConfig,
    batches: Iterable[Any] | ActivationSource,
    folder: str | Path | None = None,
    *,
    token_counts: Tensor | None = None,
    model_name: str | None = None,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Any:
    """Learn one dictionary, or several side by side, from batches of activations.

    Args:
        config: settings.
        batches: an activation source such as
            :class:`~neuron_explainer.activations.harvest.LiveSource`, which a resumed run does not have
            to compute again from the start; or an iterable of
            :class:`~neuron_explainer.activations.chunks.ActivationBatch`, of dicts of tensors ``[r, n]`` by
            location, of tensors ``[r, n]``, or of pairs of these and token ids ``[r]``. Training reads them
            ``config.epochs`` times and needs the same order each time. They must not contain padding.
        folder: for config, log, checkpoints and results, as
            :mod:`~neuron_explainer.dictionaries.runs` has them. An unfinished run with the
            same settings is resumed, and a finished one if ``config.epochs`` was raised. None: nothing is
            saved.
        token_counts: the number of times each token id occurs in the training set, ``[v]``
            (:func:`~neuron_explainer.dictionaries.sparse_coding.frequency.count_tokens`); rows are
            weighted by its inverse square root. None: all rows have the same weight.
        model_name: recorded with the results.
        record: what else the folder's config says: where the activations came from. A run is resumed only
            with the same record.
        progress: whether to show a progress bar.

    Returns:
        The dictionary as an autoencoder; by location, where batches have locations. The key of a
        dictionary of several layers is their location without a layer.
    """
    learner = SparseCoding(config, describe_source(batches), token_counts, model_name, record or {})
    plan = Plan(
        config.log_every, config.checkpoint_every, config.keep_checkpoints, passes=config.epochs
    )
    read = batches if isinstance(batches, Iterable) else ChunkBatches(batches)
    found = Loop(learner, read, plan).run(folder, progress=progress)
    if SINGLE_NAME in found:
        return found[SINGLE_NAME]
    return {_place(name): autoencoder for name, autoencoder in found.items()}


class Coded(NamedTuple):
    """The result of one batch."""

    n_tokens: int
    """The number of its rows."""


class SparseCoding:
    """All dictionaries of a run: the learner that the loop drives."""

    def __init__(
        self,
        config: SparseCodingConfig,
        source: dict[str, Any],
        token_counts: Tensor | None,
        model_name: str | None,
        record: Mapping[str, Any],
    ) -> None:
        self.config, self.source = config, source
        self.token_counts, self.model_name, self.record = token_counts, model_name, record
        self.groups: dict[Place, list[Place]] = {}
        self.learners: dict[Place, DictionaryLearner] = {}

    def settings(self) -> dict[str, Any]:
        """What ``config.json`` records."""
        return {
            "method": "sparse coding",
            "config": asdict(self.config),
            "source": self.source,
            "token_counts": _digest(self.token_counts),
            **({"record": dict(self.record)} if self.record else {}),
        }

    def begin(self, source: BatchSource) -> None:
        """Nothing: dictionaries are made for the first batch."""

    def learn(self, batch: Any, step: int) -> Coded:
        """Take every dictionary through one batch."""
        read = read_batch(batch)
        groups = group_locations(read, self.config.across_layers)
        if not self.groups:
            self.groups = groups
        elif groups != self.groups:
            raise InputError(
                "sparse coding: every batch must have activations of the same locations; found "
                f"{_names(groups)} after {_names(self.groups)}."
            )
        for place, members in groups.items():
            parts = shuffled_parts(read, members, self.config, step, self.token_counts)
            for x, weights in parts:
                self._learner(place, x).learn(x, weights)
        return Coded(sum(len(x) for x in read.activations.values()))

    def _learner(self, place: Place, x: Tensor) -> DictionaryLearner:
        """The learner of a dictionary: made at its first rows, and moved to the device of the rows."""
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

    def metrics(self, result: Coded, step: int, tokens: int) -> dict[str, dict[str, float]]:
        """The statistics of every dictionary, by name."""
        return self._statistics()

    def outcome(self) -> dict[str, Any]:
        """The statistics at the end."""
        return {"metrics": self._statistics()}

    def _statistics(self) -> dict[str, dict[str, float]]:
        return {_name(place): learner.statistics() for place, learner in self.learners.items()}

    def finish(self) -> dict[str, Autoencoder]:
        """The dictionaries as autoencoders, by name."""
        if not self.learners:
            raise InputError("sparse coding: there are no rows of activations in any batch.")
        return {
            SINGLE_NAME if place is None else str(place): learner.autoencoder(
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

    def state(self) -> dict[str, Any]:
        """All that :meth:`resume` needs: tensors and plain values."""
        return {
            "groups": [[_text(m) for m in (name, *group)] for name, group in self.groups.items()],
            "learners": [learner.tensors() for learner in self.learners.values()],
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        for texts, tensors in zip(state["groups"], state["learners"], strict=True):
            name, *members = (_place(text) for text in texts)
            self.groups[name] = members
            self.learners[name] = DictionaryLearner.from_tensors(
                self.config, tensors, tensors["dictionary"].device
            )


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
