"""What terminals show: tables of text, values that hold tensors, and text of foreign origin made safe."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence


def text_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, n_left: int = 1, rule: bool = False
) -> str:
    """Rows of cells as lines, each column as wide as its widest cell.

    Args:
        head: the columns' titles; empty for none.
        rows: as many cells in each as there are titles.
        n_left: how many of the first columns to align left; the others, of numbers, are aligned right.
        rule: draw a line under the titles.
    """
    rows = [list(row) for row in rows]
    lines = [list(head), *rows] if head else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if head and rule:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < n_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage, or words where it is not defined, as a share of a total of 0 is not."""
    if not math.isfinite(100 * share):
        return "an undefined share"
    return f"{round(share, digits + 2) + 0.0:.{digits}%}"  # the sum turns -0.0 into 0.0


def by_shape(owner: object) -> str:
    """The ``repr`` of a dataclass or named tuple, with shapes in the place of tensors' numbers.

    Such as ``Latents(values=[2, 16] float32, indices=[2, 16] int64, n_latents=512)``.
    """
    asdict = getattr(owner, "_asdict", None)  # that of named tuples
    fields: Mapping[str, object] = vars(owner) if asdict is None else asdict()
    shown = ", ".join(f"{name}={_shape_or_repr(value)}" for name, value in fields.items())
    return f"{type(owner).__name__}({shown})"


def _shape_or_repr(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shape_or_repr(item)}' for key, item in value.items())}}}"
    if callable(value):
        return getattr(value, "__name__", None) or type(value).__name__
    return repr(value)


# C0 and C1 controls but tab and newline, the marks that turn the direction of a line, and Unicode's
# own line and paragraph separators.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """Text of any origin, safe to print: control characters are written as Python writes them.

    Names, tokens and prompts may hold sequences that rewrite the screen or the terminal's settings.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
