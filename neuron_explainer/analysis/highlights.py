"""Building blocks of a unit's page, as text and as HTML: tokens, highlights, histograms.

Whatever a token or a label holds, it is shown and nothing more: HTML is escaped, and so are the control
characters of terminals.
"""

import codecs
import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.records import HISTOGRAM_EDGES
from neuron_explainer.tables import escaped

Floats = npt.NDArray[np.float32]

LEVELS = 9
"""Steps of a highlight, from the weakest to the strongest."""
STRONG = {"p": 7, "n": 8}
"""From these levels of positive and negative values on, black letters are read better than white ones."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_GLYPHS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
_MOST_BARS = 48


def _bytes_in_brackets(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"⟨{byte:02X}⟩" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("neuron_explainer.bytes", _bytes_in_brackets)


def token_string(piece: bytes) -> str:
    """The text of a token for display.

    Line ends and tabs are written as ↵ ␍ ⇥, the spaces of a token of spaces as ·, bytes that are part of a
    character as ⟨E2⟩, and control characters as Python writes them.
    """
    text = piece.decode(errors="neuron_explainer.bytes")
    return visible(text) if text.strip(" ") else "·" * len(text)


def visible(text: str) -> str:
    """Text with its line ends and tabs as ↵ ␍ ⇥, and control characters as Python writes them."""
    return escaped(text.translate(_GLYPHS))


class Shown(NamedTuple):
    """A run of tokens that look the same."""

    text: str
    level: int
    """From 1 to :data:`LEVELS`; below 0 for negative values; 0 where nothing is highlighted."""
    value: float
    marked: bool
    """Whether it is the peak; for pairs of tokens, the query."""


def runs(
    strings: Sequence[str], values: Floats, scale: float, marked: int | None, begin: int, end: int
) -> list[Shown]:
    """Tokens ``begin`` to ``end`` as runs; each highlighted token is a run of its own.

    Args:
        strings: the tokens.
        values: ``[s]``, what is highlighted.
        scale: the value that is highlighted most strongly.
        marked: the token that stands out, if it is among them.
        begin: the first token.
        end: the end of the tokens.
    """
    found: list[Shown] = []
    for i in range(begin, end):
        level = level_of(float(values[i]), scale)
        if level == 0 and i != marked and found and not (found[-1].level or found[-1].marked):
            found[-1] = found[-1]._replace(text=found[-1].text + strings[i])
        else:
            found.append(Shown(strings[i], level, float(values[i]), i == marked))
    return found


def level_of(value: float, scale: float) -> int:
    """The step of a highlight: 0 for a value that is below a twentieth of the scale."""
    share = value / scale if scale > 0 else 0.0
    if abs(share) < 0.05:
        return 0
    return int(math.copysign(min(LEVELS, max(1, math.ceil(abs(share) * LEVELS - 1e-9))), share))


def around(strings: Sequence[str], peak: int, width: int) -> tuple[int, int]:
    """The tokens around the peak that ``width`` characters have room for: (begin, end)."""
    begin, end = peak, peak + 1
    room = width - len(strings[peak])
    while True:
        left = len(strings[begin - 1]) if begin > 0 else None
        right = len(strings[end]) if end < len(strings) else None
        # Twice as much text before the peak as behind it: what comes before is what explains it.
        go_left = left is not None and (right is None or peak - begin <= 2 * (end - 1 - peak))
        step = left if go_left else right
        if step is None or step > room:
            return begin, end
        room -= step
        begin, end = (begin - 1, end) if go_left else (begin, end + 1)


# --- text ---


def text_line(shown: Sequence[Shown], *, colour: bool, pairs: bool = False) -> str:
    """Runs as a line of text.

    In colour, the background says how strong. Without, ``[highlighted tokens]`` stand in brackets, and the
    peak in two: ``[[ peak]]``. For pairs of tokens, ``{ query}`` looks at ``[ token]``.
    """
    if colour:
        return "".join(_coloured(run) for run in shown)
    parts = []
    for kind, group in itertools.groupby(shown, lambda run: _kind_of(run, pairs)):
        runs = list(group)
        if kind == "query":
            text = "".join(f"[{{{run.text}}}]" if run.level else f"{{{run.text}}}" for run in runs)
        else:
            text = "".join(f"[[{run.text}]]" if run.marked else run.text for run in runs)
            alone = len(runs) == 1 and runs[0].marked
            text = f"[{text}]" if kind == "highlighted" and not alone else text
        parts.append(text)
    return "".join(parts)


def _kind_of(run: Shown, pairs: bool) -> str:
    if pairs and run.marked:
        return "query"
    return "highlighted" if run.level or run.marked else "plain"


def _coloured(run: Shown) -> str:
    return f"\x1b[{_ansi(run)}m{run.text}\x1b[0m" if run.level or run.marked else run.text


# Backgrounds of the 256 colours, from the weakest to the strongest.
_ORANGES = (223, 223, 222, 216, 215, 215, 214, 208, 208)
_BLUES = (195, 195, 153, 153, 117, 117, 75, 75, 33)


def _ansi(run: Shown) -> str:
    mark = "1;4;" if run.marked else ""
    if not run.level:
        return mark.rstrip(";")
    shade = (_ORANGES if run.level > 0 else _BLUES)[abs(run.level) - 1]
    return f"{mark}38;5;16;48;5;{shade}"


def text_histogram(histogram: npt.NDArray[np.uint32]) -> str:
    """The histogram of the values above 0 as one line of blocks between its limits."""
    bars, low, high = _bars(histogram)
    if not bars:
        return ""
    blocks = "".join(_BLOCKS[math.ceil(bar * 8) - 1] if bar else " " for bar in bars)
    return f"{number(low)} {blocks} {number(high)}"


def _bars(histogram: npt.NDArray[np.uint32]) -> tuple[list[float], float, float]:
    """Heights between 0 and 1 on a scale of logarithms, and the limits of the values."""
    filled = np.flatnonzero(histogram)
    if not len(filled):
        return [], 0.0, 0.0
    first, last = int(filled[0]), int(filled[-1])
    step = -(-(last + 1 - first) // _MOST_BARS)
    counts = np.zeros(-(-(last + 1 - first) // step) * step)
    counts[: last + 1 - first] = histogram[first : last + 1]
    heights = np.log1p(counts.reshape(-1, step).sum(axis=1))
    edges = [0.0, *HISTOGRAM_EDGES, float(HISTOGRAM_EDGES[-1])]
    high = edges[min(first + len(heights) * step, len(edges) - 1)]
    return [float(height) for height in heights / heights.max()], edges[first], high


def number(value: float) -> str:
    """A number with three digits that mean something."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def percentage(share: float) -> str:
    """A share in per cent, with two digits that mean something."""
    return f"{number(100 * share)}%"


# --- HTML ---


def html_tokens(shown: Sequence[Shown], *, inline: bool, pairs: bool = False) -> str:
    """Runs as HTML.

    Args:
        shown: the runs.
        inline: colours as ``style`` attributes, for notebooks, which may drop a page's style sheet; else
            as classes.
        pairs: the marked token is the query of a pair.
    """
    return "".join(_html_run(run, inline, pairs) for run in shown)


def _html_run(run: Shown, inline: bool, pairs: bool) -> str:
    text = html.escape(run.text)
    if not (run.level or run.marked):
        return text
    title = f' title="{run.value:.3g}"' if run.level else ""
    if inline:
        return f'<span style="{_style(run, pairs)}"{title}>{text}</span>'
    classes = []
    if run.level:
        classes.append(f"{'p' if run.level > 0 else 'n'}{abs(run.level)}")
    if run.marked:
        classes.append("query" if pairs else "peak")
    return f'<b class="{" ".join(classes)}"{title}>{text}</b>'


def _style(run: Shown, pairs: bool) -> str:
    parts = []
    if run.level:
        sign, colour = ("p", "240,125,10") if run.level > 0 else ("n", "65,138,248")
        parts.append(f"background-color:rgba({colour},{alpha(run.level):.2g})")
        if abs(run.level) >= STRONG[sign]:
            parts.append("color:#000")
    if run.marked:
        parts.append("outline:2px solid currentColor" if pairs else "font-weight:bold")
    return ";".join(parts)


def alpha(level: int) -> float:
    """How opaque the background of a level is."""
    return 0.12 + 0.78 * (abs(level) - 1) / (LEVELS - 1)


def svg_histogram(histogram: npt.NDArray[np.uint32], *, width: int = 360, height: int = 72) -> str:
    """The histogram of the values above 0 as an inline SVG, without script or style sheet."""
    bars, low, high = _bars(histogram)
    if not bars:
        return ""
    step = width / len(bars)
    rects = "".join(
        f'<rect x="{i * step:.1f}" y="{height - bar * height:.1f}" '
        f'width="{max(step - 1, 1):.1f}" height="{bar * height:.1f}"/>'
        for i, bar in enumerate(bars)
        if bar
    )
    label = f"Values from {number(low)} to {number(high)}"
    return (
        f'<svg viewBox="0 0 {width} {height + 18}" width="{width}" height="{height + 18}" role="img" '
        f'aria-label="{label}"><title>{label}</title><g fill="#e07b00">{rects}</g>'
        f'<g fill="currentColor" font-size="11" font-family="system-ui, sans-serif" opacity=".7">'
        f'<text x="0" y="{height + 14}">{number(low)}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{number(high)}</text></g></svg>'
    )
