"""Whether dictionaries find the directions that the data are made of.

The data are sums of 128 random unit directions of width 64. On each token five of them are active, each
with a strength between 0.5 and 1.5, and there is noise of 1 % of the norm. A direction counts as recovered
if a latent's direction has a cosine above 0.95 with it. The table also has the variance explained and the
share of latents that fire.

Shape legend: ``t`` tokens, ``d`` width, ``m`` planted directions, ``l`` latents.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.dictionaries import (
    ObjectiveConfig,
    ReLUConfig,
    TopKConfig,
    TrainConfig,
    train,
)
from neuron_explainer.dictionaries.sparse_coding import SparseCodingConfig, train_sparse_coding
from neuron_explainer.evaluation.evaluate import measure
from neuron_explainer.models.autoencoder import Autoencoder

ATOMS, WIDTH, ACTIVE, NOISE = 128, 64, 5, 0.01
L1 = 0.5
WANTED = 0.95
"""The share of directions that should be recovered, and the cosine above which one is."""


def planted(n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens ``[t, d]``, and the unit directions ``[m, d]`` of which they are sums."""
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(ATOMS, WIDTH, generator=generator), dim=1)
    generator.manual_seed(seed + 1)
    which = torch.rand(n_tokens, ATOMS, generator=generator).topk(ACTIVE).indices
    strength = 0.5 + torch.rand(n_tokens, ACTIVE, generator=generator)
    x = torch.zeros(n_tokens, ATOMS).scatter_(1, which, strength) @ atoms
    noise = torch.randn(n_tokens, WIDTH, generator=generator)
    return x + NOISE * x.square().mean().sqrt() * noise, atoms


def recovered(atoms: Tensor, autoencoder: Autoencoder) -> float:
    """Share of ``atoms`` ``[m, d]`` that some latent's direction points to."""
    rows = F.normalize(autoencoder.decoder.weight.detach().t(), dim=1)
    return float(((atoms @ rows.t()).amax(1) > WANTED).float().mean())


def by_gradient(objective: ObjectiveConfig, steps: int, rows: Tensor) -> Autoencoder:
    """Train with the training loop, with twice as many latents as directions."""
    config = TrainConfig(
        objective,
        n_latents=2 * ATOMS,
        steps=steps,
        batch_size=1024,
        lr=3e-3,
        warmup_steps=steps // 20,
        decay="linear",
        decay_steps=steps // 2,
    )
    return train(config, rows, progress=False)


def by_coding(epochs: int, rows: Tensor) -> Autoencoder:
    """Train with sparse coding, with as many latents as directions."""
    config = SparseCodingConfig(ATOMS, penalty=0.4, epochs=epochs, step_size=0.05, tolerance=1e-2)
    autoencoder: Autoencoder = train_sparse_coding(config, rows.split(4096), progress=False)
    return autoencoder


def run(quick: bool = False) -> str:
    """Train with each method and return the table."""
    rows, atoms = planted(2048 if quick else 50_000)
    held_out = planted(2048 if quick else 20_000, seed=1)[0]
    steps = 20 if quick else 1000
    methods: dict[str, Callable[[Tensor], Autoencoder]] = {
        f"TopK, k = {ACTIVE}": partial(by_gradient, TopKConfig(k=ACTIVE), steps),
        "ReLU + L1": partial(by_gradient, ReLUConfig(l1_coefficient=L1), steps),
        "sparse coding (FISTA)": partial(by_coding, 1),
    }
    lines = [
        f"{ATOMS} directions of width {WIDTH}, {ACTIVE} active, {NOISE:.0%} noise, "
        f"{len(rows):,} tokens; recovered: cosine > {WANTED}; wanted: {WANTED:.0%} of them",
        "",
        "| method | recovered | variance explained | L0 | latents that fire | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, method in methods.items():
        start = time.perf_counter()
        autoencoder = method(rows)
        seconds = time.perf_counter() - start
        found = measure(autoencoder, held_out.split(4096))
        lines.append(
            f"| {name} | {recovered(atoms, autoencoder):.1%} | {found.explained_variance:.4f} "
            f"| {found.l0:.2f} | {1 - found.dead_share:.1%} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"
