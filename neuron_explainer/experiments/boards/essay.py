"""All pictures of a study as files, and as one self-contained page that reads as an essay."""

import base64
import html
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuron_explainer import files
from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.experiments.boards import pictures_of_claims as claims
from neuron_explainer.experiments.boards import pictures_of_model as of_model
from neuron_explainer.experiments.boards.study import Picture, Study

logger = logging.getLogger(__name__)

Draw = Callable[[Study], Picture]
Chapter = tuple[str, str, Sequence[Draw]]
CHAPTERS: tuple[Chapter, ...] = (
    (
        "The task",
        "A transformer learns to fill in boards. Nobody tells it that there are objects.",
        (of_model.boards, of_model.accuracy_table, of_model.learning),
    ),
    (
        "What it knows before it computes",
        "Tokens and positions come in on separate ways: only the token is on the residual stream.",
        (of_model.token_embeddings, of_model.position_embeddings, of_model.position_maps),
    ),
    (
        "Features can be read",
        "If the model has abstractions, what they are about must be there to be read.",
        (claims.probes,),
    ),
    (
        "Cells of one object come together",
        "An abstraction is a place where different things are the same.",
        (
            claims.convergence,
            claims.planes,
            of_model.activations_of_a_board,
            of_model.norms_on_the_board,
            of_model.distances_across_stages,
            claims.lea_abstractions,
        ),
    ),
    (
        "How cells find each other",
        "Attention is the only way for a hidden cell to learn about the rest of its board.",
        (of_model.attention, of_model.attention_grid, of_model.attention_across_boards),
    ),
    (
        "Abstractions cause",
        "What can be read need not be used. So we write, and see what is drawn.",
        (claims.manipulation, claims.manipulation_example),
    ),
    (
        "The same thing everywhere",
        "An abstraction that changed with its surroundings would not be one.",
        (claims.independence,),
    ),
    (
        "Parts and wholes",
        "Composites are objects made of objects.",
        (claims.parts_and_wholes,),
    ),
    (
        "Words",
        "A second architecture has to say what it sees in 16 words of a vocabulary that it makes up itself.",
        (claims.words, claims.word_edits, claims.word_example, claims.masked_speech),
    ),
)
"""Title, first sentence and pictures of each chapter."""


def chosen_chapters(names: Sequence[str]) -> list[Chapter]:
    """The chapters with only the pictures of these names; an error that suggests the nearest."""
    known = [draw.__name__ for *_, draws in CHAPTERS for draw in draws]
    for name in names:
        if name not in known:
            raise InputError(
                f"unknown figure {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."
            )
    kept = [(a, b, [draw for draw in draws if draw.__name__ in names]) for a, b, draws in CHAPTERS]
    return [chapter for chapter in kept if chapter[2]]


_STYLE = """
body{max-width:56rem;margin:2rem auto;padding:0 1rem;font:16px/1.55 Georgia,serif;color:#1f2937}
h1,h2,h3{font-family:system-ui,sans-serif;line-height:1.2}h1{font-size:1.9rem}
h2{margin-top:3rem;border-top:1px solid #e5e7eb;padding-top:1.2rem}h3{margin:2rem 0 .3rem;font-size:1.05rem}
figure{margin:1rem 0}img{max-width:100%;height:auto}
.number{background:#f3f4f6;border-left:4px solid #4477aa;padding:.5rem .8rem;margin:.5rem 0}
.lead{font-style:italic;color:#4b5563}details{color:#4b5563;font-size:.85rem}
pre{background:#f9fafb;padding:.6rem;overflow-x:auto;font-size:.8rem}
nav{font:14px system-ui,sans-serif;columns:2}nav a{color:#4477aa;text-decoration:none}
"""


def write_essay(
    study: Study,
    out: str | Path,
    *,
    chapters: Sequence[Chapter] = CHAPTERS,
    progress: Callable[[str], None] = print,
) -> Path:
    """Draw every picture into a folder, as PNG and SVG, and write ``index.html``; the path of the page.

    ``numbers.json`` holds the sentence of each picture, ``activations/`` the vectors that it is drawn from.
    """
    folder = Path(out)
    files.make_folder(folder)
    numbers, parts = {}, []
    for number, (title, lead, draws) in enumerate(chapters, 1):
        parts.append(
            f'<h2 id="c{number}">{number}. {html.escape(title)}</h2><p class="lead">{lead}</p>'
        )
        for draw in draws:
            picture = draw(study)
            progress(f"{picture.name}: {picture.number}")
            numbers[picture.name] = picture.number
            parts.append(_section(picture, study, folder))
    files.write_json(folder / "numbers.json", numbers)
    dump_activations(study, folder / "activations")
    page = folder / "index.html"
    with files.atomic_write(page) as temporary:
        temporary.write_text(_page(study, chapters, parts), "utf-8")
    return page


def _section(picture: Picture, study: Study, folder: Path) -> str:
    """A picture as part of the page; its files are written on the way."""
    from matplotlib import rc_context

    drawn: dict[str, bytes] = {}
    for ending, metadata in (("png", None), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "neuron_explainer"}):  # the same names every time
            picture.figure.savefig(
                buffer, format=ending, dpi=150, metadata=metadata, bbox_inches="tight"
            )
        drawn[ending] = buffer.getvalue()
        with files.atomic_write(folder / f"{picture.name}.{ending}") as temporary:
            temporary.write_bytes(drawn[ending])
    image = base64.b64encode(drawn["png"]).decode()
    title, text, number, code = (
        html.escape(x) for x in (picture.title, picture.text, picture.number, picture.code(study))
    )
    return (
        f'<h3 id="{picture.name}">{title}</h3><p>{text}</p>'
        f'<figure><img alt="{title}" src="data:image/png;base64,{image}"></figure>'
        f'<p class="number">{number}</p>'
        f"<details><summary>the code that draws this</summary><pre>{code}</pre></details>"
    )


def _page(study: Study, chapters: Sequence[Chapter], parts: list[str]) -> str:
    contents = "".join(
        f'<div><a href="#c{i}">{i}. {html.escape(title)}</a></div>'
        for i, (title, _, _) in enumerate(chapters, 1)
    )
    sources = "; ".join(f"{name}: {html.escape(text)}" for name, text in study.sources.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Abstractions on boards</title><style>{_STYLE}</style></head><body>"
        "<h1>How a transformer that fills in boards comes to have abstractions</h1>"
        "<p>After <i>Emergence and Function of Abstract Representations in Self-Supervised Transformers</i> "
        "(Ferry, Ching and Kawai 2023, arXiv:2312.05361). Every number on this page was measured "
        "when the page "
        "was made, on the models named here and with fixed seeds; what a trivial competitor gets "
        "stands beside "
        f"it. Models: {sources}.</p><nav>{contents}</nav>{''.join(parts)}</body></html>"
    )


def dump_activations(study: Study, folder: Path) -> None:
    """Write what was recorded: an ``.npy`` file for each place, labels, and ``meta.json``."""
    recording = study.stream
    files.make_folder(folder)
    labels = {
        name: getattr(recording, name)
        for name in (
            "tokens",
            "masked",
            "roots",
            "cells",
            "parts",
            "composites",
            "backgrounds",
            "kinds",
        )
    }
    arrays: dict[str, Any] = {f"label_{name}": x.astype(np.int16) for name, x in labels.items()}
    names = {str(place): f"{str(place).replace('/', '_')}.npy" for place in recording.activations}
    arrays |= {names[str(p)][:-4]: x.astype(np.float16) for p, x in recording.activations.items()}
    for name, array in arrays.items():
        with files.atomic_write(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)
    meta = {
        "places": names,
        "axes": "boards, cells, channels; labels: boards, cells, or boards",
        "labels": {name: f"label_{name}.npy" for name in labels},
        "models": study.sources,
    }
    with files.atomic_write(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
