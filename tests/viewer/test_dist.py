"""The built pages: what is listed is there, light, and asks for nothing that the policy forbids."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from neuron_explainer.viewer import DIST, FILES

SOURCES = Path(__file__).parents[2] / "viewer"
needs_sources = pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the repository")


def test_the_manifest_lists_what_is_there():
    assert {path.name for path in DIST.iterdir()} == set(FILES)


def test_the_page_names_the_script_and_style_that_are_there():
    page = (DIST / "index.html").read_text("utf-8")
    for name in ("app.js", "app.css"):
        digest = hashlib.sha256((DIST / name).read_bytes()).hexdigest()[:12]
        assert f'"{name}?v={digest}"' in page


def test_the_page_has_nothing_inline_and_nothing_of_other_places():
    page = (DIST / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(re.match(r"data:|app\.(js|css)\?", address) for address in addresses)


def test_the_first_screen_weighs_at_most_60_kb():
    sent = sum(
        len(gzip.compress((DIST / n).read_bytes())) for n in ("index.html", "app.js", "app.css")
    )
    assert sent <= 60_000


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
