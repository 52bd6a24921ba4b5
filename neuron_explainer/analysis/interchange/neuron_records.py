"""OpenAI's ``NeuronRecord`` and explanations: the JSON of neuron-explainer and Transformer Debugger.

A collated set is a folder with a file ``{layer}/{unit}.json`` for each unit, which holds a
:class:`NeuronRecord`; explanations are ``{layer}/{unit}.jsonl``. Objects say their class in
``dataclass_name``; files of earlier versions do not, and have other names for some fields. Both are read,
and the present names are written.

An attention head has a value for each pair of tokens: the lower triangle, one query after the other. Where
a token looks at no more than the first ``m`` tokens, the rows are cut there.

Legend: ``s`` tokens, ``m`` tokens that can be looked at.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.interchange.objects import (
    Names,
    dumps,
    read_json_value,
    read_lines,
    read_object,
    write_lines,
)
from neuron_explainer.errors import CheckpointError, shown

Floats = npt.NDArray[np.float32]


@dataclass
class ActivationRecord:
    """A text and the activations of a unit on it."""

    NAMES: ClassVar = Names(("ActivationRecord",))
    activations: list[float]
    """One for each token, or for each pair of tokens."""
    tokens: list[str]


@dataclass
class NeuronId:
    """Which unit of which layer."""

    NAMES: ClassVar = Names(("NeuronId",), {"idx": "neuron_index", "layer": "layer_index"})
    neuron_index: int
    layer_index: int


@dataclass
class NeuronRecord:
    """What was collected about a unit: examples and moments of its activations."""

    NAMES: ClassVar = Names(("NeuronRecord",))
    neuron_id: NeuronId
    random_sample: list[ActivationRecord] = field(default_factory=list)
    random_sample_by_quantile: list[list[ActivationRecord]] | None = None
    quantile_boundaries: list[float] | None = None
    mean: float | None = math.nan
    variance: float | None = math.nan
    skewness: float | None = math.nan
    kurtosis: float | None = math.nan
    most_positive_activation_records: list[ActivationRecord] = field(default_factory=list)

    @property
    def max_activation(self) -> float:
        """The largest activation of the top examples; NaN if there are none."""
        return max(
            (max(each.activations) for each in self.most_positive_activation_records),
            default=math.nan,
        )


@dataclass
class SequenceSimulation:
    """What an explanation says about each token of a text."""

    NAMES: ClassVar = Names(
        ("SequenceSimulation",), {"unit": "activation_scale"}, frozenset({"response"})
    )
    tokens: list[str]
    expected_activations: list[float]
    activation_scale: str
    distribution_values: list[list[float]]
    distribution_probabilities: list[list[float]]
    uncalibrated_simulation: "SequenceSimulation | None" = None


@dataclass
class ScoredSequenceSimulation:
    """The same with the unit's activations and the score on this text."""

    NAMES: ClassVar = Names(("ScoredSequenceSimulation",), {"simulation": "sequence_simulation"})
    sequence_simulation: SequenceSimulation
    true_activations: list[float]
    ev_correlation_score: float
    rsquared_score: float | None = None
    absolute_dev_explained_score: float | None = None


@dataclass
class ScoredSimulation:
    """All texts, and the score over all of their tokens."""

    NAMES: ClassVar = Names(("ScoredSimulation",))
    scored_sequence_simulations: list[ScoredSequenceSimulation]
    ev_correlation_score: float | None = None
    rsquared_score: float | None = None
    absolute_dev_explained_score: float | None = None


@dataclass
class ScoredExplanation:
    """A sentence about a unit, and how well it predicts the activations."""

    NAMES: ClassVar = Names(
        ("ScoredExplanation", "ScoredExplanationOrBaseline"),
        {"explanation_or_baseline": "explanation"},
    )
    explanation: str
    scored_simulation: ScoredSimulation

    @property
    def score(self) -> float | None:
        """The correlation of predicted and true activations."""
        return self.scored_simulation.ev_correlation_score


@dataclass
class NeuronSimulationResults:
    """The explanations of a neuron or latent."""

    NAMES: ClassVar = Names(
        ("NeuronSimulationResults",), {"scored_explanation_or_baseline_list": "scored_explanations"}
    )
    neuron_id: NeuronId
    scored_explanations: list[ScoredExplanation]


@dataclass
class AttentionSimulation:
    """Whether an explanation finds that a head looks from one token at another."""

    NAMES: ClassVar = Names(("AttentionSimulation",))
    tokens: list[str]
    token_pair_coords: list[int]
    token_pair_label: int
    simulation_prediction: float


@dataclass
class ScoredAttentionSimulation:
    """All pairs, and the score."""

    NAMES: ClassVar = Names(("ScoredAttentionSimulation",))
    attention_simulations: list[AttentionSimulation]
    roc_auc_score: float | None = None


@dataclass
class ScoredAttentionExplanation:
    """A sentence about a head, and how well it predicts where the head looks."""

    NAMES: ClassVar = Names(("ScoredAttentionExplanation",))
    explanation: str
    scored_attention_simulation: ScoredAttentionSimulation

    @property
    def score(self) -> float | None:
        """The area under the ROC curve."""
        return self.scored_attention_simulation.roc_auc_score


@dataclass
class AttentionSimulationResults:
    """The explanations of an attention head."""

    NAMES: ClassVar = Names(("AttentionSimulationResults",), {"attention_id": "attention_head_id"})
    attention_head_id: NeuronId
    scored_explanations: list[ScoredAttentionExplanation]

    @property
    def neuron_id(self) -> NeuronId:
        """Which head of which layer."""
        return self.attention_head_id


Explanations = NeuronSimulationResults | AttentionSimulationResults


def read_neuron_record(source: str | Path) -> NeuronRecord:
    """A record from a file or URL; ``az://`` and ``https://`` go through the cache."""
    value, where = read_json_value(source)
    if isinstance(value, dict) and isinstance(value.get("neuron_id"), dict):
        identity = value["neuron_id"]
        for name in ("layer_index", "layer"):  # some files have the layer as a text
            if isinstance(layer := identity.get(name), str) and layer.isdecimal():
                identity[name] = int(layer[:20])
    record = read_object(NeuronRecord, value, where)
    _check_record(record, where)
    return record


def _check_record(record: NeuronRecord, where: str) -> None:
    unit = record.neuron_id
    if not (0 <= unit.neuron_index < 2**31 and 0 <= unit.layer_index < 2**31):
        raise CheckpointError(
            f"{where}: expected numbers >= 0 of unit and layer, found {shown(unit.neuron_index)} and "
            f"{shown(unit.layer_index)}."
        )
    groups = [record.most_positive_activation_records, record.random_sample]
    for group in [*groups, *(record.random_sample_by_quantile or [])]:
        for example in group:
            _keys(len(example.activations), len(example.tokens), where)


def activations_of(values: list[float], n_tokens: int, where: str) -> tuple[Floats, bool]:
    """The activations of a record, and whether they belong to pairs of tokens.

    Returns:
        ``[s]``, or for pairs the whole lower triangle ``[s * (s + 1) / 2]``.
    """
    longest = _keys(len(values), n_tokens, where)
    found = np.asarray(values, np.float64)
    wrong = np.flatnonzero(~(np.abs(found) < 3e38))  # NaN too
    if len(wrong):
        raise CheckpointError(
            f"{where}: expected finite activations, found {found[wrong[0]]} as number {wrong[0]}."
        )
    if longest is None:
        return found.astype(np.float32), False
    # Row i has the keys 0 to min(i, m - 1).
    query, key = np.tril_indices(n_tokens)
    whole = np.zeros(len(query), np.float32)
    whole[key < longest] = found
    return whole, True


def _keys(n_activations: int, n_tokens: int, where: str) -> int | None:
    """``m`` where activations belong to pairs of tokens; None where they belong to tokens."""
    if n_tokens and n_activations == n_tokens:
        return None
    missing = n_tokens * (n_tokens + 1) // 2 - n_activations
    cut = (math.isqrt(8 * missing + 1) - 1) // 2 if missing >= 0 else n_tokens
    if cut >= n_tokens or cut * (cut + 1) // 2 != missing:
        raise CheckpointError(
            f"{where}: expected an activation for each of {n_tokens} tokens, or for each pair of them, "
            f"found {n_activations} activations."
        )
    return n_tokens - cut


def dumps_record(record: Any) -> str:
    """The JSON of a record or of explanations, with ``dataclass_name`` in each object."""
    return dumps(record)


def write_neuron_record(record: NeuronRecord, folder: str | Path) -> Path:
    """Write ``{layer}/{unit}.json`` into a folder."""
    unit = record.neuron_id
    path = Path(folder, str(unit.layer_index), f"{unit.neuron_index}.json")
    _check_record(record, str(path))
    return write_lines(path, [dumps_record(record)])


def read_explanations(source: str | Path) -> list[Explanations]:
    """The explanations in a file of JSON lines, or at a URL: one object for each unit."""
    return [explanations_of(value, where) for value, where in read_lines(source)]


def explanations_of(value: Any, where: str) -> Explanations:
    """The explanations of a unit from the value of a line; errors name ``where`` it stands."""
    if isinstance(value, dict):
        heads = {"attention_id", "attention_head_id"} & value.keys()
        if heads or value.get("dataclass_name") == "AttentionSimulationResults":
            return read_object(AttentionSimulationResults, value, where)
    return read_object(NeuronSimulationResults, value, where)
