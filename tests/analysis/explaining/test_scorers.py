"""Scorers against counts made by hand: oracles, constants, coins, replies that cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.explaining import metrics, scorers
from neuron_explainer.analysis.explaining.examples import LabelledExample
from neuron_explainer.analysis.explaining.explanation import (
    Cost,
    Failure,
    Floor,
    Prediction,
    as_dict,
    score_from,
)
from neuron_explainer.analysis.explaining.scorers import (
    JudgedBy,
    Text,
    against,
    detection,
    embedding,
    fuzzing,
    fuzzing_trials,
    simulation,
    with_competitors,
)
from neuron_explainer.errors import InputError
from tests.analysis.explaining.made import made_example, made_set

SET = made_set(20, 10, 10)


def oracle(texts: Sequence[Text]) -> list[Prediction]:
    return [0 in text.tokens for text in texts]


def constant(value: Prediction) -> Callable[[Sequence[Text]], list[Prediction]]:
    return lambda texts: [value] * len(texts)


def test_an_oracle_is_right_everywhere() -> None:
    score = detection(SET, lambda texts: [0.9 if 0 in t.tokens else 0.1 for t in texts])
    assert score.value == score.details["F1"] == score.details["AUC"] == 1
    assert score.by_quantile == (1.0,) * 5
    assert score.interval is not None
    assert score.interval[0] < 1
    assert score.counts is not None
    assert (score.counts.tp, score.counts.tn, score.counts.judged) == (20, 20, 40)
    assert score.details["balanced accuracy, hard"] == 1


def test_a_constant_is_worth_a_half() -> None:
    yes, no = detection(SET, constant(True)), detection(SET, constant(False))
    assert yes.value == no.value == 0.5
    assert yes.details["recall"] == 1
    assert yes.details["F1"] == pytest.approx(2 / 3)
    assert no.details["F1"] == 0
    assert no.details["precision"] is None
    assert no.by_quantile == (0.0,) * 5


def test_a_coin_is_worth_a_half_and_ten_percent_of_errors_cost_ten_percent() -> None:
    many = made_set(1000, 500, 500, n_tokens=4)
    random = np.random.default_rng(0)
    coin = detection(many, lambda texts: (random.random(len(texts)) < 0.5).tolist())
    assert coin.value == pytest.approx(0.5, abs=0.035)
    flipped = random.random(2000) < 0.1
    wrong = detection(
        many, lambda texts: [bool(a) ^ bool(f) for a, f in zip(oracle(texts), flipped, strict=True)]
    )
    assert wrong.value == pytest.approx(0.9, abs=0.03)


def test_counts_against_brute_force() -> None:
    random = np.random.default_rng(1)
    kinds = [True, False, 0.2, 0.8, 0.5, None]
    given: list[Any] = [kinds[i] for i in random.integers(len(kinds), size=len(SET.test))]
    given[3], given[5] = Failure("failed", "timeout"), Failure("unparsable", "no JSON")
    score = detection(SET, lambda texts: given)
    tally = dict.fromkeys(("tp", "fp", "tn", "fn", "failed", "unparsable"), 0)
    for each, said in zip(SET.test, given, strict=True):
        if isinstance(said, Failure):
            tally[said.kind] += 1
        elif said is None:
            tally["unparsable"] += 1
        else:
            guess = said is True or (said is not False and said > 0.5)
            tally[("t" if guess == each.active else "f") + ("p" if guess else "n")] += 1
    assert score.counts is not None
    assert as_dict(score.counts) == tally
    assert score.value == metrics.balanced_accuracy(score.counts)
    assert score_from(as_dict(score)) == score


def test_unread_replies_are_no_answer_and_widen_the_interval() -> None:
    whole = detection(SET, oracle)

    def often_mute(texts: Sequence[Text]) -> list[Prediction]:
        return [None if i % 5 == 0 else p for i, p in enumerate(oracle(texts))]

    some = detection(SET, often_mute)
    assert some.value == whole.value == 1
    assert some.counts is not None
    assert (some.counts.unparsable, some.counts.judged) == (8, 32)
    assert some.interval is not None
    assert whole.interval is not None
    assert some.interval[0] < whole.interval[0]
    nothing = detection(SET, constant(None))
    assert (nothing.value, nothing.interval, nothing.smallest_difference) == (None, None, None)


@pytest.mark.parametrize("wrong", [2.0, -0.1, float("nan"), float("inf")])
def test_what_is_no_probability_cannot_be_read(wrong: float) -> None:
    score = detection(SET, constant(wrong))
    assert score.counts is not None
    assert score.counts.unparsable == 40


def test_a_wrong_number_of_predictions_is_an_error() -> None:
    with pytest.raises(InputError, match="detection: expected 40 predictions, found 1"):
        detection(SET, lambda texts: [True])
    with pytest.raises(InputError, match="simulation: expected 40 predictions, found 0"):
        simulation(SET, lambda texts: [])


# ---- fuzzing ---------------------------------------------------------------------------------------


def test_marks_are_where_the_unit_is_active_and_as_many_elsewhere() -> None:
    trials = fuzzing_trials(SET)
    assert [t.text.id for t in trials] == list(SET.ids("test"))
    for trial in trials:
        values = trial.text.example.example.activations
        if trial.active:
            assert trial.text.marked == tuple(np.flatnonzero(values > 0.3 * values.max()).tolist())
        else:
            assert len(trial.text.marked) == 1
    assert [t.text.marked for t in fuzzing_trials(SET)] == [t.text.marked for t in trials]


def test_marks_are_above_a_share_of_the_largest_value_of_their_text() -> None:
    weak = made_example([0, 1, 2, 3, 4], [0.1, 0.0, 1.0, 0.31, 0.29], 0)
    strong = made_example([0, 1, 2, 3, 4], [0.0, 9.0, 2.5, 3.0, 0.0], 10)
    silent = made_example([5, 6, 7, 8, 9], [0.0] * 5, 20)
    test = (
        LabelledExample(weak, "active", 1),
        LabelledExample(silent, "random", -1),
        LabelledExample(strong, "active", 0),
    )
    few = replace(SET, test=test)
    marked = {t.text.id: t.text.marked for t in fuzzing_trials(few)}
    assert (marked[0], marked[10]) == ((2, 3), (1, 3))
    assert len(marked[20]) == 2
    assert fuzzing_trials(few, threshold=0.5)[0].text.marked == (2,)


def test_active_texts_with_wrong_marks_take_the_place_of_inactive_ones() -> None:
    trials = fuzzing_trials(SET, wrong=0.25)
    wrong = [t for t in trials if t.source == "marked wrong"]
    assert len(wrong) == 5
    assert len(trials) == 35
    for trial in wrong:
        values = trial.text.example.example.activations
        assert trial.text.example.active
        assert not trial.active
        assert not values[list(trial.text.marked)].any()
    assert len({t.text.id for t in trials}) == len(trials)


def test_fuzzing_asks_about_marks() -> None:
    def looks_at_marks(texts: Sequence[Text]) -> list[Prediction]:
        return [0 in t.tokens[list(t.marked)] for t in texts]

    assert fuzzing(SET, looks_at_marks, wrong=0.25).value == 1
    blind = fuzzing(SET, oracle, wrong=0.25)
    assert blind.details["balanced accuracy, marked wrong"] == 0.5


# ---- floors and differences ------------------------------------------------------------------------


def test_floors_are_added_and_the_difference_is_paired() -> None:
    score, weak = detection(SET, oracle), detection(SET, constant(True))
    found = with_competitors(against(score, weak, "token set"), "other latent", [0.5, 0.7, None])
    assert found.floors[:2] == (Floor("chance", 0.5), Floor("token set", 0.5))
    assert found.floors[2].value == pytest.approx(0.6)
    assert found.floors[2].spread == pytest.approx(0.1414, abs=1e-4)
    assert (found.floors[2].name, found.floors[2].n) == ("other latent", 2)
    value, low, high = found.details["difference from token set"]
    assert value == 0.5
    assert low > 0.4
    assert high <= 0.5
    same = against(score, score, "itself")
    assert same.details["difference from itself"] == [0, 0, 0]
    assert same.smallest_difference is not None
    assert score.smallest_difference is not None
    assert 0 < same.smallest_difference < score.smallest_difference


def test_who_judged_is_recorded() -> None:
    score = detection(SET, oracle, JudgedBy("some-model", "abc", Cost(4, 100, 10)))
    assert (score.judge, score.prompt_hash, score.cost.requests) == ("some-model", "abc", 4)


# ---- simulation ------------------------------------------------------------------------------------


def truth(texts: Sequence[Text]) -> list[Any]:
    return [t.example.example.activations for t in texts]


def test_the_true_values_correlate_perfectly_and_a_shuffle_does_not() -> None:
    many = made_set(60, 60, n_tokens=20)
    score = simulation(many, truth)
    assert score.value == pytest.approx(1)
    assert score.by_quantile == pytest.approx((1,) * 5)
    assert score.details["uncentred R²"] == score.details["1 - absolute error"] == 1
    tens = simulation(many, lambda texts: [np.floor(10 * x / 10.0) for x in truth(texts)])
    assert tens.value is not None
    assert tens.value >= 0.99
    random = np.random.default_rng(0)
    flat = random.permutation(
        np.concatenate(truth([t.text for t in scorers.detection_trials(many)]))
    )
    shuffled = simulation(many, lambda texts: list(flat.reshape(len(texts), -1)))
    assert shuffled.value is not None
    assert abs(shuffled.value) < 0.1
    assert shuffled.interval is not None
    assert shuffled.interval[0] < 0 < shuffled.interval[1]


def test_simulation_is_numpys_correlation_of_all_tokens() -> None:
    random = np.random.default_rng(2)
    values = [random.random(8) for _ in SET.test]
    score = simulation(SET, lambda texts: values)
    true = np.concatenate([e.example.activations for e in SET.test]).astype(float)
    assert score.value == pytest.approx(np.corrcoef(true, np.concatenate(values))[0, 1], abs=1e-12)
    within = [
        np.corrcoef(each.example.activations, v)[0, 1]
        for each, v in zip(SET.test, values, strict=True)
        if each.active
    ]
    assert score.details["mean r within texts"] == pytest.approx(np.mean(within))
    p = np.concatenate(values)
    assert score.details["uncentred R²"] == pytest.approx(
        1 - ((true - p) ** 2).mean() / (true**2).mean()
    )


def test_a_constant_has_no_correlation() -> None:
    score = simulation(SET, lambda texts: [np.ones(8) for _ in texts])
    assert (score.value, score.interval) == (None, None)
    assert score.details["mean r within texts"] is None


def test_values_that_do_not_fit_are_unparsable() -> None:
    def partly(texts: Sequence[Text]) -> list[Any]:
        found: list[Any] = list(truth(texts))
        found[:4] = [None, [1.0], [float("nan")] * 8, Failure("failed", "timeout")]
        return found

    score = simulation(SET, partly)
    assert score.counts is not None
    assert (score.counts.unparsable, score.counts.failed) == (3, 1)
    assert score.value == pytest.approx(1)
    assert "expected 8 finite values, found 1" in [a.failure for a in score.answers][1]


# ---- embedding -------------------------------------------------------------------------------------


def test_embedding_is_the_auc_of_cosines() -> None:
    random = np.random.default_rng(3)
    vectors = random.normal(size=(41, 5))
    score = embedding("what it is", SET, lambda texts: vectors)
    cosines = [v @ vectors[0] / np.linalg.norm(v) / np.linalg.norm(vectors[0]) for v in vectors[1:]]
    sides = {
        which: [c for c, e in zip(cosines, SET.test, strict=True) if e.active == which]
        for which in (True, False)
    }
    assert score.value == pytest.approx(metrics.auc(sides[True], sides[False]))
    assert score.metric == "AUC"
    with pytest.raises(InputError, match="expected 41 vectors"):
        embedding("what it is", SET, lambda texts: vectors[:4])
