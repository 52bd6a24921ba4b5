"""The benchmark of the pages measures what it says: a small run, no time is judged."""

from typing import Any

from benchmarks import viewer_pages
from benchmarks.viewer_pages import TINY, Rows, opened
from tests.browser.running import Server


def figures(rows: Rows) -> dict[str, float]:
    cells = [line.strip("|").split(" | ") for line in rows.lines]
    return {cell[0].strip(): float(cell[1].replace(",", "")) for cell in cells}


def test_a_step_ends_when_the_next_card_is_there(browser: Any, server: Server) -> None:
    with opened(browser, server, f"#/f/{TINY}/16") as page:
        page.evaluate("bench.painted(bench.card)")
        assert 0 < viewer_pages._step(page) < 10_000
        assert page.evaluate("bench.title()").startswith("Latent 17")


def test_weights_and_ablations(browser: Any, server: Server) -> None:
    rows = Rows()
    viewer_pages._weight(rows, browser, server)
    viewer_pages._ablation(rows, browser, server, 1)
    found = figures(rows)
    first, every = (found[f"{what} as transferred, kB"] for what in ("first screen", "all pages"))
    assert 20 < first <= 60
    assert first + 10 < every <= 120
    assert found["requests to other hosts"] == 0
    assert found["ablate by key → table painted, tiny-tales, ms"] > 0
