"""Pages: one self-contained HTML file a factor, and an index of all.

A sentence is shown with the token that the score is of in blue. Where saliency is known, the background of
each token says what it does to the factor, as in the published program: white is blended with
rgb(255, 50, 0) for a positive weight and with rgb(50, 255, 0) for a negative one, in the proportion
``|weight| / max(0.01, largest |weight| of the sentence)``. The target's own weight, which is often far larger
than all others, is first cut to the largest of theirs. On a dark page the colours are weaker, so that the
text on them stays readable.

Nothing on a page runs, and nothing is loaded. Text from outside is escaped, and the only styles that are made
for a page are numbers.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from neuron_explainer import files
from neuron_explainer.analysis.factors.examples import FactorExample, FactorExamples
from neuron_explainer.analysis.factors.importance import Importance
from neuron_explainer.analysis.factors.pieces import pieces
from neuron_explainer.analysis.factors.saliency import Saliency, key_of
from neuron_explainer.analysis.highlights import visible
from neuron_explainer.analysis.page import html_file
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext

FLOOR = 0.01
_WORDS = 8
_PART = '<span class="byte" title="a part of the next character">·</span>'
"""What stands for a token that is a part of a character, which a later token completes."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2126; --quiet: #5c6670; --line: #e2e6ea;
  --target: blue; --strength: 1; --accent: #1a5fb4; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --text: #e4e7ea; --quiet: #9aa4ae; --line: #2c3238; --target: #9cc3ff;
    --strength: .55; --accent: #78aeed; --soft: #1c2024; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem;
  background: var(--page); color: var(--text); }
a { color: var(--accent); }
h1 { font-size: 1.6rem; margin: .3rem 0 .2rem; }
h2 { font-size: 1.05rem; margin: 0; display: inline; }
p { margin: .3rem 0; }
.quiet, .key { color: var(--quiet); font-size: .87rem; }
.level { display: inline-block; font-size: .8rem; font-weight: 600; padding: .05rem .55rem;
  border-radius: 1rem;
  border: 1px solid var(--line); background: var(--soft); vertical-align: .2em; }
.curve { margin: 1.2rem 0; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, sans-serif; fill: var(--quiet); }
svg text.peak { fill: var(--text); font-weight: 600; }
svg .axis { stroke: var(--line); } svg .line { fill: none; stroke: var(--accent); stroke-width: 2; }
svg circle { fill: var(--accent); } svg circle.peak { fill: var(--text); }
details { border-top: 1px solid var(--line); padding: .6rem 0; }
summary { cursor: pointer; }
ol { list-style: none; margin: .6rem 0 0; padding: 0; }
li { display: grid; grid-template-columns: 5.2rem 1fr; gap: 1rem; padding: .45rem 0;
  border-top: 1px solid var(--line); }
li:first-child { border-top: 0; }
.score { font-variant-numeric: tabular-nums; text-align: right; color: var(--quiet); font-size: .87rem; }
.score b { color: var(--text); display: block; font-size: .95rem; }
.bar { display: block; height: 3px; border-radius: 2px; background: var(--accent); margin: .2rem 0 0 auto;
  width: calc(var(--w) * 100%); }
.sentence { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
.up, .down, .target { border-radius: 2px; padding: .12em 0; }
.up { background: rgb(255 50 0 / calc(var(--w) * var(--strength))); }
.down { background: rgb(50 255 0 / calc(var(--w) * var(--strength))); }
.target { color: var(--target); font-weight: 650; text-decoration: underline; text-underline-offset: .2em;
  text-shadow: 0 0 2px var(--page), 0 0 2px var(--page), 0 0 3px var(--page); }
.byte { font: .7em ui-monospace, monospace; color: var(--quiet); }
.key span { padding: .1em .3em; } .key .up, .key .down { color: var(--text); white-space: nowrap; }
table { border-collapse: collapse; width: 100%; margin-top: 1rem; }
th { text-align: left; font-size: .82rem; color: var(--quiet); font-weight: 600; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.words { overflow-wrap: anywhere; }
td.words span { background: var(--soft); border-radius: 3px; padding: 0 .25em;
  margin-right: .35em; white-space: pre-wrap; display: inline-block; }
@media (max-width: 700px) { li { grid-template-columns: 1fr; gap: .1rem; }
  .score { text-align: left; } .score b { display: inline; } .bar { margin-left: 0; max-width: 6rem; }
  th.spark, td.spark { display: none; } }
"""


def write_pages(
    folder: str | Path,
    context: ModelContext,
    examples: FactorExamples,
    found: Importance,
    factors: Sequence[int],
    saliencies: Iterable[Saliency] = (),
    *,
    n_sentences: int = 20,
) -> list[Path]:
    """Write ``factor-0035.html`` for each of the factors, and ``index.html``.

    Args:
        folder: the folder to write to; pages of the same name are replaced.
        context: the model, whose tokenizer turns tokens into text.
        examples: the examples of all factors.
        found: their importance.
        factors: which factors get a page.
        saliencies: of any of the examples.
        n_sentences: sentences in each layer.

    Returns:
        The files, the index first.
    """
    known = {key_of(each): each for each in saliencies}
    folder = files.local_path(folder)
    files.make_folder(folder)
    written = [folder / "index.html"]
    for factor in factors:
        examples.check_factor(factor)
        written.append(folder / page_name(factor))
        _write(written[-1], factor_page(context, examples, found, factor, known, n_sentences))
    _write(written[0], index_page(context, examples, found, factors))
    return written


def page_name(factor: int) -> str:
    """The file name of a factor's page."""
    return f"factor-{factor:04d}.html"


def _write(path: Path, text: str) -> None:
    with files.atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


# ---- a factor --------------------------------------------------------------------------------------

Key = tuple[int, ActivationLocation, int]


def factor_page(
    context: ModelContext,
    examples: FactorExamples,
    found: Importance,
    factor: int,
    saliencies: Mapping[Key, Saliency],
    n_sentences: int = 20,
) -> str:
    """The page of a factor: its importance curve, and its examples in each layer."""
    level, peak = found.levels[factor], int(found.peak[factor])
    layers = [
        _layer(context, examples, found, factor, index, saliencies, n_sentences)
        for index in range(len(found.locations))
    ]
    has_weights = any(key[0] == factor for key in saliencies)
    where = (
        "active nowhere in this text" if level == "silent" else f"peaks at {found.locations[peak]}"
    )
    body = f"""<p class="quiet"><a href="index.html">All factors</a></p>
<h1>Factor {factor} <span class="level">{level}</span></h1>
<p class="quiet">{html.escape(_about(examples))} It {where}.</p>
<figure class="curve">{_curve(found, factor)}</figure>
{_key(has_weights)}
{"".join(layers)}"""
    return html_file(f"Factor {factor}", _STYLE, body)


def _about(examples: FactorExamples) -> str:
    corpus, model = examples.settings.get("corpus", {}), examples.settings.get("model", "")
    return (
        f"One of {examples.n_factors:,} factors of {Path(str(model)).name}, looked for in "
        f"{examples.n_tokens:,} tokens of {corpus.get('name', 'a text')}."
    )


def _key(has_weights: bool) -> str:
    target = '<span class="target">Blue</span> is the token that the score is of.'
    if not has_weights:
        return f'<p class="key">{target}</p>'
    return (
        f'<p class="key">{target} The background shows what each token before it does: '
        '<span class="up" style="--w:0.8">raises the factor</span>, '
        '<span class="down" style="--w:0.8">lowers it</span>, by a linear model of sentences with '
        "random tokens replaced; its R² stands under the score.</p>"
    )


def _layer(
    context: ModelContext,
    examples: FactorExamples,
    found: Importance,
    factor: int,
    index: int,
    saliencies: Mapping[Key, Saliency],
    n_sentences: int,
) -> str:
    place = found.locations[index]
    shown = examples.examples(factor, place, n_sentences, each_sentence_once=True)
    count = len(examples.at(place).of(factor).score)
    value = found.values[factor, index]
    heading = f'<h2>{html.escape(str(place))}</h2> <span class="quiet">importance {value:.3g}'
    if not shown:
        return f"<details><summary>{heading}, no examples</span></summary></details>\n"
    strongest = shown[0].score
    items = "".join(
        _item(context, each, saliencies.get((factor, place, each.position)), strongest)
        for each in shown
    )
    opened = " open" if index == int(found.peak[factor]) else ""
    return (
        f"<details{opened}><summary>{heading}, {len(shown)} of {count:,} examples</span></summary>\n"
        f"<ol>{items}</ol></details>\n"
    )


def _item(
    context: ModelContext, example: FactorExample, saliency: Saliency | None, strongest: float
) -> str:
    fit = "" if saliency is None or saliency.r2 is None else f"R² {saliency.r2:.2f}"
    bar = f'<span class="bar" style="--w:{example.score / strongest:.3f}"></span>'
    weights = [] if saliency is None else list(saliency.weights)
    return (
        f'<li><div class="score" title="sentence {example.sent_index}, token {example.index}">'
        f"<b>{example.score:.3g}</b>{bar} {fit}</div>"
        f'<div class="sentence">{sentence_html(context, example, weights)}</div></li>\n'
    )


def sentence_html(
    context: ModelContext, example: FactorExample, weights: Sequence[float] = ()
) -> str:
    """A sentence with its target in blue and the tokens before it coloured by their weights."""
    shares = opacities(weights, example.index) if weights else []
    parts = []
    for index, piece in enumerate(pieces(context, example.tokens)):
        share = shares[index] if index < len(shares) else 0.0
        weight = weights[index] if index < len(weights) else 0.0
        classes = ["target"] if index == example.index else []
        style = ""
        if round(share, 3) != 0:
            classes.append("up" if share > 0 else "down")
            style = f' style="--w:{abs(share):.3f}" title="{weight:+.3g}"'
        text = html.escape(visible(piece)) or _PART
        kind = f' class="{" ".join(classes)}"' if classes else ""
        parts.append(f"<span{kind}{style}>{text}</span>" if classes else text)
    return "".join(parts)


def opacities(weights: Sequence[float], target: int) -> list[float]:
    """How strongly each token is coloured: -1 to 1, by the rule at the top of this module."""
    cut = list(weights)
    others = [abs(w) for index, w in enumerate(weights) if index != target]
    if others and target < len(cut):
        most = max(others)
        cut[target] = max(-most, min(most, cut[target]))
    largest = max([FLOOR, *map(abs, cut)])
    return [weight / largest for weight in cut]


def _curve(found: Importance, factor: int) -> str:
    """The importance curve as SVG: a point for each layer, the peak marked."""
    width, height, left, bottom, top = 640, 190, 44, 26, 22
    values = found.values[factor].tolist()
    highest = max(values) or 1.0
    step = (width - left - 20) / max(1, len(values) - 1)
    points = [
        (left + i * step, top + (height - top - bottom) * (1 - value / highest))
        for i, value in enumerate(values)
    ]
    base = height - bottom
    peak = int(found.peak[factor])
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if i == peak else 3.5}"'
        f"{' class=peak' if i == peak else ''}><title>{html.escape(str(found.locations[i]))}: "
        f"{values[i]:.4g}</title></circle>"
        f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{_layer_name(found, i)}</text>'
        for i, (x, y) in enumerate(points)
    )
    x, y = points[peak]
    label = (
        f'<text class="peak" x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{highest:.3g}</text>'
    )
    relative = ", in lengths of activations" if found.relative else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="importance of the factor in each layer">'
        f'<line class="axis" x1="{left - 12}" y1="{base}" x2="{width - 8}" y2="{base}"/>'
        f'<text x="{left - 18}" y="{base + 4}" text-anchor="end">0</text>'
        f'<polyline class="line" points="{_points(points)}"/>{marks}'
        f"{label if max(values) > 0 else ''}</svg>"
        f'<figcaption class="quiet">Importance by layer: the mean of the top {found.n:,} '
        f"scores{relative}.</figcaption>"
    )


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _layer_name(found: Importance, index: int) -> str:
    layer = found.locations[index].layer
    return "–" if layer is None else str(layer)


# ---- the index -------------------------------------------------------------------------------------


def index_page(
    context: ModelContext, examples: FactorExamples, found: Importance, factors: Sequence[int]
) -> str:
    """A line for each factor that has a page: class, peak, curve and strongest words."""
    rows = "".join(_row(context, examples, found, factor) for factor in factors)
    levels = found.levels
    counts = ", ".join(
        f"{levels.count(level)} {level}" for level in ("low", "mid", "high", "silent")
    )
    path, model = found.locations[0].path, str(examples.settings.get("model", ""))
    text = str(examples.settings.get("corpus", {}).get("name", "a text"))
    body = f"""<h1>Transformer factors</h1>
<p class="quiet">{examples.n_factors:,} factors of {html.escape(Path(model).name)} at {html.escape(path)},
looked for in {examples.n_tokens:,} tokens of {html.escape(text)}: {counts}.
A factor is low, mid or high if its importance peaks in the first, second or last third of the layers, and
silent if it is active nowhere. Below are {len(factors):,} of them.</p>
<table><tr><th class="number">Factor</th><th>Level</th><th>Peak</th><th class="number">Importance</th>
<th class="spark">By layer</th><th>Strongest words at the peak</th></tr>
{rows}</table>"""
    return html_file("Transformer factors", _STYLE, body)


def _row(context: ModelContext, examples: FactorExamples, found: Importance, factor: int) -> str:
    peak = int(found.peak[factor])
    place = found.locations[peak]
    shown: dict[str, None] = {}
    for example in examples.examples(factor, place, 40):
        word = context.decode_token(example.tokens[example.index])
        shown[visible(word.strip() or word)] = None
    words = "".join(f"<span>{html.escape(word)}</span>" for word in list(shown)[:_WORDS])
    return (
        f'<tr><td class="number"><a href="{page_name(factor)}">{factor}</a></td>'
        f"<td>{found.levels[factor]}</td><td>{_layer_name(found, peak)}</td>"
        f'<td class="number">{found.values[factor, peak]:.3g}</td>'
        f'<td class="spark">{_spark(found.values[factor].tolist())}</td>'
        f'<td class="words">{words}</td></tr>\n'
    )


def _spark(values: Sequence[float]) -> str:
    """A curve of the size of a word."""
    highest, step = max(values) or 1.0, 76 / max(1, len(values) - 1)
    points = [(2 + i * step, 20 - 17 * value / highest) for i, value in enumerate(values)]
    x, y = max(points, key=lambda point: (-point[1], -point[0]))
    return (
        f'<svg viewBox="0 0 80 22" width="80" height="22" aria-hidden="true">'
        f'<polyline class="line" points="{_points(points)}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/></svg>'
    )
