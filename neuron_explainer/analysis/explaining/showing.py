"""Explanations and their scores on the page of a unit: as text and as HTML."""

from collections.abc import Sequence

from neuron_explainer.analysis.explaining.explanation import Explained, Score
from neuron_explainer.analysis.page import Section, safe
from neuron_explainer.tables import escaped

_LONGEST = 300  # characters of an explanation
_MOST = 5  # explanations
NOTE = "each score beside the highest floor: what a trivial or random competitor gets"


def figure(value: float | None) -> str:
    """A score with two digits, ``–`` if it is not defined."""
    return "–" if value is None else f"{value:.2f}"


def interval(score: Score) -> str:
    """Such as ``0.71 to 0.83``; empty if there is none."""
    return "" if score.interval is None else " to ".join(figure(end) for end in score.interval)


def score_line(score: Score) -> str:
    """Such as ``detection 0.77 (0.71 to 0.83), floor 0.64 (token set)``."""
    around = f" ({interval(score)})" if score.interval is not None else ""
    floor = score.floor
    beside = "" if floor is None else f", floor {figure(floor.value)} ({floor.name})"
    return f"{score.name} {figure(score.value)}{around}{beside}"


def text_lines(explanations: Sequence[Explained]) -> list[str]:
    """The latest explanations, each with a line for every score."""
    lines: list[str] = []
    for each in explanations[:_MOST]:
        lines.append(f"  {_short(each)}  ({_by(each)})")
        lines += [f"      {score_line(score)}" for score in each.scores]
    return [escaped(line.replace("\n", " ")) for line in lines]


def section(explanations: Sequence[Explained]) -> Section:
    """The latest explanations as a part of a page."""
    titles = ("explanation", "by", "score", "", "95 %", "floor", "")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    rows = "".join(map(_rows, explanations[:_MOST]))
    return Section("Explanations", f'<table class="words">{head}{rows}</table>', NOTE)


def _rows(each: Explained) -> str:
    first = f"<td>{safe(_short(each))}</td><td>{safe(_by(each))}</td>"
    if not each.scores:
        return f"<tr>{first}<td></td><td></td><td></td><td></td><td></td></tr>"
    rows = []
    for score in each.scores:
        floor = score.floor
        value, name = ("", "") if floor is None else (figure(floor.value), floor.name)
        rows.append(
            f"<tr>{first}<td>{safe(score.name)}</td><td>{figure(score.value)}</td>"
            f"<td>{interval(score)}</td><td>{value}</td><td>{safe(name)}</td></tr>"
        )
        first = "<td></td><td></td>"
    return "".join(rows)


def _short(each: Explained) -> str:
    text = " ".join(each.explanation.text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _by(each: Explained) -> str:
    found = each.explanation
    return f"{found.method}, {found.model}"[:80] if found.model else found.method[:80]
