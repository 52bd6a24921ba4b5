"""Evaluation against the definitions: each row of tokens run alone, figures in numpy's float64."""

import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.evaluation.evaluate import evaluate, evaluate_all, measure
from neuron_explainer.evaluation.figures import Evaluation, Losses, evaluation_table
from neuron_explainer.evaluation.pieces import coded_pieces
from neuron_explainer.evaluation.running import ByLoss, LossTotals
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.pruned import omit_dead_latents
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from neuron_explainer.models.transformer import Transformer

ROWS = [[256, 5, 9, 100, 7, 3], [256, 8, 8, 2], [256, 1], [256, 77, 31, 200, 12, 9, 4, 90]]
POST_MLP = ActivationLocation("resid.torso.post_mlp", 0)


@pytest.fixture(scope="module")
def context(text_model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    folder = tmp_path_factory.mktemp("model")
    text_model.save(folder / "model")
    return StandardModelContext(str(folder / "model"), "cpu", torch.float64)


def batch_of(rows: list[list[int]], pad_side: str = "right", room: int = 0) -> TokenBatch:
    """Rows that begin with a start token, padded on a side."""
    size = max(map(len, rows)) + room
    tokens = torch.full((len(rows), size), 11)
    document = torch.full((len(rows), size), -1)
    bos = torch.zeros(len(rows), size, dtype=torch.bool)
    for row, ids in enumerate(rows):
        start = size - len(ids) if pad_side == "left" else 0
        tokens[row, start : start + len(ids)] = torch.tensor(ids)
        document[row, start : start + len(ids)] = row
        bos[row, start] = True
    pad = document == -1
    position = ((~pad).cumsum(1) - 1).masked_fill(pad, -1)
    return TokenBatch(tokens, document, position, pad, bos)


def random_autoencoder(n: int, location: Any = POST_MLP, seed: int = 0, **kwargs) -> Autoencoder:
    torch.manual_seed(seed)
    autoencoder = Autoencoder(3 * n, n, location=location, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        autoencoder.latent_bias.normal_(0, 0.3)
        autoencoder.pre_bias.normal_(0, 0.3)
    return autoencoder


def exact(n: int, scale: float = 1.0) -> Autoencoder:
    """Each direction and its opposite is a latent: ReLU loses nothing. Scale 0 gives zeros."""
    autoencoder = Autoencoder(2 * n, n, location=POST_MLP, dtype=torch.float64)
    both = torch.cat([torch.eye(n), -torch.eye(n)])
    with torch.no_grad():
        autoencoder.encoder.weight.copy_(both)
        autoencoder.decoder.weight.copy_(scale * both.T)
    return autoencoder


# ---- the oracle ------------------------------------------------------------------------------------


@dataclass
class Oracle:
    """Everything by hand: a row alone, the whole pass, softmax in numpy."""

    context: ModelContext
    autoencoder: Autoencoder
    score_bos: bool

    def __post_init__(self) -> None:
        place = self.autoencoder.location
        assert place is not None
        self.source = place
        self.target = self.autoencoder.output_location or place
        if self.target.layer is None:
            self.target = self.target.at(place.layer)
        self.model: Any = self.context.get_or_create_model()
        self.first = 0 if self.score_bos else 1

    @torch.no_grad()
    def run(self, rows: list[list[int]]) -> dict[str, Any]:
        captured = [
            self.model.capture(torch.tensor([ids]), [self.source, self.target]) for ids in rows
        ]
        xs = [found[self.source][0].flatten(1)[self.first :] for found in captured]
        ys = [found[self.target][0].flatten(1)[self.first :] for found in captured]
        x, y = torch.cat(xs), torch.cat(ys)
        _, latents, recons = self.autoencoder(x)
        result = self.reconstruction(y.numpy(), recons.numpy(), latents.numpy())
        values = {"spliced": recons, "zero": torch.zeros_like(y), "mean": y.mean(0).expand_as(y)}
        sizes = [len(piece) for piece in ys]
        losses: dict[str, list[float]] = {}
        for i, ids in enumerate(rows):
            original = self.logits(ids, None)
            self.collect(losses, "original", ids, original, original)
            for name, value in values.items():
                self.collect(losses, name, ids, original, self.logits(ids, value.split(sizes)[i]))
        return result | {name: math.fsum(v) / len(v) for name, v in losses.items()}

    def logits(self, ids: list[int], value: Tensor | None) -> np.ndarray:
        hooks = TransformerHooks()
        if value is not None:

            def replace(z: Tensor) -> Tensor:
                z = z.clone()
                z[0, self.first :] = value.view_as(z[0, self.first :])
                return z

            hooks.append_at(self.target, replace)
        found: np.ndarray = self.model(torch.tensor([ids]), hooks=hooks)[0][0].numpy()
        return found

    def collect(
        self, losses: dict[str, list[float]], name: str, ids: list[int], original: Any, logits: Any
    ) -> None:
        log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (original, logits))
        for i in range(len(ids)):
            if i >= self.first:  # where something was replaced
                kl = float((np.exp(log_p[i]) * (log_p[i] - log_q[i])).sum())
                losses.setdefault(f"kl_{name}", []).append(kl)
            if i + 1 < len(ids):  # no row has a start token after its first
                losses.setdefault(f"ce_{name}", []).append(-float(log_q[i, ids[i + 1]]))

    @staticmethod
    def reconstruction(y: Any, recons: Any, latents: Any) -> dict[str, Any]:
        error, about_mean = ((y - recons) ** 2).sum(1), ((y - y.mean(0)) ** 2).sum(1)
        norm, recons_norm = np.linalg.norm(y, axis=1), np.linalg.norm(recons, axis=1)
        product = (y * recons).sum(1)
        return {
            "n_tokens": len(y),
            "fvu": error.sum() / about_mean.sum(),
            "explained_variance": 1 - error.sum() / about_mean.sum(),
            "explained_variance_per_token": (1 - error / about_mean).mean(),
            "mse": error.mean(),
            "l0": (latents != 0).sum(1).mean(),
            "l1": np.abs(latents).sum(1).mean(),
            "cosine_similarity": (product / norm / recons_norm).mean(),
            "norm_ratio": (recons_norm / norm).mean(),
            "relative_reconstruction_bias": (recons_norm**2).sum() / product.sum(),
            "dead_share": (latents == 0).all(0).mean(),
            "frequency": (latents != 0).mean(0),
        }


def assert_as(found: Evaluation, expected: dict[str, Any], rel: float = 1e-9) -> None:
    for name in (
        "fvu",
        "explained_variance",
        "explained_variance_per_token",
        "mse",
        "l0",
        "l1",
        "cosine_similarity",
        "norm_ratio",
        "relative_reconstruction_bias",
        "dead_share",
    ):
        assert getattr(found, name) == pytest.approx(expected[name], rel=rel, abs=1e-12), name
    assert found.n_tokens == expected["n_tokens"]
    np.testing.assert_allclose(found.frequency.numpy(), expected["frequency"], rtol=1e-12)
    losses = found.losses
    assert losses is not None
    ours = {
        "ce_original": losses.ce_original,
        "ce_spliced": losses.ce_spliced,
        "ce_zero": losses.ce_zero_ablated,
        "ce_mean": losses.ce_mean_ablated,
        "kl_spliced": losses.kl,
        "kl_zero": losses.kl_zero_ablated,
        "kl_mean": losses.kl_mean_ablated,
    }
    for name, value in ours.items():
        assert value == pytest.approx(expected[name], rel=rel, abs=1e-12), name
    for how, recovered in (("zero", losses.recovered_zero), ("mean", losses.recovered_mean)):
        ablated = expected[f"ce_{how}"]
        ratio = (ablated - expected["ce_spliced"]) / (ablated - expected["ce_original"])
        assert recovered == pytest.approx(ratio, rel=1e-6)


# ---- the figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("score_bos", [False, True])
@pytest.mark.parametrize(
    "location",
    [
        "0/resid.torso.post_mlp",
        "1/mlp.post_act",
        "1/resid.torso.delta_attn",
        "0/attn.v_out",
        "resid.post_emb",
        "resid.post_ln_f",
    ],
)
def test_figures_are_the_oracles(context: ModelContext, location: str, score_bos: bool) -> None:
    width = context.n_neurons if "mlp.post_act" in location else context.n_residual_stream_channels
    autoencoder = random_autoencoder(width, location)
    batches = [batch_of(ROWS[:2]), batch_of(ROWS[2:], "left", room=2)]
    found = evaluate(context, autoencoder, batches, score_bos=score_bos, progress=False)
    assert found.location == location
    assert_as(found, Oracle(context, autoencoder, score_bos).run(ROWS))
    assert found.losses is not None
    assert found.losses.n_tokens == sum(len(ids) - 1 for ids in ROWS)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("1/resid.torso.post_ln_mlp", "resid.torso.delta_mlp"),
        ("0/resid.torso.post_attn", "1/mlp.post_act"),
    ],
)
def test_a_transcoder_is_held_against_its_outputs_place(
    context: ModelContext, source: str, target: str
) -> None:
    n_outputs = context.n_neurons if "post_act" in target else context.n_residual_stream_channels
    autoencoder = random_autoencoder(
        context.n_residual_stream_channels,
        source,
        n_outputs=n_outputs,
        output_location=target,
        skip=True,
    )
    found = evaluate(context, autoencoder, [batch_of(ROWS)], progress=False)
    assert_as(found, Oracle(context, autoencoder, False).run(ROWS))


@pytest.mark.parametrize("normalization", ["center", "layer_norm", "rms"])
def test_inputs_are_normalised_and_undone(context: ModelContext, normalization: Any) -> None:
    n = context.n_residual_stream_channels
    autoencoder = random_autoencoder(n, input_normalization=normalization, activation=TopK(4))
    found = evaluate(context, autoencoder, [batch_of(ROWS)], progress=False)
    assert_as(found, Oracle(context, autoencoder, False).run(ROWS))
    assert found.l0 <= 4


def test_fixed_points(context: ModelContext) -> None:
    n = context.n_residual_stream_channels
    batches = [batch_of(ROWS)]
    perfect = evaluate(context, exact(n), batches, progress=False)
    zeros = evaluate(context, exact(n, 0.0), batches, progress=False)
    assert perfect.losses is not None
    assert zeros.losses is not None
    assert perfect.fvu == pytest.approx(0, abs=1e-12)
    assert perfect.losses.recovered_zero == pytest.approx(1, abs=1e-9)
    assert perfect.losses.recovered_mean == pytest.approx(1, abs=1e-9)
    assert perfect.losses.kl == pytest.approx(0, abs=1e-12)
    assert zeros.losses.recovered_zero == pytest.approx(0, abs=1e-9)
    assert zeros.losses.kl == pytest.approx(zeros.losses.kl_zero_ablated)
    mean = exact(n, 0.0)
    with torch.no_grad():  # the mean predictor
        oracle = Oracle(context, mean, False)
        captured = [oracle.model.capture(torch.tensor([ids]), POST_MLP)[POST_MLP] for ids in ROWS]
        mean.pre_bias.copy_(torch.cat([x[0, 1:] for x in captured]).mean(0))
    average = evaluate(context, mean, batches, progress=False)
    assert average.losses is not None
    assert average.explained_variance == pytest.approx(0, abs=1e-12)
    assert average.explained_variance_per_token == pytest.approx(0, abs=1e-12)
    assert average.losses.recovered_mean == pytest.approx(0, abs=1e-9)


def test_cuts_and_padding_do_not_matter(context: ModelContext) -> None:
    autoencoder = random_autoencoder(context.n_residual_stream_channels)
    one = evaluate(context, autoencoder, [batch_of(ROWS)], progress=False).figures()
    for batches in (
        [batch_of([ids]) for ids in reversed(ROWS)],
        [batch_of(ROWS[:1], "left", 5), batch_of(ROWS[1:], "right", 3)],
    ):
        other = evaluate(context, autoencoder, iter(batches), progress=False).figures()
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-9), name


def test_latents_are_encoded_in_pieces(context: ModelContext) -> None:
    autoencoder = random_autoencoder(context.n_residual_stream_channels)
    whole = evaluate(context, autoencoder, [batch_of(ROWS)], progress=False).figures()
    size = 3 * autoencoder.n_latents
    rows = torch.zeros(7, autoencoder.n_inputs)
    assert [len(c.recons) for _, c in coded_pieces(autoencoder, rows, size)] == [3, 3, 1]
    (pieces,) = evaluate_all(
        context, {"": autoencoder}, [batch_of(ROWS)], progress=False, latents_at_once=size
    ).values()
    assert pieces.figures() == pytest.approx(whole, rel=1e-12)


def test_nothing_fires(context: ModelContext) -> None:
    """Sparse latents then have width 0; also where a piece is a single token."""
    autoencoder = random_autoencoder(context.n_residual_stream_channels)
    autoencoder.latent_bias.data.fill_(-1e6)
    (found,) = evaluate_all(
        context, {"": autoencoder}, [batch_of(ROWS)], progress=False, latents_at_once=1
    ).values()
    assert (found.l0, found.l1, found.dead_share) == (0, 0, 1)
    assert found.fvu > 0


def test_latents_that_were_left_out_are_zero(context: ModelContext) -> None:
    autoencoder = random_autoencoder(context.n_residual_stream_channels, activation=TopK(4))
    autoencoder.latents_activation_frequency[::3] = 0
    small = omit_dead_latents(autoencoder)
    found = evaluate(context, small, [batch_of(ROWS)], progress=False)
    assert found.n_latents == autoencoder.n_latents
    assert_as(found, Oracle(context, small, False).run(ROWS))
    assert not found.frequency[::3].any()


def test_separators_within_a_row_are_neither_scored_nor_predicted(context: ModelContext) -> None:
    autoencoder = random_autoencoder(context.n_residual_stream_channels)
    ids = [256, 5, 9, 256, 7, 3]
    batch = batch_of([ids])
    assert batch.bos is not None
    batch.bos[0, 3] = True
    found = evaluate(context, autoencoder, [batch], progress=False)
    assert found.n_tokens == 4
    assert found.losses is not None
    assert found.losses.n_tokens == 4
    everything = evaluate(context, autoencoder, [batch], score_bos=True, progress=False)
    assert everything.n_tokens == 6
    assert everything.losses is not None
    assert everything.losses.n_tokens == 5


def test_several_at_once_are_each_as_alone(context: ModelContext, tmp_path: Path) -> None:
    n = context.n_residual_stream_channels
    several = {
        "one": random_autoencoder(n, "0/resid.torso.post_mlp"),
        "other": random_autoencoder(n, "0/resid.torso.post_mlp", seed=1),
        "1/resid.torso.delta_mlp": random_autoencoder(n, None, seed=2),
    }
    found = evaluate_all(context, several, [batch_of(ROWS)], progress=False)
    assert list(found) == list(several)
    assert found["1/resid.torso.delta_mlp"].location == "1/resid.torso.delta_mlp"
    for name, autoencoder in several.items():
        place = None if autoencoder.location else name
        alone = evaluate(context, autoencoder, [batch_of(ROWS)], location=place, progress=False)
        assert found[name].figures() == pytest.approx(alone.figures(), rel=1e-12)
    for layer in (0, 1):
        random_autoencoder(n, None, seed=layer).save(tmp_path / str(layer))
    paths = {layer: str(tmp_path / str(layer)) for layer in (1, 0)}
    both = AutoencoderContext(
        AutoencoderConfig("resid.torso.post_mlp", paths), "cpu", dtype=torch.float64
    )
    of_context = evaluate_all(context, both, [batch_of(ROWS)], progress=False)
    assert list(of_context) == ["0/resid.torso.post_mlp", "1/resid.torso.post_mlp"]
    first = random_autoencoder(n, "0/resid.torso.post_mlp", seed=0)
    alone = evaluate(context, first, [batch_of(ROWS)], progress=False)
    assert of_context["0/resid.torso.post_mlp"].fvu == pytest.approx(alone.fvu, rel=1e-12)


def test_passes_are_few_and_begin_at_the_layer(
    context: ModelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two places in layer 1: layer 0 runs once for the means and once for all the rest."""
    n = context.n_residual_stream_channels
    model: Any = context.get_or_create_model()
    runs = [0, 0]
    for index, layer in enumerate(model.layers):
        forward = layer.forward

        def counted(*args: Any, index: int = index, forward: Any = forward, **kwargs: Any) -> Any:
            runs[index] += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", counted)
    several = {
        "a": random_autoencoder(n, "1/resid.torso.post_mlp"),
        "b": random_autoencoder(n, "1/resid.torso.post_mlp", seed=1),
    }
    evaluate_all(context, several, [batch_of(ROWS)], progress=False)
    assert runs == [2, 2 + 2 + 2]  # one splice each, and both ablations once


class Watched:
    """Token batches that note, whenever one is asked for, how many captured tensors are still alive."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []
        capture = model.capture

        def noted(*args: Any, **kwargs: Any) -> Any:
            found = capture(*args, **kwargs)
            self.captured += [weakref.ref(x) for x in found.values()]
            return found

        monkeypatch.setattr(model, "capture", noted)

    def __iter__(self) -> Iterator[TokenBatch]:
        for ids in ROWS:
            self.look()
            yield batch_of([ids])
        self.look()

    def look(self) -> None:
        self.alive.append(sum(ref() is not None for ref in self.captured))


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """What a reference cycle holds stays: memory is freed by reference counts alone, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_no_more_than_one_batch_is_held(
    context: ModelContext, monkeypatch: pytest.MonkeyPatch, no_garbage_collector: None
) -> None:
    n = context.n_residual_stream_channels
    watched = Watched(context.get_or_create_model(), monkeypatch)
    several = {
        "a": random_autoencoder(n, "0/resid.torso.post_mlp"),
        "b": random_autoencoder(n, "1/resid.torso.delta_mlp"),
    }
    found = evaluate_all(context, several, watched, compat="sparsify", progress=False)
    assert len(watched.captured) > 4 * len(ROWS)
    assert set(watched.alive) == {0}
    assert found["a"].losses is not None


def test_losses_on_every_nth_batch(context: ModelContext) -> None:
    autoencoder = random_autoencoder(context.n_residual_stream_channels)
    batches = [batch_of([ids]) for ids in ROWS]
    some = evaluate(context, autoencoder, batches, ce_every=2, progress=False)
    none = evaluate(context, autoencoder, batches, ce_every=0, progress=False)
    everything = evaluate(context, autoencoder, batches, progress=False)
    assert none.losses is None
    assert some.losses is not None
    assert some.losses.n_tokens == len(ROWS[0]) + len(ROWS[2]) - 2
    assert some.fvu == none.fvu == everything.fvu
    by_hand = evaluate(context, autoencoder, batches[::2], progress=False)
    assert by_hand.losses is not None
    assert some.losses.ce_spliced == pytest.approx(by_hand.losses.ce_spliced, rel=1e-12)


def test_any_causal_language_model_will_do() -> None:
    """Behind a Hugging Face context passes run whole, through other hooks."""
    transformers = pytest.importorskip("transformers")
    from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0
    )
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(config).double()
    for parameter in gpt2.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    other = HuggingFaceModelContext.from_model(gpt2.eval())
    rows = [[0, 5, 9, 40], [0, 7, 3]]
    autoencoder = random_autoencoder(16, "1/resid.torso.post_attn")
    batch = batch_of(rows)
    found = evaluate(other, autoencoder, [batch], progress=False)
    assert_as(found, Oracle(other, autoencoder, False).run(rows))


# ---- without a model -------------------------------------------------------------------------------


def test_measure_is_the_oracle() -> None:
    autoencoder = random_autoencoder(6, "3/mlp.post_act")
    x = torch.randn(5, 8, 6, dtype=torch.float64) + 2
    found = measure(autoencoder, [x[:1], x[1:]], mean=x.flatten(0, 1).mean(0))
    with torch.no_grad():
        _, latents, recons = autoencoder(x.flatten(0, 1))
    expected = Oracle.reconstruction(x.flatten(0, 1).numpy(), recons.numpy(), latents.numpy())
    np.testing.assert_allclose(found.frequency.numpy(), expected.pop("frequency"))
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert found.losses is None
    assert found.location == "3/mlp.post_act"
    unknown = measure(autoencoder, iter([x]))
    assert unknown.explained_variance_per_token is None
    assert unknown.fvu == pytest.approx(found.fvu)


def test_measure_a_transcoder() -> None:
    transcoder = random_autoencoder(6, "0/mlp.pre_act", n_outputs=4)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    found = measure(transcoder, [(x, y)])
    with torch.no_grad():
        error = y - transcoder.reconstruct(x)
    assert found.fvu == pytest.approx(
        float(error.square().sum() / (y - y.mean(0)).square().sum()), rel=1e-9
    )
    with pytest.raises(InputError, match="pairs of its input and what its output stands for"):
        measure(transcoder, [x])


def test_losses_are_means_over_what_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [ByLoss(*torch.rand(7, 3, 4, generator=generator)) for _ in range(3)]
    for values in parts[0]:
        values[0, 1] = float("nan")
    totals = LossTotals()
    for part in parts:
        totals.update(part)
    found = Losses.from_totals(totals)
    assert found is not None
    assert found.n_tokens == 35
    for name in ByLoss._fields:
        values = torch.cat([getattr(part, name).flatten() for part in parts])
        assert getattr(found, name) == pytest.approx(float(values.double().nanmean()), rel=1e-12)
    assert Losses.from_totals(LossTotals()) is None


# ---- results and errors ----------------------------------------------------------------------------


def test_results_are_text_and_json(context: ModelContext) -> None:
    import json

    autoencoder = random_autoencoder(context.n_residual_stream_channels)
    found = evaluate(context, autoencoder, [batch_of(ROWS)], compat="sparsify", progress=False)
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["fvu"] == found.fvu
    assert found.losses is not None
    assert again["losses"]["kl"] == found.losses.kl
    assert again["compat"]["sparsify"]["fvu"] == found.compat["sparsify"]["fvu"]
    assert sum(again["density"]["counts"]) + again["density"]["never"] == autoencoder.n_latents
    assert "frequency" not in again
    lines = dict(line.split(None, 1) for line in found.table().splitlines())
    assert lines["location"] == "0/resid.torso.post_mlp"
    assert lines["fvu"] == f"{found.fvu:.6g}"
    assert lines["sparsify/fvu"] == f"{found.compat['sparsify']['fvu']:.6g}"
    head, row, other = evaluation_table(
        {"a": found, "b": measure(autoencoder, [torch.ones(2, 16).double()])}
    ).splitlines()
    assert len(head) == len(row) == len(other)
    assert f"{found.losses.recovered_zero:.4f}" in row
    assert other.split()[5:8] == ["-", "-", "-"]
    assert "frequency" not in repr(found)


def test_bad_input(context: ModelContext) -> None:
    n = context.n_residual_stream_channels
    batches = [batch_of(ROWS)]
    with pytest.raises(InputError, match="does not say where its inputs come from"):
        evaluate(context, random_autoencoder(n, None), batches, progress=False)
    with pytest.raises(InputError, match="does not say which activation its output stands for"):
        evaluate(context, random_autoencoder(n, POST_MLP, n_outputs=n), batches, progress=False)
    with pytest.raises(InputError, match=r"location in one layer, found mlp\.post_act"):
        evaluate_all(
            context, {"mlp.post_act": random_autoencoder(n, None)}, batches, progress=False
        )
    with pytest.raises(InputError, match="expected input of width 9"):
        evaluate(context, random_autoencoder(9), batches, progress=False)
    with pytest.raises(InputError, match="one vector a token"):
        evaluate(context, random_autoencoder(8, "0/attn.qk_probs"), batches, progress=False)
    with pytest.raises(LocationError, match="outside the model"):
        evaluate(context, random_autoencoder(n, "7/mlp.post_act"), batches, progress=False)
    with pytest.raises(InputError, match=r"unknown compat 'sparsifi'. Did you mean 'sparsify'"):
        evaluate(context, random_autoencoder(n), batches, compat="sparsifi", progress=False)
    with pytest.raises(InputError, match="ce_every must be at least 0"):
        evaluate(context, random_autoencoder(n), batches, ce_every=-1, progress=False)
    with pytest.raises(InputError, match="no autoencoder"):
        evaluate_all(context, {}, batches, progress=False)
    with pytest.raises(InputError, match="no tokens have been added"):
        evaluate(context, random_autoencoder(n), [], progress=False)
