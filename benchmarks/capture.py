"""Logits, and activations that are kept during the same pass."""

from benchmarks.contestants import MODELS, SDPA
from benchmarks.harness import Race, everyone
from benchmarks.workloads import Setup


def races(setup: Setup) -> list[Race]:
    """One site of every layer, and all sites."""
    work = {"folder": setup.folder, "tokens": setup.tokens(4, 128)}
    return [
        Race(
            "logits (4, 128), keeping MLP activations of every layer",
            everyone(MODELS, "keep_post_act", work),
            SDPA.name,
        ),
        Race(
            "logits (4, 128), keeping every site, attention patterns included",
            everyone(MODELS, "keep_all", work),
            SDPA.name,
            rounds=3,
            remark="Everything that each library can keep; the MiB stand beside its name. transformers with "
            "sdpa computes no patterns; its line keeps nothing and serves as a yardstick.",
        ),
    ]
