"""Explanations that no language model is needed for, and the predictions that they make.

tokens   the tokens at which the unit is most active: also the floor of every other explanation
rules    n-grams, parts of words, kinds of tokens and places, see :mod:`.rules`
logits   the output side: the tokens that the unit makes more and less likely (it needs the model)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from neuron_explainer.analysis.explaining.examples import ExampleSet, LabelledExample
from neuron_explainer.analysis.explaining.explanation import Explanation
from neuron_explainer.analysis.explaining.rule_search import active_tokens, find_rule
from neuron_explainer.analysis.explaining.rules import Rule, Tokens
from neuron_explainer.analysis.explaining.scorers import Text
from neuron_explainer.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from neuron_explainer.analysis.directions import Directions

METHODS = ("rules", "tokens", "logits")
"""What needs no language model to explain."""
MOST_TOKENS = 20
_LOGITS = 8  # tokens of each list

Explain = Callable[[ExampleSet], Explanation]


def explainer(method: str, directions: "Directions | None" = None) -> Explain:
    """The function that explains by a method.

    Args:
        method: one of :data:`METHODS`.
        directions: for "logits", the directions of the units.
    """
    if method == "rules":
        return by_rules
    if method == "tokens":
        return by_tokens
    if method != "logits":
        raise InputError(
            f"unknown method {method!r}.{did_you_mean(method, METHODS)} Known: {', '.join(METHODS)}."
        )
    if directions is None:
        raise InputError("the method 'logits' reads the model's unembedding; open the model.")
    known = directions
    return lambda examples: by_logits(examples, known)


def by_rules(examples: ExampleSet) -> Explanation:
    """The rule that fits the train examples best."""
    return _of_rule(examples, find_rule(examples.train), "rules")


def by_tokens(examples: ExampleSet) -> Explanation:
    """The tokens with the largest activations in the train examples."""
    return _of_rule(examples, Rule.of_tokens(token_set(examples.train)), "tokens")


def by_logits(examples: ExampleSet, directions: "Directions") -> Explanation:
    """The tokens that the unit raises and lowers: what it does, not where it is active."""
    found = directions.top_logits(examples.unit, _LOGITS)
    raised, lowered = ([each.text for each in part] for part in (found.top, found.bottom))
    text = f"raises {_quoted(raised)}; lowers {_quoted(lowered)}"
    payload = {
        "raises": [each.token for each in found.top],
        "lowers": [each.token for each in found.bottom],
    }
    return replace(_of_words(examples, text, "logits"), examples=(), payload=payload)


def _of_rule(examples: ExampleSet, rule: Rule, method: str) -> Explanation:
    return replace(_of_words(examples, rule.in_words(), method), payload={"rule": str(rule)})


def _of_words(examples: ExampleSet, text: str, method: str) -> Explanation:
    return Explanation(
        examples.subject,
        examples.unit,
        text,
        method,
        seed=examples.seed,
        examples=examples.ids("train"),
    )


def _quoted(strings: Sequence[str]) -> str:
    return ", ".join(f"“{text}”" for text in strings)


def token_set(train: Sequence[LabelledExample], most: int = MOST_TOKENS) -> tuple[str, ...]:
    """The tokens with the largest sums of activations, as many of them as tell the train texts apart best.

    Args:
        train: texts of both kinds.
        most: how many tokens, at most.
    """
    tokens, active = Tokens(train), active_tokens(train)
    values = np.concatenate([each.example.activations for each in train])
    sums = np.bincount(
        tokens.index[active], values[active].astype(np.float64), minlength=len(tokens.strings)
    )
    order = [i for i in np.argsort(-sums, kind="stable")[:most].tolist() if sums[i] > 0]
    of = np.array([each.active for each in train])
    fires, best = np.zeros(len(train), bool), (-1.0, 0)
    for number, token in enumerate(order, 1):
        fires |= tokens.any(tokens.index == token)
        value = float(fires[of].mean() + (~fires[~of]).mean())
        if value > best[0]:
            best = value, number
    return tuple(tokens.strings[token] for token in order[: best[1]])


# --- predictions ---


def rule_of(explanation: Explanation) -> Rule | None:
    """The rule of an explanation; None if it has none."""
    text = explanation.payload.get("rule")
    return Rule.parse(text) if isinstance(text, str) else None


@lru_cache(maxsize=16)
def _tokens_of(examples: tuple[LabelledExample, ...]) -> Tokens:
    """The tokens of some texts; several rules are applied to the same ones."""
    return Tokens(examples)


class Predictor:
    """What a rule says about texts.

    Args:
        rule: the rule.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def texts(self, texts: Sequence[Text]) -> list[bool]:
        """Of each text, whether the rule is true somewhere in it."""
        tokens = _tokens_of(tuple(text.example for text in texts))
        return [bool(each) for each in tokens.any(self.rule.holds(tokens))]

    def marks(self, texts: Sequence[Text]) -> list[bool]:
        """Of each text, whether the rule is true at one of the marked tokens."""
        return [
            bool(where[list(text.marked)].any())
            for text, where in zip(texts, self.values(texts), strict=True)
        ]

    def values(
        self, texts: Sequence[Text]
    ) -> list["np.ndarray[tuple[int, ...], np.dtype[np.bool_]]"]:
        """Of each text, at which of its tokens the rule is true."""
        tokens = _tokens_of(tuple(text.example for text in texts))
        return tokens.split(self.rule.holds(tokens))
