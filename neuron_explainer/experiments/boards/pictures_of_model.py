"""Pictures of the model itself: boards and reconstructions, embeddings, activations, attention."""

from typing import Any

import numpy as np
import torch

from neuron_explainer.experiments.boards.dataset import Part
from neuron_explainer.experiments.boards.drawing import Board, hide
from neuron_explainer.experiments.boards.geometry import distances, three_distances
from neuron_explainer.experiments.boards.measures import accuracy_by_kind, predict
from neuron_explainer.experiments.boards.objects import EMPTY, KINDS
from neuron_explainer.experiments.boards.recording import Floats, stream_points
from neuron_explainer.experiments.boards.study import Picture, Study, label, new_figure, short
from neuron_explainer.models.locations import ActivationLocation

_MODULE = "pictures_of_model"
_SUBSTAGES = ("post_ln_attn", "delta_attn", "post_attn", "post_ln_mlp", "delta_mlp", "post_mlp")


def _picture(name: str, title: str, text: str, number: str, figure: Any) -> Picture:
    return Picture(name, title, text, number, figure, _MODULE)


def _map(axis: Any, x: Floats, **options: Any) -> Any:
    """A matrix as colours, without ticks and frame; what ``imshow`` returns."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return axis.imshow(x, interpolation="nearest", **options)


def boards(study: Study) -> Picture:
    """Boards of each kind, masked, and filled in by the model."""
    figure, axes = new_figure(6.6, 6.4, 3, 3)
    rng = np.random.default_rng([study.seed, 3])
    for row, kind in zip(axes, KINDS, strict=True):
        found = study.dataset.draw(kind, "test", 1, rng)
        masked = hide(found, 0.25, 1.0 if kind == "composite" else 0.0, rng)
        drawn = predict(study.model, masked)
        config = study.dataset.config
        found.board(0).draw(row[0], f"{kind}")
        Board(masked[0], config).draw(row[1], "what the model sees")
        Board(drawn[0], config, drawn[0] != found.tokens[0]).draw(row[2], "what it draws (✕ wrong)")
    own, n = (study.model, study.dataset), study.n(100)
    by_kind = accuracy_by_kind(*own, "test", n=n, mask=0.25, seed=study.seed)
    figures = ", ".join(f"{k} {100 * a.hidden:.1f}%" for k, a in by_kind.items())
    return _picture(
        "boards",
        "A world of boards",
        "Every board shows one root (a fixed square pattern of object tokens), two roots, or a composite of "
        "four roots, on one background. The model sees a board with cells hidden and has to fill it in. "
        "These boards are from the test set; of the composite, one whole root is hidden besides.",
        f"Hidden cells of test boards that are filled in right, a quarter of all cells hidden: {figures}.",
        figure,
    )


def accuracy_table(study: Study) -> Picture:
    """Accuracy by kind of board and part of the data set."""
    figure, axes = new_figure(6.6, 2.6, 1, 3, sharey=True)
    parts: tuple[Part, ...] = ("train", "test")
    names = ("hidden", "objects", "boards")
    own, n = (study.model, study.dataset), study.n(100)
    found = {part: accuracy_by_kind(*own, part, n=n, seed=study.seed) for part in parts}
    shown_before = {k: study.dataset.shown_in_training(k, "test").mean() for k in KINDS}
    for axis, name in zip(axes[0], names, strict=True):
        for i, part in enumerate(parts):
            heights = [getattr(found[part][k], name) for k in KINDS]
            bars = axis.bar(np.arange(3) + 0.38 * i, heights, 0.36, label=part)
            axis.bar_label(bars, [f"{100 * h:.0f}" for h in heights], fontsize=7)
        axis.set_xticks(np.arange(3) + 0.19, KINDS)
        axis.set_ylim(0, 1.12)
        label(
            axis,
            title={
                "hidden": "hidden cells",
                "objects": "those of objects",
                "boards": "whole boards",
            }[name],
        )
    axes[0, 0].legend(fontsize=7, loc="lower left")
    split = (
        "The split holds out rows, not pictures: "
        f"{100 * shown_before['double']:.0f}% of the double test boards look like a training board "
        "with its two roots named in the other order."
    )
    if study.dataset.held_out_positions is not None:
        split = (
            "Every test board shows a root at the one position at which training never shows it."
        )
    gaps = [abs(found["train"][k].hidden - found["test"][k].hidden) for k in KINDS]
    return _picture(
        "accuracy_table",
        "It generalises to boards that were held out",
        "Accuracy on boards like those of training and on test boards, two maskings of at most 100 boards of "
        f"each kind with a fifth of their cells hidden. {split}",
        f"The largest gap between training and test is {100 * max(gaps):.1f} points (hidden cells).",
        figure,
    )


def learning(study: Study) -> Picture:
    """The course of training, where the run has a log."""
    names = [name for name in ("gpt", "lea") if study.log(name)]
    figure, axes = new_figure(6.6, 2.6, 1, max(len(names), 1))
    for axis, name in zip(axes[0], names, strict=False):
        log = study.log(name)
        steps = np.array([line["step"] for line in log])
        for key in ("error_hidden", "error_hidden_from_words"):
            errors = np.array([line.get(key, np.nan) for line in log])
            if np.isfinite(errors).any():
                axis.plot(steps, errors, lw=0.8, label=key.replace("_", " "))
        axis.set_yscale("log")
        axis.tick_params(which="both", labelsize=6)
        axis.locator_params(axis="x", nbins=5)
        axis.legend(fontsize=7)
        label(axis, "step", "hidden cells that are wrong", name)
    if not names:
        axes[0, 0].text(0.5, 0.5, "these models came without a log", ha="center", fontsize=9)
    last = ", ".join(f"{name}: {study.log(name)[-1]['error_hidden']:.4f}" for name in names)
    return _picture(
        "learning",
        "The course of training",
        "Masking grows with the epochs, and the mix of boards shifts from single ones to all "
        "kinds, so that the "
        "task becomes harder while the model learns. "
        + " ".join(f"{name}: {source}." for name, source in study.sources.items()),
        f"Errors on hidden cells at the end of the logs: {last or 'no logs'}.",
        figure,
    )


def _matrices(name: str, title: str, text: str, embedding: Floats, ticks: list[str]) -> Picture:
    """An embedding as a matrix, and three kinds of distances between its rows."""
    figure, axes = new_figure(9.0, 2.7, 1, 4, width_ratios=[1.5, 1, 1, 1])
    limit = np.abs(embedding).max() or 1.0
    shown = axes[0, 0].imshow(embedding, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    figure.colorbar(shown, ax=axes[0, 0], shrink=0.7).ax.tick_params(labelsize=6)
    label(axes[0, 0], "dimension", "", "embedding")
    for axis, (kind, matrix) in zip(axes[0, 1:], three_distances(embedding).items(), strict=True):
        shown = axis.imshow(matrix, cmap="magma")
        figure.colorbar(shown, ax=axis, shrink=0.7).ax.tick_params(labelsize=6)
        label(axis, title=kind)
    for axis in axes[0]:
        axis.set_yticks(np.arange(len(ticks)), ticks, fontsize=5)
    off = ~np.eye(len(embedding), dtype=bool)
    cosines = 1 - three_distances(embedding)["cosine"][off]
    lowest, mean, highest = cosines.min(), cosines.mean(), cosines.max()
    number = f"Cosines of different rows: mean {mean:.2f}, from {lowest:.2f} to {highest:.2f}."
    return _picture(name, title, text, number, figure)


def token_embeddings(study: Study) -> Picture:
    """The token embedding and its distances."""
    config = study.dataset.config
    ticks = [Board(np.array([t]), config).symbol(t) for t in range(config.vocab_size)]
    return _matrices(
        "token_embeddings",
        "Tokens, before anything is computed",
        "The embedding of the backgrounds (digits), the object tokens (letters) and the hidden token "
        "(░), with Euclidean distances, distances of unit vectors, and one minus the cosine.",
        study.model.tok_embed.weight.detach().float().cpu().numpy(),
        ticks,
    )


def position_embeddings(study: Study) -> Picture:
    """The position codes and their distances."""
    return _matrices(
        "position_embeddings",
        "Positions, beside the stream",
        "The position code of each cell, row by row. It is never added to the stream: "
        "attention and "
        "MLP read it beside the stream, anew in every block.",
        study.model.pos_embed.detach().float().cpu().numpy(),
        [],
    )


def position_maps(study: Study) -> Picture:
    """For each cell, the distance of its position code to all others, as 8 × 8 maps."""
    codes = study.model.pos_embed.detach().float().cpu().numpy()
    side, apart = study.dataset.config.board_size, distances(codes)
    grid = apart.reshape(side, side, side, side).transpose(0, 2, 1, 3)
    gap = np.full((side, side + 1, side, side + 1), np.nan, dtype=np.float32)
    gap[:, :side, :, :side] = grid
    figure, axes = new_figure(5.4, 5.0)
    shown = _map(axes[0, 0], gap.reshape(side * (side + 1), -1), cmap="magma")
    figure.colorbar(shown, ax=axes[0, 0], shrink=0.7).ax.tick_params(labelsize=7)
    x, y = np.divmod(np.arange(side * side), side)
    on_board = np.hypot(x[:, None] - x, y[:, None] - y)
    off = ~np.eye(side * side, dtype=bool)
    correlation = np.corrcoef(apart[off], on_board[off])[0, 1]
    return _picture(
        "position_maps",
        "The model has found out that the board is a square",
        "Each small map belongs to one cell, at the cell's own place, and shows how far its "
        "position code lies "
        "from those of all cells. Nothing told the model that cell 8 lies below cell 0.",
        f"Correlation of the distance between codes with the distance on the board: {correlation:.2f}.",
        figure,
    )


def _one_board(study: Study) -> tuple[Any, Any]:
    """A test board with one root, half of whose cells are hidden."""
    rng = np.random.default_rng([study.seed, 4])
    found = study.dataset.draw("single", "test", 1, rng)
    hidden = (found.roots != EMPTY) & (rng.random(found.tokens.shape) < 0.5)
    return found, np.where(hidden, study.dataset.config.hidden_token, found.tokens)


def activations_of_a_board(study: Study) -> Picture:
    """What each block and sub-stage holds for every cell of one board."""
    found, masked = _one_board(study)
    places = [
        ActivationLocation(f"resid.torso.{name}", layer)
        for layer in range(study.n_layers)
        for name in _SUBSTAGES
    ]
    captured = study.model.capture(torch.from_numpy(masked), places)
    order = np.argsort(found.roots[0] == EMPTY, kind="stable")
    figure, axes = new_figure(7.6, 5.6, study.n_layers, len(_SUBSTAGES), sharey=True)
    for axis, place in zip(axes.ravel(), places, strict=True):
        x = captured[place][0].detach().float().numpy()[order]
        limit = np.quantile(np.abs(x), 0.995)
        axis.imshow(
            x, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axis.axhline(int((found.roots[0] != EMPTY).sum()) - 0.5, color="black", lw=0.6)
        axis.set(xticks=[], yticks=[])
        label(axis, title=short(place))
    return _picture(
        "activations_of_a_board",
        "Every stage of one board",
        "Rows are the cells (above the line those of the root), columns the channels of "
        "the stream; red is "
        "positive, blue negative, each map on its own scale. One row of maps is a block.",
        f"{int((masked != found.tokens).sum())} of the root's {study.dataset.config.root_size**2} cells are "
        "hidden from the model.",
        figure,
    )


def norms_on_the_board(study: Study) -> Picture:
    """The length of each cell's vector along depth, on the board."""
    found, masked = _one_board(study)
    places = stream_points(study.n_layers)
    captured = study.model.capture(torch.from_numpy(masked), places)
    side = study.dataset.config.board_size
    figure, axes = new_figure(7.6, 1.7, 1, len(places) + 1)
    Board(masked[0], study.dataset.config).draw(axes[0, 0], "board")
    lengths = [captured[p][0].detach().float().norm(dim=-1).numpy() for p in places]
    for axis, place, length in zip(axes[0, 1:], places, lengths, strict=True):
        _map(axis, length.reshape(side, side), cmap="viridis")
        label(axis, f"{length.min():.1f} to {length.max():.1f}", title=short(place))
    on_root = found.roots[0] != EMPTY
    last = lengths[-2]
    return _picture(
        "norms_on_the_board",
        "Where the vectors are long",
        "The length of each cell's vector in the stream, from the embedding to the last norm.",
        "After the last block, cells of the root have a mean length of "
        f"{last[on_root].mean():.1f}, those of the "
        f"background of {last[~on_root].mean():.1f}.",
        figure,
    )


def distances_across_stages(study: Study) -> Picture:
    """Distances between cells within each stage, and of each cell from stage to stage."""
    found, masked = _one_board(study)
    places = stream_points(study.n_layers)
    captured = study.model.capture(torch.from_numpy(masked), places)
    order = np.argsort(found.roots[0] == EMPTY, kind="stable")
    rows = [captured[p][0].detach().float().numpy()[order] for p in places]
    columns = -(-len(places) // 2)
    figure, axes = new_figure(8.6, 3.9, 2, columns + 1)
    for axis, place, x in zip(axes[:, :columns].ravel(), places, rows, strict=False):
        _map(axis, distances(x), cmap="magma")
        label(axis, title=short(place))
    across = np.array([[np.linalg.norm(a - b, axis=1).mean() for b in rows] for a in rows])
    axes[0, -1].set_axis_off()
    last = axes[1, -1]
    last.imshow(across, cmap="magma")
    last.set_xticks(range(len(places)), [short(p) for p in places], fontsize=5, rotation=90)
    last.set_yticks(range(len(places)), [short(p) for p in places], fontsize=5)
    label(last, title="from stage to stage")
    steps = [across[i, i + 1] for i in range(len(places) - 1)]
    largest = int(np.argmax(steps[:-1]))
    return _picture(
        "distances_across_stages",
        "Distances within and across stages",
        "Each map shows the distances between all cells of one board at one stage, the root's "
        "cells first. The "
        "last map shows how far a cell's vector is at one stage from where it is at another, in the mean.",
        f"The longest step along the stream is from {short(places[largest])} to "
        f"{short(places[largest + 1])}.",
        figure,
    )


def _patterns(study: Study, masked: Any) -> list[Floats]:
    """Attention patterns of each layer, ``[n, q, k, h]``."""
    places = [ActivationLocation("attn.qk_probs", layer) for layer in range(study.n_layers)]
    captured = study.model.capture(torch.from_numpy(masked), places)
    return [captured[p].detach().float().numpy() for p in places]


def attention(study: Study) -> Picture:
    """Where chosen cells look, head by head."""
    found, masked = _one_board(study)
    config, patterns = study.dataset.config, _patterns(study, masked)
    hidden = np.flatnonzero(masked[0] != found.tokens[0])
    background = np.flatnonzero(found.roots[0] == EMPTY)
    queries = [int(hidden[0]), int(hidden[-1]), int(background[0])]
    n_heads = study.model.sizes.n_heads
    figure, axes = new_figure(7.6, 3.9, len(queries), study.n_layers * n_heads + 1)
    for number, (row, query) in enumerate(zip(axes, queries, strict=True)):
        Board(masked[0], config).draw(row[0])
        _mark(row[0], query, config.board_size)
        for i, axis in enumerate(row[1:]):
            layer, head = divmod(i, n_heads)
            pattern = patterns[layer][0, query, :, head]
            _map(axis, pattern.reshape(config.board_size, -1), cmap="viridis", vmin=0)
            _mark(axis, query, config.board_size, -0.5)
            if number == 0:
                label(axis, title=f"{layer}.{head}")
    on_root = found.roots[0] != EMPTY
    shares = [
        patterns[layer][0][hidden][:, on_root].sum(1).mean() for layer in range(study.n_layers)
    ]
    text = ", ".join(f"{share:.2f}" for share in shares)
    return _picture(
        "attention",
        "Where hidden cells look",
        "Each row is a query cell (boxed): two hidden cells of a root and a cell of the background. Each map "
        "shows the attention of one head (block.head) to all cells. Chance is the root's share of the board, "
        f"{on_root.mean():.2f}.",
        f"Attention of the hidden cells to the root, mean over heads, block by block: {text}.",
        figure,
    )


def _mark(axis: Any, cell: int, side: int, shift: float = 0.0) -> None:
    from matplotlib.patches import Rectangle

    row, column = divmod(cell, side)
    box = Rectangle((column + shift, row + shift), 1, 1, fill=False, edgecolor="red", lw=1.5)
    axis.add_patch(box)


def attention_grid(study: Study) -> Picture:
    """All queries of all heads in one grid, for one board."""
    masked = _one_board(study)[1]
    side = study.dataset.config.board_size
    n_heads = study.model.sizes.n_heads
    figure, axes = new_figure(7.6, 5.4, n_heads, study.n_layers)
    for layer, pattern in enumerate(_patterns(study, masked)):
        for head in range(n_heads):
            maps = pattern[0, :, :, head].reshape(side, side, side, side).transpose(0, 2, 1, 3)
            gap = np.full((side, side + 1, side, side + 1), np.nan, dtype=np.float32)
            gap[:, :side, :, :side] = maps
            _map(axes[head, layer], gap.reshape(side * (side + 1), -1), cmap="viridis")
            label(axes[head, layer], title=f"block {layer}, head {head}")
    return _picture(
        "attention_grid",
        "All queries at once",
        "For each head a grid of maps: the map at a place shows where the cell at that "
        "place looks. Same "
        "board as above.",
        f"{study.n_layers} blocks of {n_heads} heads, {side**4} weights each.",
        figure,
    )


def attention_across_boards(study: Study) -> Picture:
    """The same root at other places: attention moves with it."""
    rng = np.random.default_rng([study.seed, 5])
    config, root = study.dataset.config, 0
    corners = config.board_size - config.root_size + 1
    far, middle = corners - 1, corners // 2
    places = [(0, 0), (0, far), (far, 0), (middle, middle)]
    rows = np.array([[root, *place, rng.integers(config.n_backgrounds)] for place in places])
    found = study.dataset.paint("single", rows)
    centre = found.cells == config.root_size**2 // 2
    masked = np.where(centre, config.hidden_token, found.tokens)
    patterns = _patterns(study, masked)
    figure, axes = new_figure(5.6, 5.4, len(rows), study.n_layers + 1)
    shares = []
    for i, row in enumerate(axes):
        query = int(np.flatnonzero(centre[i])[0])
        Board(masked[i], config).draw(row[0])
        for layer, axis in enumerate(row[1:]):
            pattern = patterns[layer][i, query].mean(-1)
            _map(axis, pattern.reshape(config.board_size, -1), cmap="viridis", vmin=0)
            _mark(axis, query, config.board_size, -0.5)
            if i == 0:
                label(axis, title=f"block {layer}")
            shares.append(pattern[found.roots[i] != EMPTY].sum())
    return _picture(
        "attention_across_boards",
        "Attention follows the object",
        "One root at four places, its middle cell hidden; attention of that cell, mean over the "
        "heads of a block.",
        f"Share of that attention that goes to the root: mean {np.mean(shares):.2f}, where chance is "
        f"{config.root_size**2 / config.n_cells:.2f}.",
        figure,
    )
