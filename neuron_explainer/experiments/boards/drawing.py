"""Boards as arrays: painting rows, hiding cells, reading a board back, and pictures of boards.

Shape legend: ``n`` boards, ``s`` cells of a board (row by row), ``f`` fields of a row.
"""

import html
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuron_explainer.errors import InputError, optional_module
from neuron_explainer.experiments.boards.objects import EMPTY, BoardConfig, Ints, Kind

Flags = NDArray[np.bool_]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HIDDEN_COLOUR, BACKGROUND_COLOUR = "#ffffff", "#f3f4f6"
# Paul Tol's and Okabe & Ito's qualitative colours: told apart with most kinds of colour vision.
OBJECT_COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee"),
    *("#aa3377", "#e69f00", "#009e73", "#bbbbbb", "#d55e00"),
)


class Board(NamedTuple):
    """One board, which prints as a picture: digits are backgrounds, letters objects, ``░`` is hidden."""

    tokens: Ints
    """``[s]``."""
    config: BoardConfig
    wrong: Flags | None = None
    """Cells to mark, ``[s]``: for a reconstruction, those that are not right."""

    def symbol(self, token: int) -> str:
        """One or two characters for a token."""
        c = self.config
        if token == c.hidden_token:
            return "░"
        if token < c.n_backgrounds:
            return str(token)
        number = token - c.n_backgrounds
        return LETTERS[number] if number < len(LETTERS) else f"t{number}"

    def colour(self, token: int) -> str:
        """The colour of a token's cell, as ``#rrggbb``."""
        if token == self.config.hidden_token:
            return HIDDEN_COLOUR
        if token < self.config.n_backgrounds:
            return BACKGROUND_COLOUR
        return OBJECT_COLOURS[(token - self.config.n_backgrounds) % len(OBJECT_COLOURS)]

    def __repr__(self) -> str:
        side = self.config.board_size
        symbols = [self.symbol(int(token)) for token in self.tokens]
        marks = np.zeros(len(symbols), dtype=bool) if self.wrong is None else self.wrong
        cells = [
            f"{symbol}{'!' if mark else ' '}" for symbol, mark in zip(symbols, marks, strict=True)
        ]
        lines = ["".join(cells[i : i + side]).rstrip() for i in range(0, len(cells), side)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        side = self.config.board_size
        style = "width:1.5em;height:1.5em;text-align:center;font:11px monospace;padding:0;"
        cells = []
        for i, token in enumerate(int(token) for token in self.tokens):
            border = (
                "2px solid #c00" if self.wrong is not None and self.wrong[i] else "1px solid #ddd"
            )
            cells.append(
                f'<td style="{style}background:{self.colour(token)};border:{border}">'
                f"{html.escape(self.symbol(token))}</td>"
            )
        rows = ["".join(cells[i : i + side]) for i in range(0, len(cells), side)]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f'<table style="border-collapse:collapse">{body}</table>'

    def draw(self, axes: Any = None, title: str = "") -> Any:
        """Draw the board with matplotlib, on ``axes`` or on a figure of its own; returns the axes."""
        if axes is None:
            pyplot = optional_module("matplotlib.pyplot", "pictures of boards")
            _, axes = pyplot.subplots(figsize=(2.6, 2.6))
        side = self.config.board_size
        axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        for i, token in enumerate(int(token) for token in self.tokens):
            row, column = divmod(i, side)
            hidden = token == self.config.hidden_token
            axes.add_patch(_square(axes, column, row, self.colour(token), hidden))
            if not hidden:
                dark = token < self.config.n_backgrounds
                axes.text(
                    *(column + 0.5, row + 0.54, self.symbol(token)),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="#9ca3af" if dark else "white",
                )
            if self.wrong is not None and self.wrong[i]:
                axes.plot([column + 0.1, column + 0.9], [row + 0.1, row + 0.9], "k-", lw=1)
                axes.plot([column + 0.1, column + 0.9], [row + 0.9, row + 0.1], "k-", lw=1)
        axes.set_title(title, fontsize=8)
        return axes


def _square(axes: Any, column: int, row: int, colour: str, hidden: bool) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column, row),
        1,
        1,
        facecolor=colour,
        edgecolor="#d1d5db",
        linewidth=0.5,
        hatch="////" if hidden else None,
    )


@dataclass(frozen=True, eq=False, repr=False)
class Boards:
    """Boards and what is known about each of their cells; rows in the order in which they were asked for."""

    kind: Kind
    rows: Ints
    """``[n, f]``."""
    tokens: Ints
    """``[n, s]``."""
    roots: Ints
    """``[n, s]``: the root whose footprint a cell lies in; :data:`EMPTY` on the background."""
    cells: Ints
    """``[n, s]``: where in its root's footprint a cell lies, row by row from 0; else :data:`EMPTY`."""
    parts: Ints
    """``[n, s]``: 0 and 1 for the roots of a double, the place in the composite, else :data:`EMPTY`."""
    config: BoardConfig

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def backgrounds(self) -> Ints:
        """``[n]``: the background token of each board."""
        return np.asarray(self.rows[:, -1])

    @property
    def composites(self) -> Ints:
        """``[n]``: the composite on each board; :data:`EMPTY` if there is none."""
        if self.kind == "composite":
            return np.asarray(self.rows[:, 0])
        return np.full(len(self), EMPTY)

    def board(self, index: int) -> Board:
        """One of the boards, to look at."""
        return Board(self.tokens[index], self.config)

    def take(self, chosen: Any) -> "Boards":
        """Some of the boards, by number or by flags."""
        arrays = {name: getattr(self, name)[chosen] for name in ARRAYS}
        return replace(self, **arrays)

    def __repr__(self) -> str:
        first = f"; the first:\n{self.board(0)!r}" if len(self) else ""
        return f"{len(self)} board{'' if len(self) == 1 else 's'} of kind {self.kind}{first}"


ARRAYS = ("rows", "tokens", "roots", "cells", "parts")
"""The fields of :class:`Boards` that have a row for each board."""


def paint(
    config: BoardConfig,
    roots: Ints,
    composites: Ints,
    kind: Kind,
    rows: Ints,
    rng: np.random.Generator | None,
) -> Boards:
    """The boards of rows ``[n, f]``. What is painted later covers what was there, transparent cells
    included, which show the background."""
    shape = (len(rows), config.n_cells)
    tokens = np.broadcast_to(rows[:, -1:], shape).copy()
    roots_of, cells_of, parts_of = (np.full(shape, EMPTY) for _ in range(3))
    found = Boards(kind, rows, tokens, roots_of, cells_of, parts_of, config)
    side = np.arange(config.root_size)
    for part, ids, corner in _objects(config, composites, kind, rows):
        there = np.flatnonzero(ids != EMPTY)
        if not len(there):
            continue
        x, y = corner[there, 0, None, None] + side[:, None], corner[there, 1, None, None] + side
        at = (x * config.board_size + y).reshape(len(there), -1)
        patterns = _picked(roots[ids[there]].reshape(*at.shape, -1), rng)
        background = rows[there, -1:]
        found.tokens[there[:, None], at] = np.where(patterns == EMPTY, background, patterns)
        found.roots[there[:, None], at] = ids[there, None]
        found.cells[there[:, None], at] = np.arange(at.shape[1])
        found.parts[there[:, None], at] = part
    return found


def _objects(
    config: BoardConfig, composites: Ints, kind: Kind, rows: Ints
) -> list[tuple[int, Ints, Ints]]:
    """The number of each part, with its root ``[n]`` and its corner ``[n, 2]`` on every board."""
    if kind == "single":
        return [(0, rows[:, 0], rows[:, 1:3])]
    if kind == "double":
        return [(0, rows[:, 0], rows[:, 1:3]), (1, rows[:, 3], rows[:, 4:6])]
    n, stride = config.composite_size, config.stride
    return [
        (i * n + j, composites[rows[:, 0], i, j], rows[:, 1:3] + stride * np.array([i, j]))
        for i in range(n)
        for j in range(n)
    ]


def _picked(patterns: Ints, rng: np.random.Generator | None) -> Ints:
    """One token of each cell: ``[n, cells, m] -> [n, cells]``."""
    if rng is None or patterns.shape[-1] == 1:
        return patterns[..., 0]
    n_alternatives = np.maximum((patterns != EMPTY).sum(-1), 1)
    chosen = (rng.random(n_alternatives.shape) * n_alternatives).astype(np.int64)
    return np.take_along_axis(patterns, chosen[..., None], axis=-1)[..., 0]


def hide(
    boards: Boards, probability: float, patch_probability: float, rng: np.random.Generator
) -> Ints:
    """The tokens ``[n, s]`` with some cells hidden.

    Args:
        boards: what to hide cells of.
        probability: of each cell to be hidden by itself.
        patch_probability: of each board to lose a patch of the size of a root besides: at a random place,
            or, if there is a composite, one of the roots that it is made of.
    """
    for share in (probability, patch_probability):
        if not 0 <= share <= 1:
            raise InputError(f"a share of hidden cells or boards lies in 0 to 1, found {share}.")
    gone = rng.random(boards.tokens.shape) < probability
    if patch_probability:
        gone |= _patches(boards, rng) & (rng.random((len(boards), 1)) < patch_probability)
    return np.where(gone, boards.config.hidden_token, boards.tokens)


def _patches(boards: Boards, rng: np.random.Generator) -> Flags:
    """A patch on each board ``[n, s]``."""
    if boards.kind == "composite":
        n_parts = boards.config.composite_size**2
        there = (boards.parts[:, None] == np.arange(n_parts)[None, :, None]).any(-1)
        # The part with the largest number drawn for it, among those that are there.
        chosen = np.where(there, rng.random(there.shape), -1.0).argmax(1)
        return np.asarray(boards.parts == chosen[:, None])
    return square_of_cells(boards.config, rng.integers(_n_corners(boards.config), size=len(boards)))


def _n_corners(config: BoardConfig) -> int:
    return (config.board_size - config.root_size + 1) ** 2


def square_of_cells(config: BoardConfig, corners: Ints) -> Flags:
    """The cells ``[n, s]`` of squares of the size of a root; corners are counted row by row."""
    x, y = np.divmod(corners[:, None], config.board_size - config.root_size + 1)
    row, column = np.divmod(np.arange(config.n_cells)[None], config.board_size)
    size = config.root_size
    return np.asarray((row >= x) & (row < x + size) & (column >= y) & (column < y + size))


def join(parts: list[Boards]) -> tuple[Ints, Ints]:
    """The tokens ``[n, s]`` of several batches of boards, and the number in ``parts`` of each board."""
    numbers = np.concatenate([np.full(len(part), i) for i, part in enumerate(parts)])
    return np.concatenate([part.tokens for part in parts]), numbers


def check_tokens(config: BoardConfig, tokens: Ints) -> None:
    """Refuse what is no batch of boards of this config."""
    if tokens.ndim != 2 or tokens.shape[1] != config.n_cells:
        raise InputError(
            f"expected boards [n, {config.n_cells}] ({config.board_size} x {config.board_size} cells, row by "
            f"row), found {list(tokens.shape)}."
        )
    if tokens.size and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
        raise InputError(
            f"tokens of boards lie in 0 to {config.vocab_size - 1}, found {tokens.min()} to {tokens.max()}."
        )


def read_board(
    config: BoardConfig, roots: Ints, composites: Ints, spaces: Any, tokens: Ints
) -> list[tuple[Kind, list[int]]]:
    """Every row whose board looks like ``tokens`` ``[s]``: its kind and its numbers.

    Several can: of two roots either may have been painted first, and one that is covered could be another.
    """
    found: list[tuple[Kind, list[int]]] = []
    allowed = _allowed(config, roots, tokens)
    background = tokens[tokens < config.n_backgrounds]
    if len(set(background.tolist())) > 1 or (tokens == config.hidden_token).any():
        return found
    for kind, space in spaces.items():
        step = space.n_backgrounds if len(background) else 1
        rows = space.rows(np.arange(background[0] if len(background) else 0, space.size, step))
        painted = paint(
            config, roots, composites, kind, _could_be(allowed, kind, rows, config), None
        )
        # The last root that covers a cell decides what it may show.
        shown = np.where(
            painted.roots == EMPTY,
            (tokens == painted.rows[:, -1:]),
            _fits(roots, painted, tokens),
        )
        found += [(kind, row) for row in painted.rows[shown.all(1)].tolist()]
    return found


def _allowed(config: BoardConfig, roots: Ints, tokens: Ints) -> Flags:
    """``[r, corners]``: whether a root stands there uncovered."""
    n = config.board_size - config.root_size + 1
    corners = np.arange(n * n)
    at = np.nonzero(square_of_cells(config, corners))[1].reshape(n * n, -1)
    patterns = roots.reshape(len(roots), 1, at.shape[1], -1)
    shown = tokens[at][None, :, :, None]
    clear = (patterns == EMPTY).all(-1) & (shown[..., 0] < config.n_backgrounds)
    return np.asarray((((patterns == shown) & (patterns != EMPTY)).any(-1) | clear).all(-1))


def _could_be(allowed: Flags, kind: Kind, rows: Ints, config: BoardConfig) -> Ints:
    """Rows whose root painted last stands there uncovered; all rows of composites."""
    if kind == "composite":
        return rows
    n = config.board_size - config.root_size + 1
    last = rows[:, -4:-1]
    return np.asarray(rows[allowed[last[:, 0], last[:, 1] * n + last[:, 2]]])


def _fits(roots: Ints, painted: Boards, tokens: Ints) -> Flags:
    """``[n, s]``: whether the root at a cell may show the token that is there (background cells: any)."""
    flat = roots.reshape(len(roots), -1, roots.shape[-1])
    patterns = flat[painted.roots, painted.cells]
    clear = (patterns == EMPTY).all(-1) & (tokens == painted.rows[:, -1:])
    return np.asarray(((patterns == tokens[:, None]) & (patterns != EMPTY)).any(-1) | clear)
