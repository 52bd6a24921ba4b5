"""The Prompt page gives the library's numbers: interventions, traces, two prompts, lens, generation."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from neuron_explainer.analysis.effects import nodes
from neuron_explainer.analysis.targets import logit_difference
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import ablate, set_to
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer
from tests.browser.helpers import LATENTS, ask, eventually, expect, numbers
from tests.browser.running import Server

OpenPage = Callable[..., Any]
TEXT = "The queen went into the forest, and when"
OTHER = "The prince went into the dark forest, and when"
PROMPT = "#/p?a=The+queen+went+into+the+forest%2C+and+when&t=%5B%22+she%22%5D&d=%5B%22+he%22%5D"
TWO = f"{PROMPT}&b=%22The+prince+went+into+the+dark+forest%2C+and+when%22"
ROWS = "table.nodes tbody tr[data-key]"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.load("tiny-tales")


def difference(model: Transformer, text: str, hooks: TransformerHooks | None = None) -> float:
    """The logit of " she" minus that of " he" after a text."""
    with torch.no_grad():
        logits = model([model.prompt_ids(text)[0]], hooks=hooks)[0][0, -1].double()
    she, he = (model.prompt_ids(word)[0][0] for word in (" she", " he"))
    return float(logits[she] - logits[he])


def shown_difference(page: Any, prompt: str = "A") -> float:
    """The logit difference that the page shows."""
    value = page.locator(f"[data-prompt='{prompt}'] .main b").get_attribute("data-value")
    return float(value)


def ready(page: Any) -> None:
    """Wait for the table, and until nothing is on its way."""
    expect(page.locator(ROWS).first).to_be_visible()
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def test_the_numbers_are_the_librarys(open_page: OpenPage, model: Transformer) -> None:
    page = open_page(PROMPT)
    ready(page)
    assert shown_difference(page) == pytest.approx(difference(model, TEXT), abs=1e-4)
    last = len(model.prompt_ids(TEXT)[0]) - 1
    table = nodes(model, TEXT, logit_difference(model, " she", " he"), top_k=20, positions=[last])
    keys = page.eval_on_selector_all(ROWS, "rows => rows.map((row) => row.dataset.key)")
    expected = {
        f"{n.location}|{n.kind}|{n.unit}|{n.position}|": i for i, n in enumerate(table.nodes)
    }
    assert set(keys) == set(expected)
    for measure, values in table.values.items():
        found = numbers(page, f"{ROWS} td[data-measure={measure}]")
        assert found == pytest.approx([values[expected[key]] for key in keys], abs=1e-4)
    assert [expected[key] for key in keys] == table.order("act_grad")
    coverage = float(page.locator("[data-coverage]").get_attribute("data-coverage"))
    assert coverage == pytest.approx(table.coverage(), abs=1e-4)


def test_a_head_that_is_ablated_by_key_changes_what_hooks_change(
    open_page: OpenPage, model: Transformer
) -> None:
    page = open_page(PROMPT)
    ready(page)
    before = shown_difference(page)
    key = page.locator(f"{ROWS}.current").get_attribute("data-key")
    location, kind, unit, position, _ = key.split("|")
    assert kind == "head"
    page.keyboard.press("a")
    expect(page.locator(".tray li")).to_have_count(1)
    ready(page)
    changed = difference(model, TEXT, ablate(location, int(unit), int(position)))
    assert shown_difference(page) == pytest.approx(changed, abs=1e-4)
    assert abs(changed - before) > 0.1
    tray = page.locator(".tray-sum")
    # What the server kept of earlier requests decides from where it computes: the last bits may differ.
    assert float(tray.get_attribute("data-before")) == pytest.approx(before, abs=1e-5)
    page.keyboard.press("u")
    expect(page.locator(".tray li")).to_have_count(0)
    ready(page)
    assert shown_difference(page) == pytest.approx(before, abs=1e-5)
    page.keyboard.press("U")
    ready(page)
    assert shown_difference(page) == pytest.approx(changed, abs=1e-4)


def test_a_trace_lists_what_comes_before_and_leads_back(open_page: OpenPage) -> None:
    page = open_page(f"{PROMPT}&only=neuron")
    ready(page)
    row = page.locator(ROWS).first
    layer = int(row.get_attribute("data-key").split("/")[0])
    page.keyboard.press("t")
    trail = page.get_by_role("navigation", name="Trace")
    expect(trail).to_contain_text("neuron")
    page.get_by_label("Filter nodes").fill("")
    ready(page)
    keys = page.eval_on_selector_all(ROWS, "rows => rows.map((row) => row.dataset.key)")
    layers = [int(key.split("/")[0]) for key in keys if key[0].isdigit()]
    assert keys
    assert max(layers) <= layer
    own = [key for key in keys if key.startswith(f"{layer}/mlp") and "|bias|" not in key]
    assert not own, "the units beside it are no cause of it"
    trail.get_by_role("button", name="Logit difference").click()
    expect(trail).to_be_hidden()
    ready(page)


def test_a_node_that_cannot_be_traced_says_why(open_page: OpenPage) -> None:
    page = open_page(f"{PROMPT}&only=embedding")
    ready(page)
    page.keyboard.press("t")
    expect(page.get_by_text("nothing comes before it")).to_be_visible()
    expect(page.get_by_role("navigation", name="Trace")).to_be_hidden()


@pytest.mark.parametrize("through", ["query", "key", "query and key", "value"])
def test_a_head_is_traced_through_each_of_its_inputs(open_page: OpenPage, through: str) -> None:
    page = open_page(f"{PROMPT}&only=L3+head")
    ready(page)
    page.keyboard.press("Enter")
    expect(page.locator(".node-detail h3", has_text="Looks at")).to_be_visible()
    buttons = page.get_by_role("group", name=re.compile("^Trace"))
    buttons.get_by_role("button", name=re.compile(f"^{through}( t)?$")).click()
    expect(page.get_by_role("navigation", name="Trace")).to_contain_text(f", {through}")
    page.get_by_label("Filter nodes").fill("")
    ready(page)


def test_two_prompts_of_other_lengths_are_aligned(open_page: OpenPage, model: Transformer) -> None:
    page = open_page(f"{TWO}&pos=all")
    ready(page)
    for prompt, text in (("A", TEXT), ("B", OTHER)):
        expected = difference(model, text)
        assert shown_difference(page, prompt) == pytest.approx(expected, abs=1e-4)
    before = {}
    for key, (a, b, both) in effects_of_two(page).items():
        if a and b:
            assert float(both) == pytest.approx(float(a) - float(b), abs=1e-9)
            before[key] = float(both)
        else:
            assert both == ""
    page.keyboard.press("2")
    expect(page.locator("table.matrix thead th.alone")).to_have_text("dark")
    page.keyboard.press("x")
    page.keyboard.press("1")
    expect(page.get_by_label("Text of Prompt A")).to_have_value(OTHER)
    ready(page)
    dark = 5  # the token that the first prompt does not have
    after = {
        (unit, at - (at > dark)): float(both)
        for (unit, at), (_, _, both) in effects_of_two(page).items()
        if both
    }
    shared = before.keys() & after.keys()
    assert len(shared) > 20
    assert [after[k] for k in shared] == pytest.approx([-before[k] for k in shared], abs=1e-4)


def effects_of_two(page: Any) -> dict[tuple[str, int], list[str]]:
    """Of each node, by unit and position in A: its total effect in A and B, and their difference."""
    rows = page.eval_on_selector_all(
        ROWS,
        "rows => rows.map((row) => [row.dataset.key, ...['A', 'B', 'diff'].map((side) =>"
        "row.querySelector(`[data-measure=act_grad][data-side=${side}]`).dataset.value)])",
    )
    found = {}
    for key, *values in rows:
        unit, _, rest = key.rpartition("|")[0].rpartition("|")
        if rest.isdigit():
            found[unit, int(rest)] = values
    return found


def test_two_streams_part_and_stop(open_page: OpenPage, server: Server) -> None:
    change = '[["3/attn.v_out","head",4,8,null,"zero",null]]'
    page = open_page(f"{PROMPT}&tab=generate&gen=[8,0,1,0]&iv={change}")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.get_by_text("They part at new token 0")).to_be_visible()
    streams = {name: page.locator(f"[data-stream={name}] .new") for name in ("baseline", "changed")}
    for said in streams.values():
        expect(said).to_have_count(8)
        expect(said.first).to_have_class(re.compile("parted"))
    assert streams["baseline"].first.inner_text() == " she"
    assert streams["changed"].first.inner_text() == " he"
    page.get_by_label("Tokens", exact=True).fill("128")
    page.evaluate(
        "setInterval(() => { const stop = document.querySelector('button.stop');"
        "if (document.querySelectorAll('.new').length > 6) stop?.click(); }, 5)"
    )
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.get_by_text("Stopped")).to_be_visible()
    eventually(lambda: ask(page, server, "health")["queue_depth"] == 0, "an empty queue", 1.0)
    assert streams["changed"].count() < 128


def test_the_lens_ends_with_what_the_model_says(open_page: OpenPage, model: Transformer) -> None:
    page = open_page(f"{PROMPT}&tab=lens")
    rows = page.locator(".lens-table tbody tr")
    expect(rows).to_have_count(model.n_layers + 1)  # and the embedding
    last = rows.first.locator("button").last
    with torch.no_grad():
        logits = model([model.prompt_ids(TEXT)[0]])[0][0, -1].double()
    assert float(last.get_attribute("data-prob")) == pytest.approx(
        float(logits.softmax(dim=-1).max()), abs=1e-4
    )
    expect(last).to_have_text("she")


def test_the_attention_of_a_head_is_the_models(open_page: OpenPage, model: Transformer) -> None:
    page = open_page(f"{PROMPT}&tab=attention&head=3.4")
    table = page.locator("table.pair-table")
    expect(table).to_be_visible()
    found = model.capture(TEXT, "3/attn.qk_probs")["3/attn.qk_probs"][0, :, :, 4].detach()
    n = len(found)
    expected = [float(found[q, k]) for q in range(n) for k in range(q + 1)]
    assert numbers(page, "table.pair-table td") == pytest.approx(expected, abs=1 / 400)
    expect(page.locator(".heads button.head")).to_have_count(24)


def test_a_candidate_becomes_the_target(open_page: OpenPage) -> None:
    page = open_page(f"#/p?a={TEXT.replace(' ', '+')}")
    page.get_by_role("button", name='Use " they" as target').click()
    expect(page.locator(".chip code")).to_have_text("␣they")
    page.get_by_label("Add a distractor token of Prompt").fill("he")
    page.keyboard.press("Enter")
    expect(page.locator(".chip code").nth(1)).to_have_text(re.compile("he"))
    page.get_by_label("Add a target token of Prompt").fill("no such single token")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Give one token")).to_be_visible()


def test_the_changed_model_stands_beside_the_unchanged_one(
    open_page: OpenPage, model: Transformer
) -> None:
    change = '[["3/attn.v_out","head",4,8,null,"zero",null]]'
    page = open_page(f"{PROMPT}&iv={change}")
    page.get_by_label("beside the unchanged model").check()
    ready(page)
    expect(page.get_by_role("button", name="Sort by Activation, before")).to_be_visible()
    target = logit_difference(model, " she", " he")
    plain = nodes(model, TEXT, target, top_k=20, positions=[8])
    expected = {
        (f"{n.location}|{n.kind}|{n.unit}", n.position): value
        for n, value in zip(plain.nodes, plain.values["act_grad"], strict=True)
    }
    found = {key: float(before) for key, (_, before, _) in effects_of_two(page).items() if before}
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("place", "unit"),
    [("1/mlp.post_act", 7), ("2/resid.torso.post_mlp", 3), ("3/attn.q", 2), ("0/attn.v_out", None)],
)
def test_a_unit_that_no_table_lists_is_changed(
    open_page: OpenPage, model: Transformer, place: str, unit: int | None
) -> None:
    page = open_page(PROMPT)
    ready(page)
    page.get_by_role("button", name="Any unit").click()
    form = page.get_by_role("form", name="Change any unit")
    layer, path = place.split("/")
    form.get_by_label("Layer").select_option(layer)
    form.get_by_label("Place").select_option(path)
    form.get_by_role("spinbutton").fill("" if unit is None else str(unit))
    form.get_by_role("button", name="Set to 0").click()
    expect(page.locator(".tray li")).to_have_count(1)
    ready(page)
    expected = difference(model, TEXT, ablate(place, unit))
    assert shown_difference(page) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - difference(model, TEXT)) > 1e-3
    page.reload()
    ready(page)
    assert shown_difference(page) == pytest.approx(expected, abs=1e-4)


def test_a_latent_is_set_to_a_value_at_one_token(open_page: OpenPage, model: Transformer) -> None:
    page = open_page(PROMPT)
    ready(page)
    page.get_by_role("button", name="Any unit").click()
    form = page.get_by_role("form", name="Change any unit")
    form.get_by_label("Layer").select_option("2")
    form.get_by_label("Place").select_option(LATENTS)
    form.get_by_role("spinbutton").fill("43")
    form.get_by_role("button", name="Set to 0").click()
    name = "L2 MLP latent 43"
    page.get_by_label(f"What happens to {name}").select_option("set")
    page.get_by_label(f"Value for {name}").fill("9")
    page.keyboard.press("Enter")
    page.get_by_label(f"Tokens at which {name} changes").select_option("8")
    expect(page.locator(".tray-sum")).to_be_visible()
    ready(page)
    context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp")
    hooks = set_to("2/resid.torso.delta_mlp", 9.0, 43, 8, autoencoders=context)
    expected = difference(model, TEXT, hooks)
    eventually(lambda: abs(shown_difference(page) - expected) < 1e-4, "the changed difference")
    assert abs(expected - difference(model, TEXT)) > 1e-3


LATENTS_EVERYWHERE = f"{PROMPT}&mlp=latent&attn=latent&pos=all&k=50"
WATCH_ROWS = """() => {
    window.seen = [];
    const look = () => {
        const rows = [...document.querySelectorAll('table.nodes tr[data-key]')];
        const keys = rows.map((row) => row.dataset.key);
        const line = document.querySelector('#panel-nodes .what')?.innerText ?? '';
        const last = window.seen.at(-1);
        const same = last?.keys.join() === keys.join() && last?.line === line;
        if (keys.length && !same) window.seen.push({ keys, line });
        requestAnimationFrame(look);
    };
    look();
}"""


def test_rows_come_as_they_are_computed_and_keep_their_places(
    open_page: OpenPage, server: Server, model: Transformer
) -> None:
    page = open_page("#/d")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.evaluate(WATCH_ROWS)
    with server.model_slowed():
        page.evaluate("(hash) => { location.hash = hash; }", LATENTS_EVERYWHERE)
        expect(page.get_by_text(re.compile(r"layer \d of 4"))).to_be_visible()
    ready(page)
    seen = page.evaluate("window.seen")
    before = [each for each in seen if "so far" in each["line"]]
    assert len({each["line"] for each in before}) > 2, "it is said how far it is"
    for one, after in pairwise(before):
        assert after["keys"][: len(one["keys"])] == one["keys"], "no row moves"
    assert set(seen[-1]["keys"]) != set(before[0]["keys"])
    shown = seen[-1]["keys"]
    # An intervention leaves the rows where they are until all the new ones are there.
    page.evaluate("window.seen = []")
    with server.model_slowed():
        page.keyboard.press("a")
        expect(page.get_by_text("so far")).to_be_visible()
        expect(page.locator(".tray-sum b")).not_to_have_text("\u2013")
    ready(page)
    seen = page.evaluate("window.seen")
    assert all(each["keys"] == shown for each in seen if "so far" in each["line"])


def test_a_request_is_stopped_by_a_key(open_page: OpenPage, server: Server) -> None:
    page = open_page("#/d")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    # Of a text that no other test gives: nothing of it is kept, so that the reply takes its time.
    unseen = LATENTS_EVERYWHERE.replace("queen", "prince") + "&k=60"
    assert "prince" in unseen
    with server.model_slowed(0.03, 0.1):
        page.evaluate("(hash) => { location.hash = hash; }", unseen)
        expect(page.get_by_text("so far")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".failure")).to_contain_text("Stopped")
        eventually(lambda: ask(page, server, "health")["queue_depth"] == 0, "an empty queue")
    page.get_by_role("button", name="Try again").click()
    ready(page)
    expect(page.locator("[data-coverage]")).to_be_visible()
