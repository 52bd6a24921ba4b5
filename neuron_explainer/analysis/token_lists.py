"""Two lists of tokens side by side, as text and as HTML, and a small histogram."""

import html
from collections.abc import Sequence
from itertools import zip_longest
from math import log1p
from typing import NamedTuple

from neuron_explainer.tables import text_table

_WIDTH, _HEIGHT = 240, 60


class TokenValue(NamedTuple):
    """A token of a list."""

    token: int
    text: str
    """As :func:`~neuron_explainer.analysis.highlights.token_string` shows it."""
    value: float


TokenValues = tuple[TokenValue, ...]


def lists_as_text(titles: tuple[str, str], top: TokenValues, bottom: TokenValues) -> str:
    """A table of four columns: tokens and values of both lists."""
    rows = [[*_cells(up), *_cells(down)] for up, down in zip_longest(top, bottom)]
    head = [titles[0], "", titles[1], ""]
    widest = max((len(row[2]) for row in rows), default=0)
    # Of the columns only the first is aligned left; pad the third by hand.
    padded = [[a, b, c.ljust(widest), d] for a, b, c, d in rows]
    head[2] = head[2].ljust(widest)
    return text_table(head, padded)


def lists_as_html(titles: tuple[str, str], top: TokenValues, bottom: TokenValues) -> str:
    """The same as a table without script or style sheet; tokens are escaped."""
    head = "".join(f"<th>{html.escape(title)}</th><th></th>" for title in titles)
    body = "".join(
        f"<tr>{''.join(_html_cells(each) for each in pair)}</tr>"
        for pair in zip_longest(top, bottom)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def histogram_svg(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Bars as high as the logarithm of the counts, red below 0 and blue above."""
    most = log1p(max(counts, default=0)) or 1.0
    step = _WIDTH / max(1, len(counts))
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT * (1 - log1p(count) / most):.1f}" width="{step:.1f}" '
        f'height="{_HEIGHT * log1p(count) / most:.1f}" fill="{"#c33" if edges[i] < 0 else "#36c"}"/>'
        for i, count in enumerate(counts)
        if count
    )
    label = f"{edges[0]:.3g} to {edges[-1]:.3g}, heights on a log scale"
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><title>{label}</title>{bars}</svg>'


def _cells(each: TokenValue | None) -> list[str]:
    return ["", ""] if each is None else [f"'{each.text}'", f"{each.value:+.3f}"]


def _html_cells(each: TokenValue | None) -> str:
    if each is None:
        return "<td></td><td></td>"
    return f"<td><code>{html.escape(each.text)}</code></td><td>{each.value:+.3f}</td>"
