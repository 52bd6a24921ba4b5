"""Text for terminals: tables, and text of foreign origin made safe to print."""

import re
from collections.abc import Iterable, Sequence


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


# C0 and C1 controls but tab and newline, the marks that turn the direction of a line, and Unicode's
# own line and paragraph separators.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """Text of any origin, safe to print: control characters are written as Python writes them.

    Names, tokens and prompts may hold sequences that rewrite the screen or the terminal's settings.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
