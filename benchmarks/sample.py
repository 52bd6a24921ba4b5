"""Greedy generation with a key-value cache."""

from benchmarks.contestants import FLOOR, MODELS, OURS, PLAIN, SDPA
from benchmarks.harness import Entry, Race, everyone
from benchmarks.workloads import BATCH, PROMPT, UNEQUAL, Setup


def races(setup: Setup) -> list[Race]:
    """One text, one with a neuron ablated at every step, a batch, a batch of unequal lengths."""
    n_new, folder, ablated = setup.new_tokens, setup.folder, setup.ablated
    one = {"folder": folder, "prompts": setup.tokens(1, PROMPT), "n_new": n_new}
    batch = {**one, "prompts": setup.tokens(BATCH, PROMPT)}
    unequal = {**one, "prompts": setup.ragged_tokens(UNEQUAL)}
    what = f"{n_new} tokens after {PROMPT}"
    equal = "neuron_explainer, equal lengths, no hook"
    return [
        Race(f"{what}", everyone(MODELS, "greedy", one), SDPA.name),
        Race(
            f"{what}, a neuron ablated",
            everyone(MODELS, "ablated_greedy", {**one, **ablated}),
            SDPA.name,
        ),
        Race(f"{what}, batch of {BATCH}", everyone(MODELS, "greedy", batch), SDPA.name, rounds=3),
        Race(
            f"{n_new} tokens after {min(UNEQUAL)} to {max(UNEQUAL)}, batch of {BATCH}, a neuron ablated",
            [
                Entry(OURS, "greedy", batch, equal, apart=True),
                *everyone(
                    [c for c in MODELS if c not in (PLAIN, FLOOR)],
                    "ablated_greedy",
                    {**unequal, **ablated},
                ),
                Entry(FLOOR, "greedy", batch),
            ],
            equal,
            rounds=3,
        ),
    ]
