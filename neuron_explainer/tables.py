"""Tables as text, for terminals: the one printer of the package."""

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
