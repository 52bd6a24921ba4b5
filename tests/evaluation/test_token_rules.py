"""Rules say of tokens what a reader would say, and never look across documents."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.evaluation.token_rules import LETTERS, TokenLabels, label_tokens

TEXTS = ["<|endoftext|>", " He", " said", ",", ' "', "Run", "!", '"', " 42", "\n", "ning", " axes"]


def batch_of(rows: list[list[str]], documents: list[list[int]]) -> TokenBatch:
    tokens = torch.tensor([[TEXTS.index(text) for text in row] for row in rows])
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    document = torch.tensor(documents)
    pad = document < 0
    return TokenBatch(tokens, document, position, pad if pad.any() else None, tokens == 0)


def labelled(batch: TokenBatch) -> TokenLabels:
    context: Any = SimpleNamespace(decode_token=lambda token: TEXTS[token])
    return label_tokens(context, batch)


@pytest.fixture(scope="module")
def found() -> TokenLabels:
    row = [" He", " said", ",", ' "', "Run", "!", '"', " 42", "\n", "ning", " axes"]
    return labelled(batch_of([row], [[0] * len(row)]))


def texts_with(label: Tensor) -> list[int]:
    return label[0].nonzero().flatten().tolist()


def test_rules_of_a_tokens_text(found: TokenLabels) -> None:
    assert texts_with(found.labels["begins a word"]) == [0, 1, 10]
    assert texts_with(found.labels["capital"]) == [0, 4]
    assert texts_with(found.labels["digit"]) == [7]
    assert texts_with(found.labels["punctuation"]) == [2, 3, 5, 6]
    assert texts_with(found.labels["new line"]) == [8]
    assert texts_with(found.labels["vowel first"]) == [10]
    assert texts_with(found.labels["ends in s"]) == [10]
    assert texts_with(found.letters["h"]) == [0]
    assert texts_with(found.letters["a"]) == [10]
    assert not found.letters["n"].any()  # goes on with a word
    assert set(found.letters) == set(LETTERS)


def test_rules_of_the_next_token_and_of_those_before(found: TokenLabels) -> None:
    assert texts_with(found.labels["next: punctuation"]) == [1, 2, 4, 5]
    assert texts_with(found.labels["after punctuation"]) == [3, 4, 6, 7]
    assert texts_with(found.labels["in a quotation"]) == [3, 4, 5]
    assert texts_with(found.labels["odd position"]) == [1, 3, 5, 7, 9]


def test_the_last_token_of_a_window_has_no_next_one(found: TokenLabels) -> None:
    assert texts_with(found.known) == list(range(10))


def test_nothing_crosses_from_one_document_to_the_next() -> None:
    """Also without the start token between them: quotations end, and what is next is not known."""
    row = [' "', " He", ",", " said", "!", " He"]
    found = labelled(batch_of([row, row], [[3, 3, 3, 7, 7, 7], [0, 0, 0, 0, 0, 0]]))
    assert found.labels["in a quotation"].tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert found.known.tolist() == [[True, True, False, True, True, False], [True] * 5 + [False]]
    assert found.labels["next: begins a word"][0].tolist() == [
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    assert found.labels["after punctuation"][0].tolist() == [False, True, False, False, False, True]


def test_pads_and_start_tokens_do_not_count() -> None:
    rows = [["<|endoftext|>", " He", " said", " He"], ["<|endoftext|>", " He", " He", " He"]]
    found = labelled(batch_of(rows, [[0, 0, 0, 0], [1, 1, -1, -1]]))
    assert found.known.tolist() == [[False, True, True, False], [False, False, False, False]]


def test_every_rule_is_a_label_of_every_token(found: TokenLabels) -> None:
    for each in itertools.chain(found.labels.values(), found.letters.values()):
        assert (each.shape, each.dtype) == (torch.Size([1, 11]), torch.bool)
