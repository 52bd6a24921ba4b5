"""How well a model fills in boards, by kind of board and part of the data set.

Shape legend: ``b`` boards, ``s`` cells, ``w`` words of the vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.experiments.boards.dataset import BoardDataset, Part
from neuron_explainer.experiments.boards.drawing import Flags, hide
from neuron_explainer.experiments.boards.lea import LEA
from neuron_explainer.experiments.boards.model_files import BoardModel
from neuron_explainer.experiments.boards.objects import EMPTY, KINDS, Ints, Kind

MASK, ROUNDS, BOARDS_PER_KIND = 0.2, 2, 100
"""How accuracy is measured, as in the paper's program: cells hidden with probability 0.2, two maskings of at
most 100 boards of each kind."""


@dataclass(frozen=True)
class Accuracy:
    """Shares that are right."""

    cells: float
    """Of all cells."""
    boards: float
    """Of boards, all of whose cells are right."""
    hidden: float
    """Of hidden cells."""
    objects: float
    """Of hidden cells of objects: without the background, which is easy to guess."""
    moved: float
    """Of hidden cells of roots at positions at which training never shows them; NaN if there are none."""
    n_boards: int


@torch.no_grad()
def predict(model: BoardModel, masked: Ints, from_words: bool = False, batch: int = 256) -> Ints:
    """The most probable token of every cell ``[b, s]``.

    Args:
        masked: ``[b, s]``.
        from_words: let LEA say a sentence, and draw the board from that alone.
    """
    parts = []
    for start in range(0, len(masked), batch):
        tokens = torch.from_numpy(masked[start : start + batch]).to(model.device)
        if not isinstance(model, LEA):
            logits = model(tokens)
        elif from_words:
            logits = model.predict_from_speech(model.sentence(tokens))
        else:
            logits = model.predict_from_board(tokens)
        parts.append(logits.argmax(-1).cpu().numpy())
    return np.concatenate(parts)


def accuracy(predicted: Ints, tokens: Ints, masked: Ints, objects: Flags, moved: Flags) -> Accuracy:
    """The shares of ``predicted`` ``[b, s]`` that are right.

    Args:
        objects: which cells are of objects, ``[b, s]``.
        moved: which cells are of roots at held-out positions, ``[b, s]``.
    """
    right, hidden = predicted == tokens, masked != tokens

    def among(cells: Flags) -> float:
        return float(right[cells].mean()) if cells.any() else math.nan

    return Accuracy(
        cells=float(right.mean()),
        boards=float(right.all(1).mean()),
        hidden=among(hidden),
        objects=among(hidden & objects),
        moved=among(hidden & moved),
        n_boards=len(tokens),
    )


def accuracy_by_kind(
    model: BoardModel,
    dataset: BoardDataset,
    part: Part,
    *,
    n: int = BOARDS_PER_KIND,
    mask: float = MASK,
    patch: float = 0.0,
    rounds: int = ROUNDS,
    from_words: bool = False,
    seed: int = 0,
) -> dict[Kind, Accuracy]:
    """Accuracy on at most ``n`` boards of each kind, each masked ``rounds`` times."""
    found: dict[Kind, Accuracy] = {}
    for kind in KINDS:
        boards = dataset.sample(kind, part, n, seed)
        if boards is None:
            continue
        rng = np.random.default_rng([seed, 7, KINDS.index(kind)])
        masked = np.concatenate([hide(boards, mask, patch, rng) for _ in range(rounds)])
        cells = (boards.tokens, boards.roots != EMPTY, dataset.at_held_out_positions(boards))
        tokens, objects, moved = (np.concatenate([x] * rounds) for x in cells)
        drawn = predict(model, masked, from_words)
        found[kind] = accuracy(drawn, tokens, masked, objects, moved)
    return found


def accuracies(model: BoardModel, dataset: BoardDataset, seed: int = 0) -> dict[str, float]:
    """Every accuracy on train-like and test boards, by kind, with names for a log."""
    found = {}
    ways = {"": False, "_from_words": True} if isinstance(model, LEA) else {"": False}
    parts: tuple[Part, ...] = ("train", "test")
    for suffix, from_words in ways.items():
        for part in parts:
            by_kind = accuracy_by_kind(model, dataset, part, from_words=from_words, seed=seed)
            for kind, figures in by_kind.items():
                if isinstance(model, LEA) and kind == "composite":
                    continue  # LEA's curriculum has no composites
                for name in ("cells", "boards", "hidden", "objects", "moved"):
                    if not math.isnan(share := getattr(figures, name)):
                        found[f"{part}_{kind}_{name}{suffix}"] = share
    return found


def code_entropy(words: Tensor, n_words: int) -> float:
    """The entropy of the use of words ``[...]``, as a share of the highest possible one, ln ``n_words``."""
    counts = torch.bincount(words.flatten(), minlength=n_words).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum() / math.log(n_words))
