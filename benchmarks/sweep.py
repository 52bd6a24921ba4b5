"""Many interventions on one prompt: patching every layer and position, ablating every head."""

from collections.abc import Mapping

from benchmarks.harness import Contestant, Entry, Race
from benchmarks.workloads import Setup

LENGTH = 64
_LENS = {"peer": "transformer-lens-3", "distribution": "transformer-lens", "major": "3."}
OURS = Contestant("neuron_explainer, sweep", "sweep_ours")
LOOP = Contestant("neuron_explainer, a plain loop", "sweep_ours")
LENS = Contestant(
    "TransformerLens 3, HookedTransformer",
    "sweep_transformer_lens",
    "hooked",
    **_LENS,
    optional=True,
)
NNSIGHT = Contestant(
    "nnsight, invokes in batches",
    "sweep_nnsight",
    peer="nnsight",
    distribution="nnsight",
    optional=True,
)
FLOOR = Contestant("GEMM floor", "sweep_floor")


def races(setup: Setup) -> list[Race]:
    """Each race gives one number for each cell: a difference of two logits after the last token."""
    length = 8 if setup.quick else LENGTH
    tokens, source = setup.tokens(2, length)[:1], setup.tokens(2, length)[1:]
    work = {"folder": setup.folder, "tokens": tokens}

    def entries(workload: str, settings: Mapping[str, object]) -> list[Entry]:
        return [
            Entry(OURS, workload, settings),
            Entry(LOOP, workload, {**settings, "loop": True}),
            Entry(LENS, workload, settings),
            Entry(NNSIGHT, workload, settings),
            Entry(FLOOR, workload, settings),
        ]

    remark = "One number a cell. The floor is the products that have to be redone."
    return [
        Race(
            f"the stream before each layer, at each of {length} positions, patched",
            entries("patching", {**work, "source": source}),
            OURS.name,
            rounds=2,
            remark=remark,
        ),
        Race(
            f"each head ablated, prompt of {length} tokens",
            entries("ablated_heads", work),
            OURS.name,
            rounds=3,
            remark=remark,
        ),
    ]
