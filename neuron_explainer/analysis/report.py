"""One HTML file about a run: its curves, its figures, and what its latents look like.

Everything is in the file: pictures as data, no script, no link; it opens without a network. Words that
come from outside (names, settings) are in the HTML only, escaped, never in a picture.

Shape legend: ``l`` latents.
"""

import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_explainer import files
from neuron_explainer.analysis.plots import COLOURS, Lines, curve, density_plot, histogram
from neuron_explainer.errors import SourceError
from neuron_explainer.evaluation.figures import Evaluation
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.models.autoencoder import Autoencoder

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: .5em; text-align: center; }
figcaption { font-size: 13px; color: #555; }
.name::before { content: "\\25A0\\00A0"; color: var(--colour); }
.name { margin-right: 1.2em; }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""For the browser: whatever the page holds, it may load and run nothing."""

_AXIS = ("tokens", "step")
"""What a curve is drawn over: the first of them that every line of the log has."""


def write_report(
    path: str | Path,
    *,
    title: str = "Report",
    log: str | Path | Iterable[Mapping[str, Any]] = (),
    autoencoders: Mapping[str, Autoencoder] | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write ``report.html``; whatever is not given has no section.

    Args:
        path: of the file, which is replaced.
        title: of the page.
        log: a run's ``log.jsonl``, or its lines as mappings. Every number in them is drawn: those of
            ``{"dictionaries": {name: {…}}}`` a line each, others as they are.
        autoencoders: by name, whose weights are to be shown.
        evaluations: by name, whose figures are to be shown.
        settings: of the run, shown as they are; there may be mappings among them.

    Raises:
        MissingExtraError: matplotlib is not installed; it comes with the extra ``plots``.
    """
    lines = read_log(log) if isinstance(log, str | Path) else list(log)
    sections = [
        _settings(settings or {}),
        _figures(evaluations or {}),
        _curves(lines),
        *(_latents(name, evaluation) for name, evaluation in (evaluations or {}).items()),
        *(_weights(name, autoencoder) for name, autoencoder in (autoencoders or {}).items()),
    ]
    heading = html.escape(title)
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{heading}</title>
<style>{_STYLE}</style>
<h1>{heading}</h1>
{"".join(sections)}</html>
"""
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, "utf-8")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; one that was cut off when a run was killed is left out."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise SourceError(f"{path}: the log cannot be read: {error.strerror}.") from None
    lines = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            lines.append(found)
    return lines


# ---- sections ------------------------------------------------------------------------------------


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    return f"<h2>Settings</h2>\n{_table(['', ''], _flat(settings))}"


def _flat(settings: Mapping[str, Any], within: str = "") -> Iterator[list[Any]]:
    """A row for each setting; ``a.b`` is ``b`` of the settings ``a``."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield [within + str(name), value]


def _figures(evaluations: Mapping[str, Evaluation]) -> str:
    if not evaluations:
        return ""
    columns = [evaluation.figures() for evaluation in evaluations.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows: list[list[Any]] = [
        ["location", *(evaluation.location or "unknown" for evaluation in evaluations.values())]
    ]
    rows += [[name, *(column.get(name) for column in columns)] for name in names]
    return f"<h2>Figures</h2>\n{_table(['', *evaluations], rows)}"


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    curves = collect_curves(lines)
    if not curves:
        return ""
    axis = _axis(lines)
    names = list(dict.fromkeys(name for of in curves.values() for name in of if name))
    legend = "".join(
        f'<span class="name" style="--colour: {COLOURS[i % len(COLOURS)]}">{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    pictures = []
    for field, of in curves.items():
        ordered: Lines = [(names.index(name) if name else 0, points) for name, points in of.items()]
        pictures.append(_picture(curve(ordered), f"{field}, over {axis}"))
    return f"<h2>Training</h2>\n<p>{legend}</p>\n{''.join(pictures)}"


def _latents(name: str, evaluation: Evaluation) -> str:
    density = evaluation.density
    caption = (
        f"Latents by the share of {evaluation.n_tokens:,} tokens on which they fire; {density.never:,} "
        f"of {evaluation.n_latents:,} fired on none"
    )
    return f"<h2>{html.escape(name)}: latents</h2>\n{_picture(density_plot(density), caption)}"


def _weights(name: str, autoencoder: Autoencoder) -> str:
    geometry = WeightGeometry.of(autoencoder)
    pictures: list[tuple[Tensor | None, str]] = [
        (geometry.decoder_norm, "Length of decoder directions"),
        (geometry.encoder_decoder_cosine, "Cosine of a latent's encoder and decoder directions"),
        (
            geometry.nearest_cosine,
            "Cosine of a decoder direction and the one nearest to it"
            + geometry.sample_note(autoencoder.n_latents),
        ),
    ]
    drawn = [_picture(histogram(v), caption) for v, caption in pictures if v is not None]
    return f"<h2>{html.escape(name)}: weights</h2>\n{''.join(drawn)}"


# ---- parts ---------------------------------------------------------------------------------------


def collect_curves(
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """``{field: {dictionary: [(x, y), …]}}``; the dictionary is "" for what is of the whole run."""
    axis = _axis(lines)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for number, line in enumerate(lines):
        x = line.get(axis, number)
        parts = {"": line}
        dictionaries = line.get("dictionaries")
        if isinstance(dictionaries, Mapping):
            parts |= {str(k): v for k, v in dictionaries.items() if isinstance(v, Mapping)}
        for name, values in parts.items():
            for field, y in values.items():
                if field not in _AXIS and _is_number(y):
                    found.setdefault(field, {}).setdefault(name, []).append((x, y))
    return found


def _axis(lines: Sequence[Mapping[str, Any]]) -> str:
    return next((a for a in _AXIS if all(_is_number(line.get(a)) for line in lines)), "line")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>\n{line(head, 'th') if any(head) else ''}{body}</table>\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return html.escape(str(value))


def _picture(svg: str, caption: str) -> str:
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{svg}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )
