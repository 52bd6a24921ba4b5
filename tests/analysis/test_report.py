"""The report: one file that needs nothing else, shows every number, and runs nothing it is given."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from neuron_explainer.analysis.report import collect_curves, read_log, write_report
from neuron_explainer.errors import MissingExtraError, SourceError
from neuron_explainer.evaluation.evaluate import measure
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.models.autoencoder import Autoencoder

NASTY = '<script>alert("1")</script> & $x_{1$ _name'


def dictionary(**kwargs: Any) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(30, 6, location="3/mlp.post_act", **kwargs).requires_grad_(False)


def log_lines() -> list[dict[str, Any]]:
    return [
        {
            "step": i,
            "tokens": 512 * i,
            "seconds": 0.5 * i,
            "note": "text",
            "dictionaries": {
                NASTY: {"fvu": 1 / i, "l0": 10.0, "flag": True},
                "b": {"fvu": 2 / i, "dead": i, "lr": float("nan")},
            },
        }
        for i in range(1, 5)
    ]


class Page(HTMLParser):
    """Tags, images and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[str]:
        prefix = "data:image/svg+xml;base64,"
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix)).decode() for source in sources]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    pytest.importorskip("matplotlib")
    tmp_path = tmp_path_factory.mktemp("report")
    autoencoder = dictionary()
    evaluation = measure(autoencoder, [torch.randn(100, 6)], compat="openai")
    write_report(
        tmp_path / "report.html",
        title=f"Run {NASTY}",
        log=log_lines(),
        autoencoders={NASTY: autoencoder},
        evaluations={NASTY: evaluation},
        settings={"path": NASTY, "lr": 3e-4, "steps": 10_000, "tied": False, "none": None},
    )
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    cells = re.split(r"\n+", page.text)
    assert any(f"fvu{evaluation.fvu:.6g}" in cell for cell in cells)
    value = evaluation.compat["openai"]["normalized_L1_loss"]
    assert any(f"openai/normalized_L1_loss{value:.6g}" in cell for cell in cells)
    return page


def test_words_are_escaped(page: Page) -> None:
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(NASTY) == 7  # title twice, setting, column, legend, two headings
    assert not any("script" in svg or "alert" in svg for svg in page.pictures)


def test_it_needs_nothing_from_outside(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "a")
        assert "href" not in attrs
        assert (attrs.get("src") or "data:").startswith("data:")
    for svg in page.pictures:
        for element in ElementTree.fromstring(svg).iter():
            links = [v for k, v in element.attrib.items() if k.endswith("href")]
            assert all(link.startswith("#") for link in links)
            assert element.tag.rpartition("}")[2] not in ("image", "script", "foreignObject")


def test_every_number_has_its_picture(page: Page) -> None:
    captions = [attrs["alt"] or "" for tag, attrs in page.tags if tag == "img"]
    assert captions[:4] == [f"{f}, over tokens" for f in ("seconds", "fvu", "l0", "dead")]
    assert captions[4].startswith("Latents by the share of 100 tokens on which they fire")
    assert [caption.split()[0] for caption in captions[5:]] == ["Length", "Cosine", "Cosine"]
    assert "10,000" in page.text
    assert "0.0003" in page.text


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        write_report(tmp_path / name, log=log_lines()[:2], settings={"n": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_curves_take_whatever_numbers_there_are() -> None:
    curves = collect_curves(log_lines())
    assert list(curves) == ["seconds", "fvu", "l0", "dead"]
    assert curves["fvu"]["b"] == [(512.0 * i, 2 / i) for i in range(1, 5)]
    assert curves["seconds"] == {"": [(512.0 * i, 0.5 * i) for i in range(1, 5)]}
    assert collect_curves([{"loss": 2}, {"loss": 1.5}]) == {"loss": {"": [(0, 2), (1, 1.5)]}}
    assert collect_curves([{"step": 5, "loss": 2}, {"loss": 1}])["loss"][""] == [(0, 2), (1, 1)]
    assert collect_curves([{"step": 3, "loss": 2}])["loss"][""] == [(3, 2)]
    assert collect_curves([]) == {}


def test_a_log_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(line) for line in log_lines()]
    path.write_text("\n".join([*lines, "[1]", lines[0][:20]]))
    assert len(read_log(path)) == 4
    with pytest.raises(SourceError, match="the log cannot be read"):
        read_log(tmp_path / "none")


def test_nothing_given_is_a_page_without_sections(tmp_path: Path) -> None:
    write_report(tmp_path / "empty.html")
    assert not Page((tmp_path / "empty.html").read_text("utf-8")).pictures


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="pip install matplotlib"):
        write_report(tmp_path / "report.html", log=log_lines())
    assert not list(tmp_path.iterdir())


def test_geometry_by_hand() -> None:
    autoencoder = Autoencoder(4, 2)
    with torch.no_grad():
        autoencoder.decoder.weight.copy_(torch.tensor([[3.0, 0, 0, 1], [4.0, 2, 0, 0]]))
        autoencoder.encoder.weight.copy_(torch.tensor([[3.0, 4], [1, 0], [1, 1], [-1, 0]]))
    found = WeightGeometry.of(autoencoder)
    assert found.decoder_norm.tolist() == pytest.approx([5, 2, 1])  # the third has none
    assert found.encoder_decoder_cosine is not None
    assert found.encoder_decoder_cosine.tolist() == pytest.approx([1, 0, -1])
    assert found.nearest_cosine.tolist() == pytest.approx([0.8, 0.8, 0.6])
    assert found.sample_note(4) == ""
    some = WeightGeometry.of(dictionary(), sample=7)
    assert some.sample_note(30) == " (7 of 30 latents)"
    everything = WeightGeometry.of(dictionary()).nearest_cosine
    apart = (some.nearest_cosine[:, None] - everything).abs().amin(dim=1)
    assert float(apart.max()) < 1e-6  # each is one of them, whatever the product's shape rounds to
    transcoder = dictionary(n_outputs=4)
    assert WeightGeometry.of(transcoder).encoder_decoder_cosine is None
