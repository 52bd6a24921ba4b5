"""Transformer factors: one dictionary for the residual stream of all layers, learned by sparse coding."""

import torch

from neuron_explainer.activations import Harvester, LiveSource, TokenWindows, tokenize
from neuron_explainer.dictionaries.sparse_coding import (
    SparseCodingConfig,
    count_tokens,
    train_sparse_coding,
)
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models.model_context import ModelContext

context = ModelContext.from_model_type("tiny-tales")
windows = TokenWindows(tokenize(PASSAGE.split("\n\n"), context), 64, 4)
harvester = Harvester(context, "resid.torso.post_mlp")  # every layer

# FISTA finds codes that are never negative; a larger penalty makes them fewer and smaller.
config = SparseCodingConfig(n_latents=128, penalty=5.0, step_size=0.05, tolerance=1e-2)
((location, dictionary),) = train_sparse_coding(
    config,
    LiveSource(harvester, windows),
    token_counts=count_tokens(windows, context.n_vocab),  # frequent tokens count less
    model_name="tiny-tales",
    progress=False,
).items()
facts = dictionary.metadata
print(f"{location}: SNR {facts['snr']:.1f}, L0 {facts['l0']:.1f}, {facts['rows']} vectors")

# The words at which a factor is strongest, layer by layer.
batch = harvester(windows.batch(0))
for layer, x in enumerate(batch.activations.values()):
    latents = dictionary.encode(x)
    factor = int(latents.mean(0).argsort(descending=True)[10])
    top = torch.topk(latents[:, factor], 5)
    words = [repr(context.decode_token(int(batch.tokens[i]))) for i in top.indices]
    print(f"layer {layer}, factor {factor}: {', '.join(words)}")
