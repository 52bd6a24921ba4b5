"""Pages of units as files: they open from a disk, in a mail and without a network.

A browser loads neither modules nor data from ``file://``. So the script is a classic one, and the data of a
page stand in it, as JSON in which nothing can end the element around it. The policy in the head of a page
names the scripts that may run.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.analysis.latent_record import LatentRecord
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.errors import InputError
from neuron_explainer.progress import progress_bar
from neuron_explainer.server.content import feature_content, vocabulary
from neuron_explainer.tables import escaped
from neuron_explainer.viewer import DIST

if TYPE_CHECKING:
    from neuron_explainer.analysis.directions import TopLogits

LARGEST_PAGE = (
    60_000  # bytes of a page of one file; long examples are cut to what stands around their peaks
)
_WIDTHS = (None, 24, 12)  # tokens in front of a peak
_SHARED = ("embed.js", "embed.css", "THIRD_PARTY_LICENSES.txt")
# A page of one file holds script and style compressed. A style sheet that a script makes needs no permission,
# and a script that it adds needs its hash.
_UNPACK = (
    "(async()=>{const text=id=>new Response(new Blob([Uint8Array.from(atob(document.getElementById(id)"
    ".textContent),c=>c.charCodeAt())]).stream().pipeThrough(new DecompressionStream('gzip'))).text();"
    "const sheet=new CSSStyleSheet();sheet.replaceSync(await text('css'));"
    "document.adoptedStyleSheets=[sheet];const script=document.createElement('script');"
    "script.textContent=await text('js');document.body.append(script)})()"
)


@dataclass(frozen=True)
class _Place:
    """Where a store is known from; see :class:`~neuron_explainer.server.content.Shelved`."""

    id: str
    source: str


def unit_data(
    store: ExampleStore, record: LatentRecord, *, logits: "TopLogits | None" = None
) -> dict[str, Any]:
    """What a page or a widget shows of a unit, as plain values.

    Args:
        store: where it is.
        record: what the store knows of it.
        logits: what it promotes, see :class:`~neuron_explainer.analysis.directions.Directions`.
    """
    card = feature_content(_Place(store.name, str(store.path)), store, record)
    del card["bookmarked"]
    for example in card["examples"]:
        example["acts"] = [[at, _rounded(value, 4)] for at, value in example["acts"]]
    return {
        "card": _short(card),
        "logits": None if logits is None else _logits(store, logits),
        "name": store.name,
        "links": {},
    }


def _logits(store: ExampleStore, found: "TopLogits") -> dict[str, Any]:
    ids = [each.token for each in (*found.top, *found.bottom)]
    return {
        "top": [{"id": each.token, "value": _rounded(each.value, 6)} for each in found.top],
        "bottom": [{"id": each.token, "value": _rounded(each.value, 6)} for each in found.bottom],
        "histogram": {
            "edges": [_rounded(edge, 6) for edge in found.edges],
            "counts": list(found.counts),
        },
        "skewness": _rounded(found.skewness, 6),
        "kurtosis": _rounded(found.kurtosis, 6),
        "note": found.note,
        **vocabulary(store, [ids]),
    }


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _short(value: Any) -> Any:
    """The same values, with numbers of six digits."""
    if isinstance(value, float):
        return _rounded(value, 6)
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return value


# --- one page ---


def page_of_unit(store: ExampleStore, unit: int, *, logits: "TopLogits | None" = None) -> str:
    """The page of a unit as one HTML file of at most :data:`LARGEST_PAGE` bytes, if that is possible.

    To keep to that, long examples are cut to the tokens around their peaks.
    """
    record = store[unit]
    data = unit_data(store, record, logits=logits)
    found = ""
    for width in _WIDTHS:
        found = _whole_page(_title(record), _cut(data, width))
        if len(found.encode()) <= LARGEST_PAGE:
            break
    return found


def _title(record: LatentRecord) -> str:
    return record.title[:1].upper() + record.title[1:]


def _cut(data: dict[str, Any], width: int | None) -> dict[str, Any]:
    """The same, with so many tokens in front of each peak and half as many behind it."""
    if width is None or data["card"]["kind"] == "head":
        return data
    examples = [_around(example, width) for example in data["card"]["examples"]]
    used = {str(token) for example in examples for token in example["ids"]}
    words = {
        name: {token: text for token, text in data["card"][name].items() if token in used}
        for name in ("vocab", "vocab_bytes")
    }
    return {**data, "card": {**data["card"], **words, "examples": examples}}


def _around(example: dict[str, Any], width: int) -> dict[str, Any]:
    first = max(0, example["peak"] - width)
    end = min(len(example["ids"]), example["peak"] + width // 2 + 1)
    return {
        **example,
        "ids": example["ids"][first:end],
        "acts": [[at - first, value] for at, value in example["acts"] if first <= at < end],
        "peak": example["peak"] - first,
        "start": example["start"] + first,
        "position": example["position"] + first,
    }


def _whole_page(title: str, data: dict[str, Any]) -> str:
    """A page of one file."""
    script = _dist("embed.js") + "neuronExplainer.mount()"
    policy = f"script-src {_hash(_UNPACK)} {_hash(script)}"
    packed = "".join(
        f'<script type="text/plain" id="{name}">{_packed(text)}</script>\n'
        for name, text in (("js", script), ("css", _dist("embed.css")))
    )
    return _document(title, policy, "", data, f"{packed}<script>{_UNPACK}</script>")


def _document(title: str, policy: str, head: str, data: dict[str, Any], last: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; base-uri 'none'; {policy}\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(escaped(title))}</title>\n{head}</head>\n"
        '<body class="nx"><main class="page" id="card"></main>\n'
        f'<script type="application/json" id="data">{_json(data)}</script>\n{last}</body></html>\n'
    )


def _json(data: Any) -> str:
    """JSON that can stand in a script element whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _dist(name: str) -> str:
    return (DIST / name).read_text("utf-8")


def write_page(
    store: ExampleStore, unit: int, path: str | Path, *, logits: "TopLogits | None" = None
) -> Path:
    """Write :func:`page_of_unit` to a file, whole or not at all."""
    with files.atomic_write(path) as temporary:
        temporary.write_text(page_of_unit(store, unit, logits=logits), "utf-8")
    return Path(path)


# --- a folder of pages ---


def write_site(
    store: ExampleStore,
    folder: str | Path,
    units: Sequence[int] | None = None,
    *,
    logits: "Iterable[TopLogits] | None" = None,
    progress: bool = False,
) -> Path:
    """Write a page for each unit, and ``index.html`` with the list of all, into a new folder.

    Args:
        store: where the units are.
        folder: must be absent or empty.
        units: which; None: all that were ever active.
        logits: what they promote, in the same order.
        progress: show a bar on stderr.
    """
    chosen = store.alive.tolist() if units is None else list(dict.fromkeys(units))
    if not chosen:
        raise InputError(f"{store.name} has no {store.kind} that was ever active.")
    names = {str(unit): f"{unit}.html" for unit in chosen}
    promoted = iter(logits) if logits is not None else None
    with files.atomic_folder(folder) as temporary:
        for name in _SHARED:
            (temporary / name).write_text(_dist(name), "utf-8")
        rows = []
        for unit in progress_bar(chosen, desc="writing", unit=" pages", disable=not progress):
            record = store[unit]
            found = None if promoted is None else next(promoted)
            data = unit_data(store, record, logits=found)
            data["links"] = {"index": "index.html"} | _links_of(data["card"], names)
            page = _page_of_site(_title(record), data)
            (temporary / names[str(unit)]).write_text(page, "utf-8")
            rows.append(_row(record))
        index = _page_of_site(store.name, {"index": _index(store, rows)})
        (temporary / "index.html").write_text(index, "utf-8")
    return Path(folder)


def _links_of(card: dict[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """The pages that a page leads to, where they are written too."""
    near = [card["prev_alive"], card["next_alive"], *(each["unit"] for each in card["partners"])]
    return {str(unit): names[str(unit)] for unit in near if str(unit) in names}


def _row(record: LatentRecord) -> list[Any]:
    """A unit in the list of all: its number, three figures, and a label or where it is strongest."""
    text = record.label
    if not text and record.all_examples:
        first = record.all_examples[0]
        text = "".join(first.strings[max(0, first.query - 8) : first.query + 5])
    s = record.statistics
    figures = [_rounded(value, 6) for value in (s.density, s.max, s.mean)]
    return [record.unit, *figures, text[:200]]


def _index(store: ExampleStore, rows: list[list[Any]]) -> dict[str, Any]:
    about = (
        f"{len(rows):,} of {len(store):,} {store.kind}s at {store.location}, looked at on "
        f"{store.n_tokens:,} tokens of {store.tokens.corpus.name}"
    )
    return {"name": store.name, "about": about, "kind": store.kind, "rows": rows}


def _page_of_site(title: str, data: dict[str, Any]) -> str:
    """A page that shares script and style with the others of its folder."""
    start = "neuronExplainer.mount()"
    # 'self' is for a folder on a web server, file: for one on a disk.
    policy = f"script-src 'self' file: {_hash(start)}; style-src 'self' file:"
    head = '<link rel="stylesheet" href="embed.css">\n'
    last = f'<script src="embed.js"></script><script>{start}</script>'
    return _document(title, policy, head, data, last)
