"""Many units: floors, resuming, interruptions, any number of workers, bad input; and the workspace."""

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.directions import Directions
from neuron_explainer.analysis.explaining import hashing, work
from neuron_explainer.analysis.explaining.examples import ExampleSet, SetConfig
from neuron_explainer.analysis.explaining.explanation import Explanation, Score
from neuron_explainer.analysis.explaining.methods import by_tokens, explainer
from neuron_explainer.analysis.explaining.reading import Reading
from neuron_explainer.analysis.explaining.scorers import embedding
from neuron_explainer.analysis.explaining.spending import StoppedError
from neuron_explainer.analysis.explaining.work import Step, explain_units, rule_scorer, score_units
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.workspace import WORKSPACE_FILE, Workspace
from neuron_explainer.errors import InputError
from tests.analysis.explaining.made import made_set
from tests.analysis.explaining.planted import N_PLANTED, Planted

UNITS = list(range(8))
CONFIG = SetConfig(train=10, test=10)


@pytest.fixture
def store(planted: Planted) -> Iterator[ExampleStore]:
    """The planted store, with a workspace that is empty."""
    with ExampleStore.open(planted.store.path) as opened:
        yield opened
    for path in planted.store.path.parent.glob(f"{WORKSPACE_FILE}*"):
        path.unlink()


def explained(store: ExampleStore, reading: Reading | None, **options: Any) -> list[Step]:
    return list(explain_units(store, UNITS, config=CONFIG, reading=reading, **options))


def scored(store: ExampleStore, reading: Reading | None, **options: Any) -> list[Step]:
    return list(score_units(store, UNITS, config=CONFIG, reading=reading, **options))


def values(steps: list[Step]) -> list[Any]:
    return [(s.unit, s.explanation, s.scores, s.error) for s in steps]


def test_planted_latents_beat_all_random_floors(
    store: ExampleStore, planted_reading: Reading
) -> None:
    explained(store, planted_reading)
    steps = scored(store, planted_reading)
    for step in steps[:N_PLANTED]:
        by_name = {score.name: score for score in step.scores}
        assert list(by_name) == list(work.RULE_SCORERS)
        found = by_name["detection"]
        assert found.value is not None
        assert found.value > 0.9
        floors = {floor.name: floor for floor in found.floors}
        assert list(floors) == ["chance", "token set", "other latent", "random autoencoder"]
        assert floors["other latent"].value < 0.7
        assert floors["other latent"].n == floors["random autoencoder"].n == 5
        assert found.smallest_difference is not None
        assert found.smallest_difference > 0
        assert found.interval is not None
        assert found.interval[0] <= found.value <= found.interval[1]


def test_equal_calls_do_nothing_twice(store: ExampleStore, planted_reading: Reading) -> None:
    first, again = explained(store, planted_reading), explained(store, planted_reading)
    assert not any(step.reused for step in first)
    assert all(step.reused for step in again)
    assert values(again) == values(first)
    once, twice = scored(store, planted_reading), scored(store, planted_reading)
    assert all(step.reused for step in twice)
    assert values(twice) == values(once)
    other = explained(store, planted_reading, seed=1)
    assert not any(step.reused for step in other)


def test_any_number_of_workers_gives_the_same(
    store: ExampleStore, planted_reading: Reading
) -> None:
    workers = 3
    one = explained(store, planted_reading, save=False)
    some = explained(store, planted_reading, save=False, workers=workers)
    assert values(one) == values(some)
    assert [step.number for step in some] == [1, 2, 3, 4, 5, 6, 7, 8]
    known = {s.unit: s.explanation for s in one if s.explanation is not None}
    a = scored(store, planted_reading, save=False, explanations=known)
    b = scored(store, planted_reading, save=False, explanations=known, workers=workers)
    assert values(a) == values(b)


def test_what_is_done_before_an_interruption_is_kept(
    store: ExampleStore, planted_reading: Reading
) -> None:
    calls: list[int] = []

    def explain(examples: ExampleSet) -> Explanation:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(examples.unit)
        return by_tokens(examples)

    with pytest.raises(KeyboardInterrupt):
        explained(store, planted_reading, method=explain, identity={"method": "mine"})
    assert store.workspace.explained_units() == calls == [0, 1, 2]
    steps = explain_units(
        store, UNITS, lambda e: by_tokens(e), config=CONFIG, reading=planted_reading,
        identity={"method": "mine"},
    )  # fmt: skip
    assert [step.reused for step in islice(steps, 5)] == [True, True, True, False, False]
    steps.close()  # type: ignore[attr-defined]  # it is a generator
    assert store.workspace.explained_units() == [0, 1, 2, 3, 4]


def test_another_identity_is_another_request(store: ExampleStore) -> None:
    threads: set[int] = set()

    def explain(examples: ExampleSet) -> Explanation:
        threads.add(threading.get_ident())
        return by_tokens(examples)

    for model in ("a", "b"):
        steps = explained(store, None, method=explain, identity={"model": model}, workers=3)
        assert not any(step.reused for step in steps)
    assert threads


def test_units_without_enough_texts_say_so(store: ExampleStore, planted: Planted) -> None:
    config = SetConfig(least=1000)
    steps = list(explain_units(store, [0, 1], config=config))
    assert all(step.explanation is None for step in steps)
    assert "at least 1000 are needed" in steps[0].error
    (step,) = score_units(store, [3])
    assert step.error == "there is no explanation of latent 3; explain it first."


def test_an_explanation_is_not_scored_on_texts_that_made_it(
    store: ExampleStore, planted_reading: Reading
) -> None:
    explained(store, planted_reading, seed=5)
    seen = {u: set(store.explanations(u)[0].explanation.examples) for u in UNITS}
    for step in scored(store, planted_reading, seed=6, scorers=["detection"]):
        answers = store.workspace.with_answers(store.explanations(step.unit)[0].explanation)
        ids = {each.id for each in answers[0].answers}
        assert ids
        assert not {i for i in ids for s in seen[step.unit] if abs(i - s) < 32}


def test_what_was_seen_may_be_as_long_as_the_texts_of_a_store_are() -> None:
    examples = made_set(2, 2, n_tokens=200)
    first = min(each.id for each in examples.test)
    # Made from a text of 200 tokens that ends inside the first one.
    explanation = Explanation("made", 7, "x", "rules", seed=9, examples=(first - 199,))
    left = work._without_seen(examples, explanation)
    assert {each.id for each in examples.test} - {each.id for each in left.test} == {first}


def test_without_a_model_there_is_no_random_autoencoder(store: ExampleStore) -> None:
    explained(store, None)
    for step in scored(store, None):
        for score in step.scores:
            assert "random autoencoder" not in [floor.name for floor in score.floors]
            assert score.details["expected mislabelled"] > 0


def test_functions_as_scorers_get_the_token_set_as_floor(
    store: ExampleStore, planted_reading: Reading
) -> None:
    asked: list[str] = []

    def judge(explanation: Explanation, examples: ExampleSet) -> Score | None:
        asked.append(explanation.text)
        score = rule_scorer("detection")(explanation, examples)
        return None if score is None else replace(score, name="judged", judge="m")

    explained(store, planted_reading)
    options: dict[str, Any] = {"scorers": {"judged": judge}, "identity": {"model": "m"}}
    steps = scored(store, planted_reading, **options)
    assert len(asked) == len(UNITS)
    for step in steps:
        assert [floor.name for floor in step.scores[0].floors] == ["chance", "token set"]
        assert "difference from token set" in step.scores[0].details
    assert all(step.reused for step in scored(store, planted_reading, **options))
    assert len(asked) == len(UNITS)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'detection'"):
        rule_scorer("detektion")
    with pytest.raises(InputError, match="Did you mean 'rules'"):
        explainer("rule")
    with pytest.raises(InputError, match="open the model"):
        explainer("logits")


def test_logits_say_what_the_latent_does(store: ExampleStore, planted: Planted) -> None:
    directions = Directions(planted.context, "2/mlp.post_act")
    (step,) = explain_units(store, [2], "logits", config=CONFIG, directions=directions)
    assert step.explanation is not None
    top = directions.top_logits(2, 8)
    assert step.explanation.payload["raises"] == [each.token for each in top.top]
    assert step.explanation.text.startswith(f"raises “{top.top[0].text}”, ")
    (found,) = score_units(store, [2], config=CONFIG)
    assert [score.name for score in found.scores] == ["embedding"]  # it has no rule


# ---- embedding -------------------------------------------------------------------------------------


def test_hashed_words_find_lexical_latents_and_no_others() -> None:
    for seed in range(3):
        examples = made_set(40, 40, seed=seed, n_tokens=6, trigger=5)
        words = ["the", "cat", "sat", "mat", "King"]
        aucs = {
            w: embedding(f"the token “ {w}”", examples, hashing.embed).value or 0.0 for w in words
        }
        assert aucs["mat"] > 0.8
        assert np.mean([aucs[w] for w in words if w != "mat"]) == pytest.approx(0.5, abs=0.1)


def test_vectors_have_length_one_whatever_the_text() -> None:
    texts = ["a cat", "", " ", "\udcff\x00", "x" * 50_000, "“”", "“a” “", "\ud800"]
    vectors = hashing.embed(texts)
    norms = np.linalg.norm(vectors, axis=1)
    assert np.isclose(norms, 1).tolist() == [True, False, False, True, True, False, True, True]
    np.testing.assert_array_equal(vectors[0], hashing.embed(["A CAT"])[0])
    assert hashing.embed([]).shape == (0, 512)


# ---- the workspace ---------------------------------------------------------------------------------


def test_explanations_are_labels_that_come_after_those_of_the_user(
    store: ExampleStore, planted_reading: Reading
) -> None:
    store.workspace.set_label(1, "my own words")
    explained(store, planted_reading)
    assert [label.source for label in store.labels(1)] == ["user", "rules"]
    assert store.labels(1)[1].text == store.explanations(1)[0].explanation.text
    assert store.labels(2)[0].source == "rules"
    word = store.explanations(2)[0].explanation.text.strip("“” ")
    assert 2 in [label.unit for label in store.search(word)]


def test_a_record_shows_explanations_and_scores_beside_their_floor(
    store: ExampleStore, planted_reading: Reading
) -> None:
    explained(store, planted_reading)
    scored(store, planted_reading)
    record = store[1]
    text = record.text()
    explanation = record.explanations[0].explanation
    assert text.count(explanation.text) == 1
    assert "detection 1.00 (" in text
    assert ", floor 1.00 (token set)" in text
    html = record.html()
    assert len(html.encode()) <= 60_000
    assert html.count("<h2>Explanations") == 1
    assert "token set</td>" in html
    assert explanation.text in record._repr_html_()


def test_hostile_explanations_are_shown_and_do_nothing(store: ExampleStore) -> None:
    text = "<script>alert(1)</script>\x1b[2J\u202e" + "x" * 2000
    hostile = Explanation(store.subject, 0, text, "<b>", payload={"rule": "not a rule"})
    store.workspace.save_explanations([(hostile, "r")])
    record = store[0]
    assert "<script>" not in record.html() + record._repr_html_()
    assert "\x1b" not in record.text()
    (step,) = score_units(store, [0], ["detection"], config=CONFIG)
    assert step.error.startswith("a rule")


def test_explanations_are_of_one_subject_and_its_units(store: ExampleStore) -> None:
    with pytest.raises(InputError, match="another subject"):
        store.workspace.save_explanations([(Explanation("x", 0, "t", "rules"), "r")])
    with pytest.raises(InputError, match="there is no unit 99"):
        store.workspace.save_explanations([(Explanation(store.subject, 99, "t", "rules"), "r")])


def test_a_workspace_of_an_earlier_version_gains_tables(tmp_path: Path) -> None:
    path = tmp_path / WORKSPACE_FILE
    old = Workspace(path, "s", 5)
    old.set_label(1, "kept")
    old.close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE explanations")
        connection.execute("DROP TABLE explanation_scores")
    connection.close()
    path.chmod(0o444)
    new = Workspace(path, "s", 5)
    assert new.explained(1) == []
    new.close()
    path.chmod(0o644)
    new = Workspace(path, "s", 5)
    assert [label.text for label in new.labels(1)] == ["kept"]
    new.save_explanations([(Explanation("s", 1, "t", "rules"), "r")])
    assert new.explanation_of(1, "r") == Explanation("s", 1, "t", "rules")
    assert new.explanation_of(1, "other") is None
    new.close()
    new.close()


def test_a_damaged_explanation_is_named(store: ExampleStore) -> None:
    store.workspace.save_explanations([(Explanation(store.subject, 0, "t", "rules"), "r")])
    with sqlite3.connect(store.workspace.path) as connection:
        connection.execute("UPDATE explanations SET content = '{'")
    connection.close()
    with pytest.raises(ValueError, match="damaged: an explanation is no JSON"):
        store.explanations(0)


def test_what_ends_the_work_stops_the_others_and_keeps_what_is_done(store: ExampleStore) -> None:
    called: list[bool] = []

    def explain(examples: ExampleSet) -> Explanation:
        if examples.unit == 5:
            raise StoppedError("enough is spent")
        return by_tokens(examples)

    for workers in (1, 3):
        steps = explain_units(
            store, UNITS, explain, config=CONFIG, workers=workers, stop=lambda: called.append(True)
        )
        with pytest.raises(StoppedError, match="enough"):
            list(steps)
        assert store.workspace.explained_units() == UNITS[:5]
    assert called == [True]  # of the workers; one by one, nobody waits
