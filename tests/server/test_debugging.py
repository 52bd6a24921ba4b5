"""The debugger's numbers against the library, by independent calls and by the script of each reply."""

from typing import Any

import numpy as np
import pytest
import torch

from neuron_explainer.analysis.effects import Node, nodes
from neuron_explainer.analysis.targets import logit_difference
from neuron_explainer.analysis.trace import trace
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import ablate, patch_from, scale
from neuron_explainer.server.compute.operations import Session, answer
from neuron_explainer.server.compute.refusals import Cancelled, Refusal
from tests.server.computed import ask, assert_same, make_setup, parts, result_of

TEXT, OTHER = "the cats", "the old cats"
METRICS = ["activation", "write_norm", "direct", "act_grad"]
PROMPT = {"text": TEXT, "target": ["a", "b"], "distractor": ["z"]}
SECOND = {"text": OTHER, "target": ["a"], "distractor": ["y"]}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(make_setup(tmp_path_factory.mktemp("model")))


def debug(session: Session, **request: Any) -> Any:
    given = {"prompts": [PROMPT], "metrics": METRICS, "top_k": 4, "top_logits": 5, **request}
    return ask(session, "debug", **given)


def difference(
    session: Session,
    hooks: TransformerHooks | None = None,
    text: str = TEXT,
    up: str = "ab",
    down: str = "z",
) -> float:
    with torch.no_grad():
        logits = session.model(text, hooks=hooks)[0][0, -1].double()
    return float(logits[[ord(c) for c in up]].mean() - logits[[ord(c) for c in down]].mean())


def at(location: str, unit: int | None = None, position: int | None = None, **more: Any) -> Any:
    return {"location": location, "unit": unit, "position": position, **more}


def test_tokens_of_interest_are_those_of_the_model(session: Session) -> None:
    reply = debug(session, loss=True)
    (prompt,) = reply["prompts"]
    assert prompt["ids"] == list(TEXT.encode())
    assert prompt["target_ids"] == [97, 98]
    assert prompt["distractor_ids"] == [122]
    assert reply["vocab"]["97"] == "a"
    with torch.no_grad():
        logits = session.model(TEXT)[0][0].double()
    probs = logits[-1].softmax(dim=-1)
    assert_same(prompt["target_probabilities"], probs[[97, 98]].tolist())
    assert [each["id"] for each in prompt["top_logits"]] == logits[-1].topk(5).indices.tolist()
    assert_same(prompt["top_logits"][0]["logit"], float(logits[-1].max()))
    assert_same(prompt["logit_difference"], difference(session))
    assert prompt["baseline_logit_difference"] == prompt["logit_difference"]
    ids = torch.tensor(prompt["ids"][1:])
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids)
    assert_same(prompt["loss"], float(loss))


@pytest.mark.parametrize("position", ["all", 3, -1])
def test_the_table_is_that_of_nodes(position: Any, session: Session) -> None:
    reply = debug(session, position=position)
    chosen = None if position == "all" else [position % len(TEXT)]
    target = logit_difference(session.model, [97, 98], [122])
    expected = nodes(session.model, TEXT, target, METRICS, 4, positions=chosen)
    shown = [
        (n["location"], n["kind"], n["unit"], n["position"], n["attended"]) for n in reply["nodes"]
    ]
    assert shown == [(n.location, n.kind, n.unit, n.position, n.attended) for n in expected.nodes]
    for metric in METRICS:
        assert_same(reply["values"][metric], {"A": expected.values[metric]})
        assert_same(reply["totals"][metric]["all"], expected.totals[metric])
    if position == "all":
        assert_same(reply["coverage"], expected.coverage("direct"))
        assert_same(reply["totals"]["direct"]["all"], difference(session))


def test_ablating_a_head_gives_the_difference_of_a_pass_with_hooks(session: Session) -> None:
    node = at("1/attn.v_out", 2, -1)
    (prompt,) = debug(session, interventions=[{"node": node, "action": "zero"}])["prompts"]
    hooks = ablate("1/attn.v_out", 2, len(TEXT) - 1)
    assert_same(prompt["logit_difference"], difference(session, hooks))
    assert_same(prompt["baseline_logit_difference"], difference(session))
    assert abs(prompt["logit_difference"] - prompt["baseline_logit_difference"]) > 1e-3


def test_two_prompts_have_the_same_nodes_and_an_edit_script(session: Session) -> None:
    reply = debug(session, prompts=[PROMPT, SECOND], position="all")
    assert [pair for pair in reply["aligned"] if None in pair] == [[None, n] for n in (3, 4, 5, 6)]
    assert_same(reply["prompts"][1]["logit_difference"], difference(session, None, OTHER, "a", "y"))
    target = logit_difference(session.model, 97, 121)
    there = nodes(session.model, OTHER, target, METRICS, 10**6)
    by_node = dict(zip(there.nodes, range(10**6), strict=False))
    both = 0
    for number, node in enumerate(reply["nodes"]):
        value = reply["values"]["act_grad"]["B"][number]
        if node["position_b"] is None:
            assert np.isnan(value)
            continue
        counterpart = Node(node["location"], node["kind"], node["unit"], node["position_b"])
        assert_same(value, float(there.values["act_grad"][by_node[counterpart]]))
        both += node["position"] is not None
    assert both > 3
    swapped = debug(session, prompts=[SECOND, PROMPT], position="all")
    rows = [
        {
            (n["location"], n["unit"], n[a], n[b]): (values["A"][i], values["B"][i])
            for i, n in enumerate(found["nodes"])
            for values in [found["values"]["act_grad"]]
        }
        for found, a, b in ((reply, "position", "position_b"), (swapped, "position_b", "position"))
    ]
    assert set(rows[0]) == set(rows[1])
    for key, (a, b) in rows[0].items():
        assert_same([a, b], list(reversed(rows[1][key])))


def test_a_trace_is_that_of_the_library(session: Session) -> None:
    node = {"location": "1/attn.qk_probs", "unit": 3, "position": 6, "attended": 2}
    ways: list[Any] = ["q", "k", "qk"]
    for through in ways:
        reply = debug(session, trace={"node": node, "through": through}, position="all")
        pair = Node("1/attn.qk_probs", "pair", 3, 6, 2)
        expected = trace(session.model, TEXT, pair, METRICS, 4, through=through)
        assert_same(reply["prompts"][0]["goal_value"], expected.target)
        assert_same(reply["values"]["direct"]["A"], expected.values["direct"])
        assert reply["goal"] == expected.target_name
    head = {"location": "1/attn.v_out", "unit": 0, "position": -1}
    reply = debug(session, trace={"node": head, "through": "v"})
    assert all(n["layer"] in (None, 0) or n["kind"] == "bias" for n in reply["nodes"])
    assert_same(reply["prompts"][0]["logit_difference"], difference(session))


def test_values_of_the_other_prompt_are_swapped_in(session: Session) -> None:
    swap = {"node": at("0/resid.torso.post_mlp", None, -1), "action": "swap", "source": "dogs"}
    (prompt,) = debug(session, interventions=[swap])["prompts"]
    there = session.model.capture("dogs", "0/resid.torso.post_mlp")
    place, last = "0/resid.torso.post_mlp", torch.full((len(TEXT),), -1)
    last[-1] = 3
    hooks = patch_from(place, there, positions=len(TEXT) - 1, index_map=last)
    assert_same(prompt["logit_difference"], difference(session, hooks))


LATENTS = {"mlp": "latent", "attention": "latent"}
NODE = at("0/resid.torso.delta_mlp", 7, dictionary="mlp.0")
REQUESTS: dict[str, dict[str, Any]] = {
    "heads": {},
    "pairs": {"units": {"attention": "pair"}, "position": "all", "layers": [1]},
    "latents": {"units": LATENTS, "dictionaries": ["mlp.0", "mlp.1", "attn.1"]},
    "latents of neurons": {"units": {"mlp": "latent"}, "dictionaries": ["acts.0", "acts.1"]},
    "two": {"prompts": [PROMPT, SECOND], "units": LATENTS, "position": "all"},
    "trace": {"trace": {"node": {"location": "1/mlp.post_act", "unit": 5}}},
    "trace of a latent": {
        "units": {"mlp": "latent"},
        "trace": {
            "node": {"location": "1/resid.torso.delta_mlp", "unit": 3, "dictionary": "mlp.1"}
        },
    },
    **{
        f"{action} of {what}": {
            "prompts": [PROMPT, SECOND],
            "interventions": [{"node": node, "action": action, "value": 1.5}],
        }
        for what, node, actions in [
            ("a latent", NODE, ("zero", "mean", "set", "scale", "add", "swap")),
            ("a latent at 2", {**NODE, "position": 2}, ("swap", "add")),
            (
                "a neuron",
                at("0/mlp.post_act", 7, 2),
                ("zero", "mean", "set", "scale", "add", "swap"),
            ),
            ("a head", at("0/attn.v_out", 1), ("zero", "mean", "scale", "swap")),
            ("a channel", at("0/resid.torso.post_mlp", 5, -1), ("set", "add")),
        ]
        for action in actions
    },
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_script_of_a_reply_gives_its_numbers(name: str, session: Session) -> None:
    reply = debug(session, **REQUESTS[name])
    found = result_of(reply)
    assert_same(found["values"], reply["values"])
    assert_same(found["goal_values"], [each["goal_value"] for each in reply["prompts"]])
    assert_same(found["token_effects"], [each["token_effects"] for each in reply["prompts"]])
    names = ("id", "logit", "prob")
    tops = [[[top[n] for top in each["top_logits"]] for n in names] for each in reply["prompts"]]
    assert_same(found["next_tokens"], tops)
    if REQUESTS[name].get("interventions"):
        changed, plain = (
            reply["prompts"][0][f"{which}logit_difference"] for which in ("", "baseline_")
        )
        assert changed != plain


@pytest.mark.parametrize(
    "request_",
    [
        {"units": LATENTS, "position": "all"},
        {"prompts": [PROMPT, SECOND], "units": LATENTS, "position": "all"},
        {"trace": {"node": {"location": "1/mlp.post_act", "unit": 5}}, "position": "all"},
        {"layers": [1], "metrics": ["activation", "direct"]},
    ],
)
def test_a_stream_gives_the_rows_of_each_sublayer_and_then_the_reply(
    request_: dict[str, Any], session: Session
) -> None:
    request = {"prompts": [PROMPT], "metrics": METRICS, "top_k": 4, "top_logits": 5, **request_}
    (name, started), *events = parts(session, "debug_streamed", **request)
    assert (name, {name for name, _ in events}) == ("started", {"nodes"})
    end, plain = ask(session, "debug_streamed", **request), ask(session, "debug", **request)
    for reply in (end, plain):
        del reply["timings"]
    assert_same(end, plain, 0)
    assert [each["number"] for _, each in events] == [*range(1, started.pop("sublayers") + 1)]
    assert started == {name: end[name] for name in started}
    assert {"prompts", "goal", "aligned", "vocab"} < set(started)

    streamed: dict[str, Any] = {}
    for _, each in events:
        for number, row in enumerate(each["nodes"]):
            assert row["layer"] == each["layer"]
            assert row["location"] in each["locations"]
            streamed[str(row)] = {
                metric: {prompt: values[number] for prompt, values in of_prompts.items()}
                for metric, of_prompts in each["values"].items()
            }
    assert len(streamed) >= len(end["nodes"]) > 3
    for number, row in enumerate(end["nodes"]):
        for metric, of_prompts in end["values"].items():
            for prompt, values in of_prompts.items():
                assert_same(streamed[str(row)][metric][prompt], values[number], 0)


def test_a_stream_is_cancelled_between_two_sublayers(session: Session) -> None:
    cancelled = False

    def guard() -> None:
        if cancelled:
            raise Cancelled

    request = {"prompts": [PROMPT], "metrics": METRICS, "top_k": 4, "top_logits": 5}
    events = answer(session, "debug_streamed", request, guard)
    assert [next(events)[1][0] for _ in range(2)] == ["started", "nodes"]
    cancelled = True
    with pytest.raises(Cancelled):
        next(events)


def test_several_interventions_act_together(session: Session) -> None:
    given = [
        {"node": at("0/attn.v_out", 1), "action": "zero"},
        {"node": at("1/mlp.post_act", 3, 5), "action": "scale", "value": 3.0},
    ]
    (prompt,) = debug(session, interventions=given)["prompts"]
    hooks = ablate("0/attn.v_out", 1) + scale("1/mlp.post_act", 3.0, 3, 5)
    assert_same(prompt["logit_difference"], difference(session, hooks))


@pytest.mark.parametrize(
    ("request_", "code", "allowed"),
    [
        ({"prompts": [{"text": "x" * 13}]}, "too_many_tokens", ["12"]),
        ({"prompts": [{"text": TEXT, "target": ["ab"]}]}, "not_one_token", ["a"]),
        ({"prompts": [{"text": TEXT, "target": [999]}]}, "not_one_token", None),
        ({"position": 8}, "no_such_position", ["-1", "0 to 7"]),
        ({"layers": [0, 2]}, "no_such_layer", ["0 to 1"]),
        ({"units": {"mlp": "latent"}, "dictionaries": ["mpl.0"]}, "unknown_dictionary", None),
        ({"dictionaries": ["mpl.0"]}, "unknown_dictionary", None),
        ({"trace": {"node": {**NODE, "unit": 40}}}, "no_such_node", ["0 to 39"]),
        (
            {"units": {"mlp": "latent"}, "dictionaries": ["mlp.0", "acts.1"]},
            "overlapping_dictionaries",
            ["mlp.0"],
        ),
        ({"trace": {"node": {"location": "0/attn.v", "unit": 0}}}, "unknown_node", None),
        (
            {"interventions": [{"node": at("0/attn.v_out", 1), "action": "set", "value": 1.0}]},
            "invalid_action",
            ["zero", "mean", "scale", "swap"],
        ),
        ({"interventions": [{"node": at("0/attn.v_out", 1), "action": "swap"}]}, "no_source", None),
        ({"interventions": [{"node": at("mlp.post_act", 1), "action": "zero"}]}, "no_layer", None),
        (
            {"interventions": [{"node": {**NODE, "location": "1/mlp.post_act"}, "action": "zero"}]},
            "wrong_location",
            ["0/resid.torso.delta_mlp"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(
    request_: dict[str, Any], code: str, allowed: Any, session: Session
) -> None:
    with pytest.raises(Refusal) as error:
        debug(session, **request_)
    assert error.value.code == code
    assert error.value.status in (404, 413, 422)
    if allowed is not None:
        assert error.value.allowed == allowed
