"""What tests of the pages read and wait for."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neuron_explainer.analysis.store import ExampleStore
from tests.browser.running import Server

STORES = Path(__file__).parents[2] / "neuron_explainer/assets/tiny-tales/stores"
LATENTS = "ae-resid-delta-mlp.2"
"""The dictionary that most tests look at."""


def open_store(name: str = LATENTS) -> ExampleStore:
    """A shipped store, as the library opens it."""
    return ExampleStore.open(STORES / f"{name}.store")


def ask(page: Any, server: Server, path: str, **body: Any) -> Any:
    """The reply of a route below ``/api/v1/``, asked as the page asks; a POST if there is a body."""
    address = f"{server.origin}/api/v1/{path}"
    headers = {"Origin": server.origin, "Content-Type": "application/json"}
    reply = (
        page.request.post(address, data=body, headers=headers)
        if body
        else page.request.get(address)
    )
    assert reply.ok, f"{path}: {reply.status} {reply.text()}"
    return reply.json()


WAIT_MS = 15_000  # a busy machine is slow
"""How long a page may take for anything."""


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait."""
    from playwright.sync_api import expect as of_playwright

    of_playwright.set_options(timeout=WAIT_MS)
    return of_playwright(locator)


def eventually(holds: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until something holds that no locator shows."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


def numbers(page: Any, selector: str, attribute: str = "data-value") -> list[float]:
    """An attribute of all elements that fit, as numbers."""
    found = page.eval_on_selector_all(
        selector, "(all, name) => all.map((one) => one.getAttribute(name))", attribute
    )
    return [float(value) for value in found]
