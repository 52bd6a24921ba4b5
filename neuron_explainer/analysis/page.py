"""The layout of a unit's page: one HTML file without script, for light and dark screens.

Everything is in the file, so it opens from a disk, in a mail, and without a network. The policy in its head
tells the browser to load and run nothing, whatever the tokens hold.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

from neuron_explainer.analysis.highlights import LEVELS, STRONG, alpha
from neuron_explainer.tables import escaped

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #5d636e; --line: #e3e5e9; --ground: #fff;
  --pale: #f6f7f8; --p: 235 115 0; --n: 60 130 240; --weak: #1b1d21; --strong: #1b1d21; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --soft: #9aa1ad; --line: #2d3138;
  --ground: #14161a; --pale: #1c1f24; --p: 255 140 30; --n: 70 145 255; --weak: #fff; --strong: #000; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 2rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1rem; margin: 2.5rem 0 .5rem; font-weight: 650; }
h2 small, .kicker, figcaption, dt, footer, .by, .doc, .more { font-size: .8125rem; color: var(--soft);
  font-weight: 400; }
h2 small { margin-left: .75rem; }
.kicker { margin: 0 0 .25rem; }
.label { margin: .25rem 0 0; } h1 + .label { font-size: 1.125rem; margin-top: .5rem; }
.by { margin-left: .5rem; }
.badge { font-size: .8125rem; border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .6rem;
  margin-left: .5rem; vertical-align: .2em; font-weight: 400; letter-spacing: 0; }
.overview { display: flex; flex-wrap: wrap; gap: 2rem 3rem; align-items: flex-start; margin: 2rem 0 0;
  padding: 1.25rem 1.5rem; background: var(--pale); border-radius: .75rem; }
figure { margin: 0; } svg { display: block; max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem 1.5rem;
  margin: 0; flex: 1 1 20rem; }
dd { margin: 0; font-size: 1.0625rem; } dd small { display: block; font-size: .8125rem; color: var(--soft); }
ol { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: 4.25rem 1fr auto; gap: 0 1rem; padding: .5rem 0;
  border-top: 1px solid var(--line); }
li > .value { text-align: right; color: var(--soft); font-size: .875rem; line-height: 1.75rem; }
li > p { margin: 0; line-height: 1.75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
li > .doc { line-height: 1.75rem; white-space: nowrap; }
li.range { color: var(--soft); font-size: .8125rem; padding: .75rem 0 .25rem; }
li.range + li { border-top: 0; padding-top: 0; }
b { font-weight: inherit; border-radius: .125rem; padding: .125rem 0; }
.peak { font-weight: 650; } .query { box-shadow: inset 0 0 0 1.5px var(--ink); font-weight: 650; }
table { border-collapse: collapse; } th { font-weight: 400; color: var(--soft); font-size: .8125rem; }
td, th { text-align: right; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid var(--line); }
.tokens { display: flex; flex-wrap: wrap; gap: 1rem 4rem; font-size: .875rem; }
.tokens > div { flex: 0 1 27rem; } .tokens h3 { font-size: .875rem; margin: 0; font-weight: 400; }
.tokens code { white-space: pre-wrap; } .tokens td, .tokens th { padding: .1rem 1rem .1rem 0; }
.tokens td:nth-child(odd), .tokens th:nth-child(odd) { text-align: left; }
.tokens td:nth-child(2) { padding-right: 2.5rem; } .tokens table { margin-bottom: .5rem; }
.tokens small { color: var(--soft); }
.words td:first-child, .words th:first-child, .words td:nth-child(2), .words td:nth-child(3),
.words th:nth-child(2), .words th:nth-child(3), .words td:last-child { text-align: left; }
.words td { vertical-align: top; } .words td:first-child { max-width: 30rem; }
.legend { margin: 1rem 0 0; }
.scale { margin-right: .75rem; display: inline-flex; align-items: center; gap: .5rem; }
.scale b { width: 1.1rem; height: .9rem; border-radius: 0; padding: 0; } .scale span { display: inline-flex; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem; } li { grid-template-columns: 3.5rem 1fr; }
  li > .doc { display: none; } }
@media print { .overview { background: none; border: 1px solid var(--line); } }
"""


class Section(NamedTuple):
    """A part of a page."""

    title: str
    body: str
    """HTML."""
    note: str = ""


class Head(NamedTuple):
    """What stands above the sections."""

    title: str
    kicker: str
    """The line above the title."""
    badges: Sequence[str]
    labels: Sequence[tuple[str, str]]
    """Text, and who says so."""
    facts: Sequence[tuple[str, str, str]]
    """Name, value, and a remark."""
    histogram: str
    """An SVG, or nothing."""
    signed: bool
    scale: str
    """The value that is highlighted most strongly."""
    legend: str
    """What the colours mean."""


def html_file(title: str, style: str, body: str, *, pictures: bool = False) -> str:
    """A page as one file that loads and runs nothing, whatever its body holds.

    Args:
        title: its name, as text.
        style: its style sheet.
        body: HTML.
        pictures: whether there are pictures in it, as data.
    """
    policy = f"default-src 'none'; {'img-src data:; ' * pictures}style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{style}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def document(head: Head, sections: Sequence[Section], footer: Sequence[str]) -> str:
    """A page as one HTML file."""
    body = "".join(map(_section, sections))
    notes = "".join(f"<div>{safe(line)}</div>" for line in footer)
    main = f"<main>{_head(head)}{body}<footer>{notes}</footer></main>"
    return html_file(head.title, f"{_STYLE}{_levels()}", main)


def _levels() -> str:
    """The classes of highlights."""
    rules = []
    for level in range(1, LEVELS + 1):
        for sign in "pn":
            ink = "strong" if level >= STRONG[sign] else "weak"
            rules.append(
                f".{sign}{level} {{ background: rgb(var(--{sign}) / {alpha(level):.2g}); "
                f"color: var(--{ink}); }}"
            )
    return "\n".join(rules)


def _head(head: Head) -> str:
    badges = "".join(f'<span class="badge">{safe(badge)}</span>' for badge in head.badges)
    labels = "".join(
        f'<p class="label">{safe(text)}<span class="by">{safe(source)}</span></p>'
        for text, source in head.labels
    )
    facts = "".join(
        f"<div><dt>{safe(name)}</dt><dd>{safe(value)}"
        + (f"<small>{safe(remark)}</small>" if remark else "")
        + "</dd></div>"
        for name, value, remark in head.facts
    )
    figure = ""
    if head.histogram:
        figure = (
            f"<figure>{head.histogram}<figcaption>How often each value above 0 occurs; both axes "
            "logarithmic</figcaption></figure>"
        )
    return (
        f'<header><p class="kicker">{safe(head.kicker)}</p><h1>{safe(head.title)}{badges}</h1>'
        f'{labels}</header><div class="overview">{figure}<dl>{facts}</dl></div>' + _scale(head)
    )


def _scale(head: Head) -> str:
    """What the colours mean."""
    if not head.histogram and not head.signed:
        return ""
    parts = ["0", _swatches("p", range(1, LEVELS + 1)), safe(head.scale)]
    if head.signed:
        parts[:1] = [f"−{safe(head.scale)}", _swatches("n", range(LEVELS, 0, -1)), "0"]
    scale = f'<span class="scale">{"".join(parts)}</span>'
    return f'<p class="kicker legend">{scale}{safe(head.legend)}</p>'


def _swatches(sign: str, levels: range) -> str:
    return "<span>" + "".join(f'<b class="{sign}{level}"></b>' for level in levels) + "</span>"


def _section(section: Section) -> str:
    note = f"<small>{safe(section.note)}</small>" if section.note else ""
    return f"<section><h2>{safe(section.title)}{note}</h2>{section.body}</section>"


def safe(text: str) -> str:
    """Text of any origin as HTML: escaped, and control characters are written as Python writes them."""
    return html.escape(escaped(text))
