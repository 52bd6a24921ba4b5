"""Drawing tokens, and capturing activations: the settings, the distributions, the errors."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import InputError, LocationError, SourceError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES, ActivationLocation
from neuron_explainer.models.sampling import nucleus_sample, sample_from_logits
from neuron_explainer.models.transformer import Transformer, TransformerLayer
from tests.conftest import ONCE, TINY, assert_close, gradients, keep_in, make_model, random_tokens

TOKENS = random_tokens(2, 5, seed=6)
LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()  # likeliest first: 1, 3, 2, 0


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The probabilities that each draw is made from."""
    seen: list[Tensor] = []
    real = torch.multinomial

    def spy(probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(probs)
        return real(probs, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spy)
    return seen  # type: ignore[return-value]


# ---------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
        ({"temperature": 1e-44}, [0, 1, 0, 0]),
        ({"temperature": 1e30}, [0.25] * 4),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"top_k": 4}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_k": 100}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        # 0.5 < 0.51: the token that crosses (3, from 0.5 to 0.75) is kept
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.76}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"top_p": 0.91}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        # after top_k=3 the shares are 0.56, 0.28, 0.17: two tokens reach 0.8 (of all: three)
        ({"top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3]),
        # at temperature 1/2 the shares are 0.72, 0.18, 0.07, 0.03: one token reaches 0.7
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_the_distribution_of_a_draw(
    settings: dict[str, Any], expected: list[float], drawn_from: list[Tensor]
) -> None:
    for logits in (LOGITS, LOGITS.expand(2, 3, 4), LOGITS + 50, LOGITS.double(), LOGITS - 1e3):
        drawn_from.clear()
        before = logits.clone()
        token = sample_from_logits(logits, **settings)
        assert token.shape == logits.shape[:-1]
        assert token.dtype == torch.long
        assert torch.equal(logits, before)
        (probs,) = drawn_from
        assert_close(
            probs,
            torch.tensor(expected).expand_as(probs),
            1e-3 if logits[..., 0].max() < -99 else 1e-5,
        )
        assert (probs.reshape(-1, 4).gather(1, token.reshape(-1, 1)) > 0).all()
        impossible = torch.tensor([share == 0 for share in expected]).expand_as(probs)
        assert float(probs[impossible].sum()) == 0


def test_nucleus_sample(drawn_from: list[Tensor]) -> None:
    token = nucleus_sample(LOGITS.expand(3, 4), 0.6)
    assert token.shape == (3,)
    assert_close(drawn_from[0], torch.tensor([[0, 2 / 3, 0, 1 / 3]] * 3), 1e-6)
    # equal probabilities: exactly enough of them, the lowest ids
    nucleus_sample(torch.zeros(8), 0.5)
    assert drawn_from[1].reshape(-1).tolist() == [0.25] * 4 + [0] * 4
    # each row has its own nucleus
    nucleus_sample(torch.stack([LOGITS, LOGITS.flip(0), torch.zeros(4)]), 0.5001)
    assert (drawn_from[2] > 0).tolist() == [
        [False, True, False, True],
        [True, False, True, False],
        [True, True, True, False],
    ]


def test_the_whole_vocabulary_is_in_the_nucleus_of_one(drawn_from: list[Tensor]) -> None:
    """A long sum of small shares rounds past 1 before its end; no token is lost to that."""
    generator = torch.Generator().manual_seed(0)
    for logits in (torch.zeros(50257), torch.randn(50257, generator=generator)):
        drawn_from.clear()
        sample_from_logits(logits, top_p=1.0)
        assert int((drawn_from[0] > 0).sum()) == 50257


def test_banned_tokens_stay_banned(drawn_from: list[Tensor]) -> None:
    """A hook may set logits to -inf."""
    banned = LOGITS.clone()
    banned[1] = -math.inf
    for settings in (
        {},
        {"top_k": 3},
        {"top_p": 0.99},
        {"temperature": 0.3, "top_k": 4, "top_p": 1.0},
    ):
        drawn_from.clear()
        sample_from_logits(banned, **settings)
        assert float(drawn_from[0].reshape(-1)[1]) == 0
    assert int(sample_from_logits(banned, temperature=0)) == 3


def test_temperature_zero_takes_the_first_of_the_likeliest(drawn_from: list[Tensor]) -> None:
    logits = torch.tensor([[0.0, 2, 1, 2], [3, 1, 3, 3]])
    for settings in ({}, {"top_p": 0.1}, {"top_k": 1}):
        assert sample_from_logits(logits, temperature=0, **settings).tolist() == [1, 0]
    assert drawn_from == []


def test_settings_of_sample_reach_the_draw(
    tiny_model: Transformer, drawn_from: list[Tensor]
) -> None:
    expected = tiny_model(TOKENS)[0][:, -1].detach().div(0.7).softmax(-1)
    tiny_model.sample(TOKENS.tolist(), 1, 0.7)
    assert_close(drawn_from[0], expected, 1e-5)
    tiny_model.sample(TOKENS.tolist(), 1, 0.7, 0.8)  # top_p is fourth, as in the original
    tiny_model.sample(TOKENS.tolist(), 1, 0.7, top_k=2)
    for row in range(2):
        order = expected[row].argsort(descending=True)
        total, nucleus = 0.0, []
        for token in order.tolist():
            nucleus.append(token)
            total += float(expected[row, token])
            if total >= 0.8:
                break
        assert sorted(drawn_from[1][row].nonzero()[:, 0].tolist()) == sorted(nucleus)
        assert set(drawn_from[2][row].nonzero()[:, 0].tolist()) == set(order[:2].tolist())


# ------------------------------------------------------------------------------------ determinism


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_seed_gives_the_same_text(temperature: float, text_model: Transformer) -> None:
    prompts = ["First", "The second one"]

    def with_global_seed(seed: int) -> Any:
        torch.manual_seed(seed)
        return text_model.sample(prompts, 8, temperature)

    first, again, other = with_global_seed(0), with_global_seed(0), with_global_seed(1)
    assert first == again
    assert first["strings"] == again["strings"]
    assert (first == other) is (temperature == 0)
    assert text_model.sample(prompts, 8, temperature, seed=3) == text_model.sample(
        prompts, 8, temperature, seed=3
    )


def test_generators(tiny_model: Transformer) -> None:
    def sample(**kwargs: Any) -> Any:
        return tiny_model.sample([[1, 2], [3]], 8, **kwargs)["tokens"]

    generator = torch.Generator().manual_seed(5)
    first, second = sample(generator=generator), sample(generator=generator)
    assert first != second  # it moves on
    assert sample(seed=5) == first
    assert sample(generator=torch.Generator().manual_seed(5)) == first
    state = torch.get_rng_state()
    sample(seed=6)
    sample(generator=generator)
    sample(temperature=0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    with pytest.raises(InputError, match="give generator or seed, not both"):
        sample(generator=generator, seed=5)


def test_the_order_of_prompts_does_not_matter(text_model: Transformer) -> None:
    prompts = ["one", "and another", "the third of them"]
    forward = text_model.sample(prompts, 8, 0)
    backward = text_model.sample(prompts[::-1], 8, 0)
    for key in ("tokens", "strings"):
        assert backward[key] == forward[key][::-1]
    assert len({tuple(tokens) for tokens in forward["tokens"]}) > 1


# ------------------------------------------------------------------------------- prompts and ends


def test_every_form_of_prompt(text_model: Transformer) -> None:
    ids = list(b"abc")
    one = text_model.sample("abc", 4, 0)
    assert list(one) == ["tokens", "strings"]
    assert [len(row) for row in one["tokens"]] == [4]
    for prompts in (["abc"], ids, [ids], tuple(ids), (tuple(ids),)):
        result = text_model.sample(prompts, 4, 0)
        assert result["tokens"] == one["tokens"]
        assert result["strings"] == one["strings"]
    two = text_model.sample([ids, ids[:1]], 4, 0)
    assert two["tokens"][0] == one["tokens"][0]
    assert len(text_model.sample("abc")["tokens"][0]) == 5  # the default


def test_ids_need_no_vocabulary(tiny_model: Transformer) -> None:
    result = tiny_model.sample([1, 2, 3], 3)
    assert len(result["tokens"][0]) == 3
    with pytest.raises(SourceError, match="without a tokenizer"):
        result["strings"]
    with pytest.raises(SourceError, match="without a tokenizer"):
        tiny_model.sample("text", 3)
    with pytest.raises(KeyError):
        result["string"]


def forced(text: bytes | list[int], n_prompt: int) -> TransformerHooks:
    """Hooks that make a model write ``text`` after a prompt of ``n_prompt`` tokens."""

    def hook(x: Tensor, positions: Tensor) -> Tensor:
        for row, where in enumerate((positions[:, -1] + 1 - n_prompt).tolist()):
            x[row, -1] = 0
            x[row, -1, text[where % len(text)]] = 100
        return x

    hooks = TransformerHooks()
    hooks.logits.append_fwd(hook)
    return hooks


def test_characters_of_several_tokens_come_out_whole(text_model: Transformer) -> None:
    text = "né→日本🙂"
    new = text.encode()
    result = text_model.sample("ab", len(new), hooks=forced(new, 2))
    assert result["tokens"] == [list(new)]
    assert result["strings"] == [text]


def test_endoftext_in_a_prompt_is_the_token(text_model: Transformer) -> None:
    seen: list[Tensor] = []
    hooks = TransformerHooks()
    hooks.resid.post_emb.append_fwd(keep_in(seen))
    text_model.sample("a<|endoftext|>b", 1, hooks=hooks)
    assert seen[0].shape[1] == 3
    expected, _, _, _ = text_model.run_embed(torch.tensor([[97, 256, 98]]))
    assert torch.equal(seen[0], expected)
    for bos in (True, 256):
        seen.clear()
        text_model.sample("b", 1, hooks=hooks, bos=bos)
        assert torch.equal(seen[0], text_model.run_embed(torch.tensor([[256, 98]]))[0])
    seen.clear()
    text_model.sample("", 1, hooks=hooks, bos=True)
    assert seen[0].shape[1] == 1
    seen.clear()
    text_model.sample("b", 1, hooks=hooks, bos=0)  # the token 0, not "no start token"
    assert torch.equal(seen[0], text_model.run_embed(torch.tensor([[0, 98]]))[0])


def test_stops(text_model: Transformer) -> None:
    written = [*b"xyz", 256, *b"w"]

    def sample(stop: Any, hooks: TransformerHooks | None = None) -> Any:
        return text_model.sample(["ab", "cd"], 6, hooks=hooks or forced(written, 2), stop=stop)

    assert sample(None)["tokens"] == [[*b"xyz", 256, *b"wx"]] * 2  # exactly num_tokens
    for stop in (256, "<|endoftext|>", [256], ["<|endoftext|>", "w"], (256, 119)):
        result = sample(stop)
        assert result["tokens"] == [[*b"xyz"]] * 2  # the stop is not returned
        assert result["strings"] == ["xyz"] * 2
    assert sample(["q"])["tokens"] == sample(None)["tokens"]
    assert sample([])["tokens"] == sample(None)["tokens"]
    assert sample("x")["tokens"] == [[], []]
    assert sample("x")["strings"] == ["", ""]
    with pytest.raises(InputError, match=r"stop 'xy' must be one token, found 2: \[120, 121\]"):
        sample("xy")


def test_rows_that_have_ended_stand_still(text_model: Transformer) -> None:
    """They are pads to the others and to hooks: they take no position."""
    seen: list[list[int]] = []

    def hook(x: Tensor, positions: Tensor) -> Tensor:
        seen.append(positions[:, -1].tolist())
        x[:, -1] = 0
        x[0, -1, ord("z")] = x[1, -1, ord("x")] = 100
        return x

    hooks = TransformerHooks()
    hooks.logits.append_fwd(hook)
    result = text_model.sample(["ab", "cd"], 4, hooks=hooks, stop="z")
    assert result["strings"] == ["", "xxxx"]
    assert seen == [[1, 1], [2, 2], [2, 3], [2, 4]]


def test_nothing_runs_after_every_row_has_ended(text_model: Transformer) -> None:
    seen: list[Tensor] = []
    hooks = forced([*b"xyz"], 2)
    hooks.mlp.pre_act.append_fwd(keep_in(seen))
    text_model.sample(["ab"], 20, hooks=hooks, stop="z")
    assert len(seen) == 3 * 2  # x, y and the z that ends it, in two layers


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1]], {"num_tokens": 0}, r"num_tokens must be a whole number >= 1, found 0"),
        ([[1]], {"num_tokens": -3}, r"num_tokens .* found -3"),
        ([[1]], {"num_tokens": 2.5}, r"num_tokens .* found 2.5"),
        ([[1]], {"num_tokens": True}, r"num_tokens .* found True"),
        ([[1]], {"temperature": -0.1}, r"temperature must be a finite number >= 0, found -0.1"),
        ([[1]], {"temperature": math.nan}, r"temperature .* found nan"),
        ([[1]], {"temperature": math.inf}, r"temperature .* found inf"),
        ([[1]], {"top_p": 0}, r"top_p must lie in \(0, 1\] or be None, found 0"),
        ([[1]], {"top_p": 1.01}, r"top_p .* found 1.01"),
        ([[1]], {"top_p": math.nan}, r"top_p .* found nan"),
        ([[1]], {"top_k": 0}, r"top_k must be a whole number >= 1 or None, found 0"),
        ([[1]], {"top_k": 1.5}, r"top_k .* found 1.5"),
        ([], {}, r"prompts must hold at least one prompt, found none"),
        ((), {}, r"prompts must hold at least one prompt, found none"),
        ([[]], {}, r"prompt 0 has no tokens; .*bos=True"),
        ([[1], []], {}, r"prompt 1 has no tokens"),
        ([[1], "a"], {}, r"prompts must be a str, a list of str.* of \['list', 'str'\]"),
        ([1, [2]], {}, r"prompts must be .* of \['int', 'list'\]"),
        ([[1.5]], {}, r"prompts must be"),
        ([None], {}, r"prompts must be .* of \['NoneType'\]"),
        ([[1, 29]], {}, r"token ids must lie in 0 to 28, found 29"),
        ([[1, 2]], {"bos": 29}, r"token ids must lie in 0 to 28, found 29"),
        ([[1], [2] * 9], {"num_tokens": 5}, r"longest prompt has 9 tokens; .* context of 12"),
        ([[2] * 13], {"num_tokens": 1}, r"longest prompt has 13 tokens"),
        ([[2] * 12], {"num_tokens": 1, "bos": 3}, r"longest prompt has 13 tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_errors(
    prompts: Any, settings: dict[str, Any], message: str, tiny_model: Transformer
) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model.sample(prompts, **settings)


def test_empty_text(text_model: Transformer) -> None:
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        text_model.sample("")
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        text_model.sample(["a", ""])


def test_a_generation_may_fill_the_context(tiny_model: Transformer) -> None:
    for n_prompt in (1, 8, 12):
        result = tiny_model.sample([[3] * n_prompt, [5]], 13 - n_prompt, temperature=0)
        assert [len(row) for row in result["tokens"]] == [13 - n_prompt] * 2


def test_sampling_leaves_no_trace(tiny_model: Transformer) -> None:
    """No gradient, no mode, no parameter is changed, also when a hook raises on the way."""
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}

    def fail(x: Tensor, positions: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        if int(positions.max()) > 2:
            raise ZeroDivisionError
        return x

    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(fail)
    with pytest.raises(ZeroDivisionError):
        tiny_model.sample([[1, 2]], 5, hooks=hooks)
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[key], value) for key, value in tiny_model.state_dict().items())
    assert tiny_model.sample([[1, 2]], 5, 0) == tiny_model.sample([[1, 2]], 5, 0)


# ----------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize("path", SITES)
def test_capture_is_a_hook_at_each_place(path: str, tiny_model: Transformer) -> None:
    seen: list[Tensor] = []
    hooks = TransformerHooks().append_to_path(f"{path}.fwd", keep_in(seen))
    tiny_model(TOKENS, hooks=hooks)
    found = tiny_model.capture(TOKENS, path)
    layers = [None] if path in ONCE else [0, 1]
    assert list(found) == [ActivationLocation(path, layer) for layer in layers]
    for layer, expected in zip(layers, seen, strict=True):
        location = ActivationLocation(path, layer)
        assert torch.equal(found[location], expected)
        (alone,) = tiny_model.capture(TOKENS, location).values()
        assert_close(alone, expected, 1e-5)  # the other layer may run on other kernels
        assert found[str(location)] is found[location]  # text names a location too


def test_capture_of_everything_at_once(tiny_model: Transformer) -> None:
    found = tiny_model.capture(TOKENS, list(SITES))
    expected = {location: None for path in SITES for location in ActivationLocation(path).expand(2)}
    assert set(found) == set(expected)
    assert torch.equal(found.tokens, TOKENS)
    assert found.pad is None
    both = tiny_model.capture(
        TOKENS, ["1/mlp_post_act", "blocks.0.hook_resid_mid", "1/mlp.post_act"]
    )
    assert [str(location) for location in both] == ["0/resid.torso.post_attn", "1/mlp.post_act"]
    assert "mlp.post_act" in repr(both)
    assert tiny_model.capture(TOKENS, []) == {}


def test_missing_places_are_named(tiny_model: Transformer) -> None:
    found = tiny_model.capture(TOKENS, ["1/mlp.post_act", "resid.post_emb"])
    with pytest.raises(
        KeyError,
        match=r"0/mlp\.post_act was not captured; captured: resid\.post_emb, 1/mlp\.post_act",
    ):
        found["0/mlp.post_act"]
    for locations, message in [
        ("2/mlp.post_act", r"outside the model: it has layers 0 to 1"),
        (["0/mlp.post_act", "mlp.post"], r"unknown location 'mlp.post'.*Did you mean"),
        ("0/logits", r"exists once in a model"),
    ]:
        with pytest.raises(LocationError, match=message):
            tiny_model.capture(TOKENS, locations)


@pytest.mark.parametrize(
    ("locations", "layers", "final"),
    [
        ("resid.post_emb", [], False),
        ("0/attn.q", [0], False),
        ("0/resid.torso.post_mlp", [0], False),
        (["2/mlp.post_act", "0/attn.v"], [0, 1, 2], False),
        (["resid.post_emb", "1/resid.torso.delta_attn"], [0, 1], False),
        ("mlp.post_act", [0, 1, 2, 3], False),
        ("resid.ln_f.scale", [0, 1, 2, 3], True),
        (["logits", "0/attn.q"], [0, 1, 2, 3], True),
    ],
    ids=str,
)
def test_capture_stops_after_the_last_layer_needed(
    locations: Any, layers: list[int], final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran = make_model(n_layers=4), list[int]()
    real = TransformerLayer.forward

    def counted(self: TransformerLayer, *args: Any, **kwargs: Any) -> Any:
        ran.append(self.layer_idx)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TransformerLayer, "forward", counted)
    norms: list[int] = []
    model.final_ln.register_forward_hook(lambda *_: norms.append(1))
    unembedded: list[int] = []
    model.unembed.register_forward_hook(lambda *_: unembedded.append(1))
    model.capture(TOKENS, locations)
    assert ran == layers
    assert bool(norms) is final
    assert bool(unembedded) is ("logits" in locations)


def test_captured_values_are_those_after_hooks(tiny_model: Transformer) -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    plain = tiny_model.capture(TOKENS, "mlp.post_act")
    for kind in ("fwd", "fwd2"):
        hooks = TransformerHooks().append_to_path(f"mlp.post_act.{kind}", doubled)
        text = repr(hooks)
        found = tiny_model.capture(TOKENS, ["mlp.post_act", "logits"], hooks=hooks)
        assert torch.equal(found["0/mlp.post_act"], 2 * plain["0/mlp.post_act"])
        assert torch.equal(found["logits"], tiny_model(TOKENS, hooks=hooks)[0])
        assert repr(hooks) == text  # the caller's tree is left alone


def test_captured_values_take_part_in_gradients(tiny_model64: Transformer) -> None:
    """Forwards from captured values, and backwards to them."""
    found = tiny_model64.capture(TOKENS, ["1/mlp.post_act", "logits"])
    reached = gradients(tiny_model64, found["1/mlp.post_act"].sum())
    assert float(reached["tok_embed.weight"].abs().max()) > 0
    assert float(reached["unembed.weight"].abs().max()) == 0
    (grad,) = torch.autograd.grad(found["logits"][..., 3].sum(), found["1/mlp.post_act"])
    seen: list[Tensor] = []
    hooks = TransformerHooks().append_at("1/mlp.post_act", keep_in(seen), kind="bwd")
    gradients(tiny_model64, tiny_model64(TOKENS, hooks=hooks)[0][..., 3].sum())
    assert_close(grad, seen[0], 1e-13)
    with torch.no_grad():
        assert not tiny_model64.capture(TOKENS, "logits")["logits"].requires_grad


def test_capture_of_prompts(text_model: Transformer, tmp_path: Path) -> None:
    found = text_model.capture(["ab", "cde"], "0/mlp.post_act", bos=True)
    assert found.tokens.tolist() == [[256, 97, 98, 0], [256, 99, 100, 101]]
    assert found.pad is not None
    assert found.pad.tolist() == [[False, False, False, True], [False] * 4]
    assert text_model.capture("ab", "logits").tokens.tolist() == [[97, 98]]
    assert text_model.capture([97, 98], "logits").tokens.tolist() == [[97, 98]]
    calls: list[Callable[[], Any]] = [
        lambda: text_model.capture("ab", "logits", pad=torch.zeros(1, 2, dtype=torch.bool)),
        lambda: text_model.capture([], "logits"),
        lambda: text_model.capture(torch.tensor([97]), "logits"),
        lambda: text_model.capture(torch.tensor([97]), "logits", bos=True),
        lambda: text_model.capture(torch.tensor([[97]]), "logits", pad=torch.tensor([False])),
        lambda: text_model.capture(
            torch.tensor([[97]]), "logits", pad=torch.tensor([False]), bos=1
        ),
    ]
    for call in calls:
        with pytest.raises(InputError):
            call()


def test_sizes_of_this_file() -> None:
    assert (TINY.ctx_window, TINY.n_vocab) == (12, 29)
