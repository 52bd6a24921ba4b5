"""The language of rules: reading, applying, limits, and hostile strings; and finding rules."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.explaining import rules
from neuron_explainer.analysis.explaining.examples import LabelledExample
from neuron_explainer.analysis.explaining.methods import Predictor, by_rules, by_tokens, rule_of
from neuron_explainer.analysis.explaining.rule_search import find_rule
from neuron_explainer.analysis.explaining.rules import Rule, Test, Tokens, string_of
from neuron_explainer.analysis.explaining.scorers import Text, detection, fuzzing, simulation
from neuron_explainer.errors import InputError
from tests.analysis.explaining.made import WORDS, made_example, made_set

HOSTILE = [
    '"',
    "\\",
    "}",
    " or ",
    'in {"x"}',
    "\n",
    "\x1b[2J",
    "\u202e",
    "“”",
    "\udc80",
    "a\x00b",
    "⟨",
]
SOURCES = [
    'token in {" the", " a"}',
    'token in {" mat"} and token[-1] in {" the"} or not token[-2] is newline',
    'token begins with " K" or token ends with "ng" and position >= 3',
    "not position < 2 and token is word start",
    "token[-8] is punctuation",
]


def examples(n: int = 6) -> list[LabelledExample]:
    return list(made_set(n, n).train)


@pytest.mark.parametrize("source", SOURCES)
def test_a_rule_is_read_and_written(source: str) -> None:
    rule = Rule.parse(source)
    assert str(rule) == source
    assert Rule.parse(f"  {source} \n") == rule


@pytest.mark.parametrize("text", HOSTILE)
def test_any_string_survives(text: str) -> None:
    rule = Rule(((Test("in", (text, "x")), Test("ends with", (text,), back=3)),))
    assert Rule.parse(str(rule)) == rule
    assert str(rule).isascii()
    assert "\x1b" not in rule.in_words()
    rule.in_words().encode()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "ends too early"),
        ("token", "ends too early"),
        ("token in {}", "expected a string in quotes, found '}'"),
        ('token in {"a"', "ends too early"),
        ('token in {"a', "cannot be read from"),
        ("token is wrod", "unknown kind of token"),
        ("token is captialised", "Did you mean 'capitalised'"),
        ("token[-9] is number", "k from 1 to 8, found 9"),
        ("token[0] is number", "expected '-'"),
        ("position < x", "expected a whole number"),
        ('token in {"\\ud800"}', "a lone surrogate that stands for no byte"),
        ("position < 99999999999", "expected a whole number"),
        ("word is number", "expected 'token' or 'position'"),
        ("token is number xor token is newline", "expected 'and' or 'or'"),
        ('__import__("os")', "cannot be read from|expected"),
        ("token is number or", "ends too early"),
        ('token in {"\\ud8"}', "expected a string in quotes"),
        ("token is number; import os", "cannot be read from"),
    ],
)
def test_what_is_no_rule_is_said_in_words(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Rule.parse(source)


def test_long_and_deep_texts_are_refused_at_once() -> None:
    began = time.monotonic()
    hostile = [
        '"' * 19_999,
        "token[" * 3_000,
        "not " * 4_999,
        "\\" * 19_999,
        'token in {"' + "a\\" * 9_000,
    ]
    for source in [*hostile, "a" * 30_000]:
        with pytest.raises(InputError):
            Rule.parse(source)
    with pytest.raises(InputError, match="64 tests, found 65"):
        Rule.parse(" or ".join(["token is number"] * 65))
    with pytest.raises(InputError, match="1000 strings, found 1001"):
        Rule.of_tokens([str(i) for i in range(1001)])
    assert time.monotonic() - began < 2


def test_more_steps_than_allowed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(examples())
    monkeypatch.setattr(rules, "MOST_STEPS", len(tokens) - 1)
    with pytest.raises(InputError, match="give fewer texts at a time"):
        Rule.parse("token is number").holds(tokens)


def brute_force(rule: Rule, each: LabelledExample) -> list[bool]:
    """What a rule says of each token, straight from its definition."""
    pieces = [piece.decode() for piece in each.example.pieces]
    kinds: dict[str, Callable[[str, str], bool]] = {
        "begins with": lambda text, wanted: text[: len(wanted)] == wanted,
        "ends with": lambda text, wanted: text[len(text) - len(wanted) :] == wanted,
        "is": lambda text, name: rules.CLASSES[name](text),
    }

    def true(test: Test, i: int) -> bool:
        at = each.example.position + i
        if test.kind == "position <":
            found = at < test.number
        elif test.kind == "position >=":
            found = at >= test.number
        elif i < test.back:
            found = False
        else:
            text = pieces[i - test.back]
            compare = kinds.get(test.kind, lambda a, b: a == b)
            found = any(compare(text, wanted) for wanted in test.strings)
        return found != test.negated

    return [
        any(all(true(test, i) for test in clause) for clause in rule.clauses)
        for i in range(len(pieces))
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_rules_are_applied_as_they_are_defined(source: str) -> None:
    rule, some = Rule.parse(source), examples()
    tokens = Tokens(some)
    found = [part.tolist() for part in tokens.split(rule.holds(tokens))]
    assert found == [brute_force(rule, each) for each in some]
    assert tokens.any(rule.holds(tokens)).tolist() == [any(part) for part in found]


def test_no_text_gives_no_answer() -> None:
    assert Predictor(Rule.parse("token is number")).texts([]) == []


def test_rules_in_english() -> None:
    rule = Rule.parse(
        'token in {" king", " queen"} and token[-1] in {" the"} or token begins with " un" '
        "or not token[-2] is number and position < 3"
    )
    assert rule.in_words() == (
        "“ king” or “ queen” right after “ the”; or a token that begins with “ un”; or any token 2 tokens "
        "after no token that is a number among the first 3 tokens of a document"
    )
    first = Rule.parse("position < 1 or token is number and position >= 1")
    assert first.in_words() == (
        "the first token of a document; or a token that is a number after the first token of a "
        "document"
    )
    assert "and 3 more" not in Rule.of_tokens(["a"] * 12).in_words()
    assert Rule.of_tokens([str(i) for i in range(15)]).in_words().endswith("“11” or 3 more")


# ---- finding ---------------------------------------------------------------------------------------


def planted(active: Callable[[list[int], int, int], bool], n: int = 40) -> list[LabelledExample]:
    """Random texts; the unit is active where a function of tokens, place and position says so."""
    random = np.random.default_rng(4)
    found: list[LabelledExample] = []
    while len(found) < 2 * n:
        tokens = random.integers(0, len(WORDS), 8).tolist()
        position = int(random.integers(0, 40)) if len(found) % 4 else 0
        values = [float(active(tokens, i, position + i)) for i in range(8)]
        if sum(e.active for e in found) < n and any(values):
            source, quantile = "active", 0
        elif sum(not e.active for e in found) < n and not any(values):
            source, quantile = "random", -1
        else:
            continue
        example = made_example(tokens, values, len(found) * 8, position)
        found.append(LabelledExample(example, source, quantile))  # type: ignore[arg-type]  # source is a plain text
    return found


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        (lambda t, i, p: t[i] == 5, {'token in {" mat"}'}),
        (
            lambda t, i, p: t[i] in (5, 8),
            {'token in {" mat", " King"}', 'token in {" King", " mat"}'},
        ),
        (
            lambda t, i, p: i > 0 and t[i - 1] == 5 and t[i] == 1,
            {'token in {" cat"} and token[-1] in {" mat"}'},
        ),
        (lambda t, i, p: i > 1 and t[i - 2] == 5, {'token[-2] in {" mat"}'}),
        (lambda t, i, p: p < 2, {"position < 2"}),
    ],
)
def test_planted_rules_are_found(active: Any, expected: set[str]) -> None:
    assert str(find_rule(planted(active))) in expected


def test_what_stands_elsewhere_in_active_texts_is_no_explanation() -> None:
    random = np.random.default_rng(1)
    found = []
    for number in range(80):
        active = number % 2 == 0
        tokens = random.choice([1, 2, 3, 4], 8)
        values = np.zeros(8)
        if active:  # a line ends before each active token, and in no other text
            tokens[1], tokens[6], values[6] = 7, 5, 1.0
        elif number % 5 == 0:
            tokens[6] = 5
        example = made_example(tokens.tolist(), values.tolist(), number * 8)
        found.append(LabelledExample(example, "active" if active else "random", -1 + active))
    assert str(find_rule(found)) == 'token in {" mat"}'


def test_affixes_are_found_where_no_token_is_enough() -> None:
    words = [b" sing", b" ring", b" thing", b"king", b" wing", b" a", b" b", b" c", b" d", b" e"]
    random = np.random.default_rng(0)
    found = []
    for number in range(80):
        active = number % 2 == 0
        tokens = random.integers(5, 10, 8)
        values = np.zeros(8)
        if active:
            # Each ending is rare, and those of the second half of the texts are new.
            tokens[3], values[3] = (number // 2) % 5, 1.0
        example = made_example(tokens.tolist(), values.tolist(), number * 8)
        object.__setattr__(example, "vocabulary", lambda ids: [words[i] for i in ids])
        found.append(LabelledExample(example, "active" if active else "random", -1 + active))
    assert "ends with" in str(find_rule(found))


def test_a_rule_is_found_from_very_few_texts() -> None:
    few = [*planted(lambda t, i, p: t[i] == 5, 3)]
    assert str(find_rule(few)) == 'token in {" mat"}'


def test_a_rule_predicts_texts_marks_and_values() -> None:
    examples = made_set(20, 10, 10)
    for explain in (by_rules, by_tokens):
        found = explain(examples)
        assert (found.text, found.payload) == ("“ the”", {"rule": 'token in {" the"}'})
        assert found.examples == examples.ids("train")
        rule = rule_of(found)
        assert rule is not None
        predict = Predictor(rule)
        assert detection(examples, predict.texts).value == 1
        assert fuzzing(examples, predict.marks, wrong=0.5).value == 1
        r = simulation(examples, predict.values).value
        assert r is not None
        assert r > 0.8


def test_words_of_bytes_are_strings_of_their_own() -> None:
    assert string_of(b"\xe2\x98") != string_of(b"\xe2\x98\x83")
    assert string_of(b"\xff") == "\udcff"
    blank = Text(examples()[0])
    assert Predictor(Rule.of_tokens(["\udcff"])).texts([blank]) == [False]
