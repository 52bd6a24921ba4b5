"""Everything is done without a mouse: from a feature to a prompt, a change, a trace and back."""

import re
from collections.abc import Callable
from typing import Any

from tests.browser.helpers import LATENTS, eventually, expect, open_store

OpenPage = Callable[..., Any]
ROWS = "table.nodes tbody tr[data-key]"


def tab_to(page: Any, selector: str, most: int = 90) -> None:
    """Press Tab until the focus is on what fits; it must be visible there."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("(s) => document.activeElement.matches(s)", selector):
            outline = page.evaluate(
                "(s) => { const e = document.activeElement, o = getComputedStyle(e);"
                "return o.outlineStyle !== 'none' || o.boxShadow !== 'none'"
                " || e.matches('a.place-box'); }",
                selector,
            )
            assert outline, f"the focus on {selector} cannot be seen"
            return
    raise AssertionError(f"Tab does not lead to {selector}")


def test_a_feature_without_a_mouse(open_page: OpenPage) -> None:
    alive = open_store().alive
    page = open_page(f"#/f/{LATENTS}/{alive[2]}")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(heading).to_have_text(re.compile(rf"^Latent {alive[3]}(\D|$)"))
    page.keyboard.press("j")
    eventually(lambda: page.evaluate("!!document.activeElement.closest('.example')"), "an example")
    tab_to(page, "#panel-values [data-bin]")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Peaks from")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("Peaks from")).to_be_hidden()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("/")
    field = page.get_by_role("combobox", name="Search features")
    expect(field).to_be_focused()
    page.keyboard.type("king")
    expect(field).to_have_value("king")
    page.keyboard.press("Escape")


def test_a_prompt_without_a_mouse(open_page: OpenPage) -> None:
    page = open_page("#/d")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.keyboard.press("g")
    page.keyboard.press("p")
    text = page.get_by_label("Text of Prompt")
    expect(text).to_be_visible()
    tab_to(page, "#text-a")
    page.keyboard.press("Control+a")
    page.keyboard.type("The prince went into the forest, and when")
    page.keyboard.press("Control+Enter")
    expect(page.locator(ROWS).first).to_be_visible()
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    page.keyboard.press("Escape")
    while not page.locator(f"{ROWS}.current[data-key*='|neuron|']").count():
        page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("a")
    expect(page.locator(".tray li")).to_have_count(1)
    page.keyboard.press("u")
    expect(page.locator(".tray li")).to_have_count(0)
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    trail = page.get_by_role("navigation", name="Trace")
    page.keyboard.press("t")
    expect(trail).to_be_visible()
    page.keyboard.press("T")
    expect(trail).to_be_hidden()
    for key, tab in enumerate(["Nodes", "Tokens × nodes", "Attention", "Lens", "Generate"], 1):
        page.keyboard.press(str(key))
        expect(page.get_by_role("tab", name=re.compile(f"^{tab}"))).to_have_attribute(
            "aria-selected", "true"
        )


def test_the_diagram_of_the_model_without_a_mouse(open_page: OpenPage) -> None:
    page = open_page("#/m")
    expect(page.locator("a.place-box").first).to_be_visible()
    tab_to(page, "a.place-box[href$='attn.qk_probs']")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="0/attn.qk_probs")).to_be_visible()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("heading", name="1/attn.qk_probs")).to_be_visible()
