"""A contestant's side of the pipe: reads a command as a line of JSON, runs it, answers with a line.

It runs in the contestant's environment, so it imports only the standard library, torch and the
contestant's module. What libraries print goes to stderr, because stdout is the pipe.
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.workloads import Prepared, Refusal


def checksum(value: Any) -> list[float]:
    """A few numbers that depend on every element of a tensor; whole numbers are returned as they are.

    A list of tensors is stacked first.

    They are the mean magnitude, and projections on three directions whose weights differ from element to
    element, scaled so that a change of any element by about a thousandth shows, and so does an exchange of
    two elements.
    """
    import torch

    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        value = torch.stack(value)
    elif isinstance(value, list):
        return [float(x) for row in value for x in (row if isinstance(row, list) else [row])]
    flat = value.detach().flatten().double()
    index = torch.arange(flat.numel(), dtype=torch.float64)
    projections = [
        float(flat @ (index * step).frac_().sub_(0.5)) * (12 / flat.numel()) ** 0.5
        for step in (0.618033988749895, 0.7548776662466927, 0.8191725133961645)
    ]
    return [float(flat.abs().mean()), *projections]


class Child:
    """The commands; each returns its answer."""

    def __init__(self) -> None:
        self.module: Any = None
        self.prepared: dict[str, tuple[Prepared, bool]] = {}

    def hello(self, module: str, distribution: str, major: str, threads: int) -> dict[str, Any]:
        version = _version(distribution, major)
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        try:
            self.module = importlib.import_module(f"benchmarks.contestants.{module}")
        except ModuleNotFoundError as error:
            if str(error.name).startswith(("benchmarks", "neuron_explainer")):
                raise
            raise Refusal(f"not installed ({error.name} is missing)") from None
        return {"version": version, "torch": torch.__version__}

    def prepare(
        self, key: str, workload: str, settings: dict[str, Any], grad: bool
    ) -> dict[str, Any]:
        make = getattr(self.module, workload, None)
        if make is None:
            raise Refusal("not offered")
        made = make(**settings)
        prepared = made if isinstance(made, Prepared) else Prepared(made)
        self.prepared[key] = prepared, grad
        return {"note": prepared.note}

    def check(self, key: str) -> dict[str, Any]:
        seconds, result = self._call(key)
        return {
            "seconds": seconds,
            "checksum": {name: checksum(value) for name, value in result.items()},
        }

    def run(self, key: str) -> dict[str, Any]:
        return {"seconds": self._call(key)[0]}

    def measure(self, key: str) -> dict[str, Any]:
        gc.collect()
        _give_back_freed_memory()
        before = _start_high_water_mark()
        seconds = self._call(key)[0]
        return {"seconds": seconds, "peak_mib": (_status("VmHWM") - before) / 1024}

    def drop(self, key: str) -> dict[str, Any]:
        del self.prepared[key]
        gc.collect()
        return {}

    def _call(self, key: str) -> tuple[float, Mapping[str, Any]]:
        import torch

        prepared, grad = self.prepared[key]
        with torch.set_grad_enabled(grad):
            start = time.perf_counter()
            result = prepared.work()
            return time.perf_counter() - start, result


def _version(distribution: str, major: str) -> str:
    if not distribution:
        return ""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Refusal("not installed") from None
    if not version.startswith(major):
        raise Refusal(f"not installed (version {version} is)")
    return version


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in KiB; 0 on systems without it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0


def _start_high_water_mark() -> int:
    """Reset the peak to what is resident now, if the kernel allows it, and return it in KiB."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return _status("VmHWM")


def _give_back_freed_memory() -> None:
    """Return freed memory to the system: what malloc keeps would hide how much the next call needs."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child = Child()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(child, request.pop("do"))(**request)
        except Refusal as refusal:
            answer = {"error": str(refusal)}
        except Exception as error:  # whatever a library raises: it is reported in the table
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        print(json.dumps(answer), file=pipe, flush=True)


if __name__ == "__main__":
    main()
