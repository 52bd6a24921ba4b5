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
import torch.nn.functional as F

from neuron_explainer.analysis.report import Reported, collect_curves, read_log, write_report
from neuron_explainer.errors import MissingExtraError, SourceError
from neuron_explainer.evaluation.evaluate import measure
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import StandardModelContext
from neuron_explainer.models.transformer import Transformer

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
            "note_rate": 3.0 * i,
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
    path = tmp_path_factory.mktemp("report") / "report.html"
    autoencoder = dictionary()
    evaluation = measure(autoencoder, [torch.randn(100, 6)], compat="openai")
    settings = {"path": NASTY, "lr": 3e-4, "steps": 10_000, "tied": False, "none": None}
    write_report(
        path,
        {NASTY: Reported(autoencoder, evaluation, 8.0, settings)},
        title=f"Run {NASTY}",
        measured_on=f"100 tokens of {NASTY}",
        log=log_lines(),
        settings={"harvest": {"source": "/home/someone/books"}},
    )
    page = Page(path.read_text("utf-8"))
    cells = re.split(r"\n+", page.text)
    assert any(f"fvu{evaluation.fvu:.6g}" in cell for cell in cells)
    value = evaluation.compat["openai"]["normalized_L1_loss"]
    assert any(f"openai/normalized_L1_loss{value:.6g}" in cell for cell in cells)
    return page


def test_words_are_escaped(page: Page) -> None:
    assert "script" not in {tag for tag, _ in page.tags}
    # Title twice, what was measured, two headings, legend, two columns, three heads of tables.
    assert page.text.count(NASTY) == 10
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


def test_the_verdict_comes_first_and_settings_are_folded(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.index("li") < tags.index("table") < tags.index("img") < tags.index("details")
    assert page.text.index("explain") < page.text.index("FVU: fraction of variance unexplained")
    folded = page.text[page.text.index("Settings") :]
    assert "10,000" in folded
    assert "0.0003" in folded
    assert "books" in folded
    assert "someone" not in page.text  # a path tells who trained


def test_what_is_drawn(page: Page) -> None:
    captions = [attrs["alt"] or "" for tag, attrs in page.tags if tag == "img"]
    assert captions[:3] == ["FVU in training", "dead latents in training", "note_rate in training"]
    assert captions[3].startswith("How often latents fire; ")
    assert [caption.split()[0] for caption in captions[4:]] == ["Length", "Cosine", "Cosine"]
    assert "Did not change: l0 (10)." in page.text
    labels = {"FVU", "dead latents", "tokens trained on", "latents"}
    for label in labels:  # matplotlib names each text in a comment
        assert any(f"<!-- {label} -->" in svg for svg in page.pictures), label


def test_rounding_is_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    autoencoder = dictionary()
    with torch.no_grad():
        autoencoder.decoder.weight.copy_(F.normalize(autoencoder.decoder.weight, dim=0))
    write_report(tmp_path / "report.html", {"a": Reported(autoencoder)})
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "The length of decoder directions is the same for all: 1." in page.text
    assert len(page.pictures) == 2


def test_strongest_latents_and_the_tokens_they_promote(
    text_model: Transformer, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    text_model.save(tmp_path / "model")
    context = StandardModelContext(str(tmp_path / "model"), device="cpu")
    width = text_model.cfg.d_model
    torch.manual_seed(0)
    autoencoder = Autoencoder(30, width, location="1/resid.torso.delta_mlp")
    unembedding = text_model.final_ln.weight[:, None] * text_model.unembed.weight.t()
    autoencoder.requires_grad_(False)
    autoencoder.decoder.weight[:, 7] = 50 * unembedding[:, ord("q")].detach()
    evaluation = measure(autoencoder, [torch.randn(100, width)])
    write_report(tmp_path / "r.html", {"a": Reported(autoencoder, evaluation)}, context=context)
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    table = page.text[page.text.index("share of output") :]
    first = next(line for line in table.splitlines() if line.startswith("7"))
    assert f"{float(evaluation.frequency[7]):.2%}" in first
    assert first.split("%")[2].split()[0] == "q"  # behind two shares in percent
    autoencoder.location = ActivationLocation("resid.torso.post_ln_mlp", 1)
    write_report(tmp_path / "r.html", {"a": Reported(autoencoder, evaluation)}, context=context)
    assert "promotes" not in (tmp_path / "r.html").read_text("utf-8")  # not of the residual stream


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        write_report(tmp_path / name, log=log_lines()[:2], settings={"n": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_curves_take_whatever_numbers_there_are() -> None:
    curves = collect_curves(log_lines())
    assert list(curves) == ["seconds", "note_rate", "fvu", "l0", "dead"]
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
