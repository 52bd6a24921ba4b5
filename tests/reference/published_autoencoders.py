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
