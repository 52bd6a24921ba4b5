"""What is read from replies, and what is refused."""

import json
import math
from typing import Any

import pytest

from neuron_explainer.analysis.explaining.explanation import Failure
from neuron_explainer.analysis.explaining.judge import Reply, ReplyToken
from neuron_explainer.analysis.explaining.replies import (
    LONGEST_REPLY,
    JsonError,
    answers,
    booleans,
    choice,
    expected_values,
    json_in,
    numbers,
    one_line,
    probabilities,
    texts,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ("\ufeff [1, 2] ", [1, 2]),
        ('Here: {"a": {"b": "}"}} there', {"a": {"b": "}"}}),
        ('{not} {"a": "{"}', {"a": "{"}),
        ('{"a": 1} and again {"a": 1}', {"a": 1}),
        ('<think>{"a": 2}</think>{"a": 1}', {"a": 1}),
        ('{"a": "\\ud800"}', {"a": "\ud800"}),
    ],
)
def test_json_is_found(text: str, value: Any) -> None:
    assert json_in(text) == value


@pytest.mark.parametrize(
    ("text", "reason", "again"),
    [
        ("", "no JSON", True),
        ("true", "expected a JSON object, found True", True),
        ('{"a": 1} or {"a": 2}', "2 different JSON objects", True),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice", False),
        ('x {"a": 1, "a": 1}', "the key 'a' is there twice", False),
        ('{"a": NaN}', "no JSON", True),
        ('{"a":' * 5000, "nested too deep", False),
        ("{" * 100_000, "no JSON", True),
        ("x" * (LONGEST_REPLY + 1), "more than 200000 characters", False),
    ],
)
def test_json_that_cannot_be_relied_on(text: str, reason: str, again: bool) -> None:
    with pytest.raises(JsonError, match=reason) as caught:
        json_in(text)
    assert caught.value.may_help_to_ask_again is again


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"1": True, "2": False}, [True, False]),
        ({"2": False, "1": True}, [True, False]),
        ({"0": True, "1": False}, [True, False]),
        ([True, False], [True, False]),
        ({"answers": {"1": "yes", "2": "No"}}, [True, False]),
        ({"x": {"y": [1, 0]}}, [True, False]),
    ],
)
def test_answers_by_number(value: Any, found: list[bool]) -> None:
    assert booleans(value, 2) == found


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([True], "expected 2 answers, found 1 answers"),
        ([True] * 3, "found 3 answers"),
        ({"1": True}, "found 1 answers"),
        ({"1": True, "3": False}, "expected the numbers 1 to 2 as keys"),
        ({"1": True, "2": False, "3": True}, "found 3 answers"),
        ({"1": True, "2": "perhaps"}, "expected true or false, found 'perhaps'"),
        ({"1": True, "2": None}, "expected true or false, found None"),
        ({"1": True, "2": 0.5}, "expected true or false, found 0.5"),
        ("true", "found 'true'"),
        (None, "found None"),
    ],
)
def test_answers_that_are_not_what_was_asked(value: Any, reason: str) -> None:
    found = booleans(value, 2)
    assert isinstance(found, Failure)
    assert found.kind == "unparsable"
    assert reason in found.reason


def test_numbers_lie_within_limits() -> None:
    assert numbers({"1": 3, "2": "10", "3": 0.5}, 3, 0, 10) == [3, 10, 0.5]
    for bad in (-1, 11, "x", True, None, "nan", 10**400, [1]):
        assert isinstance(numbers([0, bad], 2, 0, 10), Failure), bad
    assert answers({"1": [1, 2]}, 2) == [1, 2]  # one key, and a list: the list of all
    assert choice({"x": " b "}, "x", "ABC") == 1
    assert isinstance(choice({"x": "D"}, "x", "ABC"), Failure)
    assert isinstance(choice(["A"], "x", "ABC"), Failure)
    assert one_line("a\x00\n\tb\u202e c") == "a b c"


def token(text: str, **alternatives: float) -> ReplyToken:
    return ReplyToken(text, {key.strip("_"): math.log(p) for key, p in alternatives.items()})


def test_probabilities_of_yes() -> None:
    yes, no = token(" true", true=0.6, false=0.2), token("false", false=0.9, true=0.1)
    reply = Reply('{"1": true,"2":false}', tokens=(token('{"1":'), yes, token(',"2":'), no))
    assert probabilities(reply, 2) == pytest.approx([0.75, 0.1])
    assert probabilities(reply, 3) is None
    assert probabilities(Reply("x"), 1) is None
    nothing = Reply("true", tokens=(ReplyToken("true", {"true": -9999.0, "maybe": -0.1}),))
    assert probabilities(nothing, 1) is None


def test_expected_values_of_numbers() -> None:
    scale = {"_0": 0.5, "_10": 0.25, "_3": 0.25, "_11": 0.5, "x": 0.5}
    tokens = (token('{"'), token("1"), token('":'), token(" 3", **scale), token(', "2": '))
    text = '{"1": 3, "2": 10}'
    split = Reply(text, tokens=(*tokens, token("1", _1=1.0), token("0", _0=1.0), token("}")))
    # The 10 is written with two tokens, so that its distribution is not known.
    assert expected_values(split, [3, 10], 10) == pytest.approx([3.25, 10])
    whole = Reply(text, tokens=(*tokens, token("10", _10=0.5, _0=0.5), token("}")))
    assert expected_values(whole, [3, 10], 10) == pytest.approx([3.25, 5])
    assert expected_values(Reply(text), [3, 10], 10) == [3, 10]
    assert expected_values(whole, [3, 9], 10) == [3, 9]  # not the numbers of this text
    as_list = Reply("[2,7]", tokens=(token("["), token("2", _2=0.5, _4=0.5), token(",7]")))
    assert expected_values(as_list, [2, 7], 10) == pytest.approx([3, 7])


def test_random_text_is_never_an_error() -> None:
    pieces = ["{", "}", '"', "1", ":", ",", "[", "]", "true", "\\", " ", "<think>", "</think>", "é"]
    import random

    for seed in range(500):
        text = "".join(random.Random(seed).choices(pieces, k=30))
        try:
            value = json_in(text)
        except JsonError:
            continue
        json.dumps(value)
        assert isinstance(booleans(value, 2), list | Failure)


def test_half_a_character_in_a_text_is_replaced() -> None:
    assert texts({"t": {"1": "a\ud800", "2": "b"}}, "t", 2, 10) == ["a?", "b"]
