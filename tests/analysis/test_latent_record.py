"""Pages of units: readable, small, and harmless whatever tokens and labels hold."""

import html.parser
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neuron_explainer.analysis import highlights
from neuron_explainer.analysis.highlights import LEVELS, token_string
from neuron_explainer.analysis.latent_record import Example, LatentRecord, UnitFigures
from neuron_explainer.analysis.page import Section
from neuron_explainer.analysis.records import N_BINS
from neuron_explainer.analysis.store_format import Label

HOSTILE = "</b><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\x9b\u202e\"'&"
TEXT = ["Once", " upon", " a", " time", " the", " king", "\n", "\n", " said", " no", "."]


def make_example(
    strings: list[str],
    values: list[float],
    *,
    group: str = "top",
    pairs: bool = False,
    rank: int = 0,
) -> Example:
    peak = int(np.argmax(np.abs(values)))
    return Example(
        group=group,
        interval=0,
        rank=rank,
        value=values[peak],
        peak=peak,
        start=100,
        document=7,
        position=3,
        tokens=np.arange(len(strings)),
        activations=np.array(values, np.float32),
        pairs=pairs,
        vocabulary=lambda ids: [strings[i].encode() for i in ids],
    )


def make_record(*examples: Example, **more: object) -> LatentRecord:
    values = [example.value for example in examples] or [0.0]
    count = 0 if not examples else 50
    histogram = np.zeros(N_BINS, np.uint32)
    if examples:
        histogram[80:86] = [1, 5, 20, 100, 20, 2]
    figures = UnitFigures(
        1000, count, count / 1000, max(values), min(values), 2, 1, 0.5, 3, 0.1, 0.1, 0.1, 0.1, 990
    )
    facts: dict[str, object] = {"signed": False, **more}
    return LatentRecord(
        name="2.mlp",
        kind="head" if any(example.pairs for example in examples) else "latent",
        location="2/mlp.post_act",
        unit=12,
        statistics=figures,
        histogram=histogram,
        all_examples=examples,
        **facts,  # type: ignore[arg-type]  # the test's own
    )


def values_of(**peaks: float) -> list[float]:
    return [peaks.get(text.strip().lower(), 0.0) for text in TEXT]


KING = make_example(TEXT, values_of(king=8.0, the=4.0, time=1.0))


class Checker(html.parser.HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "rect"):
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "rect"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


# --- tokens ---


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (b" the", " the"),
        (b"\n", "↵"),
        (b"a\r\n\tb", "a␍↵⇥b"),
        (b" ", "·"),
        (b"   ", "···"),
        (b"", ""),
        ("é☃🙂".encode(), "é☃🙂"),
        (b"\xe2\x98", "⟨E2⟩⟨98⟩"),
        (b"\x83a", "⟨83⟩a"),
        (b"\xff", "⟨FF⟩"),
        (b"\x1b[2J", "\\x1b[2J"),
        ("\u202e".encode(), "\\u202e"),
        (b"\0", "\\x00"),
    ],
)
def test_token_strings(piece: bytes, shown: str) -> None:
    assert token_string(piece) == shown


def test_levels() -> None:
    assert [highlights.level_of(v, 9.0) for v in (0, 0.4, 0.5, 1, 1.1, 9, 99, -9, -1)] == [
        *(0, 0, 1, 1, 2, LEVELS, LEVELS, -LEVELS, -1)
    ]
    assert highlights.level_of(1.0, 0.0) == 0


def test_numbers() -> None:
    shown = [highlights.number(x) for x in (0, 21.0, 0.98431, 1234.5, 1e-5, 2e7, -3)]
    assert shown == ["0", "21.0", "0.984", "1234", "1.0e-5", "2.0e7", "-3.00"]


# --- text ---


def test_brackets() -> None:
    lines = make_record(KING).text().splitlines()
    assert lines[0] == "latent 12 of 2.mlp"
    assert "     8.00  Once upon a[ time the[[ king]]]↵↵ said no." in lines
    assert any(re.search(r"values  0\.841 ▂.*█.* 2\.38", line) for line in lines)
    colour = make_record(KING).text(colour=True)
    assert "\x1b[1;4;38;5;16;48;5;208m king\x1b[0m" in colour


def test_long_examples_are_cut_around_the_peak() -> None:
    words = [f" word{i}" for i in range(64)]
    values = [0.0] * 64
    values[40] = 5.0
    line = make_record(make_example(words, values)).text(width=80).splitlines()[-1]
    assert "[[ word40]]" in line
    assert line.count("…") == 2
    assert len(line) <= 80


def test_pairs_show_the_query_and_what_it_looks_at() -> None:
    strings = ["The", " old", " king"]
    #          The  | The old | The  old  king
    values = [0.25, 0.0, 0.25, 0.0, 0.75, 0.125]
    example = make_example(strings, values, pairs=True)
    assert (example.query, example.key) == (2, 1)
    assert example.pattern.tolist() == [[0.25, 0, 0], [0, 0.25, 0], [0, 0.75, 0.125]]
    assert "The[ old][{ king}]" in make_record(example).text()
    page = make_record(example).html()
    assert re.search(r'The<b class="p9" title="0.75"> old</b><b class="p2 query"', page)


def test_negative_values_of_signed_units() -> None:
    example = make_example(TEXT, values_of(king=-8.0, the=4.0), group="bottom")
    record = make_record(example, signed=True)
    assert record.scale == 8.0
    assert "smallest value -8.00" in record.text()
    assert '<b class="n9 peak" title="-8"> king</b>' in record.html()


# --- HTML ---


def test_a_page_is_whole_and_runs_nothing() -> None:
    label = Label(12, HOSTILE, HOSTILE)
    hostile = make_example([HOSTILE, " b"], [3.0, 1.0])
    record = make_record(KING, hostile, labels=(label,), provenance={HOSTILE: HOSTILE})
    for page in (record.html([Section(HOSTILE, "<p>more</p>", HOSTILE)]), record._repr_html_()):
        found = Checker(page)
        assert found.open == []
        assert not {"script", "img", "link", "iframe", "a", "object"} & set(found.tags)
        assert not [
            name for name in found.attributes if name.startswith("on") or name in ("src", "href")
        ]
        assert "<script>alert(1)</script>" in found.text, "shown as text"
        for character in "\x1b\x9b\u202e":
            assert character not in page
    assert "default-src 'none'" in record.html()
    assert "\x1b[2J" not in record.text()
    assert "\u202e" not in repr(record)


def test_notebooks_get_no_style_sheet() -> None:
    page = make_record(KING)._repr_html_()
    assert "<style" not in page
    assert "class=" not in page
    assert "background-color:rgba(240,125,10,0.9)" in page


def test_pages_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [" <&wörd>"] * 128
    groups = ["top"] * 40 + ["stratum"] * 40 + ["uniform"] * 40
    examples = [
        make_example(words, rng.exponential(1.0, 128).tolist(), group=group, rank=i % 40)
        for i, group in enumerate(groups)
    ]
    labels = tuple(Label(1, HOSTILE * 100, HOSTILE * 100) for _ in range(20))
    record = make_record(*examples, labels=labels, provenance={"x": "y" * 10_000})
    assert len(record._repr_html_().encode()) <= 30_000
    path = record.to_html(tmp_path / "f.html")
    assert 40_000 < path.stat().st_size <= 60_000
    assert "are left out here" in path.read_text("utf-8")
    assert Checker(path.read_text("utf-8")).open == []
    assert len(repr(record)) < 5_000


def test_random_examples_that_are_shown_above_are_not_repeated() -> None:
    def at(start: int, group: str, rank: int = 0) -> Example:
        return replace(make_example(TEXT, values_of(king=8.0), group=group, rank=rank), start=start)

    above = [at(0, "top"), at(50, "top", 7), at(0, "stratum"), at(9, "stratum", 1)]
    some = make_record(*above, at(9, "uniform"), at(20, "uniform", 1), at(20, "weighted"))
    lines = some.text(5).splitlines()
    assert len([line for line in lines if "[ king]" in line]) == 4
    assert lines[lines.index("Random examples") + 2] == "  1 more is shown above"
    assert lines[lines.index("Random examples, larger values more often") + 1] == (
        "  all are shown above"
    )
    page = some.html()
    assert page.count("document 7") == 5
    assert "<small>of all contexts where it is active; 1 more is shown above</small>" in page
    assert "<small>all are shown above</small>" in page
    assert Checker(page).open == []
    # What is not shown for lack of room is shown in a later group.
    assert "all are" not in make_record(at(50, "top", 7), at(50, "uniform")).text(5)
    assert "larger values" not in some._repr_html_()


def test_ranges_of_values_are_named() -> None:
    example = make_example(TEXT, values_of(king=8.0), group="stratum")
    record = make_record(example, replace(example, interval=2, value=3.0, start=1), intervals=4)
    lines = record.text().splitlines()
    assert "  from 6.00 to 8.00" in lines
    assert "  from 2.00 to 4.00" in lines
    assert '<li class="range"><span></span>6.00 to 8.00</li>' in record.html()
    assert "from 6.00" not in make_record(example).text()


def test_empty_records() -> None:
    record = make_record()
    assert not record.alive
    for page in (repr(record), record._repr_html_(), record.html()):
        assert "never active" in page
    strange = make_record(make_example([""], [0.0]))
    assert strange.html()
    assert repr(strange)


def test_examples_know_their_text() -> None:
    assert KING.text == "".join(TEXT)
    assert KING.strings[6] == "↵"
    assert repr(KING) == "8.00  Once upon a[ time the[[ king]]]↵↵ said no."
