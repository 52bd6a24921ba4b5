"""Collating: top, stratified, uniform and weighted examples and figures of every latent, in one pass.

The floor is the forward pass up to the last dictionary's location and the three encoders, alone. ``--peers``
adds SAEDashboard, which takes one dictionary at a time and some of its latents in each pass: it gets as many
latents as it takes at once, and the remark beside its name says what all would take.

The first batches cost more than later ones: most of what they show is kept, and memory is touched for the
first time. So a long text has a smaller ratio than a short one.
"""

from benchmarks.harness import Contestant, Entry, Race
from benchmarks.workloads import Setup

FLOOR = Contestant("forward and encode alone", "collate_ours", "floor")
OURS = Contestant("neuron_explainer", "collate_ours", "collate")
SAE_DASHBOARD = Contestant(
    "SAEDashboard",
    "collate_sae_dashboard",
    peer="sae-dashboard",
    distribution="sae-dashboard",
    optional=True,
)
K = 32


def races(setup: Setup) -> list[Race]:
    """Three dictionaries, and some latents of one."""
    latents, batch, windows, few_windows = (512, 4, 8, 8) if setup.quick else (32768, 32, 256, 32)
    layers = [0, 1, 1] if setup.quick else [3, 7, 11]
    few = 16 if setup.quick else 256
    work = {"folder": setup.folder, "batch": batch, "latents": latents, "k": K}
    three = {**work, "layers": layers, "tokens": setup.tokens(windows, 127)}
    one = {**work, "layers": layers[-1:], "tokens": setup.tokens(few_windows, 127)}
    return [
        Race(
            f"3 × {latents} latents, {windows * 127} tokens",
            [Entry(c, "three", three) for c in (FLOOR, OURS)],
            FLOOR.name,
            rounds=3,
        ),
        Race(
            f"one dictionary of {latents} latents, {few_windows * 127} tokens",
            [
                Entry(FLOOR, "three", one),
                Entry(OURS, "three", one),
                Entry(
                    SAE_DASHBOARD, "some", {**one, "few": few}, label=f"SAEDashboard, {few} latents"
                ),
            ],
            OURS.name,
            rounds=3,
        ),
    ]
