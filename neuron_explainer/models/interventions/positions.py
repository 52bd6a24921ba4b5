"""Which tokens of each row an intervention changes.

Shape legend: ``b`` batch, ``s`` positions of this call.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError, shown
from neuron_explainer.models.language_model import LanguageModel, Prompts

PositionsLike = int | slice | str | Sequence[int] | Tensor | None
"""The forms in which a caller may give positions."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Which tokens of a row, in one of the forms that the package's docstring lists."""

    chosen: tuple[int, ...] | slice | Literal["last"] | Tensor | None

    @classmethod
    def of(cls, given: PositionsLike) -> "Positions":
        """Positions in any form that a caller may give."""
        if given is None:
            return cls(None)
        if isinstance(given, str) and given == "last":
            return cls("last")
        if isinstance(given, slice):
            return cls(_checked_slice(given))
        if isinstance(given, Tensor) and given.dtype == torch.bool and given.dim() in (1, 2):
            if not bool(given.any()):
                raise InputError(
                    "positions are a mask that is False everywhere: nothing would change."
                )
            return cls(given if given.dim() == 2 else given[None])
        try:
            numbers: list[Any] = (
                list(given)
                if isinstance(given, Iterable) and not isinstance(given, str)
                else [given]
            )
            chosen = tuple(operator.index(number) for number in numbers)
            if any(isinstance(number, bool) for number in numbers):
                raise TypeError
        except TypeError:
            raise InputError(
                "positions must be None, a whole number, several, a slice, 'last', or a bool tensor "
                f"[b, s]; found {shown(given)}."
            ) from None
        if not chosen or min(chosen) < 0:
            raise InputError(
                f"positions count from 0; found {shown(given)}. The last token is 'last'."
            )
        return cls(tuple(sorted(set(chosen))))

    @property
    def all(self) -> bool:
        """Whether every token is chosen."""
        return self.chosen is None

    def mask(self, positions: Tensor) -> Tensor:
        """Bool ``[b, s]``: which of the tokens at ``positions`` ``[b, s]`` are chosen."""
        chosen = self.chosen
        if chosen is None:
            return torch.ones_like(positions, dtype=torch.bool)
        if isinstance(chosen, str):
            return positions == positions.amax(dim=1, keepdim=True)
        if isinstance(chosen, slice):
            start, step = chosen.start or 0, chosen.step or 1
            found = (positions >= start) & ((positions - start) % step == 0)
            return found if chosen.stop is None else found & (positions < chosen.stop)
        if isinstance(chosen, Tensor):
            if chosen.shape[0] not in (1, positions.shape[0]):
                raise HookError(
                    f"positions are a mask of {chosen.shape[0]} rows, for a batch of {positions.shape[0]}."
                )
            rows = chosen.to(positions.device).expand(positions.shape[0], -1)
            inside = positions < rows.shape[1]
            return rows.gather(1, positions.clamp(max=rows.shape[1] - 1)) & inside
        return torch.isin(positions, torch.tensor(chosen, device=positions.device))

    def first(self, lengths: Sequence[int]) -> int:
        """The lowest chosen position in any of the rows with these lengths; the longest length if no
        position is chosen."""
        chosen = self.chosen
        if chosen is None:
            return 0
        if isinstance(chosen, str):
            return min(lengths) - 1
        if isinstance(chosen, slice):
            return chosen.start or 0
        if isinstance(chosen, Tensor):
            columns = chosen.any(dim=0).nonzero()
            return int(columns[0]) if len(columns) else max(lengths)
        return chosen[0]

    def check_end(self, end: int) -> None:
        """Refuse positions that lie outside a text of ``end`` tokens."""
        chosen = self.chosen
        if isinstance(chosen, tuple):
            outside = [number for number in chosen if number >= end]
        elif isinstance(chosen, slice):
            outside = [chosen.start] if (chosen.start or 0) >= end else []
        elif isinstance(chosen, Tensor):
            outside = [end + int(n) for n in chosen[:, end:].any(dim=0).nonzero()[:1]]
        else:
            outside = []
        if outside:
            raise HookError(
                f"position {outside[0]} is outside the text: positions are 0 to {end - 1} in a batch whose "
                f"longest row has {end} tokens, those still to be sampled included."
            )

    def __str__(self) -> str:
        if self.chosen is None:
            return "every position"
        if isinstance(self.chosen, Tensor):
            return f"{int(self.chosen.sum())} positions of a mask"
        if isinstance(self.chosen, slice):
            start, stop = self.chosen.start or 0, self.chosen.stop
            step = "" if self.chosen.step in (None, 1) else f" in steps of {self.chosen.step}"
            return f"positions {start} to {'the end' if stop is None else stop - 1}{step}"
        if self.chosen == "last":
            return "the last position"
        return f"position{'s' * (len(self.chosen) > 1)} {', '.join(map(str, self.chosen))}"


def _checked_slice(given: slice) -> slice:
    """The slice, if it counts from 0 and holds a position; an InputError otherwise."""
    try:
        start, stop, step = (
            None if bound is None else operator.index(bound)
            for bound in (given.start, given.stop, given.step)
        )
    except TypeError:
        raise InputError(f"the bounds of a slice must be whole numbers, found {given}.") from None
    if min(start or 0, 0 if stop is None else stop) < 0 or (step is not None and step < 1):
        raise InputError(f"positions count from 0; found {given}. The last token is 'last'.")
    if stop is not None and stop <= (start or 0):
        raise InputError(f"{given} holds no position: nothing would change.")
    return slice(start, stop, step)


def positions_where(
    model: LanguageModel,
    prompts: Prompts,
    predicate: Callable[[str], bool],
    bos: bool | int = False,
) -> Tensor:
    """Bool ``[b, s]``: the positions of the prompts whose token, as text, satisfies ``predicate``.

    ``positions_where(model, prompts, lambda token: token.strip().isdigit())``
    """
    ids = model.prompt_ids(prompts, bos)
    mask = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.bool)
    for row, tokens in enumerate(ids):
        for place, token in enumerate(tokens):
            mask[row, place] = bool(predicate(model._decode([token])))
    return mask
