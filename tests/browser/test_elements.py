"""``docs/elements.md`` says where the elements of earlier viewers are; each address shows them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.helpers import LATENTS, expect
from tests.browser.test_accessible import settled

OpenPage = Callable[..., Any]
PROMPT = 'p?a=The+queen+went+into+the+forest%2C+and+when&t=[" she"]&d=[" he"]'
TEXT = (Path(__file__).parents[2] / "docs" / "elements.md").read_text("utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| there")
]
ADDRESSES = sorted({row[-1].strip("`| ") for row in ROWS})
PARTS = {
    "list at the head of the page": ".feature-nav select",
    "the dice": "button[aria-label^='A random one']",
    "the pencil": "[data-edit-label]",
    '"Explain by rules"': "text=Explain by rules",
    '"prompt" beside each example': "a.send",
    "the scale stands below": ".scale",
    "below these lists": "#panel-logits svg",
    '"Try again"': "text=Try again",
    "the rail": "nav.rail",
    '"MLP" and "Attention" above the table': ".settings select",
    '"copy as JSON" and "copy as Python"': "#panel-nodes [data-tool=python]",
    '"Swap A and B"': "text=Swap A and B",
    "the figures below the prompt": ".verdict dl",
    "tabs, `1` to `5`": "[role=tab] kbd",
    "the name of a row": "table.nodes tbody th a",
}
"""Where to look for what a line names, but for panels."""


def test_every_line_has_an_address() -> None:
    assert len(ROWS) > 50
    assert all(len(row) == 3 and row[-1].startswith("`#/") for row in ROWS)
    said = " ".join(row[1] for row in ROWS)
    assert not [part for part in PARTS if part not in said], "a part that no line names any more"


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_shows_what_its_lines_name(open_page: OpenPage, address: str) -> None:
    page = open_page(address.replace("/D", f"/{LATENTS}").replace("#/P", f"#/{PROMPT}"))
    page.watch.expect("status of 422")
    settled(page)
    expect(page.locator(".panel").first).to_be_visible()
    titles = [title.strip() for title in page.locator(".panel h2, .tray h2").all_inner_texts()]
    tabs = " ".join(page.locator("[role=tab]").all_inner_texts())
    for row in ROWS:
        if row[-1].strip("`| ") != address:
            continue
        for panel in re.findall(r"\*\*(.+?)\*\*", row[1]):
            assert panel in titles or panel in tabs, (panel, titles)
        for part, selector in PARTS.items():
            if part in row[1]:
                assert page.locator(selector).count() > 0, (part, selector)


def test_a_number_is_found_in_all_dictionaries(open_page: OpenPage) -> None:
    page = open_page(f"#/f/{LATENTS}/43")
    settled(page)
    page.keyboard.press("/")
    page.locator(".palette input").fill("51")
    found = page.locator("#palette-list [role=option]", has_text="number")
    expect(found).to_have_count(16)
    found.filter(has_text=LATENTS).click()
    expect(page.locator("h1")).to_contain_text("Latent 51")
