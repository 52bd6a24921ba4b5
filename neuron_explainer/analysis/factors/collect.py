"""One pass over the sentences: the strongest tokens of every factor of one or more dictionaries.

Shape legend: ``t`` tokens of a batch, ``n`` width of a location.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.activations.chunks import ActivationBatch
from neuron_explainer.activations.harvest import Harvester
from neuron_explainer.analysis.factors.examples import CONFIG_FILE, FactorExamples, sentence_table
from neuron_explainer.analysis.factors.sentences import Sentences
from neuron_explainer.analysis.factors.strongest import Entries, Strongest
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.evaluation.pieces import LATENTS_AT_ONCE
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.progress import progress_bar

PARTIAL_FOLDER = ".unfinished"
_LOCK_FILE = ".lock"


@dataclass(frozen=True)
class FactorDictionary:
    """A dictionary and where to look at its factors."""

    autoencoder: Autoencoder
    """Any autoencoder whose latents are >= 0; what sparse coding learned is one, with FISTA's codes."""
    locations: Sequence[ActivationLocation]
    """One location in each layer that the dictionary is applied to, in the order of the layers."""
    source: str = ""
    """The folder or file that it was loaded from, recorded with the examples."""


def collect_examples(
    context: ModelContext,
    dictionaries: Mapping[str, FactorDictionary],
    sentences: Sentences,
    folder: str | Path | None = None,
    *,
    n_examples: int = 500,
    shard_size: int = 1000,
    batch_size: int = 16,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, FactorExamples]:
    """The ``n_examples`` strongest tokens of each factor at each location, over all sentences.

    Args:
        context: the model.
        dictionaries: by name.
        sentences: the text; the last shard counts as every other, and so does a text shorter than one.
        folder: where to write the examples: here if there is one dictionary, else in a folder for each
            name. The pass is noted here after each shard, so that an interrupted one continues.
            None: nothing is written.
        n_examples: how many tokens of each factor; several may stand in one sentence.
        shard_size: sentences between two merges; the result does not depend on it.
        batch_size: sentences that go through the model at once.
        settings: what else is recorded with the examples, as JSON values.
        progress: whether to show a progress bar.
    """
    _check(dictionaries, shard_size)
    sentences.check(context)
    work = _Pass(context, dictionaries, sentences, n_examples, batch_size, settings or {})
    per_shard = max(1, shard_size // batch_size)
    if folder is None:
        work.run(0, per_shard, None, progress)
        return work.finish()
    partial = _Partial(files.local_path(folder), work.describe())
    with partial.claimed():
        if partial.holds_something and (done := work.finished(partial.folder)):
            files.remove_abandoned(partial.unfinished)  # by a process killed as its last step
            return done
        partial.check()
        work.run(partial.load(work), per_shard, partial, progress)
        found = work.finish()
        for name, examples in found.items():
            examples.save(work.place_of(name, partial.folder))
        partial.remove()
    return found


def _check(dictionaries: Mapping[str, FactorDictionary], shard_size: int) -> None:
    if not dictionaries:
        raise InputError("no dictionary was given.")
    if shard_size < 1:
        raise InputError(f"shard_size must be at least 1, found {shard_size}.")
    for name, each in dictionaries.items():
        if not each.locations:
            raise InputError(f"{name}: no location was given.")
        for place in each.locations:
            if place.site.per_layer and place.layer is None:
                raise InputError(f"{name}: expected a location in one layer, found {place}.")


class _Pass:
    """What a pass has found so far."""

    def __init__(
        self,
        context: ModelContext,
        dictionaries: Mapping[str, FactorDictionary],
        sentences: Sentences,
        n_examples: int,
        batch_size: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.context, self.dictionaries, self.sentences = context, dictionaries, sentences
        self.n_examples, self.batch_size, self.settings = n_examples, batch_size, settings
        self.strongest = {
            (name, place): Strongest(each.autoencoder.n_latents, n_examples)
            for name, each in dictionaries.items()
            for place in each.locations
        }
        places = dict.fromkeys(place for _, place in self.strongest)
        self.squares = dict.fromkeys(places, 0.0)  # of the lengths of all activations
        self.n_tokens = 0
        self.harvester = Harvester(context, list(places), keep_bos=False)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        return {
            "model": self.context.reference,
            "corpus": self.sentences.corpus.fingerprint,
            "sentence_length": self.sentences.length,
            "bos": self.sentences.bos,
            "n_examples": self.n_examples,
            "batch_size": self.batch_size,  # the number of batches done counts in these
            "dictionaries": {
                name: [hash_of(each.autoencoder), *map(str, each.locations)]
                for name, each in self.dictionaries.items()
            },
        }

    def run(self, done: int, per_shard: int, partial: "_Partial | None", progress: bool) -> None:
        """Take in all batches after the first ``done``; a shard is ``per_shard`` batches."""
        windows = self.sentences.windows(self.batch_size)
        numbers = range(done, windows.batches_per_epoch)
        for number in progress_bar(numbers, desc="factors", unit=" batches", disable=not progress):
            if number > done and number % per_shard == 0:
                self.merge()
                if partial is not None:
                    partial.save(self, number)
            self.add(windows.batch(number))

    def add(self, batch: Any) -> None:
        """Take in a batch of sentences."""
        found = self.harvester(batch)
        positions = self._positions(found)
        self.n_tokens += len(positions)
        for place, x in found.activations.items():
            self.squares[place] += float(x.double().square().sum())
        for name, each in self.dictionaries.items():
            for place in each.locations:
                self._encode(name, place, found.activations[place], positions)

    def _positions(self, found: ActivationBatch) -> Tensor:
        """Where the tokens stand in the corpus, ``[t]``."""
        starts = torch.from_numpy(self.sentences.corpus.starts)
        shift = 0 if self.sentences.bos is None else 1
        return starts[found.document.cpu()] + found.position.cpu() - shift

    @torch.no_grad()
    def _encode(self, name: str, place: ActivationLocation, x: Tensor, positions: Tensor) -> None:
        autoencoder = self.dictionaries[name].autoencoder
        at_once = max(1, LATENTS_AT_ONCE // autoencoder.n_latents)
        parts = zip(torch.split(x, at_once), torch.split(positions, at_once), strict=True)
        for rows, where in parts:
            latents = autoencoder.encode_sparse(rows.to(autoencoder.device, autoencoder.dtype))
            self.strongest[name, place].add(latents, where)

    def merge(self) -> None:
        """Keep only what may still be one of the strongest."""
        for each in self.strongest.values():
            each.merge()

    def finish(self) -> dict[str, FactorExamples]:
        """The examples of every dictionary."""
        return {name: self._examples(name) for name in self.dictionaries}

    def place_of(self, name: str, folder: Path) -> Path:
        """Where the examples of a dictionary are, in the folder of the pass."""
        return folder if len(self.dictionaries) == 1 else folder / file_name(name)

    def finished(self, folder: Path) -> dict[str, FactorExamples]:
        """What this very pass has written to a folder before; empty if anything is missing or different."""
        found = {}
        for name, subject in self.dictionaries.items():
            place = self.place_of(name, folder)
            if not (place / CONFIG_FILE).is_file():
                return {}
            each = found[name] = FactorExamples.load(place)
            same = each.settings == self._settings(name) and each.n_examples == self.n_examples
            if not same or each.locations != list(subject.locations):
                return {}
        return found

    def _examples(self, name: str) -> FactorExamples:
        subject, corpus = self.dictionaries[name], self.sentences.corpus
        entries = {place: self.strongest[name, place].merge() for place in subject.locations}
        n_tokens = max(1, self.n_tokens)
        return FactorExamples(
            entries,
            sentence_table(
                (each.position for each in entries.values()), corpus.starts, corpus.tokens
            ),
            subject.autoencoder.n_latents,
            self.n_examples,
            self.n_tokens,
            {place: float(np.sqrt(self.squares[place] / n_tokens)) for place in entries},
            self._settings(name),
        )

    def _settings(self, name: str) -> dict[str, Any]:
        """What is recorded with the examples of a dictionary."""
        subject, corpus = self.dictionaries[name], self.sentences.corpus
        return {
            "model": self.context.reference,
            "n_layers": self.context.n_layers,
            "dictionary": {
                "name": name,
                "source": subject.source,
                "hash": hash_of(subject.autoencoder),
            },
            "corpus": {
                "name": Path(corpus.name).name,
                "fingerprint": corpus.fingerprint,
                "n_sentences": len(corpus),
                "sentence_length": self.sentences.length,
            },
            "bos": self.sentences.bos,
            **self.settings,
        }


class _Partial:
    """A pass that is under way, in a folder inside the one that it will fill."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.unfinished = folder / PARTIAL_FOLDER

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes out of the folder."""
        if self.folder.is_file():
            raise InputError(f"{self.folder} is a file; the examples need a folder.")
        with files.claim(self.folder, "folder"):
            yield

    @property
    def holds_something(self) -> bool:
        """Whether there is something in the folder, but no unfinished pass."""
        names = files.list_folder(self.folder, but=_LOCK_FILE)
        return not self.unfinished.is_dir() and not all(map(files.is_leftover, names))

    def check(self) -> None:
        """Refuse a folder that is neither empty nor that of an unfinished pass."""
        if self.holds_something:
            raise InputError(
                f"{self.folder} is not empty; give a new folder, or that of an interrupted pass."
            )
        for folder in (self.folder, *self.folder.iterdir()):  # those of several dictionaries
            files.remove_leftovers(folder)

    def load(self, work: _Pass) -> int:
        """Continue the pass that was interrupted here; the number of batches that it has done."""
        if not (self.unfinished / "config.json").is_file():
            self.save(work, 0)  # from here on the folder is known to hold an unfinished pass
            return 0
        state = files.read_json(self.unfinished / "config.json")
        if state.get("settings") != self.settings:
            raise InputError(
                f"{self.folder} holds an interrupted pass with other settings, over another text, or of "
                "another dictionary; give the same, or a new folder."
            )
        path = self.unfinished / "state.safetensors"
        if not path.is_file() or files.sha256_of(path) != state.get("sha256"):
            raise CheckpointError(f"{path} is damaged; remove {self.unfinished} to begin anew.")
        columns = safetensors.numpy.load_file(path)
        for (name, place), each in work.strongest.items():
            key = f"{name}/{place}"
            each.restore(Entries(*(columns[f"{key}/{field}"] for field in Entries._fields)))
        work.squares = {place: state["squares"][str(place)] for place in work.squares}
        work.n_tokens = state["n_tokens"]
        return int(state["batches"])

    def save(self, work: _Pass, batches: int) -> None:
        """Note what was found in the first ``batches`` batches."""
        columns: dict[str, npt.NDArray[Any]] = {}
        for (name, place), each in work.strongest.items():
            for field, column in each.merge()._asdict().items():
                columns[f"{name}/{place}/{field}"] = np.ascontiguousarray(column)
        with files.atomic_folder(self.unfinished, overwrite=True) as temporary:
            path = temporary / "state.safetensors"
            with files.plain_write(path):
                safetensors.numpy.save_file(columns, path)
            state = {
                "settings": self.settings,
                "batches": batches,
                "squares": {str(place): value for place, value in work.squares.items()},
                "n_tokens": work.n_tokens,
                "sha256": files.sha256_of(path),
            }
            files.write_json(temporary / "config.json", state)

    def remove(self) -> None:
        """Remove the notes, when the examples have been written."""
        files.remove(self.unfinished)


def file_name(name: str) -> str:
    """The name of the folder of a dictionary's examples, inside that of several dictionaries."""
    return re.sub(r"[^\w.+-]+", "-", name)


def hash_of(autoencoder: Autoencoder) -> str:
    """A hash of everything that decides an autoencoder's codes."""
    digest = hashlib.sha256(repr(autoencoder.activation).encode())
    tensors = (autoencoder.encoder.weight, autoencoder.latent_bias, autoencoder.pre_bias)
    for x in (*tensors, autoencoder.decoder.weight):
        digest.update(f"{list(x.shape)}".encode())
        digest.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
