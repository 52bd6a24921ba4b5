"""Causal edits: replace what a model computes for some cells, and see what it draws.

    hooks = TransformerHooks().append_at("1/resid.torso.post_mlp", replace_cells(cells, values))
    model(masked, hooks)

Every experiment takes boards in pairs (or a board and a class) and edits the activations of one towards the
other; what it counts stands beside a control that gets an edit of the same size.

Shape legend: ``n`` boards, ``s`` cells, ``d`` width, ``y`` classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.drawing import Boards, Flags
from neuron_explainer.experiments.boards.gpt import BoardGPT
from neuron_explainer.experiments.boards.objects import EMPTY, Ints
from neuron_explainer.experiments.boards.probes import Probe
from neuron_explainer.experiments.boards.sites import location
from neuron_explainer.models.hooks import Hook, TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike


def replace_cells(cells: Flags, values: Tensor) -> Hook:
    """A hook that sets the activations of chosen cells.

    Args:
        cells: ``[n, s]``.
        values: of the shape of the activations, ``[n, s, ...]``; those of other cells are not used.
    """
    chosen = torch.from_numpy(np.asarray(cells))
    if chosen.dim() != 2 or values.shape[:2] != chosen.shape:
        raise InputError(
            f"an edit needs cells [n, s] and values [n, s, ...] of the same boards; found cells "
            f"{list(chosen.shape)} and values {list(values.shape)}."
        )

    def edit(x: Tensor) -> Tensor:
        if x.shape != values.shape:
            raise InputError(
                f"an edit of activations {list(x.shape)} needs values of that shape, found "
                f"{list(values.shape)}."
            )
        where = chosen.to(x.device).view(*chosen.shape, *[1] * (x.dim() - 2))
        return torch.where(where, values.to(x), x)

    return edit


def mirror_cells(cells: Flags, probe: Probe, old: Ints, new: Ints, strength: float = 1.0) -> Hook:
    """A hook that moves activations of chosen cells along a probe's directions, from one class to another.

    With ``strength`` 1 each is mirrored at the plane between the two classes: the probe then prefers the new
    class by as much as it preferred the old one. 0 changes nothing, 2 goes twice as far.

    Args:
        cells: ``[n, s]``.
        probe: of the place where the hook is put.
        old, new: the class of each board, before and after, ``[n]``.
    """
    order = {label: i for i, label in enumerate(probe.classes.tolist())}
    if missing := sorted({*old.tolist(), *new.tolist()} - order.keys()):
        raise InputError(f"the probe knows no class {missing[0]}; it knows {sorted(order)}.")
    a, b = ([order[label] for label in labels.tolist()] for labels in (old, new))
    weights, biases = (torch.from_numpy(x) for x in (probe.weights, probe.biases))
    direction = (weights[b] - weights[a])[:, None]
    offset = (biases[b] - biases[a])[:, None]
    chosen = torch.from_numpy(np.asarray(cells))

    def edit(x: Tensor) -> Tensor:
        if x.shape[:2] != chosen.shape or x.shape[2:] != direction.shape[2:]:
            expected = [*chosen.shape, direction.shape[2]]
            raise InputError(f"this edit is for activations {expected}, found {list(x.shape)}.")
        along = direction.to(x)
        margin = (x * along).sum(-1) + offset.to(x)
        step = -2 * strength * margin / along.square().sum(-1)
        return torch.where(chosen.to(x.device)[..., None], x + step[..., None] * along, x)

    return edit


@torch.no_grad()
def draw_with(model: BoardGPT, masked: Ints, place: LocationLike, hook: Hook) -> Ints:
    """What the model draws ``[n, s]`` when a hook acts at a place."""
    hooks = TransformerHooks().append_at(location(place), hook)
    logits = model(torch.from_numpy(masked).to(model.device), hooks)
    return np.asarray(logits.argmax(-1).cpu().numpy())


@torch.no_grad()
def values_at(model: BoardGPT, masked: Ints, place: LocationLike) -> Tensor:
    """The activations at a place, in the place's own shape."""
    return model.capture(torch.from_numpy(masked).to(model.device), place)[location(place)]


@dataclass(frozen=True)
class EditResult:
    """What an edit did to boards that were to turn from one thing into another."""

    place: ActivationLocation
    flipped: float
    """Share of boards all of whose edited cells now show the other thing, where the two differ."""
    kept: float
    """Share of boards all of whose edited cells show what they showed without the edit."""
    elsewhere: float
    """Share of the cells in which the two things agree that are right."""
    control: float
    """``flipped``, of an edit that should not flip anything."""
    cells_flipped: float
    """Share of the hidden cells in which the two things differ that now show the other one."""
    cells_control: float
    """The same of the control."""
    n_boards: int


def _counted(
    place: LocationLike, drawn: Ints, control: Ints, old: Ints, new: Ints, cells: Flags
) -> EditResult:
    """Count what was drawn ``[n, s]`` against the board as it was and as it should become ``[n, s]``."""
    differ = cells & (old != new)

    def share(board: Ints, target: Ints) -> float:
        return float(((board == target) | ~differ).all(1)[differ.any(1)].mean())

    return EditResult(
        place=location(place),
        flipped=share(drawn, new),
        kept=share(drawn, old),
        elsewhere=float((drawn == old)[old == new].mean()),
        control=share(control, new),
        cells_flipped=float((drawn == new)[differ].mean()),
        cells_control=float((control == new)[differ].mean()),
        n_boards=int(differ.any(1).sum()),
    )


# ---- one root for another --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pair:
    """Boards that differ in one thing, masked alike."""

    before: Boards
    after: Boards
    masked_before: Ints
    """``[n, s]``."""
    masked_after: Ints
    """``[n, s]``."""
    cells: Flags
    """``[n, s]``: the hidden cells of what differs."""


def root_pairs(dataset: BoardDataset, n: int = 200, hidden: float = 0.5, seed: int = 0) -> Pair:
    """Single boards and the same with another root; each of the root's cells is hidden with ``hidden``."""
    n_roots = dataset.config.n_roots
    _check_two("roots", n_roots)
    rng = np.random.default_rng([seed, 41])
    before = dataset.draw("single", "train", n, rng)
    rows = before.rows.copy()
    rows[:, 0] = (rows[:, 0] + rng.integers(1, n_roots, size=n)) % n_roots
    after = dataset.paint("single", rows, rng)
    on_root = before.roots != EMPTY
    cells = on_root & (rng.random(on_root.shape) < hidden)
    # At least one hidden cell whose token differs, and one that is seen.
    useful = (cells & (before.tokens != after.tokens)).any(1) & (on_root & ~cells).any(1)
    return _masked(
        before.take(useful), after.take(useful), cells[useful], dataset.config.hidden_token
    )


def _check_two(things: str, n: int) -> None:
    if n < 2:
        raise InputError(
            f"an edit needs boards with two {things} or more to choose from, found {n}."
        )


def _masked(before: Boards, after: Boards, cells: Flags, hidden: int) -> Pair:
    masked, masked_after = (np.where(cells, hidden, boards.tokens) for boards in (before, after))
    return Pair(before, after, masked, masked_after, cells)


def swap_roots(
    model: BoardGPT, pair: Pair, places: Sequence[LocationLike], cells: Flags | None = None
) -> list[EditResult]:
    """Replace activations by those of the board with the other root, and look at the hidden cells.

    Control: the cells' own activations, which must change nothing.

    Args:
        cells: whose activations are replaced, ``[n, s]``; default: the hidden cells of what differs.
    """
    results, cells = [], pair.cells if cells is None else cells
    for place in places:
        theirs, own = (values_at(model, m, place) for m in (pair.masked_after, pair.masked_before))
        drawn, control = (
            draw_with(model, pair.masked_before, place, replace_cells(cells, values))
            for values in (theirs, own)
        )
        results.append(
            _counted(place, drawn, control, pair.before.tokens, pair.after.tokens, pair.cells)
        )
    return results


def swap_along_probe(
    model: BoardGPT,
    pair: Pair,
    place: LocationLike,
    probe: Probe,
    strengths: Sequence[float],
    cells: Flags | None = None,
    seed: int = 0,
) -> list[tuple[float, EditResult]]:
    """Move activations along the root probe's directions, at several strengths.

    Control: a step of the same length in a random direction.

    Args:
        cells: which to move, ``[n, s]``; default: the hidden cells of the root.
    """
    cells = pair.cells if cells is None else cells
    old, new = (np.asarray(boards.rows[:, 0]) for boards in (pair.before, pair.after))
    generator, results = torch.Generator().manual_seed(seed), []
    for strength in strengths:
        hook = mirror_cells(cells, probe, old, new, strength)
        drawn = draw_with(model, pair.masked_before, place, hook)
        control = draw_with(model, pair.masked_before, place, _random_step(hook, generator))
        counted = _counted(place, drawn, control, pair.before.tokens, pair.after.tokens, pair.cells)
        results.append((strength, counted))
    return results


def _random_step(hook: Hook, generator: torch.Generator) -> Hook:
    """A hook that takes steps of the same lengths in random directions."""

    def edit(x: Tensor) -> Tensor:
        step: Tensor = hook(x) - x
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
        direction = direction / direction.norm(dim=-1, keepdim=True)
        moved: Tensor = x + direction * step.norm(dim=-1, keepdim=True)
        return moved

    return edit


# ---- one constituent of a composite ----------------------------------------------------------------


def composite_pairs(dataset: BoardDataset, n: int = 200, seed: int = 0) -> Pair:
    """Composite boards with one constituent hidden, and boards of other composites with the same hidden."""
    rng = np.random.default_rng([seed, 43])
    config, places = dataset.config, dataset.config.composite_size**2
    _check_two("composites", config.n_composites)
    rows = dataset.draw("composite", "train", n, rng).rows
    others = rows.copy()
    others[:, 0] = (rows[:, 0] + rng.integers(1, config.n_composites, size=n)) % config.n_composites
    flat = dataset.composites.reshape(-1, places)
    part = rng.integers(places, size=n)
    roots = flat[rows[:, 0], part], flat[others[:, 0], part]
    useful = (roots[0] != roots[1]) & (roots[0] != EMPTY) & (roots[1] != EMPTY)
    before, after = (dataset.paint("composite", r[useful], rng) for r in (rows, others))
    cells = before.parts == part[useful, None]
    return _masked(before, after, cells, config.hidden_token)


def patch_constituent(
    model: BoardGPT, pair: Pair, places: Sequence[LocationLike]
) -> list[EditResult]:
    """Replace the hidden constituent's activations by those of another composite's.

    Control: of its own board. ``elsewhere`` says whether the other constituents stay what they were.
    """
    return swap_roots(model, pair, places)


def largest_change(model: BoardGPT, masked: Ints, place: LocationLike, cells: Flags) -> float:
    """The largest change of a logit when cells are replaced by their own activations; 0 is right."""
    tokens = torch.from_numpy(masked).to(model.device)
    with torch.no_grad():
        values = values_at(model, masked, place)
        hooks = TransformerHooks().append_at(location(place), replace_cells(cells, values))
        difference: Tensor = model(tokens, hooks) - model(tokens)
        return float(difference.abs().max())


def describe(results: Sequence[EditResult]) -> list[list[str]]:
    """Rows of a table: place, flipped, kept, elsewhere, control, in per cent."""
    figures: list[list[Any]] = [
        [str(r.place), r.flipped, r.kept, r.elsewhere, r.control] for r in results
    ]
    return [[row[0], *(f"{100 * x:.1f}" for x in row[1:])] for row in figures]
