"""One figure for one thing: FVU, L0, dead share and CE recovered through every door, on the same tokens."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.analysis.report import Reported, write_report
from neuron_explainer.cli import main
from neuron_explainer.dictionaries import TopKConfig, TrainConfig
from neuron_explainer.dictionaries.trainee import Trainee
from neuron_explainer.evaluation import evaluate, measure, metrics, verify_autoencoder
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.evaluation.running import ReconstructionStats
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import StandardModelContext
from neuron_explainer.models.transformer import Transformer

LOCATION = ActivationLocation("resid.torso.post_mlp", 0)


@pytest.fixture(scope="module")
def folder(text_model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an autoencoder of it."""
    folder = tmp_path_factory.mktemp("one")
    text_model.save(folder / "model")
    torch.manual_seed(0)
    width = text_model.cfg.d_model
    Autoencoder(8 * width, width, TopK(3), location=LOCATION).save(folder / "autoencoder")
    return folder


@pytest.fixture(scope="module")
def context(folder: Path) -> StandardModelContext:
    return StandardModelContext(str(folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def autoencoder(folder: Path) -> Autoencoder:
    return Autoencoder.load(folder / "autoencoder").requires_grad_(False)


@pytest.fixture(scope="module")
def batches(context: StandardModelContext) -> list[TokenBatch]:
    """The windows of the built-in text, as ``verify`` cuts them; the first token does not count."""
    ids, size = context.encode(PASSAGE), context.n_context
    found = []
    for i in range(0, len(ids) - 1, size):
        tokens = torch.tensor([ids[i : i + size]])
        position = torch.arange(tokens.shape[1])[None]
        document = torch.zeros_like(tokens)
        found.append(TokenBatch(tokens, document, position, None, position == 0))
    return found


@pytest.fixture(scope="module")
def rows(context: StandardModelContext, batches: list[TokenBatch]) -> Tensor:
    """The activations that count."""
    model = context.get_or_create_model()
    with torch.no_grad():
        found = [model.capture(batch.tokens, LOCATION)[LOCATION][0, 1:] for batch in batches]
    return torch.cat(found)


def test_reconstruction(
    context: StandardModelContext,
    autoencoder: Autoencoder,
    batches: list[TokenBatch],
    rows: Tensor,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    latents, recons = autoencoder.encode(rows), autoencoder.reconstruct(rows)
    fvu, l0 = metrics.fvu(rows, recons), metrics.l0(latents)
    dead = metrics.dead_share(latents)
    assert 0 < l0 < 3.1
    assert 0 < dead < 1

    verified = verify_autoencoder(autoencoder, LOCATION, context)
    evaluated = evaluate(context, autoencoder, batches, ce_every=0, progress=False)
    assert verified.n_tokens == evaluated.n_tokens == len(rows)
    doors: dict[str, Any] = {
        "running totals": ReconstructionStats().update(rows, recons, latents),
        "verify": verified,
        "evaluate": evaluated,
        "measure": measure(autoencoder, [rows]),
    }
    for name, door in doors.items():
        assert float(door.l0) == float(l0), name
        assert float(door.dead_share) == float(dead), name
        # The activations are float32, and a matrix product's rounding depends on how many rows it has.
        assert float(door.fvu) == pytest.approx(float(fvu), rel=1e-6), name
    assert verified.fvu == evaluated.fvu  # the same windows: the same bits

    pytest.importorskip("matplotlib")
    page = folder / "report.html"
    write_report(page, {"a": Reported(evaluation=evaluated)})
    cells = re.findall(r"<td>([^<]*)</td>", page.read_text("utf-8"))
    everything = dict(itertools.pairwise(cells))
    assert everything["fvu"] == f"{evaluated.fvu:.6g}"
    assert everything["l0"] == f"{evaluated.l0:.6g}"
    assert everything["dead_share"] == f"{evaluated.dead_share:.6g}"
    assert {f"{evaluated.fvu:.4f}", f"{evaluated.l0:.2f}"} <= set(cells)

    common = ["--model", str(folder / "model"), "--device", "cpu", "--json"]
    main(["latents", "a text", "--autoencoder", str(folder / "autoencoder"), *common])
    shown = json.loads(capsys.readouterr().out)
    assert shown["fvu"] == round(verified.fvu, 4)
    assert shown["l0"] == round(verified.l0, 2)


@pytest.mark.parametrize("normalization", ["none", "constant", "layer_norm"])
def test_the_training_log(rows: Tensor, normalization: Any) -> None:
    """What the log says of a step is what is measured of the dictionary that the step began with."""
    config = TrainConfig(
        TopKConfig(k=3),
        n_latents=40,
        steps=1,
        batch_size=len(rows),
        input_normalization=normalization,
        dead_after_tokens=len(rows),
    )
    trainee = Trainee(config, rows.shape[1], None, torch.device("cpu"))
    trainee.measure([(rows, rows)])
    x, target = trainee.normalize(rows, rows)
    loss = trainee.backward(trainee.loss(x, target, 0), len(rows))
    logged = trainee.metrics(loss, target, rows, len(rows), len(rows))
    measured = measure(trainee.finish(), [rows])
    assert logged["l0"] == measured.l0
    assert logged["dead"] / 40 == measured.dead_share
    assert logged["dead_window"] == measured.n_tokens
    assert logged["fvu"] == pytest.approx(measured.fvu, rel=1e-5)  # weights are folded in float32


def test_cross_entropy_recovered(
    context: StandardModelContext, autoencoder: Autoencoder, batches: list[TokenBatch]
) -> None:
    model = context.get_or_create_model()
    losses: dict[str, list[Tensor]] = {"original": [], "spliced": [], "zero": []}
    with torch.no_grad():
        for batch in batches:
            for name, found in losses.items():

                def replace(x: Tensor, name: str = name) -> Tensor:
                    new = autoencoder.reconstruct(x) if name == "spliced" else torch.zeros_like(x)
                    return torch.cat([x[:, :1], new[:, 1:]], dim=1)

                hooks = TransformerHooks()
                if name != "original":
                    hooks.append_at(LOCATION, replace)
                logits = model(batch.tokens, hooks=hooks)[0]
                found.append(metrics.cross_entropy_per_token(logits, batch.tokens)[0])
    expected = metrics.ce_recovered(*(torch.cat(found) for found in losses.values()))
    found_losses = evaluate(context, autoencoder, batches, progress=False).losses
    assert found_losses is not None
    assert found_losses.recovered_zero == pytest.approx(float(expected), rel=1e-4)
    again = metrics.ce_recovered(
        found_losses.ce_original, found_losses.ce_spliced, found_losses.ce_zero_ablated
    )
    assert found_losses.recovered_zero == float(again)
