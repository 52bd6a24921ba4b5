"""Which tokens a unit makes more or less likely, read off the unembedding.

What a unit writes (:mod:`~neuron_explainer.analysis.unit_directions`) is read as if nothing came between
it and the logits: the logit lens (nostalgebraist 2020) for directions. For a row ``r`` the logit of token
``v`` changes, for each unit of activation, by

    r' = r - mean(r)                  only if the final norm subtracts the mean (LayerNorm, not RMSNorm)
    l_v = (r' * gain) . U_v           the final norm's gain folded into the unembedding
    l_v - mean over v of l            a constant added to all logits changes no probability

The norm's division by the scale of the stream is left out: it is a positive factor that depends on the
token, so ranks and signs are right and sizes are relative. Its bias, and a bias of the unembedding, are
the same for every unit and are left out. ``fold="raw"`` leaves out the first line and the gain too.

Before the last layer this is the *direct path only*: what later layers make of the direction is not in
it, and can be the larger part. The last layer's attention counts as before, because its MLP reads it.

A unit that can be negative (a signed latent, a channel) raises the tokens of the bottom list when it is.

Tokens that training hardly touched are left out of the lists, see
:mod:`~neuron_explainer.analysis.hardly_trained`; they count in the histogram and in the moments.

Shape legend: ``m`` units, ``k`` tokens of a list, ``d`` model width, ``v`` vocabulary.
"""

import html
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer.analysis.hardly_trained import (
    HardlyTrained,
    TokenTexts,
    find_hardly_trained,
)
from neuron_explainer.analysis.token_lists import (
    TokenValue,
    TokenValues,
    histogram_svg,
    lists_as_html,
    lists_as_text,
)
from neuron_explainer.analysis.unit_directions import UnitLike, Units, What
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.locations import LocationLike
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import WeightLocationType
from neuron_explainer.progress import progress_bar

Fold = Literal["final_ln", "raw"]
Array = npt.NDArray[Any]
N_BINS = 60
_KEPT_RESULTS = 1024  # about 4 kB each
_CHUNK_BYTES = 2**26
_ROWS_AT_ONCE = 2**12


@dataclass(frozen=True, repr=False)
class TopLogits:
    """What one unit adds to the logits, for each unit of activation."""

    unit: str
    """Such as ``"latent 1234 of 2/resid.torso.delta_mlp"``."""
    top: TokenValues
    """The tokens whose logits it raises most, largest first."""
    bottom: TokenValues
    """The tokens whose logits it lowers most, lowest first."""
    counts: tuple[int, ...]
    """How many tokens of the whole vocabulary are in each bin."""
    edges: tuple[float, ...]
    """The ends of the bins, one more than there are bins."""
    skewness: float
    """Of the logits of the whole vocabulary; 0 for a symmetric distribution."""
    kurtosis: float
    """Of the logits of the whole vocabulary; 3 for a normal distribution."""
    fold: Fold
    direct_path_only: bool
    """Whether later parts of the model, which are not looked at, read what the unit writes."""
    signed: bool
    """Whether the unit is active below 0 too; it then does the opposite."""
    n_left_out: int
    """How many hardly trained tokens are left out of the two lists."""

    @property
    def note(self) -> str:
        """How the numbers are meant, in one sentence."""
        parts = [
            "logits per unit of activation",
            "final norm's gain folded, its scale left out"
            if self.fold == "final_ln"
            else "no final norm",
            "mean over the vocabulary 0",
        ]
        if self.direct_path_only:
            parts.append("direct path only: later parts of the model are not in it")
        if self.signed:
            parts.append("the opposite where the activation is negative")
        if self.n_left_out:
            parts.append(f"{self.n_left_out:,} hardly trained tokens left out")
        return "; ".join(parts)

    def __repr__(self) -> str:
        table = lists_as_text(("raises", "lowers"), self.top, self.bottom)
        moments = f"skewness {self.skewness:.2f}, kurtosis {self.kurtosis:.2f}"
        return f"{self.unit} ({self.note})\n{table}\n{moments}"

    def _repr_html_(self) -> str:
        return (
            f"<div><b>{html.escape(self.unit)}</b><br><small>{html.escape(self.note)}</small>"
            f"{lists_as_html(('raises', 'lowers'), self.top, self.bottom)}"
            f"{histogram_svg(self.counts, self.edges)}"
            f"<br><small>skewness {self.skewness:.2f}, kurtosis {self.kurtosis:.2f}</small></div>"
        )


@dataclass(frozen=True, eq=False, repr=False)
class LogitTable:
    """The lists of many units as arrays: what a store or a search keeps.

    Units that write nothing (latents left out of memory, rows of zeros) have the token -1 and the
    value NaN.
    """

    units: npt.NDArray[np.int64]
    """``[m]``"""
    top_tokens: npt.NDArray[np.int32]
    """``[m, k]``, largest first."""
    top_values: npt.NDArray[np.float32]
    """``[m, k]``"""
    bottom_tokens: npt.NDArray[np.int32]
    """``[m, k]``, lowest first."""
    bottom_values: npt.NDArray[np.float32]
    """``[m, k]``"""
    skewness: npt.NDArray[np.float32]
    """``[m]``"""
    kurtosis: npt.NDArray[np.float32]
    """``[m]``"""

    def __len__(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        return f"LogitTable({len(self):,} units, {self.top_tokens.shape[1]} tokens up and down)"


class Directions:
    """The directions of all units of an autoencoder or of a location, and what was computed of them.

    The model's unembedding is read and folded once, at the first question; after that the lists of a
    unit take milliseconds. The folded copy has the size of the unembedding in float32 and lives as long
    as this object. What was read or computed is kept: after an edit of the model or of the autoencoder
    make a new object.

    Args:
        context: the model.
        what: an autoencoder, or a location of the model such as ``"3/mlp.post_act"`` for its neurons.
        fold: ``"final_ln"``: with the final norm's gain, and its subtraction of the mean if it has one;
            ``"raw"``: the unembedding alone.
        keep_hardly_trained: keep tokens that training hardly touched in the lists.
        location: where the autoencoder writes; None: the location that it records itself.
    """

    def __init__(
        self,
        context: ModelContext,
        what: What,
        *,
        fold: Fold = "final_ln",
        keep_hardly_trained: bool = False,
        location: LocationLike | None = None,
    ) -> None:
        if fold not in ("final_ln", "raw"):
            raise InputError(f"fold must be 'final_ln' or 'raw', found {fold!r}.")
        self.context = context
        self.units = Units(context, what, location)
        self.fold: Fold = fold
        self.keep_hardly_trained = keep_hardly_trained
        self._made: _Readout | None = None
        self._kept: dict[tuple[int, int, tuple[float, float] | None], TopLogits] = {}
        self._lock = threading.RLock()  # servers ask from several threads

    def top_logits(
        self, unit: UnitLike, k: int = 10, *, limits: tuple[float, float] | None = None
    ) -> TopLogits:
        """The tokens that a unit raises and lowers most, and the histogram of all logits.

        Args:
            unit: its number; ``"3.17"`` is channel 17 of head 3 at ``attn.v_out``.
            k: the length of each list; shorter if the vocabulary is.
            limits: the ends of the histogram, outside which tokens are not counted. Default: as far as
                the largest logit on both sides of 0, so that every token is counted.
        """
        key = (self.units.index(unit), k, limits)
        with self._lock:
            if key not in self._kept:
                if len(self._kept) >= _KEPT_RESULTS:
                    del self._kept[next(iter(self._kept))]  # the oldest
                (self._kept[key],) = self._compute([key[0]], k, limits)
            return self._kept[key]

    def beside(self, what: What, *, location: LocationLike | None = None) -> "Directions":
        """The directions of other units of the same model, with the same folded copy of the unembedding."""
        other = Directions(
            self.context,
            what,
            fold=self.fold,
            keep_hardly_trained=self.keep_hardly_trained,
            location=location,
        )
        if other.units.behind_final_norm == self.units.behind_final_norm:
            other._made = self._readout
        return other

    @torch.no_grad()
    def tokens_of(self, vector: Tensor, k: int = 10) -> tuple[TokenValues, TokenValues]:
        """The tokens that any vector ``[d]`` in the stream raises most, and those that it lowers most."""
        row = vector.to(self._readout.matrix)[None]
        listed = self._logits(row)[:, : self._readout.n_listed]
        (up,), (down,) = (self._readout.lists_of(listed, k, sign) for sign in (1, -1))
        return up, down

    def top_logits_of(
        self, units: Sequence[UnitLike], k: int = 10, *, chunk_bytes: int = _CHUNK_BYTES
    ) -> Iterator[TopLogits]:
        """:meth:`top_logits` of many units, which reads the unembedding once for several of them.

        Args:
            units: an InputError if one of them writes nothing.
            k: the length of each list; shorter if the vocabulary is.
            chunk_bytes: size of the logits that are computed together.
        """
        chosen = [*map(self.units.index, units)]
        step = max(1, chunk_bytes // (4 * len(self._readout.order)))
        for start in range(0, len(chosen), step):
            yield from self._compute(chosen[start : start + step], k, None)

    def logits(self, units: Sequence[int]) -> Tensor:
        """The logits of some units over the whole vocabulary, ``[m, v]`` float32, in order of ids."""
        found = self._logits(self.units.rows([self.units.index(unit) for unit in units]))
        return torch.empty_like(found).index_copy_(1, self._readout.order, found)

    def table(
        self,
        k: int = 10,
        units: Sequence[int] | None = None,
        *,
        chunk_bytes: int = _CHUNK_BYTES,
        progress: bool = False,
    ) -> LogitTable:
        """The lists of many units; the logits of ``chunk_bytes`` are held at a time.

        Args:
            k: the length of each list; shorter if the vocabulary is.
            units: None: all.
            chunk_bytes: size of the logits that are computed together.
            progress: show a bar.
        """
        chosen = range(self.units.n_units) if units is None else [*map(self.units.index, units)]
        step = max(1, chunk_bytes // (4 * len(self._readout.order)))
        parts = []
        with progress_bar(total=len(chosen), desc="logits", disable=not progress) as bar:
            for start in range(0, len(chosen), step):
                some = chosen[start : start + step]
                parts.append(self._lists(list(some), k))
                bar.update(len(some))
        if not parts:
            raise InputError("units is empty: name at least one.")
        columns = map(np.concatenate, zip(*parts, strict=True))
        return LogitTable(np.array(chosen, dtype=np.int64), *columns)

    @property
    def hardly_trained(self) -> HardlyTrained:
        """Which tokens are left out of the lists, unless they are kept."""
        return self._readout.hardly_trained

    def __repr__(self) -> str:
        kept = ", keep_hardly_trained=True" if self.keep_hardly_trained else ""
        return (
            f"Directions({self.units.n_units:,} {self.units.name}, {self.context.model_name}, "
            f"fold={self.fold!r}{kept})"
        )

    # --- parts ---

    @property
    def _readout(self) -> "_Readout":
        with self._lock:
            if self._made is None:
                fold = self.fold == "final_ln" and not self.units.behind_final_norm
                self._made = _Readout.of(self.context, fold, self.keep_hardly_trained)
            return self._made

    def _logits(self, rows: Tensor) -> Tensor:
        """``[m, d] -> [m, v]``, the tokens that may be listed first."""
        return torch.nn.functional.linear(rows, self._readout.matrix)

    @torch.no_grad()
    def _compute(
        self, units: list[int], k: int, limits: tuple[float, float] | None
    ) -> list[TopLogits]:
        rows = self.units.rows(units)
        for unit, writes in zip(units, rows.any(dim=1).tolist(), strict=True):
            if not writes:
                raise InputError(
                    f"{self.units.name_of(unit)} writes nothing: its direction is zero, as that of a latent "
                    "that was left out of memory."
                )
        logits = self._logits(rows)
        listed = logits[:, : self._readout.n_listed]
        lists = [self._readout.lists_of(listed, k, sign) for sign in (1, -1)]
        found = []
        for unit, row, top, bottom in zip(units, logits, *lists, strict=True):
            counts, edges = _histogram(row, limits)
            skewness, kurtosis = _shape(row[None].double())
            found.append(
                TopLogits(
                    unit=self.units.name_of(unit),
                    top=top,
                    bottom=bottom,
                    counts=counts,
                    edges=edges,
                    skewness=float(skewness),
                    kurtosis=float(kurtosis),
                    fold=self.fold,
                    direct_path_only=self.units.direct_path_only,
                    signed=self.units.signed,
                    n_left_out=len(self._readout.order) - self._readout.n_listed,
                )
            )
        return found

    @torch.no_grad()
    def _lists(self, units: list[int], k: int) -> tuple[Array, ...]:
        """The columns of a :class:`LogitTable`, without the units."""
        rows = self.units.rows(units)
        empty = ~rows.any(dim=1)
        logits = self._logits(rows)
        columns = []
        for sign in (1, -1):
            tokens, values = self._readout.largest(logits[:, : self._readout.n_listed], k, sign)
            columns += [tokens.int().masked_fill(empty[:, None], -1)]
            columns += [values.masked_fill(empty[:, None], torch.nan)]
        columns += [x.float().masked_fill(empty, torch.nan) for x in _shape(logits)]
        return tuple(column.cpu().numpy() for column in columns)


def top_logits(
    context: ModelContext,
    what: What,
    unit: UnitLike,
    k: int = 10,
    *,
    fold: Fold = "final_ln",
    keep_hardly_trained: bool = False,
    location: LocationLike | None = None,
) -> TopLogits:
    """The tokens that one unit raises and lowers most.

    Reads and folds the whole unembedding; for more than one unit make a :class:`Directions` once. The
    arguments are those of :class:`Directions` and of :meth:`Directions.top_logits`.
    """
    directions = Directions(
        context, what, fold=fold, keep_hardly_trained=keep_hardly_trained, location=location
    )
    return directions.top_logits(unit, k)


class _Readout:
    """The unembedding, centred and folded: what each channel of the stream does to each token.

    Tokens that may be listed come first, so that a search for the largest looks at a view.
    """

    def __init__(
        self,
        matrix: Tensor,
        order: Tensor,
        n_listed: int,
        hardly_trained: HardlyTrained,
        texts: TokenTexts,
    ) -> None:
        self.matrix = matrix
        """``[v, d]`` float32"""
        self.order = order
        """``[v]`` int64: the token of each row of ``matrix``."""
        self.n_listed = n_listed
        self.hardly_trained = hardly_trained
        self.texts = texts

    @classmethod
    @torch.no_grad()
    def of(cls, context: ModelContext, fold: bool, keep_hardly_trained: bool) -> "_Readout":
        """Read and fold the weights of a model."""
        weight = context.get_weight(WeightLocationType.UNEMBEDDING)  # [d, v]
        gain = _final_gain(context) if fold else torch.ones(len(weight), device=weight.device)
        rows = weight.new_empty(weight.shape[::-1], dtype=torch.float32)
        for some in torch.split(torch.arange(len(rows), device=rows.device), _ROWS_AT_ONCE):
            rows[some] = weight[:, some].t().float() * gain.float()
        del weight
        texts = TokenTexts(context)
        marks = find_hardly_trained(rows, texts)
        marked = marks.marked if not keep_hardly_trained else torch.zeros_like(marks.marked)
        if bool(marked.all()):
            raise InputError(
                f"{context.model_name}: every token counts as hardly trained; use "
                "keep_hardly_trained=True."
            )
        order = torch.cat([(~marked).nonzero(), marked.nonzero()]).flatten().to(rows.device)
        if fold and context.norms_subtract_mean:
            rows -= rows.mean(dim=1, keepdim=True)
        rows -= rows.mean(dim=0)
        return cls(rows[order], order, int((~marked).sum()), marks, texts)

    def largest(self, listed: Tensor, k: int, sign: int) -> tuple[Tensor, Tensor]:
        """The tokens and values of the ``k`` largest of ``[m, listed]`` (``sign`` -1: of the
        smallest), each ``[m, k]``. Of equal values the token with the lowest id comes first."""
        if k < 1:
            raise InputError(f"k must be at least 1, found {k}.")
        values, places = top_k(listed if sign > 0 else -listed, min(k, listed.shape[1]))
        return self.order[places], sign * values

    def lists_of(self, listed: Tensor, k: int, sign: int) -> list[TokenValues]:
        """The same with the texts, a list for each unit."""
        found = zip(*(each.tolist() for each in self.largest(listed, k, sign)), strict=True)
        return [tuple(map(TokenValue, ids, self.texts(ids), values)) for ids, values in found]


def _final_gain(context: ModelContext) -> Tensor:
    """The final norm's gain ``[d]``; ones for a norm without parameters, as OLMo's."""
    try:
        return context.get_weight(WeightLocationType.LAYER_NORM_GAIN_FINAL)
    except LocationError as error:
        norm = context.get_or_create_model().reader("resid.post_ln_f")
        if not list(norm.parameters()):
            return torch.ones(context.n_residual_stream_channels, device=context.device)
        raise LocationError(f"{error} Use fold='raw' to leave the norm out.") from error


def _histogram(
    logits: Tensor, limits: tuple[float, float] | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if limits is None:
        most = float(logits.abs().max())
        limits = (-most, most)
    if not limits[0] < limits[1]:
        raise InputError(f"limits: expected a lower and a higher end, found {limits}.")
    counts = torch.histc(logits.float().cpu(), N_BINS, *limits)
    edges = np.linspace(*limits, N_BINS + 1)
    return tuple(counts.long().tolist()), tuple(edges.tolist())


def _shape(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Skewness and kurtosis of each row of ``[m, v]``, ``[m]``; 0 where all are equal."""
    x = logits - logits.mean(dim=1, keepdim=True)
    square = x * x
    m2, m3, m4 = (
        torch.linalg.vecdot(a, b).double() / logits.shape[1]
        for a, b in ((x, x), (square, x), (square, square))
    )
    skewness, kurtosis = m3 / m2.pow(1.5), m4 / m2.square()
    return skewness.nan_to_num(0.0), kurtosis.nan_to_num(0.0)
