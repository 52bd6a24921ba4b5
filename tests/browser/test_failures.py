"""What the pages do when the server cannot: it loads, refuses, is full, or is gone."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from neuron_explainer.analysis.workspace import DATA_VARIABLE
from tests.browser.helpers import LATENTS, ask, eventually, expect
from tests.browser.running import Server

OpenPage = Callable[..., Any]
PROMPT = "#/p?a=The+queen+went+into+the+forest%2C+and+when&t=%5B%22+she%22%5D&d=%5B%22+he%22%5D"
STATE = (
    f"{PROMPT}&b=%22The+prince+went+home%2C+and+when%22&attn=pair&pos=2&k=5"
    "&iv=%5B%5B%220%2Fmlp.post_act%22%2C%22neuron%22%2C7%2Cnull%2Cnull%2C%22scale%22%2C2%5D%5D"
    "&by=%5B%22direct%22%2C%22diff%22%2C%22down%22%5D&only=L0&head=2.1&gen=%5B12%2C0.5%2C0.9%2C3%5D"
)


NODES = "table.nodes tbody tr[data-key]"
TOKEN = "a-token-that-outlives-its-server"


def go_to(page: Any, address: str) -> None:
    """Show another page of the viewer."""
    page.evaluate("(hash) => { location.hash = hash; }", address)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose limits are soon reached."""
    folder = tmp_path_factory.mktemp("small")
    flags = ("--max-tokens", "12", "--memory", "0.00001")
    with Server.start(*flags, **{DATA_VARIABLE: str(folder)}) as running:
        running.wait_for_model()
        yield running


def test_while_the_model_is_loaded_stores_are_read_and_prompts_wait(
    open_page: OpenPage, tmp_path: Path
) -> None:
    with Server.start(**{DATA_VARIABLE: str(tmp_path)}) as server:
        with server.model_held():
            page = open_page(PROMPT, at=server)
            expect(page.get_by_text("The model is being loaded")).to_be_visible()
            expect(page.locator(".status")).to_contain_text("loading the model")
            go_to(page, f"#/f/{LATENTS}/3?try=%5B%22a+king%22%5D")
            expect(page.locator(".example").first).to_be_visible()
            expect(page.locator("#panel-try")).to_contain_text("The model is being loaded")
            go_to(page, PROMPT)
            expect(page.get_by_label("Text of Prompt")).to_have_value(re.compile("The queen"))
        expect(page.locator(NODES).first).to_be_visible()
        expect(page.locator(".status")).to_contain_text("model ready")


@pytest.mark.parametrize(
    ("wrong", "status", "said", "why"),
    [
        ("&a=" + "The+queen+" * 20, 413, "That is too long", "may have 12 tokens, found 41"),
        ('&t=["no such token"]', 422, "That cannot be asked for", "no such token"),
        ("&mlp=latent", 507, "Insufficient Storage", "start the server with a larger budget"),
    ],
)
def test_each_refusal_has_a_title_and_its_reason(
    open_page: OpenPage, small: Server, wrong: str, status: int, said: str, why: str
) -> None:
    page = open_page(PROMPT, at=small)
    expect(page.locator(NODES).first).to_be_visible()
    page.watch.expect(f"status of {status}")
    go_to(page, PROMPT + wrong)
    failure = page.locator(".failure").first
    expect(failure).to_contain_text(said)
    expect(failure).to_contain_text(why)
    expect(page.get_by_label("Text of Prompt")).to_have_value(re.compile("^The queen"))
    page.go_back()
    expect(page.locator(NODES).first).to_be_visible()
    expect(failure).to_have_count(0)


def test_an_error_of_the_server_is_said(open_page: OpenPage) -> None:
    page = open_page("#/d")
    page.watch.expect("status of 500")
    # The only stub: a real server answers so if it has a bug that nobody knows of.
    body = {"title": "", "status": 500, "detail": "Because of this.", "code": "internal_error"}
    kind = "application/problem+json"
    page.route(
        "**/api/v1/debug",
        lambda given: given.fulfill(status=500, content_type=kind, body=json.dumps(body)),
    )
    go_to(page, PROMPT)
    expect(page.get_by_text("Something went wrong")).to_be_visible()
    expect(page.get_by_text("Because of this.")).to_be_visible()
    page.unroute("**/api/v1/debug")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(NODES).first).to_be_visible()


def test_a_full_queue_is_tried_again_by_itself(open_page: OpenPage, small: Server) -> None:
    page = open_page("#/d", at=small)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.watch.expect("status of 429")
    cookie = "; ".join(f"{one['name']}={one['value']}" for one in page.context.cookies())

    def tokenize() -> int:
        headers = {"Content-Type": "application/json", "Cookie": cookie, "Origin": small.origin}
        address = f"{small.origin}/api/v1/tokenize"
        with urlopen(Request(address, b'{"text": "a"}', headers), timeout=60) as reply:
            return int(reply.status)

    for _ in range(16):  # the server says for how long to wait by how long the last requests took
        assert tokenize() == 200
    with ThreadPoolExecutor(9) as pool:
        with small.model_held():
            waiting = [pool.submit(tokenize) for _ in range(9)]
            eventually(lambda: ask(page, small, "health")["queue_depth"] == 9, "a full queue")
            go_to(page, PROMPT)
            expect(page.get_by_text("The queue is full")).to_be_visible()
            expect(page.get_by_text(re.compile(r"by itself in \d+ s"))).to_be_visible()
            expect(page.get_by_role("button", name="Try again")).to_be_visible()
        assert [each.result() for each in waiting] == [200] * 9
    expect(page.locator(NODES).first).to_be_visible()


def test_a_model_that_dies_comes_back_and_answers(open_page: OpenPage, small: Server) -> None:
    page = open_page("#/d", at=small)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.watch.expect("status of 503")
    with small.model_held() as process:
        go_to(page, PROMPT)
        eventually(lambda: ask(page, small, "health")["queue_depth"] == 1, "a request")
        os.kill(process, signal.SIGKILL)
        expect(page.locator(".failure")).to_contain_text("model's process ended")
        expect(page.get_by_text(re.compile(r"by itself in \d s"))).to_be_visible()
    expect(page.locator(NODES).first).to_be_visible()
    expect(page.locator(".failure")).to_have_count(0)


def test_a_server_that_dies_amid_a_request_is_said_and_nothing_is_lost(
    open_page: OpenPage, tmp_path: Path
) -> None:
    flags, data = ("--token", TOKEN), {DATA_VARIABLE: str(tmp_path)}
    with Server.start(*flags, **data) as server:
        server.wait_for_model()
        page = open_page(STATE, at=server)
        expect(page.locator(NODES).first).to_be_visible()
        page.watch.expect("ERR_CONNECTION_RE|ERR_EMPTY_RESPONSE|Failed to fetch|status of 503")
        with server.model_held():
            page.get_by_label("Text of Prompt A").fill("The king went home, and when")
            page.keyboard.press("Control+Enter")
            address = page.evaluate("location.hash")
            eventually(lambda: ask(page, server, "health")["queue_depth"] == 1, "a request")
            page.get_by_label("Text of Prompt B").fill("typed, and not run yet")
            server.kill()
        banner = page.locator(".banner")
        expect(banner).to_contain_text("The server does not answer")
        expect(page.locator(".status")).to_contain_text("no connection")
        expect(page.locator(".prompt-page .failure").first).to_be_visible()
        assert page.evaluate("location.hash") == address
        expect(page.get_by_label("Text of Prompt B")).to_have_value("typed, and not run yet")
        banner.get_by_role("button", name="Try again").click()
        page.locator(".prompt-page .failure").get_by_role("button", name="Try again").click()
        expect(page.locator(".prompt-page .failure").first).to_be_visible()
    # Once there is a server again, what has failed is asked for again by itself.
    with Server.start(*flags, "--port", str(urlsplit(server.url).port), **data):
        expect(banner).to_have_count(0)
        expect(page.locator(NODES).first).to_be_visible()
        expect(page.locator(".failure")).to_have_count(0)
        expect(page.get_by_label("Text of Prompt A")).to_have_value("The king went home, and when")
        expect(page.get_by_label("Text of Prompt B")).to_have_value("typed, and not run yet")
        assert page.evaluate("location.hash") == address


def test_a_page_comes_back_by_itself_with_its_server(open_page: OpenPage, tmp_path: Path) -> None:
    flags, data = ("--no-model", "--token", TOKEN), {DATA_VARIABLE: str(tmp_path)}
    with Server.start(*flags, **data) as server:
        page = open_page(f"#/f/{LATENTS}/3?width=8", at=server)
        expect(page.locator(".example").first).to_be_visible()
        page.watch.expect("ERR_CONNECTION_RE|Failed to fetch")
        server.kill()
        page.get_by_label("Number", exact=True).fill("40")
        page.keyboard.press("Enter")
        expect(page.locator(".page .failure")).to_contain_text("The server does not answer")
        expect(page.locator(".banner")).to_be_visible()
    with Server.start(*flags, "--port", str(urlsplit(server.url).port), **data):
        expect(page.locator("h1")).to_have_text(re.compile(r"^Latent 40(\D|$)"))
        expect(page.locator(".failure")).to_have_count(0)
        assert page.url.endswith(f"#/f/{LATENTS}/40?width=8")


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
