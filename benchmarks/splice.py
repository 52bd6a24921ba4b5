"""An autoencoder in every layer of a model: what a pass and a sampled token cost."""

from collections.abc import Mapping

from benchmarks.encode import SAE_LENS, K
from benchmarks.harness import Contestant, Entry, Race
from benchmarks.workloads import NEW_TOKENS, PROMPT, Setup

OURS = Contestant("neuron_explainer", "splice_ours")
FLOOR = "no autoencoders, and the encodings apart"
WAYS = {
    "plain": "no autoencoders",
    "floor": FLOOR,
    "reconstructed": "neuron_explainer, replaced",
    "ablated": "neuron_explainer, a latent ablated, the error kept",
    "formula": "the original's formula, replaced",
}
LENS = Contestant(
    "SAELens, replaced",
    "splice_sae_lens",
    peer=SAE_LENS.peer,
    distribution=SAE_LENS.distribution,
    optional=True,
)


def races(setup: Setup) -> list[Race]:
    """Logits of a batch, and sampling."""
    latents, n_new = (512, 3) if setup.quick else (32768, NEW_TOKENS)
    size = {"folder": setup.folder, "latents": latents, "k": K}

    def entries(workload: str, settings: Mapping[str, object]) -> list[Entry]:
        # One process for all ways: the autoencoders take gigabytes.
        ours = [Entry(OURS, workload, {**settings, "way": w}, label) for w, label in WAYS.items()]
        return [*ours, Entry(LENS, workload, settings)]

    shape = (2, 8) if setup.quick else (4, 128)
    passes, sampling = (
        {**size, "tokens": setup.tokens(*shape)},
        {
            **size,
            "prompts": setup.tokens(1, PROMPT),
            "n_new": n_new,
        },
    )
    what = f"TopK autoencoders of {latents} latents in all layers"
    return [
        Race(
            f"logits {shape}, {what}",
            entries("logits", passes),
            FLOOR,
            rounds=3,
            remark='"The encodings apart": one sparse encoding a layer of as many tokens.',
        ),
        Race(
            f"{n_new} greedy tokens, {what}",
            entries("greedy", sampling),
            FLOOR,
            rounds=3,
            remark='"The encodings apart": each encoder\'s weights are read once a token.',
        ),
    ]
