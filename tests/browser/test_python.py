"""What panels copy as Python runs, and gives what the panel shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from neuron_explainer.models.transformer import Transformer
from tests.browser.helpers import expect
from tests.browser.test_accessible import PAGES, settled

OpenPage = Callable[..., Any]
WITHOUT = {
    "limits",  # of this server, which the library does not have
    "dictionary-grid",  # a list of links
    "bookmarks",  # notes of the user, as are the next two
    "labels",
    "label-files",
    "try",  # nothing has been asked there yet
    "fires",
}


@pytest.mark.parametrize("name", ["feature", "dictionaries", "dictionary", "prompt", "matrix"])
def test_every_panel_copies_python(open_page: OpenPage, name: str) -> None:
    assert_python_everywhere(open_page(PAGES[name]))


@pytest.mark.parametrize("name", ["attention", "lens", "head", "model", "factor"])
def test_every_panel_of_the_model_copies_python(open_page: OpenPage, name: str) -> None:
    assert_python_everywhere(open_page(PAGES[name]))


def assert_python_everywhere(page: Any) -> None:
    settled(page)
    without = page.eval_on_selector_all(
        ".panel[data-panel]",
        "all => all.filter((one) => !one.querySelector('[data-tool=python]'))"
        ".map((one) => one.dataset.panel)",
    )
    assert set(without) <= WITHOUT


def copied(page: Any, panel: str) -> Any:
    """The result of the script that a panel copies."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(f"#panel-{panel} [data-tool=python]").click()
    expect(page.get_by_text("Python copied")).to_be_visible()
    names: dict[str, Any] = {}
    exec(page.evaluate("navigator.clipboard.readText()"), names)
    return names["result"]


def test_a_place_of_the_model_is_captured(open_page: OpenPage) -> None:
    page = open_page("#/m/2/resid.torso.post_mlp")
    settled(page)
    model = Transformer.load("tiny-tales")
    place = "2/resid.torso.post_mlp"
    expected = model.capture("Once upon a time", place)[place]
    assert torch.equal(copied(page, "place"), expected)
    assert copied(page, "places") == list(model.paths)


def test_the_table_of_nodes_is_what_its_python_gives(open_page: OpenPage) -> None:
    page = open_page(PAGES["prompt"])
    settled(page)
    result = copied(page, "nodes")
    found = page.eval_on_selector_all(
        "table.nodes td[data-measure=act_grad]", "all => all.map((one) => +one.dataset.value)"
    )
    assert sorted(found) == pytest.approx(sorted(result["values"]["act_grad"]["A"]), abs=1e-5)
    shown = float(page.locator(".main b").first.get_attribute("data-value"))
    assert result["goal_values"] == pytest.approx([shown], abs=1e-4)
