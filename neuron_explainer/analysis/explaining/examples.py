"""Example sets: the texts that an explanation is made from, and those that it is scored on.

Both parts hold texts where the unit is active and texts where it is not. No text is in both, and no two
texts of a set share a token of the corpus. Texts where the unit is not active are random, or *hard*: there
a unit is active that is like it (its partner in co-activation, or its neighbour among the decoder's rows).

The active texts are ordered by their largest activation and divided into quantiles with equally many
texts, the largest values first. Each part gets equally many from each quantile, chosen at random.

A store knows only the examples that it keeps. Where the unit is *not* active it knows in two cases: its
group "inactive", and a :class:`Reading`, which has read the text again with the model. Otherwise random
texts are taken to be inactive; :attr:`ExampleSet.mislabelled` says how many of them are expected not to be.

Shape legend: ``s`` tokens of a text, ``e`` examples, ``a`` active tokens of a unit.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.explaining.explanation import Source
from neuron_explainer.analysis.latent_record import Example, LatentRecord
from neuron_explainer.analysis.token_store import TokenStore
from neuron_explainer.errors import InputError
from neuron_explainer.settings import check_types
from neuron_explainer.tables import percent

Ints = npt.NDArray[np.int64]

_NEIGHBOURS = 5  # units whose texts are hard ones, at most
_ENOUGH = 4  # times as many candidates for hard texts as are wanted
_ROUNDS = 8  # of drawing twice as many random pieces as before


@dataclass(frozen=True)
class SetConfig:
    """How many texts an example set has."""

    train: int = 40
    """Active texts to make an explanation from."""
    test: int = 50
    """Active texts to score it on. If there are too few for both, they are divided in this proportion."""
    quantiles: int = 10
    """Into how many slices of equally many texts the active ones are divided; fewer if they are few."""
    hard: float = 0.5
    """The share of the inactive texts that are hard, as far as there are any. Each part has as many inactive
    texts as active ones."""
    window: int = 32
    """Tokens of a random text; texts from a store are as long as the store shows them."""
    least: int = 6
    """Fewer active texts than this are an error."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, low, high in (
            ("train", 1, 10_000),
            ("test", 1, 10_000),
            ("quantiles", 1, 100),
            ("window", 2, 4096),
            ("least", 2, 10_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be {low} to {high}, found {getattr(self, name)}.")
        if not 0 <= self.hard <= 1:
            raise InputError(f"hard must be a share from 0 to 1, found {self.hard}.")


class Records(Protocol):
    """What example sets are made of: an ``ExampleStore``."""

    tokens: TokenStore

    @property
    def name(self) -> str:
        """The name of the dictionary or location."""
        ...

    @property
    def subject(self) -> str:
        """The hash of the dictionary, or of the model and the location."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the result of the collation."""
        ...

    def __getitem__(self, unit: int, /) -> LatentRecord: ...

    def __len__(self) -> int: ...


class Neighbour(NamedTuple):
    """A unit like another one."""

    unit: int
    jaccard: float
    """Tokens where both are active, divided by tokens where at least one is."""


class Known(Protocol):
    """Where units are active, from a second reading of the text."""

    def active(self, unit: int) -> Sequence[Example]:
        """Texts where the unit is active, no two of one context: all, or a random choice of them."""
        ...

    def places(self, random: np.random.RandomState, n: int, window: int) -> tuple[Ints, Ints]:
        """Start and length ``[n]`` of random pieces of text that were read, each in one context."""
        ...

    def silent(self, unit: int, start: Ints, length: Ints) -> npt.NDArray[np.bool_]:
        """``[e]``: whether the unit is nowhere active in such a piece."""
        ...

    def neighbours(self, unit: int) -> Sequence[Neighbour]:
        """Units like this one, best first."""
        ...


@dataclass(frozen=True, eq=False)
class LabelledExample:
    """A text of an example set, and whether the unit is active in it."""

    example: Example
    """Tokens and activations; for an inactive text these are 0."""
    source: Source
    quantile: int
    """0 for the largest values; -1 where the unit is not active."""
    neighbour: int = -1
    """For a hard text, the unit that is active in it."""

    @property
    def id(self) -> int:
        """The corpus position of its first token: no two texts of a set have the same one."""
        return self.example.start

    @property
    def active(self) -> bool:
        """Whether the unit is active in it."""
        return self.source == "active"

    @property
    def text(self) -> str:
        """The text as it stands in the corpus."""
        return self.example.text


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """The texts of one unit, divided into those to explain it from and those to score on."""

    subject: str
    unit: int
    name: str
    """The name of the dictionary or location."""
    kind: str
    density: float
    """The share of tokens where the unit is active."""
    scale: float
    """The unit's largest activation."""
    seed: int
    n_quantiles: int
    train: tuple[LabelledExample, ...]
    """In random order."""
    test: tuple[LabelledExample, ...]
    """In random order."""
    available: int
    """How many active texts there were to choose from."""
    mislabelled: float
    """The expected share of inactive texts where the unit is active after all; 0 where all were checked."""

    @classmethod
    def of(
        cls,
        store: Records,
        unit: int,
        seed: int = 0,
        config: SetConfig | None = None,
        reading: Known | None = None,
    ) -> "ExampleSet":
        """Choose the texts of a unit. Equal arguments give equal texts.

        Args:
            store: the store of the unit.
            unit: its number.
            seed: decides which texts are chosen.
            config: how many.
            reading: where the unit is active, if the text was read again. Its texts are used unless the
                store has more.

        Raises:
            InputError: there are not enough texts; the message says how many there are and are needed.
        """
        config = SetConfig() if config is None else config
        check_set_seed(seed)
        record = store[unit]
        _check_kind(record)
        return _Choice(store, record, seed, config, reading).result()

    def ids(self, part: str = "train") -> tuple[int, ...]:
        """The ids of the texts of a part, ``"train"`` or ``"test"``."""
        return tuple(each.id for each in (self.train if part == "train" else self.test))


def check_set_seed(seed: int) -> None:
    """Refuse a seed that example sets cannot be drawn with."""
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"seed must be at least 0 and below 2**64, found {seed!r}.")


def _check_kind(record: LatentRecord) -> None:
    if record.kind == "head":
        raise InputError(
            f"{record.title}: examples of heads are pairs of tokens; only units with one value for each "
            "token can be explained."
        )
    if not record.alive:
        raise InputError(
            f"{record.title} was never active on {record.statistics.n_tokens:,} tokens: there is nothing "
            "to explain."
        )


class _Taken:
    """Pieces of the corpus that are in use, none of which overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._texts: set[bytes] = set()

    def add(self, start: int, tokens: Ints) -> bool:
        """Take a piece; False, and nothing happens, if it touches another one or repeats its tokens."""
        end, text = start + len(tokens), tokens.tobytes()
        at = bisect_right(self._starts, start)
        touches = (at > 0 and self._ends[at - 1] > start) or (
            at < len(self._starts) and self._starts[at] < end
        )
        if touches or text in self._texts:
            return False
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        self._texts.add(text)
        return True


class _Choice:
    """One call of :meth:`ExampleSet.of`."""

    def __init__(
        self,
        store: Records,
        record: LatentRecord,
        seed: int,
        config: SetConfig,
        reading: Known | None,
    ) -> None:
        self.store, self.record, self.seed, self.config = store, record, seed, config
        self.reading = reading
        words = [
            part for number in (seed, record.unit) for part in (number & 0xFFFFFFFF, number >> 32)
        ]
        # The generator whose numbers NumPy promises to keep.
        self.random = np.random.RandomState(words)
        self.taken = _Taken()
        self._records: dict[int, LatentRecord] = {}
        self.expected_active = 0.0  # how many inactive texts are expected not to be

    def result(self) -> ExampleSet:
        """The set."""
        config, record = self.config, self.record
        active = self._active()
        if len(active) < config.least:
            raise InputError(
                f"{record.title} has {len(active)} different active texts; at least {config.least} are "
                "needed. Collate a longer text, keep more examples of each unit, or read the text again "
                "with the model."
            )
        n_quantiles = max(1, min(config.quantiles, len(active) // 2))
        train, test = self._divided(active, n_quantiles)
        wanted = len(train) + len(test)
        hard = self._hard(round(config.hard * wanted))
        random = self._random(wanted - len(hard))
        least = min(wanted, config.least)
        if len(hard) + len(random) < least:
            raise InputError(
                f"{record.title} is active on {percent(record.statistics.density, 2)} of the tokens: "
                f"{len(hard) + len(random)} texts where it is not active were found, at least {least} are "
                "needed. Shorter texts have a better chance (window=)."
            )
        share = len(train) / wanted
        n_hard = round(share * len(hard))
        enough = len(hard) + len(random) == wanted
        n_random = len(train) - n_hard if enough else round(share * len(random))
        n_inactive = len(hard) + len(random)
        return ExampleSet(
            subject=self.store.subject,
            unit=record.unit,
            name=self.store.name,
            kind=record.kind,
            density=record.statistics.density,
            scale=record.scale,
            seed=self.seed,
            n_quantiles=n_quantiles,
            train=self._shuffled([*train, *hard[:n_hard], *random[:n_random]]),
            test=self._shuffled([*test, *hard[n_hard:], *random[n_random:]]),
            available=len(active),
            mislabelled=self.expected_active / n_inactive,
        )

    # --- active texts ---

    def _active(self) -> list[Example]:
        """Texts with a value above 0, largest first; no two share a token or say the same."""
        stored = [e for e in self.record.all_examples if e.group != "inactive" and e.value > 0]
        again = [] if self.reading is None else list(self.reading.active(self.record.unit))
        found = stored if len(stored) > len(again) else again
        found.sort(key=lambda example: (-example.value, example.start))
        return [example for example in found if self.taken.add(example.start, example.tokens)]

    def _divided(
        self, active: list[Example], n_quantiles: int
    ) -> tuple[list[LabelledExample], list[LabelledExample]]:
        """Active texts for both parts, spread evenly over the quantiles."""
        n, config = len(active), self.config
        n_train = min(config.train, round(n * config.train / (config.train + config.test)))
        n_train = min(max(n_train, 1), n - 1)
        n_test = min(config.test, n - n_train)
        ends = [-(-n * i // n_quantiles) for i in range(n_quantiles + 1)]
        train: list[LabelledExample] = []
        test: list[LabelledExample] = []
        for quantile, (begin, end) in enumerate(pairwise(ends)):
            order = (begin + self.random.permutation(end - begin)).tolist()
            texts = [LabelledExample(active[i], "active", quantile) for i in order]
            upto = quantile + 1
            k = min(-(-n_train * upto // n_quantiles) - len(train), len(texts))
            train += texts[:k]
            test += texts[k:][: -(-n_test * upto // n_quantiles) - len(test)]
        return train, test

    # --- inactive texts ---

    def _hard(self, n: int) -> list[LabelledExample]:
        """Up to ``n`` texts where a unit like this one is active and this one is not, as far as is known."""
        if n == 0:
            return []
        candidates: list[tuple[Example, Neighbour]] = []
        for neighbour in self._neighbours():
            if len(candidates) >= _ENOUGH * n:
                break
            candidates += [(each, neighbour) for each in self._texts_of(neighbour.unit)]
        if self.reading is not None and candidates:
            start = np.array([each.start for each, _ in candidates])
            length = np.array([len(each.tokens) for each, _ in candidates])
            silent = self.reading.silent(self.record.unit, start, length).tolist()
            candidates = [
                each for each, is_silent in zip(candidates, silent, strict=True) if is_silent
            ]
        found: list[LabelledExample] = []
        for i in self.random.permutation(len(candidates)).tolist():
            example, neighbour = candidates[i]
            if len(found) < n and self.taken.add(example.start, example.tokens):
                found.append(LabelledExample(_without(example), "hard", -1, neighbour.unit))
                if self.reading is None:
                    self.expected_active += self._chance(len(example.tokens), neighbour)
        return found

    def _neighbours(self) -> list[Neighbour]:
        if self.reading is not None:
            return list(self.reading.neighbours(self.record.unit))[:_NEIGHBOURS]
        partners = sorted(self.record.partners, key=lambda partner: -partner.jaccard)
        return [Neighbour(p.unit, p.jaccard) for p in partners[:_NEIGHBOURS] if p.jaccard > 0]

    def _texts_of(self, unit: int) -> Sequence[Example]:
        if self.reading is not None:
            return self.reading.active(unit)
        found = self._record(unit).all_examples
        return [e for e in found if e.group != "inactive" and e.value > 0]

    def _record(self, unit: int) -> LatentRecord:
        if unit not in self._records:
            self._records[unit] = self.store[unit]
        return self._records[unit]

    def _chance(self, length: int, neighbour: Neighbour | None = None) -> float:
        """How probable it is that the unit is active in a text that nobody has looked at."""
        own = self.record.statistics.density
        silent: float = (1 - own) ** length
        if neighbour is not None:
            other = max(self._record(neighbour.unit).statistics.density, 1e-12)
            both = neighbour.jaccard * (own + other) / (1 + neighbour.jaccard)
            silent *= 1 - min(both / other, 1.0)
        return 1 - silent

    def _random(self, n: int) -> list[LabelledExample]:
        """Up to ``n`` random texts where the unit is not active."""
        found = [] if self.reading is not None else self._stored_silent(n)
        size = 4 * n + 16
        for _ in range(_ROUNDS):
            if len(found) == n:
                break
            start, length = self._places(size)
            if self.reading is not None:
                silent = self.reading.silent(self.record.unit, start, length)
                start, length = start[silent], length[silent]
            found += self._made(start, length, n - len(found))
            size *= 2
        return found

    def _stored_silent(self, n: int) -> list[LabelledExample]:
        """Those that the store keeps: each is a random piece of its context, which is silent as a whole."""
        kept = self.record.examples("inactive")
        if not kept:
            return []
        windows = dict(self.store.settings.get("windows", {}))
        start = np.array([example.start for example in kept])
        length = np.array([len(example.tokens) for example in kept])
        if windows.get("concat") is False:
            # The context begins where the example does, and ends with the document or the window.
            starts = self.store.tokens.corpus.starts
            end = starts[np.searchsorted(starts, start, side="right")]
            size = int(windows.get("context_length", 0)) - (windows.get("bos") is not None)
            room = np.maximum(np.minimum(end - start, size) - length, 0)
            start = start + (self.random.random_sample(len(start)) * (room + 1)).astype(np.int64)
        return self._made(start, length, n, known=True)

    def _places(self, n: int) -> tuple[Ints, Ints]:
        """Start and length of ``n`` random pieces of text, each in one document."""
        window = self.config.window
        if self.reading is not None:
            return self.reading.places(self.random, n, window)
        corpus = self.store.tokens.corpus
        start = (self.random.random_sample(n) * len(corpus.tokens)).astype(np.int64)
        document = np.searchsorted(corpus.starts, start, side="right") - 1
        begin, end = corpus.starts[document], corpus.starts[document + 1]
        start = np.maximum(np.minimum(start, end - window), begin)
        return start, np.minimum(end - start, window)

    def _made(
        self, start: Ints, length: Ints, n: int, *, known: bool = False
    ) -> list[LabelledExample]:
        """Up to ``n`` inactive texts of these pieces."""
        texts, documents = self.store.tokens.windows(start, length)
        positions = start - self.store.tokens.corpus.starts[documents]
        found: list[LabelledExample] = []
        for at, document, position, ids in zip(
            start.tolist(), documents.tolist(), positions.tolist(), texts, strict=True
        ):
            if len(found) == n:
                break
            if not self.taken.add(at, ids):
                continue
            found.append(
                LabelledExample(
                    Example(
                        group="inactive",
                        interval=0,
                        rank=len(found),
                        value=0.0,
                        peak=0,
                        start=at,
                        document=document,
                        position=position,
                        tokens=ids,
                        activations=np.zeros(len(ids), np.float32),
                        pairs=False,
                        vocabulary=self.store.tokens.pieces,
                    ),
                    "random",
                    -1,
                )
            )
            if not known and self.reading is None:
                self.expected_active += self._chance(len(ids))
        return found

    def _shuffled(self, examples: list[LabelledExample]) -> tuple[LabelledExample, ...]:
        return tuple(examples[i] for i in self.random.permutation(len(examples)).tolist())


def _without(example: Example) -> Example:
    """The text of another unit's example, for a unit that is not active in it. The peak stays."""
    silent = np.zeros(len(example.tokens), np.float32)
    return replace(example, group="inactive", value=0.0, activations=silent)
