"""Logits, and activations kept on the way."""

from benchmarks.contestants import MODELS, SDPA
from benchmarks.harness import Race, everyone
from benchmarks.workloads import Setup


def races(setup: Setup) -> list[Race]:
    """One site of every layer; every site there is."""
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
            remark="What each library calls everything; how many MiB that is stands beside its name. "
            "transformers with sdpa forms no patterns: its line keeps nothing, as a yardstick.",
        ),
    ]
