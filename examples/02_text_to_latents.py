"""Which latents fire on a text, and on which of its tokens the strongest ones fire most."""

import torch

from neuron_explainer.evaluation.metrics import fvu, l0
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer

TEXT = (
    "The old woman lived alone in a little house at the edge of the forest. "
    "One evening the wolf came to her door, and the wolf said: Let me in, old woman."
)
LAYER = 2

model = Transformer.load("tiny-tales", dtype=torch.float32)
context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=model.device)
autoencoder = context.get_autoencoder(LAYER)

with torch.no_grad():
    found = model.capture([TEXT], context.location.at(LAYER))
    x = found[context.location.at(LAYER)][0]  # [tokens, width]
    output = autoencoder(x)

error, fired = fvu(x, output.recons), l0(output.latents)
print(f"{autoencoder}")
print(f"{len(x)} tokens, {fired:.1f} latents fire on each, unexplained variance {error:.3f}")

words = [model.enc.decode([token]) for token in found.tokens[0].tolist()]
for latent in output.latents.sum(0).topk(3).indices.tolist():
    column = output.latents[:, latent]
    print(f"\nlatent {latent}, at most {column.max():.2f}:")
    print(
        "".join(f"[{word}]" if a > 0.5 * column.max() else word for word, a in zip(words, column))
    )
