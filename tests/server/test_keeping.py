"""What is kept between requests changes how long an answer takes, and not a bit of it."""

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.analysis.node_parts import Encoding, Pass
from neuron_explainer.kernels.graph_memory import storages_of
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.server.compute.keeping import Kept, bytes_of
from neuron_explainer.server.compute.operations import Session
from neuron_explainer.server.compute.setup import Setup
from neuron_explainer.server.limits import Limits
from tests.server.clients import app_with
from tests.server.computed import ask, assert_same, make_setup

METRICS = ["activation", "write_norm", "direct", "act_grad"]
TEXT = {"text": "the cats", "target": ["a", "b"], "distractor": ["z"]}
LATENTS = {"mlp": "latent", "attention": "latent"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A model that others can change, of which nothing is kept."""
    return make_setup(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def setup(shared: Setup) -> Setup:
    """The same model, which the session opens itself, so that nobody else can change it."""
    return Setup(shared.model.model_name, shared.dictionaries, device="cpu")


@pytest.fixture
def session(setup: Setup) -> Session:
    return Session(setup)


def debug(session: Session, **request: Any) -> Any:
    given = {"prompts": [TEXT], "metrics": METRICS, "top_k": 6, "top_logits": 5, **request}
    reply = ask(session, "debug", **given)
    del reply["timings"]
    return reply


def model_of(session: Session) -> Transformer:
    assert isinstance(session.model, Transformer)
    return session.model


def numbers(reply: Any) -> Any:
    """A reply without its script, which names the model."""
    return {name: value for name, value in reply.items() if name != "python"}


def at(location: str, unit: int | None = None, position: int | None = None, **more: Any) -> Any:
    return {"location": location, "unit": unit, "position": position, **more}


CHANGES: list[dict[str, Any]] = [
    {"node": at("0/attn.v_out", 1), "action": "zero"},
    {"node": at("1/attn.v_out", 2, 3), "action": "zero"},
    {"node": at("1/attn.v_out", 2, 4), "action": "zero"},
    {"node": at("1/mlp.post_act", 5), "action": "scale", "value": 3.0},
    {"node": at("1/mlp.post_act", 5), "action": "scale", "value": 4.0},
    {"node": at("1/resid.torso.delta_mlp", 7, dictionary="mlp.1"), "action": "set", "value": 2.0},
    {"node": at("1/resid.torso.delta_mlp", 7, dictionary="mlp.1"), "action": "mean"},
    {"node": at("1/mlp.post_act", 6), "action": "swap", "source": "old hat"},
    {"node": at("1/mlp.post_act", 6), "action": "swap", "source": "the hat"},
    {"node": at("resid.post_emb", 3, 0), "action": "set", "value": 1.0},
    {"node": at("logits", 97), "action": "set", "value": 1.0},
]  # fmt: skip


def requests() -> list[dict[str, Any]]:
    """Requests that share much and differ in one thing, in an order that mixes them."""
    found: list[dict[str, Any]] = []
    single = [[change] for change in CHANGES]
    for units, several in (
        ({}, single[:3]),
        (LATENTS, [*single, CHANGES[1:4], CHANGES[3:0:-1]]),
        ({"attention": "pair"}, single[2:4]),
    ):
        for changes in ([], *several):
            found.append({"units": units, "interventions": changes, "position": "all"})
        found += [{"units": units, "position": -1}, {"units": units, "position": 2, "top_k": 2}]
        found.append({"units": units, "prompts": [TEXT | {"target": ["c"]}], "position": "all"})
        found.append({"units": units, "trace": {"node": at("1/mlp.post_act", 5, -1)}})
    found.append({"prompts": [TEXT, {"text": "old cats"}], "interventions": CHANGES[3:4]})
    random.Random(0).shuffle(found)
    return found


def test_what_is_kept_does_not_change_a_bit(session: Session, shared: Setup) -> None:
    alone = Session(shared)
    for request in requests():
        assert_same(numbers(debug(session, **request)), numbers(debug(alone, **request)), 0)
    assert len(session.results) > 20
    assert len(alone.results) == 0


def test_only_what_has_changed_is_computed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that run and dictionaries that encode, request by request."""
    ran: list[Any] = []
    for layer in model_of(session).layers:
        layer.register_forward_pre_hook(lambda layer, _: ran.append(layer.layer_idx))
    encode = Autoencoder.code_sparse

    def noted(self: Autoencoder, x: torch.Tensor) -> Any:
        ran.append(str(self.location))
        return encode(self, x)

    monkeypatch.setattr(Autoencoder, "code_sparse", noted)

    def computed(**request: Any) -> list[Any]:
        ran.clear()
        debug(session, units=LATENTS, **request)
        return sorted(ran, key=str)

    at_0 = ["0/resid.torso.delta_attn", "0/resid.torso.delta_mlp"]
    at_1 = ["1/resid.torso.delta_attn", "1/resid.torso.delta_mlp"]
    assert computed() == [0, *at_0, 1, *at_1]
    assert computed(top_k=3, metrics=["direct"], layers=[1]) == []
    assert computed(prompts=[TEXT | {"target": ["c"]}]) == []
    # Another position needs no pass, but is read by the dictionaries.
    assert computed(position=2) == [*at_0, *at_1]
    # The unchanged logits, to compare with, take a pass of their own once.
    mlp = {"node": at("1/mlp.post_act", 5), "action": "zero"}
    assert computed(interventions=[mlp]) == [0, 1, 1, "1/resid.torso.delta_mlp"]
    head = {"node": at("1/attn.v_out", 2), "action": "zero"}
    assert computed(interventions=[head]) == [1, *at_1]
    assert computed(interventions=[head, mlp]) == [1, "1/resid.torso.delta_mlp"]
    first = {"node": at("0/mlp.post_act", 2), "action": "zero"}
    assert computed(interventions=[first]) == [0, "0/resid.torso.delta_mlp", 1, *at_1]
    assert computed() == []


def test_a_changed_model_is_not_answered_from_what_was_kept(
    session: Session, setup: Setup, tmp_path: Path
) -> None:
    before = debug(session, units=LATENTS)
    weight = next(model_of(session).layers).mlp.out_layer.weight
    with torch.no_grad():
        weight.mul_(1.5)
    after = debug(session, units=LATENTS)
    assert after["values"] != before["values"]
    model_of(session).save(tmp_path / "changed")
    fresh = Session(Setup(str(tmp_path / "changed"), setup.dictionaries, device="cpu"))
    assert_same(numbers(after), numbers(debug(fresh, units=LATENTS)), 0)


def test_a_changed_dictionary_is_not_answered_from_what_was_kept(
    setup: Setup, tmp_path: Path
) -> None:
    """Its file is another when it is read again, as there was no room to keep it in memory."""
    source = next(each for each in setup.dictionaries if each.id == "mlp.0")
    path = tmp_path / "mlp.0"
    autoencoder = Autoencoder.load(source.autoencoder or "")
    autoencoder.save(path)
    own = Setup(setup.model, (type(source)("mlp.0", source.location, "latent", str(path)),))
    session = Session(own)
    request: dict[str, Any] = {"units": {"mlp": "latent"}, "dictionaries": ["mlp.0"]}
    change = {"node": at(source.location, 3, dictionary="mlp.0"), "action": "set", "value": 2.0}
    requests = [request, request | {"interventions": [change]}]
    before = [debug(session, **each) for each in requests]
    with torch.no_grad():
        autoencoder.decoder.weight.mul_(2)
    autoencoder.save(path, overwrite=True)
    assert [debug(session, **each) for each in requests] == before  # it is still in memory
    session._loaded.clear()
    after = [debug(session, **each) for each in requests]
    for one, other, each in zip(before, after, requests, strict=True):
        assert one["values"] != other["values"]
        assert_same(other, debug(Session(own), **each), 0)
    with torch.no_grad():
        session.autoencoder("mlp.0").decoder.weight.mul_(2)
    assert debug(session, **request)["values"] != after[0]["values"]


def test_of_a_model_that_others_can_change_nothing_is_kept(tmp_path: Path) -> None:
    session = Session(make_setup(tmp_path))
    before = debug(session, interventions=CHANGES[:1])
    assert len(session.results) == 0
    # Neither torch nor we can see this change.
    next(model_of(session).layers).mlp.out_layer.weight.data.mul_(2)
    assert debug(session, interventions=CHANGES[:1])["values"] != before["values"]


def test_results_take_no_more_than_their_bytes(setup: Setup) -> None:
    roomy = Session(setup)
    debug(roomy)
    one = roomy.results.bytes
    assert one > 10_000
    small = Session(Setup(setup.model, setup.dictionaries, device="cpu", kept=int(2.5 * one)))
    for number, request in enumerate(requests()[:20]):
        debug(small, **request)
        held: dict[int, int] = {}
        for _, value in small.results.beginning_with():
            if isinstance(value, Pass | Encoding):
                held |= storages_of(value.tensors())
        known = [model_of(small), *small._loaded.values()]
        weights = storages_of(weight for each in known for weight in each.parameters())
        really = sum(size for place, size in held.items() if place not in weights)
        assert really <= small.results.bytes <= small.results.limit, number
    assert len(small.results) > 1
    none = Session(Setup(setup.model, setup.dictionaries, device="cpu", kept=0))
    debug(none)
    assert len(none.results) == none.results.bytes == 0


def test_the_limit_of_the_application_is_that_of_its_worker() -> None:
    app = app_with(model="tiny-tales", limits=Limits(kept_bytes=7))
    assert app.state.serving.compute.setup.kept == 7


def test_what_is_kept_does_not_hold_a_dictionary_that_must_go(setup: Setup) -> None:
    size = sum(
        p.numel() * p.element_size() for p in Session(setup).autoencoder("mlp.0").parameters()
    )
    session = Session(Setup(setup.model, setup.dictionaries, device="cpu", budget=size * 3 // 2))
    debug(session, interventions=[CHANGES[5]])
    debug(session, units={"mlp": "latent"}, dictionaries=["mlp.1"])
    held = weakref.ref(session.autoencoder("mlp.1"))
    n_results = len(session.results)
    session.autoencoder("mlp.0")
    gc.collect()
    assert held() is None
    assert 0 < len(session.results) < n_results


def test_the_result_used_longest_ago_goes_first() -> None:
    kept = Kept(100)
    for name in "abc":
        kept.put(name, name, 30)
    assert kept.get("a") == "a"
    assert kept.beginning_with() == []
    kept.put("d", "d", 40, ["one"])
    assert [kept.get(name) for name in "abcd"] == ["a", None, "c", "d"]
    kept.put("a", "again", 50)
    assert (kept.get("a"), kept.get("c"), kept.bytes) == ("again", None, 90)
    kept.put("e", "e", 101)
    assert (kept.get("e"), len(kept)) == (None, 2)
    kept.forget("one")
    assert (kept.get("d"), kept.bytes) == (None, 50)
    kept.clear()
    assert (len(kept), kept.bytes) == (0, 0)
    for number in range(3):
        kept.put(("some", number), number, 40)
        assert (("some", number), number) in kept.beginning_with("some")  # and is not used by that
    assert kept.beginning_with("some") == [(("some", 1), 1), (("some", 2), 2)]
    assert bytes_of({"a": [torch.zeros(100), "x" * 50]}) >= 450
