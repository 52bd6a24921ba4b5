"""SAEBench's result files are written by its schema and read back; what is no such file is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neuron_explainer.cli import main
from neuron_explainer.errors import CheckpointError
from neuron_explainer.evaluation import Evaluation, measure
from neuron_explainer.evaluation.saebench_json import (
    CORE,
    DETAILS,
    read_saebench,
    saebench_core,
    saebench_problems,
    write_saebench,
)
from neuron_explainer.models.autoencoder import Autoencoder, TopK


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    found = Autoencoder(24, 8, TopK(3), location="1/mlp.post_act").requires_grad_(False)
    found.decoder.weight[:, 5] = 0
    found.encoder.weight[5] = 0
    found.latent_bias[5] = -100
    return found


@pytest.fixture(scope="module")
def evaluation(autoencoder: Autoencoder) -> Evaluation:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    return measure(autoencoder, [x], compat="saelens_legacy")


@pytest.fixture
def content(evaluation: Evaluation, autoencoder: Autoencoder) -> dict[str, Any]:
    return saebench_core(evaluation, autoencoder)


def test_a_file_has_all_fields_and_no_others(content: dict[str, Any]) -> None:
    assert saebench_problems(content) == []
    # The schema's own list, written down here once more.
    assert set(content) == {
        "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics",
        "eval_result_details", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id",
        "sae_lens_version", "sae_cfg_dict", "eval_result_unstructured",
    }  # fmt: skip
    assert {category: tuple(m) for category, m in content["eval_result_metrics"].items()} == CORE
    assert len(content["eval_result_details"]) == 24
    assert all(tuple(each) == DETAILS for each in content["eval_result_details"])
    assert list(content["eval_result_unstructured"]) == ["neuron_explainer"]


def test_figures_stand_under_their_names(
    content: dict[str, Any], evaluation: Evaluation, autoencoder: Autoencoder
) -> None:
    found = content["eval_result_metrics"]
    assert found["sparsity"] == {"l0": evaluation.l0, "l1": evaluation.l1}
    assert found["reconstruction_quality"]["explained_variance"] == evaluation.explained_variance
    legacy = evaluation.compat["saelens_legacy"]["explained_variance_legacy"]
    assert found["reconstruction_quality"]["explained_variance_legacy"] == legacy
    assert found["model_performance_preservation"]["ce_loss_score"] == -1
    frequency = evaluation.frequency
    often = frequency > 0.1
    misc = found["misc_metrics"]
    assert misc["freq_over_10_percent"] == pytest.approx(float(often.float().mean()))
    share = float(frequency[often].sum() / frequency.sum())
    assert misc["normalized_freq_over_10_percent"] == pytest.approx(share)
    assert misc["frac_alive"] == pytest.approx(1 - evaluation.dead_share)
    rows = F.normalize(autoencoder.directions, dim=1)
    cosine = (rows @ rows.t()).fill_diagonal_(-2)[:, [i for i in range(24) if i != 5]].amax(1)
    details = content["eval_result_details"]
    for latent in range(24):
        one = details[latent]
        assert one["feature_density"] == pytest.approx(float(frequency[latent]))
        expected = -1 if latent == 5 else float(cosine[latent])
        assert one["max_decoder_cosine_sim"] == pytest.approx(expected, abs=1e-6)
        assert one["encoder_norm"] == pytest.approx(
            float(autoencoder.encoder.weight[latent].norm())
        )


def test_what_is_written_is_read_back(
    evaluation: Evaluation, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    path = tmp_path / "one_eval_results.json"
    settings, more = {"text": "books"}, {"seeds": [float("nan"), 1]}
    write_saebench(path, evaluation, autoencoder, name="one", settings=settings, more=more)
    found = read_saebench(path)
    assert (found.eval_type, found.autoencoder, found.config) == ("core", "one", settings)
    assert found.metrics["sparsity"]["l0"] == evaluation.l0
    assert found.metrics["model_performance_preservation"]["ce_loss_score"] is None
    assert "model_performance_preservation/ce_loss_score" not in found.figures()
    assert found.figures()["reconstruction_quality/mse"] == evaluation.mse
    assert found.autoencoder_config["d_sae"] == 24
    ours = found.unstructured["neuron_explainer"]
    assert ours["seeds"] == [None, 1]
    assert ours["evaluation"]["fvu"] == evaluation.fvu


def test_results_of_other_evaluations_are_read(tmp_path: Path, content: dict[str, Any]) -> None:
    content |= {
        "eval_type_id": "sparse_probing",
        "eval_result_metrics": {"sae": {"sae_test_accuracy": 0.9, "sae_top_1_test_accuracy": None}},
        "sae_lens_version": None,
    }
    del content["eval_result_details"]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    found = read_saebench(path)
    assert found.figures() == {"sae/sae_test_accuracy": 0.9}
    assert found.details == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_id": None}, "eval_id must be text, found null"),
        ({"more": 1}, "unexpected 'more'"),
        ({"eval_result_metrics": {}}, "the core category sparsity is missing"),
        ({"eval_type_id": "x", "eval_result_metrics": {"a": 1}}, "a must be an object of numbers"),
        ({"eval_type_id": "x", "eval_result_metrics": {"a": {"b": "1"}}}, "a/b must be a number"),
        ({"eval_type_id": "x", "eval_result_metrics": {"a": {"b": True}}}, "a/b must be a number"),
        ({"eval_result_metrics": []}, "eval_result_metrics must be an object, found a list"),
    ],
)
def test_what_is_no_result_is_refused(
    content: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=message):
        read_saebench(path)
    del content["datetime_epoch_millis"]
    assert "datetime_epoch_millis is missing" in saebench_problems(content)


def test_evaluate_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The king gave his daughter a golden ring. " * 40)
    place, out = "1/resid.torso.delta_mlp", tmp_path / "results"
    argv = ["evaluate", "ae-resid-delta-mlp", "--location", place, "--text", str(text)]
    assert main([*argv, "--saebench", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    (path,) = out.iterdir()
    assert path.name == "1.resid.torso.delta_mlp_eval_results.json"
    found = read_saebench(path).figures()
    assert found["sparsity/l0"] == pytest.approx(16)
    assert found["model_performance_preservation/ce_loss_score"] > 0
    assert found["shrinkage/l2_norm_in"] > 0
