"""What ``import neuron_explainer.models`` costs beyond ``import torch``, in fresh interpreters."""

import statistics
import subprocess
import sys

CONTESTANTS = {
    "python": "pass",
    "neuron_explainer": "import neuron_explainer",
    "torch": "import torch",
    "torch + neuron_explainer.models": "import torch, neuron_explainer.models",
}


def seconds(code: str) -> float:
    """Wall-clock seconds of ``code`` in a new interpreter, start-up left out."""
    timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def run(repeats: int) -> str:
    """A table of medians; the contestants take turns so that a busy moment hits them all."""
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for code in CONTESTANTS.values():
        seconds(code)  # warm the disk cache
    for _ in range(repeats):
        for name, code in CONTESTANTS.items():
            times[name].append(seconds(code))
    lines = [f"{'import':<34} median s   min-max ({repeats} rounds)"]
    for name, values in times.items():
        median = statistics.median(values)
        lines.append(f"{name:<34} {median:8.3f}   {min(values):.3f}-{max(values):.3f}")
    extra = [
        both - torch
        for both, torch in zip(
            times["torch + neuron_explainer.models"], times["torch"], strict=True
        )
    ]
    lines.append(f"{'models beyond torch':<34} {statistics.median(extra):8.3f}")
    return "\n".join(lines)
