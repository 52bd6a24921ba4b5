"""Exported pages and the notebook's widget: the same data, safe in HTML, small, and written whole."""

import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest

from neuron_explainer import cli
from neuron_explainer.analysis.directions import Directions
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.cli.inspecting import opened
from neuron_explainer.errors import InputError
from neuron_explainer.viewer import export
from neuron_explainer.viewer.widget import feature_widget
from tests.server.stores import make_stores

NAME = "tiny-tales/ae-resid-delta-mlp/2"
HOSTILE = '</script><script>alert(1)</script><!-- \u2028 & "'


@pytest.fixture(scope="module")
def store():
    with ExampleStore.open(NAME) as found:
        yield found


def data_of(page):
    """The data of a page, found as a browser finds them: up to the first end of the element."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_a_page_holds_the_record(store):
    record = store[17]
    page = export.page_of_unit(store, 17)
    card = data_of(page)["card"]
    assert (card["unit"], card["kind"]) == (17, "latent")
    assert card["stats"]["max"] == pytest.approx(record.statistics.max, rel=1e-5)
    assert [each["ids"] for each in card["examples"]] == [
        each.tokens.tolist() for each in record.all_examples
    ]
    first = card["examples"][0]
    values = np.zeros(len(first["ids"]))
    for at, value in first["acts"]:
        values[at] = value
    assert values == pytest.approx(record.all_examples[0].activations, rel=1e-3)
    assert len(page.encode()) <= export.LARGEST_PAGE


def test_what_is_promoted_is_on_the_page(store, tiny_tales):
    model, autoencoder = tiny_tales
    found = Directions(model, autoencoder).top_logits(17)
    logits = data_of(export.page_of_unit(store, 17, logits=found))["logits"]
    assert [each["id"] for each in logits["top"]] == [each.token for each in found.top]
    assert logits["histogram"]["counts"] == list(found.counts)
    assert {str(each.token) for each in (*found.top, *found.bottom)} == set(logits["vocab"])


@pytest.fixture(scope="module")
def tiny_tales(store):
    return opened(store, None, None, None)


def test_only_the_scripts_of_a_page_may_run(store):
    page = export.page_of_unit(store, 17)
    head = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert head is not None
    policy = html.unescape(head[1])
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    inline = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(inline) == 1
    digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_hostile_labels_stay_text(store, tmp_path, monkeypatch):
    monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(tmp_path))
    with ExampleStore.open(NAME) as mine:
        mine.workspace.set_label(17, HOSTILE)
        pages = [export.page_of_unit(mine, 17)]
        folder = export.write_site(mine, tmp_path / "site", [17])
    pages += [(folder / name).read_text("utf-8") for name in ("17.html", "index.html")]
    for page in pages:
        assert "alert(1)</script>" not in page
        assert "\u2028" not in page
        assert HOSTILE in json.dumps(data_of(page), ensure_ascii=False).replace('\\"', '"')


def test_long_examples_are_cut_around_their_peaks(store):
    data = export.unit_data(store, store[17])
    cut = export._cut(data, 4)
    for before, after in zip(data["card"]["examples"], cut["card"]["examples"], strict=True):
        assert len(after["ids"]) <= 4 + 1 + 2
        assert after["ids"][after["peak"]] == before["ids"][before["peak"]]
        assert (
            dict(map(tuple, after["acts"]))[after["peak"]]
            == dict(map(tuple, before["acts"]))[before["peak"]]
        )
        assert after["start"] - before["start"] == before["peak"] - after["peak"]
        assert set(map(str, after["ids"])) <= set(cut["card"]["vocab"])


def test_a_site_links_only_to_what_it_holds(store, tmp_path):
    units = store.alive[:4].tolist()
    folder = export.write_site(store, tmp_path / "site", units)
    rows = data_of((folder / "index.html").read_text("utf-8"))["index"]["rows"]
    assert [row[0] for row in rows] == units
    for unit in units:
        page = (folder / f"{unit}.html").read_text("utf-8")
        links = data_of(page)["links"]
        assert links["index"] == "index.html"
        assert all((folder / name).is_file() for name in links.values())
    assert "1.html" in data_of((folder / f"{units[0]}.html").read_text("utf-8"))["links"].values()
    assert {"embed.js", "embed.css"} <= {path.name for path in folder.iterdir()}


def test_a_site_is_not_written_over_something_else(store, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export.write_site(store, tmp_path, [17])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_verb_writes_both_forms(tmp_path, capsys):
    path = tmp_path / "17.html"
    assert cli.main(["export", NAME, "17", "--out", str(path), "--no-model"]) == 0
    assert "tokens that units promote are left out: --no-model" in capsys.readouterr().out
    assert data_of(path.read_text("utf-8"))["card"]["unit"] == 17
    folder = tmp_path / "site"
    command = ["export", NAME, "0-2", "--out", str(folder), "--no-model", "--json"]
    assert cli.main(command) == 0
    said, shown = capsys.readouterr()
    assert json.loads(said)["units"] == 3
    assert not shown
    assert cli.main(command[:-1]) == 0  # what is there is the same
    assert "writing: 100% 3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("units", "out", "message"),
    [("0-2", "a.html", "holds one unit"), ("99999", "site", "there are 0 to 2559")],
)
def test_the_verb_says_what_is_wrong(tmp_path, capsys, units, out, message):
    assert cli.main(["export", NAME, units, "--out", str(tmp_path / out), "--no-model"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_heads_have_pages_too(tmp_path):
    with ExampleStore.open(make_stores(tmp_path), "heads") as heads:
        page = export.page_of_unit(heads, int(heads.alive[0]))
    examples = data_of(page)["card"]["examples"]
    assert examples
    assert all(each["pairs"] for each in examples)


def test_the_widget_follows_its_unit(store):
    found = feature_widget(store, 17)
    assert found.data["card"]["unit"] == 17
    found.unit = 20
    assert found.data["card"]["unit"] == 20
    assert "export default" in found._esm
    found.close()
