"""Autoencoders: every formula against numpy in float64, every round trip byte for byte."""

import copy
import io
import json
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neuron_explainer.errors import CheckpointError, InputError, NeuronExplainerError
from neuron_explainer.models.autoencoder import (
    ACTIVATIONS_CLASSES,
    Autoencoder,
    AutoencoderOutput,
    BatchTopK,
    InputNormalization,
    InputStats,
    JumpReLU,
    TiedTranspose,
    TopK,
    UnstatedNormalizationWarning,
)
from neuron_explainer.models.autoencoders.nonlinearities import activation_name, make_activation
from neuron_explainer.models.locations import ActivationLocation

N_LATENTS, N_INPUTS = 12, 5

ACTIVATIONS = {
    "ReLU": lambda: nn.ReLU(),
    "Identity": lambda: nn.Identity(),
    "TopK": lambda: TopK(3),
    "TopK-identity": lambda: TopK(3, nn.Identity()),
    "JumpReLU": lambda: JumpReLU(torch.linspace(0.0, 1.5, N_LATENTS)),
    "BatchTopK": lambda: BatchTopK(0.7, k=3),
}
NORMALIZATIONS = get_args(InputNormalization)


def make(activation="ReLU", tied=False, normalization="none", dtype=torch.float32, **kwargs):
    """An autoencoder in which every parameter and statistic has a value of its own."""
    generator = torch.Generator().manual_seed(0)
    ae = Autoencoder(
        N_LATENTS,
        N_INPUTS,
        ACTIVATIONS[activation](),
        tied,
        input_normalization=normalization,
        **kwargs,
    )
    with torch.no_grad():
        for parameter in (ae.pre_bias, ae.latent_bias, ae.encoder.weight, ae.decoder.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ae.stats_last_nonzero += torch.arange(N_LATENTS)
    ae.latents_activation_frequency *= torch.rand(N_LATENTS, generator=generator) * 1e-8
    ae.latents_mean_square += torch.rand(N_LATENTS, generator=generator)
    return ae.to(dtype)


def inputs(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, N_INPUTS, generator=generator, dtype=torch.float64) * 3 + 1).to(
        dtype
    )


# ---- the formulas, again, one row at a time --------------------------------------------------------


def numpy_activation(name, ae, z):
    if name == "Identity":
        return z
    if name == "ReLU":
        return np.maximum(z, 0)
    if name.startswith("TopK"):
        out = np.zeros_like(z)
        for i in sorted(range(len(z)), key=lambda i: -z[i])[:3]:
            out[i] = z[i] if name == "TopK-identity" else max(z[i], 0)
        return out
    threshold = np.broadcast_to(ae.activation.threshold.detach().double().numpy(), z.shape)
    return np.array([v if v > t and v > 0 else 0.0 for v, t in zip(z, threshold, strict=True)])


def numpy_forward(name, ae, x):
    """Pre-activations, latents, reconstruction of one input vector, in float64."""
    p = {k: v.detach().double().numpy() for k, v in ae.named_parameters()}
    mean, std, eps = 0.0, 1.0, 0.0
    if ae.input_normalization in ("center", "layer_norm"):
        mean = sum(x) / len(x)
    if ae.input_normalization == "layer_norm":
        std, eps = (sum((v - mean) ** 2 for v in x) / (len(x) - 1)) ** 0.5, 1e-5
    if ae.input_normalization == "rms":
        std = (sum(v**2 for v in x) / len(x)) ** 0.5
    x_hat = (x - mean) / (std + eps)
    pre = p["encoder.weight"] @ (x_hat - p["pre_bias"]) + p["latent_bias"]
    latents = numpy_activation(name, ae, pre)
    decoder = p["encoder.weight"].T if ae.tied else p["decoder.weight"]
    return pre, latents, (decoder @ latents + p["pre_bias"]) * std + mean


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_the_formula(activation, tied, normalization):
    ae = make(activation, tied, normalization)
    x = inputs(7)
    out = ae(x)
    assert isinstance(out, AutoencoderOutput)
    expected = [numpy_forward(activation, ae, row) for row in x.double().numpy()]
    for found, want in zip(out, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), np.stack(want), rtol=2e-5, atol=2e-5)
    assert torch.equal(ae.encode(x), out.latents)
    assert torch.equal(ae.encode_pre_act(x), out.latents_pre_act)
    assert torch.equal(ae.reconstruct(x), out.recons)
    assert torch.equal(ae.decode(ae.encode(x), ae.normalize(x)[1]), out.recons)
    part = slice(3, 8)
    torch.testing.assert_close(ae.encode_pre_act(x, part), out.latents_pre_act[:, part])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_axes_do_not_matter(activation, normalization):
    ae = make(activation, normalization=normalization, dtype=torch.float64)
    x = inputs(2, 3, dtype=torch.float64)
    whole = ae(x)
    for i in range(2):
        for j in range(3):
            for got, want in zip(ae(x[i, j]), whole, strict=True):
                torch.testing.assert_close(got, want[i, j])
    assert ae(x[:0]).recons.shape == (0, 3, N_INPUTS)


def test_layer_norm_uses_the_unbiased_deviation_and_adds_eps_to_it():
    ae = make(normalization="layer_norm", dtype=torch.float64)
    x = torch.tensor([1.0, 2.0, 4.0, 5.0, 8.0], dtype=torch.float64) * 1e-5
    x_hat, stats = ae.normalize(x)
    mean, std = 4e-5, np.sqrt((9 + 4 + 0 + 1 + 16) / 4) * 1e-5
    np.testing.assert_allclose(x_hat.numpy(), (x.numpy() - mean) / (std + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(stats.mean.numpy(), [mean], rtol=1e-12)
    np.testing.assert_allclose(stats.std.numpy(), [std], rtol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_scale_and_shift_of_the_input_go_through_layer_norm(normalization):
    ae = make(normalization=normalization, dtype=torch.float64)
    x = inputs(4, dtype=torch.float64)
    same = torch.allclose(ae.encode(x), ae.encode(x * 100 + 7), rtol=1e-4)
    assert same == (normalization == "layer_norm")


# ---- decode and its statistics ---------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["center", "layer_norm"])
def test_decode_asks_for_what_it_needs_and_remembers_nothing(normalization):
    ae = make(normalization=normalization)
    first, second = inputs(3, seed=1), inputs(3, seed=2)
    latents, stats = ae.encode(first), ae.normalize(first)[1]
    expected = ae.reconstruct(first)
    ae.encode(second)
    ae(second)
    assert torch.equal(ae.decode(latents, stats), expected)
    with pytest.raises(InputError, match="decode needs stats"):
        ae.decode(latents)
    other = "layer_norm" if normalization == "center" else "center"
    with pytest.raises(InputError, match="these stats are not those of"):
        ae.decode(latents, make(normalization=other).normalize(first)[1])


def test_without_normalisation_decode_needs_no_stats():
    ae = make()
    x = inputs(3)
    assert ae.normalize(x)[1] is None
    assert torch.equal(ae.decode(ae.encode(x)), ae.reconstruct(x))


@pytest.mark.parametrize("training", [False, True])
def test_forward_changes_no_statistics(training):
    ae = make().train(training)
    before = {name: buffer.clone() for name, buffer in ae.named_buffers()}
    ae(inputs(7))
    for name, buffer in ae.named_buffers():
        assert torch.equal(buffer, before[name])


# ---- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_derivatives(activation, tied, normalization):
    # Away from the kinks, where the function is differentiable: the seed keeps a distance.
    ae = make(activation, tied, normalization, dtype=torch.float64)
    x = inputs(2, dtype=torch.float64).requires_grad_()
    weights = (x, ae.pre_bias, ae.latent_bias, ae.encoder.weight)
    assert torch.autograd.gradcheck(lambda x, *_: tuple(ae(x)), weights)


def test_the_threshold_of_jumprelu_gets_no_gradient_here():
    ae = make("JumpReLU")
    ae(inputs(3)).recons.sum().backward()
    assert ae.activation.threshold.grad is None or not ae.activation.threshold.grad.any()


# ---- latent activations -----------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(1, 6),
)
@settings(deadline=None, max_examples=60)
def test_topk_keeps_k_also_among_equals(rows, k):
    z = torch.tensor(rows, dtype=torch.float32)
    kept = TopK(k, nn.Identity())(z)
    for row, out in zip(rows, kept.tolist(), strict=True):
        # zeros among the kept cannot be told from the rest, so compare what is not zero
        expected = [v for v in sorted(row, reverse=True)[:k] if v != 0]
        assert sorted((v for v in out if v != 0), reverse=True) == expected
        assert all(o in (0, v) for o, v in zip(out, row, strict=True))
    assert torch.equal(TopK(k)(z), torch.relu(kept))


def test_equal_to_the_threshold_is_off():
    z = torch.tensor([0.5, 0.5000001, 0.4, -1.0])
    expected = [0.0, z[1].item(), 0.0, 0.0]
    assert BatchTopK(0.5)(z).tolist() == expected
    assert JumpReLU(torch.full((4,), 0.5))(z).tolist() == expected
    assert BatchTopK(-2.0)(z).tolist() == torch.relu(z).tolist()  # never a negative latent


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden(activation):
    ae = make(activation)
    x = inputs(3)
    x[1, 2] = float("nan")
    bad = ae.reconstruct(x).isnan().all(dim=-1)
    assert bad.tolist() == [False, True, False]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_round_trip(name):
    activation = ACTIVATIONS[name]()
    state = activation.state_dict()
    new = make_activation(activation_name(activation), state)
    assert type(new) is type(activation)
    assert repr(new) == repr(activation)
    assert set(new.state_dict()) == set(state)


def test_topk_state_dict_is_that_of_the_original():
    assert dict(TopK(3).state_dict()) == {"k": 3, "postact_fn": "ReLU"}
    assert repr(TopK.from_state_dict({"k": torch.tensor(3)})) == "TopK(k=3, postact_fn=ReLU)"
    topk = TopK(1)
    topk.load_state_dict({"k": 4, "postact_fn": "Identity"})
    assert repr(topk) == "TopK(k=4, postact_fn=Identity)"
    batch = BatchTopK(1.0)
    batch.load_state_dict(BatchTopK(0.25, k=9).state_dict())
    assert repr(batch) == "BatchTopK(threshold=0.25, k=9)"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Topk", {"k": 3}, r"unknown latent activation 'Topk'.* Did you mean 'TopK'.*Known: ReLU"),
        ("GELU", {}, "Known: ReLU, Identity, TopK, JumpReLU, BatchTopK"),
        ("TopK", {}, "TopK: the field .k. is missing"),
        ("TopK", {"k": 0}, "found 0"),
        ("TopK", {"k": True}, "found True"),
        ("TopK", {"k": 2.5}, "found 2.5"),
        ("TopK", {"k": 3, "postact_fn": "Relu"}, "unknown postact_fn 'Relu'.*ReLU"),
        ("TopK", {"k": 3, "j": 1}, "unknown field 'j'"),
        ("ReLU", {"k": 3}, "unknown field 'k'"),
        ("JumpReLU", {}, "expected a tensor 'threshold'"),
        ("JumpReLU", {"threshold": torch.zeros(2, 2)}, r"found shape \[2, 2\]"),
        ("BatchTopK", {"threshold": torch.zeros(2)}, "one finite"),
        ("BatchTopK", {"threshold": torch.tensor(float("nan"))}, "one finite"),
    ],
)
def test_bad_activations(name, fields, message):
    with pytest.raises(NeuronExplainerError, match=message):
        make_activation(name, fields)


def test_activations_that_do_not_fit():
    with pytest.raises(InputError, match=r"TopK\(k=5\) on 4 latents"):
        TopK(5)(torch.zeros(4))
    with pytest.raises(InputError, match="expected 3 latents"):
        JumpReLU(torch.zeros(3))(torch.zeros(1))
    with pytest.raises(InputError, match=r"TopK\(k=9\) on 4 latents"):
        Autoencoder(4, 3, TopK(9))
    with pytest.raises(InputError, match="threshold has 3 numbers for 4 latents"):
        Autoencoder(4, 3, JumpReLU(torch.zeros(3)))
    with pytest.raises(InputError, match="activation must be a module"):
        Autoencoder(4, 3, cast(Any, torch.relu))
    with pytest.raises(InputError, match="cannot be stored"):
        TopK(1, nn.Tanh()).state_dict()
    with pytest.raises(InputError, match="unknown latent activation Tanh"):
        Autoencoder(4, 3, nn.Tanh()).state_dict()
    assert list(ACTIVATIONS_CLASSES)[:5] == ["ReLU", "Identity", "TopK", "JumpReLU", "BatchTopK"]


# ---- construction and bad input ---------------------------------------------------------------------


def test_a_new_autoencoder_is_that_of_the_original():
    ae = Autoencoder(12, 5)
    shapes = {
        key: (tuple(value.shape), value.dtype)
        for key, value in ae.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    assert shapes == {
        "pre_bias": ((5,), torch.float32),
        "latent_bias": ((12,), torch.float32),
        "stats_last_nonzero": ((12,), torch.int64),
        "latents_activation_frequency": ((12,), torch.float32),
        "latents_mean_square": ((12,), torch.float32),
        "encoder.weight": ((12, 5), torch.float32),
        "decoder.weight": ((5, 12), torch.float32),
    }
    rest = {k: v for k, v in ae.state_dict().items() if k not in shapes}
    assert rest == {"activation": "ReLU", "activation_state_dict": {}}
    assert not ae.pre_bias.any()
    assert not ae.latent_bias.any()
    assert (ae.latents_activation_frequency == 1).all()
    tied = Autoencoder(12, 5, tied=True)
    assert isinstance(tied.decoder, TiedTranspose)
    assert torch.equal(tied.decoder.weight, tied.encoder.weight.T)
    assert tied.decoder.bias is None
    assert len(list(tied.parameters())) == 3
    assert set(tied.state_dict()) == {*ae.state_dict(), "tied"} - {"decoder.weight"}


def test_repr_says_what_it_is():
    ae = make("TopK", normalization="center", location="3/mlp_post_act", model_name="gpt2-small")
    assert repr(ae) == (
        "Autoencoder(n_latents=12, n_inputs=5, activation=TopK(k=3, postact_fn=ReLU), tied=False, "
        "input_normalization='center', location='3/mlp.post_act', model_name='gpt2-small', "
        "dtype=torch.float32)"
    )


def test_wrong_tensors_are_named():
    ae = make(location="3/mlp.post_act")
    with pytest.raises(InputError, match=r"of 3/mlp\.post_act: expected input of width 5 .*\[2, 6"):
        ae(torch.zeros(2, 6))
    with pytest.raises(InputError, match=r"expected latents of width 12 .*\[2, 5\]"):
        ae.decode(torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"expected input of width 5 .*\[\]"):
        ae.encode(torch.tensor(1.0))
    with pytest.raises(
        InputError, match=r"weights are torch\.float32, the input is torch\.float64"
    ):
        ae.encode(torch.zeros(2, 5, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ae.encode(torch.zeros(2, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_latents": 0, "n_inputs": 5}, "n_latents must be a whole number >= 1, found 0"),
        ({"n_latents": 5, "n_inputs": 2.0}, "n_inputs must be a whole number >= 1, found 2.0"),
        ({"n_latents": 5, "n_inputs": 1, "input_normalization": "layer_norm"}, "n_inputs >= 2"),
        (
            {"n_latents": 5, "n_inputs": 2, "input_normalization": "layernorm"},
            "unknown input_normalization 'layernorm'. Did you mean 'layer_norm'",
        ),
        ({"n_latents": 5, "n_inputs": 2, "location": "mlp.postact"}, "unknown location"),
    ],
)
def test_bad_construction(kwargs, message):
    with pytest.raises(NeuronExplainerError, match=message):
        Autoencoder(**kwargs)


# ---- state dicts ------------------------------------------------------------------------------------


def as_bytes(state_dict):
    """A state dict as plain values that compare bit for bit."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return (str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes())
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {key: plain(value) for key, value in state_dict.items()}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_state_dict_round_trip_is_byte_equal(activation, tied, normalization):
    ae = make(activation, tied, normalization)
    state_dict = ae.state_dict()
    before = as_bytes(state_dict)
    new = Autoencoder.from_state_dict(state_dict, strict=True)
    assert as_bytes(state_dict) == before
    assert as_bytes(new.state_dict()) == before
    assert new.tied == tied
    assert repr(new) == repr(ae)
    with torch.no_grad():  # no memory is shared
        new.pre_bias.add_(1)
        new.encoder.weight.add_(1)
    new.latents_mean_square.add_(1)
    assert as_bytes(state_dict) == before
    other = make(activation, tied, normalization)
    nn.init.zeros_(other.encoder.weight)
    other.load_state_dict(state_dict)
    assert as_bytes(other.state_dict()) == before


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch_save_and_weights_only_load(activation):
    ae = make(activation, tied=True, normalization="layer_norm")
    file = io.BytesIO()
    torch.save(ae.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert as_bytes(Autoencoder.from_state_dict(loaded).state_dict()) == as_bytes(ae.state_dict())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inside_another_module_and_copied(activation):
    both = nn.ModuleList([make(activation, tied=True), make("ReLU")])
    before = as_bytes(both.state_dict())
    for parameter in both.parameters():
        nn.init.zeros_(parameter)
    new = nn.ModuleList([make(activation, tied=True), make("ReLU")])
    both.load_state_dict(new.state_dict())
    assert as_bytes(both.state_dict()) == before
    twin = copy.deepcopy(both)
    assert as_bytes(twin.state_dict()) == before
    tied = twin[0]
    assert isinstance(tied, Autoencoder)
    assert tied.decoder.weight.data_ptr() == tied.encoder.weight.data_ptr()


def test_load_state_dict_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match="activation is 'ReLU', the state dict says 'TopK'"):
        make().load_state_dict(make("TopK").state_dict())
    with pytest.raises(CheckpointError, match="tied is False, the state dict says True"):
        make().load_state_dict(make(tied=True).state_dict())
    with pytest.raises(CheckpointError, match="input_normalization is 'none'"):
        make().load_state_dict(make(normalization="center").state_dict())


def openai_state_dict(kind="TopK", /, **changes: Any) -> dict[str, Any]:
    """As the published files are: no word on normalisation. None takes an entry out."""
    state_dict = dict(make(kind).state_dict())
    state_dict.pop("input_normalization", None)
    state_dict.update(changes)
    return {key: value for key, value in state_dict.items() if value is not None}


def test_unstated_normalisation_of_a_topk_file_warns():
    state_dict = openai_state_dict()
    with pytest.warns(UnstatedNormalizationWarning, match="v5.*input_normalization='layer_norm'"):
        assert Autoencoder.from_state_dict(state_dict).input_normalization == "none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for normalization in get_args(InputNormalization):
            ae = Autoencoder.from_state_dict(state_dict, input_normalization=normalization)
            assert ae.input_normalization == normalization
            assert Autoencoder.from_state_dict(ae.state_dict()).input_normalization == normalization
        Autoencoder.from_state_dict(openai_state_dict("ReLU"))
    with pytest.raises(CheckpointError, match="says input_normalization 'center', the call says"):
        Autoencoder.from_state_dict(
            make(normalization="center").state_dict(), input_normalization="none"
        )
    with pytest.raises(InputError, match="unknown input_normalization 'ln'"):
        Autoencoder.from_state_dict(state_dict, input_normalization=cast(Any, "ln"))


def test_the_earliest_files_say_nothing_and_are_relu():
    state_dict = openai_state_dict("ReLU", activation=None, activation_state_dict=None)
    assert as_bytes(Autoencoder.from_state_dict(state_dict).state_dict()) == as_bytes(
        make().state_dict()
    )


def test_what_the_original_wrote_for_topk_and_tied():
    # It wrote the TopK fields twice, and a tied decoder as decoder.linear.weight.
    state_dict = openai_state_dict(
        **{"activation.k": 3, "activation.postact_fn": "ReLU", "decoder.weight": None}
    )
    state_dict["decoder.linear.weight"] = state_dict["encoder.weight"]
    ae = Autoencoder.from_state_dict(state_dict, input_normalization="none")
    assert ae.tied
    assert repr(ae.activation) == "TopK(k=3, postact_fn=ReLU)"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.weight": None}, r"decoder\.weight: missing.*a tied decoder has to be marked"),
        ({"encoder.weight": None}, r"encoder\.weight: .*missing"),
        ({"pre_bias": None, "latent_bias": None}, "latent_bias: missing.*; pre_bias: missing"),
        ({"activation": "Topk"}, "unknown latent activation 'Topk'.*Known: ReLU"),
        ({"activation": None}, "unknown field 'k'"),
        ({"activation": 3}, "unknown latent activation 3"),
        ({"activation_state_dict": None}, "the field .k. is missing"),
        ({"activation_state_dict": [3]}, r"activation_state_dict is \[3\]"),
        ({"activation.k": 4}, r"activation\.k contradict"),
        ({"activation_state_dict": {"k": 99}}, r"TopK\(k=99\) on 12 latents"),
        ({"tied": True}, r"tied, and yet there is a decoder\.weight"),
        ({"tied": "yes"}, "tied is 'yes'"),
        ({"input_normalization": "ln"}, "unknown input_normalization 'ln'"),
        (
            {"decoder.weight": None, "decoder.linear.weight": torch.zeros(12, 5)},
            r"decoder\.linear\.weight .* differs",
        ),
        ({"pre_bias": torch.zeros(6)}, r"pre_bias: expected shape \[5\], found \[6\]"),
        ({"decoder.weight": torch.zeros(12, 5)}, r"decoder\.weight: expected shape \[5, 12\]"),
        ({"stats_last_nonzero": torch.zeros(3)}, r"stats_last_nonzero: expected shape \[12\]"),
        ({"encoder.weight": torch.zeros(5)}, r"encoder\.weight: expected .*\[l, n\], found \[5\]"),
        ({"pre_bias": [0.0] * 5}, "pre_bias: expected a tensor, found a list"),
        ({"pre_bias": torch.zeros(5, dtype=torch.int64)}, "pre_bias: expected a floating-point"),
        ({"pre_bias": torch.full((5,), float("nan"))}, "pre_bias: holds NaN or infinity"),
    ],
)
def test_bad_state_dicts(changes, message, strict):
    with pytest.raises(NeuronExplainerError, match=message):
        Autoencoder.from_state_dict(
            openai_state_dict(**changes), strict, input_normalization="none"
        )


def test_everything_wrong_is_told_at_once():
    state_dict = openai_state_dict(pre_bias=torch.zeros(6), latent_bias=None, extra=1)
    with pytest.raises(CheckpointError, match=r"extra.*latent_bias: missing.*pre_bias: expected"):
        Autoencoder.from_state_dict(state_dict)
    bad = dict(make("JumpReLU").state_dict())
    bad["activation_state_dict"] = {"threshold": torch.full((12,), float("inf"))}
    with pytest.raises(CheckpointError, match="holds NaN"):
        Autoencoder.from_state_dict(bad)


def test_any_other_dict_is_refused():
    others: list[Any] = [{}, {0: torch.zeros(2)}, {"W_enc": torch.zeros(5, 12), 3: None}]
    for other in others:
        with pytest.raises(CheckpointError, match=r"encoder\.weight: .*missing"):
            Autoencoder.from_state_dict(other)


def test_not_strict_lets_statistics_be_missing_and_says_so(caplog):
    state_dict = openai_state_dict(
        "ReLU", latents_mean_square=None, latents_activation_frequency=None, extra=torch.ones(1)
    )
    with pytest.raises(CheckpointError, match=r"unknown entries extra.*latents_mean_square"):
        Autoencoder.from_state_dict(state_dict)
    with caplog.at_level(logging.WARNING, "neuron_explainer"):
        ae = Autoencoder.from_state_dict(state_dict, strict=False)
    assert [record.getMessage() for record in caplog.records] == [
        "autoencoder state dict: unknown entries extra",
        "autoencoder state dict: missing statistics latents_activation_frequency, "
        "latents_mean_square",
    ]
    assert (ae.latents_activation_frequency == 1).all()
    assert torch.equal(ae.stats_last_nonzero, torch.arange(12))
    assert as_bytes(state_dict) == as_bytes(dict(state_dict))


def test_dtype_of_the_weights_is_kept_or_chosen():
    state_dict = make(dtype=torch.float16).state_dict()
    assert Autoencoder.from_state_dict(state_dict).dtype == torch.float16
    ae = Autoencoder.from_state_dict(state_dict, dtype=torch.float64)
    assert {p.dtype for p in ae.parameters()} == {torch.float64}
    assert ae.latents_activation_frequency.dtype == torch.float32


def test_rare_latents_stay_rare_in_half_precision():
    ae = make()
    frequency = ae.latents_activation_frequency.clone()
    assert ((frequency > 0) & (frequency < 1e-8)).all()
    assert torch.equal(ae.half().latents_activation_frequency, frequency)
    assert ae.dtype == torch.float16


# ---- folders and files ------------------------------------------------------------------------------


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_save_load_save_is_byte_equal(tmp_path, activation, tied, dtype):
    ae = make(
        activation,
        tied,
        "layer_norm",
        location="3/resid_delta_mlp",
        model_name="tiny-tales",
        metadata={"steps": 7, "nested": {"a": [1, 2.5, None]}},
    )
    ae.save(tmp_path / "one", dtype=dtype)
    new = Autoencoder.load(tmp_path / "one")
    assert new.dtype == torch.float32
    assert repr(new) == repr(ae)
    assert new.location == ActivationLocation("resid.torso.delta_mlp", 3)
    assert new.metadata == ae.metadata
    new.save(tmp_path / "two", dtype=dtype)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    if dtype == torch.float32:
        assert as_bytes(new.state_dict()) == as_bytes(ae.state_dict())
    else:
        torch.testing.assert_close(new.encoder.weight, ae.encoder.weight, rtol=1e-2, atol=1e-2)
        assert torch.equal(new.latent_bias, ae.latent_bias)  # vectors are not rounded
        assert torch.equal(new.latents_activation_frequency, ae.latents_activation_frequency)
        stored = Autoencoder.load(tmp_path / "one", dtype=None)
        assert stored.dtype == dtype


def test_config_json_says_everything(tmp_path):
    make("TopK", normalization="center", location="mlp.post_act").save(tmp_path / "ae")
    config = json.loads((tmp_path / "ae" / "config.json").read_text())
    assert config == {
        "format_version": 1,
        "kind": "autoencoder",
        "n_latents": 12,
        "n_inputs": 5,
        "activation": {"name": "TopK", "k": 3, "postact_fn": "ReLU"},
        "tied": False,
        "input_normalization": "center",
        "location": "mlp.post_act",
        "model_name": None,
        "dtype": "float32",
        "metadata": {},
    }


def test_saving_never_destroys(tmp_path):
    ae = make()
    ae.save(tmp_path / "ae")
    before = folder_bytes(tmp_path / "ae")
    with pytest.raises(InputError, match="overwrite"):
        make("TopK").save(tmp_path / "ae")
    ae.metadata = {"bad": object()}
    with pytest.raises(InputError, match="metadata cannot be JSON"):
        ae.save(tmp_path / "ae", overwrite=True)
    ae.metadata = {}
    with torch.no_grad():
        ae.encoder.weight *= 1e6
    with pytest.raises(InputError, match=r"encoder\.weight holds values up to .* beyond the range"):
        ae.save(tmp_path / "ae", dtype=torch.float16, overwrite=True)
    with torch.no_grad():
        ae.pre_bias[0] = float("nan")
    with pytest.raises(InputError, match="is not saved: pre_bias holds NaN or infinity"):
        ae.save(tmp_path / "ae", overwrite=True)
    assert folder_bytes(tmp_path / "ae") == before
    make("TopK").save(tmp_path / "ae", overwrite=True)
    assert activation_name(Autoencoder.load(tmp_path / "ae").activation) == "TopK"


def test_arguments_may_add_to_a_folder_and_not_contradict_it(tmp_path):
    make(normalization="center").save(tmp_path / "ae")
    ae = Autoencoder.load(
        tmp_path / "ae", location="2/mlp_post_act", input_normalization="center", device="cpu"
    )
    assert str(ae.location) == "2/mlp.post_act"
    with pytest.raises(CheckpointError, match="input_normalization 'center', the call says 'none'"):
        Autoencoder.load(tmp_path / "ae", input_normalization="none")
    ae.save(tmp_path / "located")
    assert Autoencoder.load(tmp_path / "located", location="mlp.post_act").location == ae.location
    ae.location = ActivationLocation("mlp.post_act")
    ae.save(tmp_path / "somewhere")
    for layer in (None, 7):
        location = ActivationLocation("mlp.post_act", layer)
        assert Autoencoder.load(tmp_path / "somewhere", location=location).location == location
    with pytest.raises(CheckpointError, match=r"location '2/mlp\.post_act', the call says '3/mlp"):
        Autoencoder.load(tmp_path / "located", location="3/mlp.post_act")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "transformer"}, "expected kind 'autoencoder', found 'transformer'"),
        ({"format_version": 2}, "format_version 2 cannot be read"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"tied": "remove"}, "the field 'tied' is missing"),
        ({"tied": 1}, "tied: expected true or false, found 1"),
        ({"tied": True}, r"tied, and yet there is a decoder\.weight"),
        ({"n_inputs": 6}, r"config\.json says \[12, 6\] of float32, encoder\.weight is \[12, 5\]"),
        ({"dtype": "float16"}, r"of float16, encoder\.weight is \[12, 5\] of float32"),
        ({"activation": {"name": "TopK", "k": 13, "postact_fn": "ReLU"}}, r"TopK\(k=13\) on 12"),
        ({"activation": {"name": "TopK"}}, "the field .k. is missing"),
        ({"activation": {"name": "Relu"}}, "unknown latent activation 'Relu'"),
        ({"activation": {}}, "expected a 'name'"),
        ({"location": "3/mlp.middle"}, "unknown location 'mlp.middle'"),
        ({"input_normalization": "norm"}, "input_normalization: expected one of .*, found 'norm'"),
    ],
)
def test_contradictory_configs(tmp_path, changes, message):
    make().save(tmp_path / "ae")
    edit_config(tmp_path / "ae", **changes)
    with pytest.raises(CheckpointError, match=message) as info:
        Autoencoder.load(tmp_path / "ae")
    assert str(tmp_path) in str(info.value)


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(NeuronExplainerError, match="nowhere"):
        Autoencoder.load(tmp_path / "nowhere")
    make().save(tmp_path / "ae")
    weights = tmp_path / "ae" / "autoencoder.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"autoencoder\.safetensors"):
            Autoencoder.load(tmp_path / "ae")
    weights.unlink()
    with pytest.raises(NeuronExplainerError, match=r"autoencoder\.safetensors"):
        Autoencoder.load(tmp_path / "ae")
    (tmp_path / "ae" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Autoencoder.load(tmp_path / "ae")


def test_pt_files(tmp_path):
    path = tmp_path / "0.pt"
    torch.save(openai_state_dict(latents_mean_square=None), path)
    ae = Autoencoder.load(path, input_normalization="layer_norm", location="0/resid_delta_mlp")
    assert not ae.latents_mean_square.any()  # not in the file, and not needed
    assert ae.input_normalization == "layer_norm"
    assert str(ae.location) == "0/resid.torso.delta_mlp"
    torch.testing.assert_close(ae.encoder.weight, make("TopK").encoder.weight, rtol=0, atol=0)
    with pytest.warns(UnstatedNormalizationWarning):
        Autoencoder.load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"0\.pt"):
        Autoencoder.load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="expected a state dict, found list"):
        Autoencoder.load(path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    target = tmp_path / "created"
    for name, save in {
        "zip.pt": lambda path: torch.save({"encoder.weight": Hostile(target)}, path),
        "plain.pt": lambda path: path.write_bytes(pickle.dumps(Hostile(target))),
    }.items():
        save(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            Autoencoder.load(tmp_path / name)
        assert not target.exists()


def test_stats_are_a_named_tuple():
    stats = make(normalization="center").normalize(inputs(2))[1]
    assert isinstance(stats, InputStats)
    assert stats.std is None
