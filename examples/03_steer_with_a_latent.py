"""Steering: turn one latent up while the model writes, everything else left as it was."""

import torch

from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer

LAYER, TEXT = 2, "The ship sailed over the sea, and the sailors saw the"

model = Transformer.load("tiny-tales", dtype=torch.float32)
context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=model.device)
location = context.location.at(LAYER)

with torch.no_grad():
    latents = context.get_autoencoder(LAYER).encode(model.capture([TEXT], location)[location][0])
latent = int(latents[-1].argmax())
strength = 1.2 * float(latents[-1, latent])


def turn_up(latents):
    """Set the latent on every token; the autoencoder's error is added back by the context."""
    latents[..., latent] = strength
    return latents


hooks = context.hooks(on_latents=turn_up, layers=[LAYER])
for name, chosen in [("plain", None), (f"latent {latent} at {strength:.1f}", hooks)]:
    out = model.sample("Once there was a", 30, temperature=0.6, seed=2, hooks=chosen)
    print(f"{name}: Once there was a{out['strings'][0]}\n")
