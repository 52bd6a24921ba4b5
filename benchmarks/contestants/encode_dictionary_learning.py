"""dictionary_learning: ``encode`` of its ``AutoEncoder``, ``forward`` of its ``AutoEncoderTopK``."""

from typing import Any

from benchmarks.contestants.encoding import activations, biases, directions
from benchmarks.workloads import Work

dictionary: Any = __import__("dictionary_learning.dictionary", fromlist=["*"])
top_k: Any = __import__("dictionary_learning.trainers.top_k", fromlist=["*"])


def _filled(ae: Any, bias_name: str, width: int, latents: int) -> Any:
    rows = directions(latents, width)
    latent_bias, pre_bias = biases(latents, width)
    ae.encoder.weight.data.copy_(rows)
    ae.decoder.weight.data.copy_(rows.t())
    ae.encoder.bias.data.copy_(latent_bias)
    getattr(ae, bias_name).data.copy_(pre_bias)
    return ae


def relu_encode(tokens: int, width: int, latents: int) -> Work:
    ae = _filled(dictionary.AutoEncoder(width, latents), "bias", width, latents)
    x = activations(tokens, width)
    return lambda: {"latents": ae.encode(x)}


def topk_reconstruct(tokens: int, width: int, latents: int, k: int) -> Work:
    ae = _filled(top_k.AutoEncoderTopK(width, latents, k), "b_dec", width, latents)
    x = activations(tokens, width)
    return lambda: {"recons": ae(x)}
