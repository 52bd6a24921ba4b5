"""The learning-rate schedule that both training loops share."""


def warmup_stable_decay(step: int, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Factor on the learning rate at ``step`` of ``steps``: up, level, linearly down to zero.

    The level phase makes the length of a run a late decision: any of its checkpoints can be resumed
    with another ``steps``, as long as the decay has not begun (Hu et al. 2024, arXiv:2404.06395).
    """
    up = (step + 1) / warmup_steps if warmup_steps else 1.0
    down = (steps - step) / decay_steps if decay_steps else 1.0
    return max(0.0, min(1.0, up, down))
