"""What the pages do when the server cannot: it loads, refuses, is full, or is gone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer.analysis.workspace import DATA_VARIABLE
from tests.browser.helpers import expect
from tests.browser.running import Server

OpenPage = Callable[..., Any]
PROMPT = "#/p?a=The+queen+went+into+the+forest%2C+and+when&t=%5B%22+she%22%5D&d=%5B%22+he%22%5D"
STATE = (
    f"{PROMPT}&b=%22The+prince+went+home%2C+and+when%22&attn=pair&pos=2&k=5"
    "&iv=%5B%5B%220%2Fmlp.post_act%22%2C%22neuron%22%2C7%2Cnull%2Cnull%2C%22scale%22%2C2%5D%5D"
    "&by=%5B%22direct%22%2C%22diff%22%2C%22down%22%5D&only=L0&head=2.1&gen=%5B12%2C0.5%2C0.9%2C3%5D"
)


def answered(page: Any, route: str, status: int, **problem: Any) -> list[int]:
    """Answer a route with a problem; the list grows by one at each request."""
    asked: list[int] = []

    def fulfil(given: Any) -> None:
        asked.append(1)
        body = {"title": "", "status": status, "detail": "Because of this.", **problem}
        given.fulfill(status=status, content_type="application/problem+json", body=json.dumps(body))

    page.route(f"**/api/v1/{route}", fulfil)
    page.watch.expect(f"status of {status}")
    return asked


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (503, "model_loading", "The model is being loaded"),
        (413, "too_many_tokens", "That is too long"),
        (422, "not_one_token", "That cannot be asked for"),
        (507, "dictionary_budget", "Because of this."),
        (500, "internal_error", "Something went wrong"),
    ],
)
def test_each_refusal_has_a_title_and_its_reason(
    open_page: OpenPage, status: int, code: str, said: str
) -> None:
    page = open_page("#/d")
    answered(page, "debug", status, code=code)
    page.evaluate("(hash) => { location.hash = hash; }", PROMPT)
    expect(page.get_by_text(said).first).to_be_visible()
    expect(page.get_by_text("Because of this.").first).to_be_visible()
    expect(page.get_by_label("Text of Prompt")).to_have_value(re.compile("The queen"))


def test_a_full_queue_is_tried_again_by_itself(open_page: OpenPage) -> None:
    page = open_page("#/d")
    asked = answered(page, "debug", 429, code="queue_full", retry_after=2)
    page.evaluate("(hash) => { location.hash = hash; }", PROMPT)
    expect(page.get_by_text("The queue is full")).to_be_visible()
    expect(page.get_by_text(re.compile(r"by itself in \d s"))).to_be_visible()
    page.unroute("**/api/v1/debug")
    expect(page.locator("table.nodes")).to_be_visible()
    assert len(asked) == 1


def test_a_server_that_dies_is_said_and_nothing_is_lost(
    open_page: OpenPage, tmp_path: Path
) -> None:
    with Server.start("--no-model", **{DATA_VARIABLE: str(tmp_path)}) as server:
        page = open_page("#/f/ae-resid-delta-mlp.2/3?width=8", at=server)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        page.watch.expect("ERR_CONNECTION_REFUSED|Failed to fetch")
        server.kill()
        page.get_by_label("Number", exact=True).fill("40")
        page.keyboard.press("Enter")
        expect(page.get_by_text("The server does not answer").first).to_be_visible()
        expect(page.get_by_role("button", name="Try again").first).to_be_visible()
        assert page.url.endswith("#/f/ae-resid-delta-mlp.2/40?width=8")


def test_a_link_restores_everything_to_the_byte(open_page: OpenPage) -> None:
    page = open_page(STATE)
    expect(page.locator("table.nodes")).to_be_visible()
    before = page.evaluate("location.hash")
    shown = page.inner_text(".prompt-page")
    assert before == STATE
    page.reload()
    expect(page.locator("table.nodes")).to_be_visible()
    assert page.evaluate("location.hash") == before
    assert page.inner_text(".prompt-page") == shown
    expect(page.get_by_label("Text of Prompt B")).to_have_value("The prince went home, and when")
    expect(page.get_by_label("Value for L0 neuron 7")).to_have_value("2")
    expect(page.locator("table.nodes")).to_have_attribute("data-sort", "direct.diff.down")
    page.keyboard.press("5")
    expect(page.get_by_label("Temperature")).to_have_value("0.5")
    page.go_back()
    assert page.evaluate("location.hash") == before


def test_a_state_too_long_for_an_address_is_kept_by_the_server(open_page: OpenPage) -> None:
    page = open_page(PROMPT)
    text = page.get_by_label("Text of Prompt")
    long = "The queen went home. " * 40
    text.fill(long + "\u00e9" * 700)
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile(r"#/p\?s=[0-9a-f]{32}$"))
    page.watch.expect("status of 413")
    page.reload()
    expect(text).to_have_value(re.compile("^" + long))
