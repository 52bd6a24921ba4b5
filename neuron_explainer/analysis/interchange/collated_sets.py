"""Sets of OpenAI's records: which are published, and how a set becomes stores and stores become a set."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuron_explainer import __version__, files
from neuron_explainer.analysis.interchange.gathering import (
    ForeignExample,
    ForeignUnit,
    Gathered,
    Gatherer,
    counted,
)
from neuron_explainer.analysis.interchange.neuron_records import (
    ActivationRecord,
    NeuronId,
    NeuronRecord,
    activations_of,
    read_explanations,
    read_neuron_record,
    write_neuron_record,
)
from neuron_explainer.analysis.latent_record import Example, LatentRecord
from neuron_explainer.analysis.records import Kind
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.errors import CheckpointError, InputError, SourceError, did_you_mean, shown

_ROOT = "https://openaipublic.blob.core.windows.net/neuron-explainer"


@dataclass(frozen=True)
class PublishedSet:
    """A collated set of OpenAI's."""

    kind: Kind
    location: str
    """Without a layer, such as ``"mlp.post_act"``."""
    n_layers: int
    n_units: int
    folders: tuple[str, ...]
    """Where it may be: the documents and the code spell the path differently."""
    explanations: str | None = None


def _latents(location: str, path: str, n_units: int, by_pair: bool = False) -> PublishedSet:
    end = "collated-activations-by-token-pair" if by_pair else "collated-activations"
    spellings = [path, path.removesuffix("_v1")] if path.endswith("_v1") else [path]
    return PublishedSet(
        "head" if by_pair else "latent",
        location,
        12,
        n_units,
        tuple(
            f"{_ROOT}/{model}/autoencoder_latent/{each}/{end}"
            for model in ("gpt2_small", "gpt2-small")
            for each in spellings
        ),
    )


PUBLISHED: dict[str, PublishedSet] = {
    "gpt2-xl": PublishedSet(
        "neuron",
        "mlp.post_act",
        48,
        6400,
        (f"{_ROOT}/data/collated-activations",),
        f"{_ROOT}/data/explanations",
    ),
    "gpt2-small": PublishedSet(
        "neuron",
        "mlp.post_act",
        12,
        3072,
        (f"{_ROOT}/gpt2_small_data/collated-activations",),
        f"{_ROOT}/gpt2_small_data/explanations",
    ),
    "gpt2-small-attn-write-norm": PublishedSet(
        "head",
        "attn.qk_probs",
        12,
        12,
        tuple(
            f"{_ROOT}/{model}/attn_write_norm/collated-activations-by-token-pair"
            for model in ("gpt2_small", "gpt2-small")
        ),
    ),
    **{
        f"gpt2-small_ae-{short}-{version}": _latents(
            location, f"{short.replace('-', '_')}_{version}", 32768
        )
        for short, location in (
            ("mlp-post-act", "mlp.post_act"),
            ("resid-delta-mlp", "resid.torso.delta_mlp"),
        )
        for version in ("v1", "v4")
    },
    "gpt2-small_ae-resid-delta-attn-v4": _latents(
        "resid.torso.delta_attn", "resid_delta_attn_v4", 10240
    ),
    "gpt2-small_ae-resid-delta-attn-v4-by-token-pair": _latents(
        "resid.torso.delta_attn", "resid_delta_attn_v4", 10240, by_pair=True
    ),
}
"""By the names that the original's viewer gives them."""


@dataclass(frozen=True)
class _Set:
    """A set to read: where, and which files."""

    name: str
    folders: tuple[str | Path, ...]
    kind: Kind | None
    """None: as the records show."""
    location: str
    explanations: str | Path | None


def import_records(
    source: str | Path,
    folder: str | Path,
    *,
    layers: Iterable[int] | None = None,
    units: Iterable[int] | None = None,
    location: str | None = None,
    explanations: str | Path | None = None,
) -> list[Path]:
    """Make stores of a collated set, one for each layer, and return their paths.

    The text of a store is that of its examples, each once. Groups become ours: the most positive records
    "top", those of the random sample "uniform" or, where the unit is not active, "inactive", and those by
    quantile "stratum". The figures of active tokens are those of the random sample (of all examples where
    there is none); mean, variance, skewness and kurtosis over all tokens are those of the file.

    Args:
        source: a name of :data:`PUBLISHED`, a folder of ``{layer}/{unit}.json`` or its URL, or one file.
        folder: for the stores.
        layers: which layers; None: all that are there, or all of a published set.
        units: which units of each layer; it must be given for a set that is not on this machine.
        location: where the units are, such as ``"mlp.post_act"``; known for published sets.
        explanations: folder or URL of explanations, which become labels; ``"published"``: the set's own.
    """
    found = _set_of(source, location, explanations)
    gatherer = Gatherer(found.name)
    by_layer: dict[int, Gathered] = {}
    for path in _files_of(found, source, layers, units):
        record = read_neuron_record(path)
        unit = record.neuron_id
        labels = _labels(found.explanations, unit)
        pairs, foreign = foreign_unit(record, str(path), labels)
        if unit.layer_index not in by_layer:
            by_layer[unit.layer_index] = Gathered(
                found.kind or ("head" if pairs else "neuron"),
                f"{unit.layer_index}/{found.location}",
                f"{unit.layer_index}.{found.location}",
                _provenance(source, record),
                {"figures": "active: of the random sample; all tokens: as the files say"},
            )
        layer = by_layer[unit.layer_index]
        if pairs is not None and pairs != (layer.kind == "head"):
            raise CheckpointError(
                f"{path}: expected activations of {'pairs of ' * (not pairs)}tokens as in the other "
                f"records of {layer.name}; import these into stores of their own."
            )
        if layer.provenance["quantile_boundaries"] != record.quantile_boundaries:
            layer.provenance["quantile_boundaries"] = None  # they are not the same for all units
        layer.units.append(foreign)
    return gatherer.write(folder, [by_layer[number] for number in sorted(by_layer)])


def _provenance(source: str | Path, record: NeuronRecord) -> dict[str, object]:
    name = str(source) if files.is_remote(source) or source in PUBLISHED else Path(source).name
    return {
        "imported_from": name,
        "format": "NeuronRecord",
        "quantile_boundaries": record.quantile_boundaries,
        "neuron_explainer": __version__,
    }


def _set_of(source: str | Path, location: str | None, explanations: str | Path | None) -> _Set:
    known = PUBLISHED.get(str(source))
    if known is not None:
        if explanations == "published":
            if known.explanations is None:
                raise InputError(f"no explanations are published for {source}.")
            explanations = known.explanations
        return _Set(str(source), known.folders, known.kind, known.location, explanations)
    if explanations == "published":
        raise InputError(f"{shown(str(source))} is no published set; say where explanations are.")
    if not files.is_remote(source) and not files.local_path(source).exists():
        raise SourceError(
            f"{source}: there is no such file or folder, and no published set of this name."
            f"{did_you_mean(str(source), PUBLISHED)} Published are {', '.join(PUBLISHED)}."
        )
    name = str(source) if files.is_remote(source) else files.local_path(source).name
    return _Set(name, (source,), None, location or "units", explanations)


def _files_of(
    found: _Set,
    source: str | Path,
    layers: Iterable[int] | None,
    units: Iterable[int] | None,
) -> Sequence[Path]:
    """The files of the layers and units that were asked for; remote ones are fetched."""
    only_layers = None if layers is None else sorted(set(layers))
    only_units = None if units is None else sorted(set(units))
    known = PUBLISHED.get(str(source))
    if known is None and str(source).endswith(".json"):
        return [files.fetch(source)]
    if known is None and not files.is_remote(source):
        return _local_files(files.local_path(source), only_layers, only_units)
    if known is not None and only_layers is None:
        only_layers = list(range(known.n_layers))
    if not only_layers or not only_units:
        size = f": {known.n_layers} layers of {known.n_units} units" if known is not None else ""
        raise InputError(
            f"{found.name} is not on this machine and has a file for each unit{size}. Say which: "
            "layers=range(2), units=range(100); in the shell --layers 0-1 --units 0-99."
        )
    if known is not None:
        _check_range("layer", only_layers, known.n_layers)
        _check_range("unit", only_units, known.n_units)
    names = [(str(layer), f"{unit}.json") for layer in only_layers for unit in only_units]
    folder = _folder_with(found, names[0])
    return files.fetch_all([str(files.join(folder, *name)) for name in names])


def _folder_with(found: _Set, name: tuple[str, str]) -> str | Path:
    """The first spelling of the folder under which this file can be had."""
    failures = []
    for folder in found.folders:
        try:
            files.fetch(files.join(folder, *name))
        except SourceError as error:
            failures.append(f"- {error}")
        else:
            return folder
    raise SourceError("\n".join([f"{'/'.join(name)} of {found.name} cannot be had:", *failures]))


def _check_range(what: str, numbers: Sequence[int], n: int) -> None:
    for number in (numbers[0], numbers[-1]):
        if not 0 <= number < n:
            raise InputError(f"there is no {what} {number}: there are 0 to {n - 1}.")


def _local_files(folder: Path, layers: list[int] | None, units: list[int] | None) -> list[Path]:
    """The records of a folder, in order of layer and unit."""
    there = {
        (int(path.parent.name), int(path.stem)): path
        for path in folder.glob("*/*.json")
        if path.parent.name.isdecimal() and path.stem.isdecimal()
    }
    if not there:
        raise SourceError(f"{folder} holds no records ({{layer}}/{{unit}}.json).")
    chosen = [
        key
        for key in sorted(there)
        if (layers is None or key[0] in layers) and (units is None or key[1] in units)
    ]
    if not chosen:
        raise InputError(f"{folder} has none of the layers and units that were asked for.")
    return [there[key] for key in chosen]


def _labels(explanations: str | Path | None, unit: NeuronId) -> list[Label]:
    """The explanations of a unit as labels, the best score first; none where there is no file."""
    if explanations is None:
        return []
    path = files.join(explanations, str(unit.layer_index), f"{unit.neuron_index}.jsonl")
    if not files.exists(path):
        return []
    found = [
        Label(unit.neuron_index, each.explanation, "explanation", _finite(each.score))
        for results in read_explanations(path)
        for each in results.scored_explanations
    ]
    return sorted(found, key=lambda label: -math.inf if label.score is None else -label.score)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- a record and a unit ---


def foreign_unit(
    record: NeuronRecord, where: str, labels: Sequence[Label] = ()
) -> tuple[bool | None, ForeignUnit]:
    """What a record says, and whether its activations belong to pairs of tokens (None: no examples)."""
    examples: list[ForeignExample] = []
    shapes: set[bool] = set()

    def add(records: Iterable[ActivationRecord], group: str | None, interval: int = 0) -> None:
        for each in records:
            values, of_pairs = activations_of(each.activations, len(each.tokens), where)
            if len(each.tokens) > 1:  # one token is one pair
                shapes.add(of_pairs)
            of_group = group or ("uniform" if values.max() > 0 else "inactive")
            examples.append(ForeignExample(of_group, each.tokens, values, interval))

    add(record.most_positive_activation_records, "top")
    by_quantile = record.random_sample_by_quantile or []
    if len(by_quantile) > 256:
        raise CheckpointError(
            f"{where}: a store holds at most 256 quantiles, found {len(by_quantile)}."
        )
    for number, group in enumerate(reversed(by_quantile)):
        add(group, "stratum", number)
    add(record.random_sample, None)
    if len(shapes) > 1:
        raise CheckpointError(
            f"{where}: some activations belong to tokens, others to pairs of them."
        )
    random = [each for each in examples if each.group in ("uniform", "inactive")]
    sample = [each.activations for each in random or examples]
    tokens = np.concatenate(sample) if sample else np.zeros(0, np.float32)
    everything = [float(each.activations.max()) for each in examples]
    lowest = [float(each.activations.min()) for each in examples]
    figures = [record.mean, record.variance, record.skewness, record.kurtosis]
    moments = [math.nan if each is None else each for each in figures]
    unit = ForeignUnit(
        record.neuron_id.neuron_index,
        examples,
        len(tokens),
        *counted(tokens),
        moments=_usable(moments),
        max=max(everything, default=0.0),
        min=min(lowest, default=0.0),
        labels=labels,
    )
    return next(iter(shapes), None), unit


def _usable(moments: Sequence[float]) -> tuple[float, float, float, float] | None:
    mean, variance, skewness, kurtosis = moments
    finite = all(math.isfinite(each) and abs(each) < 1e30 for each in moments)
    return (mean, variance, skewness, kurtosis) if finite and variance >= 0 else None


def neuron_record(record: LatentRecord) -> NeuronRecord:
    """OpenAI's record of a unit of a store.

    The examples of the groups "weighted" and "bottom" have no place in it. Those of "stratum" have one
    only where they came from such a record: theirs are quantiles, and ours equal ranges of values.
    """
    layer, _, _ = record.location.partition("/")
    if not layer.isdecimal():
        raise InputError(
            f"{record.name}: expected a layer in the location, found {record.location!r}."
        )
    figures = record.statistics

    def records(*groups: str) -> list[ActivationRecord]:
        return [_activation_record(each) for group in groups for each in record.examples(group)]

    found = NeuronRecord(
        NeuronId(record.unit, int(layer)),
        random_sample=records("uniform", "inactive"),
        mean=figures.mean_all,
        variance=figures.variance_all,
        skewness=figures.skewness_all,
        kurtosis=figures.kurtosis_all,
        most_positive_activation_records=records("top"),
    )
    if record.provenance.get("quantile_boundaries") is not None:
        strata = record.examples("stratum")
        n = max((each.interval + 1 for each in strata), default=0)
        found.quantile_boundaries = list(record.provenance["quantile_boundaries"])
        found.random_sample_by_quantile = [
            [_activation_record(each) for each in strata if each.interval == interval]
            for interval in reversed(range(n))
        ]
    return found


def _activation_record(example: Example) -> ActivationRecord:
    return ActivationRecord(
        [float(each) for each in example.activations],
        [piece.decode(errors="replace") for piece in example.pieces],
    )


def write_records(records: Iterable[LatentRecord], folder: str | Path) -> list[Path]:
    """Write ``{layer}/{unit}.json`` for the units of a store that have examples.

    Args:
        records: a store, or some of its records.
        folder: where the folders of layers go.
    """
    return [
        write_neuron_record(neuron_record(each), folder) for each in records if each.all_examples
    ]
