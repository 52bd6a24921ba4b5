"""Who takes part. See :mod:`benchmarks.harness` for what a contestant's module holds."""

from benchmarks.harness import Contestant

OURS = Contestant("neuron_explainer", "ours")
SDPA = Contestant("transformers, sdpa", "huggingface", "sdpa", "transformers", "transformers")
EAGER = Contestant("transformers, eager", "huggingface", "eager", "transformers", "transformers")
_LENS_3 = {"peer": "transformer-lens-3", "distribution": "transformer-lens", "major": "3."}
_LENS_4 = {"peer": "transformer-lens-4", "distribution": "transformer-lens", "major": "4."}
HOOKED = Contestant(
    "TransformerLens 3, HookedTransformer", "transformer_lens", "hooked", **_LENS_3, optional=True
)
BRIDGE_3 = Contestant(
    "TransformerLens 3, bridge", "transformer_lens", "bridge", **_LENS_3, optional=True
)
BRIDGE_4 = Contestant(
    "TransformerLens 4, bridge", "transformer_lens", "bridge", **_LENS_4, optional=True
)
NNSIGHT = Contestant("nnsight", "nnsight", peer="nnsight", distribution="nnsight", optional=True)
PLAIN = Contestant("plain torch", "plain")
FLOOR = Contestant("GEMM floor", "floor")

MODELS = [OURS, SDPA, EAGER, HOOKED, BRIDGE_3, BRIDGE_4, NNSIGHT, PLAIN, FLOOR]
"""Libraries that run a whole language model."""
