"""Heads, factors and the model: what their pages show is what the library says."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from neuron_explainer.models.transformer import Transformer
from tests.browser.helpers import ask, expect, numbers
from tests.browser.running import Server

OpenPage = Callable[..., Any]


def test_a_head_shows_its_pattern_and_steps_to_the_next(open_page: OpenPage) -> None:
    text = "The queen went into the forest"
    page = open_page(f"#/h/3/4?text={text.replace(' ', '+')}")
    expect(page.locator("table.pair-table")).to_be_visible()
    model = Transformer.load("tiny-tales")
    found = model.capture(text, "3/attn.qk_probs")["3/attn.qk_probs"][0, :, :, 4].detach()
    expected = [float(found[q, k]) for q in range(len(found)) for k in range(q + 1)]
    assert numbers(page, "table.pair-table td") == pytest.approx(expected, abs=1 / 400)
    expect(page.locator("table.writes tbody tr")).to_have_count(len(found))
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", level=1)).to_have_text("Layer 3, head 5")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("heading", level=1)).to_have_text("Layer 2, head 5")
    expect(page).to_have_url(re.compile(r"\?text=The\+queen\+went\+into\+the\+forest$"))


def test_a_factor_shows_its_curve_and_the_words_that_raise_it(
    open_page: OpenPage, server: Server
) -> None:
    page = open_page("#/factors")
    page.get_by_role("link", name="0", exact=True).click()
    reply = ask(page, server, "factors/tales/0")
    page.get_by_text("The same as a table").click()
    expect(page.locator("#panel-importance td[data-value]").first).to_be_visible()
    assert numbers(page, "#panel-importance td[data-value]") == reply["importance"]
    sentence = page.locator("#panel-sentences .example").first
    expect(sentence.locator(".t.picked")).to_have_text(" queen", use_inner_text=False)
    known = reply["layers"][0]["examples"][0]["saliency"]
    assert float(sentence.locator(".t").first.get_attribute("data-value")) == known[0]
    expect(page.get_by_text("<b>")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", level=1)).to_have_text("Factor 1")


def test_the_model_page_leads_to_dictionaries_and_reads_texts(open_page: OpenPage) -> None:
    page = open_page("#/m/2/resid.torso.delta_mlp")
    place = page.locator("#panel-place")
    expect(place.get_by_role("heading", level=2)).to_have_text("2/resid.torso.delta_mlp")
    field = page.get_by_label("Text for the tokenizer")
    field.fill("a king <b>\U0001f451")
    expect(page.locator(".token-row")).to_contain_text("\U0001f451")
    drawn = "".join(page.locator(".token-row code").all_inner_texts())
    assert drawn.replace("·", " ").replace("␣", " ") == "a king <b>\U0001f451"
    place.get_by_role("link", name="ae-resid-delta-mlp/2").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("ae-resid-delta-mlp/2")


AT_ONCE = """() => new MutationObserver((_, observer) => {
    const field = document.getElementById('text-a');
    if (!field) return;
    observer.disconnect();
    field.value = 'Typed at once';
    field.dispatchEvent(new Event('input', { bubbles: true }));
}).observe(document, { childList: true, subtree: true })"""


def test_what_is_typed_at_once_stays(open_page: OpenPage) -> None:
    """Before the effects of the page's first drawing have run."""
    page = open_page("#/d")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.evaluate(AT_ONCE)
    page.evaluate("() => { location.hash = '#/p'; }")
    expect(page.get_by_label("Text of Prompt")).to_have_value("Typed at once")
    page.evaluate("() => new Promise((done) => setTimeout(done, 300))")
    expect(page.get_by_label("Text of Prompt")).to_have_value("Typed at once")


def test_a_hostile_prompt_stays_text(open_page: OpenPage) -> None:
    text = "<img src=x onerror=window.hurt=1><script>window.hurt=1</script>"
    page = open_page("#/p")
    page.get_by_label("Text of Prompt").fill(text)
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-part=embedding] .tokens")).to_contain_text("onerror")
    for tab in "2345":
        page.keyboard.press("Escape")
        page.keyboard.press(tab)
        expect(page.locator("[role=tab][aria-selected=true] kbd")).to_have_text(tab)
    assert page.evaluate("window.hurt") is None
