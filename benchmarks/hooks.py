"""The cost of hooks, and of other ways to run the model."""

from benchmarks.contestants import FLOOR, HOOKED, MODELS, OURS, SDPA
from benchmarks.harness import Entry, Race, everyone
from benchmarks.workloads import Setup

CALLS = 10_000


def races(setup: Setup) -> list[Race]:
    """One neuron ablated, ways to run the model, and a call of a hook that does nothing."""
    work = {"folder": setup.folder, "tokens": setup.tokens(4, 128)}
    calls = {"calls": CALLS, "width": 4 * setup.sizes["n_embd"]}
    return [
        Race(
            "logits (4, 128), one neuron ablated",
            everyone(MODELS, "ablated_logits", {**work, **setup.ablated}),
            SDPA.name,
        ),
        Race(
            "logits (4, 128), ways to run the model",
            [
                Entry(OURS, "logits", work),
                Entry(OURS, "logits_empty_hooks", work, "an empty tree of hooks"),
                Entry(OURS, "compiled_logits", work, "torch.compile"),
                Entry(OURS, "bf16_logits", work, "bfloat16", apart=True),
                Entry(FLOOR, "logits", work),
            ],
            OURS.name,
        ),
        Race(
            "one call at a site",
            [
                *everyone([OURS, SDPA, HOOKED], "calls_no_op_hook", calls),
                Entry(OURS, "calls_no_hook", calls, "neuron_explainer, no hook there"),
            ],
            OURS.name,
            calls=CALLS,
            remark="A hook that does nothing, on one token's MLP activations. It computes no products, so "
            "there is no floor.",
        ),
    ]
