"""Contexts: one autoencoder a layer, spliced into a model; latents left out without moving an index."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from neuron_explainer.errors import InputError, LocationError, NeuronExplainerError, SourceError
from neuron_explainer.models import model_registry
from neuron_explainer.models.autoencoder import (
    Autoencoder,
    BatchTopK,
    JumpReLU,
    TopK,
    UnstatedNormalizationWarning,
)
from neuron_explainer.models.autoencoder_context import (
    AutoencoderConfig,
    AutoencoderContext,
    AutoencoderSpec,
    MultiAutoencoderContext,
    get_autoencoder_output_weight_by_layer_index,
)
from neuron_explainer.models.autoencoders.pruned import (
    PrunedAutoencoder,
    count_dead_latents,
    get_decoder_weight,
    omit_dead_latents,
    omit_least_active_latents,
)
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.hooks import Hook, TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_registry import (
    get_autoencoder_spec,
    list_autoencoder_names,
    make_autoencoder_context,
)
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.models.weight_names import Dimension

CFG = TransformerConfig(ctx_window=16, d_model=8, n_layers=3, n_heads=2, m_mlp=2, n_vocab=11)
N_LATENTS = 12
TOKENS = torch.tensor([[1, 5, 2, 9, 3]])

ACTIVATIONS = {
    "ReLU": lambda: nn.ReLU(),
    "TopK": lambda: TopK(3),
    "JumpReLU": lambda: JumpReLU(torch.linspace(0.0, 0.4, N_LATENTS)),
    "BatchTopK": lambda: BatchTopK(0.2),
}


def make(activation="ReLU", n_inputs=8, seed=0, dead=(), **kwargs):
    """A random autoencoder; the latents ``dead`` never fire, and its statistics know that."""
    generator = torch.Generator().manual_seed(seed)
    ae = Autoencoder(N_LATENTS, n_inputs, ACTIVATIONS[activation](), **kwargs)
    with torch.no_grad():
        for parameter in (ae.pre_bias, ae.latent_bias, ae.encoder.weight, ae.decoder.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        ae.latent_bias[list(dead)] = -1000
    ae.latents_activation_frequency.copy_(torch.rand(N_LATENTS, generator=generator) + 1e-6)
    ae.latents_activation_frequency[list(dead)] = 0
    return ae


@pytest.fixture(scope="module")
def model():
    return Transformer(CFG, seed=0)


def save_all(folder, location="resid_delta_mlp", layers=range(3), **kwargs):
    """An autoencoder a layer on disk, and their config."""
    paths: dict[int, Path] = {}
    for layer in layers:
        paths[layer] = folder / location / str(layer)
        make(seed=layer, location=ActivationLocation(location, layer), **kwargs).save(paths[layer])
    return AutoencoderConfig(location, paths)


def run(model, hooks=None):
    return model(TOKENS, hooks=hooks)[0]


# ---- configs ---------------------------------------------------------------------------------------


def test_config():
    config = AutoencoderConfig("resid_delta_mlp", {0: "a", 2: "b"})
    assert config.location == ActivationLocation("resid.torso.delta_mlp")
    spec = AutoencoderSpec("mlp.post_act", {1: "x"}, "layer_norm")
    assert AutoencoderConfig.from_spec(spec) == AutoencoderConfig(
        "mlp.post_act", {1: "x"}, "layer_norm"
    )
    assert type(AutoencoderConfig.from_spec(spec)) is AutoencoderConfig


@pytest.mark.parametrize(
    ("location", "paths", "message"),
    [
        ("mlp.post_act", {}, "no autoencoder is given for mlp.post_act"),
        ("mlp.post_act", {None: "a", 1: "b"}, "layer None stands for all layers"),
        ("3/mlp.post_act", {3: "a"}, "the layer is the key of each path"),
        ("mlp.postact", {3: "a"}, "unknown location"),
        ("logits", {3: "a"}, "exists once in a model"),
    ],
)
def test_bad_configs(location, paths, message):
    with pytest.raises((InputError, LocationError), match=message):
        AutoencoderConfig(location, paths)


# ---- loading ---------------------------------------------------------------------------------------


def test_loading_is_lazy_kept_and_frozen(tmp_path):
    context = AutoencoderContext(save_all(tmp_path), "cpu")
    assert context.location == ActivationLocation("resid.torso.delta_mlp")
    assert context.layer_indices == {0, 1, 2}
    assert repr(context) == (
        "AutoencoderContext('resid.torso.delta_mlp', layers=[0, 1, 2], device='cpu', "
        "omit_dead_latents=False, 0 loaded)"
    )
    ae = context.get_autoencoder(1)
    assert "1 loaded" in repr(context)
    assert context.get_autoencoder(1) is ae
    assert str(ae.location) == "1/resid.torso.delta_mlp"
    assert not ae.training
    assert not any(p.requires_grad for p in ae.parameters())
    assert torch.equal(ae.encoder.weight, make(seed=1).encoder.weight)
    assert context.num_autoencoder_directions == N_LATENTS
    assert context.get_parameterized_dimension_sizes() == {Dimension.AUTOENCODER_LATENTS: 12}
    context.warmup()
    assert "3 loaded" in repr(context)
    weights = get_autoencoder_output_weight_by_layer_index(context)
    assert {layer: list(weight.shape) for layer, weight in weights.items()} == {
        layer: [N_LATENTS, 8] for layer in range(3)
    }
    assert torch.equal(weights[2][5], make(seed=2).decoder.weight[:, 5])
    with pytest.raises(InputError, match=r"of resid\.torso\.delta_mlp in layer 3. Layers: 0, 1, 2"):
        context.get_autoencoder(3)


def test_two_contexts_share_nothing(tmp_path):
    config = save_all(tmp_path)
    one, other = AutoencoderContext(config, "cpu"), AutoencoderContext(config, torch.device("cpu"))
    assert one.get_autoencoder(0) is not other.get_autoencoder(0)


def test_dtype(tmp_path):
    context = AutoencoderContext(save_all(tmp_path), "cpu", dtype=torch.bfloat16)
    assert context.get_autoencoder(0).dtype == torch.bfloat16


def test_one_file_for_several_layers_is_loaded_once(tmp_path):
    config = save_all(tmp_path, layers=[0])
    folder = config.paths[0]
    ae = Autoencoder.load(folder)
    ae.location = ActivationLocation("resid.torso.delta_mlp")
    ae.save(folder, overwrite=True)
    context = AutoencoderContext(
        AutoencoderConfig("resid_delta_mlp", dict.fromkeys(range(3), folder)), "cpu"
    )
    assert context.get_autoencoder(0) is context.get_autoencoder(2)
    assert str(context.get_autoencoder(0).location) == "resid.torso.delta_mlp"


def test_a_folder_of_another_location_is_refused(tmp_path):
    paths = save_all(tmp_path).paths
    with pytest.raises(
        NeuronExplainerError, match=r"location '0/resid\.torso\.delta_mlp', the cal"
    ):
        AutoencoderContext(AutoencoderConfig("mlp.post_act", paths), "cpu").get_autoencoder(0)
    swapped = AutoencoderConfig("resid_delta_mlp", {0: paths[1]})
    with pytest.raises(
        NeuronExplainerError, match=r"'1/resid\.torso\.delta_mlp', the call says '0"
    ):
        AutoencoderContext(swapped, "cpu").get_autoencoder(0)


def test_published_files_get_the_normalisation_of_their_release(tmp_path):
    state_dict = dict(make("TopK").state_dict())
    del state_dict["input_normalization"]
    del state_dict["latents_mean_square"]
    path = tmp_path / "0.pt"
    torch.save(state_dict, path)
    config = AutoencoderConfig("resid_post_mlp", {0: path}, "layer_norm")
    ae = AutoencoderContext(config, "cpu").get_autoencoder(0)
    assert ae.input_normalization == "layer_norm"
    assert str(ae.location) == "0/resid.torso.post_mlp"
    unstated = AutoencoderContext(AutoencoderConfig("resid_post_mlp", {0: path}), "cpu")
    with pytest.warns(UnstatedNormalizationWarning):
        unstated.get_autoencoder(0)


def test_missing_file_says_which(tmp_path):
    config = AutoencoderConfig("mlp.post_act", {0: tmp_path / "gone.pt", 1: tmp_path / "folder"})
    context = AutoencoderContext(config, "cpu")
    for layer, name in ((0, "gone.pt"), (1, "folder")):
        with pytest.raises(SourceError, match=name):
            context.get_autoencoder(layer)


# ---- fitting a model -------------------------------------------------------------------------------


class Sizes:
    def get_dim_size(self, model_dim):
        return {Dimension.LAYERS: 3, Dimension.RESIDUAL_STREAM_CHANNELS: 8, Dimension.MLP_ACTS: 16}[
            model_dim
        ]


def test_width_must_fit_the_location(tmp_path, model):
    fits = AutoencoderContext(save_all(tmp_path), "cpu")
    wide = AutoencoderContext(save_all(tmp_path, "mlp_post_act", n_inputs=8), "cpu")
    for what in (model, CFG, Sizes()):
        fits.check_model(what)
        with pytest.raises(
            InputError, match=r"of 0/mlp\.post_act takes inputs of width 8, this model has width 16"
        ):
            wide.check_model(what)
    with pytest.raises(InputError, match=r"mlp\.post_act: .* inputs of width 8, .* width 16"):
        run(model, wide.hooks())
    deep = AutoencoderContext(save_all(tmp_path, "resid_delta_attn", layers=[3]), "cpu")
    with pytest.raises(LocationError, match="layers 0 to 2"):
        deep.check_model(model)


@pytest.mark.parametrize(
    ("location", "width"),
    [
        ("attn.q", 4),
        ("attn.v_out", 4),
        ("attn.qk_probs", 2),
        ("resid.ln_f.scale", 1),
        ("logits", 11),
    ],
)
def test_widths_elsewhere(tmp_path, location, width):
    layer = 0 if ActivationLocation(location).site.per_layer else None
    make(n_inputs=width).save(tmp_path / "ae")
    config = AutoencoderConfig(location, {layer: tmp_path / "ae"})
    AutoencoderContext(config, "cpu").check_model(CFG)


# ---- splicing --------------------------------------------------------------------------------------

LOCATIONS = {"mlp_post_act": 16, "resid_delta_mlp": 8, "resid_delta_attn": 8, "resid_post_mlp": 8}


@pytest.mark.parametrize("normalization", ["none", "center", "layer_norm"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_adding_the_error_back_changes_nothing(tmp_path, model, location, normalization):
    config = save_all(
        tmp_path, location, n_inputs=LOCATIONS[location], input_normalization=normalization
    )
    context = AutoencoderContext(config, "cpu")
    plain = run(model)
    torch.testing.assert_close(run(model, context.hooks()), plain, rtol=1e-5, atol=1e-5)
    assert (run(model, context.hooks(add_error=False)) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("normalization", ["none", "center", "layer_norm"])
@pytest.mark.parametrize("add_error", [True, False])
def test_an_edit_moves_the_activation_along_the_decoder(tmp_path, model, add_error, normalization):
    config = save_all(tmp_path, input_normalization=normalization)
    context = AutoencoderContext(config, "cpu")
    latent, layer = 4, 1
    seen = {}

    def add_two(latents, layer):
        seen[layer] = latents.clone()
        return latents.index_add(-1, torch.tensor([latent]), torch.full((1, 5, 1), 2.0))

    location = context.location.at(layer)
    before = model.capture(TOKENS, location)[location]
    hooks = context.hooks(on_latents=add_two, add_error=add_error, layers=[layer])
    after = model.capture(TOKENS, location, hooks=hooks)[location]
    ae = context.get_autoencoder(layer)
    assert list(seen) == [layer]
    torch.testing.assert_close(seen[layer], ae.encode(before))
    _, stats = ae.normalize(before)
    scale = 1.0 if stats is None or stats.std is None else stats.std
    base = before if add_error else ae.reconstruct(before)
    expected = base + 2 * get_decoder_weight(ae)[latent] * scale
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_splice(tmp_path, model):
    context = AutoencoderContext(save_all(tmp_path), "cpu")
    kept = {}

    def keep(latents, layer):
        latents.retain_grad()
        kept[layer] = latents
        return latents

    run(model, context.hooks(on_latents=keep)).logsumexp(-1).sum().backward()
    assert sorted(kept) == [0, 1, 2]
    assert all(latents.grad.abs().sum() > 0 for latents in kept.values())
    assert model.tok_embed.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_one_autoencoder_for_every_layer(tmp_path, model):
    make().save(tmp_path / "shared")
    config = AutoencoderConfig("resid_delta_mlp", {None: tmp_path / "shared"})
    context = AutoencoderContext(config, "cpu")
    layers = []

    def note(latents, layer):
        layers.append(layer)
        return latents

    hooks = context.hooks(on_latents=note)
    torch.testing.assert_close(run(model, hooks), run(model), rtol=1e-5, atol=1e-5)
    assert layers == [0, 1, 2]


def test_hooks_show_what_is_attached(tmp_path):
    context = AutoencoderContext(save_all(tmp_path), "cpu")
    assert "resid.torso.delta_mlp.fwd: AtLayers(2)" in repr(context.hooks(layers=[2]))


# ---- several locations -----------------------------------------------------------------------------


def test_multi_context(tmp_path, model):
    mlp = AutoencoderContext(save_all(tmp_path), "cpu")
    attn = AutoencoderContext(save_all(tmp_path, "resid_delta_attn"), "cpu")
    multi = MultiAutoencoderContext.from_autoencoder_context_list([mlp, attn])
    assert not multi.has_single_autoencoder_context
    assert multi.get_autoencoder_context("resid.delta_attn") is attn
    assert multi.get_autoencoder_context("3/resid_delta_mlp") is mlp
    assert multi.get_autoencoder(1, "resid_delta_mlp") is mlp.get_autoencoder(1)
    with pytest.raises(InputError, match="a location is needed to choose among"):
        multi.get_autoencoder(1)
    with pytest.raises(InputError, match=r"no autoencoders of mlp\.post_act. Locations: resid"):
        multi.get_autoencoder_context("mlp.post_act")
    with pytest.raises(
        InputError, match=r"two autoencoder contexts are of resid\.torso\.delta_mlp"
    ):
        MultiAutoencoderContext.from_autoencoder_context_list([mlp, mlp])
    multi.warmup()
    assert "3 loaded" in repr(attn)

    counts = []

    def count(latents):
        counts.append(1)
        return latents

    hooks = multi.hooks({"resid_delta_attn": count})
    torch.testing.assert_close(run(model, hooks), run(model), rtol=1e-5, atol=1e-5)
    assert len(counts) == 3

    single = MultiAutoencoderContext.from_context_or_multi_context(mlp)
    assert single is not None
    assert single.has_single_autoencoder_context
    assert single.get_autoencoder(0) is mlp.get_autoencoder(0)
    assert MultiAutoencoderContext.from_context_or_multi_context(multi) is multi
    assert MultiAutoencoderContext.from_context_or_multi_context(None) is None


def test_a_hook_for_one_layer_runs_in_that_layer_only(tmp_path, model):
    mlp = AutoencoderContext(save_all(tmp_path), "cpu")
    attn = AutoencoderContext(save_all(tmp_path, "resid_delta_attn"), "cpu")
    multi = MultiAutoencoderContext.from_autoencoder_context_list([mlp, attn])
    ran = []

    def note(name):
        def hook(latents, layer):
            ran.append((name, layer))
            return latents

        return hook

    given: dict[LocationLike, Hook] = {
        "2/resid_delta_mlp": note("a"),
        "blocks.1.hook_mlp_out": note("b"),
    }
    run(model, multi.hooks(given | {"resid_delta_mlp": note("c"), "0/resid_delta_attn": note("d")}))
    assert sorted(ran) == [("a", 2), ("b", 1), ("c", 0), ("c", 1), ("c", 2), ("d", 0)]
    ran.clear()
    run(model, multi.hooks(note("all"), layers=[2]))
    assert ran == [("all", 2), ("all", 2)]
    with pytest.raises(InputError, match=r"2/resid\.torso\.delta_mlp, where no autoencoder"):
        multi.hooks(given, layers=[0, 1])
    with pytest.raises(InputError, match=r"7/resid\.torso\.delta_mlp, where no autoencoder"):
        multi.hooks({"7/resid_delta_mlp": note("x")})
    with pytest.raises(InputError, match="the location is in layer 2, layer_index says 1"):
        multi.get_autoencoder(1, "2/resid_delta_mlp")


def test_a_hook_for_one_layer_of_an_autoencoder_for_all(tmp_path, model):
    make().save(tmp_path / "shared")
    config = AutoencoderConfig("resid_delta_mlp", {None: tmp_path / "shared"})
    multi = MultiAutoencoderContext.from_autoencoder_context_list(
        [AutoencoderContext(config, "cpu")]
    )
    layers = []

    def note(latents, layer):
        layers.append(layer)
        return latents

    run(model, multi.hooks({"1/resid_delta_mlp": note}))
    assert layers == [1]


def test_check_model_looks_at_the_layers_asked_for(tmp_path, model):
    config = save_all(tmp_path)
    paths = {0: config.paths[0], 9: config.paths[1]}
    context = AutoencoderContext(AutoencoderConfig("resid_delta_mlp", paths), "cpu")
    context.check_model(model, [0])
    with pytest.raises(LocationError, match="outside the model"):
        context.check_model(model)


@pytest.mark.parametrize("multi", [False, True])
def test_layers_are_one_or_several_and_each_counts_once(tmp_path, model, multi):
    context = AutoencoderContext(save_all(tmp_path), "cpu")
    asked: Any = context
    if multi:
        asked = MultiAutoencoderContext.from_autoencoder_context_list([context])
    seen = []

    def count(latents, layer):
        seen.append(layer)
        return latents

    for layers, expected in (
        (1, [1]),
        ([1], [1]),
        ([1, 1], [1]),
        ((2, 0, 2), [0, 2]),
        (None, [0, 1, 2]),
    ):
        seen.clear()
        run(model, asked.hooks(count, layers=layers))
        assert seen == expected
    seen.clear()
    run(model, asked.hooks(count, layers=(layer for layer in (0, 1))))
    assert seen == [0, 1]
    assert asked.hooks(count, layers=[]).is_empty()
    for wrong in (7, [0, 7], "1", ["1"], True, [1.5], 1.5, [[1]]):
        with pytest.raises(InputError, match=r"there is no autoencoder of .* in layer"):
            asked.hooks(count, layers=wrong)
    context.check_model(model, 1)
    for layer in (7, True, "1", [1]):
        with pytest.raises(InputError, match="there is no autoencoder of"):
            context.get_autoencoder(cast(int, layer))


# ---- latents left out ------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["none", "center", "layer_norm"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_dead_latents_nothing_else_changes(activation, tied, normalization):
    dead = (0, 3, 7, 11)
    whole = make(activation, tied=tied, input_normalization=normalization, dead=dead)
    assert count_dead_latents(whole) == 4
    pruned = omit_dead_latents(whole)
    assert isinstance(pruned, PrunedAutoencoder)
    assert pruned.encoder.weight.shape == (8, 8)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    expected = whole(x)
    assert expected.latents.shape[-1] == N_LATENTS
    alive = [i for i in range(N_LATENTS) if i not in dead]
    assert expected.latents[..., alive].any()
    for found in (pruned(x), copy.deepcopy(pruned)(x)):
        torch.testing.assert_close(found.latents, expected.latents)
        torch.testing.assert_close(found.recons, expected.recons)
        torch.testing.assert_close(
            found.latents_pre_act[..., alive], expected.latents_pre_act[..., alive]
        )
        assert not found.latents_pre_act[..., list(dead)].any()
    torch.testing.assert_close(pruned.encode(x), expected.latents)
    torch.testing.assert_close(
        pruned.encode_pre_act(x, slice(4, 7)), expected.latents_pre_act[..., 4:7]
    )
    stats = whole.normalize(x)[1]
    torch.testing.assert_close(pruned.decode(pruned.encode(x), stats), expected.recons)
    torch.testing.assert_close(get_decoder_weight(pruned)[alive], get_decoder_weight(whole)[alive])
    assert not get_decoder_weight(pruned)[list(dead)].any()
    assert torch.equal(pruned.latents_activation_frequency, whole.latents_activation_frequency)
    before = whole.latents_mean_square.clone()
    pruned.latents_mean_square.add_(1)
    assert torch.equal(whole.latents_mean_square, before)
    assert "in memory=8" in repr(pruned)
    assert pruned.n_latents == N_LATENTS


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sparse_way_is_the_dense_one(activation, grad):
    """Without a graph latents are never dense; indices are those of all latents."""
    pruned = omit_dead_latents(make(activation, dead=(0, 3, 7))).requires_grad_(grad)
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, latents, recons = pruned(x)
    assert latents.any()
    with torch.set_grad_enabled(grad):
        sparse = pruned.encode_sparse(x)
        torch.testing.assert_close(sparse.dense().detach(), latents)
        torch.testing.assert_close(pruned.reconstruct(x).detach(), recons)
        stats = pruned.normalize(x)[1]
        torch.testing.assert_close(pruned.decode(sparse, stats).detach(), recons)
        lost = sparse._replace(
            values=torch.ones_like(sparse.values), indices=torch.full_like(sparse.indices, 7)
        )
        with pytest.raises(InputError, match="latent 7 is not zero but was left out of memory"):
            pruned.decode(lost, stats)


def test_setting_a_latent_that_is_not_there_is_an_error():
    pruned = omit_dead_latents(make(dead=(3, 7)))
    for shape in ((), (2, 5)):
        latents = torch.zeros(*shape, N_LATENTS)
        latents[..., 2] = 1
        pruned.decode(latents)
        latents[..., 7] = 1
        with pytest.raises(InputError, match="latent 7 is not zero but was left out of memory"):
            pruned.decode(latents)


def test_the_least_active_go_wherever_they_are():
    whole = make(location="0/mlp.post_act", metadata={"a": 1}, model_name="m")
    frequency = whole.latents_activation_frequency
    frequency.copy_(torch.tensor([5.0, 0, 9, 9, 1, 7, 2, 9, 0, 4, 3, 8]) / 10)
    kept = [2, 3, 5, 7, 11]
    pruned = omit_least_active_latents(whole, 5)
    assert isinstance(pruned, PrunedAutoencoder)
    assert pruned.kept.tolist() == kept
    small = omit_least_active_latents(whole, 5, preserve_indices=False)
    assert type(small) is Autoencoder
    assert small.n_latents == 5
    assert (str(small.location), small.metadata, small.model_name) == (
        "0/mlp.post_act",
        {"a": 1},
        "m",
    )
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(small.encode(x), whole.encode(x)[:, kept])
    torch.testing.assert_close(pruned.encode(x)[:, kept], whole.encode(x)[:, kept])
    torch.testing.assert_close(small.reconstruct(x), pruned.reconstruct(x))
    assert small.latents_activation_frequency.tolist() == frequency[kept].tolist()
    assert omit_least_active_latents(whole, N_LATENTS) is whole
    # of 9, 9 and 9 the first
    fewest = omit_least_active_latents(whole, 2)
    assert isinstance(fewest, PrunedAutoencoder)
    assert fewest.kept.tolist() == [2, 3]


def test_pruning_topk_to_fewer_than_k():
    small = omit_least_active_latents(make("TopK"), 2, preserve_indices=False)
    assert repr(small.activation) == "TopK(k=2, postact_fn=ReLU)"


def test_what_cannot_be_pruned_or_saved(tmp_path):
    whole = make(dead=(3,))
    for bad in (0, N_LATENTS + 1):
        with pytest.raises(InputError, match=f"must lie in 1 to 12, found {bad}"):
            omit_least_active_latents(whole, bad)
    pruned = omit_dead_latents(whole)
    with pytest.raises(InputError, match="left out already"):
        omit_least_active_latents(pruned, 3)
    with pytest.raises(InputError, match="save or copy the whole one"):
        pruned.save(tmp_path / "ae")
    with pytest.raises(InputError, match="save or copy the whole one"):
        pruned.state_dict()
    whole.latents_activation_frequency.zero_()
    with pytest.raises(InputError, match="were not recorded"):
        count_dead_latents(whole)
    whole.latents_activation_frequency.fill_(1e-8)
    assert count_dead_latents(whole) == 0
    assert omit_dead_latents(whole) is whole


def test_context_that_omits_dead_latents(tmp_path, model):
    config = save_all(tmp_path, dead=(0, 4, 5))
    whole = AutoencoderContext(config, "cpu")
    pruned = AutoencoderContext(config, "cpu", omit_dead_latents=True)
    ae = pruned.get_autoencoder(1)
    assert isinstance(ae, PrunedAutoencoder)
    assert not any(p.requires_grad for p in ae.parameters())
    assert not ae.training
    assert pruned.num_autoencoder_directions == N_LATENTS

    def double(latents):
        return latents * 2

    for add_error in (True, False):
        torch.testing.assert_close(
            run(model, pruned.hooks(double, add_error)), run(model, whole.hooks(double, add_error))
        )


# ---- the registry ----------------------------------------------------------------------------------

SAE = "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small"


def test_names_of_gpt2_small():
    names = list_autoencoder_names()
    assert names[:5] == [
        "ae-mlp-post-act-v1",
        "ae-resid-delta-mlp-v1",
        "ae-mlp-post-act-v4",
        "ae-resid-delta-mlp-v4",
        "ae-resid-delta-attn-v4",
    ]
    assert len(names) == len(set(names)) == 32
    assert list_autoencoder_names("gpt2/small") == names
    assert list_autoencoder_names("gpt2-medium") == []
    assert list_autoencoder_names("tiny-tales") == [
        "ae-mlp-post-act",
        "ae-resid-delta-mlp",
        "ae-resid-delta-attn",
    ]


def test_all_156_published_files_are_named_once():
    paths: list[object] = []
    for name in filter(lambda name: name.startswith("ae-"), list_autoencoder_names()):
        spec = get_autoencoder_spec("gpt2-small", name)
        assert list(spec.autoencoder_path_by_layer_index) == list(range(12))
        paths += spec.autoencoder_path_by_layer_index.values()
        assert spec.input_normalization == ("layer_norm" if "-v5-" in name else "none")
    assert len(set(paths)) == 24 + 36 + 96


@pytest.mark.parametrize(
    ("name", "location", "path"),
    [
        ("ae-mlp-post-act-v1", "mlp.post_act", "mlp_post_act"),
        ("ae-resid-delta-attn-v4", "resid.torso.delta_attn", "resid_delta_attn_v4"),
        ("ae-resid-delta-mlp-v5-32k", "resid.torso.delta_mlp", "resid_delta_mlp_v5_32k"),
        ("ae-resid-post-attn-v5-128k", "resid.torso.post_attn", "resid_post_attn_v5_128k"),
        ("ae-resid-post-mlp-v5-32k", "resid.torso.post_mlp", "resid_post_mlp_v5_32k"),
    ],
)
def test_where_published_files_are(name, location, path):
    context = make_autoencoder_context("gpt2-small", name, "cpu")
    assert context.location == ActivationLocation(location)
    assert context.autoencoder_config.autoencoder_path_by_layer_index == {
        layer: f"{SAE}/{path}/autoencoders/{layer}.pt" for layer in range(12)
    }


def test_the_release_of_saelens_is_named_by_the_layer_before():
    """``hook_resid_pre`` of a layer is the stream after the one before; thirteen folders in all."""
    spec = get_autoencoder_spec("gpt2-small", "gpt2-small-res-jb")
    paths = {layer: str(path) for layer, path in spec.autoencoder_path_by_layer_index.items()}
    assert sorted(paths, key=str) == sorted(range(12), key=str)
    for layer, path in paths.items():
        hook = path.rpartition("/")[2]
        assert ActivationLocation.parse(hook) == ActivationLocation(str(spec.location), layer)
    first = get_autoencoder_spec("gpt2-small", "gpt2-small-res-jb-emb")
    (folder,) = first.autoencoder_path_by_layer_index.values()
    assert ActivationLocation.parse(str(folder).rpartition("/")[2]) == first.location
    assert spec.input_normalization == first.input_normalization == "center"


@pytest.mark.parametrize(
    ("name", "layers", "location", "normalization", "path"),
    [
        (
            "gpt2-small-res-jb-feature-splitting-1536",
            [7],
            "7/resid.torso.post_mlp",
            "center",
            "hf:jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8/blocks.8.hook_resid_pre_1536",
        ),
        (
            "gpt2-small-res_slefr-ajt",
            [1, 5, 9],
            "9/resid.torso.post_mlp",
            "center",
            "hf:neuronpedia/gpt2-small__res_slefr-ajt/10-res_slefr-ajt",
        ),
        (
            "gpt2-small-mlp-tm",
            list(range(12)),
            "8/resid.torso.delta_mlp",
            "center",
            "hf:tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_blocks.8.hook_mlp_out_24576:v1",
        ),
        (
            "gpt2-small-hook-z-kk",
            list(range(12)),
            "11/attn.v_out",
            None,
            "hf:ckkissane/attn-saes-gpt2-small-all-layers/gpt2-small_L11_Hcat_z_lr1.20e-03_l13.00e+00_"
            "ds24576_bs4096_dc3.16e-06_rsanthropic_rie25000_nr4_v9.pt",
        ),
        (
            "gpt2-transcoders",
            list(range(12)),
            "11/resid.torso.ln_mlp.post_scale",
            None,
            "hf:pchlenski/gpt2-transcoders/final_sparse_autoencoder_gpt2-small_blocks.11.ln2."
            "hook_normalized_24576.pt",
        ),
    ],
)
def test_other_releases_for_gpt2_small(name, layers, location, normalization, path):
    spec = get_autoencoder_spec("gpt2-small", name)
    paths = {layer: str(p) for layer, p in spec.autoencoder_path_by_layer_index.items()}
    assert list(paths) == layers
    place = ActivationLocation.parse(location)
    assert spec.location == place.at(None)
    assert paths[place.layer] == path
    assert spec.input_normalization == normalization


@pytest.mark.parametrize(
    ("model_name", "name", "message"),
    [
        ("gpt2-small", "ae-mlp-post-act-v2", r"for gpt2-small. Did you mean 'ae-mlp-post-act-v"),
        (
            "gpt2",
            "ae-mlp-post-act",
            "There is one of that name for tiny-tales. Known for gpt2-small",
        ),
        ("gpt2-xl", "ae-mlp-post-act-v1", "Known for gpt2-xl: none"),
        ("gpt3-small", "ae-mlp-post-act-v1", "no model 'gpt3-small'.*'gpt2-small'"),
    ],
)
def test_unknown_names(model_name, name, message):
    with pytest.raises(SourceError, match=message):
        make_autoencoder_context(model_name, name, "cpu")


def test_packaged_autoencoders(tmp_path, monkeypatch, model):
    monkeypatch.setattr(model_registry, "ASSETS", tmp_path)
    with pytest.raises(SourceError, match=r"of tiny-tales at mlp\.post_act .* missing from this"):
        make_autoencoder_context("tiny-tales", "ae-mlp-post-act", "cpu")
    root = tmp_path / "tiny-tales" / "autoencoders"
    save_all(root, "resid.torso.delta_mlp")
    save_all(root, "resid_delta_attn", layers=[0, 2])
    context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", "cpu")
    assert context.layer_indices == {0, 1, 2}
    context.check_model(model)
    torch.testing.assert_close(run(model, context.hooks()), run(model), rtol=1e-5, atol=1e-5)
    attn = make_autoencoder_context("tiny-tales", "ae-resid-delta-attn", "cpu", True)
    assert attn.layer_indices == {0, 2}
    assert attn.omit_dead_latents


def test_hooks_are_an_ordinary_tree(tmp_path):
    context = AutoencoderContext(save_all(tmp_path), "cpu")
    assert isinstance(context.hooks(), TransformerHooks)
    assert context.hooks(layers=[]).is_empty()
    with pytest.raises(InputError, match="layer 7"):
        context.hooks(layers=[7])
