"""Exact selection against stable sorts, certified encoding against float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_explainer.errors import InputError
from neuron_explainer.kernels import certified
from neuron_explainer.kernels.certified import Prepared, certified_top_k, prepare, use_certified
from neuron_explainer.kernels.encode_top_k import encode_top_k
from neuron_explainer.kernels.top_k import search, top_k

NAN, INF = math.nan, math.inf


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- selection -----------------------------------------------------------------------------------


def assert_sorted_first(x, k):
    values, indices = top_k(x, k)
    expected = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, expected.indices[..., :k])
    torch.testing.assert_close(values, expected.values[..., :k], rtol=0, atol=0, equal_nan=True)


@given(
    st.lists(
        st.lists(
            st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, 2.0, INF, NAN]), min_size=7, max_size=7
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 7),
)
@settings(deadline=None, max_examples=100)
def test_top_k_is_the_head_of_a_stable_sort(rows, k):
    assert_sorted_first(torch.tensor(rows), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_two_stages_find_what_one_does(k, dtype, monkeypatch):
    x = normal(40, 4096).to(dtype)
    x[1] = (x[1] * 2).round()  # many ties
    x[2] = 0
    x[3, 7::512] = x[3].max()  # ties in the same and in different groups
    x[4, [5, 69, 4000]] = NAN
    x[5] = NAN
    x[6, 100:] = -INF
    x[7, 3] = INF
    assert_sorted_first(x, k)
    assert_sorted_first(x.view(2, 20, 4096), k)
    assert_sorted_first(x.t().contiguous().t(), k)
    widths = []
    whole = torch.Tensor.topk

    def topk(rows, *args, **kwargs):
        widths.append(rows.shape[1])
        return whole(rows, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    search(x, k + 1)
    assert max(widths) < 4096  # the rows themselves were never searched


def test_top_k_refuses_what_it_cannot_do():
    for x, k in ((torch.zeros(3), 4), (torch.zeros(3), 0), (torch.tensor(1.0), 1)):
        with pytest.raises(InputError, match="top_k: k="):
            top_k(x, k)
    with pytest.raises(InputError, match="encode_top_k: k=9 of 4 latents"):
        encode_top_k(torch.zeros(1, 2), torch.zeros(4, 2), None, 9)
    assert top_k(torch.zeros(0, 9), 3)[1].shape == (0, 3)
    assert not top_k(torch.zeros(2, 9, requires_grad=True), 3)[0].requires_grad


# ---- encoding against float64 ----------------------------------------------------------------------


def float32_error(x, weight, bias):
    """What a float32 inner product may be off by, ``[b, l]`` float64."""
    norms = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    return (x.shape[1] + 1) * 2.0**-23 * (norms + bias.double().abs()) + 1e-37


def assert_right(x, weight, bias, k, certified):
    """Finite rows: the right set wherever float32 can tell, the right values, in the right order."""
    values, indices = encode_top_k(x, weight, bias, k, certified=certified)
    exact = x.double() @ weight.double().T + bias.double()
    error = float32_error(x, weight, bias)
    top = exact.topk(k + 1)
    chosen = exact.gather(1, indices)
    assert (indices.sort(1).values.diff(dim=1) > 0).all()
    assert (values.diff(dim=1) <= 0).all()
    assert ((values - chosen).abs() <= error.gather(1, indices)).all()
    worst = error.amax(1)
    assert (chosen.amin(1) >= top.values[:, k - 1] - 2 * worst).all()
    distinct = top.values[:, k - 1] - top.values[:, k] > 2 * worst
    want = top.indices[:, :k].sort(1).values
    assert torch.equal(indices.sort(1).values[distinct], want[distinct])
    return distinct


N, L, B, K = 24, 512, 64, 4


def gaussian():
    return normal(B, N), normal(L, N, seed=1), normal(L, seed=2)


def scales_of_rows():
    x, w, b = gaussian()
    return x * torch.logspace(-30, 30, B)[:, None], w, b * 0


def scales_of_latents():
    x, w, b = gaussian()
    return x, w * torch.logspace(-12, 12, L)[torch.randperm(L)][:, None], b


def huge_and_tiny():
    x, w, b = gaussian()
    return x * 1e19, w * 1e18, b


def below_the_normal_range():
    x, w, b = gaussian()
    return x * 1e-39, w * 1e15, b * 1e-25


def nearly_equal_latents():
    x, w, b = gaussian()
    return x, w[:1] + 1e-6 * w, b * 1e-6


def all_negative():
    x, w, b = gaussian()
    return x, w, b - 1000


def biases_that_decide():
    x, w, b = gaussian()
    return x * 1e-3, w, b * 100


def residuals_of_the_rows():
    """Latents made of what rounding takes off the rows: bfloat16 sees next to none of them."""
    x, w, b = gaussian()
    residual = x - x.bfloat16()
    w[:B] = residual / residual.norm(dim=1, keepdim=True) * 400
    return x, w / 4, b * 0


def residuals_of_the_latents():
    """Rows along what rounding takes off the latents."""
    _, w, b = gaussian()
    residual = w[:B] - w[:B].bfloat16()
    return residual / residual.norm(dim=1, keepdim=True) * 10, w, b * 0


INPUTS: list[Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [
    gaussian,
    scales_of_rows,
    scales_of_latents,
    huge_and_tiny,
    below_the_normal_range,
    nearly_equal_latents,
    all_negative,
    biases_that_decide,
    residuals_of_the_rows,
    residuals_of_the_latents,
]


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("make", INPUTS)
def test_encoding_is_right(make, certified):
    x, weight, bias = make()
    assert_right(x, weight, bias, K, certified)


@pytest.mark.parametrize("make", INPUTS)
def test_what_is_proven_is_right(make):
    x, weight, bias = make()
    prepared = prepare(weight, bias)
    values, _, proven = certified_top_k(x, weight, bias, K, prepared)
    again = encode_top_k(x, weight, bias, K, certified=False)
    error = float32_error(x, weight, bias).amax(1, keepdim=True)
    assert ((values - again[0]).abs() <= 2 * error)[proven].all()
    share = {gaussian: 1.0, scales_of_latents: 1.0, nearly_equal_latents: 0.0, all_negative: 0.0}
    assert proven.double().mean() == share.get(make, proven.double().mean())


@pytest.mark.parametrize("make", INPUTS)
def test_every_latent_is_below_its_bound(make):
    x, weight, bias = make()
    prepared = prepare(weight, bias)
    operand, _, _ = certified._row_operand(x, prepared.largest)
    exact = x.double() @ weight.double().T + bias.double()
    tried = ~operand[:, N].isnan()
    upper = torch.mm(operand, prepared.operand.t()).double()
    assert (upper + 2.0**-8 * upper.abs() >= exact)[tried].all()
    wide = operand.double() @ prepared.operand.double().T  # without a single rounding of sums
    assert (wide >= exact)[tried].all()
    assert tried.any() or make is huge_and_tiny


def test_bounds_have_room_for_errors_of_adding():
    # Nothing is lost by rounding here: all that is added to the products is for adding them up.
    signs = normal(300, 64).sign()
    prepared = prepare(signs, None)
    operand, _, _ = certified._row_operand(signs[:20], prepared.largest)
    upper = operand.double() @ prepared.operand.double().T
    exact = signs[:20].double() @ signs.double().T
    assert (upper - exact >= (64 + 8) * 2.0**-22 * 64).all()


def test_norms_are_rounded_upwards():
    norms = normal(10_000).abs()
    assert (certified._up(norms).double() >= norms.double() * (1 + 2.0**-9)).all()


def test_the_rounding_of_the_bounds_themselves_is_reckoned_with():
    # All bounds round to 1: nothing can be proven, though sums of zeros are exact.
    order = torch.randperm(L, generator=torch.Generator().manual_seed(0))
    x, weight, bias = torch.zeros(3, 2), torch.zeros(L, 2), 1 + order * 2.0**-18
    assert not certified_top_k(x, weight, bias, K, prepare(weight, bias))[2].any()
    distinct = assert_right(x, weight, bias, K, True)
    assert distinct.all()


def test_rounding_alone_would_be_wrong():
    x, weight, bias = residuals_of_the_rows()
    naive = (x.bfloat16() @ weight.bfloat16().T).float().topk(K).indices
    right = (x.double() @ weight.double().T).topk(K).indices
    assert not torch.equal(naive.sort(1).values, right.sort(1).values)
    distinct = assert_right(x, weight, bias, K, True)
    assert distinct.all()


@given(
    st.integers(0, 2**32 - 1),
    st.floats(-6, 6),
    st.floats(0, 6),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_encoding_is_right_of_anything(seed, scale, spread, k, round_weights):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = draw(9, 10) * 10.0 ** (scale + spread * draw(9, 1)).clamp(-15, 15)
    weight = draw(160, 10) * 10.0 ** (spread * draw(160, 1)).clamp(-15, 15)
    bias = draw(160) * 10.0 ** (spread * draw(160)).clamp(-15, 15)
    if round_weights:  # ties, and nothing for the rounding to take off
        weight = weight.round()
    assert_right(x, weight, bias, k, True)


def test_ties_go_to_the_lowest_index():
    x, weight, bias = normal(9, N), normal(L, N, seed=1), normal(L, seed=2)
    bias[7::64] = bias[7] + 30
    weight[7::64] = weight[7]  # eight equal latents, far above all others
    for certified_or_not in (False, True):
        values, indices = encode_top_k(x, weight, bias, 5, certified=certified_or_not)
        assert indices.tolist() == [[7, 71, 135, 199, 263]] * 9
        assert (values == values[:, :1]).all()
    weight[:], bias[:] = weight[0].clone(), 3.0  # more equal ones than are ever compared
    assert encode_top_k(x, weight, bias, 5, certified=True)[1].tolist() == [[0, 1, 2, 3, 4]] * 9


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
def test_rows_that_are_not_finite_are_those_of_float32(bad):
    x, weight, bias = gaussian()
    x[3, 5] = bad
    weight[:, 5] = weight[:, 5].abs() + 1
    plain, tried = (encode_top_k(x, weight, bias, K, certified=c) for c in (False, True))
    torch.testing.assert_close(plain[0], tried[0], equal_nan=True)
    assert torch.equal(plain[1], tried[1])
    _, _, proven = certified_top_k(x, weight, bias, K, prepare(weight, bias))
    assert (~proven).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3.4e38])
def test_weights_that_are_not_finite_are_never_proven(where, bad):
    x, weight, bias = gaussian()
    (weight if where == "weight" else bias)[3] = bad
    _, _, proven = certified_top_k(x, weight, bias, K, prepare(weight, bias))
    assert not proven.any()
    plain, tried = (encode_top_k(x, weight, bias, K, certified=c) for c in (False, True))
    torch.testing.assert_close(plain[0], tried[0], equal_nan=True)
    assert torch.equal(plain[1], tried[1])


def test_no_bias_few_latents_no_rows_many_chunks():
    x, weight, bias = gaussian()
    for c in (False, True):
        found = encode_top_k(x, weight, None, K, certified=c)
        want = encode_top_k(x, weight, bias * 0, K, certified=c)
        assert torch.equal(found[1], want[1])
        assert encode_top_k(x, weight[:9], bias[:9], 9, certified=c)[1].shape == (B, 9)
        assert encode_top_k(x[:0], weight, bias, K, certified=c)[0].shape == (0, K)
    want = encode_top_k(x, weight, bias, K, certified=True)
    in_parts = prepare(weight, bias, latents_at_once=100)
    assert torch.equal(in_parts.operand, prepare(weight, bias).operand)
    values, indices, proven = certified_top_k(x, weight, bias, K, in_parts, chunk_bytes=2 * L * 7)
    assert proven.all()
    assert torch.equal(indices, want[1])
    torch.testing.assert_close(values, want[0])
    few_at_once = encode_top_k(x, weight, bias, K, certified=False, chunk_bytes=4 * L * 7)
    assert torch.equal(few_at_once[1], want[1])


# ---- when it is used --------------------------------------------------------


def test_a_bound_that_is_found_broken_proves_nothing():
    x, weight, bias = gaussian()
    prepared = prepare(weight, bias)
    broken = Prepared(prepared.operand.clone(), prepared.largest)
    broken.operand[:, :N] *= 0.9
    assert not certified_top_k(x, weight, bias, K, broken)[2].any()


def test_where_it_is_used(monkeypatch):
    rows, weight = torch.zeros(512, 2), torch.zeros(4096, 2)
    monkeypatch.delenv("NEURON_EXPLAINER_CERTIFIED", raising=False)
    for fast in (True, False):
        assert use_certified(rows, weight, None, fast_bfloat16=fast) == fast
    assert not use_certified(rows[1:], weight, None, fast_bfloat16=True)
    assert not use_certified(rows, weight[1:], None, fast_bfloat16=True)
    meta = rows.to("meta")  # any device but a CPU
    assert not use_certified(meta, weight, None, fast_bfloat16=True)
    assert use_certified(meta, weight, True)
    assert use_certified(rows[1:], weight[1:], True)
    assert not use_certified(rows.double(), weight.double(), True)
    assert not use_certified(rows, weight, False)
    monkeypatch.setenv("NEURON_EXPLAINER_CERTIFIED", "0")
    assert not use_certified(rows, weight, None)
    monkeypatch.setenv("NEURON_EXPLAINER_CERTIFIED", "1")
    assert use_certified(rows[1:], weight[1:], None)
    monkeypatch.setenv("NEURON_EXPLAINER_CERTIFIED", "yes")
    with pytest.raises(InputError, match="must be 0 or 1, found 'yes'"):
        use_certified(rows, weight, None)
