"""One HTML file about trained dictionaries: a verdict, figures, curves, and what the latents look like.

Everything is in the file: pictures as data, no script, no link; it opens without a network. Words that
come from outside (names, tokens, settings) are in the HTML only, escaped, never in a picture.

Shape legend: ``l`` latents.
"""

import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.analysis.directions import Directions
from neuron_explainer.analysis.page import html_file
from neuron_explainer.analysis.plots import (
    COLOURS,
    Lines,
    check_matplotlib,
    curve,
    density_plot,
    histogram,
)
from neuron_explainer.analysis.verdict import DENSE, n_dead, n_dense, verdict
from neuron_explainer.errors import NeuronExplainerError, SourceError
from neuron_explainer.evaluation.figures import Evaluation
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.tables import percent

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 2px solid #eee; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; background: #f6f6f6; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
.token { font: 13px ui-monospace, monospace; white-space: pre; background: #eef3f8;
  display: inline-block; padding: 0 .15em; margin-right: .2em; border-radius: 3px; }
ul { padding-left: 0; list-style: none; }
li { padding: .1em .7em; margin: .3em 0; border-left: 4px solid #b7d7b0; }
li.unusual { border-color: #e0912f; background: #fdf5e9; }
figure { display: inline-block; margin: .5em; text-align: center; }
figcaption, .note { font-size: 13px; color: #555; }
.name::before { content: "\\25A0\\00A0"; color: var(--colour); }
.name { margin-right: 1.2em; }
details { margin: 1em 0; } summary { cursor: pointer; font-weight: 600; }
"""

_AXIS = ("tokens", "step")
"""What curves are drawn over: the first of these that every line of the log has."""

_CURVES = {
    "fvu": "FVU",
    "l0": "active latents per token",
    "dead": "dead latents",
    "loss": "loss",
    "lr": "learning rate",
}
"""The fields of a log that have a place of their own, in order, and how their axes are labelled."""

_NOT_DRAWN = ("dead_window", "tokens_per_second", "seconds")
"""Fields that say nothing about the dictionaries."""
_STRONGEST = 15
_TOKENS = 6
"""Latents listed for each dictionary."""


@dataclass(frozen=True)
class Reported:
    """One dictionary of a report; what is not known is left out of the page."""

    autoencoder: Autoencoder | None = None
    evaluation: Evaluation | None = None
    target_l0: float | None = None
    """How many active latents per token were asked for; a TopK autoencoder says it itself."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained; there may be mappings among the values."""


def write_report(
    path: str | Path,
    dictionaries: Mapping[str, Reported] | None = None,
    *,
    title: str = "Report",
    measured_on: str = "",
    log: str | Path | Iterable[Mapping[str, Any]] = (),
    context: ModelContext | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write ``report.html``.

    Args:
        path: of the file, which is replaced.
        dictionaries: by name.
        title: of the page.
        measured_on: what the dictionaries were evaluated on, in a few words.
        log: a run's ``log.jsonl``, or its lines as mappings. Numbers in them are drawn: those of
            ``{"dictionaries": {name: {…}}}`` as a curve for each dictionary.
        context: the model, to say which tokens latents promote.
        settings: what all dictionaries have in common, such as where the activations came from.

    Raises:
        MissingExtraError: matplotlib is not installed; it comes with the extra ``plots``.
    """
    check_matplotlib()
    subjects = {name: _with_target(each) for name, each in (dictionaries or {}).items()}
    lines = read_log(log) if isinstance(log, str | Path) else list(log)
    curves = collect_curves(lines)
    geometries = {
        name: WeightGeometry.of(each.autoencoder)
        for name, each in subjects.items()
        if each.autoencoder is not None
    }
    sections = [
        *(
            _verdict(name, each, geometries.get(name), curves)
            for name, each in subjects.items()
            if each.evaluation is not None
        ),
        _main_figures(subjects),
        _training(curves, _axis(lines)),
        *(_latents(name, each, geometries.get(name), context) for name, each in subjects.items()),
        _all_figures(subjects),
        _settings(subjects, settings or {}),
    ]
    introduction = html.escape(_introduction(lines, measured_on))
    head = f'<h1>{html.escape(title)}</h1>\n<p class="note">{introduction}</p>\n'
    page = html_file(title, _STYLE, head + "".join(sections), pictures=True)
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, "utf-8")


def _with_target(subject: Reported) -> Reported:
    nonlinearity = None if subject.autoencoder is None else subject.autoencoder.activation
    if subject.target_l0 is None and isinstance(nonlinearity, TopK):
        return replace(subject, target_l0=float(nonlinearity.k))
    return subject


def _introduction(lines: Sequence[Mapping[str, Any]], measured_on: str) -> str:
    """How long the training was, and what was measured on."""
    found = f"Measured on {measured_on}." if measured_on else ""
    if lines and all(_is_number(lines[-1].get(name)) for name in _AXIS):
        trained, steps = (f"{lines[-1][name]:,.0f}" for name in _AXIS)
        found = f"Trained on {trained} tokens in {steps} steps. {found}"
    return found


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; a line that was cut off when a run was killed is left out."""
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


# ---- figures -------------------------------------------------------------------------------------

Curves = dict[str, dict[str, list[tuple[float, float]]]]


def _verdict(name: str, subject: Reported, geometry: WeightGeometry | None, curves: Curves) -> str:
    assert subject.evaluation is not None
    of_training = curves.get("fvu", {})
    points = of_training.get(name) or (
        next(iter(of_training.values()), []) if len(of_training) == 1 else []
    )
    remarks = verdict(subject.evaluation, subject.target_l0, geometry, points)
    n_unusual = sum(remark.unusual for remark in remarks)
    end = "Nothing here is unusual."
    if n_unusual:
        end = f"Unusual: {n_unusual} of these {len(remarks)} (marked)."
    items = "".join(
        f"<li{' class=unusual' if remark.unusual else ''}>{html.escape(remark.text)}</li>\n"
        for remark in remarks
    )
    return f'<h2>{html.escape(name)}</h2>\n<ul>{items}</ul>\n<p class="note">{end}</p>\n'


def _main_figures(subjects: Mapping[str, Reported]) -> str:
    measured = {name: each for name, each in subjects.items() if each.evaluation is not None}
    if not measured:
        return ""
    head = ["", "latents", "FVU", "L0", "asked", "dead", "dense", "loss recovered", "KL", "tokens"]
    rows = []
    for name, each in measured.items():
        e = each.evaluation
        assert e is not None
        asked = "–" if each.target_l0 is None else f"{each.target_l0:g}"
        recovered, kl = "–", "–"
        if e.losses is not None:
            recovered = f"{e.losses.recovered_zero:.3f} ({e.losses.recovered_mean:.3f})"
            kl = f"{e.losses.kl:.4f}"
        counts = [f"{n_dead(e):,}", f"{n_dense(e):,}"]
        rows.append(
            [
                name,
                e.n_latents,
                f"{e.fvu:.4f}",
                f"{e.l0:.2f}",
                asked,
                *counts,
                recovered,
                kl,
                e.n_tokens,
            ]
        )
    note = (
        "FVU: fraction of variance unexplained. L0: active latents per token, beside the number asked "
        f"for. Dead: fired on no token. Dense: active on more than {percent(DENSE)} of tokens. Loss "
        "recovered: 1 is as good as the activations themselves, 0 as bad as zeros in their place (in "
        "brackets: as the mean activation). KL: divergence of the next-token predictions, in nats."
    )
    return f'<h2>Figures</h2>\n{_table(head, rows)}<p class="note">{note}</p>\n'


def _all_figures(subjects: Mapping[str, Reported]) -> str:
    measured = {n: s.evaluation for n, s in subjects.items() if s.evaluation is not None}
    if not measured:
        return ""
    columns = [evaluation.figures() for evaluation in measured.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows: list[list[Any]] = [
        ["location", *(evaluation.location or "unknown" for evaluation in measured.values())]
    ]
    rows += [[name, *(column.get(name) for column in columns)] for name in names]
    return _folded("All figures", _table(["", *measured], rows))


# ---- curves --------------------------------------------------------------------------------------


def _training(curves: Curves, axis: str) -> str:
    if not curves:
        return ""
    names = list(dict.fromkeys(name for of in curves.values() for name in of if name))
    legend = "".join(
        f'<span class="name" style="--colour: {COLOURS[i % len(COLOURS)]}">{html.escape(name)}</span>'
        for i, name in enumerate(names)
        if len(names) > 1
    )
    known = [field for field in _CURVES if field in curves]
    ordered = known + [f for f in curves if f not in known and f not in _NOT_DRAWN]
    pictures, constant = [], []
    for what in ordered:
        of = curves[what]
        values = [y for points in of.values() for _, y in points]
        if what != "loss" and of == curves.get("loss"):  # the only term of it
            continue
        if len(values) > 1 and max(values) == min(values):
            constant.append(f"{what} ({_cell(values[0])})")
            continue
        lines: Lines = [(names.index(name) if name else 0, points) for name, points in of.items()]
        x_label = {"tokens": "tokens trained on", "step": "steps"}.get(axis, "line of the log")
        picture = curve(lines, x_label, _CURVES.get(what, "value"))
        pictures.append(_picture(picture, f"{_CURVES.get(what, what)} in training"))
    note = f"Did not change: {html.escape(', '.join(constant))}." if constant else ""
    return (
        f"<h2>Training</h2>\n<p>{legend}</p>\n{''.join(pictures)}\n"
        f'<p class="note">{note} FVU and active latents are those of single training batches.</p>\n'
    )


def collect_curves(lines: Sequence[Mapping[str, Any]]) -> Curves:
    """``{field: {dictionary: [(x, y), …]}}``; the dictionary is "" for numbers of the whole run."""
    axis = _axis(lines)
    found: Curves = {}
    for number, line in enumerate(lines):
        x = line.get(axis, number)
        parts = {"": line}
        dictionaries = line.get("dictionaries")
        if isinstance(dictionaries, Mapping):
            parts |= {str(k): v for k, v in dictionaries.items() if isinstance(v, Mapping)}
        for name, values in parts.items():
            for what, y in values.items():
                if what not in _AXIS and _is_number(y):
                    found.setdefault(what, {}).setdefault(name, []).append((x, y))
    return found


def _axis(lines: Sequence[Mapping[str, Any]]) -> str:
    return next((a for a in _AXIS if all(_is_number(line.get(a)) for line in lines)), "line")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- latents and weights -------------------------------------------------------------------------


def _latents(
    name: str, subject: Reported, geometry: WeightGeometry | None, context: ModelContext | None
) -> str:
    """How often latents fire, what their weights look like, and which ones write most."""
    evaluation, autoencoder = subject.evaluation, subject.autoencoder
    parts = []
    if evaluation is not None:
        density = evaluation.density
        caption = f"How often latents fire; {density.never:,} of {evaluation.n_latents:,} never did"
        parts.append(_picture(density_plot(density), caption))
    if geometry is not None and autoencoder is not None:
        parts.append(_weights(geometry, autoencoder.n_latents))
    if evaluation is not None and autoencoder is not None:
        parts.append(_strongest(autoencoder, evaluation, context))
    return f"<h2>{html.escape(name)}: latents</h2>\n{''.join(parts)}" if parts else ""


def _strongest(
    autoencoder: Autoencoder, evaluation: Evaluation, context: ModelContext | None
) -> str:
    """The latents that write most, and which tokens they promote."""
    norms = autoencoder.directions.detach().double().norm(dim=1).cpu()  # [l]
    written = evaluation.mean_square * norms.square()  # [l]
    share = written / written.sum()
    order = share.argsort(descending=True, stable=True)[:_STRONGEST].tolist()
    order = [latent for latent in order if written[latent] > 0]
    if not order:
        return ""
    lens = None if context is None else _promoted(context, autoencoder, order)
    head = ["latent", "fires on", "largest", "share of output"]
    rows: list[list[Any]] = []
    for row, latent in enumerate(order):
        cells: list[Any] = [
            str(latent),
            percent(float(evaluation.frequency[latent]), 2),
            f"{evaluation.largest[latent]:.3g}",
            percent(float(share[latent]), 2),
        ]
        if lens is not None:
            cells += lens[row]
        rows.append(cells)
    note = (
        "The latents that write most. Share of output: the mean squared length of what a latent adds to "
        "the reconstruction, relative to the sum over all latents."
    )
    if lens is not None:
        head += ["promotes", "suppresses"]
        note += (
            " The tokens are those whose logits the decoder direction raises and lowers most, read "
            "directly off the unembedding; what later layers make of it is not in them. Tokens that the "
            "model's training hardly touched are left out."
        )
    return f'{_table(head, rows)}<p class="note">{note}</p>\n'


def _promoted(
    context: ModelContext, autoencoder: Autoencoder, latents: Sequence[int]
) -> list[list[Any]] | None:
    """The tokens that latents promote and suppress; None if what they write is not known as a vector."""
    try:
        directions = Directions(context, autoencoder)
        found = [directions.top_logits(latent, _TOKENS) for latent in latents]
    except NeuronExplainerError:  # another place, or a model whose weights no table describes
        return None
    return [
        [_Words(token.text for token in tokens) for tokens in (each.top, each.bottom)]
        for each in found
    ]


def _weights(geometry: WeightGeometry, n_latents: int) -> str:
    sample = geometry.sample_note(n_latents)
    shown: list[tuple[Tensor | None, str]] = [
        (geometry.decoder_norm, "length of decoder directions"),
        (geometry.encoder_decoder_cosine, "cosine of encoder and decoder direction"),
        (geometry.nearest_cosine, f"cosine of a decoder direction and the nearest other{sample}"),
    ]
    pictures, equal = [], []
    for values, label in shown:
        if values is None or not len(values):
            continue
        low, high = (float(v) for v in torch.aminmax(values))
        if high - low < 1e-4 * max(abs(low), abs(high)):  # rounding, not a distribution
            equal.append(f"The {label} is the same for all: {(low + high) / 2:.3g}.")
        else:
            pictures.append(_picture(histogram(values, label), label.capitalize()))
    note = f'<p class="note">{html.escape(" ".join(equal))}</p>\n' if equal else ""
    return f"{''.join(pictures)}{note}"


# ---- settings ------------------------------------------------------------------------------------


def _settings(subjects: Mapping[str, Reported], shared: Mapping[str, Any]) -> str:
    own = {name: dict(_flat(each.settings)) for name, each in subjects.items() if each.settings}
    keys = dict.fromkeys(key for settings in own.values() for key in settings)
    rows = [[key, *(_hidden(settings.get(key)) for settings in own.values())] for key in keys]
    tables = [_table(["", *own], rows)] if rows else []
    if shared:
        tables.append(_table([], [[name, _hidden(value)] for name, value in _flat(shared)]))
    return _folded("Settings", "".join(tables)) if tables else ""


def _hidden(value: Any) -> Any:
    """The value; of an absolute path only the name, as folders above it tell who trained, and where."""
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value


def _flat(settings: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting with its name; ``a.b`` is ``b`` of the settings ``a``."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield within + str(name), value


# ---- parts ---------------------------------------------------------------------------------------


class _Words(list[str]):
    """Tokens, to be shown as such."""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(_tagged(cell, tag) for cell in cells) + "</tr>\n"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>\n{line(head, 'th') if any(head) else ''}{body}</table>\n"


def _tagged(cell: Any, tag: str) -> str:
    words = isinstance(cell, _Words) or cell in ("promotes", "suppresses")
    return f"<{tag}{' class=words' if words else ''}>{_cell(cell)}</{tag}>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, _Words):
        return " ".join(f'<span class="token">{html.escape(word)}</span>' for word in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return html.escape(str(value))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>\n{content}</details>\n"


def _picture(svg: str, caption: str) -> str:
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{svg}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )
