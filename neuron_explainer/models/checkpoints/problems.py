"""One report of everything in which the tensors of a file differ from what they should be.

If a format has headers (shape, dtype), state dicts are checked by them, so that a wrong file is reported
at once, with all its problems, before gigabytes are read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.errors import CheckpointError, did_you_mean

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor without its values."""

    shape: Shape
    dtype: str
    floating: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorInfo":
        """What is known about a tensor in memory."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), dtype, tensor.is_floating_point())


@dataclass
class Report:
    """Collects problems, to raise them as one error."""

    where: str
    problems: list[tuple[str, str]] = field(default_factory=list)  # (name of a tensor, its problem)

    def add(self, name: str, problem: str) -> None:
        """Add a problem of the thing called ``name``."""
        self.problems.append((name, problem))

    def raise_if_any(self, hint: str = "") -> None:
        """Raise one CheckpointError that lists every problem, sorted by name, if there are any."""
        if not self.problems:
            return
        lines = [f"  {name}: {problem}" for name, problem in sorted(self.problems)]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        text = "\n".join([f"{self.where}: {count}:", *lines])
        raise CheckpointError(f"{text}\n{hint}" if hint else text)


def tensor_problems(
    tensors: Mapping[str, Any], expected: Mapping[str, Shape], integers: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """What is wrong with tensors, by name: missing, unknown, of a wrong shape or kind, not finite.

    ``integers`` need not be floating point, and may have any value. Values are not looked at before
    sizes: a tensor of a few bytes in a file may claim to be gigabytes (stride 0).
    """
    problems = [
        (name, f"missing, expected {list(expected[name])}")
        for name in expected.keys() - tensors.keys()
    ]
    for name in tensors.keys() - expected.keys():
        near = did_you_mean(name, expected.keys() - tensors.keys())
        problems.append((name, f"unexpected, found {described(tensors[name])}.{near}"))
    for name in expected.keys() & tensors.keys():
        value, wanted = tensors[name], list(expected[name])
        if not isinstance(value, torch.Tensor):
            problems.append((name, f"expected a tensor, found {described(value)}"))
            continue
        found = list(value.shape)
        if found != wanted:
            turned = " (transposed?)" if len(found) == 2 and found == wanted[::-1] else ""
            problems.append((name, f"expected shape {wanted}, found {found}{turned}"))
        if odd := not_plain(value):
            problems.append((name, odd))
        elif name in integers:
            continue
        elif value.dtype not in FLOATING_DTYPES:
            dtype = TensorInfo.of(value).dtype
            problems.append((name, f"expected a floating-point dtype, found {dtype}"))
        elif found == wanted and not torch.isfinite(value).all():
            problems.append((name, "holds NaN or infinity"))
    return sorted(problems)


# With which one can calculate; of fewer bits (float8) torch has little more than the storage.
FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def not_plain(value: torch.Tensor) -> str:
    """What keeps a tensor from being read as numbers in memory; empty if nothing does."""
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        return f"expected a dense tensor, found a {kind} one on {value.device}"
    claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > held:
        return f"expected {claimed} bytes for shape {list(value.shape)}, found {held} in the file"
    return ""


def described(value: Any) -> str:
    """A value for an error message: the shape of a tensor, the type of anything else."""
    tensor = isinstance(value, torch.Tensor)
    return str(list(value.shape)) if tensor else f"a {type(value).__name__}"


def compare(report: Report, expected: Mapping[str, Shape], found: Mapping[str, TensorInfo]) -> None:
    """Report every tensor that is missing, unexpected, of a wrong shape or not floating point.

    Values are not checked: weights may be NaN, which may be what is studied.
    """
    for name in expected.keys() - found.keys():
        report.add(name, f"missing, expected {list(expected[name])}")
    for name in found.keys() - expected.keys():
        near = did_you_mean(name, expected.keys() - found.keys())
        report.add(name, f"unexpected, found {list(found[name].shape)}.{near}")
    for name in expected.keys() & found.keys():
        shape = found[name].shape
        if shape != expected[name]:
            report.add(name, f"expected shape {list(expected[name])}, found {list(shape)}")
        if not found[name].floating:
            report.add(name, f"expected a floating-point dtype, found {found[name].dtype}")


def own_copy(
    tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str
) -> torch.Tensor:
    """A contiguous copy that shares no memory with a file or a larger tensor."""
    return tensor.detach().to(
        device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
    )


def damaged(file: str | Path, error: Exception) -> CheckpointError:
    """The error for a file of weights that cannot be read."""
    # The first line may quote the file: its control characters must not reach a terminal.
    lines = [line for line in str(error).splitlines() if line.isprintable()]
    reason = lines[0] if lines else "no details"
    return CheckpointError(
        f"{file}: this file is damaged, incomplete or of another format "
        f"({type(error).__name__}: {reason}). "
        "Copy or download it again; nothing of it was used."
    )
