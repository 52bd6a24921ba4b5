"""OpenAI's records and explanations: read as its own classes wrote them, written, and made stores."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_explainer import files
from neuron_explainer.analysis.interchange import collated_sets
from neuron_explainer.analysis.interchange.collated_sets import (
    PUBLISHED,
    PublishedSet,
    import_records,
    write_records,
)
from neuron_explainer.analysis.interchange.neuron_records import (
    ActivationRecord,
    AttentionSimulationResults,
    NeuronId,
    NeuronRecord,
    activations_of,
    dumps_record,
    read_explanations,
    read_neuron_record,
    write_neuron_record,
)
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.cli import main
from neuron_explainer.errors import CheckpointError, InputError, NeuronExplainerError, SourceError
from tests.blob_server import BlobServer

PEER = Path(__file__).parents[1] / "fixtures" / "peers" / "neuron-records"


def imported(*args: Any, **settings: Any) -> list[ExampleStore]:
    return [ExampleStore(path) for path in import_records(*args, **settings)]


def stored(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
    return path


def example(tokens=("a", "b"), activations=(0.5, 0.0)):
    return {"tokens": list(tokens), "activations": list(activations)}


def record(unit=0, layer=0, **more):
    top = [example()]
    identity = {"neuron_index": unit, "layer_index": layer}
    return {"neuron_id": identity, "most_positive_activation_records": top} | more


def test_what_openai_wrote_is_read_and_written_again_with_equal_fields(tmp_path):
    paths = sorted(PEER.glob("[01]/*.json"))
    assert len(paths) == 6
    for path in paths:
        found = read_neuron_record(path)
        written = json.loads(dumps_record(found))
        assert written == json.loads(path.read_text("utf-8"))  # the names of classes as well
        again = read_neuron_record(write_neuron_record(found, tmp_path))
        assert dumps_record(again) == dumps_record(found)


def test_numbers_that_are_not_known_are_none():
    assert read_neuron_record(PEER / "0" / "2.json").mean is None
    assert (read_neuron_record(PEER / "0" / "0.json").variance or 0) > 1


def test_earlier_names_and_files_without_class_names(tmp_path):
    old = record(mean=0.5) | {"neuron_id": {"idx": 7, "layer": "3"}}
    text = json.dumps(old).replace("0.5,", "NaN,")
    path = tmp_path / "7.json"
    path.write_text(text, "utf-8")
    found = read_neuron_record(path)
    assert found.neuron_id == NeuronId(7, 3)
    assert math.isnan(found.most_positive_activation_records[0].activations[0])
    with pytest.raises(CheckpointError, match=r"7\.json: expected finite activations, found nan"):
        import_records(path, tmp_path / "out")


def test_nan_among_the_moments_is_read(tmp_path):
    path = tmp_path / "0.json"
    path.write_text(json.dumps(record(mean=math.nan, kurtosis=math.inf)), "utf-8")
    found = read_neuron_record(path)
    assert math.isnan(found.mean or 0)
    assert json.loads(dumps_record(found))["mean"] is None


def test_explanations_of_openai():
    (found,) = read_explanations(PEER / "explanations" / "0" / "1.jsonl")
    assert [each.explanation for each in found.scored_explanations] == [
        "royal titles",
        "words for kings",
    ]
    assert [each.score for each in found.scored_explanations] == [0.25, 0.5]


def test_explanations_with_the_names_of_all_versions(tmp_path):
    simulation = {
        "tokens": ["a"], "expected_activations": [1], "unit": "neuron_activations", "response": {},
        "distribution_values": [[0]], "distribution_probabilities": [[1.0]],
    }  # fmt: skip
    sequence = {
        "simulation": simulation,
        "true_activations": [1.0],
        "ev_correlation_score": math.nan,
    }
    scored = {
        "explanation_or_baseline": "kings",
        "scored_simulation": {
            "scored_sequence_simulations": [sequence],
            "ev_correlation_score": 0.5,
        },
        "dataclass_name": "ScoredExplanationOrBaseline",
    }
    line = {"neuron_id": {"idx": 1, "layer": 2}, "scored_explanation_or_baseline_list": [scored]}
    (found,) = read_explanations(stored(tmp_path / "1.jsonl", line))
    assert found.neuron_id == NeuronId(1, 2)
    assert found.scored_explanations[0].explanation == "kings"
    head = {
        "attention_id": {"neuron_index": 3, "layer_index": 4},
        "scored_explanations": [
            {
                "explanation": "looks at names",
                "scored_attention_simulation": {
                    "attention_simulations": [
                        {
                            "tokens": ["a", "b"],
                            "token_pair_coords": [1, 0],
                            "token_pair_label": 1,
                            "simulation_prediction": 0.75,
                        }
                    ],
                    "roc_auc_score": 0.9,
                },
            }
        ],
    }
    (found,) = read_explanations(stored(tmp_path / "3.jsonl", head))
    assert isinstance(found, AttentionSimulationResults)
    assert found.neuron_id == NeuronId(3, 4)
    assert found.scored_explanations[0].score == 0.9


def test_a_tuple_is_refused_when_written(tmp_path):
    wrong = NeuronRecord(NeuronId(0, 0), most_positive_activation_records=[])
    wrong.quantile_boundaries = (0.5, 0.9)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"quantile_boundaries: .*Tuples"):
        write_neuron_record(wrong, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_pairs_that_are_cut_become_the_whole_triangle():
    # Four tokens, of which the last two look at the first two only.
    found, pairs = activations_of([1, 2, 3, 4, 5, 6, 7], 4, "here")
    assert pairs
    triangle = np.zeros((4, 4))
    triangle[np.tril_indices(4)] = found
    assert triangle.tolist() == [[1, 0, 0, 0], [2, 3, 0, 0], [4, 5, 0, 0], [6, 7, 0, 0]]
    assert activations_of([1, 2, 3], 2, "here")[0].tolist() == [1, 2, 3]
    for wrong in (3, 5, 11):
        with pytest.raises(CheckpointError, match="each pair of them"):
            activations_of([0.0] * wrong, 4, "here")


def test_a_folder_of_records_becomes_stores(tmp_path):
    stores = imported(
        PEER, tmp_path / "out", location="mlp.post_act", explanations=PEER / "explanations"
    )
    assert [store.name for store in stores] == ["0.mlp.post_act", "1.mlp.post_act"]
    store, source = stores[0], json.loads((PEER / "0" / "1.json").read_text("utf-8"))
    page = store[1]
    top = source["most_positive_activation_records"]
    assert [[piece.decode() for piece in each.pieces] for each in page.top] == [
        each["tokens"] for each in top
    ]
    for mine, theirs in zip(page.top, top, strict=True):
        np.testing.assert_allclose(mine.activations, theirs["activations"], rtol=1e-3, atol=1e-6)
        assert mine.value == np.float32(max(theirs["activations"]))
    for name in ("mean", "variance", "skewness", "kurtosis"):
        assert getattr(page.statistics, f"{name}_all") == pytest.approx(source[name])
    assert [len(page.examples(group)) for group in ("uniform", "inactive", "stratum")] == [2, 1, 3]
    assert [each.interval for each in page.examples("stratum")] == [0, 0, 1]
    assert page.label == "words for kings"
    assert store.search("royal")[0].score == 0.25
    sample = [v for each in source["random_sample"] for v in each["activations"]]
    assert page.statistics.n_tokens == len(sample)
    assert page.statistics.count == sum(v > 0 for v in sample)
    store.verify()
    assert "king" in page.text()


def test_records_of_a_store_and_back(tmp_path):
    (store, other) = imported(PEER, tmp_path / "first")
    written = write_records(store, tmp_path / "set") + write_records(other, tmp_path / "set")
    assert len(written) == 6
    for path in written:
        source = json.loads((PEER / path.relative_to(tmp_path / "set")).read_text("utf-8"))
        found = json.loads(path.read_text("utf-8"))
        for name in ("most_positive_activation_records", "random_sample"):
            tokens = [each["tokens"] for each in found[name]]
            assert sorted(tokens) == sorted(each["tokens"] for each in source[name])
        assert found["quantile_boundaries"] == source["quantile_boundaries"]
        assert [[e["tokens"] for e in q] for q in found["random_sample_by_quantile"]] == [
            [e["tokens"] for e in q] for q in source["random_sample_by_quantile"]
        ]
    again = imported(tmp_path / "set", tmp_path / "second")
    for mine, theirs in zip(again, (store, other), strict=True):
        a, b = mine.collected(), theirs.collected()
        for column in ("unit", "group", "interval", "rank", "peak", "value", "activations"):
            np.testing.assert_array_equal(getattr(a.examples, column), getattr(b.examples, column))
        np.testing.assert_array_equal(a.statistics.histogram, b.statistics.histogram)
        np.testing.assert_allclose(a.statistics.all.m4, b.statistics.all.m4)


def test_heads_become_a_store_of_pairs(tmp_path):
    top = [example("abc", [0, 1, 2, 3, 4, 5]), example("abcd", [1, 2, 0, 0, 9, 0, 3])]
    folder = tmp_path / "set"
    stored(folder / "5" / "2.json", record(2, 5, most_positive_activation_records=top))
    (store,) = imported(folder, tmp_path / "out", location="attn.qk_probs")
    assert store.kind == "head"
    best = store[2].top[0]
    assert (best.value, best.query, best.key) == (9, 2, 1)
    (path,) = write_records(store, tmp_path / "again")
    assert read_neuron_record(path).most_positive_activation_records[1].activations == [
        0, 1, 2, 3, 4, 5,
    ]  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(files.options, "backoff_seconds", 0.005)
    with BlobServer() as running:
        yield running


def test_a_published_set_is_read_through_the_cache_under_either_spelling(
    tmp_path, server, monkeypatch
):
    name = "a published set"
    url = f"{server.base}/neuron-explainer"
    known = PublishedSet(
        "latent", "resid.torso.delta_mlp", 12, 100, (f"{url}/gpt2_small/x", f"{url}/gpt2-small/x")
    )
    monkeypatch.setitem(collated_sets.PUBLISHED, name, known)
    for unit in (0, 4):
        content = json.dumps(record(unit, 3)).encode()
        server.put(f"/neuron-explainer/gpt2-small/x/3/{unit}.json", content)
    (store,) = imported(name, tmp_path / "out", layers=[3], units=[0, 4])
    assert (store.name, store.kind) == ("3.resid.torso.delta_mlp", "latent")
    assert store.alive.tolist() == [0, 4]
    with pytest.raises(SourceError, match=r"3/5\.json of a published set cannot be had:\n- .*\n- "):
        import_records(name, tmp_path / "other", layers=[3], units=[5])
    with pytest.raises(InputError, match="there is no unit 100: there are 0 to 99"):
        import_records(name, tmp_path / "other", layers=[3], units=[0, 100])
    with pytest.raises(InputError, match="--units 0-99"):
        import_records(name, tmp_path / "other", layers=[3])


def test_published_sets_have_both_spellings():
    assert len(PUBLISHED) == 9
    folders = PUBLISHED["gpt2-small_ae-mlp-post-act-v1"].folders
    assert {each.split("/")[4] for each in folders} == {"gpt2_small", "gpt2-small"}
    assert any("mlp_post_act/" in each for each in folders)
    for known in PUBLISHED.values():
        assert all(files.is_remote(each) for each in known.folders)


DAMAGED: dict[str, Any] = {
    "truncated": '{"neuron_id": {"neuron_index": 0, "layer',
    "empty": "",
    "a list": "[]",
    "no id": json.dumps({"mean": 1.0}),
    "unknown field": json.dumps(record(extra=1)),
    "text for a number": json.dumps(record(mean="x")),
    "huge integer": json.dumps(record()).replace(
        '"neuron_index": 0', '"neuron_index": ' + "9" * 30
    ),
    "digits without end": json.dumps(record()).replace("0.5", "9" * 9000),
    "negative unit": json.dumps(record(-1)),
    "huge number": json.dumps(record(most_positive_activation_records=[example("ab", [1e300, 0])])),
    "other length": json.dumps(record(most_positive_activation_records=[example("abcd", [1, 2])])),
    "no tokens": json.dumps(record(most_positive_activation_records=[example("", [])])),
    "a number as token": json.dumps(record(random_sample=[example([1, 2], [1, 2])])),
    "NaN activation": json.dumps(record(random_sample=[example("ab", [1, math.nan])])),
    "another class": json.dumps(record(dataclass_name="ScoredExplanation")),
    "both names": json.dumps(record() | {"neuron_id": {"idx": 1, "neuron_index": 2, "layer": 0}}),
    "deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_is_one_error_that_names_the_file(name, tmp_path):
    content = DAMAGED[name]
    path = tmp_path / "0" / "0.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NeuronExplainerError, match=r"0\.json") as error:
        import_records(tmp_path, tmp_path / "out")
    assert len(str(error.value)) < 2000
    assert not list(tmp_path.glob("out/*"))


def test_hostile_strings_are_kept_and_shown_escaped(tmp_path):
    bad = ["\x1b[2J", "<script>alert(1)</script>", "\ud800", "\x00", "\u202e"]
    top = [example(bad, [1, 2, 3, 4, 5])]
    path = stored(tmp_path / "0" / "0.json", record(most_positive_activation_records=top))
    (store,) = imported(path, tmp_path / "out")
    page = store[0]
    assert [piece.decode() for piece in page.top[0].pieces] == [*bad[:2], "?", *bad[3:]]
    assert "\x1b" not in page.text()
    assert "<script>" not in page._repr_html_()
    assert write_records(store, tmp_path / "again")


def test_the_same_unit_twice_and_units_of_two_kinds(tmp_path):
    stored(tmp_path / "set" / "0" / "0.json", record(0))
    stored(tmp_path / "set" / "0" / "1.json", record(0))
    with pytest.raises(InputError, match=r"unit 0 of 0\.units stands there twice"):
        import_records(tmp_path / "set", tmp_path / "out")
    pairs = record(1, most_positive_activation_records=[example("ab", [1, 2, 3])])
    stored(tmp_path / "set" / "0" / "1.json", pairs)
    with pytest.raises(CheckpointError, match=r"1\.json: expected activations of tokens"):
        import_records(tmp_path / "set", tmp_path / "out")


def test_a_name_that_does_not_exist(tmp_path):
    with pytest.raises(SourceError, match="Did you mean 'gpt2-small'"):
        import_records("gpt2-smal", tmp_path)


def test_the_verb_makes_stores_and_says_how_to_look(tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["import-records", str(PEER), "--out", str(out), "--layers", "1", "--units", "0-1"])
        == 0
    )
    said = capsys.readouterr().out
    assert "2 neurons of 1/units" in said
    assert f"neuron-explainer inspect {out}" in said
    assert ExampleStore.open(out).alive.tolist() == [0, 1]
    assert main(["import-records", "gpt2-small", "--out", str(out)]) == 2
    assert "--layers 0-1 --units 0-99" in capsys.readouterr().err


def test_an_activation_record_is_a_plain_value():
    assert ActivationRecord([1.0], ["a"]) == ActivationRecord([1.0], ["a"])
