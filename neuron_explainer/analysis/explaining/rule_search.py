"""Finding a rule for a unit: clause by clause, each the one that helps most on the train examples.

A clause *hits* an active text if it is true at a token where the unit is active there, and it is a false
alarm in an inactive text where it is true anywhere. The gain of a clause is the share of active texts that
it hits first minus the share of inactive ones where it is the first false alarm, minus a little for each
test, so that of two equal ones the simpler is taken. A quarter of the train examples is held back: it says
how many clauses are worth having. The rule is then found again on all of them with so many clauses.

Shape legend: ``c`` candidates, ``t`` tokens of all texts, ``n`` texts.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.explaining.examples import LabelledExample
from neuron_explainer.analysis.explaining.rules import CLASSES, Rule, Test, Tokens

Mask = npt.NDArray[np.bool_]

ACTIVE_SHARE = 0.3
"""A token of an active text counts as active above this share of the text's largest activation."""
MOST_CLAUSES = 32
_AFFIXES = (2, 3, 4)  # characters
_POSITIONS = (1, 2, 4, 8, 16)
_MOST_OF_A_KIND = 80  # candidates
_BASES = 16  # candidates that are joined with every other one
_PER_TEST = 0.2  # of one active text: what a further test has to be worth
_TIE = 0.1  # of one active text: what a clause gains that fits the active tokens best
_FEW = 8  # train texts of one kind; with fewer none are held back


class _Outcomes(NamedTuple):
    """What some clauses do on the texts."""

    hits: Mask
    """``[c, active texts]``"""
    alarms: Mask
    """``[c, inactive texts]``"""
    fit: npt.NDArray[np.float64]
    """``[c]``, -1 to 1: the active tokens where the clause is true minus the others, as a share."""

    def rows(self, which: Any) -> "_Outcomes":
        """Some of the clauses."""
        return _Outcomes(*(part[which] for part in self))

    def joined(self, others: "Sequence[_Outcomes]") -> "_Outcomes":
        """These clauses and others."""
        return _Outcomes(*(np.concatenate(parts) for parts in zip(self, *others, strict=True)))


class _Candidates(NamedTuple):
    tests: list[Test]
    masks: Mask
    """``[c, t]``: where each is true."""


def find_rule(train: Sequence[LabelledExample]) -> Rule:
    """The rule that tells the active texts from the others best.

    Args:
        train: texts of both kinds, at least one of them active.
    """
    active = [each for each in train if each.active]
    inactive = [each for each in train if not each.active]
    n_clauses = MOST_CLAUSES
    if min(len(active), len(inactive)) >= _FEW:
        fit = [e for part in (active, inactive) for i, e in enumerate(part) if i % 4 != 3]
        held = [e for part in (active, inactive) for i, e in enumerate(part) if i % 4 == 3]
        n_clauses = _best_length(_Search(fit).clauses(MOST_CLAUSES), held)
    return Rule(_merged(_Search(train).clauses(n_clauses)))


def active_tokens(examples: Sequence[LabelledExample], share: float = ACTIVE_SHARE) -> Mask:
    """``[t]``: the tokens where the unit counts as active, text after text."""
    parts = []
    for each in examples:
        activations = each.example.activations
        parts.append(activations > share * max(float(activations.max(initial=0)), 0.0))
    return np.concatenate(parts) if parts else np.empty(0, bool)


def _best_length(clauses: Sequence[tuple[Test, ...]], held: Sequence[LabelledExample]) -> int:
    """How many of the clauses are best on texts that were held back; of equals, the most."""
    tokens, of = Tokens(held), np.array([each.active for each in held])
    fires, best = np.zeros(len(held), bool), (-1.0, 1)
    for number, clause in enumerate(clauses, 1):
        fires |= tokens.any(Rule((clause,)).holds(tokens))
        value = float(fires[of].mean() + (~fires[~of]).mean())
        best = max(best, (value, number))
    return best[1]


def _merged(clauses: Iterable[tuple[Test, ...]]) -> tuple[tuple[Test, ...], ...]:
    """Clauses that differ in the tokens of one test become one clause with the tokens of both."""
    found: list[tuple[Test, ...]] = []
    for clause in clauses:
        for place, other in enumerate(found):
            if (joined := _joined(other, clause)) is not None:
                found[place] = joined
                break
        else:
            found.append(clause)
    return tuple(found)


def _joined(one: tuple[Test, ...], other: tuple[Test, ...]) -> tuple[Test, ...] | None:
    if len(one) != len(other):
        return None
    differ = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if len(differ) != 1:
        return None
    a, b = one[differ[0]], other[differ[0]]
    if not (a.kind == b.kind == "in" and a.back == b.back):
        return None
    strings = tuple(dict.fromkeys(a.strings + b.strings))
    return (*one[: differ[0]], Test("in", strings, back=a.back), *one[differ[0] + 1 :])


class _Search:
    """The greedy search on some texts."""

    def __init__(self, examples: Sequence[LabelledExample]) -> None:
        self.tokens = Tokens(examples)
        self.of = np.array([each.active for each in examples])
        self.active = active_tokens(examples)
        self.n_active, self.n_inactive = int(self.of.sum()), int((~self.of).sum())

    def clauses(self, most: int) -> list[tuple[Test, ...]]:
        """The clauses, best first; at least one."""
        singles = self._singles()
        single = self._outcomes(singles.masks)
        pairs, of_pairs = self._pairs(singles, single)
        clauses = [*((test,) for test in singles.tests), *pairs]
        outcomes = single.joined(of_pairs)
        worth = _TIE * outcomes.fit - _PER_TEST * np.array([len(each) - 1 for each in clauses])
        found: list[tuple[Test, ...]] = []
        left, silent = np.ones(self.n_active, bool), np.ones(self.n_inactive, bool)
        while len(found) < most:
            hits = (outcomes.hits & left).sum(axis=1)
            alarms = (outcomes.alarms & silent).sum(axis=1)
            gain = (hits + worth) / self.n_active - alarms / max(self.n_inactive, 1)
            gain[hits == 0] = -np.inf
            best = int(gain.argmax())
            if found and gain[best] <= 1e-9:
                break
            found.append(clauses[best])
            left &= ~outcomes.hits[best]
            silent &= ~outcomes.alarms[best]
            if not left.any():
                break
        return found

    def _outcomes(self, masks: Mask) -> _Outcomes:
        on_active = masks & self.active
        n_active = max(int(self.active.sum()), 1)
        right = on_active.sum(axis=1)
        fit = (2 * right - masks.sum(axis=1)) / n_active
        return _Outcomes(
            self.tokens.any(on_active)[:, self.of],
            self.tokens.any(masks)[:, ~self.of],
            np.clip(fit, -1, 1),
        )

    def _singles(self) -> _Candidates:
        """Tests for what stands at active tokens and before them."""
        tokens = self.tokens
        tests: list[Test] = []
        masks: list[Mask] = []
        for back in (0, 1, 2):
            places = np.flatnonzero(self.active & (tokens.place >= back)) - back
            for number in _most_frequent(tokens.index[places]):
                tests.append(Test("in", (tokens.strings[number],), back=back))
                masks.append(tokens.before(tokens.index == number, back))
        own = np.unique(tokens.index[self.active]).tolist()
        for test in self._affixes([tokens.strings[number] for number in own]):
            tests.append(test)
            masks.append(tokens.where(test))
        more = [Test("is", (name,), back=back) for name in CLASSES for back in (0, 1)]
        more += [Test("position <", number=number) for number in _POSITIONS]
        tests += more
        masks += [tokens.where(test) for test in more]
        return _Candidates(tests, np.stack(masks))

    @staticmethod
    def _affixes(strings: list[str]) -> list[Test]:
        """Beginnings and ends that at least two of the active tokens have in common."""
        count: dict[Test, int] = {}
        for text in strings:
            # The space before a word is part of its beginning, as in “ un”.
            for size in _AFFIXES:
                if len(text) > size:
                    start = text[: size + (text[0] == " ")]
                    for test in (
                        Test("begins with", (start,)),
                        Test("ends with", (text[-size:],)),
                    ):
                        count[test] = count.get(test, 0) + 1
        common = [test for test, n in count.items() if n > 1]
        return sorted(common, key=lambda test: (-count[test], str(test)))[:_MOST_OF_A_KIND]

    def _pairs(
        self, singles: _Candidates, single: _Outcomes
    ) -> tuple[list[tuple[Test, ...]], list[_Outcomes]]:
        """The most promising tests, each with every other one but parts of words."""
        tests, masks = singles
        n_alarms = single.alarms.sum(axis=1)
        value = single.hits.sum(axis=1) / self.n_active - 0.5 * n_alarms / max(self.n_inactive, 1)
        # A test that has no false alarm gains nothing from another condition.
        value[n_alarms == 0] = -1
        bases = [i for i in np.argsort(-value, kind="stable")[:_BASES].tolist() if value[i] > 0]
        seconds = [i for i, each in enumerate(tests) if not each.kind.endswith("with")]
        least = 2 if self.n_active >= _FEW else 1
        pairs: list[tuple[Test, ...]] = []
        outcomes: list[_Outcomes] = []
        for base in bases:
            others = [i for i in seconds if i != base and not (i in bases and i < base)]
            found = self._outcomes(masks[others] & masks[base])
            useful = np.flatnonzero(found.hits.sum(axis=1) >= least)
            pairs += [_in_order(tests[base], tests[others[i]]) for i in useful.tolist()]
            outcomes.append(found.rows(useful))
        return pairs, outcomes


def _in_order(*tests: Test) -> tuple[Test, ...]:
    return tuple(sorted(tests, key=lambda test: (test.kind.startswith("position"), test.back)))


def _most_frequent(numbers: npt.NDArray[np.int64]) -> list[int]:
    different, count = np.unique(numbers, return_counts=True)
    order = np.argsort(-count, kind="stable")[:_MOST_OF_A_KIND]
    found: list[int] = different[order].tolist()
    return found
