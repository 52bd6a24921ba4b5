"""What LEA says, what its words mean, and what changes when a word is changed.

Shape legend: ``n`` boards, ``s`` cells, ``k`` words of a sentence, ``w`` words of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.drawing import Boards, hide
from neuron_explainer.experiments.boards.lea import LEA
from neuron_explainer.experiments.boards.objects import Ints
from neuron_explainer.experiments.boards.recording import Floats

ATTRIBUTES = {"root": 0, "row": 1, "column": 2, "background": 3}
"""What there is to say about a board of one root, and where its row has it."""


@torch.no_grad()
def sentences(model: LEA, masked: Ints, batch: int = 256) -> Ints:
    """What the model says about boards ``[n, s]``: words ``[n, k]``."""
    parts = [
        model.sentence(torch.from_numpy(masked[i : i + batch]).to(model.device)).cpu().numpy()
        for i in range(0, len(masked), batch)
    ]
    return np.concatenate(parts)


@torch.no_grad()
def draw_from_words(model: LEA, words: Ints, batch: int = 256) -> Ints:
    """What the model draws ``[n, s]`` from words ``[n, k]`` alone."""
    parts = [
        model.predict_from_speech(torch.from_numpy(words[i : i + batch]).to(model.device))
        .argmax(-1)
        .cpu()
        .numpy()
        for i in range(0, len(words), batch)
    ]
    return np.concatenate(parts)


def edit_word(words: Ints, slot: int, word: int) -> Ints:
    """Sentences ``[n, k]`` with the word of one slot changed."""
    if not 0 <= slot < words.shape[-1]:
        raise InputError(f"a sentence has slots 0 to {words.shape[-1] - 1}, found {slot}.")
    edited = words.copy()
    edited[..., slot] = word
    return edited


def mutual_information(words: Ints, labels: Ints) -> float:
    """Mutual information of words ``[n]`` and labels ``[n]``, in bits, from their counts."""
    _, word = np.unique(words, return_inverse=True)
    _, label = np.unique(labels, return_inverse=True)
    joint = np.zeros((word.max() + 1, label.max() + 1))
    np.add.at(joint, (word, label), 1)
    joint /= joint.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / apart[there])).sum())


def entropy(labels: Ints) -> float:
    """Entropy of labels ``[n]``, in bits."""
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@dataclass(frozen=True, eq=False)
class WordInformation:
    """What each slot of a sentence tells about each attribute of a board of one root."""

    shares: Floats
    """``[attributes, k]``: mutual information as a share of the attribute's entropy."""
    floor: Floats
    """``[attributes, k]``: the same with the boards shuffled: what few samples alone give."""
    attributes: tuple[str, ...]


def word_information(words: Ints, boards: Boards, seed: int = 0) -> WordInformation:
    """Mutual information of every slot of sentences ``[n, k]`` with the attributes of single boards."""
    rng = np.random.default_rng([seed, 51])
    shuffled = rng.permutation(len(words))
    shape = (len(ATTRIBUTES), words.shape[1])
    shares, floor = np.zeros(shape), np.zeros(shape)
    for i, column in enumerate(ATTRIBUTES.values()):
        labels = boards.rows[:, column]
        whole = max(entropy(labels), 1e-12)
        for slot in range(words.shape[1]):
            shares[i, slot] = mutual_information(words[:, slot], labels) / whole
            floor[i, slot] = mutual_information(words[shuffled, slot], labels) / whole
    return WordInformation(shares.astype(np.float32), floor.astype(np.float32), tuple(ATTRIBUTES))


@dataclass(frozen=True, eq=False)
class WordSwap:
    """What happens when words are changed to those of a board that differs in one attribute."""

    attribute: str
    by_slot: Floats
    """``[k]``: share of boards that turn into the other one's attribute when that slot alone is changed."""
    by_number: Floats
    """``[k + 1]``: the same when the 0, 1, 2, … most effective slots are changed together."""
    differing_slots: float
    """How many words of the two sentences differ, in the mean."""
    control: float
    """``by_slot`` of the best slot, with a word of a random other sentence in its place."""
    n_boards: int


def attribute_pairs(
    dataset: BoardDataset, attribute: str, n: int, seed: int = 0
) -> tuple[Boards, Boards]:
    """Boards of one root, and the same with one attribute changed."""
    if attribute not in ATTRIBUTES:
        hint = did_you_mean(attribute, ATTRIBUTES)
        raise InputError(f"unknown attribute {attribute!r}.{hint} Known: {', '.join(ATTRIBUTES)}.")
    rng = np.random.default_rng([seed, 53])
    config, column = dataset.config, ATTRIBUTES[attribute]
    corners = config.board_size - config.root_size + 1
    n_values = {"root": config.n_roots, "background": config.n_backgrounds}.get(attribute, corners)
    if n_values < 2:
        raise InputError(
            f"the boards have only one value of {attribute}: nothing can be exchanged."
        )
    before = dataset.draw("single", "train", n, rng)
    rows = before.rows.copy()
    rows[:, column] = (rows[:, column] + rng.integers(1, n_values, size=n)) % n_values
    return before, dataset.paint("single", rows, rng)


def swap_words(
    model: LEA, dataset: BoardDataset, attribute: str, n: int = 200, seed: int = 0
) -> WordSwap:
    """Change words of sentences towards those of boards that differ in one attribute.

    A board counts as turned if what is drawn shows the other board on more than half of the cells in which
    the two differ.
    """
    before, after = attribute_pairs(dataset, attribute, n, seed)
    words, other = sentences(model, before.tokens), sentences(model, after.tokens)
    rng = np.random.default_rng([seed, 57])

    def turned(edited: Ints) -> float:
        drawn, differ = draw_from_words(model, edited), before.tokens != after.tokens
        share = ((drawn == after.tokens) & differ).sum(1) / np.maximum(differ.sum(1), 1)
        return float((share > 0.5).mean())

    slots = range(words.shape[1])
    by_slot = [turned(_with_slots(words, other, [slot])) for slot in slots]
    order = np.argsort(by_slot)[::-1].tolist()
    by_number = [turned(_with_slots(words, other, order[:m])) for m in range(len(order) + 1)]
    strangers = words[rng.permutation(len(words))]
    control = turned(_with_slots(words, strangers, order[:1]))
    return WordSwap(
        attribute,
        np.array(by_slot, dtype=np.float32),
        np.array(by_number, dtype=np.float32),
        float((words != other).sum(1).mean()),
        control,
        n,
    )


def _with_slots(words: Ints, other: Ints, slots: Sequence[int]) -> Ints:
    """Sentences ``[n, k]`` with the words of some slots taken from others."""
    edited = words.copy()
    edited[:, list(slots)] = other[:, list(slots)]
    return edited


def spoken(
    model: LEA, dataset: BoardDataset, n: int = 1000, mask: float = 0.0, seed: int = 0
) -> tuple[Boards, Ints]:
    """Random single boards of the training set, and what the model says about them ``[n, k]``."""
    rng = np.random.default_rng([seed, 59])
    boards = dataset.draw("single", "train", n, rng)
    return boards, sentences(model, hide(boards, mask, 0.0, rng))
