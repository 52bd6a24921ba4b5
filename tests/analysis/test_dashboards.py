"""SAEDashboard's batches and Neuronpedia's rows: read as the peer wrote them, written, and made stores."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.interchange.dashboards import (
    ActivationRow,
    DashboardActivation,
    DashboardBatch,
    DashboardFeature,
    ExplanationRow,
    FeatureRow,
    NeuronpediaRows,
    dashboard_batch,
    dashboard_feature,
    import_dashboards,
    neuronpedia_rows,
    read_dashboards,
    read_neuronpedia,
    write_dashboard,
    write_neuronpedia,
)
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.cli import main
from neuron_explainer.errors import InputError, NeuronExplainerError, SourceError
from tests.analysis.examples import VOCABULARY, make_collected, make_corpus

PEER = Path(__file__).parents[1] / "fixtures" / "peers" / "sae-dashboard" / "batch-0.json"


def stored(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def imported(*args: Any, **settings: Any) -> list[ExampleStore]:
    return [ExampleStore(path) for path in import_dashboards(*args, **settings)]


def made_up_store(folder: Path, **settings: Any) -> ExampleStore:
    corpus = make_corpus()
    found = make_collected(corpus, **settings)
    histogram = np.zeros_like(found.statistics.histogram)
    count = found.statistics.active.count.astype(np.uint32)
    histogram[:, 70], histogram[:, 75] = count // 3, count - count // 3
    collected = replace(
        found,
        statistics=replace(found.statistics, histogram=histogram),
        location="6/resid.torso.post_mlp",
        name="6.resid.torso.post_mlp",
    )
    documents = [
        np.asarray(corpus.tokens[a:b])
        for a, b in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)
    ]
    words = [piece.decode(errors="replace") for piece in VOCABULARY[:5]] + ["x", "y", "z"]
    labels = [Label(1, "kings", "np_max-act", 0.5)]
    return ExampleStore.from_arrays(folder, collected, documents, words, labels=labels)


def test_a_batch_of_sae_dashboard_is_written_again_byte_for_byte(tmp_path):
    (batch,) = read_dashboards(PEER)
    assert [feature.feature_index for feature in batch.features] == [0, 1, 5]
    assert batch.source == "1-res-test"
    written = write_dashboard(batch, tmp_path / "batch-0.json")
    assert written.read_bytes() == PEER.read_bytes()


def test_fields_that_are_not_known_are_kept(tmp_path):
    source = json.loads(PEER.read_text("utf-8"))
    source["new"] = {"a": [1]}
    source["features"][0]["newer"] = "x"
    source["features"][0]["activations"][0]["newest"] = None
    source["features"][0]["activations"][0]["dfa_values"] = [0.5]
    path = stored(tmp_path / "batch-3.json", source)
    (batch,) = read_dashboards(tmp_path)
    assert json.loads(write_dashboard(batch, tmp_path / "b.json").read_text("utf-8")) == source
    assert path.exists()


def test_nan_is_read_and_written_as_null(tmp_path):
    feature = DashboardFeature(0, correlated_neurons_pearson=[math.nan, 0.5])
    batch = DashboardBatch("m", 0, "s", None, [feature])
    path = write_dashboard(batch, tmp_path / "batch-0.json")
    assert '"correlated_neurons_pearson": [null, 0.5]' in path.read_text("utf-8")
    assert "NaN" not in path.read_text("utf-8")
    (again,) = read_dashboards(path)
    assert math.isnan(again.features[0].correlated_neurons_pearson[0])


def test_a_batch_becomes_a_store(tmp_path):
    (store,) = imported(PEER, tmp_path / "out", location="resid.torso.post_mlp")
    (batch,) = read_dashboards(PEER)
    assert (store.name, store.location) == ("1-res-test", "1/resid.torso.post_mlp")
    for feature in batch.features:
        page = store[feature.feature_index]
        assert page.statistics.n_tokens == 32 * 12
        assert page.statistics.count == sum(feature.freq_hist_data_bar_heights)
        assert page.statistics.density == pytest.approx(feature.frac_nonzero, abs=1e-5)
        bars = zip(
            feature.freq_hist_data_bar_values, feature.freq_hist_data_bar_heights, strict=True
        )
        total = sum(value * height for value, height in bars)
        assert page.statistics.mean * page.statistics.count == pytest.approx(total)
        top = [each for each in feature.activations if each.bin_contains == -1]
        rest = [each for each in feature.activations if each.bin_contains != -1]
        assert sorted(["".join(each.tokens) for each in top]) == sorted(e.text for e in page.top)
        assert [e.value for e in page.top] == sorted((e.value for e in page.top), reverse=True)
        strata = page.examples("stratum")
        assert len(strata) == len(rest)
        limits = sorted({each.bin_max for each in rest}, reverse=True)
        for example in strata:
            assert any(
                example.text == "".join(each.tokens) and limits[example.interval] == each.bin_max
                for each in rest
            )
    store.verify()


def test_cards_of_a_store_and_back(tmp_path):
    store = made_up_store(tmp_path / "first", window=9)
    batch = dashboard_batch(store, model="gpt2-small")
    assert batch.source == "6-resid.torso.post_mlp"
    assert dashboard_batch([replace(store[1], name="ae/x")]).sae_set == "ae-x"
    path = write_dashboard(batch, tmp_path / "cards" / "batch-0.json")
    (again,) = imported(path.parent, tmp_path / "second", location="resid.torso.post_mlp")
    assert again.location == store.location
    for unit in store.alive.tolist():
        a, b = store[unit], again[unit]
        assert a.statistics.count == b.statistics.count
        assert a.statistics.density == pytest.approx(b.statistics.density, rel=0.01)
        np.testing.assert_array_equal(a.histogram, b.histogram)
        mine = [e for e in a.all_examples if e.group in ("top", "stratum")]
        for theirs in b.all_examples:
            assert any(
                e.group == theirs.group
                and e.pieces == theirs.pieces
                and np.array_equal(e.activations, theirs.activations)
                for e in mine
            )
        assert len(b.all_examples) == len(mine)
        assert sorted(e.value for e in a.top) == sorted(e.value for e in b.top)


def test_an_interval_has_the_share_of_tokens_in_it(tmp_path):
    store = made_up_store(tmp_path)
    page = store[1]
    feature = dashboard_feature(page)
    intervals = {(e.bin_min, e.bin_max): e.bin_contains for e in feature.activations}
    shares = [share for share in intervals.values() if share != -1]
    assert all(0 <= share <= page.statistics.density for share in shares)
    assert max(high for _, high in intervals) == page.statistics.max


def test_heads_have_no_card(tmp_path):
    store = made_up_store(tmp_path, kind="head", window=6)
    with pytest.raises(InputError, match="not of pairs"):
        dashboard_feature(store[1])


def rows() -> NeuronpediaRows:
    who: Any = {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "7"}
    values = [0.0, 2.5, 0.5]
    activation = ActivationRow(
        **who,
        tokens=[" a", " king", "\n"],
        values=values,
        maxValue=2.5,
        maxValueTokenIndex=1,
        minValue=0,
        binMin=-1,
        binMax=2.5,
        binContains=-1,
        qualifyingTokenIndex=1,
        more={"id": "c1", "creatorId": "x"},
    )
    binned = replace(activation, binMin=0, binMax=1.0, binContains=0.01, qualifyingTokenIndex=2)
    feature = FeatureRow(
        **who,
        maxActApprox=2.5,
        frac_nonzero=0.001,
        freq_hist_data_bar_values=[0.5, 2.5],
        freq_hist_data_bar_heights=[3, 1],
        pos_str=[" queen"],
        pos_values=[1.5],
        umap_x=0.5,
    )
    explanation = ExplanationRow(**who, description="royalty", typeName="oai_token-act-pair")
    return NeuronpediaRows([feature], [activation, binned], [explanation])


def test_rows_of_neuronpedia_are_written_and_read_with_all_fields(tmp_path):
    paths = write_neuronpedia(rows(), tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "features/batch-0.jsonl.gz",
        "activations/batch-0.jsonl.gz",
        "explanations/batch-0.jsonl.gz",
    ]
    assert read_neuronpedia(tmp_path) == rows()
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_neuronpedia(rows(), tmp_path)] == before
    with gzip.open(paths[1], "rt", encoding="utf-8") as file:
        row = json.loads(file.readline())
    assert row["id"] == "c1"
    assert row["qualifyingTokenIndex"] == 1


def test_an_export_of_neuronpedia_becomes_a_store(tmp_path, capsys):
    write_neuronpedia(rows(), tmp_path / "np")
    assert main(["import-records", str(tmp_path / "np"), "--out", str(tmp_path / "out")]) == 0
    assert "1 latents of 6/res-jb, 2 examples" in capsys.readouterr().out
    page = ExampleStore.open(tmp_path / "out")[7]
    assert page.label == "royalty"
    assert (page.statistics.count, page.statistics.n_tokens) == (4, 4000)
    assert page.top[0].value == 2.5
    assert page.examples("stratum")[0].value == 0.5  # at the token that is in the interval


def test_rows_of_a_store(tmp_path):
    store = made_up_store(tmp_path / "store")
    found = neuronpedia_rows(store, model="gpt2-small", name="mine")
    write_neuronpedia(found, tmp_path / "np")
    assert read_neuronpedia(tmp_path / "np") == found
    assert found.explanations[0].description == "kings"
    assert found.explanations[0].scoreV1 == 0.5
    assert {row.layer for row in found.activations} == {"6-mine"}
    (again,) = imported(tmp_path / "np", tmp_path / "again")
    assert again[1].label == "kings"
    np.testing.assert_array_equal(again[1].histogram, store[1].histogram)
    assert again[1].statistics.n_tokens == pytest.approx(store.n_tokens, rel=1e-6)


def change(path: str, value: Any) -> Callable[[Any], Any]:
    def changed(batch: Any) -> Any:
        target, *rest = path.split(".")
        place = batch
        for key in [target, *rest][:-1]:
            place = place[int(key) if key.isdecimal() else key]
        key = path.split(".")[-1]
        if value is KeyError:
            del place[key]
        else:
            place[key] = value
        return batch

    return changed


DAMAGED: dict[str, Callable[[Any], Any]] = {
    "truncated": lambda batch: json.dumps(batch)[:200],
    "a list": lambda batch: [],
    "no layer": change("layer", KeyError),
    "layer is a text": change("layer", "one"),
    "huge integer": change("features.0.feature_index", 10**30),
    "negative feature": change("features.0.feature_index", -1),
    "no tokens": change("features.0.activations.0.tokens", KeyError),
    "fewer tokens": change("features.0.activations.0.tokens", [" a"]),
    "a number as token": change("features.0.activations.0.tokens", [1] * 11),
    "infinite activation": change("features.0.activations.0.values", [math.inf] * 11),
    "bars without heights": change("features.0.freq_hist_data_bar_heights", []),
    "negative bars": lambda batch: change(
        "features.0.freq_hist_data_bar_heights",
        [-1] * len(batch["features"][0]["freq_hist_data_bar_values"]),
    )(batch),
    "negative tokens": change("features.0.n_prompts_total", -5),
    "too many tokens": change("features.0.n_prompts_total", 2**62),
    "a feature twice": change("features.1.feature_index", 0),
    "no features": change("features", []),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_batch_is_one_error_of_ours(name, tmp_path):
    value = DAMAGED[name](json.loads(PEER.read_text("utf-8")))
    path = stored(tmp_path / "batch-0.json", value)
    with pytest.raises(NeuronExplainerError) as error:
        import_dashboards(path, tmp_path / "out")
    assert 10 < len(str(error.value)) < 2000
    assert not list(tmp_path.glob("out/*.store"))


def test_damaged_exports(tmp_path):
    with pytest.raises(SourceError, match="holds no batches"):
        read_dashboards(tmp_path)
    with pytest.raises(SourceError, match="holds no export"):
        read_neuronpedia(tmp_path)
    paths = write_neuronpedia(rows(), tmp_path)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-20])
    with pytest.raises(NeuronExplainerError, match="not a whole gzip file"):
        read_neuronpedia(tmp_path)
    paths[1].write_bytes(b"no gzip")
    with pytest.raises(NeuronExplainerError, match="not a whole gzip file"):
        read_neuronpedia(tmp_path)
    paths[1].write_bytes(whole)
    for wrong in ("res-jb", "-1-x", "9" * 30 + "-x"):
        bad = rows()
        bad.features[0].layer = wrong
        write_neuronpedia(bad, tmp_path)
        with pytest.raises(NeuronExplainerError, match="name of a dictionary"):
            import_dashboards(tmp_path, tmp_path / "out")


def test_a_card_without_activations_and_hostile_strings(tmp_path):
    values = [1.0, 2.0, 3.0]
    bad = DashboardActivation(-1, 3, -1, ["\x1b[2J", "<script>", "\ud800"], values, 2)
    features = [DashboardFeature(0), DashboardFeature(3, activations=[bad])]
    path = write_dashboard(DashboardBatch("m", 0, "s", "x", features), tmp_path / "batch-0.json")
    (store,) = imported(path, tmp_path / "out")
    assert store.name == "0-s__x"
    assert "\x1b" not in store[3].text()
    assert "<script>" not in store[3]._repr_html_()
    assert not store[0].all_examples
