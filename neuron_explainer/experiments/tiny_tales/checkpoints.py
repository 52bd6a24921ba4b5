"""Checkpoints of the two training loops: written whole or not at all, resumed only by their recipe."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.errors import CheckpointError


@dataclass(frozen=True)
class StoredState:
    """What a loop left behind, and after how many steps."""

    step: int
    state: dict[str, Any]


def save_checkpoint(path: Path, config: dict[str, Any], step: int, state: dict[str, Any]) -> None:
    """Replace the checkpoint at ``path`` in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save({"config": config, "step": step, **state}, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, config: dict[str, Any]) -> StoredState | None:
    """The checkpoint at ``path``, None if there is none; an error if it has another recipe."""
    if not path.exists():
        return None
    stored = torch.load(path, weights_only=True)
    check_same_recipe(path, stored.pop("config"), config, stored["step"])
    return StoredState(stored.pop("step"), stored)


def check_same_recipe(path: Path, stored: dict[str, Any], asked: dict[str, Any], step: int) -> None:
    """Refuse to go on with other settings; the end may still move while the rate is level."""
    free = {"steps", "decay_steps"}
    changed = [key for key in asked if key not in free and asked[key] != stored.get(key)]
    if changed:
        differences = ", ".join(f"{k}: {stored.get(k)!r} -> {asked[k]!r}" for k in changed)
        raise CheckpointError(
            f"{str(path)!r} was trained with other settings ({differences}); "
            "start in another folder or give the same settings."
        )
    if asked["steps"] == stored["steps"] and asked["decay_steps"] == stored["decay_steps"]:
        return
    decay_begins = min(s["steps"] - s["decay_steps"] for s in (stored, asked))
    if step > decay_begins:
        raise CheckpointError(
            f"{str(path)!r} is at step {step}, where the learning rate decays "
            f"(from step {decay_begins} on); the end of the run can no longer be moved."
        )
