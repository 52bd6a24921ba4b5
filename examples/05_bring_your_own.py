"""Your own model and autoencoder: save them, load them from any folder, splice one into the other."""

import tempfile
from pathlib import Path

import torch

from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.transformer import Transformer, TransformerConfig

with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)

    # A model of any GPT-2 shape; these weights are random, yours would be trained.
    config = TransformerConfig(d_model=32, n_layers=2, n_heads=4, ctx_window=64, n_vocab=100)
    Transformer(config, seed=0).save(folder / "model")
    model = Transformer.load(folder / "model")

    # An autoencoder says how it has to be applied: activation, input normalisation, location.
    torch.manual_seed(0)
    for layer in range(2):
        Autoencoder(
            n_latents=128,
            n_inputs=32,
            activation=TopK(8),
            input_normalization="layer_norm",
            location=f"{layer}/resid.torso.post_mlp",
        ).save(folder / "autoencoder" / str(layer))

    context = AutoencoderContext(
        AutoencoderConfig(
            "resid.torso.post_mlp", {i: str(folder / "autoencoder" / str(i)) for i in range(2)}
        ),
        device=model.device,
    )
    tokens = torch.randint(0, 100, (1, 10), device=model.device)
    with torch.no_grad():
        plain, _ = model(tokens)
        with_error, _ = model(tokens, hooks=context.hooks(add_error=True))
        replaced, _ = model(tokens, hooks=context.hooks(add_error=False))
    print(f"error added back: logits move by {(with_error - plain).abs().max():.1e}")
    print(f"stream replaced by its reconstruction: by {(replaced - plain).abs().max():.1e}")
