"""Every page, light and dark, has no violation that axe-core finds, and nothing is lost at 200 % zoom."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.helpers import LATENTS, eventually, expect

OpenPage = Callable[..., Any]
PROMPT = "#/p?a=The+queen+went+into+the+forest%2C+and+when&t=%5B%22+she%22%5D&d=%5B%22+he%22%5D&k=5"
PAGES = {
    "feature": f"#/f/{LATENTS}/3",
    "missing unit": "#/f/ae-mlp-post-act.0/99999",
    "dictionaries": "#/d",
    "dictionary": f"#/d/{LATENTS}",
    "prompt": PROMPT,
    "two prompts": f"{PROMPT}&b=%22The+prince+went+into+the+dark+forest%2C+and+when%22",
    "matrix": f"{PROMPT}&pos=all&tab=matrix",
    "attention": f"{PROMPT}&tab=attention",
    "lens": f"{PROMPT}&tab=lens",
    "generate": f"{PROMPT}&tab=generate",
    "head": "#/h/3/4",
    "model": "#/m/2/mlp.post_act",
    "factors": "#/factors",
    "factor": "#/factors/tales/0",
    "compare": f"#/compare?u={LATENTS}:43",
    "missing page": "#/nothing",
}


MISSING = ("missing unit", "missing page")


FITS = """() => {
    const past = [];
    for (const panel of document.querySelectorAll('.panel, .tray, .status')) {
        const end = panel.getBoundingClientRect().right;
        if (panel.matches('.status') && end < innerWidth) past.push('status bar');
        for (const part of panel.querySelectorAll('*')) {
            if (part.closest('.scroll-x, .scroll, .hidden, .vbody, .tokens, svg')) continue;
            if (part.getBoundingClientRect().right > end + 1) past.push(part.outerHTML.slice(0, 80));
        }
    }
    // What has a column for each token of a text may be scrolled; other tables fit from 1280 px on.
    const boxes = [...document.querySelectorAll('.scroll-x, .scroll')].filter((box) =>
        !box.querySelector('.pair-table, .lens-table, .matrix') && !box.closest('details:not([open])'));
    for (const box of innerWidth < 1280 ? [] : boxes)
        if (box.scrollWidth > box.clientWidth + 1) past.push(`cut: ${box.ariaLabel}`);
    return [document.documentElement.scrollWidth, innerWidth, past.slice(0, 3)];
}"""


def settled(page: Any) -> None:
    """Wait until nothing is being loaded."""
    expect(page.locator("main .page")).to_be_visible()
    page.wait_for_load_state("networkidle")
    waiting = "main .loading, main [aria-busy=true], .status :text('loading the model')"
    eventually(lambda: page.locator(waiting).count() == 0, "the page is complete", 20)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_and_all_fits_at_200_per_cent(
    open_page: OpenPage, name: str, theme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(PAGES[name], color_scheme=theme, reduced_motion="reduce")
    if name in MISSING:
        page.watch.expect("status of 404")
    settled(page)
    found = Axe().run(page).response["violations"]
    said = [
        f"{each['id']} ({each['impact']}): {node['html'][:160]}"
        for each in found
        for node in each["nodes"][:3]
    ]
    assert not found, "\n".join(said)
    for width in (1440, 1280, 800, 720):  # the last is what a zoom of 200 % leaves of the first
        page.set_viewport_size({"width": width, "height": 450})
        wide, window, left = page.evaluate(FITS)
        assert wide <= window, f"the page is wider than a window of {width} px"
        assert not left, (
            f"at {width} px these reach past their panel, or past their own box: {left}"
        )


@pytest.mark.parametrize("reduced", ["reduce", "no-preference"])
def test_nothing_moves_for_whoever_does_not_want_it(open_page: OpenPage, reduced: str) -> None:
    page = open_page(PAGES["feature"], reduced_motion=reduced)
    settled(page)
    moving = page.evaluate(
        "[...document.querySelectorAll('*')].some((e) => {"
        "const s = getComputedStyle(e);"
        "return s.animationName !== 'none' || parseFloat(s.transitionDuration) > 0; })"
    )
    assert moving == (reduced == "no-preference")
