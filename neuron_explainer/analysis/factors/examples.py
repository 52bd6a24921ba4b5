"""The examples of a dictionary's factors: the strongest tokens of each factor in each layer, and their files.

A folder holds them:

    config.json             settings, counts, and the SHA-256 of the other file
    examples.safetensors    for each location ``factor`` int32, ``score`` float32, ``position`` int64 ``[e]``;
                            and the sentences they stand in, each once: ``sentences/number``,
                            ``sentences/start`` (corpus position) int64, ``sentences/offset`` int64
                            ``[m + 1]`` into ``sentences/tokens`` int32 ``[n]``

``records`` gives them in the shape of the published program, ``{word, index, sent_index, score, sent}``, and
:func:`write_records` writes those as JSON lines. That program's own ``.npy`` files are pickles, which can
run any code when they are read: they are neither read nor written.

Shape legend: ``e`` entries, ``m`` sentences, ``n`` tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from neuron_explainer import files
from neuron_explainer.activations.corpus import Ints
from neuron_explainer.analysis.factors.strongest import Entries
from neuron_explainer.errors import CheckpointError, InputError, SourceError, shown
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import ModelContext

KIND, FORMAT_VERSION = "factor_examples", 1
CONFIG_FILE, EXAMPLES_FILE = "config.json", "examples.safetensors"
_SENTENCES = ("number", "start", "offset", "tokens")


class Record(TypedDict):
    """An example in the shape of the published program."""

    word: str
    """The text of the token."""
    index: int
    """Its place in the sentence, from 0."""
    sent_index: int
    """The number of the sentence in the whole text (in the published program: in its shard)."""
    score: float
    """The value of the factor at this token."""
    sent: str
    """The text of the sentence."""


@dataclass(frozen=True)
class FactorExample:
    """A token at which a factor is strong, in its sentence."""

    factor: int
    location: ActivationLocation
    score: float
    position: int
    """The token's place in the corpus."""
    sent_index: int
    """The number of its sentence in the corpus."""
    index: int
    """Its place in the sentence, from 0."""
    tokens: tuple[int, ...]
    """The ids of the sentence."""

    def record(self, context: ModelContext) -> Record:
        """The example with its texts."""
        return {
            "word": context.decode_token(self.tokens[self.index]),
            "index": self.index,
            "sent_index": self.sent_index,
            "score": self.score,
            "sent": context.decode(self.tokens),
        }


@dataclass(frozen=True)
class SentenceTable:
    """The sentences that examples stand in, each once, in the order of the corpus."""

    number: Ints
    start: Ints
    """``[m]``: the corpus position of the first token."""
    offset: Ints
    """``[m + 1]``: where each sentence begins in ``tokens``."""
    tokens: npt.NDArray[np.int32]

    def row_of(self, position: int) -> int:
        """Which sentence holds a corpus position."""
        return int(np.searchsorted(self.start, position, side="right")) - 1

    def ids(self, row: int) -> tuple[int, ...]:
        """The tokens of a sentence."""
        return tuple(self.tokens[self.offset[row] : self.offset[row + 1]].tolist())


@dataclass(frozen=True, eq=False)
class FactorExamples:
    """The strongest tokens of each factor of a dictionary, at each location that it was applied to."""

    entries: Mapping[ActivationLocation, Entries]
    sentences: SentenceTable
    n_factors: int
    n_examples: int
    """How many were asked for; a factor has fewer where it is active on fewer tokens."""
    n_tokens: int
    """How many tokens were looked at."""
    rms: Mapping[ActivationLocation, float]
    """The root of the mean squared length of the activations at each location."""
    settings: Mapping[str, Any]
    """Model, dictionary and text, as JSON values."""

    @property
    def locations(self) -> list[ActivationLocation]:
        """The locations in the order of the layers."""
        return list(self.entries)

    def at(self, location: LocationLike) -> Entries:
        """The entries of a location; an error that lists the locations if there is no such one."""
        place = ActivationLocation.parse(location)
        if place not in self.entries:
            raise InputError(
                f"there are no examples at {place}; there are some at "
                f"{', '.join(map(str, self.entries))}."
            )
        return self.entries[place]

    def check_factor(self, factor: int) -> None:
        """Raise InputError if there is no such factor."""
        if not 0 <= factor < self.n_factors:
            raise InputError(f"factors are numbered 0 to {self.n_factors - 1}; found {factor}.")

    def examples(
        self,
        factor: int,
        location: LocationLike,
        n: int | None = None,
        *,
        each_sentence_once: bool = False,
    ) -> list[FactorExample]:
        """The examples of a factor, strongest first; the first ``n`` of them.

        With ``each_sentence_once``, only the strongest token of a sentence is an example, and sentences of
        the same tokens are one.
        """
        self.check_factor(factor)
        found = self.at(location).of(factor)
        place, seen = ActivationLocation.parse(location), set()
        examples: list[FactorExample] = []
        for score, position in zip(found.score.tolist(), found.position.tolist(), strict=True):
            if n is not None and len(examples) >= n:
                break
            row = self.sentences.row_of(position)
            tokens = self.sentences.ids(row)
            if each_sentence_once and tokens in seen:
                continue
            seen.add(tokens)
            number, start = int(self.sentences.number[row]), int(self.sentences.start[row])
            where = position - start
            examples.append(FactorExample(factor, place, score, position, number, where, tokens))
        return examples

    def records(
        self, factor: int, location: LocationLike, context: ModelContext, n: int | None = None
    ) -> list[Record]:
        """The examples of a factor with their texts, strongest first."""
        return [example.record(context) for example in self.examples(factor, location, n)]

    # ---- files ---------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``examples.safetensors``, and then ``config.json``: it is there if all is there."""
        folder = files.local_path(folder)
        columns: dict[str, npt.NDArray[Any]] = {
            f"sentences/{name}": getattr(self.sentences, name) for name in _SENTENCES
        }
        for place, entries in self.entries.items():
            columns |= {f"{place}/{name}": x for name, x in entries._asdict().items()}
        path = folder / EXAMPLES_FILE
        with files.atomic_write(path) as temporary:
            safetensors.numpy.save_file(
                {name: np.ascontiguousarray(column) for name, column in columns.items()}, temporary
            )
        config = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "locations": [str(place) for place in self.entries],
            "n_factors": self.n_factors,
            "n_examples": self.n_examples,
            "n_tokens": self.n_tokens,
            "rms": [self.rms[place] for place in self.entries],
            "sha256": files.sha256_of(path),
            "settings": dict(self.settings),
        }
        files.write_json(folder / CONFIG_FILE, config)

    @classmethod
    def load(cls, folder: str | Path) -> "FactorExamples":
        """What :meth:`save` wrote; an error if a file is missing, damaged or of another kind."""
        folder = files.local_path(folder)
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise SourceError(
                f"{folder} holds no {CONFIG_FILE}: expected a folder of factors' examples, as "
                "collect_examples (factors collate) writes it."
            )
        config = files.read_json(path)
        if (config.get("kind"), config.get("format_version")) != (KIND, FORMAT_VERSION):
            raise CheckpointError(
                f"{path}: expected kind {KIND!r} of format_version {FORMAT_VERSION}, found "
                f"{shown(config.get('kind'))} of {shown(config.get('format_version'))}."
            )
        columns = _read_columns(folder / EXAMPLES_FILE, config.get("sha256"))
        try:
            return _assembled(config, columns)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit {EXAMPLES_FILE}: {error}") from None


def _read_columns(path: Path, sha256: Any) -> dict[str, npt.NDArray[Any]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; collate the factors anew.")
    if (digest := files.sha256_of(path)) != sha256:
        raise CheckpointError(
            f"{path}: expected SHA-256 {shown(sha256)}, found {digest}: damaged, or of another folder; "
            "collate the factors anew."
        )
    try:
        return dict(safetensors.numpy.load_file(path))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _assembled(
    config: Mapping[str, Any], columns: Mapping[str, npt.NDArray[Any]]
) -> FactorExamples:
    """The examples, whose columns must fit each other."""
    places = [ActivationLocation.parse(text) for text in config["locations"]]
    entries = {p: Entries(*(columns[f"{p}/{name}"] for name in Entries._fields)) for p in places}
    sentences = SentenceTable(*(columns[f"sentences/{name}"] for name in _SENTENCES))
    n_factors = int(config["n_factors"])
    for place, (factor, score, position) in entries.items():
        if not len(factor) == len(score) == len(position):
            raise ValueError(f"the columns of {place} differ in length")
        if len(factor) and not (factor[0] >= 0 and factor[-1] < n_factors):
            raise ValueError(f"a factor of {place} is none of 0 to {n_factors - 1}")
    if len(sentences.offset) != len(sentences.start) + 1:
        raise ValueError("the columns of the sentences differ in length")
    return FactorExamples(
        entries,
        sentences,
        n_factors,
        int(config["n_examples"]),
        int(config["n_tokens"]),
        dict(zip(places, map(float, config["rms"]), strict=True)),
        config["settings"],
    )


# ---- records in files ------------------------------------------------------------------------------


def write_records(path: str | Path, records: Mapping[int, Sequence[Record]]) -> None:
    """Write the records of factors as JSON lines: the fields of :class:`Record`, and ``factor``."""
    _refuse_npy(path, "written")
    with files.atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for factor, found in records.items():
            for record in found:
                line = {"factor": factor, **record}
                out.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def read_records(path: str | Path) -> dict[int, list[Record]]:
    """The records of factors in a file of JSON lines, by factor and in the order of the file."""
    _refuse_npy(path, "read")
    try:
        lines = files.local_path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None
    found: dict[int, list[Record]] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            factor, record = _record_of(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}, line {number}: expected a record with factor, {', '.join(_FIELDS)}; {error}"
            ) from None
        found.setdefault(factor, []).append(record)
    return found


_FIELDS: dict[str, Any] = {
    "word": str,
    "index": int,
    "sent_index": int,
    "score": float | int,
    "sent": str,
}


def _record_of(line: Any) -> tuple[int, Record]:
    for name, kind in {"factor": int, **_FIELDS}.items():
        if not isinstance(line[name], kind) or isinstance(line[name], bool):
            raise TypeError(f"{name} is {shown(line[name])}")
    return line["factor"], {
        "word": line["word"],
        "index": line["index"],
        "sent_index": line["sent_index"],
        "score": float(line["score"]),
        "sent": line["sent"],
    }


def _refuse_npy(path: str | Path, what: str) -> None:
    if Path(path).suffix == ".npy":
        raise InputError(
            f"{path} is not {what}: a .npy file of records is a pickle, which can run any code when it is "
            "read. Records are written and read as JSON lines (.jsonl). To bring an old file over, run this "
            "where you trust it: for factor, records in np.load(file, allow_pickle=True).item().items(): "
            "for record in records: print(json.dumps({'factor': int(factor), **record}, default=float))."
        )


def sentence_table(positions: Iterable[Ints], starts: Ints, tokens: Any) -> SentenceTable:
    """The sentences that hold any of these corpus positions, each once.

    Args:
        positions: arrays of corpus positions.
        starts: ``[m + 1]``, where each sentence of the corpus begins.
        tokens: the ids of the corpus.
    """
    parts = [np.searchsorted(starts, each, side="right") - 1 for each in positions]
    number = np.unique(np.concatenate([np.empty(0, np.int64), *parts])).astype(np.int64)
    begin, end = starts[number], starts[number + 1]
    offset = np.concatenate([[0], np.cumsum(end - begin)]).astype(np.int64)
    pieces = [tokens[a:b].astype(np.int32) for a, b in zip(begin, end, strict=True)]
    ids = np.concatenate([np.empty(0, np.int32), *pieces]).astype(np.int32)
    return SentenceTable(number, begin.astype(np.int64), offset, ids)
