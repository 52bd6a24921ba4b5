"""Everything is done without a mouse: from a feature to a prompt, a change, a trace and back."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from neuron_explainer.models.interventions import ablate
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer
from tests.browser.helpers import LATENTS, ask, eventually, expect, numbers, open_store
from tests.browser.running import Server
from tests.browser.test_prompt_page import OTHER, PROMPT, ROWS, TEXT, difference

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def tales() -> Transformer:
    return Transformer.load("tiny-tales")


def near(locator: Any, value: float) -> bool:
    """Whether an element holds a number."""
    return abs(float(locator.get_attribute("data-value")) - value) < 1e-4


def tab_to(page: Any, selector: str, most: int = 90, back: bool = False) -> None:
    """Press Tab until the focus is on what fits; it must be visible there."""
    for _ in range(most):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if page.locator(":focus").and_(page.locator(selector)).count():
            outline = page.evaluate(
                "() => { const e = document.activeElement, o = getComputedStyle(e);"
                "return o.outlineStyle !== 'none' || o.boxShadow !== 'none'"
                " || e.matches('a.place-box'); }",
            )
            assert outline, f"the focus on {selector} cannot be seen"
            return
    raise AssertionError(f"Tab does not lead to {selector}")


@pytest.fixture
def by_keys(open_page: OpenPage) -> Iterator[OpenPage]:
    """``open_page`` of pages on which no pointer may be used."""
    pages = []

    def opened(route: str) -> Any:
        page = open_page(route)
        page.evaluate("addEventListener('pointerdown', () => { window.touched = true; }, true)")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        assert not page.evaluate("window.touched"), "a pointer was used"


def press(page: Any, *keys: str) -> None:
    """Press keys one after the other."""
    for key in keys:
        page.keyboard.press(key)


def write(page: Any, text: str) -> None:
    """Replace what stands in the field that has the focus."""
    page.keyboard.press("Control+a")
    page.keyboard.type(text)


def settled(page: Any) -> None:
    """Wait for the table of nodes, and until nothing is on its way."""
    expect(page.locator(ROWS).first).to_be_visible()
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def to_row(page: Any, key: str) -> str:
    """Press ``j`` until the row of such a key is the current one; returns its key."""
    row = page.locator(f"{ROWS}.current")
    for _ in range(60):
        found = str(row.get_attribute("data-key"))
        if key in found:
            return found
        page.keyboard.press("j")
        expect(row).not_to_have_attribute("data-key", found)
    raise AssertionError(f"no row of {key}")


def test_a_feature_without_a_mouse(by_keys: OpenPage) -> None:
    """Tasks 2 to 5: figures, ten steps, a range of values, a text of one's own."""
    store = open_store()
    alive = store.alive
    page = by_keys(f"#/f/{LATENTS}/{alive[2]}")
    heading = page.get_by_role("heading", level=1)
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(heading).to_have_text(re.compile(rf"^Latent {alive[12]}(\D|$)"))
    record = store[int(alive[12])]
    page.keyboard.press("j")
    eventually(lambda: page.evaluate("!!document.activeElement.closest('.example')"), "an example")
    # The value of the peak stands beside it.
    expect(page.locator("#nx-tip strong")).to_have_text(f"{record.all_examples[0].value:.3f}")
    tab_to(page, "#panel-values [data-bin]")
    press(page, *["ArrowRight"] * 40, "Enter")  # the last bar
    expect(page.get_by_text("Peaks from")).to_be_visible()
    low, high = (float(x) for x in page.url.split("range=")[1].split("&")[0].split(".."))
    values = numbers(page, ".example")
    assert values
    assert all(low <= value < high for value in values)
    page.keyboard.press("Escape")
    expect(page.get_by_text("Peaks from")).to_be_hidden()
    page.keyboard.press("t")
    text = "The king <b>had a daughter."
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    expect(page.locator("#panel-try .tokens")).to_have_count(1)
    expect(page.locator("#panel-try [aria-busy=true]")).to_have_count(0)
    model = Transformer.load("tiny-tales")
    autoencoder = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp").get_autoencoder(2)
    place = "2/resid.torso.delta_mlp"
    acts = autoencoder.encode(model.capture(text, place)[place][0])[:, record.unit].tolist()
    found = numbers(page, "#panel-try .t[data-value]")
    assert found == pytest.approx([value for value in acts if value], abs=1e-4)
    tab_to(page, "#panel-try [aria-label='Remove this text']")
    page.keyboard.press("Enter")
    expect(page.locator("#panel-try .tokens")).to_have_count(0)


def test_the_search_and_the_list_of_keys_without_a_mouse(by_keys: OpenPage) -> None:
    page = by_keys(f"#/f/{LATENTS}/3")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
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


def test_a_window_that_closes_late_does_not_close_the_next(by_keys: OpenPage) -> None:
    page = by_keys(f"#/f/{LATENTS}/3")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    # The browser sends the event "close" in a later task than that in which the window is closed.
    page.evaluate("""() => {
        document.querySelector('dialog').close();
        document.body.dispatchEvent(new KeyboardEvent('keydown', { key: '/', bubbles: true }));
    }""")
    page.evaluate("() => new Promise((done) => setTimeout(done, 100))")
    expect(page.get_by_role("combobox", name="Search features")).to_be_focused()


def test_a_prompt_without_a_mouse(by_keys: OpenPage, tales: Transformer) -> None:
    """Tasks 6 and 7: a prompt with tokens of interest, a head that is ablated, and traces."""
    page = by_keys("#/d")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    press(page, "g", "p")
    settled(page)
    expect(page.locator("#main")).to_be_focused()
    tab_to(page, "#text-a")
    write(page, TEXT)
    for label, token in (("target", " she"), ("distractor", " he")):
        tab_to(page, f"[aria-label='Add a {label} token of Prompt']")
        press(page, "Backspace")  # that of the example
        page.keyboard.type(token)
        page.keyboard.press("Enter")
        expect(
            page.locator(".chip code", has_text=re.compile(f"^␣{token.strip()}$"))
        ).to_be_visible()
    page.keyboard.press("Control+Enter")
    settled(page)
    shown = page.locator(".main b")
    expected = difference(tales, TEXT)
    eventually(lambda: near(shown, expected), "the logit difference of the text")
    before = float(shown.get_attribute("data-value"))
    page.keyboard.press("Escape")
    location, _, unit, position, _ = to_row(page, "|head|").split("|")
    page.keyboard.press("a")
    expect(page.locator(".tray li")).to_have_count(1)
    changed = difference(tales, TEXT, ablate(location, int(unit), int(position)))
    eventually(lambda: near(shown, changed), "the difference without the head")
    page.keyboard.press("u")
    expect(page.locator(".tray li")).to_have_count(0)
    settled(page)
    assert near(shown, before)
    layer = int(to_row(page, "|neuron|").split("/")[0])
    trail = page.get_by_role("navigation", name="Trace")
    page.keyboard.press("t")
    expect(trail).to_be_visible()
    settled(page)
    keys = page.eval_on_selector_all(ROWS, "rows => rows.map((row) => row.dataset.key)")
    assert max(int(key.split("/")[0]) for key in keys if key[0].isdigit()) <= layer
    page.keyboard.press("T")
    expect(trail).to_be_hidden()
    settled(page)
    to_row(page, "embedding")
    page.keyboard.press("t")
    expect(page.get_by_text("nothing comes before it")).to_be_visible()
    expect(trail).to_be_hidden()


def test_two_prompts_and_a_generation_without_a_mouse(
    by_keys: OpenPage, server: Server, tales: Transformer
) -> None:
    """Tasks 8 and 10: a second prompt of another length, swapped; two streams, one of them stopped."""
    page = by_keys(PROMPT)
    settled(page)
    tab_to(page, "button:has-text('Second prompt')")
    page.keyboard.press("Enter")
    tab_to(page, "#text-b")
    write(page, OTHER)
    page.keyboard.press("Control+Enter")
    both = page.locator("[data-prompt=diff] b")
    expect(both).to_be_visible()
    page.keyboard.press("Escape")
    apart = difference(tales, TEXT) - difference(tales, OTHER)
    assert near(both, apart)
    tab_to(page, "select:has(option[value=all])")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    press(page, "2")
    expect(page.locator("table.matrix thead th.alone")).to_have_text("dark")
    press(page, "x")
    expect(page.get_by_label("Text of Prompt A")).to_have_value(OTHER)
    eventually(lambda: near(both, -apart), "the difference with its sign changed")
    press(page, "1")
    settled(page)
    to_row(page, "|head|")
    press(page, "a", "5")
    expect(page.locator(".tray li")).to_have_count(1)
    tab_to(page, "[data-panel=generate] button[type=submit]")
    page.keyboard.press("Enter")
    expect(page.get_by_text(re.compile("They part at|Both are the same"))).to_be_visible()
    tab_to(page, "[data-panel=generate] label:first-child input", back=True)
    write(page, "128")
    page.keyboard.press("Enter")
    expect(page.locator("[data-stream=changed] .new").nth(3)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped")).to_be_visible()
    eventually(lambda: ask(page, server, "health")["queue_depth"] == 0, "an empty queue", 1.0)
    assert page.locator("[data-stream=changed] .new").count() < 128


def test_the_diagram_of_the_model_without_a_mouse(open_page: OpenPage) -> None:
    page = open_page("#/m")
    expect(page.locator("a.place-box").first).to_be_visible()
    tab_to(page, "a.place-box[href$='attn.qk_probs']")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="0/attn.qk_probs")).to_be_visible()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("heading", name="1/attn.qk_probs")).to_be_visible()
