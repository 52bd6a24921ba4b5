"""This library's autoencoder, as made here or as loaded from another library's file."""

import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.contestants.encoding import activations, biases, directions
from benchmarks.workloads import Prepared, Work
from neuron_explainer.kernels.certified import certified_top_k, prepare
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoders.convert import save_as


@cache
def load(width: int, latents: int, k: int | None, file: str = "") -> Autoencoder:
    """``file``: the format of a file that it is written to and loaded from; none if not given."""
    autoencoder = Autoencoder(latents, width, nn.ReLU() if k is None else TopK(k))
    for own, given in zip(
        (autoencoder.latent_bias, autoencoder.pre_bias), biases(latents, width), strict=True
    ):
        own.copy_(given)
    autoencoder.encoder.weight.copy_(directions(latents, width))
    autoencoder.decoder.weight.copy_(directions(latents, width).t())
    if not file:
        return autoencoder
    with tempfile.TemporaryDirectory() as folder:
        save_as(autoencoder, Path(folder) / file, file)
        return Autoencoder.load(Path(folder) / file, input_normalization="none")


def relu_encode(tokens: int, width: int, latents: int, variant: str = "", file: str = "") -> Work:
    autoencoder, x = load(width, latents, None, file), activations(tokens, width)
    return lambda: {"latents": autoencoder.encode(x)}


def topk_reconstruct(
    tokens: int, width: int, latents: int, k: int, variant: str, file: str = ""
) -> Prepared:
    """``variant``: how the largest are searched, ``float32`` or ``certified``."""
    certified = variant == "certified"
    autoencoder, x = load(width, latents, k, file), activations(tokens, width)

    def work() -> dict[str, Tensor]:
        os.environ["NEURON_EXPLAINER_CERTIFIED"] = str(int(certified))
        return {"recons": autoencoder.reconstruct(x)}

    return Prepared(work, _remark(autoencoder, x, k) if certified else "")


def _remark(autoencoder: Autoencoder, x: Tensor, k: int) -> str:
    weight, bias = autoencoder.encoder.weight, autoencoder.latent_bias
    prepared = prepare(weight, bias)
    proven = certified_top_k(x - autoencoder.pre_bias, weight, bias, k, prepared)[2]
    redone = 1 - float(proven.to(torch.float64).mean())
    return f"{redone:.2%} of rows redone in float32"
