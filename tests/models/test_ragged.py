"""A batch row equals its solo run: whatever the pads, the cache, the hooks and the neighbours."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_explainer.models.hooks import AtLayers, TransformerHooks
from neuron_explainer.models.locations import SITES, ActivationLocation
from neuron_explainer.models.transformer import HiddenState, Transformer
from tests.conftest import (
    PER_LAYER,
    TINY,
    assert_close,
    assert_same_gradients,
    gradients,
    make_model,
    random_tokens,
)

MODELS = {dtype: make_model(dtype=dtype) for dtype in (torch.float32, torch.float64)}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


def fast(examples: int) -> Callable[..., Any]:
    """The same examples on every run, with no limit on the time of one."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Edit(NamedTuple):
    """What a hook does: scale one unit, everywhere or at one position of each row."""

    path: str
    layer: int
    unit: int
    factor: float
    position: int | None


class Batch(NamedTuple):
    """Rows of ids, None for a pad, cut into calls."""

    rows: list[list[int | None]]
    cuts: list[int]
    edits: list[Edit]
    spare_pads: bool
    """Whether a call without pads is given a mask all the same."""

    @property
    def tokens(self) -> Tensor:
        # Pads hold ids of their own, so that one which leaks is seen.
        return torch.tensor(
            [[28 - i % 3 if t is None else t for i, t in enumerate(r)] for r in self.rows]
        )

    @property
    def pad(self) -> Tensor:
        return torch.tensor([[t is None for t in row] for row in self.rows])

    def hooks(self) -> TransformerHooks | None:
        if not self.edits:
            return None
        hooks = TransformerHooks()
        for edit in self.edits:
            hook: Callable[..., Tensor] = _apply(edit)
            if SITES[edit.path].per_layer:
                hook = AtLayers(edit.layer).append(hook)
            hooks.append_to_path(f"{edit.path}.fwd", hook)
        return hooks


def _apply(edit: Edit) -> Callable[..., Tensor]:
    def hook(x: Tensor, positions: Tensor) -> Tensor:
        x = x.clone()
        unit = x[..., edit.unit % x.shape[-1]]
        if edit.position is None:
            unit *= edit.factor
        else:
            here = (positions == edit.position).reshape(*positions.shape, *[1] * (unit.dim() - 2))
            unit *= torch.where(here, edit.factor, 1.0)
        return x

    return hook


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    path = draw(st.sampled_from(list(SITES)))
    factors = [0.5, 2.0]  # a masked score stays -inf, a divisor stays positive
    if not any(part in path for part in ("qk_logits", "denominator", "scale")):
        factors += [0.0, -1.0]
    # k and v (and the patterns) hold earlier tokens too, of which `positions` does not tell
    per_token = not path.startswith(("attn.k", "attn.v", "attn.qk")) or path == "attn.v_out"
    position = draw(st.none() | st.integers(0, 6)) if per_token else None
    layer, unit = draw(st.integers(0, 1)), draw(st.integers(0, 47))
    return Edit(path, layer, unit, draw(st.sampled_from(factors)), position)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    width = draw(st.integers(1, 15))
    # None is as likely as all tokens together: pads abound
    slot = st.integers(0, TINY.n_vocab - 1) | st.none()
    rows = draw(st.lists(st.lists(slot, min_size=width, max_size=width), min_size=1, max_size=4))
    side = draw(st.sampled_from(["left", "right", "scattered"]))
    for i, row in enumerate(rows):
        seen = 0
        for j, token in enumerate(row):
            seen += token is not None
            if seen > TINY.ctx_window:
                row[j] = None
        if side != "scattered":
            rows[i] = sorted(row, key=lambda t: (t is None) == (side == "right"))
    cuts = sorted(draw(st.sets(st.integers(1, width - 1), max_size=4))) if width > 1 else []
    return Batch(rows, cuts, draw(st.lists(edits(), max_size=3)), draw(st.booleans()))


def run_in_calls(model: Transformer, batch: Batch, hooks: TransformerHooks | None) -> Tensor:
    H: HiddenState | None = None
    bounds = [0, *batch.cuts, batch.tokens.shape[1]]
    parts = []
    for start, end in itertools.pairwise(bounds):
        pad: Tensor | None = batch.pad[:, start:end]
        assert pad is not None
        if not pad.any() and not batch.spare_pads:
            pad = None
        logits, H = model(batch.tokens[:, start:end], H, pad, hooks)
        parts.append(logits)
    assert H is not None
    assert torch.equal(torch.as_tensor(H.prev_lens)[:, 0], (~batch.pad).sum(dim=1))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", MODELS, ids=str)
@fast(60)
@given(batch=batches())
def test_each_row_equals_its_solo_run(dtype: torch.dtype, batch: Batch) -> None:
    model, hooks = MODELS[dtype], batch.hooks()
    with torch.no_grad():
        found = run_in_calls(model, batch, hooks)
        assert found.isfinite().all()
        for row, pad, logits in zip(batch.tokens, batch.pad, found, strict=True):
            if not pad.all():
                solo, _ = model(row[~pad][None], hooks=hooks)
                assert_close(logits[~pad], solo[0], TOLERANCE[dtype])


@fast(20)
@given(batch=batches())
def test_each_rows_gradient_is_that_of_its_solo_run(batch: Batch) -> None:
    """Through the cache too: the batch's gradient is the sum of the rows'."""
    model, hooks = MODELS[torch.float64], batch.hooks()
    if batch.pad.all():
        return

    def loss(logits: Tensor) -> Tensor:
        return (logits * torch.linspace(-1, 2, logits.shape[-1])).sum() + logits.square().sum() / 9

    found = gradients(model, loss(run_in_calls(model, batch, hooks)[~batch.pad]))
    expected = {name: torch.zeros_like(grad) for name, grad in found.items()}
    for row, pad in zip(batch.tokens, batch.pad, strict=True):
        if not pad.all():
            solo, _ = model(row[~pad][None], hooks=hooks)
            for name, grad in gradients(model, loss(solo)).items():
                expected[name] += grad
    assert_same_gradients(found, expected, 1e-10)


@pytest.mark.parametrize("path", SITES)
def test_every_site_of_each_row_equals_its_solo_run(path: str) -> None:
    """Scattered pads, and pads that first arrive in a later call."""
    model = MODELS[torch.float64]
    tokens, pad = random_tokens(3, 9, seed=8), torch.zeros(3, 9, dtype=torch.bool)
    pad[1, [4, 5, 8]] = True
    pad[2, [3, 6]] = True
    seen: list[Tensor] = []
    hook: Callable[..., Tensor] = lambda x: seen.append(x) or x  # type: ignore[func-returns-value]  # noqa: E731
    if path in PER_LAYER:
        hook = AtLayers(1).append(hook)
    hooks = TransformerHooks().append_to_path(f"{path}.fwd", hook)
    _, H = model(tokens[:, :3], hooks=hooks)
    _, H = model(tokens[:, 3:], H, pad[:, 3:], hooks)
    late = seen[1]
    for row in range(3):
        real = ~pad[row]
        seen.clear()
        model(tokens[row, real][None], hooks=hooks)
        found, solo = late[row], seen[0][0]
        new = real[3:]
        if path in ("attn.k", "attn.v"):
            found = found[real]
        elif path in ("attn.qk_logits", "attn.qk_probs"):
            found, solo = found[new][:, real], solo[3:]
        else:
            found, solo = found[new], solo[3:]
        assert_close(found, solo, 1e-11, path)


def test_no_token_depends_on_what_a_pad_holds() -> None:
    model = MODELS[torch.float32]
    tokens, pad = random_tokens(2, 8, seed=3), torch.zeros(2, 8, dtype=torch.bool)
    pad[0, :3] = True
    pad[1, [2, 5, 7]] = True
    found, H = model(tokens[:, :5], None, pad[:, :5])
    more, _ = model(tokens[:, 5:], H, pad[:, 5:])
    other = torch.where(pad, (tokens + 5) % 29, tokens)
    found2, H = model(other[:, :5], None, pad[:, :5])
    more2, _ = model(other[:, 5:], H, pad[:, 5:])
    a, b = torch.cat([found, more], dim=1), torch.cat([found2, more2], dim=1)
    assert torch.equal(a[~pad], b[~pad])
    assert not torch.equal(a, b)


# -------------------------------------------------------------------------------------- sampling


class Generation(NamedTuple):
    prompts: list[list[int]]
    num_tokens: int
    stop: list[int] | None
    bos: int | bool
    edits: list[Edit]


@st.composite
def generations(draw: st.DrawFn) -> Generation:
    ids = st.integers(0, TINY.n_vocab - 1)
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=6), min_size=2, max_size=4))
    # a third of the vocabulary: rows end at different times
    stop = draw(st.none() | st.lists(ids, min_size=5, max_size=10))
    bos = draw(st.just(False) | ids)
    return Generation(
        prompts, draw(st.integers(1, 6)), stop, bos, draw(st.lists(edits(), max_size=2))
    )


@fast(50)
@given(case=generations())
def test_greedy_samples_equal_solo_samples(case: Generation) -> None:
    model = MODELS[torch.float64]
    hooks = Batch([], [], case.edits, False).hooks()

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        result = model.sample(
            prompts, case.num_tokens, 0.0, hooks=hooks, stop=case.stop, bos=case.bos
        )
        return result["tokens"]  # type: ignore[no-any-return]

    together = sample(case.prompts)
    assert together == [sample([prompt])[0] for prompt in case.prompts]
    # And the naive way: the whole text again for each token, no cache, no pads.
    for prompt, new in zip(case.prompts, together, strict=True):
        text = ([] if case.bos is False else [int(case.bos)]) + prompt
        expected: list[int] = []
        for _ in range(case.num_tokens):
            token = int(model(torch.tensor([text]), hooks=hooks)[0][0, -1].argmax())
            if case.stop is not None and token in case.stop:
                break
            expected.append(token)
            text.append(token)
        assert new == expected


def test_rows_that_end_at_different_times() -> None:
    """A row that has ended is a pad to itself; the others go on as if alone."""
    model = MODELS[torch.float64]
    prompts = [[i, *range(i % 4)] for i in range(29)]
    free = model.sample(prompts, 9, 0.0)["tokens"]
    stop = [6, 27]
    expected = [list(itertools.takewhile(lambda t: t not in stop, row)) for row in free]
    assert len({len(row) for row in expected}) > 4
    assert model.sample(prompts, 9, 0.0, stop=stop)["tokens"] == expected


def test_texts_of_a_batch_are_those_of_solo_runs(text_model: Transformer) -> None:
    prompts = ["The", "a longer prompt", "<|endoftext|>x", "é"]
    for kwargs in ({}, {"bos": True}, {"stop": ["<|endoftext|>", "e"]}):
        together = text_model.sample(prompts, 8, 0.0, **kwargs)
        solo = [text_model.sample(prompt, 8, 0.0, **kwargs) for prompt in prompts]
        assert together["strings"] == [one["strings"][0] for one in solo]
        assert together["tokens"] == [one["tokens"][0] for one in solo]


# --------------------------------------------------------------------------------------- capture


def _real(x: Tensor, path: str, real: Tensor) -> Tensor:
    """One row's values at its tokens."""
    return x[real][:, real] if path in ("attn.qk_logits", "attn.qk_probs") else x[real]


@pytest.mark.parametrize("bos", [False, 7])
def test_captures_of_a_batch_are_those_of_solo_runs(bos: int | bool) -> None:
    model, prompts = MODELS[torch.float64], [[1, 2, 3, 4, 5], [6], [8, 9, 10]]
    found = model.capture(prompts, list(SITES), bos=bos)
    start = [] if bos is False else [7]
    longest = 5 + len(start)
    assert found.tokens.shape == (3, longest)
    assert found.pad is not None
    padded = torch.tensor([[28] * (longest - len(p) - len(start)) + p for p in prompts])
    # the same prompts as a tensor, padded on the left, start tokens in front of the pads
    left_pad = torch.tensor([[True] * (5 - len(p)) + [False] * len(p) for p in prompts])
    as_tensor = model.capture(padded[:, -5:], list(SITES), pad=left_pad, bos=bos)
    assert as_tensor.pad is not None
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([start + prompt])
        solo = model.capture(ids, list(SITES))
        assert solo.pad is None
        real, real_left = ~found.pad[row], ~as_tensor.pad[row]
        assert found.tokens[row, real].tolist() == ids[0].tolist()
        assert as_tensor.tokens[row, real_left].tolist() == ids[0].tolist()
        for location, expected in solo.items():
            assert isinstance(location, ActivationLocation)
            for values, where in ((found, real), (as_tensor, real_left)):
                got = _real(values[location][row], location.path, where)
                assert_close(got, expected[0], 1e-11, f"{location} of row {row}")
