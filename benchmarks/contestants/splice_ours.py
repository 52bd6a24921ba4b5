"""This library's model with an autoencoder spliced into every layer, and the original's way to do it."""

from functools import cache

import torch
from torch import Tensor

from benchmarks.contestants.encoding import biases, directions
from benchmarks.contestants.ours import load
from benchmarks.workloads import Work
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.hooks import AtLayers, AutoencoderHooks, TransformerHooks
from neuron_explainer.models.interventions import Edit, Positions, Units
from neuron_explainer.models.locations import ActivationLocation

PLACE = "resid.torso.delta_mlp"
LATENT = 7


@cache
def autoencoders(n_layers: int, width: int, latents: int, k: int) -> list[Autoencoder]:
    """One a layer, with weights of their own: reading them is part of the work."""
    rows = directions(latents, width)
    latent_bias, pre_bias = biases(latents, width)
    found = []
    for _ in range(n_layers):
        autoencoder = Autoencoder(latents, width, activation=TopK(k)).eval().requires_grad_(False)
        autoencoder.encoder.weight.copy_(rows)
        autoencoder.decoder.weight.copy_(rows.t())
        autoencoder.latent_bias.copy_(latent_bias)
        autoencoder.pre_bias.copy_(pre_bias)
        found.append(autoencoder)
    return found


def hooks(way: str, found: list[Autoencoder]) -> TransformerHooks | None:
    """``plain``: none; ``reconstructed``; ``ablated``: the error kept, a latent set to 0; ``formula``: the
    original's reconstruction, with dense latents."""
    if way in ("plain", "floor"):
        return None
    tree = TransformerHooks()
    for layer, autoencoder in enumerate(found):
        if way == "formula":
            inside = AutoencoderHooks(autoencoder.encode, autoencoder.decode)
        else:
            inside = AutoencoderHooks.from_autoencoder(autoencoder, way == "ablated")
        if way == "ablated":
            place = ActivationLocation(PLACE, layer)
            unit = Units.of(place, LATENT, latents=True)
            zero = Edit("ablation", place, unit, Positions.of(None), _zeros)
            inside.latents.append_fwd(zero)
        tree.append_at(PLACE, AtLayers(layer).append(inside))
    return tree


def _zeros(x: Tensor, positions: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


def logits(folder: str, way: str, tokens: list[list[int]], latents: int, k: int) -> Work:
    model, ids = load(folder), torch.tensor(tokens)
    found = autoencoders(model.n_layers, model.cfg.d_model, latents, k)
    tree, x = hooks(way, found), torch.randn(ids.numel(), model.cfg.d_model)

    def work() -> dict[str, Tensor]:
        result = model(ids, hooks=tree)[0]
        if way == "floor":
            for autoencoder in found:
                autoencoder.encode_sparse(x)
        return {"plain" if way in ("plain", "floor") else way: result}

    return work


def greedy(
    folder: str, way: str, prompts: list[list[int]], n_new: int, latents: int, k: int
) -> Work:
    model = load(folder)
    found = autoencoders(model.n_layers, model.cfg.d_model, latents, k)
    tree, x = hooks(way, found), torch.randn(1, model.cfg.d_model)

    def work() -> dict[str, object]:
        ids = model.sample(prompts, n_new, temperature=0, hooks=tree)["tokens"]
        if way == "floor":  # each encoder's weights are read once a token
            for _ in range(n_new):
                for autoencoder in found:
                    x @ autoencoder.encoder.weight.t()
        return {"plain" if way in ("plain", "floor") else way: ids}

    return work
