"""What stands on boards: root abstractions (patterns of object tokens) and composites made of roots.

A board is a square of tokens: ``n_backgrounds`` background tokens come first in the vocabulary, then
``n_object_tokens`` object tokens, then one token that means "hidden". A *root* is a small square of object
tokens; cells without one are transparent, and a *fuzzy* cell has several tokens, one of which is picked each
time the root is drawn. A *composite* is a square of roots with a margin between them.

Shape legend: ``r`` roots, ``c`` composites, ``m`` alternatives of a fuzzy cell.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neuron_explainer.errors import InputError
from neuron_explainer.settings import check_types

Ints = NDArray[np.int64]

Kind = Literal["single", "double", "composite"]
KINDS: tuple[Kind, ...] = ("single", "double", "composite")
"""One root, two roots, one composite; the order of every triple of board probabilities."""
Split = Literal["balanced", "fraction", "stringent"]

MOST_BOARDS = 100_000_000
"""Of two roots: a hundred times as many as the paper's program has."""
EMPTY = -1
"""No token (a transparent cell of a root), no root (a gap of a composite, a cell of the background)."""


@dataclass(frozen=True)
class BoardConfig:
    """Everything that decides a data set of boards. The defaults are those of the paper's program."""

    board_size: int = 8
    """Cells along a side of the board."""
    n_backgrounds: int = 10
    """Background tokens: one of them fills what objects leave free."""
    n_object_tokens: int = 10
    """Tokens that objects are made of."""
    n_roots: int = 10
    """Root abstractions."""
    root_size: int = 3
    """Cells along a side of a root."""
    root_cells: int = 9
    """Cells of a root that have a token; the others are transparent."""
    fuzzy_cells: int = 0
    """Cells of a root that pick one of several tokens at each drawing."""
    fuzzy_values: int = 1
    """How many tokens a fuzzy cell picks from."""
    n_composites: int = 5
    """Composites."""
    composite_size: int = 2
    """Roots along a side of a composite."""
    composite_roots: int = 4
    """Places of a composite that have a root; the others are gaps."""
    margin: int = 1
    """Cells between neighbouring roots of a composite."""
    split: Split = "balanced"
    """How boards are held out. balanced: the same number for each object (of doubles: each ordered pair).
    fraction: a share of all boards of a kind. stringent: every board that shows a root at the one position
    held out for that root."""
    test: float | None = None
    """Boards held out for testing: a number for each object (balanced; default 4) or a share (fraction;
    default 0.1). A stringent split holds out what its positions say."""
    val: float = 0.0
    """Boards held out for validation, counted like ``test``. In a stringent split any value above 0 gives
    validation half of the boards that are held out."""
    seed: int = 0
    """Random seed of the objects and of the split."""

    def __post_init__(self) -> None:
        check_types(self)
        self._check_sizes()
        self._check_number()
        self._check_shares()

    def _check_sizes(self) -> None:
        at_least_one = (
            *("board_size", "n_backgrounds", "n_object_tokens", "n_roots", "root_size"),
            *("root_cells", "fuzzy_values", "n_composites", "composite_size", "composite_roots"),
        )
        for name in at_least_one:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("fuzzy_cells", "margin", "seed"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        cells, places = self.root_size**2, self.composite_size**2
        self._check("root_cells", self.root_cells <= cells, f"at most {cells} (root_size squared)")
        self._check("fuzzy_cells", self.fuzzy_cells <= self.root_cells, "at most root_cells")
        fits = self.fuzzy_values <= self.n_object_tokens
        self._check("fuzzy_values", fits, f"at most {self.n_object_tokens} (n_object_tokens)")
        within = self.composite_roots <= places
        self._check("composite_roots", within, f"at most {places} (composite_size squared)")
        if self.root_size > self.board_size:
            raise InputError(
                f"a root of {self.root_size} cells does not fit on a board of {self.board_size}; make "
                "board_size larger or root_size smaller."
            )
        if self.footprint > self.board_size:
            raise InputError(
                f"a composite of {self.footprint} cells ({self.composite_size} roots of {self.root_size} "
                f"with a margin of {self.margin}) does not fit on a board of {self.board_size}; make "
                "board_size larger, or root_size, composite_size or margin smaller."
            )

    def _check_shares(self) -> None:
        if self.split == "fraction":
            for name, share in (("test", self.held_out_for_test), ("val", self.val)):
                self._check(name, 0 <= share < 1, "a share from 0 to below 1")
            if self.held_out_for_test + self.val >= 1:
                raise InputError(
                    f"BoardConfig: test {self.held_out_for_test:g} and val {self.val:g} leave no boards for "
                    "training; together they must be below 1."
                )
            return
        for name, number in (("test", self.held_out_for_test), ("val", self.val)):
            self._check(name, number >= 0 and number == int(number), "a whole number of boards")

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise InputError(
                f"BoardConfig: {name} must be {expected}, found {getattr(self, name)}."
            )

    def _check_number(self) -> None:
        """Every board has a number, and a flag that says whether it is held out."""
        corners = (self.board_size - self.root_size + 1) ** 2
        at_most = self.n_roots**2 * corners**2 * self.n_backgrounds
        if at_most > MOST_BOARDS:
            raise InputError(
                f"BoardConfig: there are up to {at_most:,} boards of two roots, and at most {MOST_BOARDS:,} "
                "can be enumerated; make board_size, n_roots or n_backgrounds smaller."
            )

    @property
    def held_out_for_test(self) -> float:
        """``test``, or the default of the split."""
        if self.test is not None:
            return self.test
        return 0.1 if self.split == "fraction" else 4

    @property
    def hidden_token(self) -> int:
        """The token that stands for a cell that is not shown: the last of the vocabulary."""
        return self.n_backgrounds + self.n_object_tokens

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.hidden_token + 1

    @property
    def n_cells(self) -> int:
        """Cells of a board."""
        return self.board_size**2

    @property
    def footprint(self) -> int:
        """Cells along a side of a composite, margins included."""
        return self.composite_size * self.root_size + (self.composite_size - 1) * self.margin

    @property
    def stride(self) -> int:
        """Cells from one root of a composite to the next."""
        return self.root_size + self.margin


def make_roots(config: BoardConfig, rng: np.random.Generator) -> Ints:
    """Root abstractions ``[r, root_size, root_size, m]``, no two of which can be drawn alike.

    A cell that is not fuzzy has its token at ``[..., 0]``; everything else is :data:`EMPTY`.
    """
    n_cells, m = config.root_size**2, config.fuzzy_values if config.fuzzy_cells else 1
    tokens = config.n_backgrounds + np.arange(config.n_object_tokens)
    found: list[Ints] = []
    for _ in range(100 * config.n_roots):
        root = np.full((n_cells, m), EMPTY)
        filled = rng.permutation(n_cells)[: config.root_cells]
        for place, cell in enumerate(filled):
            n = config.fuzzy_values if place < config.fuzzy_cells else 1
            root[cell, :n] = rng.choice(tokens, n, replace=False)
        if not any(could_be_drawn_alike(root, other) for other in found):
            found.append(root)
        if len(found) == config.n_roots:
            side = config.root_size
            return np.stack(found).reshape(config.n_roots, side, side, m)
    raise InputError(
        f"found only {len(found)} roots that cannot be mistaken for one another, {config.n_roots} were "
        "asked for. Take fewer roots, more object tokens, more cells, or fewer fuzzy values."
    )


def could_be_drawn_alike(one: Ints, other: Ints) -> bool:
    """Whether two roots ``[..., m]`` have a token, or transparency, in common in every cell."""
    one, other = one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1])
    same = (one[:, :, None] == other[:, None, :]) & (one[:, :, None] != EMPTY)
    both_clear = (one == EMPTY).all(1) & (other == EMPTY).all(1)
    return bool((same.any((1, 2)) | both_clear).all())


def make_composites(config: BoardConfig, rng: np.random.Generator) -> Ints:
    """Composites ``[c, composite_size, composite_size]`` of root ids, all different."""
    n_places, side = config.composite_size**2, config.composite_size
    found: dict[bytes, Ints] = {}
    for _ in range(100 * config.n_composites):
        composite = np.full(n_places, EMPTY)
        filled = rng.permutation(n_places)[: config.composite_roots]
        composite[filled] = rng.integers(config.n_roots, size=len(filled))
        found.setdefault(composite.tobytes(), composite)
        if len(found) == config.n_composites:
            return np.stack(list(found.values())).reshape(-1, side, side)
    raise InputError(
        f"found only {len(found)} different composites of {config.composite_roots} roots, "
        f"{config.n_composites} were asked for. Take fewer composites or more roots."
    )
