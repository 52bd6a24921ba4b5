"""The pages of dictionaries, the search, labels, bookmarks and the compare tray."""

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.helpers import LATENTS, eventually, expect, numbers, open_store
from tests.browser.running import Server

OpenPage = Callable[..., Any]
TABLE = f"#/d/{LATENTS}"
ROWS = ".vbody .vrow"


def units(page: Any) -> list[int]:
    """The numbers of the rows that are in the page, from the top."""
    rows = page.eval_on_selector_all(
        f"{ROWS}:has(a)",
        "all => all.map(r => [+r.ariaRowIndex, +r.querySelector('a').textContent])",
    )
    return [unit for _, unit in sorted(rows)]


def test_the_table_is_sorted_as_the_library_sorts(open_page: OpenPage) -> None:
    store = open_store()
    page = open_page(TABLE)
    page.wait_for_selector(f"{ROWS} a")
    expected = store.sort("density", among=store.alive, limit=12).tolist()
    assert units(page)[:12] == expected
    page.get_by_role("button", name="largest").click()
    expected = store.sort("max", among=store.alive, limit=12).tolist()
    eventually(lambda: units(page)[:12] == expected, "sorted by the largest value")
    expect(page.get_by_role("columnheader", name="largest")).to_have_attribute(
        "aria-sort", "descending"
    )
    page.get_by_role("button", name="largest").click()
    expected = store.sort("max", descending=False, among=store.alive, limit=12).tolist()
    eventually(lambda: units(page)[:12] == expected, "the other way round")


def test_each_row_is_one_line(open_page: OpenPage) -> None:
    page = open_page(TABLE)
    page.set_viewport_size({"width": 1280, "height": 850})
    page.wait_for_selector(f"{ROWS} .peek")
    heights = page.eval_on_selector_all(f"{ROWS} .peek", "all => all.map(e => e.offsetHeight)")
    assert len(heights) > 5
    assert max(heights) <= 30


def test_the_last_rows_are_reached_without_those_between(open_page: OpenPage) -> None:
    store = open_store()
    page = open_page(f"{TABLE}?sort=unit&order=asc")
    page.wait_for_selector(f"{ROWS} a")
    page.watch.requests.clear()
    page.eval_on_selector(".vbody", "box => box.scrollTop = box.scrollHeight")
    last = int(store.alive[-1])
    eventually(lambda: units(page)[-1:] == [last], "the last row")
    assert len([r for r in page.watch.requests if r.endswith("/features")]) <= 2
    assert page.locator(ROWS).count() < 60


def test_bars_of_the_density_narrow_the_table(open_page: OpenPage) -> None:
    store = open_store()
    page = open_page(TABLE)
    bars = page.locator("#panel-density [data-bin]")
    expect(bars.first).to_be_visible()
    counts = numbers(page, "#panel-density [data-bin]", "data-count")
    assert sum(counts) == len(store.alive)
    place = counts.index(max(counts))
    bars.nth(place).click()
    text = page.locator("#panel-units .what")
    expect(text).to_have_text(f"{int(counts[place]):,} of {len(store):,}")
    page.get_by_role("button", name="Reset", exact=True).first.click()
    expect(text).to_have_text(f"{len(store.alive):,} of {len(store):,}")


def test_no_row_is_a_state_of_its_own(open_page: OpenPage) -> None:
    page = open_page(f"{TABLE}?q=nosuchlabel")
    expect(page.get_by_text("No unit is like that")).to_be_visible()
    page.get_by_role("button", name="Show all that are alive").click()
    page.wait_for_selector(f"{ROWS} a")


def test_the_csv_file_has_all_rows(open_page: OpenPage) -> None:
    store = open_store()
    page = open_page(f"{TABLE}?from=-5&to=-4&sort=unit&order=asc")
    page.wait_for_selector(f"{ROWS} a")
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text("utf-8"))))
    density = store.column("density")
    expected = [u for u in store.alive.tolist() if 1e-5 <= density[u] <= 1e-4]
    assert [int(row["unit"]) for row in rows] == expected
    assert [float(row["density"]) for row in rows] == pytest.approx(density[expected].tolist())


def test_rows_are_walked_and_opened_by_key(open_page: OpenPage) -> None:
    page = open_page(f"{TABLE}?sort=unit&order=asc")
    page.wait_for_selector(f"{ROWS} a")
    for key in ("j", "j", "k", "j"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    wanted = int(open_store().alive[1])
    expect(page.locator("h1")).to_have_text(re.compile(rf"^Latent {wanted}(\D|$)"))


LABEL = "words <b>of</b> a queen </script>"


def test_a_label_is_written_found_and_removed(open_page: OpenPage) -> None:
    page = open_page(f"#/f/{LATENTS}/40")
    page.wait_for_selector("#panel-labels")
    page.keyboard.press("e")
    field = page.get_by_role("textbox", name="Your label")
    expect(field).to_be_focused()
    page.keyboard.type(LABEL)
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".feature-label")).to_have_text(LABEL)
    page.keyboard.press("/")
    page.locator(".palette input").fill("queen")
    expect(page.locator("#palette-list [role=option]").first).to_contain_text(LABEL)
    page.keyboard.press("Escape")
    expect(page.locator(".palette")).to_have_count(0)
    page.keyboard.press("e")
    expect(field).to_be_focused()
    page.keyboard.type(", too")
    expect(field).to_have_value(f"{LABEL}, too")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator(".feature-label")).to_have_text("no label yet")


def test_labels_that_changed_meanwhile_are_not_lost(open_page: OpenPage, server: Server) -> None:
    page = open_page(f"#/f/{LATENTS}/41")
    page.watch.expect("status of 412")
    page.wait_for_selector("#panel-labels")
    page.keyboard.press("e")
    page.get_by_role("textbox", name="Your label").fill("mine")
    path = f"{server.origin}/api/v1/dictionaries/{LATENTS}/features/41/labels"
    headers = {"Origin": server.origin, "Content-Type": "application/json"}
    page.request.put(path, data=json.dumps({"text": "theirs"}), headers=headers)
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Somebody else has changed this")).to_be_visible()
    assert page.request.get(path).json()["items"][0]["text"] == "theirs"
    page.request.delete(path, headers=headers)


def test_a_bookmark_is_kept_and_removed(open_page: OpenPage) -> None:
    page = open_page(f"#/f/{LATENTS}/42")
    page.wait_for_selector("#panel-labels")
    page.keyboard.press("b")
    expect(page.get_by_text("Bookmarked")).to_be_visible()
    page.keyboard.press("g")
    page.keyboard.press("d")
    link = page.locator("#panel-bookmarks").get_by_role("link", name="42")
    link.click()
    page.wait_for_selector("#panel-labels")
    page.keyboard.press("b")
    expect(page.get_by_text("Bookmark removed")).to_be_visible()


def test_units_stand_side_by_side(open_page: OpenPage) -> None:
    page = open_page(f"#/f/{LATENTS}/43")
    page.wait_for_selector("#panel-labels")
    page.keyboard.press("c")
    page.keyboard.press("ArrowRight")
    expect(page.locator("h1")).to_have_text(re.compile(r"^Latent 44"))
    page.keyboard.press("c")
    page.keyboard.press("g")
    page.keyboard.press("c")
    expect(page.locator(".compare > li")).to_have_count(2)
    two = f"u={LATENTS}%3A43%2C{LATENTS}%3A44"
    expect(page).to_have_url(re.compile(re.escape(two) + "$"))  # it is written a moment later
    page.get_by_role("button", name=re.compile("Take 43")).click()
    expect(page.locator(".compare > li")).to_have_count(1)


def test_the_map_leads_to_a_unit_and_the_long_lists_open(open_page: OpenPage) -> None:
    page = open_page(TABLE)
    canvas = page.locator("#panel-map canvas")
    expect(canvas).to_be_visible(timeout=30_000)  # the model is being loaded
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    expect(page.locator("h1")).to_have_text(re.compile(r"^Latent \d+"))
    rows = page.locator("#panel-logits .token-bars").first.locator("tbody tr")
    expect(rows).to_have_count(10)
    page.get_by_role("button", name="show 100").click()
    expect(rows).to_have_count(100)
    expect(page).to_have_url(re.compile("logits=100"))


def test_a_unit_is_explained_at_a_click(open_page: OpenPage, server: Server) -> None:
    page = open_page(f"#/f/{LATENTS}/45")
    page.get_by_role("button", name="Explain by rules").click()
    scores = page.locator(".explain tbody tr")
    expect(scores.first).to_be_visible(timeout=20_000)
    expect(page.locator(".feature-label")).not_to_have_text("no label yet")
    labels = page.request.get(f"{server.origin}/api/v1/dictionaries/{LATENTS}/features/45/labels")
    assert "rules" in [label["source"] for label in labels.json()["items"]]
