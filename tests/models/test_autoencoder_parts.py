"""What others' autoencoders have and OpenAI's have not: output biases, skips, gates, groups, …"""

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuron_explainer.errors import CheckpointError, InputError, NeuronExplainerError
from neuron_explainer.models.autoencoder import Autoencoder, InputStats, JumpReLU, TopK
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.fista import fista
from neuron_explainer.models.autoencoders.nonlinearities import (
    Fista,
    Gated,
    GroupMax,
    make_activation,
)
from neuron_explainer.models.autoencoders.pruned import omit_least_active_latents
from neuron_explainer.models.checkpoints.autoencoders.state import select_latents
from neuron_explainer.models.hooks import AutoencoderHooks

N, L, OUT = 5, 12, 3

PARTS: dict[str, dict[str, Any]] = {
    "post_bias": {"post_bias": True},
    "skip": {"skip": True},
    "glu": {"glu": True},
    "transcoder": {"n_outputs": OUT, "output_location": "3/resid_delta_mlp"},
    "skip transcoder": {"n_outputs": OUT, "skip": True},
    "square transcoder": {"n_outputs": N},
    "groups": {"group_sizes": [2, 4, 6]},
    "all": {"post_bias": True, "skip": True, "glu": True, "group_sizes": [2, 10]},
    "tied skip": {"tied": True, "skip": True, "post_bias": True},
}
NORMALIZATIONS = ("none", "center", "layer_norm", "rms")


def make(
    activation: nn.Module | None = None, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Autoencoder:
    torch.manual_seed(0)
    ae = Autoencoder(L, N, activation, location="3/mlp.post_act", **kwargs)
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ae.latents_activation_frequency.copy_(torch.rand(L))
    return ae.to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*shape, N, generator=generator, dtype=torch.float64) * 3 + 1).to(dtype)


def numpy_recons(ae: Autoencoder, x: Any) -> Any:
    """The reconstruction of one row, again."""
    p = {name: value.detach().numpy() for name, value in ae.named_parameters()}
    mean, std, eps = 0.0, 1.0, 0.0
    if ae.input_normalization in ("center", "layer_norm"):
        mean = sum(x) / N
    if ae.input_normalization == "layer_norm":
        std, eps = math.sqrt(sum((v - mean) ** 2 for v in x) / (N - 1)), 1e-5
    if ae.input_normalization == "rms":
        std = math.sqrt(sum(v * v for v in x) / N)
    centred = (x - mean) / (std + eps) - p["pre_bias"]
    latents = p["encoder.weight"] @ centred + p["latent_bias"]
    if "glu.weight" in p:
        latents = latents / (1 + np.exp(-(p["glu.weight"] @ centred + p["glu.bias"])))
    decoder = p["encoder.weight"].T if ae.tied else p["decoder.weight"]
    out = decoder @ np.maximum(0, latents) + p.get("post_bias", p["pre_bias"])
    if not ae.is_transcoder:
        out = out * std + mean
    return out + p["skip.weight"] @ x if "skip.weight" in p else out


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("parts", PARTS)
def test_every_part_is_its_formula(parts, normalization):
    ae = make(input_normalization=normalization, **PARTS[parts])
    x = inputs(2, 3)
    out = ae(x)
    expected = np.stack([numpy_recons(ae, row) for row in x.flatten(0, 1).numpy()])
    np.testing.assert_allclose(out.recons.detach().flatten(0, 1).numpy(), expected, rtol=1e-10)
    assert torch.equal(ae.decode(ae.encode(x), ae.normalize(x)[1]), out.recons)
    torch.testing.assert_close(ae(x[1, 2]).recons, out.recons[1, 2])
    assert ae(x[:0]).recons.shape == (0, 3, ae.n_outputs)
    some = slice(3, 7)
    torch.testing.assert_close(ae.encode_pre_act(x, some), out.latents_pre_act[..., some])
    weights = tuple(ae.parameters())
    assert torch.autograd.gradcheck(lambda *_: ae(x[0, :1]).recons, weights)


@pytest.mark.parametrize("parts", PARTS)
def test_every_round_trip(tmp_path, parts):
    ae = make(input_normalization="rms", dtype=torch.float32, **PARTS[parts])
    x = inputs(4, dtype=torch.float32)
    file = io.BytesIO()
    torch.save(ae.state_dict(), file)
    file.seek(0)
    copies = [
        Autoencoder.from_state_dict(
            torch.load(file, weights_only=True),
            location=ae.location,
            output_location=ae.output_location,
        )
    ]
    ae.save(tmp_path / "folder")
    copies.append(Autoencoder.load(tmp_path / "folder"))
    fresh = make(input_normalization="rms", dtype=torch.float32, **PARTS[parts])
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(ae.state_dict())
    for new in (*copies, fresh):
        assert torch.equal(new.reconstruct(x), ae.reconstruct(x))
        assert repr(new) == repr(ae)
        assert list(new.state_dict()) == list(ae.state_dict())
    for fact in ("n_outputs", "is_transcoder", "group_sizes", "location", "output_location"):
        assert getattr(copies[1], fact) == getattr(ae, fact)


def test_state_dicts_of_autoencoders_without_them_have_no_new_keys(tmp_path):
    assert list(Autoencoder(L, N).state_dict()) == [
        "pre_bias",
        "latent_bias",
        "stats_last_nonzero",
        "latents_activation_frequency",
        "latents_mean_square",
        "encoder.weight",
        "decoder.weight",
        "activation",
        "activation_state_dict",
    ]
    make(n_outputs=OUT, group_sizes=[4, 8]).save(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["n_outputs"], config["group_sizes"]) == (OUT, [4, 8])


def test_a_vector_of_zeros_stays_one_under_rms():
    ae = make(input_normalization="rms")
    x = inputs(2)
    x[0] = 0
    x_hat, stats = ae.normalize(x)
    assert not x_hat[0].any()
    torch.testing.assert_close(x_hat[1].norm(), torch.tensor(math.sqrt(N), dtype=torch.float64))
    assert stats is not None
    assert stats.mean is None
    assert not ae.reconstruct(x)[0].any()
    assert torch.isfinite(ae(x).latents).all()


def test_scale_goes_through_rms():
    ae, x = make(input_normalization="rms"), inputs(4)
    torch.testing.assert_close(ae.encode(x * 100), ae.encode(x))
    torch.testing.assert_close(ae.reconstruct(x * 100), ae.reconstruct(x) * 100)


def test_decode_asks_for_what_it_needs():
    skip, x = make(skip=True), inputs(3)
    with pytest.raises(InputError, match="decode needs stats, because it has a skip connection"):
        skip.decode(skip.encode(x))
    for normalization in NORMALIZATIONS[1:]:
        stats = make(input_normalization=normalization).normalize(x)[1]
        with pytest.raises(
            InputError, match="these stats are not those of 'none' normalisation with a sk"
        ):
            skip.decode(skip.encode(x), stats)
    layer_norm = make(input_normalization="layer_norm")
    with pytest.raises(InputError, match="not those of 'layer_norm' normalisation without a skip"):
        layer_norm.decode(layer_norm.encode(x), make(input_normalization="rms").normalize(x)[1])
    transcoder = make(n_outputs=OUT, input_normalization="layer_norm")
    assert torch.equal(transcoder.decode(transcoder.encode(x)), transcoder.reconstruct(x))
    assert InputStats(None, None).skip is None


def test_prefixes():
    ae, x = make(group_sizes=[2, 4, 6], input_normalization="layer_norm"), inputs(3)
    latents, stats = ae.encode(x), ae.normalize(x)[1]
    assert torch.equal(ae.decode_prefix(latents, L, stats), ae.decode(latents, stats))
    short = latents.clone()
    short[..., 6:] = 0
    assert torch.equal(ae.decode_prefix(latents, 6, stats), ae.decode(short, stats))
    for bad in (-1, 13, 2.0, None):
        with pytest.raises(InputError, match="n_latents must lie in 0 to 12"):
            ae.decode_prefix(latents, bad, stats)  # type: ignore[arg-type]


def test_hooks_carry_the_skip_connection_along():
    ae, x = make(skip=True, dtype=torch.float32), inputs(2, 3, dtype=torch.float32)
    hooks = AutoencoderHooks.from_autoencoder(ae)
    torch.testing.assert_close(hooks._run(x, (), {}, "test"), ae.reconstruct(x))


def test_a_transcoder_cannot_take_the_place_of_its_input(tmp_path):
    make(n_outputs=N).save(tmp_path / "transcoder")
    config = AutoencoderConfig("mlp.post_act", {3: tmp_path / "transcoder"})
    context = AutoencoderContext(config, "cpu")
    assert context.get_autoencoder(3).is_transcoder  # encoding with it is fine
    with pytest.raises(InputError, match=r"of 3/mlp\.post_act: is a transcoder"):
        context.hooks()


# ---- activations ---------------------------------------------------------------------------------


def gated() -> Gated:
    torch.manual_seed(3)
    return Gated(*(torch.randn(L) for _ in range(3)))


def test_gated_is_its_formula_and_hides_no_nan():
    activation = gated()
    x = torch.randn(7, L)
    expected = [
        [
            max(0.0, math.exp(r) * value + m) if value + g > 0 else 0.0
            for value, g, r, m in zip(
                row,
                activation.b_gate.tolist(),
                activation.r_mag.tolist(),
                activation.b_mag.tolist(),
                strict=True,
            )
        ]
        for row in x.tolist()
    ]
    torch.testing.assert_close(activation(x).detach(), torch.tensor(expected))
    x[2, 3] = float("nan")
    assert activation(x).isnan().nonzero().tolist() == [[2, 3]]


def test_group_max_keeps_one_of_each_group():
    x = torch.tensor([[1.0, 3.0, -1.0, -2.0, 5.0, 5.0], [-1.0, -3.0, 2.0, 0.0, 0.0, 7.0]])
    kept = GroupMax(3)(x)
    assert kept.tolist()[1] == [0, 0, 2, 0, 0, 7]
    assert kept[0, :4].tolist() == [0, 3, 0, 0]
    assert sorted(kept[0, 4:].tolist()) == [0, 5]
    x[0, 0] = float("nan")
    assert GroupMax(3)(x)[0].isnan().any()
    assert GroupMax(2)(x[1]).shape == (6,)
    with pytest.raises(InputError, match="6 latents are not 4 equal groups"):
        GroupMax(4)(x)


@pytest.mark.parametrize("make_one", [gated, lambda: GroupMax(4), lambda: Fista(0.2, 50)])
def test_activation_round_trips(tmp_path, make_one):
    activation = make_one()
    tied = isinstance(activation, Fista)
    ae = make(activation, tied=tied, dtype=torch.float32)
    ae.save(tmp_path / "ae")
    new = Autoencoder.load(tmp_path / "ae")
    x = inputs(4, dtype=torch.float32)
    assert repr(new) == repr(ae)
    assert torch.equal(new.encode(x), ae.encode(x))
    fresh = make(make_one(), tied=tied, dtype=torch.float32)
    fresh.load_state_dict(ae.state_dict())
    assert torch.equal(fresh.encode(x), ae.encode(x))


def test_an_autoencoder_that_codes_by_fista():
    ae = make(Fista(0.3, 2000, 1e-9), tied=True)
    with torch.no_grad():
        ae.latent_bias.zero_()
        ae.encoder.weight /= ae.encoder.weight.norm(dim=1, keepdim=True)
    x = inputs(2, 3)
    code = fista(
        x - ae.pre_bias, ae.decoder.weight, 0.3, max_iterations=2000, tolerance=1e-9
    ).latents
    torch.testing.assert_close(ae.encode(x), code)
    torch.testing.assert_close(ae(x).recons, code @ ae.encoder.weight + ae.pre_bias)
    with pytest.raises(InputError, match="no gradient runs through a sparse code"):
        ae.encode(x).sum().backward()


# ---- fewer latents -------------------------------------------------------------------------------


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_latents_are_left_out_of_every_part(parts, preserve):
    activation = gated() if parts == "post_bias" else None
    ae = make(activation, input_normalization="layer_norm", **PARTS[parts])
    pruned = omit_least_active_latents(ae, 7, preserve_indices=preserve)
    order = ae.latents_activation_frequency.argsort(descending=True)
    kept = order[:7].sort().values
    x = inputs(4)
    latents = ae.encode(x)
    found = pruned.encode(x)
    torch.testing.assert_close(found[:, kept] if preserve else found, latents[:, kept])
    masked = torch.zeros_like(latents).index_copy(1, kept, latents[:, kept])
    torch.testing.assert_close(pruned.reconstruct(x), ae.decode(masked, ae.normalize(x)[1]))
    assert pruned.is_transcoder == ae.is_transcoder
    assert pruned.output_location == ae.output_location
    assert pruned.group_sizes == (ae.group_sizes if preserve else None)


@pytest.mark.parametrize("activation", [GroupMax(4), Fista(0.1)])
def test_latents_that_depend_on_each_other_are_not_left_out(activation):
    ae = make(activation, tied=True)
    with pytest.raises(InputError, match="latents cannot be left out"):
        select_latents(ae.state_dict(), torch.arange(3))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_outputs": 0}, "n_outputs must be a whole number >= 1, found 0"),
        ({"n_outputs": OUT, "tied": True}, "a transcoder's decoder cannot be tied"),
        ({"output_location": "3/mlp.post_act"}, "output_location is for transcoders"),
        ({"group_sizes": [4, 4]}, r"add up to the 12 latents, found \[4, 4\]"),
        ({"group_sizes": [12, 0]}, "group_sizes must be whole numbers >= 1"),
        ({"group_sizes": "12"}, "group_sizes must be whole numbers >= 1"),
        ({"activation": Fista(0.1)}, "Fista codes an input .*tied=True"),
        ({"activation": GroupMax(5)}, "GroupMax: 12 latents are not 5 equal groups"),
        ({"activation": Gated(*torch.zeros(3, 4))}, "Gated: b_gate has 4 numbers for 12 latents"),
    ],
)
def test_bad_construction(kwargs, message):
    with pytest.raises(NeuronExplainerError, match=message):
        Autoencoder(L, N, **kwargs)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Gated", {"b_gate": torch.zeros(3)}, "Gated: expected a tensor 'r_mag'"),
        (
            "Gated",
            {"b_gate": torch.zeros(3), "r_mag": torch.zeros(2), "b_mag": torch.zeros(3)},
            r"Gated: r_mag must be .* found shape \[2\]",
        ),
        ("GroupMax", {}, "GroupMax: the field 'k' is missing"),
        ("GroupMax", {"k": 0}, "k must be a whole number >= 1, found 0"),
        ("Fista", {"penalty": 0.1, "tolerance": 0.1}, "the field 'max_iterations' is missing"),
    ],
)
def test_bad_activations(name, fields, message):
    with pytest.raises(NeuronExplainerError, match=message):
        make_activation(name, fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_outputs": 4}, r"decoder\.weight: expected shape \[4, 12\], found \[3, 12\]"),
        ({"n_outputs": True}, "n_outputs is True, expected a whole number"),
        ({"n_outputs": None}, r"decoder\.weight: expected shape \[5, 12\]"),
        ({"post_bias": None}, "post_bias: missing"),
        ({"post_bias": torch.zeros(5)}, r"post_bias: expected shape \[3\], found \[5\]"),
        ({"glu.bias": None}, r"glu\.bias: missing"),
        ({"glu.weight": torch.zeros(2, 5)}, r"glu\.weight: expected shape \[12, 5\]"),
        ({"skip.weight": torch.zeros(5, 5)}, r"skip\.weight: expected shape \[3, 5\]"),
        ({"skip.weight": torch.full((3, 5), float("nan"))}, r"skip\.weight: holds NaN"),
        ({"group_sizes": [1]}, "add up to the 12 latents"),
    ],
)
def test_bad_state_dicts(changes, message):
    state: dict[str, Any] = dict(make(n_outputs=OUT, skip=True, glu=True).state_dict()) | changes
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        Autoencoder.from_state_dict(state)


def test_state_dicts_of_another_kind_are_refused():
    with pytest.raises(CheckpointError, match="n_outputs is None, the state dict says 3"):
        make().load_state_dict(make(n_outputs=OUT).state_dict())
    with pytest.raises(
        CheckpointError, match=r"group_sizes is \[2, 10\], the state dict says None"
    ):
        make(group_sizes=[2, 10]).load_state_dict(make().state_dict())
    with pytest.raises(RuntimeError, match="post_bias"):
        make().load_state_dict(make(post_bias=True).state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_outputs": "3"}, "n_outputs: expected a whole number, found '3'"),
        ({"n_outputs": 4}, r"decoder\.weight: expected shape \[4, 12\]"),
        ({"output_location": "x/y"}, "expected a location"),
        ({"group_sizes": [1, 2]}, "add up to the 12 latents"),
    ],
)
def test_bad_configs(tmp_path, changes, message):
    make(TopK(3), n_outputs=OUT).save(tmp_path / "ae")
    path = tmp_path / "ae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        Autoencoder.load(tmp_path / "ae")


def test_output_locations_agree_or_are_added(tmp_path):
    make(JumpReLU(torch.ones(L)), n_outputs=OUT).save(tmp_path / "transcoder")
    ae = Autoencoder.load(tmp_path / "transcoder", output_location="3/resid_delta_mlp")
    assert str(ae.output_location) == "3/resid.torso.delta_mlp"
    ae.save(tmp_path / "told")
    with pytest.raises(CheckpointError, match=r"says location '3/resid.*the call says '4/resid"):
        Autoencoder.load(tmp_path / "told", output_location="4/resid_delta_mlp")
    make().save(tmp_path / "autoencoder")
    with pytest.raises(CheckpointError, match="not of a transcoder"):
        Autoencoder.load(tmp_path / "autoencoder", output_location="4/resid_delta_mlp")
