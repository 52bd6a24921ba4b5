"""From text to a measured dictionary: where the time goes.

Activations are harvested while the dictionary is trained, as ``neuron-explainer train`` does it. On a CPU
the model and the steps take turns; the second line of each size uses a thread that fetches ahead, as on a
GPU. Shares are fractions of the wall time of training after the first batch; the first filling of the
buffer, a fixed cost, has its own column. *Forward* is the time in the model. *Waiting* is the time in which
training waits for the thread, whose forward passes overlap with everything else. *Step* is the rest of the
training time, after taking batches from the buffer.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from neuron_explainer.activations import DataConfig, ShuffleBuffer, open_buffer, open_windows
from neuron_explainer.dictionaries import TopKConfig, TrainConfig, train
from neuron_explainer.evaluation.evaluate import evaluate
from neuron_explainer.models.model_context import ModelContext

MODEL, LOCATION = "tiny-tales", "1/resid.torso.delta_mlp"
EVALUATED = 16
"""How many batches of windows are evaluated."""


@dataclass
class Clock:
    """Yields batches of a buffer and counts the seconds that this takes; the first batch fills the buffer."""

    buffer: ShuffleBuffer
    taking: float = 0.0
    first: dict[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batch = next(self.buffer)
            self.taking += time.perf_counter() - start
            self.first = self.first or self.now()
            yield batch

    def now(self) -> dict[str, float]:
        """Seconds since the beginning, by what they were spent on."""
        return {
            "wall": time.perf_counter(),
            "taking": self.taking,
            "waiting": self.buffer.waited_s,
            "forward": self.buffer.forward_s,
        }

    def since_first(self) -> dict[str, float]:
        """Seconds since the first batch arrived."""
        now = self.now()
        return {name: now[name] - self.first[name] for name in now}


def run(corpus: Path, scratch: Path, pythons: Mapping[str, str] | None, quick: bool) -> str:
    """Harvest, train, evaluate, and return the table.

    Args:
        corpus: text, as ``open_windows`` takes it.
        scratch: not used.
        pythons: not used.
        quick: take only a few steps, to see that it runs.
    """
    sizes = [(64, 4)] if quick else SIZES
    lines = [line(corpus, quick, n, k, ahead) for n, k in sizes for ahead in (False, True)]
    return "\n".join([HEAD, RULE, *lines]) + "\n"


SIZES = [(1536, 16), (6144, 32)]
"""Number of latents, and how many of them are active."""
HEAD = (
    f"| TopK on {LOCATION} of {MODEL} | tokens/s | step | forward | waiting | taking batches "
    "| first filling s | training s | evaluation s | FVU | CE recovered |"
)
RULE = "|---|" + "--:|" * (HEAD.count("|") - 2)


def line(corpus: Path, quick: bool, latents: int, k: int, ahead: bool) -> str:
    """The line of one size, with or without a thread that fetches ahead."""
    context = ModelContext.from_model_type(MODEL)
    data = DataConfig(buffer_tokens=16_384 if quick else 65_536)
    steps, batch = (12, 128) if quick else (256, 4096)
    config = TrainConfig(
        TopKConfig(k=k), n_latents=latents, steps=steps, batch_size=batch, lr=1.5e-3
    )
    start = time.perf_counter()
    with open_buffer(context, corpus, LOCATION, data, batch, prefetch=ahead) as buffer:
        opened = time.perf_counter()
        clock = Clock(buffer)
        autoencoder = train(config, clock, progress=False)
        spent = clock.since_first()
        filling = clock.first["wall"] - opened
    print(f"  tokenized in {opened - start:.0f} s", file=sys.stderr)
    start = time.perf_counter()
    held = open_windows(context, corpus, data, part="held_out", epochs=None)
    batches = list(islice(held, 1 if quick else EVALUATED))
    found = evaluate(context, autoencoder, batches, location=LOCATION, progress=False)
    evaluation = time.perf_counter() - start
    assert found.losses is not None
    wall, idle = spent["wall"], spent["waiting"]
    taking = spent["taking"] - idle - (0 if ahead else spent["forward"])
    shares = [wall - spent["taking"], spent["forward"], idle, taking]
    how = "in a thread" if ahead else "in turn"
    return (
        f"| {latents} latents, k = {k}, {how} | {(steps - 1) * batch / wall:,.0f} | "
        + " | ".join(f"{seconds / wall:.1%}" for seconds in shares)
        + f" | {filling:.1f} | {wall:.1f} | {evaluation:.1f} | {found.fvu:.4f} "
        f"| {found.losses.recovered_zero:.4f} |"
    )
