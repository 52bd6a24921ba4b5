"""The viewer's files are those of its folder, read once."""

import gzip
from pathlib import Path

import pytest
from fastapi import FastAPI

from neuron_explainer.errors import SourceError
from neuron_explainer.server.pages import DIST, pages_router, read_pages
from tests.server.clients import app_with, client_of


def test_the_built_files_are_served() -> None:
    client = client_of(app_with(["tiny-tales/ae-resid-delta-mlp/2"]), None)
    for path in DIST.iterdir():
        reply = client.get(f"/{path.name}")
        assert reply.status_code == 200
        assert reply.content == path.read_bytes()
        tag = {"If-None-Match": reply.headers["etag"]}
        assert client.get(f"/{path.name}", headers=tag).status_code == 304
    page = client.get("/")
    assert page.content == (DIST / "index.html").read_bytes()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    plain = client.get("/", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert client.get("/app.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_a_request_opens_no_file(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("one")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.css").write_text("two" * 1000)
    pages = read_pages(tmp_path)
    assert set(pages) == {"/", "/index.html", "/deep/a.css"}
    app = FastAPI()
    app.include_router(pages_router(pages))
    (tmp_path / "index.html").unlink()
    (tmp_path / "new.js").write_text("three")
    client = client_of(app)
    assert client.get("/").text == "one"
    reply = client.get("/deep/a.css")
    assert reply.text == "two" * 1000
    assert len(gzip.compress(reply.content, 9)) >= int(reply.headers["content-length"]) - 20
    for path in ("/new.js", "/deep/../index.htm", "/%2e%2e/x", "/setup.py"):
        assert client.get(path).status_code == 404


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "dist" / "a.js").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="symbolic link"):
        read_pages(tmp_path / "dist")


def test_without_built_files_there_is_a_page_that_says_so(tmp_path: Path) -> None:
    assert b"npm run build" in read_pages(tmp_path / "none")["/"].content
