"""``collate`` on a model: what it finds is what the model computes, at every kind of place."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis import CollateConfig, collect
from neuron_explainer.analysis.records import GROUPS, Collected
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder, JumpReLU, TopK
from neuron_explainer.models.autoencoder_context import (
    AutoencoderConfig,
    AutoencoderContext,
    MultiAutoencoderContext,
)
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import WeightLocationType
from tests.activations.helpers import random_corpus, save_context
from tests.analysis.collated import check_units, contexts_of, u_of

LENGTHS = [14, 3, 25, 9, 9, 1, 12]
CONFIG = CollateConfig(
    top=4,
    intervals=3,
    per_interval=2,
    uniform=3,
    weighted=3,
    inactive=2,
    window=5,
    head_window=4,
    parts=3,
)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    return save_context(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def windows() -> TokenWindows:
    return windows_of(random_corpus(LENGTHS))


def windows_of(corpus: TokenCorpus, **how: Any) -> TokenWindows:
    return TokenWindows(corpus, 10, 3, **{"bos": 0, **how})


def autoencoder(n: int, activation: nn.Module, location: str | None, **how: Any) -> Autoencoder:
    torch.manual_seed(0)
    made = Autoencoder(24, n, activation, location=location, **how)
    with torch.no_grad():
        made.latent_bias.normal_(0, 0.2)
    return made.requires_grad_(False)


@torch.no_grad()
def values_of(context: ModelContext, windows: TokenWindows, place: str, code=None) -> np.ndarray:
    """``[position, unit]`` from the same passes, one place at a time."""
    model, found = context.get_or_create_model(), None
    for number in range(windows.batches_per_epoch):
        batch = windows.batch(number)
        x = model.capture(batch.tokens, place, pad=batch.pad)[place].flatten(2)
        position = batch.corpus_position
        assert position is not None
        rows = x[position >= 0] if code is None else code(x[position >= 0])
        if found is None:
            found = np.zeros((len(windows.corpus.tokens), rows.shape[1]), np.float32)
        found[position[position >= 0].numpy()] = rows.numpy()
    assert found is not None
    return found


def check(found: Collected, windows: TokenWindows, values: np.ndarray, **how: Any) -> None:
    assert found.n_units == values.shape[1]
    check_units(
        found.statistics,
        found.examples,
        windows,
        values,
        CONFIG,
        seed=found.settings["key_seed"],
        **how,
    )


def test_neurons_channels_and_latents_in_one_pass(
    context: ModelContext, windows: TokenWindows
) -> None:
    place = "1/resid.torso.post_mlp"
    topk = autoencoder(16, TopK(3), place)
    jump = autoencoder(
        16, JumpReLU(torch.full((24,), 0.3)), place, input_normalization="layer_norm"
    )
    signed = autoencoder(16, TopK(3, nn.Identity()), None)
    what: Any = [
        {"topk": topk, "jump": jump},
        {place: signed},
        "0/mlp.post_act",
        "0/attn.v_out",
        place,
    ]
    found = collect(context, what, windows, CONFIG)
    assert list(found) == [
        "topk",
        "jump",
        place,
        "0/mlp.post_act.neurons",
        "0/attn.v_out.channels",
        f"{place}.channels",
    ]
    for name, each in (("topk", topk), ("jump", jump), (place, signed)):
        values = values_of(context, windows, place, each.encode)
        check(found[name], windows, values, signed=each is signed)
        assert (found[name].kind, found[name].signed) == ("latent", each is signed)
    neurons = values_of(context, windows, "0/mlp.post_act")
    assert (neurons < 0).any()
    check(found["0/mlp.post_act.neurons"], windows, neurons, dense=True)
    for name in ("0/attn.v_out", place):
        values = values_of(context, windows, name)
        check(found[f"{name}.channels"], windows, values, dense=True, signed=True)


def test_packed_and_not_packed(context: ModelContext) -> None:
    hows: list[dict[str, Any]] = [{"concat": False}, {"bos": None}, {"seed": None}]
    for how in hows:
        windows = windows_of(random_corpus(LENGTHS), **how)
        found = collect(context, "1/mlp.pre_act", windows, CONFIG)["1/mlp.pre_act.neurons"]
        check(found, windows, values_of(context, windows, "1/mlp.pre_act"), dense=True)


def test_a_location_without_a_layer_is_every_layer(
    context: ModelContext, windows: TokenWindows
) -> None:
    found = collect(context, ["mlp.post_act", "attn.write_norm"], windows, CONFIG)
    assert list(found) == [
        "0/mlp.post_act.neurons",
        "1/mlp.post_act.neurons",
        "0/attn.write_norm.heads",
        "1/attn.write_norm.heads",
    ]


def test_a_transcoder_is_read_where_its_input_comes_from(
    context: ModelContext, windows: TokenWindows
) -> None:
    place = "0/resid.torso.post_ln_mlp"
    transcoder = autoencoder(
        16, TopK(3), place, n_outputs=16, output_location="0/resid.torso.delta_mlp"
    )
    found = collect(context, {"t": transcoder}, windows, CONFIG)["t"]
    assert found.location == place
    check(found, windows, values_of(context, windows, place, transcoder.encode))


def test_contexts_of_autoencoders(
    context: ModelContext, windows: TokenWindows, tmp_path: Path
) -> None:
    made = autoencoder(16, TopK(3), None)
    made.save(tmp_path / "ae")
    paths = {layer: str(tmp_path / "ae") for layer in (0, 1)}
    contexts = [
        AutoencoderContext(AutoencoderConfig(place, paths), "cpu")
        for place in ("resid.torso.post_mlp", "resid.torso.post_attn")
    ]
    multi = MultiAutoencoderContext.from_autoencoder_context_list(contexts)
    found = collect(context, multi, windows, CONFIG)
    assert list(found) == [
        f"{layer}/resid.torso.{place}" for place in ("post_mlp", "post_attn") for layer in (0, 1)
    ]
    place = "1/resid.torso.post_attn"
    check(found[place], windows, values_of(context, windows, place, made.encode))
    one = collect(context, contexts[1], windows, CONFIG)[place]
    assert np.array_equal(one.examples.start, found[place].examples.start)


# ---- heads -----------------------------------------------------------------------------------------


@torch.no_grad()
def pairs_of(
    context: ModelContext, windows: TokenWindows, layer: int, norm: bool
) -> list[dict[tuple[int, int], np.ndarray]]:
    """For each context of the corpus, the values ``[h]`` of each pair of corpus positions."""
    model = context.get_or_create_model()
    out = context.get_weight(WeightLocationType.ATTN_TO_RESIDUAL, layer)
    values: dict[tuple[int, int], np.ndarray] = {}
    for number in range(windows.batches_per_epoch):
        batch = windows.batch(number)
        names = [f"{layer}/attn.qk_probs", f"{layer}/attn.v"]
        captured = model.capture(batch.tokens, names, pad=batch.pad)
        pattern, v = captured[names[0]], captured[names[1]]
        written = torch.stack([v[..., h, :] @ out[h] for h in range(v.shape[2])], 2).norm(dim=-1)
        x = pattern * written[:, None] if norm else pattern
        assert batch.corpus_position is not None
        position = batch.corpus_position.numpy()
        for b, q in zip(*np.nonzero(position >= 0), strict=True):
            for k in range(q + 1):
                values[int(position[b, q]), int(position[b, k])] = x[b, q, k].numpy()
    return [
        {
            (q, k): values[q, k]
            for q in c.positions
            for k in c.positions
            if q - CONFIG.head_window < k <= q
        }
        for c in contexts_of(windows, False)
    ]


@pytest.mark.parametrize("figure", ["attn.qk_probs", "attn.write_norm"])
def test_heads_as_pairs_of_tokens(
    context: ModelContext, windows: TokenWindows, figure: str
) -> None:
    found = collect(context, f"1/{figure}", windows, CONFIG)[f"1/{figure}.heads"]
    contexts = pairs_of(context, windows, 1, figure == "attn.write_norm")
    everything = np.array([value for c in contexts for value in c.values()])
    statistics = found.statistics
    assert statistics.n_tokens == len(everything)
    np.testing.assert_allclose(statistics.max, everything.max(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.all.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.all.variance, everything.var(0), rtol=1e-4)
    for unit in range(found.n_units):
        peaks = []
        for c in contexts:
            if c:
                pair = max(c, key=lambda pair: (c[pair][unit], -pair[0], -pair[1]))
                peaks.append((pair, float(c[pair][unit])))
        check_head(found, unit, peaks, contexts)


def check_head(found: Collected, unit: int, peaks: list[Any], contexts: list[Any]) -> None:
    seed = found.settings["key_seed"]
    by_value = sorted(peaks, key=lambda peak: (-peak[1], peak[0]))[: CONFIG.top]
    by_u = sorted(peaks, key=lambda peak: u_of(seed, unit, peak[0][0]))[: CONFIG.uniform]
    values = {pair: value for c in contexts for pair, value in c.items()}
    for group, expected in (("top", by_value), ("uniform", by_u)):
        table = found.examples.of_unit(unit, group)
        np.testing.assert_allclose(table.value, [value for _, value in expected], rtol=1e-5)
        for row, ((query, key), _) in enumerate(expected):
            i = (math.isqrt(8 * int(table.peak[row]) + 1) - 1) // 2
            j = int(table.peak[row]) - i * (i + 1) // 2
            start, length = int(table.start[row]), int(table.length[row])
            assert (start + i, start + j) == (query, key)
            triangle = [
                values.get((start + q, start + k), np.zeros(found.n_units))[unit]
                for q in range(CONFIG.head_window)
                for k in range(q + 1)
                if q < length
            ]
            shown = table.activations[row]
            np.testing.assert_allclose(shown[: len(triangle)], triangle, rtol=1e-3, atol=1e-4)
            assert not shown[len(triangle) :].any()


# ---- seed 003's checks -----------------------------------------------------------------------------


def test_no_maximum_is_missing_and_intervals_hold_what_they_say(
    context: ModelContext, windows: TokenWindows
) -> None:
    """``seeds.md`` 003, check 5: the original left out every context that set a new record."""
    place = "0/mlp.post_act"
    found = collect(context, place, windows, CONFIG)[f"{place}.neurons"]
    values = values_of(context, windows, place)
    for unit in range(found.n_units):
        largest = values[:, unit].max()
        assert found.statistics.active.count[unit] == (values[:, unit] > 0).sum()
        assert found.statistics.histogram[unit].sum() == (values[:, unit] > 0).sum()
        if largest > 0:
            assert found.examples.of_unit(unit, "top").value[0] == largest
            strata = found.examples.of_unit(unit, "stratum")
            for i in range(CONFIG.intervals):
                inside = strata.value[strata.interval == i]
                upper = largest * (CONFIG.intervals - i) / CONFIG.intervals
                assert (inside <= upper * (1 + 1e-6)).all()
                assert (inside >= (upper - largest / CONFIG.intervals) * (1 - 1e-6)).all()


# ---- what is refused -------------------------------------------------------------------------------


def test_what_cannot_be_looked_at(context: ModelContext, windows: TokenWindows) -> None:
    topk = autoencoder(16, TopK(3), None)
    with pytest.raises(InputError, match="nothing to look at"):
        collect(context, [], windows)
    with pytest.raises(InputError, match="needs a name or location"):
        collect(context, topk, windows)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not say where its inputs come from"):
        collect(context, {"mine": topk}, windows)
    with pytest.raises(InputError, match="takes inputs of width 16"):
        collect(context, {"0/mlp.post_act": topk}, windows)
    with pytest.raises(InputError, match="asked for twice"):
        collect(context, ["0/mlp.post_act", "mlp.post_act"], windows)
    with pytest.raises(LocationError, match="of these, only"):
        collect(context, "0/attn.qk_logits", windows)
    with pytest.raises(LocationError, match="unknown location"):
        collect(context, "0/mlp.postact", windows)
    with pytest.raises(InputError, match="found int"):
        collect(context, 3, windows)  # type: ignore[arg-type]


def test_windows_that_cannot_be_read(context: ModelContext) -> None:
    corpus = random_corpus(LENGTHS)
    hows: list[dict[str, Any]] = [{"epochs": 2}, {"epochs": None}, {"world": 2}]
    for how in hows:
        with pytest.raises(InputError, match="epochs=1 and world=1"):
            collect(context, "0/mlp.post_act", windows_of(corpus, **how))
    with pytest.raises(InputError, match="more than the context of 12"):
        collect(context, "0/mlp.post_act", TokenWindows(corpus, 13, 3, bos=0))


@pytest.mark.parametrize("what", ["0/mlp.post_act", "1/attn.write_norm", "latents"])
def test_values_that_are_no_numbers_are_refused_with_their_place(
    tmp_path: Path, windows: TokenWindows, what: str
) -> None:
    context = save_context(tmp_path / "model")
    model: Any = context.get_or_create_model()
    with torch.no_grad():
        model.get_parameter("tok_embed.weight")[int(windows.corpus.tokens[30])] = math.nan
    asked: Any = what
    if what == "latents":
        asked = {"1/resid.torso.post_mlp": autoencoder(16, TopK(3), None)}
    with pytest.raises(InputError, match=r"is NaN at .*document \d+, position \d+"):
        collect(context, asked, windows, CONFIG)


def test_dead_units_and_a_text_that_never_excites(
    context: ModelContext, windows: TokenWindows
) -> None:
    place = "0/resid.torso.post_mlp"
    dead = autoencoder(16, nn.ReLU(), place)
    with torch.no_grad():
        dead.latent_bias.fill_(-1e6)
    found = collect(context, {"dead": dead}, windows, replace(CONFIG, inactive=0))["dead"]
    assert len(found.dead) == found.n_units
    assert not len(found.examples)
    assert not found.statistics.all.variance.any()
    assert not found.statistics.max.any()
    silent = collect(context, {"dead": dead}, windows, CONFIG)["dead"]
    groups = {GROUPS[group] for group in silent.examples.group}
    assert groups == {"inactive"}


# ---- models of Hugging Face ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_hugging_face(tmp_path: Path, windows: TokenWindows, family: str) -> None:
    """Heads that share keys, and a model without our hooks inside."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=24, n_inner=20
    )
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=20,
            max_position_embeddings=24,
        )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    context = HuggingFaceModelContext(tmp_path / family, "cpu", torch.float32)
    place = "1/resid.torso.post_mlp"
    topk = autoencoder(16, TopK(3), place)
    found = collect(context, [{"topk": topk}, "0/mlp.post_act", "1/attn.qk_probs"], windows, CONFIG)
    check(found["topk"], windows, values_of(context, windows, place, topk.encode))
    neurons = values_of(context, windows, "0/mlp.post_act")
    check(found["0/mlp.post_act.neurons"], windows, neurons, dense=True)
    heads = found["1/attn.qk_probs.heads"]
    assert heads.n_units == 4
    assert (heads.statistics.max <= 1).all()
    assert (heads.statistics.max > 0.1).all()
