"""Rules: explanations that a program can apply, in a small language that is read and never executed.

    token in {" dog", " cat"}
    token in {" of"} and token[-1] in {" king", " queen"} or token begins with " un"
    token is number and not token[-1] is newline and position < 8

A rule is true or false at each token of a text. It is a list of clauses joined by ``or``; a clause is a
list of tests joined by ``and``; there are no brackets. A test looks at the token, or with ``token[-k]`` at
the one ``k`` places before it (in the text that is shown: before its first token nothing is true), or at
the place of the token in its document.

    PLACE in {STRING, …}            one of these tokens; strings are written as in JSON
    PLACE begins with STRING        PLACE ends with STRING
    PLACE is CLASS                  see :data:`CLASSES`
    position < N                    position >= N

Reading and applying a rule takes time in proportion to its length and to that of the texts, and both are
limited. Bytes that are no UTF-8 are written as lone surrogates (Python's ``surrogateescape``), so that each
token has a string of its own.

Shape legend: ``t`` tokens of all texts, one after the other, ``n`` texts, ``i`` different tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.explaining.examples import LabelledExample
from neuron_explainer.analysis.highlights import token_string
from neuron_explainer.errors import InputError, did_you_mean, shown

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MOST_CHARACTERS = 20_000
MOST_TESTS = 64
MOST_STRINGS = 1_000
MOST_STEPS = 100_000_000
"""Tests times tokens that may be looked at in one call."""
FURTHEST = 8
"""How many places before the token a test may look."""
_SHOWN_STRINGS = 12

CLASSES: dict[str, Callable[[str], bool]] = {
    "capitalised": lambda text: text.strip()[:1].isupper(),
    "number": lambda text: text.strip().isdigit(),
    "punctuation": lambda text: bool(text.strip()) and not any(c.isalnum() for c in text),
    "newline": lambda text: "\n" in text,
    "word start": lambda text: text[:1] == " " and text[1:2].isalpha(),
    "word part": lambda text: text[:1].isalpha(),
}
"""Kinds of tokens, by the text that they write."""

Kind = Literal["in", "begins with", "ends with", "is", "position <", "position >="]


def string_of(piece: bytes) -> str:
    """The string that stands for a token in a rule."""
    return piece.decode(errors="surrogateescape")


@dataclass(frozen=True)
class Test:
    """One condition on a token."""

    __test__ = False  # for pytest, which would take the name for a case

    kind: Kind
    strings: tuple[str, ...] = ()
    """For "in" the tokens, for "begins with" and "ends with" one string, for "is" one class."""
    number: int = 0
    """For the position."""
    back: int = 0
    """How many places before the token the one is that is looked at."""
    negated: bool = False

    def __str__(self) -> str:
        place = f"token[-{self.back}]" if self.back else "token"
        if self.kind.startswith("position"):
            text = f"{self.kind} {self.number}"
        elif self.kind == "in":
            text = f"{place} in {{{', '.join(map(json.dumps, self.strings))}}}"
        elif self.kind == "is":
            text = f"{place} is {self.strings[0]}"
        else:
            text = f"{place} {self.kind} {json.dumps(self.strings[0])}"
        return f"{'not ' * self.negated}{text}"


@dataclass(frozen=True)
class Rule:
    """Clauses, one of which has to be true; each is a tuple of tests, all of which have to be."""

    clauses: tuple[tuple[Test, ...], ...]

    def __post_init__(self) -> None:
        tests = [test for clause in self.clauses for test in clause]
        if not tests or not all(self.clauses):
            raise InputError("a rule needs at least one test in each clause.")
        if len(tests) > MOST_TESTS:
            raise InputError(f"a rule may have {MOST_TESTS} tests, found {len(tests)}.")
        n_strings = sum(len(test.strings) for test in tests)
        if n_strings > MOST_STRINGS:
            raise InputError(f"a rule may have {MOST_STRINGS} strings, found {n_strings}.")

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """The rule that a text means; an InputError says where it does not fit."""
        return _Parser(text).rule()

    @classmethod
    def of_tokens(cls, strings: Sequence[str]) -> "Rule":
        """The rule that asks for one of these tokens."""
        return cls(((Test("in", tuple(strings)),),))

    def __str__(self) -> str:
        return " or ".join(" and ".join(map(str, clause)) for clause in self.clauses)

    def holds(self, tokens: "Tokens") -> Mask:
        """``[t]``: where the rule is true."""
        n_tests = sum(map(len, self.clauses))
        if n_tests * len(tokens) > MOST_STEPS:
            raise InputError(
                f"{n_tests} tests on {len(tokens):,} tokens are more than the {MOST_STEPS:,} that a rule "
                "may look at in one call; give fewer texts at a time."
            )
        found = np.zeros(len(tokens), bool)
        for clause in self.clauses:
            every = np.ones(len(tokens), bool)
            for test in clause:
                every &= tokens.where(test)
            found |= every
        return found

    def in_words(self) -> str:
        """The rule in English."""
        return "; or ".join(map(_clause_in_words, self.clauses))


class Tokens:
    """Texts one after the other, so that a test looks at each different token once.

    Args:
        texts: examples, or what holds one as ``.example``.
    """

    def __init__(self, examples: Sequence[LabelledExample]) -> None:
        parts = [each.example.tokens for each in examples]
        self.length: Ints = np.array([len(part) for part in parts], np.int64)
        self.start: Ints = np.cumsum(self.length) - self.length
        """``[n]``: where each text begins."""
        ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
        different, self.index = np.unique(ids, return_inverse=True)
        """``index`` ``[t]``: which of the different tokens stands at each place."""
        self.strings = (
            list(map(string_of, examples[0].example.vocabulary(different))) if parts else []
        )
        """``[i]``"""
        self.place: Ints = np.arange(len(ids)) - np.repeat(self.start, self.length)
        """``[t]``: the place in the text."""
        first = np.array([each.example.position for each in examples], np.int64)
        self.position: Ints = self.place + np.repeat(first, self.length)
        """``[t]``: the place in the document."""
        self._classes: dict[str, Mask] = {}
        self._parts: dict[tuple[str, int], dict[str, list[int]]] = {}

    def __len__(self) -> int:
        return len(self.index)

    def where(self, test: Test) -> Mask:
        """``[t]``: where a test is true."""
        if test.kind == "position <":
            found = self.position < test.number
        elif test.kind == "position >=":
            found = self.position >= test.number
        else:
            found = self.before(self._fitting(test)[self.index], test.back)
        return ~found if test.negated else found

    def _fitting(self, test: Test) -> Mask:
        """``[i]``: which of the different tokens a test asks for."""
        if test.kind == "is":
            return self._of_class(test.strings[0])
        fits = np.zeros(len(self.strings), bool)
        for text in test.strings:
            fits[self._by_part(test.kind, len(text)).get(text, [])] = True
        return fits

    def _of_class(self, name: str) -> Mask:
        if name not in self._classes:
            self._classes[name] = np.fromiter(
                map(CLASSES[name], self.strings), bool, len(self.strings)
            )
        return self._classes[name]

    def _by_part(self, kind: Kind, size: int) -> dict[str, list[int]]:
        """The different tokens by their whole string, their first or their last ``size`` characters."""
        key = kind, 0 if kind == "in" else size
        if key not in self._parts:
            found: dict[str, list[int]] = {}
            for number, text in enumerate(self.strings):
                if kind == "in":
                    found.setdefault(text, []).append(number)
                elif len(text) >= size:
                    part = text[:size] if kind == "begins with" else text[len(text) - size :]
                    found.setdefault(part, []).append(number)
            self._parts[key] = found
        return self._parts[key]

    def before(self, mask: Mask, back: int) -> Mask:
        """``[..., t]``: what a mask says ``back`` places before each token; False before the text."""
        if back == 0:
            return mask
        found = np.zeros_like(mask)
        found[..., back:] = mask[..., :-back]
        return found & (self.place >= back)

    def any(self, mask: Mask) -> Mask:
        """``[..., t] -> [..., n]``: whether a mask is true somewhere in each text."""
        if not len(self.start):
            return np.zeros((*mask.shape[:-1], 0), bool)
        found: Mask = np.logical_or.reduceat(mask, self.start, axis=-1)
        return found

    def split(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """``[t]`` values, text by text."""
        return np.split(values, self.start[1:]) if len(self.start) else []


# --- in words ---


def _clause_in_words(clause: Sequence[Test]) -> str:
    own = [test for test in clause if not test.back and not test.kind.startswith("position")]
    # What comes first in the text is said last: “dog” right after “the”.
    others = sorted((test for test in clause if test.back), key=lambda test: test.back)
    places = [test for test in clause if test.kind.startswith("position")]
    if len(clause) == len(places) == 1 and clause[0] == Test("position <", number=1):
        return "the first token of a document"
    parts = [" and ".join(map(_of_token, own)) or "any token"]
    parts += [f"{_distance(test.back)} {_of_token(test)}" for test in others]
    parts += [_of_position(test) for test in places]
    return " ".join(parts)


def _of_token(test: Test) -> str:
    no = "no " if test.negated else ""
    if test.kind == "in":
        listed = [f"“{_visible(text)}”" for text in test.strings[:_SHOWN_STRINGS]]
        more = len(test.strings) - len(listed)
        if more:
            listed.append(f"{more} more")
        last = listed.pop()
        return f"{no}{', '.join(listed)} or {last}" if listed else f"{no}{last}"
    if test.kind == "is":
        return f"{no or 'a '}token that is {_CLASS_IN_WORDS[test.strings[0]]}"
    return f"{no or 'a '}token that {test.kind} “{_visible(test.strings[0])}”"


_CLASS_IN_WORDS = {
    "capitalised": "capitalised",
    "number": "a number",
    "punctuation": "punctuation",
    "newline": "the end of a line",
    "word start": "the start of a word",
    "word part": "inside a word or after no space",
}


def _distance(back: int) -> str:
    return "right after" if back == 1 else f"{back} tokens after"


def _of_position(test: Test) -> str:
    first = (test.kind == "position <") != test.negated
    if test.number == 1:
        return f"{'at' if first else 'after'} the first token of a document"
    return f"{'among' if first else 'after'} the first {test.number} tokens of a document"


def _visible(text: str) -> str:
    return token_string(text.encode(errors="surrogateescape"))


# --- reading ---

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(\d+)|([A-Za-z]+)|(>=|[<{}\[\],-]))')


class _Parser:
    """Reads a rule from left to right, with one word of lookahead."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
            raise InputError(f"a rule is a text of at most {MOST_CHARACTERS:,} characters.")
        self.text = text
        self.words = list(self._scanned())
        self.at = 0

    def _scanned(self) -> Iterator[str]:
        place, end = 0, len(self.text.rstrip())
        while place < end:
            found = _TOKEN.match(self.text, place, end)
            if found is None:
                rest = self.text[place:end].strip()
                raise InputError(f"a rule cannot be read from {shown(rest)} on.")
            yield found[0].strip()
            place = found.end()

    def rule(self) -> Rule:
        """The whole text as a rule."""
        clauses, clause = [], [self._test()]
        while (word := self._next()) is not None:
            if word == "or":
                clauses.append(tuple(clause))
                clause = []
            elif word != "and":
                raise InputError(f"a rule: expected 'and' or 'or', found {shown(word)}.")
            clause.append(self._test())
        return Rule((*clauses, tuple(clause)))

    def _test(self) -> Test:
        word = self._needed()
        negated = word == "not"
        if negated:
            word = self._needed()
        if word == "position":
            kind: Kind = "position <" if self._one_of("<", ">=") == "<" else "position >="
            return Test(kind, number=self._integer(), negated=negated)
        if word != "token":
            raise InputError(f"a rule: expected 'token' or 'position', found {shown(word)}.")
        back = self._back()
        verb = self._one_of("in", "is", "begins", "ends")
        if verb == "in":
            return Test("in", self._strings(), back=back, negated=negated)
        if verb == "is":
            return Test("is", (self._class(),), back=back, negated=negated)
        self._one_of("with")
        kind = "begins with" if verb == "begins" else "ends with"
        return Test(kind, (self._string(),), back=back, negated=negated)

    def _back(self) -> int:
        if self._peek() != "[":
            return 0
        self.at += 1
        self._one_of("-")
        back = self._integer()
        self._one_of("]")
        if not 1 <= back <= FURTHEST:
            raise InputError(f"a rule: token[-k] needs k from 1 to {FURTHEST}, found {back}.")
        return back

    def _strings(self) -> tuple[str, ...]:
        self._one_of("{")
        found = [self._string()]
        while self._one_of(",", "}") == ",":
            found.append(self._string())
        return tuple(found)

    def _class(self) -> str:
        name = self._needed()
        if name == "word":
            name = f"word {self._one_of('start', 'part')}"
        if name not in CLASSES:
            raise InputError(
                f"a rule: unknown kind of token {shown(name)}.{did_you_mean(name, CLASSES)} Known: "
                f"{', '.join(CLASSES)}."
            )
        return name

    def _string(self) -> str:
        word = self._needed()
        try:
            found = json.loads(word)
        except ValueError:
            found = None
        if not isinstance(found, str):
            raise InputError(f"a rule: expected a string in quotes, found {shown(word)}.")
        try:
            found.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            raise InputError(
                f"a rule: {shown(word)} has a lone surrogate that stands for no byte; no token is written so."
            ) from None
        return found

    def _integer(self) -> int:
        word = self._needed()
        if not word.isdecimal() or len(word) > 9:
            raise InputError(f"a rule: expected a whole number, found {shown(word)}.")
        return int(word)

    def _one_of(self, *wanted: str) -> str:
        word = self._needed()
        if word not in wanted:
            listed = " or ".join(map(repr, wanted))
            raise InputError(f"a rule: expected {listed}, found {shown(word)}.")
        return word

    def _peek(self) -> str | None:
        return self.words[self.at] if self.at < len(self.words) else None

    def _next(self) -> str | None:
        word = self._peek()
        self.at += 1
        return word

    def _needed(self) -> str:
        word = self._next()
        if word is None:
            raise InputError("a rule ends too early.")
        return word
