"""What is known about one unit: figures, histogram, examples, partners and labels; and its page.

A record is a plain value that a store makes. ``print(record)`` is its page as text, a notebook shows
it as HTML, and ``record.to_html(path)`` writes a page of one file that needs no script and no network.

Shape legend: ``s`` tokens of an example.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.analysis import highlights, page
from neuron_explainer.analysis.explaining import showing
from neuron_explainer.analysis.explaining.explanation import Explained
from neuron_explainer.analysis.records import GROUPS, Kind, group_number
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.tables import escaped

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DENSE = 0.1
"""A unit that is active on at least this share of tokens is called dense."""
_LARGEST_FRAGMENT, _LARGEST_PAGE = 30_000, 60_000  # bytes
_LONGEST_LABEL = 400  # characters
_MISSING = "More examples are in the store"
_LEGENDS = {
    "latent": "activation; the largest in bold",
    "head": "how much the framed token looks at each token before it",
}
_NOTES = {
    "stratum": "equal ranges of values from 0 to the largest, the highest range first",
    "uniform": "of all contexts where it is active",
}
_RANDOM = ("uniform", "weighted")
_NOTEBOOK_ROW = (
    '<div style="display:flex"><div style="flex:0 0 4.5em;opacity:.75;font-variant-numeric:tabular-nums">'
    '{value}</div> <div style="white-space:pre-wrap">{text}</div></div>'
)
_PAGE_ROW = (
    '<li><span class="value">{value}</span><p>{text}</p>'
    '<span class="doc">document {document}</span></li>'
)
TITLES = {
    "top": "Largest values",
    "bottom": "Most negative values",
    "stratum": "Examples of each range of values",
    "uniform": "Random examples",
    "weighted": "Random examples, larger values more often",
    "inactive": "Where it is not active",
}
"""What each group of examples is called on a page."""


@dataclass(frozen=True, eq=False)
class Example:
    """A piece of text, and the activation of a unit at each of its tokens.

    For attention heads a value belongs to a pair of tokens: the query, and a key at or before it.
    """

    group: str
    """One of :data:`~neuron_explainer.analysis.records.GROUPS`."""
    interval: int
    """In the group "stratum": the number of the range of values, 0 for that of the largest."""
    rank: int
    """The place in the group, or in the interval, from 0."""
    value: float
    """The activation at the peak, exact."""
    peak: int
    """Where the largest value is: the index of its token, or of its pair in :attr:`activations`."""
    start: int
    """Corpus position of the first token."""
    document: int
    """The number of the document."""
    position: int
    """The place of the first token in the document."""
    tokens: Ints
    """Ids ``[s]``."""
    activations: Floats
    """``[s]``; for pairs ``[s * (s + 1) / 2]``, the lower triangle, one query after the other. Rounded to
    float16 but for the peak."""
    pairs: bool
    """Whether a value belongs to a pair of tokens."""
    vocabulary: Callable[[Ints], list[bytes]] = field(repr=False)
    """What tokens write."""

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each token writes, as bytes."""
        return self.vocabulary(self.tokens)

    @cached_property
    def strings(self) -> list[str]:
        """Each token as it is displayed, see :func:`~neuron_explainer.analysis.highlights.token_string`."""
        return [highlights.token_string(piece) for piece in self.pieces]

    @property
    def text(self) -> str:
        """The text as it stands in the corpus."""
        return b"".join(self.pieces).decode(errors="replace")

    @property
    def query(self) -> int:
        """The token of the peak; for pairs, the one that looks."""
        return (math.isqrt(8 * self.peak + 1) - 1) // 2 if self.pairs else self.peak

    @property
    def key(self) -> int:
        """The token of the peak; for pairs, the one that is looked at."""
        return self.peak - self.query * (self.query + 1) // 2 if self.pairs else self.peak

    @property
    def pattern(self) -> Floats:
        """``[s, s]`` of an example of pairs: query, key; 0 where the key comes after the query."""
        size = len(self.tokens)
        found = np.zeros((size, size), np.float32)
        found[np.tril_indices(size)] = self.activations
        return found

    @property
    def highlighted(self) -> Floats:
        """``[s]``: the activations; for pairs, those of the peak's query."""
        if not self.pairs:
            return self.activations
        found = np.zeros(len(self.tokens), np.float32)
        begin = self.query * (self.query + 1) // 2
        found[: self.query + 1] = self.activations[begin : begin + self.query + 1]
        return found

    def shown(
        self, scale: float, width: int | None = None
    ) -> tuple[list[highlights.Shown], bool, bool]:
        """The tokens as they are drawn, and whether some are left out in front and behind.

        Args:
            scale: the value that is highlighted most strongly.
            width: characters that there is room for; None: all tokens.
        """
        begin, end = 0, len(self.tokens)
        if width is not None:
            begin, end = highlights.around(self.strings, self.query, width)
        found = highlights.runs(self.strings, self.highlighted, scale, self.query, begin, end)
        return found, begin > 0, end < len(self.tokens)

    def __repr__(self) -> str:
        shown, before, behind = self.shown(abs(self.value), 80)
        line = highlights.text_line(shown, colour=False, pairs=self.pairs)
        return f"{highlights.number(self.value)}  {'…' * before}{line}{'…' * behind}"


@dataclass(frozen=True)
class UnitFigures:
    """The figures of a unit, over all tokens that were looked at."""

    n_tokens: int
    count: int
    """On how many of them the unit is active."""
    density: float
    """``count / n_tokens``"""
    max: float
    min: float
    mean: float
    """Of the active tokens, as the next three."""
    variance: float
    skewness: float
    kurtosis: float
    mean_all: float
    """Of all tokens, as the next three."""
    variance_all: float
    skewness_all: float
    kurtosis_all: float
    last_active: int
    """Corpus position of the last token where the unit is active; -1 if there is none."""


@dataclass(frozen=True)
class Partner:
    """A unit that is active together with another one."""

    unit: int
    both: int
    """On how many tokens of the sample both are active."""
    jaccard: float
    pmi: float
    phi: float


@dataclass(frozen=True, eq=False)
class LatentRecord:
    """All that is known about one unit; "unit" is a latent, a neuron, a channel or a head."""

    name: str
    """The name of the dictionary or location."""
    kind: Kind
    location: str
    unit: int
    signed: bool
    statistics: UnitFigures
    histogram: npt.NDArray[np.uint32]
    """``[N_BINS]``: values above 0 by the bins of
    :data:`~neuron_explainer.analysis.records.HISTOGRAM_EDGES`."""
    all_examples: tuple[Example, ...]
    """In the order of their groups."""
    partners: tuple[Partner, ...] = ()
    labels: tuple[Label, ...] = ()
    """Those of the user first."""
    explanations: tuple[Explained, ...] = ()
    """With their scores, latest first."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the figures come from: names, hashes and versions."""
    intervals: int = 0
    """Into how many equal ranges of values the examples of the group "stratum" are divided; 0 if that is
    not known."""

    def examples(self, group: str | None = None) -> tuple[Example, ...]:
        """The examples of a group, or all."""
        if group is None:
            return self.all_examples
        group_number(group)
        return tuple(example for example in self.all_examples if example.group == group)

    @property
    def top(self) -> tuple[Example, ...]:
        """The examples with the largest values, largest first."""
        return self.examples("top")

    @property
    def label(self) -> str:
        """The first label, or an empty text."""
        return self.labels[0].text if self.labels else ""

    @property
    def alive(self) -> bool:
        """Whether the unit was ever active."""
        return self.statistics.count > 0

    @property
    def dense(self) -> bool:
        """Whether it is active on at least a share :data:`DENSE` of the tokens."""
        return self.statistics.density >= DENSE

    @property
    def scale(self) -> float:
        """The largest absolute value: what is highlighted most strongly."""
        return max(self.statistics.max, -self.statistics.min if self.signed else 0.0)

    @property
    def title(self) -> str:
        """Such as ``latent 1234 of 2.resid.torso.delta_mlp``."""
        return f"{self.kind} {self.unit} of {self.name}"

    def facts(self) -> list[tuple[str, str, str]]:
        """Name, value and a remark of each figure for the head of a page."""
        s = self.statistics
        what, number = "pairs" if self.kind == "head" else "tokens", highlights.number
        found = [
            ("active", highlights.percentage(s.density), f"{s.count:,} of {s.n_tokens:,} {what}"),
            ("largest value", number(s.max), ""),
        ]
        if self.signed:
            found.append(("smallest value", number(s.min), ""))
        spread = number(math.sqrt(max(s.variance, 0.0)))
        return [
            *found,
            ("mean where active", number(s.mean), f"standard deviation {spread}"),
            ("skewness", number(s.skewness), ""),
            ("kurtosis", number(s.kurtosis), "3 for a normal distribution"),
        ]

    def _short_labels(self, n: int) -> list[tuple[str, str]]:
        """The first labels, cut to a reasonable length: text, and who says so. Explanations have a part of
        the page for themselves."""
        explained = {(e.explanation.text, e.explanation.method) for e in self.explanations}
        some = [label for label in self.labels if (label.text, label.source) not in explained]
        return [(label.text[:_LONGEST_LABEL], label.source[:80]) for label in some[:n]]

    # --- text ---

    def text(self, n: int | None = 5, *, colour: bool = False, width: int = 100) -> str:
        """The page as text.

        Args:
            n: examples of each group, or of each interval; None: all.
            colour: highlight in the colours of a terminal rather than with brackets.
            width: characters of a line.
        """
        lines = [escaped(self.title)]
        for label, source in self._short_labels(3):
            lines.append(escaped(f"“{label}”{f'  ({source})' * bool(source)}".replace("\n", " ")))
        lines += showing.text_lines(self.explanations)
        facts = self.facts()
        lines.append(f"active on {facts[0][1]} ({facts[0][2]})")
        lines.append("   ".join(f"{name} {value}" for name, value, _ in facts[1:]))
        if not self.alive:
            lines.append(f"This {self.kind} was never active.")
        if bars := highlights.text_histogram(self.histogram):
            lines += ["", f"values  {bars}"]
        for group, examples, n_above in self._by_group(n):
            lines += self._text_group(group, examples, colour, width)
            if n_above:
                lines += [f"  {_shown_above(n_above, len(examples))}"]
        if self.partners:
            lines += ["", "Active together with"]
            lines += [
                f"  {partner.unit:>7}  phi {partner.phi:.2f}  Jaccard {partner.jaccard:.2f}"
                for partner in self.partners[:n]
            ]
        return "\n".join(lines)

    def _by_group(self, n: int | None) -> Iterator[tuple[str, list[Example], int]]:
        """The groups that have examples, the first ``n`` examples of each (of each interval), and how many of
        these are left out because an earlier group has them.

        Random examples are often among those of the ranges of values, because both are drawn by the same
        keys.
        """
        seen: set[tuple[int, int]] = set()
        for group in GROUPS:
            examples = [e for e in self.examples(group) if n is None or e.rank < n]
            new = examples
            if group in _RANDOM:
                new = [e for e in examples if (e.start, e.peak) not in seen]
            seen |= {(e.start, e.peak) for e in new}
            if examples:
                yield group, new, len(examples) - len(new)

    def _text_group(
        self, group: str, examples: Sequence[Example], colour: bool, width: int
    ) -> list[str]:
        lines = ["", TITLES[group]]
        for example in examples:
            if limits := self._range(example):
                lines.append(f"  from {limits}")
            value = highlights.number(example.value)
            shown, before, behind = example.shown(self.scale, max(width - 24, 20))
            text = highlights.text_line(shown, colour=colour, pairs=example.pairs)
            lines.append(f"  {value:>7}  {'…' * before}{text}{'…' * behind}")
        return lines

    def __repr__(self) -> str:
        return self.text()

    # --- HTML ---

    def _repr_html_(self) -> str:
        """A fragment for notebooks: no script, no style sheet, at most 30 kB."""
        head = (
            '<div style="font-family:system-ui,sans-serif;max-width:60rem;line-height:1.6">'
            f'<div style="font-size:1.25em;font-weight:600">{page.safe(_capital(self.title))}</div>'
        )
        explained = [each.explanation.text[:_LONGEST_LABEL] for each in self.explanations[:1]]
        for label in [*(text for text, _ in self._short_labels(1)), *explained][:1]:
            head += f"<div>“{page.safe(label)}”</div>"
        facts = " · ".join(f"{name} <b>{value}</b>" for name, value, _ in self.facts())
        head += f'<div style="opacity:.75;font-variant-numeric:tabular-nums">{facts}</div>'
        head += highlights.svg_histogram(self.histogram)
        if not self.alive:
            head += f"<p>This {self.kind} was never active.</p>"
        room = _LARGEST_FRAGMENT - len(head.encode())
        sections = self._sections(_NOTEBOOK_ROW, room, 5, 160, inline=True)
        title = '<div style="margin-top:.75em;font-weight:600">{}</div>'
        return (
            head + "".join(title.format(page.safe(s.title)) + s.body for s in sections) + "</div>"
        )

    def html(self, more: Sequence[page.Section] = ()) -> str:
        """The page as one HTML file of at most 60 kB, without script.

        Args:
            more: parts that go before the examples, such as what the unit promotes.
        """
        head = page.Head(
            _capital(self.title),
            self.location,
            ["never active"] * (not self.alive) + ["dense"] * self.dense,
            self._short_labels(5),
            self.facts(),
            highlights.svg_histogram(self.histogram),
            self.signed,
            highlights.number(self.scale),
            _LEGENDS["head" if self.kind == "head" else "latent"],
        )
        footer = [f"{key[:80]}: {_short(value)}" for key, value in sorted(self.provenance.items())]
        last = [self._partners_table()] if self.partners else []
        more = [*([showing.section(self.explanations)] if self.explanations else []), *more]
        room = _LARGEST_PAGE - len(page.document(head, [*more, *last], footer).encode())
        for width in (None, 160, 80):  # shorter examples rather than fewer
            sections = self._sections(_PAGE_ROW, room, None, width, inline=False)
            if not sections or sections[-1].title != _MISSING:
                break
        return page.document(head, [*more, *sections, *last], footer)

    def to_html(self, path: str | Path) -> Path:
        """Write :meth:`html` to a file, whole or not at all."""
        with files.atomic_write(path) as temporary:
            temporary.write_text(self.html(), "utf-8")
        return Path(path)

    def _sections(
        self, row: str, room: int, n: int | None, width: int | None, *, inline: bool
    ) -> list[page.Section]:
        """The examples by group, until there is no room for more bytes; then how many are missing."""
        found: list[page.Section] = []
        missing = 0
        room -= 300  # for the last line
        for group, examples, n_above in self._by_group(n):
            rows = ""
            room -= 200  # for the title
            for example in examples:
                shown, before, behind = example.shown(self.scale, width)
                if not before and not (shown[0].level or shown[0].marked):
                    shown[0] = shown[0]._replace(text=shown[0].text.lstrip(" "))
                text = highlights.html_tokens(shown, inline=inline, pairs=example.pairs)
                limits = "" if inline else self._range(example)
                new = f'<li class="range"><span></span>{limits}</li>' if limits else ""
                new += row.format(
                    value=highlights.number(example.value),
                    text=f"{'…' * before}{text}{'…' * behind}",
                    document=example.document,
                )
                room -= len(new.encode())
                if room < 0:
                    missing += 1
                else:
                    rows += new
            if rows or (n_above and not inline):
                notes = [_NOTES.get(group, ""), _shown_above(n_above, len(examples))]
                body = rows if inline or not rows else f"<ol>{rows}</ol>"
                found.append(page.Section(TITLES[group], body, "; ".join(filter(None, notes))))
        if missing:
            found.append(page.Section(_MISSING, f"<p>{missing} are left out here.</p>"))
        return found

    def _range(self, example: Example) -> str:
        """The limits of a range of values, for the line before its first example; else an empty text."""
        if not self.intervals or example.group != "stratum" or example.rank:
            return ""
        high = 1 - example.interval / self.intervals
        low = high - 1 / self.intervals
        limits = (highlights.number(share * self.statistics.max) for share in (max(low, 0), high))
        return " to ".join(limits)

    def _partners_table(self) -> page.Section:
        rows = "".join(
            f"<tr><td>{p.unit}</td><td>{p.both:,}</td><td>{p.phi:.2f}</td><td>{p.jaccard:.2f}</td>"
            f"<td>{p.pmi:.2f}</td></tr>"
            for p in self.partners[:10]
        )
        head = (
            f"<tr><th>{self.kind}</th><th>tokens</th><th>phi</th><th>Jaccard</th><th>PMI</th></tr>"
        )
        return page.Section(
            "Active together with", f"<table>{head}{rows}</table>", "counted on a sample of tokens"
        )


def _shown_above(n_above: int, n_new: int) -> str:
    """That some random examples are not repeated."""
    if not n_above:
        return ""
    if not n_new:
        return "all are shown above"
    return f"{n_above} more {'is' if n_above == 1 else 'are'} shown above"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(value: Any) -> str:
    """A value of the provenance for people: hashes and long texts are cut."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(part)}" for key, part in value.items())[:200]
    text = str(value)
    if re.fullmatch("[0-9a-f]{32,}", text):
        return f"{text[:12]}…"
    return text[:200]
