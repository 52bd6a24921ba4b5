"""Latents whose meaning is known, in the embedded model: each of some is active at one token, others at
random directions."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from neuron_explainer.activations import TokenWindows
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis import CollateConfig, ExampleStore, collate
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.open_model import open_model

LOCATION = "resid.post_emb"
N_PLANTED, N_RANDOM = 6, 6


class Planted(NamedTuple):
    context: ModelContext
    autoencoder: Autoencoder
    store: ExampleStore
    tokens: list[int]
    """The token of each planted latent; the latents after them are random directions."""


def make_planted(folder: Path, n_documents: int = 200) -> Planted:
    context = open_model("tiny-tales", "cpu")
    whole = ExampleStore.open("tiny-tales/ae-resid-delta-mlp/2").tokens
    documents = [whole.corpus.document(i) for i in range(n_documents)]
    corpus = TokenCorpus.of(documents, "tales")
    windows = TokenWindows(corpus, 128, 32, concat=False, bos=4095, seed=None)
    model = context.get_or_create_model()
    tokens, x = [], []
    for number in range(windows.batches_per_epoch):
        batch = windows.batch(number)
        x.append(model.capture(batch.tokens, [LOCATION], pad=batch.pad)[LOCATION].flatten(0, 1))
        tokens.append(batch.tokens.flatten())
    ids, inputs = torch.cat(tokens), torch.cat(x).detach().float()
    ids, inputs = ids[ids != 4095], inputs[ids != 4095]
    count = torch.bincount(ids, minlength=4096)
    pieces = whole.pieces(np.arange(4096))
    usual = count.argsort(descending=True).tolist()
    # Not the most frequent ones: almost every text would hold them.
    chosen = [
        t for t in usual if pieces[t].startswith(b" ") and len(pieces[t]) > 3 and count[t] < 250
    ]
    chosen = chosen[:N_PLANTED]
    centred = inputs - inputs.mean(0)
    inverse = torch.linalg.inv(
        centred.T @ centred / len(centred) + 1e-6 * torch.eye(inputs.shape[1])
    )
    rows, biases = [], []
    for token in chosen:
        row = inverse @ (inputs[ids == token].mean(0) - inputs.mean(0))
        value = inputs @ row
        low, high = value[ids != token].max(), value[ids == token].min()
        assert low < high
        rows.append(row / (high - low))
        biases.append(-float((low + high) / 2 / (high - low)))
    random = torch.randn(N_RANDOM, inputs.shape[1], generator=torch.Generator().manual_seed(0))
    for row in random:
        value = inputs @ row
        rows.append(row)
        biases.append(-float(value.quantile(0.995)))
    autoencoder = Autoencoder(len(rows), inputs.shape[1], location=LOCATION)
    autoencoder.requires_grad_(False)
    autoencoder.encoder.weight.copy_(torch.stack(rows))
    autoencoder.latent_bias.copy_(torch.tensor(biases))
    config = CollateConfig(top=6, uniform=6, weighted=0, intervals=0, window=32)
    path = collate(context, {"planted": autoencoder}, windows, folder, config, progress=False)
    return Planted(context, autoencoder, ExampleStore.open(path["planted"]), chosen)
