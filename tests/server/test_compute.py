"""Tokens, activations, attention, lens, generation and units: against the library and by their scripts."""

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch

from neuron_explainer.analysis.directions import Directions
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import ablate, align, set_to, steer
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.server.compute.operations import Session
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.setup import DictionarySource, Setup
from tests.server.computed import N_LATENTS, ask, assert_same, make_setup, parts, result_of

TEXT = "the cats"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(make_setup(tmp_path_factory.mktemp("model")))


def captured(session: Session, place: str, text: str = TEXT) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = session.model.capture(text, place)[place][0]
    return found


def test_tokens_of_a_text_and_bytes_that_are_no_character(session: Session) -> None:
    reply = ask(session, "tokenize", text="aé<|endoftext|>")
    assert reply["ids"] == [97, 0xC3, 0xA9, 256]
    assert reply["vocab"] == {"97": "a", "195": "\ufffd", "169": "\ufffd", "256": "<|endoftext|>"}
    assert reply["vocab_bytes"] == {"195": "c3", "169": "a9"}
    assert result_of(reply)["ids"] == reply["ids"]
    assert ask(session, "tokenize", text="")["ids"] == []


@pytest.mark.parametrize("dictionary", ["mlp.1", "acts.0", "neurons.0"])
def test_activations_are_those_of_the_encoder(dictionary: str, session: Session) -> None:
    source = session.sources[dictionary]
    values = [captured(session, source.location, text) for text in (TEXT, "dogs")]
    if source.kind == "latent":
        with torch.no_grad():
            values = [session.autoencoder(dictionary).encode(each) for each in values]
    request = {"texts": [TEXT, "dogs"], "dictionary": dictionary}
    reply = ask(session, "activations", **request, units=[3, 7])
    for row, expected in zip(reply["texts"], values, strict=True):
        for unit in row["units"]:
            dense = torch.zeros(len(expected))
            for position, value in unit["acts"]:
                dense[position] = value
            assert_same(dense.tolist(), expected[:, unit["unit"]].tolist())
    chosen = [each[:, [3, 7]].tolist() for each in values]
    assert_same(result_of(reply)["values"], chosen)
    reply = ask(session, "activations", **request, top_k=4)
    found = result_of(reply)["values"]
    for row, expected, by_script in zip(reply["texts"], values, found, strict=True):
        for token, value, theirs in zip(row["tokens"], expected, by_script, strict=True):
            order = value.abs().argsort(descending=True, stable=True)[:4]
            assert [each["unit"] for each in token] == order.tolist()
            assert_same([each["value"] for each in token], theirs)
    assert reply["scale"] == pytest.approx(max(float(each.abs().max()) for each in values))


def test_attention_is_sent_as_bytes(session: Session) -> None:
    heads = [[1, 2], [0, 3]]
    for kind in ("pattern", "write_norm"):
        reply = ask(session, "attention", text=TEXT, heads=heads, kind=kind)
        (length,) = struct.unpack("<I", reply[:4])
        header = json.loads(reply[4 : 4 + length])
        body = np.frombuffer(reply[4 + length :], np.uint8).reshape(2, -1)
        n = len(TEXT)
        assert header["shape"] == [2, n, n]
        assert body.shape == (2, n * (n + 1) // 2)
        exact = np.array(result_of(header)["values"])[:, *np.tril_indices(n)]
        np.testing.assert_allclose(body / 255 * header["scale"], exact, atol=header["scale"] / 254)
        if kind == "pattern":
            expected = captured(session, "1/attn.qk_probs")[:, :, 2].numpy()
            np.testing.assert_allclose(exact[0], expected[np.tril_indices(n)], atol=1e-6)
        else:
            assert header["scale"] == pytest.approx(exact.max(), rel=1e-5)


def test_one_head_in_detail(session: Session) -> None:
    reply = ask(session, "head", text=TEXT, layer=1, head=2)
    pattern = captured(session, "1/attn.qk_probs")[:, :, 2]
    assert_same(reply["pattern"], [row[: i + 1] for i, row in enumerate(pattern.tolist())])
    pair = reply["pairs"][0]
    v = captured(session, "1/attn.v")[pair["attended"], 2]
    assert isinstance(session.model, Transformer)
    layer = list(session.model.layers)[1]
    write = layer.attn.out_proj.weight.detach().view(16, 4, 4)[:, 2] @ v
    weight = float(pattern[pair["position"], pair["attended"]])
    assert_same([pair["pattern"], pair["write_norm"]], [weight, weight * float(write.norm())])
    found = result_of(reply)
    assert_same(found["pattern"], reply["pattern"])
    promotes = [[[each["id"], each["value"]] for each in of["promotes"]] for of in reply["ov"]]
    assert_same(found["promotes"], promotes)
    demotes = [[[each["id"], each["value"]] for each in of["demotes"]] for of in reply["ov"]]
    assert_same(found["demotes"], demotes)
    names = ("position", "attended", "write_norm")
    assert_same(found["pairs"], [[pair[name] for name in names] for pair in reply["pairs"]])


def test_latents_at_the_two_ends_of_a_head(session: Session) -> None:
    """Against every pair of directions by hand, without the norm's scales and biases."""
    request = {"layer": 1, "head": 2, "queries": "attn.0", "keys": "mlp.0", "k": 7}
    reply = ask(session, "head_latents", **request)
    assert isinstance(session.model, Transformer)
    layer = list(session.model.layers)[1]
    read = []
    for name in (request["queries"], request["keys"]):
        rows = session.autoencoder(str(name)).decoder.weight.detach().T.double()
        rows = (rows - rows.mean(dim=1, keepdim=True)) * layer.ln_1.weight.detach().double()
        read.append(rows)
    q, k = (
        x.weight.detach().double().view(4, 4, 16)[2] for x in (layer.attn.q_proj, layer.attn.k_proj)
    )
    scores = (read[0] @ q.T) @ (read[1] @ k.T).T / 2
    best = scores.flatten().topk(7)
    assert_same([pair["score"] for pair in reply["pairs"]], best.values.tolist())
    found = [pair["query"]["unit"] * N_LATENTS + pair["key"]["unit"] for pair in reply["pairs"]]
    assert found == best.indices.tolist()
    by_script = [[p["query"]["unit"], p["key"]["unit"], p["score"]] for p in reply["pairs"]]
    assert_same(result_of(reply)["pairs"], by_script)


def test_the_lens_reads_the_stream(session: Session) -> None:
    reply = ask(session, "lens", text=TEXT, points=["mid", "post"], positions=[2, -1], k=3)
    assert reply["positions"] == [2, len(TEXT) - 1]
    assert [(p["layer"], p["point"]) for p in reply["points"]] == [
        (None, "embedding"), (0, "mid"), (0, "post"), (1, "mid"), (1, "post"),
    ]  # fmt: skip
    with torch.no_grad():
        probs = session.model(TEXT)[0][0, -1].softmax(dim=-1)
    top = probs.topk(3)
    assert reply["ids"][-1][-1] == top.indices.tolist()
    assert_same(reply["probs"][-1][-1], top.values.tolist())
    assert_same(result_of(reply), {name: reply[name] for name in ("ids", "probs", "kl")})
    mid = ask(session, "lens", text=TEXT, points=["mid"], positions=None, k=1)
    assert [p["point"] for p in mid["points"]] == ["mid", "mid"]
    assert len(mid["ids"][0]) == len(TEXT)


GENERATE = {
    "prompt": "cats", "max_new": 6, "seed": 3, "temperature": 1.0, "top_p": 0.9, "baseline": True,
}  # fmt: skip
HEAD = {"node": {"location": "0/attn.v_out", "unit": 1, "position": None}, "action": "zero"}
LATENT = {
    "node": {"location": "1/resid.torso.delta_mlp", "unit": 5, "position": None,
             "dictionary": "mlp.1"},
    "action": "add",
    "value": 40.0,
}  # fmt: skip


SWAP = {"node": LATENT["node"], "action": "swap", "source": "hats"}


def test_a_latent_of_another_prompt_is_swapped_in_at_the_tokens_of_the_prompt_alone(
    session: Session,
) -> None:
    request = {**GENERATE, "temperature": 0.0, "top_p": None, "interventions": [SWAP]}
    end = ask(session, "generate", **request)
    assert result_of(end) == end["tokens"]
    place, own = "1/resid.torso.delta_mlp", session.autoencoder("mlp.1")
    with torch.no_grad():
        values = own.encode(captured(session, place, "hats"))[:, 5].tolist()
    there = align(list(b"cats"), list(b"hats")).tolist()
    contexts = session.contexts(["mlp.1"])[0]
    pairs = [(here, values[at]) for here, at in enumerate(there) if at >= 0]
    each = [set_to(place, value, 5, here, autoencoders=contexts) for here, value in pairs]
    expected = session.model.sample("cats", 6, 0.0, hooks=sum(each, TransformerHooks()))
    assert end["tokens"]["changed"] == expected["tokens"][0]


@pytest.mark.parametrize("changes", [[], [HEAD], [HEAD, LATENT]])
def test_texts_go_on_side_by_side(changes: list[Any], session: Session) -> None:
    request = {**GENERATE, "interventions": changes}
    tokens, end = parts(session, "generate", **request), ask(session, "generate", **request)
    names = ["baseline", "changed"] if changes else ["baseline"]
    assert [name for name, _ in tokens] == ["token"] * len(tokens)
    tokens = [each for _, each in tokens]
    assert [each["stream"] for each in tokens] == names * 6
    hooks = ablate("0/attn.v_out", 1)
    if len(changes) == 2:
        hooks = hooks + steer("1/resid.torso.delta_mlp", (session.autoencoder("mlp.1"), 5), 40.0)
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    expected = {
        name: session.model.sample("cats", 6, hooks=each, **settings)["tokens"][0]
        for name, each in (("baseline", None), ("changed", hooks))
        if name in names
    }
    for name in names:
        assert [each["id"] for each in tokens if each["stream"] == name] == expected[name]
    assert end["tokens"] == expected
    assert result_of(end) == expected
    assert all(0 < each["prob"] <= 1 for each in tokens)
    if changes:
        same = [a == b for a, b in zip(*expected.values(), strict=True)]
        assert end["diverged_at"] == (same.index(False) if False in same else None)
    if len(changes) == 2:
        assert end["diverged_at"] is not None


def test_a_generation_ends_with_the_context(session: Session) -> None:
    end = ask(session, "generate", **{**GENERATE, "max_new": 100, "interventions": []})
    assert len(end["tokens"]["baseline"]) == 12 - len("cats") + 1


@pytest.mark.parametrize("dictionary", ["mlp.1", "neurons.0"])
def test_the_tokens_of_a_unit(dictionary: str, session: Session) -> None:
    reply = ask(session, "logits", dictionary=dictionary, unit=4, k=5)
    source = session.sources[dictionary]
    what: Any = source.location if source.kind == "neuron" else session.autoencoder(dictionary)
    expected = Directions(session.context, what).top_logits(4, 5)
    assert [each["id"] for each in reply["top"]] == [each.token for each in expected.top]
    assert_same(reply["histogram"]["counts"], list(expected.counts))
    assert len(reply["excited_by"]) == 5
    found = result_of(reply)
    assert_same(found["top"], [[each["id"], each["value"]] for each in reply["top"]])
    assert_same(found["bottom"], [[each["id"], each["value"]] for each in reply["bottom"]])
    if reply["excited_by"] is not None:
        excited = [[each["id"], each["value"]] for each in reply["excited_by"]]
        assert_same(found["excited_by"], excited)


def test_neighbours_and_the_map(session: Session) -> None:
    reply = ask(session, "neighbours", dictionary="mlp.0", unit=4, k=3)
    rows = torch.nn.functional.normalize(session.autoencoder("mlp.0").directions, dim=1)
    cosines = (rows @ rows[4]).detach()
    cosines[4] = -2
    best = cosines.topk(3)
    assert [each["unit"] for each in reply["items"]] == best.indices.tolist()
    found = result_of(reply)
    assert_same(found["cosines"], best.values.tolist())
    reply = ask(session, "map", dictionary="mlp.0")
    assert reply["unit"] == list(range(N_LATENTS))
    places = [list(pair) for pair in zip(reply["x"], reply["y"], strict=True)]
    assert_same(result_of(reply)["coordinates"], places)


@pytest.mark.parametrize(
    "node",
    [
        {"location": "1/mlp.post_act", "unit": 3},
        {"location": "1/attn.v_out", "unit": 2, "position": 5},
        {"location": "0/attn.qk_probs", "unit": 2, "position": 5, "attended": 1},
        {"location": "1/resid.torso.delta_mlp", "dictionary": "mlp.1"},
        {"location": "1/mlp.post_act", "dictionary": "acts.1"},
    ],
    ids=lambda node: node.get("dictionary", node["location"]),
)
def test_a_row_in_detail(node: dict[str, Any], session: Session) -> None:
    given = {**node}
    if "dictionary" in given:  # one that is active at the last token
        values = session.autoencoder(given["dictionary"]).encode(
            captured(session, given["location"])[-1]
        )
        given["unit"] = int(values.argmax())
    reply = ask(
        session,
        "node",
        node=given,
        prompts=[{"text": TEXT, "target": ["a"]}],
        metrics=["act_grad"],
        top_k=1,
        top_logits=1,
        units={"mlp": "latent"},
    )
    found = result_of(reply)
    for name in ("promotes", "demotes", "excited_by"):
        if reply[name] is not None:
            assert_same(found[name], [[each["id"], each["value"]] for each in reply[name]])
    assert (reply["excited_by"] is None) == ("attn" in given["location"])
    if reply["attends"] is not None:
        assert_same(found["attends_to"], reply["attends"]["to"])
    if "attn" in given["location"]:
        layer = given["location"][0]
        pattern = captured(session, f"{layer}/attn.qk_probs")[:, :, 2]
        assert_same(reply["attends"]["to"], pattern[5, :6].tolist())
    if "dictionary" in given:
        assert reply["activation"] == pytest.approx(float(values.max()), rel=1e-4)


NO_LATENT = {"location": "0/resid.torso.delta_mlp", "dictionary": "mlp.0", "unit": 40}


@pytest.mark.parametrize(
    ("operation", "request_", "status", "code"),
    [
        ("activations", {"texts": ["a"], "dictionary": "mlp.0", "units": [40]}, 404, None),
        ("activations", {"texts": ["a" * 13], "dictionary": "mlp.0", "units": [4]}, 413, None),
        ("attention", {"text": "a", "heads": [[2, 0]], "kind": "pattern"}, 422, "no_such_head"),
        ("head", {"text": "a", "layer": 0, "head": 4}, 422, "no_such_head"),
        (
            "head_latents",
            {"layer": 1, "head": 4, "queries": "mlp.0", "keys": "mlp.0", "k": 3},
            422,
            "no_such_head",
        ),
        (
            "head_latents",
            {"layer": 1, "head": 0, "queries": "mlp.0", "keys": "neurons.0", "k": 3},
            422,
            "no_autoencoder",
        ),
        (
            "node",
            {"prompts": [{"text": "a"}], "metrics": ["act_grad"], "node": NO_LATENT},
            422,
            "no_such_node",
        ),
        ("logits", {"dictionary": "mlp.0", "unit": 40, "k": 3}, 404, "index_out_of_range"),
        ("neighbours", {"dictionary": "neurons.0", "unit": 4, "k": 3}, 422, "no_autoencoder"),
        ("map", {"dictionary": "neurons.0"}, 404, "no_map"),
        ("map", {"dictionary": "mpl.0"}, 404, "unknown_dictionary"),
        (
            "lens",
            {"text": "a", "points": ["post"], "positions": [1], "k": 1},
            422,
            "no_such_position",
        ),
    ],
)
def test_what_is_refused(
    operation: str, request_: dict[str, Any], status: int, code: str | None, session: Session
) -> None:
    with pytest.raises(Refusal) as error:
        ask(session, operation, **request_)
    assert error.value.status == status
    assert code in (None, error.value.code)


# --- the budget of autoencoders ---


def test_autoencoders_share_a_budget(session: Session) -> None:
    ids = ["mlp.0", "mlp.1", "attn.0", "attn.1"]
    session.drop_caches()
    session.autoencoders(ids)
    each = session._held() // len(session._loaded)
    session.drop_caches()
    setup = session.setup
    small = Session(Setup(setup.model, setup.dictionaries, budget=int(2.9 * each)))
    small.autoencoders(["mlp.0"])
    small.autoencoders(["mlp.1"])
    small.autoencoders(["mlp.0"])
    small.autoencoders(["attn.0"])
    assert list(small._loaded) == ["mlp.0", "attn.0"]  # the one used longest ago is gone
    with pytest.raises(Refusal) as error:
        small.autoencoders(ids)
    assert (error.value.status, error.value.code) == (507, "dictionary_budget")
    assert "MiB" in error.value.detail


def test_autoencoders_without_a_store_get_an_id(session: Session) -> None:
    known = session.setup.dictionaries
    path = str(session.sources["mlp.0"].autoencoder)
    orphan = DictionarySource("orphan", "0/resid.torso.delta_mlp")
    found = Session(Setup(session.context, (orphan,), (path,)))
    assert found.sources["orphan"].autoencoder == path
    assert found.autoencoder("orphan").n_latents == N_LATENTS
    alone = Session(Setup(session.context, (), (path,)))
    (source,) = alone.sources.values()
    assert source.location == "0/resid.torso.delta_mlp"
    assert (
        not Session(Setup(session.context, known, (path,))).sources.keys() - session.sources.keys()
    )
    named = Session(Setup("tiny-tales", (), ("ae-resid-delta-mlp/2",), device="cpu"))
    assert [each.location for each in named.sources.values()] == ["2/resid.torso.delta_mlp"]
