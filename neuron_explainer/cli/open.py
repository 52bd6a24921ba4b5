"""Opening what the verbs name: models, autoencoders, and the text to measure autoencoders on."""

import argparse
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from neuron_explainer import files
from neuron_explainer.cli.common import Result
from neuron_explainer.errors import InputError, SourceError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_explainer.activations.data_config import DataConfig, Part
    from neuron_explainer.activations.windows import TokenBatch, TokenWindows
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.language_model import LanguageModel
    from neuron_explainer.models.locations import ActivationLocation
    from neuron_explainer.models.model_context import ModelContext

DEFAULT_MODEL = "tiny-tales"

# --- models ---


def model_options(verb: argparse.ArgumentParser, default: str = DEFAULT_MODEL) -> None:
    """``--model`` and ``--device``."""
    verb.add_argument(
        "--model",
        metavar="NAME",
        help="name, folder or URL; hf:NAME or hf:FOLDER for any causal model of Hugging Face "
        f"(default: {default})",
    )
    verb.add_argument(
        "--device", metavar="NAME", help="such as cpu or cuda:0 (default: the best there is)"
    )


def data_options(verb: argparse.ArgumentParser) -> None:
    """Flags of :class:`DataConfig`."""
    from neuron_explainer.activations.data_config import DataConfig
    from neuron_explainer.settings.flags import add_flags

    add_flags(verb, DataConfig)


def open_model(name: str | None, device: str | None) -> "ModelContext":
    """The context that ``--model`` and ``--device`` mean."""
    from neuron_explainer.models.open_model import open_model

    return open_model(name or DEFAULT_MODEL, device)


# --- autoencoders ---


class Named(NamedTuple):
    """An autoencoder that can be loaded."""

    path: str
    """Its folder, file or URL; or its name and layer."""
    location: "ActivationLocation | None"
    """Where its inputs come from; None if it does not say."""
    load: "Callable[[], Autoencoder]"
    source: str = ""
    """The folder, file or URL that it is read from."""
    stated: "Mapping[str, Any]" = MappingProxyType({})
    """What is known of it that its files do not say, as arguments of ``Autoencoder.load``."""

    @property
    def label(self) -> str:
        """The last part of its path: what tells it from the others of a run."""
        return Path(self.path).name or self.path


class Autoencoders(NamedTuple):
    """What an AUTOENCODER argument stands for: one autoencoder or several, loaded when asked for."""

    name: str
    """The argument."""
    entries: list[Named]
    record: Result
    """Where the activations of their training came from, as the run recorded it; may be empty."""
    model: str | None = None
    """The model that they are known for."""

    def at(self, location: str | None, layer: int | None) -> "Autoencoders":
        """Those at a location and in a layer; an error if there are none."""
        from neuron_explainer.models.locations import ActivationLocation

        place = None if location is None else ActivationLocation.parse(location)
        chosen = [
            entry._replace(location=found)
            for entry in self.entries
            if (found := _narrowed(entry.location, place, layer)) is not None
        ]
        if not chosen:
            wanted = " ".join(str(each) for each in (place, layer) if each is not None)
            named = f"layer {layer}" if place is None else wanted
            raise InputError(
                f"{self.name} has nothing for {named}; it has {', '.join(self.places)}."
            )
        return self._replace(entries=chosen)

    @property
    def places(self) -> list[str]:
        """The locations of all, as text."""
        return [str(entry.location) for entry in self.entries if entry.location is not None]

    def only(self) -> Named:
        """The one autoencoder; an error that lists them if there are several."""
        if len(self.entries) > 1:
            listed = ", ".join(entry.path for entry in self.entries)
            raise InputError(
                f"{self.name} stands for several autoencoders; choose one with --layer or --location, "
                f"or give one: {listed}."
            )
        return self.entries[0]

    def load(self) -> "dict[str, Autoencoder]":
        """All of them, by path."""
        return {entry.path: entry.load() for entry in self.entries}

    def model_of(self, loaded: "Mapping[str, Autoencoder]") -> str | None:
        """The name of the model that they are for: by the run, the registry or the autoencoders."""
        origin = self.record.get("harvest") or self.record
        names = [origin.get("model"), self.model, *(each.model_name for each in loaded.values())]
        return next((name for name in names if name is not None), None)


def _narrowed(
    found: "ActivationLocation | None", place: "ActivationLocation | None", layer: int | None
) -> "ActivationLocation | None":
    """The part of ``found`` that lies at ``place`` and in ``layer``; None if there is none."""
    if found is None:
        found = place
    elif place is not None:
        if place.path != found.path:
            return None
        if found.layer is None:
            found = place
        elif place.layer not in (None, found.layer):
            return None
    if found is None or layer is None:
        return found
    return found.at(layer) if found.site.per_layer and found.layer in (None, layer) else None


def find_autoencoders(
    name: str, model: str | None = None, location: str | None = None
) -> Autoencoders:
    """What AUTOENCODER means: the folder of a run, a folder, file or URL, or a name of the registry.

    Args:
        name: the argument.
        model: what ``--model`` says; names of the registry are looked for there.
        location: what ``--location`` says. It chooses among several, and tells a single autoencoder
            where its inputs come from if the file does not say.
    """
    if files.is_remote(name) or Path(name).exists():
        found = _at_path(name, location)
    else:
        found = _in_registry(name, model)
    return found if location is None else found.at(location, None)


def _at_path(path: str, location: str | None) -> Autoencoders:
    from neuron_explainer.dictionaries.runs import Run
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.locations import ActivationLocation

    run = None if files.is_remote(path) else Run.find(path)
    if run is None:
        # Only the file says where it belongs: it is read once, and not again when it is asked for.
        place = None if location is None else ActivationLocation.parse(location)
        autoencoder = Autoencoder.load(path, location=place)
        entry = Named(path, autoencoder.location, lambda: autoencoder, path)
        return Autoencoders(path, [entry], _record_of(path, autoencoder))
    entries = []
    for folder in run.results.values():
        stated = files.read_json(folder / "config.json").get("location")
        place = None if stated is None else ActivationLocation.parse(stated)
        load = functools.partial(Autoencoder.load, folder)
        entries.append(Named(str(folder), place, load, str(folder)))
    return Autoencoders(path, entries, run.record)


def _record_of(path: str, autoencoder: "Autoencoder") -> Result:
    """What the autoencoder itself, or the run whose folder it is in, tells of its training."""
    from neuron_explainer.dictionaries.runs import Run

    if isinstance(record := autoencoder.metadata.get("record"), dict):
        return record
    run = None if files.is_remote(path) else Run.containing(path)
    return {} if run is None else run.record


def _in_registry(name: str, model: str | None) -> Autoencoders:
    from neuron_explainer.models.model_registry import (
        list_autoencoder_names,
        list_model_names,
        make_autoencoder_context,
    )

    if model is None:
        known = {each: list_autoencoder_names(each) for each in list_model_names()}
        model = next((each for each, names in known.items() if name in names), None)
        if model is None:
            near = did_you_mean(name, [each for names in known.values() for each in names])
            raise SourceError(
                f"{name}: no such file or folder, and no autoencoder has that name.{near} Names for "
                f"{DEFAULT_MODEL}: {', '.join(known[DEFAULT_MODEL])}; neuron-explainer models lists all."
            )
    context = make_autoencoder_context(model, name, "cpu")
    layers = sorted(context.layer_indices, key=lambda layer: -1 if layer is None else layer)
    config = context.autoencoder_config
    normalization = config.input_normalization
    stated = {**config.stated}
    if normalization is not None:
        stated["input_normalization"] = normalization
    entries = [
        Named(
            f"{name}, layer {layer}",
            context.location.at(layer),
            functools.partial(context.get_autoencoder, layer),
            config.paths[layer],
            stated | {"location": str(context.location.at(layer))},
        )
        for layer in layers
    ]
    return Autoencoders(name, entries, {}, model)


def autoencoder_source(name: str, layer: int | None) -> "tuple[str, dict[str, Any]]":
    """The folder, file or URL of the one autoencoder that a name or path stands for, and what is known
    of it that its files do not say."""
    from neuron_explainer.dictionaries.runs import Run

    if files.is_remote(name) or (Path(name).exists() and Run.find(name) is None):
        return name, {}
    found = find_autoencoders(name)
    entry = (found if layer is None else found.at(None, layer)).only()
    return entry.source, dict(entry.stated)


def by_location(autoencoders: "Mapping[str, Autoencoder]") -> "dict[str, Autoencoder]":
    """Autoencoders by their locations; where several have one location, by their folders' names, and
    where these are equal too, by their paths."""
    places = {name: str(each.location or "") for name, each in autoencoders.items()}
    folders = {name: Path(name).name for name in autoencoders}

    def label(name: str) -> str:
        for labels in (places, folders):
            if labels[name] and list(labels.values()).count(labels[name]) == 1:
                return labels[name]
        return name

    return {label(name): each for name, each in autoencoders.items()}


# --- autoencoders, their model, and text to measure on ---


class Opened:
    """Autoencoders by path, their model, and batches of the text that they are measured on.

    Args:
        args: with ``autoencoder`` (one or a list), ``location``, ``model``, ``device``, ``text``,
            ``num_tokens`` and the flags of :class:`DataConfig`.
        part: which part of the text of the training; of other text all is taken.
    """

    def __init__(self, args: argparse.Namespace, part: "Part") -> None:
        from neuron_explainer.activations.data_config import DataConfig
        from neuron_explainer.settings.flags import from_flags

        names = [args.autoencoder] if isinstance(args.autoencoder, str) else args.autoencoder
        found = [find_autoencoders(name, args.model, args.location) for name in names]
        self.name = " ".join(names)
        self.record = _common_record(found, args.text)
        self.num_tokens, self.n_available = args.num_tokens, 0
        origin = self.record.get("harvest") or self.record
        recorded = origin.get("data", {})
        self.trained_on = origin.get("source_fingerprint")
        self.config: DataConfig = from_flags(
            args, DataConfig, recorded, f"the record of {self.name}"
        )
        self.part: Part = part if args.text is None else "all"
        if self.part == "held_out":
            _check_split(recorded, self.config)
        text = args.text or origin.get("source")
        if text is None:
            raise InputError(
                f"{self.name} does not say what text it was trained on; give --text, a file or folder "
                "of text."
            )
        self.text: str = text
        loaded = [these.load() for these in found]
        self.autoencoders = {path: each for some in loaded for path, each in some.items()}
        models = [these.model_of(some) for these, some in zip(found, loaded, strict=True)]
        model = args.model or next((name for name in models if name is not None), None)
        self.context: ModelContext = open_model(model, args.device)

    def windows(self) -> "TokenWindows":
        """The text, cut into windows."""
        from neuron_explainer.activations.data_config import is_store, open_windows

        if is_store(self.text):
            raise InputError(
                f"{self.text} is a store of activations that does not say what text they are of; "
                "give --text, a file or folder of text."
            )
        windows = open_windows(self.context, self.text, self.config, part=self.part)
        now = windows.corpus.source_fingerprint
        if self.part == "held_out" and self.trained_on not in (None, now):
            raise InputError(
                f"{self.text} is not what it was in training, so it is not known which of it was held "
                "out: give --text, a text that was not trained on."
            )
        return windows

    def token_batches(self) -> "list[TokenBatch]":
        """Batches of tokens, until ``num_tokens`` are reached."""
        batches, n_tokens = [], 0
        windows = self.windows()
        self.n_available = windows.corpus.n_tokens
        for batch in windows:
            batches.append(batch)
            n_tokens += batch.tokens.numel()
            if n_tokens >= self.num_tokens:
                break
        return batches

    def measured_on(self, n_tokens: int) -> str:
        """In words, what ``n_tokens`` tokens were: how many of how many, and of what text."""
        how_many = f"{n_tokens:,} of the {self.n_available:,}"
        if n_tokens >= self.n_available:
            how_many = f"all {n_tokens:,}"
        held_out = "held-out " if self.part == "held_out" else ""
        name = Path(self.text).name or self.text
        return f"{how_many} {held_out}tokens of {name}, with the model {self.context.short_name}"

    def activations(self, autoencoder: "Autoencoder") -> "Iterator[Tensor | tuple[Tensor, Tensor]]":
        """Batches of an autoencoder's inputs; for a transcoder, pairs of inputs and targets."""
        from neuron_explainer.activations.data_config import open_harvester

        if autoencoder.location is None:
            raise InputError(
                f"{self.name} does not say where its inputs come from; give --location, such as "
                "1/mlp.post_act."
            )
        places = [autoencoder.location]
        if autoencoder.is_transcoder:
            if autoencoder.output_location is None:
                raise InputError(
                    f"{self.name}: the transcoder does not say what its output stands for."
                )
            places.append(autoencoder.output_location)
        harvester = open_harvester(self.context, places, self.config)
        for batch in map(harvester, self.token_batches()):
            found = tuple(batch.activations[place] for place in places)
            yield found[0] if len(found) == 1 else (found[0], found[1])

    def only(self) -> "tuple[str, Autoencoder]":
        """Path and autoencoder, if there is only one."""
        if len(self.autoencoders) > 1:
            raise InputError(
                f"{self.name} stands for several autoencoders; choose one with --location, or give "
                f"one: {', '.join(self.autoencoders)}."
            )
        return next(iter(self.autoencoders.items()))

    def save(self, autoencoder: "Autoencoder", args: argparse.Namespace) -> None:
        """Save what was made of an autoencoder in ``--out``, with the record of its training."""
        if self.record:
            autoencoder.metadata["record"] = self.record
        autoencoder.metadata["command"] = _digest(args)
        with files.write_once(args.out, "choose another --out") as folder:
            autoencoder.save(folder)


def is_made_by(folder: Path, args: argparse.Namespace) -> bool:
    """Whether a folder holds the autoencoder that this very command makes."""
    config = folder / "config.json"
    metadata = files.read_json(config).get("metadata") if config.is_file() else None
    return isinstance(metadata, dict) and metadata.get("command") == _digest(args)


def _digest(args: argparse.Namespace) -> str:
    """A hash of what a command was asked for, but for where its result goes and how it is shown."""
    asked = {k: v for k, v in vars(args).items() if k not in ("out", "run", "show", "json")}
    return hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:16]


def _common_record(found: list[Autoencoders], text: str | None) -> Result:
    """The record of all of them. Without ``text``, it must be the same."""
    records = [these.record for these in found]
    differ = [
        these.name for these, record in zip(found, records, strict=True) if record != records[0]
    ]
    if differ and text is None:
        raise InputError(
            f"{found[0].name} and {differ[0]} were not trained on the same text in the same way; give "
            "--text, a file or folder of text, to measure both on."
        )
    return records[0] if not differ else {}


def _check_split(recorded: Result, config: "DataConfig") -> None:
    """Refuse flags that would call other documents held out than were held out in training."""
    for name in ("hold_out", "data_seed", "split", "column", "corpus_tokens"):
        if name in recorded and recorded[name] != getattr(config, name):
            raise InputError(
                f"--{name.replace('_', '-')} is part of what was held out in training ({recorded[name]!r}, "
                f"not {getattr(config, name)!r}): leave it out, or give --text."
            )


def fitted(autoencoder: "Autoencoder", model: "LanguageModel") -> "Autoencoder":
    """The autoencoder, frozen, on the model's device and in its dtype."""
    return autoencoder.to(model.device, model.dtype).eval().requires_grad_(False)
