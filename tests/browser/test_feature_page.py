"""The page of a feature: the first thing that is seen, its figures, steps along, and ranges of values."""

import gzip
import re
from collections.abc import Callable
from typing import Any

import pytest

from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer
from tests.browser.helpers import LATENTS, ask, expect, numbers, open_store
from tests.browser.running import Server

OpenPage = Callable[..., Any]


def card(page: Any) -> Any:
    """The heading of a unit's card."""
    return page.locator("h1", has_text="Latent")


def titled(unit: int) -> re.Pattern[str]:
    """The text of a heading; badges may follow."""
    return re.compile(rf"^Latent {unit}(\D|$)")


def test_a_cold_start_shows_a_card_and_weighs_little(open_page: OpenPage, server: Server) -> None:
    page = open_page()
    expect(card(page)).to_be_visible()
    weight = 0
    loaded = page.evaluate("performance.getEntriesByType('resource').map((one) => one.name)")
    for name in [server.origin + "/", *loaded]:
        if "/api/" not in name and name.startswith("http"):
            weight += len(gzip.compress(page.request.get(name).body()))
    assert 10_000 < weight <= 60_000, f"{weight:,} bytes with gzip"


def test_the_card_shows_what_the_library_says(open_page: OpenPage, server: Server) -> None:
    store = open_store()
    unit = int(store.alive[3])
    record = store[unit]
    page = open_page(f"#/f/{LATENTS}/{unit}")
    expect(card(page)).to_have_text(titled(unit))
    top = record.all_examples[0]
    shown = page.locator(".example").first
    assert float(shown.get_attribute("data-value")) == pytest.approx(top.value, rel=1e-6)
    words = ask(page, server, f"dictionaries/{LATENTS}/features/{unit}")["vocab"]
    peak = words[str(top.tokens[top.peak])]
    expect(shown.locator(".t.peak")).to_have_text(peak, use_inner_text=False)
    values = numbers(page, ".example:first-child .t[data-value]")
    assert sorted(values) == pytest.approx(sorted(top.activations[top.activations != 0].tolist()))
    counts = numbers(page, "#panel-values [data-bin]", "data-count")
    filled = record.histogram.nonzero()[0]
    assert counts == record.histogram[filled[0] : filled[-1] + 1].tolist()


def test_the_heights_of_bars_follow_their_counts(open_page: OpenPage) -> None:
    page = open_page(f"#/f/{LATENTS}/{int(open_store().alive[3])}")
    expect(page.locator("#panel-values [data-bin]").first).to_be_visible()
    found = page.eval_on_selector_all(
        "#panel-values [data-bin]",
        "bars => bars.map((bar) => [+bar.dataset.count, bar.firstChild.getBoundingClientRect().height])",
    )
    assert [h for _, h in sorted(found)] == sorted(h for _, h in found)
    assert all((height > 0) == (count > 0) for count, height in found)


def test_ten_steps_lead_to_the_tenth_alive_latent(open_page: OpenPage) -> None:
    alive = open_store().alive
    page = open_page(f"#/f/{LATENTS}/{alive[0]}")
    expect(card(page)).to_have_text(titled(alive[0]))
    page.watch.requests.clear()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(card(page)).to_have_text(titled(alive[10]))
    expect(page).to_have_url(re.compile(f"#/f/{LATENTS}/{alive[10]}$"))
    cards = [r for r in page.watch.requests if r.endswith(tuple(f"/{i}" for i in range(10_000)))]
    assert len(cards) <= 14, "a card for each step, and those beside the last"
    page.go_back()
    expect(card(page)).to_have_text(titled(alive[9]))


def test_a_bar_shows_only_examples_of_its_range(open_page: OpenPage) -> None:
    page = open_page(f"#/f/{LATENTS}/{int(open_store().alive[3])}")
    bars = page.locator("#panel-values [data-bin]")
    expect(bars.first).to_be_visible()
    counts = numbers(page, "#panel-values [data-bin]", "data-count")
    bars.nth(len(counts) - 1).click()
    heading = page.get_by_text("Peaks from")
    expect(heading).to_be_visible()
    expect(page).to_have_url(re.compile("range="))
    low, high = (float(x) for x in page.url.split("range=")[1].split("&")[0].split(".."))
    values = numbers(page, ".example")
    assert values
    assert all(low <= value < high for value in values)
    empty = next(i for i, n in enumerate(counts[:-1]) if n == 0 or i == 0)
    bars.nth(empty).click()
    if not page.locator(".example").count():
        page.get_by_role("button", name="Show all groups").first.click()
        expect(heading).to_be_hidden()


def test_a_dead_latent_is_a_page_that_says_so(open_page: OpenPage) -> None:
    store = open_store("ae-mlp-post-act.0")
    dead = next(unit for unit in range(len(store)) if unit not in set(store.alive.tolist()))
    page = open_page(f"#/f/ae-mlp-post-act.0/{dead}")
    expect(page.get_by_text("was never active")).to_be_visible()


@pytest.mark.parametrize(
    "text",
    [
        "The king had a daughter.",
        "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>",
        "emoji \U0001f451, a letter \u00e9\u4e16, and\ttabs",
    ],
)
def test_a_text_of_ones_own_has_the_librarys_values(open_page: OpenPage, text: str) -> None:
    unit = int(open_store().alive[3])
    page = open_page(f"#/f/{LATENTS}/{unit}")
    page.get_by_label("Text", exact=True).fill(text)
    tokens = page.locator("#panel-try .tokens")
    expect(tokens).to_be_visible()
    page.wait_for_load_state("networkidle")
    model = Transformer.load("tiny-tales")
    autoencoder = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp").get_autoencoder(2)
    place = "2/resid.torso.delta_mlp"
    acts = autoencoder.encode(model.capture(text, place)[place][0])[:, unit].tolist()
    found = numbers(page, "#panel-try .t[data-value]")
    expected = [value for value in acts if value]
    assert len(found) <= len(expected), "tokens of one character are drawn as one"
    for value in found:
        assert min(abs(value - other) for other in expected) < 1e-4
    drawn = tokens.inner_text().replace("·", " ").replace("⇥", "\t")
    assert drawn == text
    assert page.evaluate("window.hurt") is None
