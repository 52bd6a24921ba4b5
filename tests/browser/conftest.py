"""One server and one browser for all tests of the pages.

The server is the command that a user types, on a free port of the loopback interface, with the shipped model
and stores. The browser is Chromium: the one that ``NEURON_EXPLAINER_CHROMIUM`` names, or one that the system
has. It reaches nothing but the loopback interface. A test fails if its page asks for anything else, throws
an error or logs one.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer.analysis.workspace import DATA_VARIABLE
from tests.browser.helpers import WAIT_MS
from tests.browser.running import NoBrowser, Server, Watch, chromium, watched
from tests.server.factor_files import write_factors

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, so that they run only when they are asked for."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; a skip where there is none."""
    with contextlib.ExitStack() as stack:
        try:
            launched = stack.enter_context(chromium())
        except NoBrowser as error:
            pytest.skip(str(error))
        yield launched


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``neuron-explainer serve`` with the shipped model and stores, and factors.

    Labels, bookmarks and sessions go to a folder of their own.
    """
    folder = tmp_path_factory.mktemp("server")
    factors = write_factors(folder / "tales")
    with Server.start("--factors", str(factors), **{DATA_VARIABLE: str(folder)}) as running:
        running.wait_for_model()
        yield running


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """A function that opens a route of the viewer, such as ``#/p``, in a browser context of its own.

    Its settings are those of Playwright's ``new_context``, such as ``color_scheme="dark"``. What a test
    expects to go wrong, it says to ``page.watch.expect``.
    """
    contexts = []

    def open_at(route: str = "", at: Server | None = None, **settings: Any) -> Any:
        settings = {"viewport": {"width": 1440, "height": 900}, **settings}
        context = browser.new_context(**settings)
        context.set_default_timeout(WAIT_MS)
        watch = Watch()
        contexts.append((context, watch))
        page = watched(context.new_page(), watch)
        page.goto((at or server).url_of(route))
        return page

    yield open_at
    for context, _ in contexts:
        context.close()
    for _, watch in contexts:
        watch.check()
