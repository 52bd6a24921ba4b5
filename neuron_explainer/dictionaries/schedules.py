"""Factors that change with the step: learning rate, sparsity penalty, number of active latents."""

import math
from typing import Literal

Decay = Literal["none", "linear", "cosine"]


def learning_rate_factor(
    step: int,
    steps: int,
    warmup_steps: int,
    decay: Decay,
    decay_steps: int,
    end: float,
    restart_every: int = 0,
) -> float:
    """The factor on the learning rate at ``step`` (from 0): it rises linearly, stays at 1, then falls to
    about ``end`` at the last step.

    With ``restart_every`` the rise is repeated after every ``restart_every`` steps, because latents that
    were just resampled need it.
    """
    since = step % restart_every if restart_every else step
    up = min(1.0, (since + 1) / warmup_steps) if warmup_steps else 1.0
    if decay == "none" or not decay_steps:
        return up
    left = min(1.0, (steps - step) / decay_steps)
    if decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return min(up, end + (1 - end) * left)


def ramp(step: int, steps: int) -> float:
    """A factor that rises linearly from just above 0 at step 0 to 1 after ``steps`` steps; always 1 if
    ``steps`` is 0."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def annealed_k(step: int, k: int, k_start: int, steps: int) -> int:
    """The number of active latents at ``step``: it falls linearly from ``k_start`` to ``k``."""
    if step >= steps:
        return k
    return max(k, round(k_start + (k - k_start) * step / steps))
