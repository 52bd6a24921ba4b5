"""One step of fine-tuning this library's autoencoder, as made here or as loaded from a file."""

import torch

from benchmarks.contestants.encode_ours import load
from benchmarks.contestants.training import activations
from benchmarks.workloads import Work
from neuron_explainer.dictionaries import finetune_decoder


def finetune(tokens: int, width: int, latents: int, k: int, file: str = "") -> Work:
    with torch.no_grad():
        autoencoder = load(width, latents, k, file).requires_grad_(False)
    x = activations(tokens, width)
    return lambda: {
        "decoder": finetune_decoder(autoencoder, [x], progress=False).decoder.weight.detach()
    }
