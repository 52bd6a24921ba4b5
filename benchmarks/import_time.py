"""Time of an import beyond that of ``import torch``, in fresh interpreters."""

import math
import statistics
import subprocess
import sys
from collections.abc import Mapping

IMPORTS = {
    "neuron_explainer": ("", "neuron_explainer"),
    "neuron_explainer.models": ("", "torch, neuron_explainer.models"),
    "transformers, GPT-2": ("transformers", "torch, transformers.models.gpt2.modeling_gpt2"),
    "TransformerLens 3": ("transformer-lens-3", "torch, transformer_lens"),
    "TransformerLens 4": ("transformer-lens-4", "torch, transformer_lens"),
    "nnsight": ("nnsight", "torch, nnsight"),
    "SAELens": ("sae-lens", "torch, sae_lens"),
    "dictionary_learning": ("dictionary-learning", "torch, dictionary_learning"),
    "sparsify": ("eai-sparsify", "torch, sparsify"),
}
"""Name of the line: the peer whose interpreter runs it (empty for this one), and what is imported."""


class ImportFails(Exception):
    """Raised with the last line that the interpreter wrote."""


def seconds(python: str, modules: str) -> float:
    """Wall-clock seconds of an import in a new interpreter, without its start-up."""
    timed = (
        f"import time; t = time.perf_counter(); import {modules}; print(time.perf_counter() - t)"
    )
    try:
        run = subprocess.run([python, "-c", timed], capture_output=True, text=True)
    except OSError as error:
        raise ImportFails(str(error)) from None
    if run.returncode:
        raise ImportFails(run.stderr.strip().splitlines()[-1])
    return float(run.stdout.split()[-1])


def run(
    rounds: int,
    pythons: Mapping[str, str] | None = None,
    imports: Mapping[str, tuple[str, str]] = IMPORTS,
) -> str:
    """Time all imports and return a table of medians.

    Args:
        rounds: how often each import is timed. They take turns, so that a busy moment affects all of
            them; an ``import torch`` of the same interpreter is timed beside each and subtracted.
        pythons: interpreters by peer name; a peer without one is left out.
        imports: what to time, as :data:`IMPORTS` has it.
    """
    pythons = {"": sys.executable, **(pythons or {})}
    lines = ["| import | median s | min-max | beyond torch, s |", "|---|--:|--:|--:|"]
    chosen = {
        name: (pythons[peer], modules)
        for name, (peer, modules) in imports.items()
        if peer in pythons
    }
    times: dict[str, list[float]] = {name: [] for name in chosen}
    beyond: dict[str, list[float]] = {name: [] for name in chosen}
    for round_ in range(-1, rounds):  # the first warms the disk cache
        for name, (python, modules) in list(chosen.items()):
            try:
                base = seconds(python, "torch") if modules.startswith("torch") else math.nan
                total = seconds(python, modules)
            except ImportFails as error:
                lines.append(f"| {name} | - | - | {error} |")
                del chosen[name]
                continue
            if round_ >= 0:
                times[name].append(total)
                beyond[name].append(total - base)
    for name in chosen:
        extra = statistics.median(beyond[name])
        lines.append(
            f"| {name} | {statistics.median(times[name]):.3f} "
            f"| {min(times[name]):.3f}-{max(times[name]):.3f} "
            f"| {'does not import it' if math.isnan(extra) else f'{extra:.3f}'} |"
        )
    return "\n".join(lines)
