"""Logits of every position; no activation is kept or changed."""

from benchmarks.contestants import MODELS, SDPA
from benchmarks.harness import Race, everyone
from benchmarks.workloads import Setup


def races(setup: Setup) -> list[Race]:
    """A batch of four texts, and one long text."""
    return [
        Race(
            f"logits ({batch}, {length})",
            everyone(
                MODELS, "logits", {"folder": setup.folder, "tokens": setup.tokens(batch, length)}
            ),
            SDPA.name,
            rounds=rounds,
        )
        for batch, length, rounds in ((4, 128, None), (1, 1024, 3))
    ]
