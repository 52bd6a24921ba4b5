"""A store of everything that a collation can find: ranges of values, inactive texts, units active together.

The shipped stores leave these out, so this one is collated here, of texts that a shipped one holds.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer import cli
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.workspace import DATA_VARIABLE
from tests.browser.helpers import expect, numbers, open_store
from tests.browser.running import Server

OpenPage = Callable[..., Any]
N_DOCUMENTS = 60
WHAT = ("--autoencoder", "ae-resid-delta-mlp", "--layer", "2", "--location", "1/attn.qk_probs")
KEPT = (
    "--top",
    "4",
    "--intervals",
    "4",
    "--per-interval",
    "2",
    "--uniform",
    "2",
    "--weighted",
    "2",
)
MORE = ("--inactive", "3", "--coactivation-tokens", "4000", "--window", "24", "--head-window", "12")


def write_text(path: Path) -> None:
    """The first documents of the shipped stores, as a file in which a form feed ends each."""
    with open_store() as store:
        tokens = store.tokens
        documents = [tokens.corpus.document(number) for number in range(N_DOCUMENTS)]
        texts = [b"".join(tokens.pieces(ids)).decode(errors="ignore") for ids in documents]
    path.write_text("\f".join(text.replace("<|endoftext|>", "") for text in texts), "utf-8")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExampleStore]:
    """The store of latents, and that of a layer's heads."""
    folder = tmp_path_factory.mktemp("full")
    write_text(folder / "tales.txt")
    text = ("collate", str(folder / "tales.txt"), "--split", "\f", "--no-pack")
    assert cli.main([*text, *WHAT, "--out", str(folder / "stores"), *KEPT, *MORE]) == 0
    opened = [ExampleStore.open(path) for path in (folder / "stores").glob("*.store")]
    return {store.kind: store for store in opened}


@pytest.fixture(scope="module")
def full(
    stores: dict[str, ExampleStore], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("data")
    folder = stores["latent"].path.parent
    with Server.start("--store", str(folder), **{DATA_VARIABLE: str(data)}) as server:
        yield server


def a_rich_unit(store: ExampleStore) -> int:
    """The unit with examples of all kinds that is active together with the most others."""
    rich = [u for u in store.alive.tolist() if len({e.group for e in store[u].all_examples}) >= 5]
    return int(max(rich, key=lambda unit: len(store[unit].partners)))


def address_of(store: ExampleStore, unit: int) -> str:
    return f"#/f/{store.path.name.removesuffix('.store')}/{unit}"


def test_partners_are_shown_with_their_figures_and_lead_on(
    open_page: OpenPage, full: Server, stores: dict[str, ExampleStore]
) -> None:
    store = stores["latent"]
    unit = a_rich_unit(store)
    partners = store[unit].partners
    assert len(partners) >= 5
    page = open_page(address_of(store, unit), at=full)
    rows = page.locator("#panel-partners tbody tr")
    expect(rows).to_have_count(min(10, len(partners)))
    for row, partner in zip(rows.all(), partners, strict=False):
        cells = [row.locator("th a"), *row.locator("td").all()]
        shown = [cell.inner_text().replace("−", "-") for cell in cells]
        figures = [partner.jaccard, partner.phi, partner.pmi]
        assert shown == [str(partner.unit), f"{partner.both:,}", *(f"{x:.2f}" for x in figures)]
    rows.first.get_by_role("link").click()
    title = re.compile(rf"^Latent {partners[0].unit}(\D|$)")
    expect(page.get_by_role("heading", level=1)).to_have_text(title)


def test_examples_stand_in_their_ranges_of_values(
    open_page: OpenPage, full: Server, stores: dict[str, ExampleStore]
) -> None:
    store = stores["latent"]
    record = store[a_rich_unit(store)]
    page = open_page(address_of(store, record.unit), at=full)
    page.get_by_role("tab", name=re.compile("^By range")).click()
    expected = [e for e in record.all_examples if e.group == "stratum"]
    expect(page.locator(".example")).to_have_count(len(expected))
    assert numbers(page, ".example") == pytest.approx([e.value for e in expected])
    within = page.eval_on_selector_all(
        ".example-list > li",
        "all => { let range = ''; const found = [];"
        "for (const one of all) one.matches('.range-head') ? range = one.innerText"
        " : found.push([range, +one.dataset.value]); return found; }",
    )
    ranges = {text for text, _ in within}
    assert len(ranges) == len({e.interval for e in expected}) > 1
    for text, value in within:
        low, high = (float(x) for x in text.split(" to "))
        assert low * 0.99 <= value <= high * 1.01
    page.get_by_role("tab", name=re.compile("^Inactive")).click()
    count = len([e for e in record.all_examples if e.group == "inactive"])
    expect(page.locator(".example")).to_have_count(count)
    assert not numbers(page, ".example .t[data-value]")


def test_pairs_of_tokens_of_a_head_are_shown_as_a_row_and_as_a_table(
    open_page: OpenPage, full: Server, stores: dict[str, ExampleStore]
) -> None:
    store = stores["head"]
    record = store[int(store.alive[0])]
    page = open_page(address_of(store, record.unit), at=full)
    top = record.all_examples[0]
    example = page.locator(".example").first
    assert float(example.get_attribute("data-value")) == pytest.approx(top.value)
    example.get_by_role("button", name="all pairs").click()
    found = numbers(page, ".example:first-child table.pair-table td")
    assert found == pytest.approx(top.activations.tolist(), abs=1e-6)
    expect(page.locator("#panel-partners")).to_be_visible()
