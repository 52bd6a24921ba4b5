"""The built pages: what is listed is there, light, and asks for nothing that the policy forbids."""

import gzip
import json
import re
from pathlib import Path

import pytest

from neuron_explainer.viewer import DIST, FILES

FIRST = ("index.html", "app.js", "chunk.js", "app.css")
SOURCES = Path(__file__).parents[2] / "viewer"
needs_sources = pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the repository")


def test_the_manifest_lists_what_is_there():
    assert {path.name for path in DIST.iterdir()} == set(FILES)


def test_all_parts_are_asked_for_in_one_version():
    parts = {name: (DIST / name).read_text("utf-8") for name in FILES}
    asked = [
        found
        for text in parts.values()
        for found in re.findall(r'"(?:\./)?(\w+\.(?:js|css))\?v=(\w+)"', text)
    ]
    assert {name for name, _ in asked} == {"app.js", "chunk.js", "more.js", "app.css"}
    assert len({version for _, version in asked}) == 1
    assert not re.search(r'"\./(chunk|more)\.js"', "".join(parts.values()))


def test_the_page_has_nothing_inline_and_nothing_of_other_places():
    page = (DIST / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(re.match(r"data:|(app|chunk)\.(js|css)\?", address) for address in addresses)


def test_the_first_screen_weighs_at_most_60_kb():
    sent = sum(len(gzip.compress((DIST / n).read_bytes())) for n in FIRST)
    assert sent <= 60_000
    assert sent + len(gzip.compress((DIST / "more.js").read_bytes())) <= 120_000


@needs_sources
def test_sources_never_write_html():
    for path in (SOURCES / "src").rglob("*.js*"):
        text = path.read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text
        ), path


@needs_sources
def test_few_packages_are_needed_to_build():
    packages = json.loads((SOURCES / "package-lock.json").read_text("utf-8"))["packages"]
    assert len(packages) - 1 <= 60
    shipped = [name for name, one in packages.items() if name and not one.get("dev")]
    assert len(shipped) <= 3
