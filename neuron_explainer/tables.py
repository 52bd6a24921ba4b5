"""Text for terminals: tables, and text of any origin made safe to show."""

import re
from collections.abc import Iterable, Sequence

# C0 and C1 controls but tab and newline, and the marks that turn the direction of a line.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Tab, newline and the other characters that end a line.
_ENDS = re.compile("[\t\n\u2028\u2029]")


def escaped(text: str, *, one_line: bool = False) -> str:
    """Text of any origin, safe to show: control characters are written as Python writes them.

    Names, tokens and prompts may hold sequences that rewrite the screen or the terminal's settings.

    Args:
        one_line: also write tabs and ends of lines so, as in a cell of a table.
    """
    text = _CONTROLS.sub(_as_python_writes, text)
    return _ENDS.sub(_as_python_writes, text) if one_line else text


def _as_python_writes(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


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
