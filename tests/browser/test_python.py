"""What every panel copies as Python gives what the panel shows, or what the reply says that it drew."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.browser.helpers import LATENTS, expect, numbers
from tests.browser.test_accessible import PAGES, PROMPT, settled
from tests.server.computed import assert_same

OpenPage = Callable[..., Any]
WITHOUT = {
    "limits",  # of this server, which the library does not have
    "head-list",  # links
    "bookmarks",  # notes of the user, as are the next two
    "labels",
    "label-files",
    "try",  # nothing has been asked there yet
    "fires",
}


# --- what is copied, and what it gives ---

COPY = """() => {
    let text = null;
    navigator.clipboard.writeText = async (copied) => { text = copied; };
    const press = (button) => { text = null; button?.click(); return text; };
    return [...document.querySelectorAll('.panel[data-panel], .node-detail')].map((part) => ({
        panel: part.dataset.panel ?? 'node-detail',
        json: press(part.matches('.panel') ? part.querySelector('[data-tool=json]') : null),
        python: press(part.querySelector(':scope > header [data-tool=python]')),
    }));
}"""
CHANGED = '&iv=[["3/attn.v_out","head",4,8,null,"zero",null]]'
TRACED = '&tr=[["2/mlp.post_act","neuron",7,8,null,null,null]]'
TEXT = "The%20king%20went%20home"
ROUTES = {
    "feature": f"#/f/{LATENTS}/3?try=%5B%22{TEXT}%22%5D",
    "neuron": "#/f/0.mlp.post_act.neurons/3",
    "dictionaries": "#/d",
    "dictionary": f"#/d/{LATENTS}?sort=max&text={TEXT}",
    "prompt": f"{PROMPT}{CHANGED}&row=3/attn.v_out%7Chead%7C0%7C8%7C",
    "latents": f"{PROMPT}&mlp=latent&attn=latent&pos=all",
    "trace": PROMPT + TRACED,
    "two prompts": PAGES["two prompts"],
    "matrix": PAGES["matrix"],
    "attention": f"{PROMPT}&tab=attention&head=2.1",
    "lens": f"{PROMPT}&tab=lens",
    "generate": f"{PROMPT}&tab=generate&gen=[6,0,1,0]{CHANGED}",
    "head": "#/h/3/4",
    "model": "#/m/2/mlp.post_act",
    "factors": "#/factors",
    "factor": "#/factors/tales/0",
}


def pairs_of(items: list[dict[str, Any]]) -> list[list[Any]]:
    """Tokens and values, as scripts list them."""
    return [[each["id"], each["value"]] for each in items]


def dense(acts: list[list[float]], n: int) -> list[float]:
    values = [0.0] * n
    for place, value in acts:
        values[int(place)] = value
    return values


def of_examples(page: Any, shown: Any, record: Any) -> None:
    places = {(e.group, e.interval, e.rank): e for e in record.all_examples}
    found = [places[each["group"], each["interval"], each["rank"]] for each in shown]
    assert found
    assert_same([each["value"] for each in shown], [each.value for each in found])
    assert [each["ids"] for each in shown] == [each.tokens.tolist() for each in found]
    for each, example in zip(shown, found, strict=True):
        assert_same(dense(each["acts"], len(each["ids"])), example.activations.tolist())
    drawn = numbers(page, "#panel-examples .example", "data-value")
    assert_same(drawn, [each.value for each in found])


def of_values(page: Any, shown: Any, record: Any) -> None:
    filled = record.histogram.nonzero()[0]
    assert shown["counts"] == record.histogram[filled[0] : filled[-1] + 1].tolist()
    assert numbers(page, "#panel-values [data-bin]", "data-count") == shown["counts"]


def of_logits(page: Any, shown: Any, result: Any) -> None:
    for name in ("top", "bottom"):
        assert_same(result[name], pairs_of(shown[name]))
    assert result["counts"] == shown["histogram"]["counts"]
    drawn = page.locator("#panel-logits .token-bars td").all_inner_texts()
    values = [value for name in ("top", "bottom") for _, value in result[name]]
    assert [text.replace("\u2212", "-") for text in drawn] == [f"{x:.3f}" for x in values]


def of_try(page: Any, shown: Any, result: Any) -> None:
    for text, values in zip(shown["texts"], result["values"], strict=True):
        acts = dense(text["units"][0]["acts"], len(text["ids"]))
        assert_same(acts, [value for (value,) in values])
    drawn = numbers(page, "#panel-try .t[data-value]")
    assert_same(drawn, [x for each in result["values"] for (x,) in each if x])


def of_fires(page: Any, shown: Any, result: Any) -> None:
    for text, tokens in zip(shown["texts"], result["values"], strict=True):
        found = [[unit["value"] for unit in token] for token in text["tokens"]]
        assert_same(found, [[x for x in token if x] for token in tokens])
    assert page.locator("#panel-fires tbody tr").count() == len(found[-1])


def of_stores(page: Any, shown: Any, result: Any) -> None:
    figures = ("n", "n_alive", "n_dense")
    assert {each["id"]: {name: each[name] for name in figures} for each in shown} == result


def of_units(page: Any, shown: Any, result: Any) -> None:
    units = [each["unit"] for each in shown["items"]]
    assert len(units) >= 100
    assert [int(unit) for unit in result[: len(units)]] == units


def of_map(page: Any, shown: Any, result: Any) -> None:
    points = np.array(result["coordinates"])[shown["unit"]]
    assert_same([shown["x"], shown["y"]], points.T.tolist())


def of_nodes(page: Any, shown: Any, result: Any) -> None:
    assert_same(result["values"], shown["values"])
    assert shown["nodes"]
    for side, values in result["values"]["act_grad"].items():
        selector = f"table.nodes td[data-measure=act_grad][data-side={side}]"
        drawn = [float(x) for x in texts_of(page, selector) if x]
        # The table shows its first rows only.
        expected = sorted(x for x in values if x == x)
        assert len(drawn) in (len(expected), 60)
        assert_same(sorted(drawn), expected if len(drawn) == len(expected) else sorted(drawn))
    figures = [each["goal_value"] for each in shown["prompts"]]
    assert_same(result["goal_values"], figures)


def texts_of(page: Any, selector: str) -> list[str]:
    """What ``data-value`` says of all elements that fit; it may be empty."""
    found = page.eval_on_selector_all(selector, "all => all.map((one) => one.dataset.value)")
    return [str(each) for each in found]


def of_candidates(page: Any, shown: Any, result: Any) -> None:
    names = ("id", "logit", "prob")
    tops = [[[each[name] for each in prompt] for name in names] for prompt in shown]
    assert_same(result["next_tokens"], tops)
    drawn = numbers(page, "#panel-candidates tr[data-token]", "data-token")
    assert drawn == result["next_tokens"][0][0]


def of_effects(page: Any, shown: Any, result: Any) -> None:
    assert_same(result["token_effects"], shown)
    drawn = numbers(page, "#panel-effects [data-prompt=A] [data-part=mlp] .t[data-value]")
    assert_same(drawn, [x for x in result["token_effects"][0]["mlp"].tolist() if x])


def of_matrix(page: Any, shown: Any, result: Any) -> None:
    assert_same(result["values"], shown["values"])
    sums: dict[tuple[Any, ...], float] = {}
    for node, value in zip(shown["nodes"], result["values"]["act_grad"]["A"], strict=True):
        key = (node["location"], node["kind"], node["unit"], node["position"])
        sums[key] = sums.get(key, 0.0) + value
    drawn = [float(x) for x in texts_of(page, "table.matrix td") if x]
    units = {key[:3]: max(abs(v) for k, v in sums.items() if k[:3] == key[:3]) for key in sums}
    strongest = sorted(units, key=lambda unit: -units[unit])[:40]
    expected = [value for key, value in sums.items() if key[:3] in strongest]
    assert_same(sorted(drawn), sorted(expected))


def of_heads(page: Any, shown: Any, result: Any) -> None:
    for rows, pattern in zip(shown["values"], result["values"], strict=True):
        check_pattern(rows, pattern)


def of_one_head(page: Any, shown: Any, result: Any) -> None:
    check_pattern(shown["values"], result["values"][4 * 0 + heads_before(page, shown)])
    drawn = numbers(page, "#panel-one-head td")
    assert_same(drawn, [x for row in shown["values"] for x in row])


def heads_before(page: Any, shown: Any) -> int:
    """The place of a head among the pictures."""
    label = f"Layer {shown['layer']} head {shown['head']}:"
    labels = page.locator(".heads button.head").evaluate_all("all => all.map(b => b.ariaLabel)")
    return next(i for i, each in enumerate(labels) if each.startswith(label))


def check_pattern(rows: list[list[float]], pattern: list[list[float]]) -> None:
    """A pattern is sent in steps of 1/255."""
    for number, row in enumerate(rows):
        assert row == pytest.approx(pattern[number][: number + 1], abs=0.5 / 255 + 1e-5)


def of_pattern(page: Any, shown: Any, result: Any) -> None:
    exact = [row[: i + 1] for i, row in enumerate(result["values"][0])]
    assert_same(shown["pattern"], exact)
    drawn = numbers(page, "#panel-pattern td")
    assert drawn == pytest.approx([x for row in exact for x in row], abs=0.5 / 255 + 1e-5)


def of_head_pairs(page: Any, shown: Any, result: Any) -> None:
    names = ("position", "attended", "write_norm")
    assert_same(result["pairs"], [[each[name] for name in names] for each in shown])
    drawn = numbers(page, "#panel-head-pairs td[data-value]")
    assert_same(drawn, [value for *_, value in result["pairs"][:15]])


def of_head_latents(page: Any, shown: Any, result: Any) -> None:
    found = [[each["query"]["unit"], each["key"]["unit"], each["score"]] for each in shown]
    assert_same(result["pairs"], found)
    drawn = numbers(page, "#panel-head-latents td[data-value]")
    assert_same(drawn, [score for *_, score in result["pairs"]])


def of_ov(page: Any, shown: Any, result: Any) -> None:
    for name in ("promotes", "demotes"):
        assert_same(result[name], [pairs_of(each[name]) for each in shown])
    assert page.locator("#panel-ov tbody tr").count() == len(shown)


def of_lens(page: Any, shown: Any, result: Any) -> None:
    assert_same(result, {name: shown[name] for name in ("ids", "probs", "kl")})
    drawn = numbers(page, ".lens-table button", "data-prob")
    assert_same(drawn, [x[0] for point in reversed(result["probs"]) for x in point])


def of_generate(page: Any, shown: Any, result: Any) -> None:
    for name, ids in result.items():
        assert [each["id"] for each in shown[name]] == ids
        assert numbers(page, f"[data-stream={name}] .new", "data-id") == ids


def of_detail(page: Any, shown: Any, result: Any) -> None:
    lists = {"Promotes": "promotes", "Demotes": "demotes", "Excited by": "excited_by"}
    for title in page.locator(".node-detail .token-list h3").all_inner_texts():
        if title in lists:
            part = f".node-detail .token-list:has(h3:text-is('{title}')) li"
            ids, values = numbers(page, part, "data-token"), numbers(page, part)
            assert_same(
                [list(each) for each in zip(ids, values, strict=True)], result[lists[title]]
            )
    texts = page.locator(".node-detail .token-list:has(h3:text-is('Looks at')) li > span")
    shown_weights = [float(text) for text in texts.all_inner_texts()]
    expected = sorted(result["attends_to"], reverse=True)[: len(shown_weights)]
    assert shown_weights == pytest.approx(expected, abs=5e-4)


def of_place(page: Any, shown: Any, result: Any) -> None:
    said = page.locator("#panel-place .shape dd").all_inner_texts()
    sizes = [int(text.replace(",", "")) if text else None for text in said]
    assert len(result.shape) == len(sizes)
    for size, expected in zip(sizes, result.shape, strict=True):
        assert size in (None, expected)


def of_factors(page: Any, shown: Any, result: Any) -> None:
    assert {each["factor"]: each["importance"] for each in shown["factors"]} == result


def of_sentences(page: Any, shown: Any, result: Any) -> None:
    scores = [[each["score"] for each in layer["examples"]] for layer in shown]
    assert_same(scores, result["scores"])
    drawn = numbers(page, "#panel-sentences .example", "data-score")
    assert drawn == scores[0]


def javascript(digits: str) -> float:
    """A whole number as a browser reads it: a seed of 63 bits loses its last digits."""
    return float(digits)


CHECKS: dict[str, Callable[[Any, Any, Any], None]] = {
    "examples": of_examples,
    "values": of_values,
    "labels": lambda _, shown, record: assert_same(
        [each["text"] for each in shown], [each.text for each in record.labels]
    ),
    "partners": lambda _, shown, record: assert_same(
        [[each["unit"], each["both"], each["jaccard"]] for each in shown],
        [[each.unit, each.both, each.jaccard] for each in record.partners],
    ),
    "logits": of_logits,
    "inputs": lambda _, shown, result: assert_same(result["excited_by"], pairs_of(shown)),
    "neighbours": lambda _, shown, result: assert_same(
        [[each[name] for each in shown] for name in ("unit", "cosine")],
        [result["units"], result["cosines"]],
    ),
    "try": of_try,
    "fires": of_fires,
    "dictionaries": of_stores,
    "dictionary-grid": of_stores,
    "units": of_units,
    "density": lambda _, shown, result: assert_same(result["counts"], shown["counts"]),
    "map": of_map,
    "provenance": lambda _, shown, result: assert_same(
        json.loads(json.dumps([result["provenance"], result["settings"]]), parse_int=javascript),
        json.loads(json.dumps([shown["provenance"], shown["settings"]]), parse_int=javascript),
    ),
    "nodes": of_nodes,
    "candidates": of_candidates,
    "effects": of_effects,
    "matrix": of_matrix,
    "heads": of_heads,
    "one-head": of_one_head,
    "pattern": of_pattern,
    "head-pairs": of_head_pairs,
    "head-latents": of_head_latents,
    "ov": of_ov,
    "lens": of_lens,
    "generate": of_generate,
    "node-detail": of_detail,
    "places": lambda _, shown, result: assert_same(result, [each["path"] for each in shown]),
    "place": of_place,
    "tokenizer": lambda _, shown, result: assert_same(result["ids"], shown["ids"]),
    "run-tales": of_factors,
    "importance": lambda _, shown, result: assert_same(result["importance"], shown["importance"]),
    "sentences": of_sentences,
}


@pytest.mark.parametrize("name", ROUTES)
def test_what_panels_copy_gives_what_they_show(open_page: OpenPage, name: str) -> None:
    page = open_page(ROUTES[name])
    settled(page)
    if name == "generate":
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.get_by_text("They part at")).to_be_visible()
    results: dict[str, Any] = {}
    seen = set()
    for part in page.evaluate(COPY):
        panel, script = part["panel"], part["python"]
        if script is None:
            assert panel in WITHOUT, f"{panel} copies no Python"
            continue
        if script not in results:  # panels of one reply share their script
            names: dict[str, Any] = {}
            exec(compile(script, f"the script of {panel}", "exec"), names)
            results[script] = names["result"]
        shown = None if part["json"] is None else json.loads(part["json"])
        CHECKS[panel](page, shown, results[script])
        seen.add(panel)
    assert seen
