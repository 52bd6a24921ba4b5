"""Explanations and scores as JSON."""

import json

import pytest

from neuron_explainer.analysis.explaining.explanation import (
    Answer,
    Cost,
    Counts,
    Explanation,
    Floor,
    Score,
    as_dict,
    explanation_from,
    score_from,
)
from neuron_explainer.errors import InputError

EXPLANATION = Explanation(
    "abc",
    7,
    "the word “king”\x1b",
    "rules",
    seed=3,
    examples=(5, 9),
    payload={"rule": 'token in {"a"}'},
)
SCORE = Score(
    "detection",
    "balanced accuracy",
    0.75,
    (0.6, 0.9),
    (Floor("chance", 0.5), Floor("token set", 0.7, 3, 0.1)),
    0.2,
    Counts(3, 1, 3, 1, 1, 2),
    (1.0, None, 0.5),
    {"AUC": 0.8},
    answers=(Answer(5, "hard", -1, None, failure="no reply"), Answer(9, "active", 0, True, 0.9)),
    cost=Cost(2, 300, 20, 0.01),
)


def test_both_survive_json() -> None:
    assert explanation_from(json.loads(json.dumps(as_dict(EXPLANATION)))) == EXPLANATION
    assert score_from(json.loads(json.dumps(as_dict(SCORE)))) == SCORE


def test_the_key_is_that_of_all_but_the_cost() -> None:
    values = as_dict(EXPLANATION)
    paid = explanation_from(values | {"cost": {"requests": 4}})
    assert paid.key == EXPLANATION.key
    for name, other in {"text": "x", "seed": 4, "examples": [5], "payload": {}, "unit": 8}.items():
        assert explanation_from(values | {name: other}).key != EXPLANATION.key, name


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"explanation: unit: expected .*, found 'x'"):
        explanation_from(as_dict(EXPLANATION) | {"unit": "x"})
    with pytest.raises(InputError, match=r"score: .*counts: tp: expected"):
        score_from(as_dict(SCORE) | {"counts": {"tp": 1.5}})


def test_the_floor_is_the_highest_one() -> None:
    assert SCORE.floor == SCORE.floors[1]
    assert Score("x", "y", None).floor is None


def test_costs_add_up_and_judged_leaves_failures_out() -> None:
    assert Cost(1, 2, 3, 0.5) + Cost(1, 1, 1, 0.25) == Cost(2, 3, 4, 0.75)
    assert SCORE.counts is not None
    assert SCORE.counts.judged == 8
