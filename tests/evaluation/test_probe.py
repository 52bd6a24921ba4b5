"""Probing an autoencoder on text: planted latents of rules are found, and the command prints its tables."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from neuron_explainer.activations.data_config import DataConfig, open_windows
from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.analysis.store_names import find_stores
from neuron_explainer.cli import main
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.concept_erasure import Subject, tpp
from neuron_explainer.evaluation.linear_probes import fit_probe
from neuron_explainer.evaluation.placed import placed_at
from neuron_explainer.evaluation.probe import encoded, labelled, normalized, probe
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import StandardModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.open_model import open_model
from neuron_explainer.models.transformer import Transformer

LOCATION = ActivationLocation.parse("0/resid.torso.post_mlp")
TEXT = 'The old man said, "Go home!" Then 9 ants ate an apple. Who saw all of it? I do not know at all. '


@pytest.fixture(scope="module")
def context(
    text_model: Transformer, tmp_path_factory: pytest.TempPathFactory
) -> StandardModelContext:
    folder = tmp_path_factory.mktemp("probe")
    text_model.save(folder / "model")
    return StandardModelContext(str(folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def batches(context: StandardModelContext) -> list[TokenBatch]:
    """Windows of 40 bytes; each is a document."""
    ids = torch.tensor(context.encode(TEXT * 60))
    rows = ids[: len(ids) // 40 * 40].view(-1, 40)
    document = torch.arange(len(rows))[:, None].expand_as(rows)
    position = torch.arange(40).expand_as(rows)
    return [
        TokenBatch(rows[i : i + 50], document[i : i + 50], position[i : i + 50])
        for i in range(0, len(rows), 50)
    ]


def test_a_latent_of_a_rule_is_found(
    context: StandardModelContext, batches: list[TokenBatch]
) -> None:
    """An autoencoder whose latent 3 is the discriminant of punctuation, among random ones."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(32, 16, location=LOCATION).requires_grad_(False)
    tokens = labelled(context, placed_at(LOCATION, autoencoder), batches)
    direction = fit_probe(tokens.x, tokens.labels["punctuation"])
    autoencoder.encoder.weight[3] = direction.direction.float()
    autoencoder.latent_bias[3] = -direction.threshold
    found = probe(context, autoencoder, batches, ks=(1, 2), seeds=(0, 1))
    punctuation = found.probing["punctuation"]
    assert punctuation.chosen[0] == 3
    assert punctuation.dense is not None
    assert punctuation.accuracy[1].mean >= 0.95 * punctuation.dense.mean
    assert found.n_documents == sum(len(batch.tokens) for batch in batches)
    assert found.n_tokens == 39 * found.n_documents
    assert "odd position" in found.table()
    assert json.dumps(found.to_dict())


def test_no_document_is_on_both_sides_and_the_seed_decides(
    context: StandardModelContext, batches: list[TokenBatch]
) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(24, 16, location=LOCATION)
    one, other = (probe(context, autoencoder, batches, seeds=(0,)) for _ in range(2))
    assert one.to_dict() == other.to_dict()
    first = batches[0]
    single = TokenBatch(first.tokens[:1], first.document[:1], first.position[:1])
    with pytest.raises(InputError, match="two groups"):
        probe(context, autoencoder, [single])


def test_a_single_document_is_split_by_windows(
    context: StandardModelContext, batches: list[TokenBatch]
) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(24, 16, location=LOCATION)
    one = [replace(batch, document=torch.zeros_like(batch.document)) for batch in batches]
    found, apart = (probe(context, autoencoder, each, seeds=(0,)) for each in (one, batches))
    assert (found.n_documents, found.split_by, apart.split_by) == (1, "windows", "documents")
    # Here each window is a document, so that the splits are the same.
    assert found.to_dict()["probing"] == apart.to_dict()["probing"]


def test_directions_add_up_to_normalised_activations() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(24, 16, input_normalization="layer_norm")
    x = 3 + 5 * torch.randn(10, 16)
    rows = normalized(autoencoder, x)
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(10), atol=1e-5, rtol=0)
    assert torch.equal(normalized(Autoencoder(24, 16), x), x)


def test_dead_autoencoders_and_no_tokens_are_refused(
    context: StandardModelContext, batches: list[TokenBatch]
) -> None:
    autoencoder = Autoencoder(24, 16, location=LOCATION).requires_grad_(False)
    autoencoder.latent_bias.fill_(-1e6)
    with pytest.raises(InputError, match="no latent fires"):
        probe(context, autoencoder, batches)
    with pytest.raises(InputError, match="no batch"):
        probe(context, autoencoder, [])


def test_concepts_of_rules_are_erased() -> None:
    """TPP on token-rule labels, with an autoencoder that was trained."""
    context = open_model("tiny-tales", "cpu")
    text = find_stores("tiny-tales") / "tokens"
    batches = list(islice(open_windows(context, text, DataConfig(), part="all"), 1))
    autoencoder = make_autoencoder_context(
        "tiny-tales", "ae-resid-delta-mlp", "cpu"
    ).get_autoencoder(2)
    assert autoencoder.location is not None
    tokens = labelled(context, placed_at(autoencoder.location, autoencoder), batches)
    subject = Subject(encoded(autoencoder, tokens.x), tokens.x, autoencoder.directions)
    classes = {name: tokens.labels[name] for name in ("punctuation", "begins a word", "ends in s")}
    found = tpp(subject, classes, ns=(50,), groups=tokens.document)
    assert found.accuracy.mean > 0.85
    assert found.own[50].mean > 0.1
    assert found.score[50].mean > found.floor[50].mean
    assert found.score[50].differs_from(found.floor[50])


def test_a_transcoder_has_no_absorption(
    context: StandardModelContext, batches: list[TokenBatch]
) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(
        24, 16, n_outputs=16, location=LOCATION, output_location="1/resid.torso.post_mlp"
    )
    found = probe(context, autoencoder, batches[:1], seeds=(0,))
    assert found.absorption == found.absorption_floor == {}


def test_the_command_needs_nothing_but_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--location", "1/resid.torso.delta_mlp"]
    few = ["--num-tokens", "4000", "--splits", "2", "--k", "1"]
    assert main(["probe", "ae-resid-delta-mlp", *place, *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (probed,) = found["probed"].values()
    assert found["text"] == "text that tiny-tales wrote itself"
    assert probed["l0"] == pytest.approx(16)
    assert probed["probing"]["odd position"]["accuracy"]["1"]["mean"] == pytest.approx(
        0.5, abs=0.06
    )
    punctuation = probed["probing"]["punctuation"]
    found = punctuation["accuracy"]["1"]["mean"]
    assert found > punctuation["shuffled"]["1"]["mean"] + 0.05


def test_the_command_on_other_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} {TEXT}" * 4, "utf-8")
    argv = ["probe", "ae-resid-delta-mlp", "--location", "1/resid.torso.delta_mlp"]
    assert main([*argv, "--text", str(tmp_path), "--k", "1", "3", "--splits", "1"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path) in shown
    assert "k = 3" in shown
    assert "absorption of first letters" in shown
