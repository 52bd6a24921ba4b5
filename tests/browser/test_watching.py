"""The watch over a page sees what it is there for; else every other test here would be worth little."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.running import Watch, watched


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    yield watched(context.new_page(), Watch())
    context.close()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("console.error('too bad')", "console: too bad"),
        ("setTimeout(() => { throw new Error('thrown') })", "error: thrown"),
    ],
)
def test_an_error_of_a_page_fails_its_test_unless_it_is_expected(
    page: Any, script: str, said: str
) -> None:
    page.set_content(f"<p>hello<script>{script}</script>")
    page.wait_for_timeout(50)
    with pytest.raises(AssertionError, match=said):
        page.watch.check()
    page.watch.expect(said)
    page.watch.check()


@pytest.mark.parametrize("host", ["example.com", "192.0.2.1"])
def test_nothing_but_the_loopback_interface_is_reached(page: Any, host: str) -> None:
    page.set_content(f"<img src='http://{host}/x.png' onerror='this.alt=1'>")
    page.wait_for_selector("img[alt='1']")
    page.watch.expect("ERR_NAME_NOT_RESOLVED")
    with pytest.raises(AssertionError, match=host):
        page.watch.check()
