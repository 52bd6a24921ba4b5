"""Figures of a tiny dictionary as other libraries compute them: what ``compat=`` must agree with.

Run inside each peer's own environment, which has nothing of this package installed (how to make one:
``make_fixtures.py``):

    peer/bin/python benchmarks/peers/make_metrics.py sae-lens

Likewise ``dictionary-learning`` and ``sparsify``. Each writes ``tests/fixtures/peers/metrics/<peer>.json``
with the figures of the peer's own code and its version. Weights and inputs are formulas, not random
numbers, and stand in this file: the tests use the same.

The model is a toy: the activation at a token is the mean of the embeddings up to it, the logits are a
linear map of it.
"""

import argparse
import importlib
import json
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "tests" / "fixtures" / "peers" / "metrics"
N, N_LATENTS, N_VOCAB, K = 8, 24, 13, 5


def wave(*shape: int, seed: float) -> Tensor:
    """Numbers between -1 and 1 without a pattern that matters, in float32."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * i * i + seed * (i + 1)).float().view(shape)


def weights() -> dict[str, Tensor]:
    """``encoder [l, n]``, ``encoder_bias [l]``, ``decoder [l, n]``, ``bias [n]``."""
    return {
        "encoder": wave(N_LATENTS, N, seed=0.1),
        "encoder_bias": 0.3 * wave(N_LATENTS, seed=0.2) - 0.4,
        "decoder": 0.2 * wave(N_LATENTS, N, seed=0.3),
        "bias": 0.5 * wave(N, seed=0.4),
    }


def batches() -> list[Tensor]:
    """Token ids ``[b, s]``: two batches of unequal size."""
    ids = (7 * torch.arange(35) ** 2 + torch.arange(35) // 3) % N_VOCAB
    return [ids[:21].view(3, 7), ids[21:].view(2, 7)]


def activations(tokens: Tensor) -> Tensor:
    """``[b, s] -> [b, s, n]``, with a mean that is not zero."""
    embedded = (2 * wave(N_VOCAB, N, seed=0.5) + 0.7)[tokens]
    return embedded.cumsum(dim=1) / torch.arange(1, tokens.shape[1] + 1)[:, None] ** 0.5


def logits(x: Tensor) -> Tensor:
    """``[b, s, n] -> [b, s, v]``"""
    return x @ wave(N, N_VOCAB, seed=0.6)


def ce(values: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token, ``[b, s - 1]``."""
    log_p = values.log_softmax(dim=-1)[:, :-1]
    return -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)


# ---- peers -----------------------------------------------------------------------------------------


class ToyModel:
    """As much of a HookedTransformer as SAELens's evaluation asks for."""

    def __call__(self, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.run_with_hooks(tokens)

    def run_with_cache(self, tokens: Tensor, **kwargs: Any) -> tuple[None, dict[str, Tensor]]:
        return None, {"blocks.0.hook_mlp_out": activations(tokens)}

    def run_with_hooks(
        self, tokens: Tensor, fwd_hooks: Any = (), **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        x = activations(tokens)
        for _, hook in fwd_hooks:
            x = hook(x, hook=None)
        return logits(x), ce(logits(x), tokens)


def of_sae_lens() -> dict[str, float]:
    sae_lens = importlib.import_module("sae_lens")
    evals = importlib.import_module("sae_lens.evals")
    scaler = importlib.import_module("sae_lens.training.activation_scaler").ActivationScaler()
    sae = sae_lens.SAE.from_dict(
        {
            "architecture": "standard",
            "d_in": N,
            "d_sae": N_LATENTS,
            "metadata": {"hook_name": "blocks.0.hook_mlp_out", "hook_head_index": None},
        }
    )
    w = weights()
    sae.load_state_dict(
        {
            "W_enc": w["encoder"].T,
            "b_enc": w["encoder_bias"],
            "W_dec": w["decoder"],
            "b_dec": w["bias"],
        }
    )

    def store() -> SimpleNamespace:
        rest = iter(batches())
        return SimpleNamespace(get_batch_tokens=lambda size: next(rest))

    with torch.no_grad():
        figures, _ = evals.get_sparsity_and_variance_metrics(
            sae, ToyModel(), store(), scaler, 2, True, True, True, True, 3, {}
        )
        losses = evals.get_downstream_reconstruction_metrics(
            sae, ToyModel(), store(), scaler, True, True, 2, 3
        )
    return {**figures, **losses}


def of_dictionary_learning() -> dict[str, float]:
    evaluation = importlib.import_module("dictionary_learning.evaluation")
    dictionary = importlib.import_module("dictionary_learning.dictionary")
    w = weights()
    ae = dictionary.AutoEncoder(N, N_LATENTS)
    ae.load_state_dict(
        {
            "encoder.weight": w["encoder"],
            "encoder.bias": w["encoder_bias"],
            "decoder.weight": w["decoder"].T,
            "bias": w["bias"],
        }
    )
    rows = iter([activations(tokens).flatten(0, 1) for tokens in batches()])
    figures: dict[str, float] = evaluation.evaluate(ae, rows, n_batches=2)
    return figures


def of_sparsify() -> dict[str, float]:
    sparsify = importlib.import_module("sparsify")
    cfg = sparsify.SparseCoderConfig(num_latents=N_LATENTS, k=K)
    coder = sparsify.SparseCoder(N, cfg)
    w = weights()
    coder.load_state_dict(
        {
            "encoder.weight": w["encoder"],
            "encoder.bias": w["encoder_bias"],
            "W_dec": w["decoder"],
            "b_dec": w["bias"],
        }
    )
    with torch.no_grad():
        found = [float(coder(activations(tokens).flatten(0, 1)).fvu) for tokens in batches()]
    return {"fvu": sum(found) / len(found)}


PEERS = {
    "sae-lens": ("sae-lens", of_sae_lens),
    "dictionary-learning": ("dictionary-learning", of_dictionary_learning),
    "sparsify": ("eai-sparsify", of_sparsify),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    name = parser.parse_args().peer
    warnings.simplefilter("ignore")
    package, figures_of = PEERS[name]
    found = {"version": metadata.version(package), "figures": figures_of()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
