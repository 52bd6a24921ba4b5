"""SAEDashboard's batches and Neuronpedia's rows: read, written, and made stores.

SAEDashboard (0.8.0) writes files ``batch-N.json``, a :class:`DashboardBatch` each. Neuronpedia's export
has three folders of JSON lines, mostly ``.jsonl.gz``: ``features``, ``activations`` and ``explanations``. A
field that is not known here is kept and written again. In both formats an example has no group: one of the
largest values has ``bin_contains`` -1, any other the limits of an interval of values.

What is read and written again is equal, byte for byte where no number is NaN: JSON has none, so that is
written as null. A store has fewer fields than these formats and these have fewer than a store; the
functions that convert say what is left out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from neuron_explainer import __version__, files
from neuron_explainer.analysis.interchange.gathering import (
    ForeignExample,
    ForeignUnit,
    Gathered,
    Gatherer,
    counted,
)
from neuron_explainer.analysis.interchange.objects import (
    Names,
    dumps,
    read_json_value,
    read_lines,
    read_object,
    write_lines,
)
from neuron_explainer.analysis.latent_record import Example, LatentRecord
from neuron_explainer.analysis.records import HISTOGRAM_EDGES
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.errors import CheckpointError, InputError, SourceError, shown

if TYPE_CHECKING:  # they import torch, which reading and writing needs not
    from neuron_explainer.analysis.directions import Directions, TopLogits

T = TypeVar("T")
BATCH = 512
"""Features of a file that is written."""


@dataclass
class DashboardActivation:
    """An example: tokens and the activation of each."""

    NAMES: ClassVar = Names(
        left_out=frozenset({"dfa_values", "dfa_maxValue", "dfa_targetIndex"}), more="more"
    )
    bin_min: float
    bin_max: float
    bin_contains: float
    """The share of tokens whose activation lies in this interval; -1 for an example of the largest."""
    tokens: list[str]
    values: list[float]
    qualifying_token_index: int
    """Which token's activation lies in the interval."""
    dfa_values: list[float] | None = None
    dfa_maxValue: float | None = None
    dfa_targetIndex: int | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class DashboardFeature:
    """A latent: figures, tables and examples."""

    NAMES: ClassVar = Names(more="more")
    feature_index: int
    neuron_alignment_indices: list[int] = field(default_factory=list)
    neuron_alignment_values: list[float] = field(default_factory=list)
    neuron_alignment_l1: list[float] = field(default_factory=list)
    correlated_neurons_indices: list[int] = field(default_factory=list)
    correlated_neurons_l1: list[float] = field(default_factory=list)
    correlated_neurons_pearson: list[float] = field(default_factory=list)
    correlated_features_indices: list[int] = field(default_factory=list)
    correlated_features_l1: list[float] = field(default_factory=list)
    correlated_features_pearson: list[float] = field(default_factory=list)
    neg_str: list[str] = field(default_factory=list)
    neg_values: list[float] = field(default_factory=list)
    pos_str: list[str] = field(default_factory=list)
    pos_values: list[float] = field(default_factory=list)
    frac_nonzero: float = 0
    freq_hist_data_bar_values: list[float] = field(default_factory=list)
    freq_hist_data_bar_heights: list[float] = field(default_factory=list)
    logits_hist_data_bar_heights: list[float] = field(default_factory=list)
    logits_hist_data_bar_values: list[float] = field(default_factory=list)
    n_prompts_total: int = 0
    n_tokens_in_prompt: int = 0
    dataset: str = ""
    decoder_weights_dist: list[float] = field(default_factory=list)
    activations: list[DashboardActivation] = field(default_factory=list)
    vector: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class DashboardBatch:
    """A file ``batch-N.json``."""

    NAMES: ClassVar = Names(more="more")
    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None
    features: list[DashboardFeature]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Neuronpedia's name of the dictionary: ``{layer}-{set}[__{suffix}]``."""
        return f"{self.layer}-{self.sae_set}" + f"__{self.sae_id_suffix}" * bool(self.sae_id_suffix)


@dataclass
class FeatureRow:
    """A row of Neuronpedia's table of neurons."""

    NAMES: ClassVar = Names(more="more")
    modelId: str
    layer: str
    """The name of the dictionary, such as ``"6-res-jb"``."""
    index: str
    sourceSetName: str | None = None
    maxActApprox: float | None = 0
    hasVector: bool = False
    vector: list[float] | None = field(default_factory=list)
    vectorLabel: str | None = None
    vectorDefaultSteerStrength: float | None = 10
    hookName: str | None = None
    topkCosSimIndices: list[int] | None = field(default_factory=list)
    topkCosSimValues: list[float] | None = field(default_factory=list)
    neuron_alignment_indices: list[int] | None = field(default_factory=list)
    neuron_alignment_values: list[float] | None = field(default_factory=list)
    neuron_alignment_l1: list[float] | None = field(default_factory=list)
    correlated_neurons_indices: list[int] | None = field(default_factory=list)
    correlated_neurons_pearson: list[float] | None = field(default_factory=list)
    correlated_neurons_l1: list[float] | None = field(default_factory=list)
    correlated_features_indices: list[int] | None = field(default_factory=list)
    correlated_features_pearson: list[float] | None = field(default_factory=list)
    correlated_features_l1: list[float] | None = field(default_factory=list)
    neg_str: list[str] | None = field(default_factory=list)
    neg_values: list[float] | None = field(default_factory=list)
    pos_str: list[str] | None = field(default_factory=list)
    pos_values: list[float] | None = field(default_factory=list)
    frac_nonzero: float = 0
    freq_hist_data_bar_heights: list[float] | None = field(default_factory=list)
    freq_hist_data_bar_values: list[float] | None = field(default_factory=list)
    logits_hist_data_bar_heights: list[float] | None = field(default_factory=list)
    logits_hist_data_bar_values: list[float] | None = field(default_factory=list)
    decoder_weights_dist: list[float] | None = field(default_factory=list)
    umap_cluster: int | None = None
    umap_log_feature_sparsity: float | None = None
    umap_x: float | None = None
    umap_y: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class ActivationRow:
    """A row of Neuronpedia's table of activations: an example."""

    NAMES: ClassVar = Names(more="more")
    modelId: str
    layer: str
    index: str
    tokens: list[str]
    values: list[float]
    maxValue: float
    maxValueTokenIndex: int
    minValue: float
    dataIndex: str | None = None
    dataSource: str | None = None
    dfaValues: list[float] | None = field(default_factory=list)
    dfaTargetIndex: int | None = None
    dfaMaxValue: float | None = None
    zQIndices: list[int] | None = field(default_factory=list)
    zKIndices: list[int] | None = field(default_factory=list)
    zValues: list[float] | None = field(default_factory=list)
    lossValues: list[float] | None = field(default_factory=list)
    logitContributions: str | None = None
    binMin: float | None = None
    binMax: float | None = None
    binContains: float | None = None
    qualifyingTokenIndex: int | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class ExplanationRow:
    """A row of Neuronpedia's table of explanations."""

    NAMES: ClassVar = Names(more="more")
    modelId: str
    layer: str
    index: str
    description: str
    typeName: str | None = None
    explanationModelName: str | None = None
    scoreV1: float | None = 0
    scoreV2: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class NeuronpediaRows:
    """An export of one or several dictionaries."""

    features: list[FeatureRow]
    activations: list[ActivationRow]
    explanations: list[ExplanationRow] = field(default_factory=list)


# --- files ---


def read_dashboards(source: str | Path) -> list[DashboardBatch]:
    """SAEDashboard's batches: a file or URL, or all ``batch-*.json`` of a folder."""
    paths: Sequence[str | Path] = [source]
    if not files.is_remote(source) and (folder := files.local_path(source)).is_dir():
        paths = [*sorted(folder.glob("batch-*.json"), key=_number_of)]
        if not paths:
            raise SourceError(f"{folder} holds no batches of SAEDashboard (batch-N.json).")
    found = []
    for path in paths:
        batch = read_object(DashboardBatch, *read_json_value(path))
        for feature in batch.features:
            for number, each in enumerate(feature.activations):
                where = f"{path}, feature {feature.feature_index}, activation {number}"
                _check_lengths(each.tokens, each.values, where)
        found.append(batch)
    return found


def _number_of(path: Path) -> tuple[int, str]:
    digits = path.name.split(".")[0].rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1, path.name


def _check_lengths(tokens: Sequence[str], values: Sequence[float], where: str) -> None:
    if len(tokens) != len(values) or not tokens:
        raise CheckpointError(
            f"{where}: expected an activation for each token, found {len(tokens)} tokens and "
            f"{len(values)} activations."
        )


def write_dashboard(batch: DashboardBatch, path: str | Path) -> Path:
    """Write a file ``batch-N.json``, as SAEDashboard does."""
    return write_lines(path, [dumps(batch, compact=False, ascii_only=True)])


def read_neuronpedia(folder: str | Path) -> NeuronpediaRows:
    """The rows of Neuronpedia's export: ``features/``, ``activations/`` and perhaps ``explanations/``."""
    place = files.local_path(folder)
    rows = NeuronpediaRows(
        _rows(FeatureRow, place / "features"),
        _rows(ActivationRow, place / "activations"),
        _rows(ExplanationRow, place / "explanations"),
    )
    if not rows.features and not rows.activations:
        raise SourceError(
            f"{place} holds no export of Neuronpedia: expected features/*.jsonl.gz and "
            "activations/*.jsonl.gz."
        )
    return rows


def _rows(cls: type[T], folder: Path) -> list[T]:
    found = []
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")], key=_number_of):
        for value, where in read_lines(path):
            row = read_object(cls, value, where)
            if isinstance(row, ActivationRow):
                _check_lengths(row.tokens, row.values, where)
            found.append(row)
    return found


def write_neuronpedia(rows: NeuronpediaRows, folder: str | Path) -> list[Path]:
    """Write ``{features,activations,explanations}/batch-N.jsonl.gz``."""
    found = []
    parts: list[tuple[str, Sequence[Any]]] = [
        ("features", rows.features),
        ("activations", rows.activations),
        ("explanations", rows.explanations),
    ]
    for name, each in parts:
        for number, begin in enumerate(range(0, len(each), BATCH)):
            path = Path(folder, name, f"batch-{number}.jsonl.gz")
            lines = [dumps(row) + "\n" for row in each[begin : begin + BATCH]]
            found.append(write_lines(path, lines))
    return found


# --- to stores ---


def import_dashboards(
    source: str | Path, folder: str | Path, *, location: str | None = None
) -> list[Path]:
    """Make stores of SAEDashboard's batches or Neuronpedia's export, and return their paths.

    Figures of active tokens come from the histogram: each activation counts as the middle of its bar. The
    store has no tables of logits, correlations and alignments, no source attributions and no vectors.

    Args:
        source: a folder or a file of batches, or the folder of an export.
        folder: for the stores.
        location: where the dictionary's inputs come from, such as ``"resid.torso.post_mlp"``; without it,
            the name of the set stands there.
    """
    local = not files.is_remote(source) and files.local_path(source)
    if local and (local / "features").is_dir():
        batches, labels = _batches_of(read_neuronpedia(local))
    else:
        batches, labels = read_dashboards(source), {}
    gatherer = Gatherer(str(source) if files.is_remote(source) else files.local_path(source).name)
    found: dict[str, Gathered] = {}
    for batch in batches:
        if batch.source not in found:
            found[batch.source] = Gathered(
                "latent",
                f"{batch.layer}/{location or batch.sae_set}",
                batch.source,
                {
                    "imported_from": gatherer.source,
                    "model": batch.model_id,
                    "neuron_explainer": __version__,
                },
                {"figures": "of active tokens: from the bars of the histogram", "config": {}},
            )
        for feature in batch.features:
            unit = _unit_of(feature, batch, labels.get((batch.source, feature.feature_index), []))
            found[batch.source].units.append(unit)
            intervals = max((e.interval + 1 for e in unit.examples), default=0)
            config = found[batch.source].settings["config"]
            config["intervals"] = max(intervals, config.get("intervals", 0))
    return gatherer.write(folder, list(found.values()))


def _unit_of(
    feature: DashboardFeature, batch: DashboardBatch, labels: Sequence[Label]
) -> ForeignUnit:
    where = f"feature {feature.feature_index} of {batch.source}"
    if not 0 <= feature.feature_index < 2**31:
        raise CheckpointError(f"{where}: expected a number >= 0 of the feature.")
    limits = sorted({each.bin_max for each in feature.activations if not _is_top(each)})[::-1]
    if len(limits) > 256:
        raise CheckpointError(f"{where}: expected at most 256 intervals, found {len(limits)}.")
    examples = []
    for each in feature.activations:
        found = np.asarray(each.values, np.float64)
        if not (np.abs(found) < 3e38).all():
            raise CheckpointError(f"{where}: expected finite activations.")
        top = _is_top(each)
        at = each.qualifying_token_index
        inside = 0 <= at < len(found) and each.bin_min <= found[at] <= each.bin_max
        examples.append(
            ForeignExample(
                "top" if top else "stratum",
                each.tokens,
                found.astype(np.float32),
                0 if top else limits.index(each.bin_max),
                at if inside and not top else None,
            )
        )
    shown_values = [value for each in examples for value in each.activations.tolist()]
    values, counts = _bars(feature, where) or counted(shown_values)
    n_tokens = feature.n_prompts_total * feature.n_tokens_in_prompt
    if not 0 <= n_tokens < 2**62:
        raise CheckpointError(f"{where}: expected a number of tokens, found {shown(n_tokens)}.")
    return ForeignUnit(
        feature.feature_index,
        examples,
        n_tokens or len(shown_values),
        values,
        counts,
        max=max(shown_values, default=0.0),
        min=min(shown_values, default=0.0),
        labels=labels,
    )


def _is_top(each: DashboardActivation) -> bool:
    return each.bin_contains == -1


def _bars(feature: DashboardFeature, where: str) -> tuple[Any, Any] | None:
    """The middles of the bars and how many activations each stands for; None without a histogram."""
    values = np.asarray(feature.freq_hist_data_bar_values, np.float64)
    heights = np.asarray(feature.freq_hist_data_bar_heights, np.float64)
    if not len(values) and not len(heights):
        return None
    right = len(values) == len(heights) and (np.abs(values) < 3e38).all()
    if not right or not ((heights >= 0) & (heights < 2**32)).all():
        raise CheckpointError(f"{where}: expected bars of a histogram with values and counts.")
    some = heights > 0
    # SAEDashboard rounds to three places; a bar of active tokens is above 0.
    middles = np.where(values > 0, values, 0.0005)
    return middles[some], np.rint(heights[some]).astype(np.int64)


def _batches_of(
    rows: NeuronpediaRows,
) -> tuple[list[DashboardBatch], dict[tuple[str, int], list[Label]]]:
    """An export as SAEDashboard would write it, and its explanations."""
    batches: dict[tuple[str, str], DashboardBatch] = {}
    features: dict[tuple[str, str, int], DashboardFeature] = {}
    everything: list[FeatureRow | ActivationRow] = [*rows.features, *rows.activations]
    for row in everything:
        key = row.modelId, row.layer
        if key not in batches:
            number, _, rest = row.layer.partition("-")
            if not number.isdecimal() or not rest or len(number) > 9:
                raise CheckpointError(
                    f"expected the name of a dictionary such as '6-res-jb', found {shown(row.layer)}."
                )
            batches[key] = DashboardBatch(row.modelId, int(number), rest, None, [])
        unit = (*key, _index(row.index))
        if unit not in features:
            features[unit] = DashboardFeature(unit[2])
            batches[key].features.append(features[unit])
        feature = features[unit]
        if isinstance(row, FeatureRow):
            feature.frac_nonzero = row.frac_nonzero
            feature.freq_hist_data_bar_values = row.freq_hist_data_bar_values or []
            feature.freq_hist_data_bar_heights = row.freq_hist_data_bar_heights or []
            total = sum(feature.freq_hist_data_bar_heights)
            # Rows do not say how many tokens there were; their share and their count do.
            if 0 < total < 2**53 and 0 < row.frac_nonzero <= 1:
                feature.n_prompts_total = round(total / max(row.frac_nonzero, 1e-12))
                feature.n_tokens_in_prompt = 1
        else:
            feature.activations.append(_activation_of(row))
    labels: dict[tuple[str, int], list[Label]] = {}
    for each in rows.explanations:
        label = Label(
            _index(each.index), each.description, each.typeName or "", each.scoreV1 or None
        )
        labels.setdefault((each.layer, label.unit), []).append(label)
    return list(batches.values()), labels


def _index(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise CheckpointError(f"expected the number of a feature as a text, found {shown(text)}.")
    return int(text)


def _activation_of(row: ActivationRow) -> DashboardActivation:
    top = row.binContains is None or row.binContains == -1
    at = row.maxValueTokenIndex if row.qualifyingTokenIndex is None else row.qualifyingTokenIndex
    limits = (
        (-1, row.maxValue, -1) if top else (row.binMin or 0, row.binMax or 0, row.binContains or 0)
    )
    return DashboardActivation(*limits, row.tokens, row.values, at)


# --- from stores ---


def dashboard_feature(record: LatentRecord, logits: "TopLogits | None" = None) -> DashboardFeature:
    """SAEDashboard's card of a unit of a store.

    It has the histogram, the share of active tokens and the examples of the groups "top" and "stratum"; the
    format has no place for the others, and a store has no tables of correlations and alignments. A prompt
    counts as the most tokens that an example shows. The bars of activations are the bins of
    :data:`~neuron_explainer.analysis.records.HISTOGRAM_EDGES`, four an octave, not equally wide ones.

    Args:
        record: a unit of a store.
        logits: what the unit does to the logits; without it the card has no tokens that the unit promotes.
            As :mod:`~neuron_explainer.analysis.directions` says, the final norm's gain is folded and the
            mean over the vocabulary is 0, and tokens that training hardly touched are not listed.
    """
    if record.kind == "head":
        raise InputError(
            f"{record.title}: dashboards hold activations of tokens, not of pairs of them."
        )
    figures = record.statistics
    filled = np.flatnonzero(record.histogram)
    middles = 2.0 ** ((filled - 80.5) / 4)
    longest = max((len(each.tokens) for each in record.all_examples), default=1)
    return DashboardFeature(
        record.unit,
        frac_nonzero=figures.density,
        freq_hist_data_bar_values=middles.tolist(),
        freq_hist_data_bar_heights=record.histogram[filled].tolist(),
        n_prompts_total=round(figures.n_tokens / longest),
        n_tokens_in_prompt=longest,
        dataset=str(record.provenance.get("corpus", "")),
        activations=[
            _dashboard_activation(each, record) for each in record.all_examples if _has_place(each)
        ],
        **({} if logits is None else _tables_of_logits(logits)),
    )


def _tables_of_logits(logits: "TopLogits") -> dict[str, Any]:
    """The tokens that a unit promotes and suppresses, and the histogram, as both formats name them."""
    edges = np.asarray(logits.edges)
    return {
        "pos_str": [each.text for each in logits.top],
        "pos_values": [each.value for each in logits.top],
        "neg_str": [each.text for each in logits.bottom],
        "neg_values": [each.value for each in logits.bottom],
        "logits_hist_data_bar_heights": list(logits.counts),
        "logits_hist_data_bar_values": ((edges[1:] + edges[:-1]) / 2).tolist(),
    }


def _has_place(example: Example) -> bool:
    return example.group in ("top", "stratum")


def _dashboard_activation(example: Example, record: LatentRecord) -> DashboardActivation:
    largest = record.statistics.max
    limits: tuple[float, float, float] = (-1, largest, -1)
    if example.group == "stratum":
        known = [e.interval + 1 for e in record.examples("stratum")]
        n = record.intervals or max(known)
        low, high = (largest * (n - example.interval - i) / n for i in (1, 0))
        bins = np.searchsorted(HISTOGRAM_EDGES, [low, high], side="right")
        inside = int(record.histogram[bins[0] : bins[1]].sum())
        limits = (low, high, inside / max(record.statistics.n_tokens, 1))
    tokens = [piece.decode(errors="replace") for piece in example.pieces]
    return DashboardActivation(*limits, tokens, example.activations.tolist(), example.peak)


_OF_LOGITS = (
    "pos_str",
    "pos_values",
    "neg_str",
    "neg_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
)


def dashboard_batch(
    records: Iterable[LatentRecord],
    *,
    model: str = "",
    name: str = "",
    directions: "Directions | None" = None,
) -> DashboardBatch:
    """The units of a store that have examples, as SAEDashboard's batch.

    Args:
        records: a store, or some of its records.
        model: Neuronpedia's name of the model; by default the one in the store.
        name: the name of the set; by default the store's.
        directions: of the store's autoencoder or location, from which each card gets its tokens.
    """
    pages = [each for each in records if each.all_examples]
    if not pages:
        raise InputError("expected units with examples, found none.")
    first = pages[0]
    layer, _, _ = first.location.partition("/")
    return DashboardBatch(
        model or str(first.provenance.get("model", "")),
        int(layer) if layer.isdecimal() else 0,
        name or first.name.removeprefix(f"{layer}-").removeprefix(f"{layer}.").replace("/", "-"),
        None,
        [*map(dashboard_feature, pages, _logits_of(pages, directions))],
    )


def _logits_of(
    pages: Sequence[LatentRecord], directions: "Directions | None"
) -> "list[TopLogits | None]":
    """What each unit does to the logits; None where it writes nothing, or without ``directions``."""
    found: list[TopLogits | None] = [None] * len(pages)
    if directions is not None:
        units = [page.unit for page in pages]
        write = [number for number, writes in enumerate(directions.units.write(units)) if writes]
        made = directions.top_logits_of([units[number] for number in write])
        for number, logits in zip(write, made, strict=True):
            found[number] = logits
    return found


def neuronpedia_rows(
    records: Iterable[LatentRecord],
    *,
    model: str = "",
    name: str = "",
    directions: "Directions | None" = None,
) -> NeuronpediaRows:
    """The same units as Neuronpedia's rows, with labels as explanations; see :func:`dashboard_batch`."""
    pages = [each for each in records if each.all_examples]
    batch = dashboard_batch(pages, model=model, name=name, directions=directions)
    rows = NeuronpediaRows([], [], [])
    for page, feature in zip(pages, batch.features, strict=True):
        who: Any = {
            "modelId": batch.model_id,
            "layer": batch.source,
            "index": str(feature.feature_index),
        }
        rows.features.append(
            FeatureRow(
                **who,
                maxActApprox=max((max(e.values) for e in feature.activations), default=0),
                frac_nonzero=feature.frac_nonzero,
                freq_hist_data_bar_heights=feature.freq_hist_data_bar_heights,
                freq_hist_data_bar_values=feature.freq_hist_data_bar_values,
                **{name: getattr(feature, name) for name in _OF_LOGITS},
            )
        )
        for each in feature.activations:
            best = int(np.argmax(each.values))
            rows.activations.append(
                ActivationRow(
                    **who,
                    tokens=each.tokens,
                    values=each.values,
                    maxValue=each.values[best],
                    maxValueTokenIndex=best,
                    minValue=min(each.values),
                    dataSource=feature.dataset or None,
                    binMin=each.bin_min,
                    binMax=each.bin_max,
                    binContains=each.bin_contains,
                    qualifyingTokenIndex=each.qualifying_token_index,
                )
            )
        for label in page.labels:
            score = label.score if label.score is not None and math.isfinite(label.score) else 0
            rows.explanations.append(
                ExplanationRow(**who, description=label.text, typeName=label.source, scoreV1=score)
            )
    return rows
