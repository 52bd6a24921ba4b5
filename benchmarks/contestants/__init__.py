"""Who takes part. See :mod:`benchmarks.harness` for what a contestant's module holds."""

from benchmarks.harness import Contestant

OURS = Contestant("neuron_explainer", "ours")
SDPA = Contestant("transformers, sdpa", "huggingface", "sdpa", "transformers", "transformers")
EAGER = Contestant("transformers, eager", "huggingface", "eager", "transformers", "transformers")
LENS_3 = Contestant(
    "TransformerLens 3",
    "transformer_lens",
    peer="transformer-lens-3",
    distribution="transformer-lens",
    major="3.",
    optional=True,
)
LENS_4 = Contestant(
    "TransformerLens 4",
    "transformer_lens",
    peer="transformer-lens-4",
    distribution="transformer-lens",
    major="4.",
    optional=True,
)
NNSIGHT = Contestant("nnsight", "nnsight", peer="nnsight", distribution="nnsight", optional=True)
PLAIN = Contestant("plain torch", "plain")
FLOOR = Contestant("GEMM floor", "floor")

MODELS = [OURS, SDPA, EAGER, LENS_3, LENS_4, NNSIGHT, PLAIN, FLOOR]
"""Libraries that run a whole language model."""
