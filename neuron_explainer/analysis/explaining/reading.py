"""Reading a store's text again with the model: where some units are active, and where they are not.

A store keeps a few examples of each unit and does not know where the unit is *not* active. A reading does,
for the units that are to be explained and those like them. It reads the whole text, or contexts that are
spread evenly over it, and keeps every value above 0.

It also makes a *random autoencoder*, the floor of every score: directions drawn from a normal distribution,
each with the threshold at which it is active as often as one of the units. What a method finds out about
these is no property of the trained dictionary.

Shape legend: ``u`` units that are kept, ``a`` active entries, ``c`` contexts, ``t`` tokens, ``n`` inputs,
``r`` random directions, ``e`` pieces of text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from neuron_explainer.activations.windows import TokenBatch, TokenWindows
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.places import Places, duplicates_of, window_of
from neuron_explainer.analysis.collation.seen import DenseSeen, SparseSeen
from neuron_explainer.analysis.collation.units import Watched, watched
from neuron_explainer.analysis.explaining.examples import Neighbour
from neuron_explainer.analysis.latent_record import Example, LatentRecord, UnitFigures
from neuron_explainer.analysis.records import N_BINS
from neuron_explainer.analysis.token_store import TokenStore
from neuron_explainer.errors import InputError
from neuron_explainer.progress import progress_bar

if TYPE_CHECKING:
    from neuron_explainer.analysis.store import ExampleStore
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MOST_TOKENS = 500_000
RANDOM_LATENTS = 48
_MOST_TEXTS = 300
"""Active texts of a unit that are given, drawn at random if there are more."""
_NEIGHBOURS = 10
_BATCH = 32


class Entries:
    """Where units are active: for each the corpus positions, rising, and the values.

    Args:
        tokens: the text.
        window: tokens shown of an example.
        start: ``[c]`` where each context that was read begins, rising.
        length: ``[c]``
        position: for each unit ``[a]``.
        value: for each unit ``[a]``.
    """

    def __init__(
        self,
        tokens: TokenStore,
        window: int,
        start: Ints,
        length: Ints,
        position: dict[int, Ints],
        value: dict[int, Floats],
    ) -> None:
        self.tokens, self.window, self.start, self.length = tokens, window, start, length
        self._position, self._value = position, value
        self._kept = lru_cache(maxsize=4096)(self._active)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that were read."""
        return int(self.length.sum())

    def positions(self, unit: int) -> Ints:
        """``[a]``: corpus positions where a unit is active, rising."""
        if unit not in self._position:
            raise InputError(f"unit {unit} was not read; name it when the text is read again.")
        return self._position[unit]

    def values(self, unit: int) -> Floats:
        """``[a]``: the values there."""
        return self._value[unit]

    def places(self, random: np.random.RandomState, n: int, window: int) -> tuple[Ints, Ints]:
        """Start and length ``[n]`` of random pieces of text that were read, each in one context."""
        ends = np.cumsum(self.length)
        at = (random.random_sample(n) * ends[-1]).astype(np.int64)
        context = np.searchsorted(ends, at, side="right")
        begin = at - (ends[context] - self.length[context])
        begin = np.maximum(np.minimum(begin, self.length[context] - window), 0)
        return self.start[context] + begin, np.minimum(self.length[context] - begin, window)

    def silent(self, unit: int, start: Ints, length: Ints) -> npt.NDArray[np.bool_]:
        """``[e]``: whether the unit is nowhere active in each piece."""
        at = self.positions(unit)
        found: npt.NDArray[np.bool_] = np.searchsorted(at, start) == np.searchsorted(
            at, start + length
        )
        return found

    def active(self, unit: int) -> Sequence[Example]:
        """Texts where the unit is active, one for each context, in the order of the corpus."""
        found: tuple[Example, ...] = self._kept(unit)
        return found

    def _active(self, unit: int) -> tuple[Example, ...]:
        position, value = self.positions(unit), self.values(unit)
        if not len(position):
            return ()
        context = np.searchsorted(self.start, position, side="right") - 1
        begins = np.flatnonzero(np.diff(context, prepend=-1))
        if len(begins) > _MOST_TEXTS:
            chosen = np.random.RandomState([unit, 2]).permutation(len(begins))[:_MOST_TEXTS]
            chosen.sort()
        else:
            chosen = np.arange(len(begins))
        ends = np.append(begins[1:], len(position))
        peaks = np.array(
            [b + value[b:e].argmax() for b, e in zip(begins[chosen], ends[chosen], strict=True)]
        )
        own = context[peaks]
        offset, length = window_of(position[peaks] - self.start[own], self.length[own], self.window)
        return tuple(self._examples(unit, self.start[own] + offset, length, peaks))

    def _examples(self, unit: int, start: Ints, length: Ints, peaks: Ints) -> Iterator[Example]:
        position, value = self.positions(unit), self.values(unit)
        texts, documents = self.tokens.windows(start, length)
        places = start - self.tokens.corpus.starts[documents]
        first, last = np.searchsorted(position, start), np.searchsorted(position, start + length)
        for rank, ids in enumerate(texts):
            some = slice(int(first[rank]), int(last[rank]))
            activations = np.zeros(len(ids), np.float32)
            activations[position[some] - start[rank]] = value[some]
            yield Example(
                group="uniform",
                interval=0,
                rank=rank,
                value=float(value[peaks[rank]]),
                peak=int(position[peaks[rank]] - start[rank]),
                start=int(start[rank]),
                document=int(documents[rank]),
                position=int(places[rank]),
                tokens=ids,
                activations=activations,
                pairs=False,
                vocabulary=self.tokens.pieces,
            )


class Reading(Entries):
    """Where the units of a store are active, and those that are like them. See :func:`read_again`."""

    def __init__(
        self, *args: Any, candidates: dict[int, list[int]], random: "RandomLatents"
    ) -> None:
        super().__init__(*args)
        self._candidates = candidates
        self.random = random
        self._neighbours: dict[int, list[Neighbour]] = {}

    def neighbours(self, unit: int) -> Sequence[Neighbour]:
        """The candidates that are active together with the unit on some token, by Jaccard's measure."""
        if unit not in self._neighbours:
            own = self.positions(unit)
            found = []
            for other in self._candidates.get(unit, []):
                theirs = self.positions(other)
                both = len(np.intersect1d(own, theirs, assume_unique=True))
                if both:
                    found.append(Neighbour(other, both / (len(own) + len(theirs) - both)))
            self._neighbours[unit] = sorted(found, key=lambda each: (-each.jaccard, each.unit))
        return self._neighbours[unit]


class RandomLatents(Entries):
    """Latents of a random autoencoder, by density; to example sets it is a store and a reading in one."""

    subject = "random"
    name = "random autoencoder"

    @property
    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def __len__(self) -> int:
        return len(self._position)

    def __getitem__(self, unit: int) -> LatentRecord:
        values = self.values(unit)
        n, largest = len(self.positions(unit)), float(values.max(initial=0))
        figures: dict[str, Any] = dict.fromkeys(UnitFigures.__dataclass_fields__, 0.0)
        return LatentRecord(
            name=self.name,
            kind="latent",
            location="",
            unit=unit,
            signed=False,
            statistics=UnitFigures(
                **figures
                | {"n_tokens": self.n_tokens, "count": n, "max": largest}
                | {"density": n / max(self.n_tokens, 1), "last_active": -1}
            ),
            histogram=np.zeros(N_BINS, np.uint32),
            all_examples=(),
        )

    def neighbours(self, unit: int) -> Sequence[Neighbour]:
        """Those of the latents that are active together with one."""
        own, found = self.positions(unit), []
        for other in range(len(self)):
            theirs = self.positions(other)
            both = len(np.intersect1d(own, theirs, assume_unique=True))
            if both and other != unit:
                found.append(Neighbour(other, both / (len(own) + len(theirs) - both)))
        return sorted(found, key=lambda each: (-each.jaccard, each.unit))[:_NEIGHBOURS]

    @cached_property
    def density(self) -> npt.NDArray[np.float64]:
        """``[r]``"""
        counts = [len(self.positions(unit)) for unit in range(len(self))]
        return np.array(counts) / max(self.n_tokens, 1)

    def nearest(self, density: float, n: int) -> list[int]:
        """The latents whose density is nearest to this one, on a scale of logarithms."""
        distance = np.abs(np.log(np.maximum(self.density, 1e-12)) - np.log(max(density, 1e-12)))
        found: list[int] = np.argsort(distance, kind="stable")[:n].tolist()
        return found


def read_again(
    store: "ExampleStore",
    units: Sequence[int],
    context: "ModelContext",
    autoencoder: "Autoencoder | None" = None,
    *,
    seed: int = 0,
    window: int = 32,
    most_tokens: int = MOST_TOKENS,
    n_random: int = RANDOM_LATENTS,
    progress: bool = False,
) -> Reading:
    """Read the text of a store again, and keep where these units and those like them are active.

    Args:
        store: the store.
        units: those that will be explained.
        context: the model of the store.
        autoencoder: that of the store; None for units of the model.
        seed: of the random autoencoder.
        window: tokens shown of an example.
        most_tokens: where the text is longer, contexts that are spread evenly over it are read.
        n_random: how many latents the random autoencoder has; 0 for none.
        progress: show a bar.
    """
    if not len(units):
        raise InputError("units is empty: name at least one.")
    for unit in units:
        if not 0 <= unit < len(store):
            raise InputError(
                f"{store.name} has no {store.kind} {unit}: there are 0 to {len(store) - 1}."
            )
    return _Pass(store, units, context, autoencoder, seed, window, most_tokens, n_random).run(
        progress
    )


@dataclass
class _Pass:
    """One call of :func:`read_again`."""

    store: "ExampleStore"
    units: Sequence[int]
    context: "ModelContext"
    autoencoder: "Autoencoder | None"
    seed: int
    window: int
    most_tokens: int
    n_random: int

    @torch.no_grad()
    def run(self, progress: bool) -> Reading:
        """The reading."""
        place = self._watched()
        candidates = self._candidates()
        kept = np.unique([*self.units, *(u for some in candidates.values() for u in some)])
        windows = self._windows()
        duplicates = duplicates_of(windows)
        n_batches = windows.batches_per_epoch
        share = min(1.0, self.most_tokens / windows.corpus.n_tokens)
        n_read = max(1, int(share * n_batches))
        self.model = self.context.get_or_create_model()
        self.sources = list(place.sources)
        found: list[tuple[Ints, Ints, Floats]] = []
        projected: list[tuple[Ints, Floats]] = []
        contexts: list[tuple[Ints, Ints]] = []
        directions: torch.Tensor | None = None
        numbers = [i * n_batches // n_read for i in range(n_read)]
        for number in progress_bar(numbers, desc="reading", unit=" batches", disable=not progress):
            batch = windows.batch(number)
            places = Places.of(batch, duplicates, False)
            if not len(places):
                continue
            captured = self._captured(batch)
            found.append(_entries(place.see(captured, places), kept))
            contexts.append(_contexts(places))
            if self.n_random:
                x = captured[self.sources[0]].flatten(2).flatten(0, 1)
                x = x[torch.from_numpy(places.cell).to(x.device)].float()
                if directions is None:
                    directions = self._directions(x.shape[1]).to(x.device)
                projected.append((places.position, (x @ directions).cpu().numpy()))
        start, length = (np.concatenate(part) for part in zip(*contexts, strict=True))
        order = np.argsort(start)
        read = self.store.tokens, self.window, start[order], length[order]
        entries = _by_unit(found, kept)
        random = RandomLatents(*read, *self._random(projected, entries[0], int(length.sum())))
        return Reading(*read, *entries, candidates=candidates, random=random)

    def _captured(self, batch: TokenBatch) -> Any:
        device = self.model.device
        pad = None if batch.pad is None else batch.pad.to(device)
        return self.model.capture(batch.tokens.to(device), self.sources, pad=pad)

    def _watched(self) -> Watched:
        store = self.store
        if store.kind == "head":
            raise InputError("examples of heads are pairs of tokens; they are not read again.")
        if (store.kind == "latent") != (self.autoencoder is not None):
            raise InputError(
                f"{store.path} is of {store.kind}s; give its autoencoder, if it has one."
            )
        if self.autoencoder is None:
            return watched(self.context, store.location, CollateConfig())[0]
        named = self.autoencoder
        if named.location is None or named.location.layer is None:
            return watched(self.context, {store.location: named}, CollateConfig())[0]
        return watched(self.context, {store.name: named}, CollateConfig())[0]

    def _windows(self) -> TokenWindows:
        """Contexts as long as those of the store, each in a row of its own."""
        settings = dict(self.store.settings.get("windows", {}))
        corpus, bos = self.store.tokens.corpus, settings.get("bos")
        length = int(settings.get("context_length", 128))
        room = length - (bos is not None)
        if int(corpus.lengths.max()) > room:
            corpus = corpus.cut(room)
        return TokenWindows(corpus, length, _BATCH, concat=False, bos=bos, seed=None)

    def _candidates(self) -> dict[int, list[int]]:
        """For each unit those that may be like it: partners in co-activation, or neighbours by direction."""
        if self.store.meta.get("coactivation_tokens"):
            return {u: [p.unit for p in self.store[u].partners[:_NEIGHBOURS]] for u in self.units}
        rows = self._rows()
        if rows is None:
            return {}
        rows = torch.nn.functional.normalize(rows.float(), dim=1)
        found: dict[int, list[int]] = {}
        for begin in range(0, len(self.units), 256):
            some = torch.tensor(self.units[begin : begin + 256])
            cosine = rows[some] @ rows.T
            cosine[torch.arange(len(some)), some] = -torch.inf
            near = cosine.topk(min(_NEIGHBOURS, len(rows) - 1), dim=1).indices.cpu()
            found |= dict(zip(some.tolist(), near.tolist(), strict=True))
        return found

    def _rows(self) -> torch.Tensor | None:
        """What each unit writes; None where it is not one vector."""
        if self.autoencoder is not None:
            return self.autoencoder.directions.detach()
        from neuron_explainer.analysis.unit_directions import Units

        try:
            return Units(self.context, self.store.location).rows()
        except InputError:
            return None

    def _directions(self, width: int) -> torch.Tensor:
        random = np.random.RandomState([self.seed & 0xFFFFFFFF, 3])
        return torch.from_numpy(random.standard_normal((width, self.n_random)).astype(np.float32))

    def _random(
        self, projected: list[tuple[Ints, Floats]], positions: dict[int, Ints], n_tokens: int
    ) -> tuple[dict[int, Ints], dict[int, Floats]]:
        """Positions and values of random latents whose densities are spread as those of the units."""
        if not projected:
            return {}, {}
        at = np.concatenate([position for position, _ in projected])
        inside = at >= 0
        counts = np.sort([len(positions[unit]) for unit in self.units])
        wanted = np.quantile(counts, np.linspace(0, 1, self.n_random)).astype(np.int64)
        order = np.argsort(at[inside])
        place, value = {}, {}
        for number, count in enumerate(np.clip(wanted, 1, n_tokens - 1).tolist()):
            x = np.concatenate([values[:, number] for _, values in projected])[inside][order]
            threshold = np.partition(x, len(x) - count - 1)[len(x) - count - 1]
            active = np.flatnonzero(x > threshold)
            place[number] = at[inside][order][active]
            value[number] = x[active] - threshold
        return place, value


def _entries(seen: Any, kept: Ints) -> tuple[Ints, Ints, Floats]:
    """Unit, corpus position and value of the active entries of the units that are kept."""
    if isinstance(seen, SparseSeen):
        at = np.minimum(np.searchsorted(kept, seen.unit), len(kept) - 1)
        some = (kept[at] == seen.unit) & (seen.value > 0)
        unit, token, value = seen.unit[some], seen.token[some], seen.value[some]
    else:
        assert isinstance(seen, DenseSeen)
        token, column = np.nonzero(seen.x[:, kept] > 0)
        unit, value = kept[column], seen.x[token, kept[column]]
    position = seen.places.position[token]
    inside = seen.places.in_examples[token]
    return unit[inside], position[inside], value[inside]


def _contexts(places: Places) -> tuple[Ints, Ints]:
    """Start and length of the contexts that may give examples."""
    fresh = ~places.duplicate
    return places.start[fresh], places.length[fresh]


def _by_unit(
    found: list[tuple[Ints, Ints, Floats]], kept: Ints
) -> tuple[dict[int, Ints], dict[int, Floats]]:
    unit, position, value = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((position, unit))
    unit, position, value = unit[order], position[order], value[order]
    begin, end = np.searchsorted(unit, kept), np.searchsorted(unit, kept, side="right")
    spans = dict(zip(kept.tolist(), zip(begin.tolist(), end.tolist(), strict=True), strict=True))
    return (
        {u: position[a:b].astype(np.int64) for u, (a, b) in spans.items()},
        {u: value[a:b].astype(np.float32) for u, (a, b) in spans.items()},
    )
