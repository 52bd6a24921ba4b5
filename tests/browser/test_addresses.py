"""An address that names nothing is answered in plain words, and with links to what there is."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.helpers import LATENTS, expect, open_store

OpenPage = Callable[..., Any]
NAME = "ae-resid-delta-mlp/2"
PROMPT = "#/p?a=The+queen+went+into+the+forest%2C+and+when&t=%5B%22+she%22%5D"
NOTHING_THERE = {
    "#/p?s=garbage": "What this link shows is not here",
    f"#/p?s={'0' * 32}": "What this link shows is not here",
    "#/h/99/99": "There is no head 99 in layer 99",
    "#/h/1/x": "There is no head x in layer 1",
    "#/h/-1": "There is no head 0 in layer -1",
    "#/m/99": "The model has no layer 99",
    "#/m/x/mlp.post_act": "The model has no layer x",
    "#/m/1/nope": "The model has no place called nope",
    "#/f/nope/1": "There is no dictionary called nope",
    "#/f/nope/x": "There is no dictionary called nope",
    "#/f/..%2F..%2Fetc/1": "There is no dictionary called ../../etc",
    f"#/f/{LATENTS}/99999": f"{NAME} has no latent 99999",
    f"#/f/{LATENTS}/99999999999": f"{NAME} has no latent 99999999999",
    f"#/f/{LATENTS}/-1": f"{NAME} has no latent -1",
    f"#/f/{LATENTS}/x": f"{NAME} has no latent x",
    "#/d/nope": "There is no dictionary called nope",
    "#/d/%3Cb%3E%20": "There is no dictionary called <b> ",
    "#/factors/nope": "There are no factors called nope",
    "#/factors/nope/x": "There are no factors called nope",
    "#/factors/tales/99": "tales has no factor 99",
    "#/factors/tales/x": "tales has no factor x",
    "#/compare?u=nope:1": "There is no dictionary called nope",
    f"#/compare?u={LATENTS}:99999": f"{NAME} has no latent 99999",
    "#/nothing": "There is no such page",
}


def test_every_bad_address_says_what_is_wrong_and_leads_on(open_page: OpenPage) -> None:
    page = open_page("#/d")
    page.watch.expect("status of 4(04|22)")
    for address, said in NOTHING_THERE.items():
        page.evaluate("(hash) => { location.hash = hash; }", address)
        words = page.locator(".astray .empty-title")
        expect(words).to_have_text(said)
        text = page.inner_text("main")
        assert not re.search(r"pattern|\^\[|path\.|HTTP|\b4\d\d\b", text), f"{address}: {text}"
        if "has no latent" in said:
            assert f"0 to {len(open_store()) - 1}" in text
        links = page.locator(".astray a")
        target = links.first.get_attribute("href")
        assert target, address
        links.first.click()
        expect(page.locator("main h1").first).to_be_attached()
        expect(page.locator(".astray")).to_have_count(0)
        expect(page.locator("main .loading")).to_have_count(0)
        assert page.locator("main .failure").count() == 0, f"{address} leads to {target}"


def test_what_is_no_unit_is_left_out_of_a_comparison_and_named(open_page: OpenPage) -> None:
    page = open_page(f"#/compare?u=garbage,{LATENTS}:43")
    expect(page.locator(".compare > li")).to_have_count(1)
    expect(page.get_by_text("Left out")).to_contain_text("garbage")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("&pos=9999", "Positions are 0 to 8"),
        ('&iv=[["9/mlp.post_act","neuron",7,null,null,"zero",null]]', "layer"),
        ('&tr=[["1/mlp.post_act","neuron",99999,8,null,null,null]]', "99999"),
    ],
)
def test_a_prompt_with_a_wrong_part_is_kept_without_it(
    open_page: OpenPage, wrong: str, said: str
) -> None:
    page = open_page(PROMPT + wrong)
    page.watch.expect("status of 422")
    expect(page.locator(".failure")).to_contain_text(said)
    page.get_by_role("button", name="Start afresh with this text").click()
    expect(page.locator("table.nodes")).to_be_visible()
    expect(page.get_by_label("Text of Prompt")).to_have_value(re.compile("^The queen"))


@pytest.mark.parametrize(
    "garbage", ["iv=[[1]]&tr=[[2]]", "iv=7&tr=%7B", 'by=["x","y","z"]&tab=nope&k=0&gen=[1]']
)
def test_garbage_in_the_address_of_a_prompt_is_left_out(open_page: OpenPage, garbage: str) -> None:
    page = open_page(f"{PROMPT}&{garbage}")
    expect(page.locator("table.nodes tbody tr").first).to_be_visible()
    expect(page.locator(".tray li")).to_have_count(0)
