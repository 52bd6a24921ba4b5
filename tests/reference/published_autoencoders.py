"""Dictionaries in formats whose own libraries cannot be installed: files, and their formulas again.

Each function makes one small random dictionary: the arrays that its file holds, and what encoding and
decoding are in numpy and float64, one row at a time, from the published formulas. Independent of the
package and of torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.reference import fista_numpy

Array = npt.NDArray[np.float64]
N, L, K, PENALTY = 8, 24, 4, 0.3


class Published(NamedTuple):
    """Arrays as stored (float32), and ``x -> (latents, reconstruction)`` of one row."""

    arrays: dict[str, Any]
    apply: Callable[[Array], tuple[Array, Array]]


def _random(seed: int, *shape: int) -> Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype(np.float32).astype(np.float64)


def _stored(arrays: dict[str, Array]) -> dict[str, Any]:
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def inputs(rows: int = 5) -> Array:
    """``[rows, n]``, each row with a mean and a scale of its own."""
    return _random(50, rows, N) * 2 + _random(51, rows, 1)


def openai(version: str) -> Published:
    """``v1`` and ``v4``: ReLU on bare inputs. ``v5``: TopK on inputs that are layer-normed."""
    pre_bias, latent_bias = _random(1, N), _random(2, L) / 2
    encoder, decoder = _random(3, L, N), _random(4, N, L)

    def apply(x: Array) -> tuple[Array, Array]:
        mean, std = 0.0, 1.0
        if version == "v5":
            mean = x.sum() / N
            std = float(np.sqrt(((x - mean) ** 2).sum() / (N - 1)))
        x_hat = (x - mean) / (std + 1e-5) if version == "v5" else x
        latents = np.maximum(0, encoder @ (x_hat - pre_bias) + latent_bias)
        if version == "v5":
            latents[np.argsort(latents)[:-K]] = 0
        return latents, (decoder @ latents + pre_bias) * std + mean

    arrays = {
        "pre_bias": pre_bias,
        "latent_bias": latent_bias,
        "encoder.weight": encoder,
        "decoder.weight": decoder,
        "latents_activation_frequency": np.full(L, 0.1),
        "latents_mean_square": np.full(L, 2.0),
    }
    return Published(_stored(arrays), apply)


def language_model_saes(*, bias: bool, glu: bool, token_wise: bool) -> Published:
    """gpt2-dictionary, with a mask that takes a latent out and scales that differ."""
    encoder, decoder, encoder_bias = _random(5, N, L), _random(6, L, N), _random(7, L)
    decoder_bias = _random(8, N) if bias else np.zeros(N)
    gate, gate_bias = _random(9, N, L), _random(10, L)
    mask, scale = np.ones(L), np.abs(_random(11, L)) + 0.5
    mask[3] = 0

    def apply(x: Array) -> tuple[Array, Array]:
        factor = np.sqrt(N) / np.sqrt((x**2).sum()) if token_wise else 1.0
        centred = factor * x - decoder_bias
        h = centred @ encoder + encoder_bias
        if glu:
            h = h / (1 + np.exp(-(centred @ gate + gate_bias)))
        latents = mask * scale * np.maximum(0, h)
        return latents, (latents @ decoder + decoder_bias) / factor

    arrays = {
        "encoder": encoder,
        "encoder_bias": encoder_bias,
        "decoder": decoder,
        "feature_act_mask": mask,
        "feature_act_scale": scale,
    }
    if bias:
        arrays["decoder_bias"] = decoder_bias
    if glu:
        arrays |= {"encoder_glu": gate, "encoder_bias_glu": gate_bias}
    return Published(_stored(arrays), apply)


def transformer_vis() -> Published:
    """Columns of norm 1; codes by coordinate descent, not by FISTA."""
    dictionary = _random(12, N, L)
    dictionary /= np.sqrt((dictionary**2).sum(axis=0))
    dictionary = dictionary.astype(np.float32).astype(np.float64)

    def apply(x: Array) -> tuple[Array, Array]:
        latents = fista_numpy.coordinate_descent(x, dictionary, PENALTY, tolerance=1e-11)
        return latents, dictionary @ latents

    return Published(_stored({"dictionary": dictionary}), apply)


def e2e() -> Published:
    """A decoder that is normalised when it is applied."""
    encoder, bias = _random(13, L, N), _random(14, L)
    decoder, decoder_bias = _random(15, N, L), _random(16, N)

    def apply(x: Array) -> tuple[Array, Array]:
        latents = np.maximum(0, encoder @ x + bias)
        return latents, (decoder / np.sqrt((decoder**2).sum(axis=0))) @ latents + decoder_bias

    arrays = {
        "encoder.0.weight": encoder,
        "encoder.0.bias": bias,
        "decoder.weight": decoder,
        "decoder.bias": decoder_bias,
    }
    return Published(_stored(arrays), apply)


def gemma_scope(n_outputs: int = N) -> Published:
    """JumpReLU; nothing is taken off the input."""
    encoder, bias, threshold = _random(17, N, L), _random(18, L), np.abs(_random(19, L))
    threshold = threshold.astype(np.float32).astype(np.float64)
    decoder, decoder_bias = _random(20, L, n_outputs), _random(21, n_outputs)

    def apply(x: Array) -> tuple[Array, Array]:
        h = x @ encoder + bias
        latents = np.where(h > threshold, np.maximum(0, h), 0.0)
        return latents, latents @ decoder + decoder_bias

    arrays = {
        "W_enc": encoder,
        "b_enc": bias,
        "W_dec": decoder,
        "b_dec": decoder_bias,
        "threshold": threshold,
    }
    return Published(_stored(arrays), apply)


def sae_training(*, is_transcoder: bool, n_outputs: int = N) -> Published:
    """gpt2-transcoders and early SAELens: ``b_dec`` comes off the input, of transcoders too."""
    encoder, bias, decoder = _random(22, N, L), _random(23, L), _random(24, L, n_outputs)
    b_dec, b_dec_out = _random(25, N), _random(26, n_outputs)

    def apply(x: Array) -> tuple[Array, Array]:
        latents = np.maximum(0, (x - b_dec) @ encoder + bias)
        return latents, latents @ decoder + (b_dec_out if is_transcoder else b_dec)

    arrays = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": b_dec}
    return Published(_stored(arrays | ({"b_dec_out": b_dec_out} if is_transcoder else {})), apply)


def qwen_scope() -> Published:
    """TopK; matrices as torch's linear layers have them."""
    encoder, bias = _random(27, L, N), _random(28, L) + 3
    decoder, b_dec = _random(29, N, L), _random(30, N)

    def apply(x: Array) -> tuple[Array, Array]:
        pre_acts = encoder @ x + bias
        latents = np.zeros(L)
        kept = np.argsort(pre_acts)[-K:]
        latents[kept] = pre_acts[kept]
        return latents, decoder @ latents + b_dec

    arrays = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": b_dec}
    return Published(_stored(arrays), apply)


def goodfire() -> Published:
    """Two linear layers with a ReLU between them."""
    encoder, bias, decoder, b_dec = (
        _random(31, L, N),
        _random(32, L),
        _random(33, N, L),
        _random(34, N),
    )

    def apply(x: Array) -> tuple[Array, Array]:
        latents = np.maximum(0, encoder @ x + bias)
        return latents, decoder @ latents + b_dec

    arrays = {
        "encoder_linear.weight": encoder,
        "encoder_linear.bias": bias,
        "decoder_linear.weight": decoder,
        "decoder_linear.bias": b_dec,
    }
    return Published(_stored(arrays), apply)


def gemma_scope_2(*, skip: bool = False, n_layers: int = 0, own: int = 0) -> Published:
    """JumpReLU with an affine skip; of a cross-layer transcoder the outputs from ``own`` on."""
    base = gemma_scope()
    encoder, bias, threshold = (
        base.arrays[name].astype(np.float64) for name in ("W_enc", "b_enc", "threshold")
    )
    decoder = _random(35, L, n_layers, N) if n_layers else _random(35, L, N)
    b_dec, affine = _random(36, N), _random(37, N, N)

    def apply(x: Array) -> tuple[Array, Array]:
        h = x @ encoder + bias
        latents = np.where(h > threshold, np.maximum(0, h), 0.0)
        first = b_dec + (x @ affine if skip else 0)
        if not n_layers:
            return latents, latents @ decoder + first
        outputs = [latents @ decoder[:, layer] for layer in range(own, n_layers)]
        return latents, np.concatenate([outputs[0] + first, *outputs[1:]])

    arrays = {"w_enc": encoder, "b_enc": bias, "w_dec": decoder, "b_dec": b_dec}
    arrays |= {"threshold": threshold} | ({"affine_skip_connection": affine} if skip else {})
    return Published(_stored(arrays), apply)


def circuit_tracer(*, jumps: bool, skip: bool) -> Published:
    """One file of a set of per-layer transcoders."""
    encoder, bias, decoder = _random(38, L, N), _random(39, L), _random(40, L, N)
    b_dec, w_skip = _random(41, N), _random(42, N, N)
    threshold = np.abs(_random(43, L)) if jumps else np.zeros(L)

    def apply(x: Array) -> tuple[Array, Array]:
        h = encoder @ x + bias
        latents = h * (h > threshold)
        return latents, latents @ decoder + b_dec + (w_skip @ x if skip else 0)

    arrays = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": b_dec}
    arrays |= {"activation_function.threshold": threshold} if jumps else {}
    return Published(_stored(arrays | ({"W_skip": w_skip} if skip else {})), apply)


def cross_layer(layer: int, n_layers: int, *, jumps: bool) -> Published:
    """One layer of a cross-layer transcoder: its contributions to its own and to later layers."""
    encoder, bias = _random(44 + layer, L, N), _random(54 + layer, L)
    decoder = _random(64 + layer, L, n_layers - layer, N)
    b_dec = _random(74 + layer, N)
    threshold = np.abs(_random(84 + layer, L)) if jumps else np.zeros(L)

    def apply(x: Array) -> tuple[Array, Array]:
        h = encoder @ x + bias
        latents = h * (h > threshold)
        outputs = np.einsum("l,lon->on", latents, decoder)
        outputs[0] += b_dec
        return latents, outputs.reshape(-1)

    arrays = {
        f"W_enc_{layer}": encoder,
        f"b_enc_{layer}": bias,
        f"b_dec_{layer}": b_dec,
        f"W_dec_{layer}": decoder,
    }
    return Published(_stored(arrays | ({f"threshold_{layer}": threshold} if jumps else {})), apply)


def llama_scope(norm_in: float, norm_out: float, threshold: float | None) -> Published:
    """Inputs and outputs in units of their average norms; ``threshold`` None: each latent's own."""
    encoder, bias, decoder, b_dec = (
        _random(94, L, N),
        _random(95, L),
        _random(96, N, L),
        _random(97, N),
    )
    decoder /= np.sqrt((decoder**2).sum(axis=0))
    decoder = decoder.astype(np.float32).astype(np.float64)
    log_threshold = _random(98, L)

    def apply(x: Array) -> tuple[Array, Array]:
        scale = np.sqrt(N) / norm_in
        h = encoder @ (scale * x) + bias
        least = np.exp(log_threshold) if threshold is None else threshold * scale
        latents = h * (h > least)
        return latents, (decoder @ latents + b_dec) * norm_out / np.sqrt(N)

    arrays = {
        "encoder.weight": encoder,
        "encoder.bias": bias,
        "decoder.weight": decoder,
        "decoder.bias": b_dec,
    }
    arrays |= {"log_jumprelu_threshold": log_threshold} if threshold is None else {}
    return Published(_stored(arrays), apply)


def saelens_topk(factor: float) -> Published:
    """SAELens's TopK with ``rescale_acts_by_decoder_norm``, after its folding of a norm factor."""
    encoder, bias, decoder, b_dec = (
        _random(99, N, L),
        _random(100, L),
        _random(101, L, N),
        _random(102, N),
    )

    def apply(x: Array) -> tuple[Array, Array]:
        w_enc, w_dec, b_out = encoder * factor, decoder / factor, b_dec / factor
        norms = np.sqrt((w_dec**2).sum(axis=1))
        hidden = ((x - b_out) @ w_enc + bias) * norms
        latents = np.zeros(L)
        kept = np.argsort(hidden)[-K:]
        latents[kept] = np.maximum(0, hidden[kept])
        return latents, (latents / norms) @ w_dec + b_out

    arrays = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": b_dec}
    return Published(_stored(arrays), apply)
