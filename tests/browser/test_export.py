"""Exported pages open from ``file://``, and show what the server's page shows."""

import pytest

from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.viewer import DIST, export
from tests.browser.running import Watch, watched

NAME = "tiny-tales/ae-resid-delta-mlp/2"
ROUTE = "#/f/ae-resid-delta-mlp.2/17"
PARTS = ("#panel-examples .example-list", "#panel-values .bars", ".facts")
TEXT_AND_CLASSES = """selectors => selectors.map(selector => {
    const parts = [...document.querySelector(selector).querySelectorAll('*')];
    return parts.map(part => [part.tagName, part.className.baseVal ?? part.className, part.textContent]);
})"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    with ExampleStore.open(NAME) as store:
        export.write_page(store, 17, folder / "17.html")
        export.write_site(store, folder / "site", [16, 17, 18])
    return folder


@pytest.fixture
def open_file(browser):
    opened = []

    def open_at(path, **settings):
        context, watch = browser.new_context(**settings), Watch()
        opened.append((context, watch))
        page = watched(context.new_page(), watch)
        page.goto(path.as_uri())
        return page

    yield open_at
    for context, watch in opened:
        context.close()
        watch.check()


@pytest.mark.parametrize("name", ["17.html", "site/17.html"])
def test_an_exported_page_is_the_page_of_the_server(exported, open_file, open_page, name):
    page = open_file(exported / name)
    page.wait_for_selector("#panel-examples .t")
    there = open_page(ROUTE)
    there.wait_for_selector("#panel-examples .t")
    # Links to the Prompt page need a server.
    there.evaluate("document.querySelectorAll('a.send').forEach(link => link.remove())")
    assert page.evaluate(TEXT_AND_CLASSES, PARTS) == there.evaluate(TEXT_AND_CLASSES, PARTS)


def test_bars_choose_examples_without_a_server(exported, open_file):
    page = open_file(exported / "17.html")
    page.wait_for_selector("#panel-values .bar")
    page.locator("#panel-values .bar").last.click()
    page.wait_for_selector(".examples-bar .filter")
    peaks = page.eval_on_selector_all(".example", "all => all.map(one => +one.dataset.value)")
    assert len(peaks) == 1
    assert peaks[0] > 11


def test_the_pages_of_a_site_lead_to_each_other(exported, open_file):
    page = open_file(exported / "site" / "index.html")
    page.get_by_role("link", name="16", exact=True).click()
    page.wait_for_selector("h1:has-text('Latent 16')")
    page.get_by_role("link", name="Next one that is alive").click()
    page.wait_for_selector("h1:has-text('Latent 17')")
    page.get_by_role("link", name="ae-resid-delta-mlp/2").click()
    page.wait_for_selector("text=3 of 2,560 latents")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_exported_pages_are_accessible(exported, open_file, scheme):
    from axe_playwright_python.sync_playwright import Axe

    for name in ("17.html", "site/17.html", "site/index.html"):
        page = open_file(exported / name, color_scheme=scheme, bypass_csp=True)
        page.wait_for_selector("#panel-examples .t, .vtable a")
        found = Axe().run(page, options={"preload": False})  # it would fetch style sheets
        assert found.violations_count == 0, found.generate_report()


WIDGET = """data => {
    const traits = { data, unit: data.card.unit }, listeners = [];
    const root = document.body.appendChild(document.createElement('div'));
    root.className = 'jp-OutputArea-output';
    window.asked = [];
    const model = {
        get: (name) => traits[name],
        set: (name, value) => { traits[name] = value; },
        save_changes: () => window.asked.push(traits.unit),
        on: (name, run) => listeners.push(run),
        off: () => {},
    };
    window.show = (next) => { traits.data = next; listeners.forEach((run) => run()); };
    window.close_widget = neuronExplainer.render({ model, el: root });
}"""


JUPYTERLAB = """
.jp-OutputArea-output { contain: strict; height: 900px; margin: 150px 0 0 300px; }
.jp-OutputArea-output dt { font-weight: bold; float: left; width: 20%; }
.jp-OutputArea-output dd { float: left; width: 80%; }
"""


def test_the_widget_shows_its_data_and_asks_for_others(browser):
    with ExampleStore.open(NAME) as store:
        first, second = (export.unit_data(store, store[unit]) for unit in (17, 18))
    context, watch = browser.new_context(), Watch()
    page = watched(context.new_page(), watch)
    page.add_style_tag(path=DIST / "embed.css")
    page.add_style_tag(content=JUPYTERLAB)
    page.add_script_tag(path=DIST / "embed.js")
    page.evaluate(WIDGET, first)
    page.wait_for_selector("h1:has-text('Latent 17')")
    for name in page.locator(".facts dt").all():
        value = name.locator("+ dd").bounding_box()
        assert name.bounding_box()["y"] + name.bounding_box()["height"] <= value["y"] + 1
    peak = page.locator("#panel-examples .t.peak").first
    peak.hover()
    at, tip = (one.bounding_box() for one in (peak, page.locator(".tip")))
    assert abs(at["x"] + at["width"] / 2 - tip["x"] - tip["width"] / 2) < 2
    assert 0 <= at["y"] - tip["y"] - tip["height"] <= 10
    page.get_by_role("button", name="Next one that is alive").click()
    assert page.evaluate("asked") == [18]
    page.evaluate("data => show(data)", second)
    page.wait_for_selector("h1:has-text('Latent 18')")
    page.evaluate("close_widget()")
    assert page.locator("h1").count() == 0
    context.close()
    watch.check()
