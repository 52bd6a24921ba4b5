"""Measures against their definitions, written out in numpy's float64 one token at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation import metrics
from neuron_explainer.evaluation.metrics import (
    ce_recovered,
    cross_entropy_per_token,
    dead_share,
    fvu,
    l0,
)
from neuron_explainer.evaluation.running import ReconstructionStats
from neuron_explainer.models.autoencoders.latents import Latents


def tokens_of(*shape, mean=0.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def numpy_fvu(x, recons):
    x = x.double().numpy().reshape(-1, x.shape[-1])
    recons = recons.double().numpy().reshape(x.shape)
    mean = [math.fsum(column) / len(column) for column in x.T]
    error = math.fsum(float(v) for v in ((x - recons) ** 2).ravel())
    return error / math.fsum(float(v) for v in ((x - mean) ** 2).ravel())


@pytest.mark.parametrize(
    ("mean", "dtype"),
    [(0.0, torch.float32), (1e4, torch.float32), (1e6, torch.float64), (3.0, torch.bfloat16)],
)
def test_fvu_is_its_definition(mean, dtype):
    x = tokens_of(4, 5, 6, mean=mean, dtype=dtype)
    recons = (x.double() + 0.3 * tokens_of(4, 5, 6, seed=1).double()).to(dtype)
    found = fvu(x, recons)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(numpy_fvu(x, recons), rel=1e-9)


def test_fvu_at_its_fixed_points():
    x = tokens_of(50, 7, mean=3)
    assert fvu(x, x) == 0
    mean = x.double().mean(0).expand(50, 7)
    assert fvu(x.double(), mean).item() == pytest.approx(1, abs=1e-12)
    # An offset is an error; about zero, the mean predictor would look good.
    assert fvu(x, x + 1).item() == pytest.approx(7 * 50 / (x - x.mean(0)).square().sum().item())
    assert fvu(x, torch.zeros_like(x)) > 5
    assert fvu(x[:1], x[:1]).isnan()
    assert fvu(x[:1], x[:1] + 1).isinf()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 60), max_size=6),
    st.sampled_from([0.0, 10.0, 1e5]),
    st.randoms(use_true_random=False),
)
def test_batches_may_be_cut_anywhere(cuts, mean, random):
    x = tokens_of(60, 5, mean=mean, dtype=torch.float64)
    recons = x + 0.1 * tokens_of(60, 5, seed=1, dtype=torch.float64)
    latents = torch.relu(tokens_of(60, 9, mean=-1.5, seed=2))
    whole = ReconstructionStats().update(x, recons, latents)
    edges = [0, *sorted(cuts), 60]
    parts = list(itertools.pairwise(edges))
    random.shuffle(parts)
    stats, merged = ReconstructionStats(), ReconstructionStats()
    for a, b in parts:
        stats.update(x[a:b], recons[a:b], latents[a:b])
        merged.merge(ReconstructionStats().update(x[a:b], recons[a:b], latents[a:b]))
    for found in (stats, merged):
        assert found.n_tokens == 60
        assert found.fvu.item() == pytest.approx(whole.fvu.item(), rel=1e-9)
        assert found.mse.item() == pytest.approx(whole.mse.item(), rel=1e-12)
        assert torch.equal(found.frequency, whole.frequency)
    assert whole.fvu.item() == pytest.approx(numpy_fvu(x, recons), rel=1e-9)


def test_totals_are_those_of_the_functions():
    x, recons = tokens_of(2, 8, 5), tokens_of(2, 8, 5, seed=1)
    latents = torch.relu(tokens_of(2, 8, 9, mean=-1.5, seed=2))
    stats = ReconstructionStats().update(x, recons, latents)
    assert stats.fvu.item() == pytest.approx(fvu(x, recons).item(), rel=1e-14)
    assert stats.l0 == l0(latents)
    assert stats.dead_share == dead_share(latents)
    error = (x.double() - recons.double()).numpy()
    assert stats.mse.item() == pytest.approx((error**2).sum(-1).mean(), rel=1e-12)
    assert 0 < stats.dead_share < 1
    assert repr(stats) == (
        f"ReconstructionStats(n_tokens=16, fvu={float(stats.fvu):.6g}, "
        f"l0={float(stats.l0):.6g}, dead_share={float(stats.dead_share):.6g})"
    )
    assert repr(ReconstructionStats()) == "ReconstructionStats(n_tokens=0)"


def test_padding_does_not_count():
    x, recons = tokens_of(2, 4, 5), tokens_of(2, 4, 5, seed=1)
    latents = tokens_of(2, 4, 9, seed=2)
    pad = torch.tensor([[True, False, False, False], [True, True, True, False]])
    padded = ReconstructionStats().update(x, recons, latents, pad)
    solo = ReconstructionStats().update(x[~pad], recons[~pad], latents[~pad])
    assert padded.n_tokens == 4
    assert padded.fvu == solo.fvu
    assert torch.equal(padded.frequency, solo.frequency)
    nothing = ReconstructionStats().update(x, recons, latents, torch.ones_like(pad))
    assert nothing.n_tokens == 0
    assert nothing.update(x[~pad], recons[~pad]).fvu == solo.fvu


def test_l0_and_dead_share_by_hand():
    latents = torch.tensor([[[0.0, 2.0, -1.0, 0.0], [0.0, 0.0, 3.0, 0.0]]])
    assert l0(latents) == 1.5  # a negative latent is active
    assert dead_share(latents) == 0.5


def test_no_gradient_is_held():
    x = tokens_of(3, 5).requires_grad_()
    assert not ReconstructionStats().update(x, x * 0.5, x).fvu.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cross_entropy_is_its_definition(dtype):
    logits = 5 * tokens_of(2, 4, 6, dtype=dtype)
    tokens = torch.tensor([[0, 3, 5, 1], [2, 2, 4, 0]])
    found = cross_entropy_per_token(logits, tokens)
    expected = np.empty((2, 3))
    for b in range(2):
        for i in range(3):
            row = [float(v) for v in logits[b, i]]
            total = math.fsum(math.exp(v) for v in row)
            expected[b, i] = math.log(total) - row[int(tokens[b, i + 1])]
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_cross_entropy_beside_padding_is_nan():
    logits, tokens = tokens_of(2, 4, 6), torch.zeros(2, 4, dtype=torch.long)
    pad = torch.tensor([[True, False, False, False], [False, False, True, True]])
    losses = cross_entropy_per_token(logits, tokens, pad)
    assert losses.isnan().tolist() == [[True, False, False], [False, True, True]]
    kept = ~losses.isnan()
    assert torch.equal(losses[kept], cross_entropy_per_token(logits, tokens)[kept])


def test_ce_recovered():
    original = torch.tensor([[1.0, 3.0], [2.0, float("nan")]])
    ablated = original + torch.tensor([[4.0, 2.0], [6.0, 0.0]])
    assert ce_recovered(original, original, ablated) == 1
    assert ce_recovered(original, ablated, ablated) == 0
    spliced = original + torch.tensor([[2.0, -1.0], [3.0, 0.0]])
    # (12 - 4) / 12: the means first, then the ratio; not the mean of the rows' ratios
    assert ce_recovered(original, spliced, ablated).item() == pytest.approx(8 / 12)
    assert ce_recovered(2.0, 2.5, 7.0).item() == pytest.approx(0.9)
    assert ce_recovered(2.0, 8.0, 7.0).item() == pytest.approx(-0.2)


def test_bad_input():
    x, latents = tokens_of(4, 5), tokens_of(4, 9)
    with pytest.raises(InputError, match=r"one shape, found \[4, 5\] and \[3, 5\]"):
        fvu(x, x[:3])
    with pytest.raises(InputError, match="leading axes"):
        ReconstructionStats().update(x, x, latents[:3])
    with pytest.raises(InputError, match=r"bool pad mask \[4\]"):
        ReconstructionStats().update(x, x, pad=torch.zeros(4))
    with pytest.raises(InputError, match="x: width 5 so far, found 6"):
        ReconstructionStats().update(x, x).update(tokens_of(4, 6), tokens_of(4, 6))
    with pytest.raises(InputError, match="latents: width 9 so far, found 8"):
        ReconstructionStats().update(x, x, latents).update(x, x, latents[:, :8])
    with pytest.raises(InputError, match="no tokens have been added"):
        _ = ReconstructionStats().fvu
    with pytest.raises(InputError, match=r"x: expected at least one token .* found \[0, 5\]"):
        fvu(x[:0], x[:0])
    with pytest.raises(InputError, match="no latents have been added"):
        _ = ReconstructionStats().update(x, x).l0
    with pytest.raises(InputError, match="at least one token"):
        l0(latents[:0])
    with pytest.raises(InputError, match="single number"):
        fvu(x[0, 0], x[0, 0])
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(InputError, match=r"expected logits \[b, s, v\]"):
        cross_entropy_per_token(tokens_of(2, 4, 6), tokens)
    with pytest.raises(InputError, match="bool pad mask"):
        cross_entropy_per_token(tokens_of(2, 3, 6), tokens, torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"of the same tokens.*\[2, 1, 2\] tokens that count"):
        ce_recovered(torch.zeros(2), torch.tensor([0.0, float("nan")]), torch.ones(2))
    with pytest.raises(InputError, match="of the same tokens"):
        ce_recovered(torch.zeros(2), torch.zeros(3), torch.ones(2))


def test_ce_recovered_of_plain_numbers_keeps_their_digits():
    """A float32 on the way would leave seven digits of a small difference of large numbers."""
    found = float(ce_recovered(1000.0, 1000.0 + 1e-7, 1000.0 + 1e-6))
    assert found == pytest.approx(0.9, rel=1e-5)


# ---- beyond the variance: each figure against its formula, one token at a time ---------------------


def numpy_tokens(*tensors):
    return [t.double().numpy().reshape(-1, t.shape[-1]) for t in tensors]


def numpy_figures(x, recons, mean=None):
    """Every figure of a reconstruction, by the definition in its docstring."""
    x, recons = numpy_tokens(x, recons)
    mean = x.mean(0) if mean is None else mean.double().numpy()
    tokens = list(zip(x, recons, strict=True))
    per_token = [1 - ((a - b) ** 2).sum() / ((a - mean) ** 2).sum() for a, b in tokens]
    cosines = [
        a @ b / math.sqrt((a @ a) * (b @ b)) if (a @ a) * (b @ b) > 0 else 0.0 for a, b in tokens
    ]
    ratios = [math.sqrt((b @ b) / (a @ a)) for a, b in tokens if a @ a > 0]
    return {
        "explained_variance_per_token": math.fsum(per_token) / len(tokens),
        "cosine_similarity": math.fsum(cosines) / len(tokens),
        "norm_ratio": math.fsum(ratios) / len(ratios),
        "relative_reconstruction_bias": math.fsum(b @ b for _, b in tokens)
        / math.fsum(a @ b for a, b in tokens),
    }


FIGURES = {
    function.__name__: function
    for function in (
        metrics.explained_variance_per_token,
        metrics.cosine_similarity,
        metrics.norm_ratio,
        metrics.relative_reconstruction_bias,
    )
}


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_figures_are_their_definitions(mean):
    x = tokens_of(4, 5, 6, mean=mean)
    recons = 0.8 * x + 0.3 * tokens_of(4, 5, 6, seed=1)
    x[0, 0] = 0  # no direction and no norm
    recons[1, 1] = 0
    expected = numpy_figures(x, recons)
    for name, function in FIGURES.items():
        assert function(x, recons).dtype == torch.float64
        assert function(x, recons).item() == pytest.approx(expected[name], rel=1e-9), name
    assert metrics.explained_variance(x, recons) == 1 - fvu(x, recons)


def test_figures_at_their_fixed_points():
    x = tokens_of(50, 7, mean=3, dtype=torch.float64)
    for name, function in FIGURES.items():
        assert function(x, x).item() == pytest.approx(1, abs=1e-12), name
    mean = x.mean(0).expand_as(x)
    assert metrics.explained_variance(x, mean).item() == pytest.approx(0, abs=1e-12)
    assert metrics.explained_variance_per_token(x, mean).item() == pytest.approx(0, abs=1e-12)
    assert metrics.norm_ratio(x, x / 4).item() == pytest.approx(0.25)
    assert metrics.relative_reconstruction_bias(x, x / 4).item() == pytest.approx(0.25)
    assert metrics.cosine_similarity(x, -x / 4).item() == pytest.approx(-1)


def test_variance_per_token_can_be_about_a_known_mean_and_skips_pads():
    x, recons = tokens_of(3, 4, 5), tokens_of(3, 4, 5, seed=1)
    about = tokens_of(5, seed=2, mean=1)
    found = metrics.explained_variance_per_token(x, recons, about).item()
    expected = numpy_figures(x, recons, about)["explained_variance_per_token"]
    assert found == pytest.approx(expected, rel=1e-9)
    pad = torch.zeros(3, 4, dtype=torch.bool)
    pad[:, 2:] = True
    found = metrics.explained_variance_per_token(x, recons, pad=pad).item()
    expected = numpy_figures(x[:, :2], recons[:, :2])["explained_variance_per_token"]
    assert found == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match="needs the mean of all tokens"):
        _ = ReconstructionStats().update(x, recons).explained_variance_per_token


def test_l1_by_hand():
    latents = torch.tensor([[[0.0, 2.0, -1.0, 0.0], [0.0, 0.0, 3.0, 0.0]]])
    assert metrics.l1(latents) == 3
    x = tokens_of(1, 2, 5)
    assert ReconstructionStats().update(x, x, latents).l1 == 3


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_running_totals_are_the_functions_in_float64(mean):
    """Whatever the batches, in any figure: the running form and the formula are two pieces of code."""
    x, recons = tokens_of(60, 5, mean=mean), tokens_of(60, 5, mean=mean, seed=1)
    x[3], recons[9] = 0, 0
    latents = torch.relu(tokens_of(60, 9, mean=-1.5, seed=2))
    stats = ReconstructionStats(x.double().mean(0))
    for a, b in itertools.pairwise([0, 7, 7, 31, 60]):
        stats.update(x[a:b], recons[a:b], latents[a:b])
    of_recons = [fvu, metrics.explained_variance, *FIGURES.values()]
    expected = {function.__name__: function(x, recons) for function in of_recons}
    expected |= {f.__name__: f(latents) for f in (l0, metrics.l1, dead_share)}
    for name, value in expected.items():
        found = getattr(stats, name)
        assert found.dtype == value.dtype == torch.float64
        assert float(found) == pytest.approx(float(value), rel=1e-12), name
    assert torch.allclose(stats.mean, x.double().mean(0), rtol=1e-12)


def test_sparse_latents_are_the_dense_ones():
    latents = torch.relu(tokens_of(3, 4, 9, mean=-0.5, seed=2))
    values, indices = latents.topk(5, dim=-1)
    kept = torch.zeros_like(latents).scatter(-1, indices, values)
    x, pad = tokens_of(3, 4, 6), torch.zeros(3, 4, dtype=torch.bool)
    pad[1, 2:] = True
    dense = ReconstructionStats().update(x, x, kept, pad)
    sparse = ReconstructionStats().update(x, x, Latents(values, indices, 9), pad)
    assert 0 < (values == 0).sum() < values.numel()
    assert torch.equal(dense.frequency, sparse.frequency)
    tokens = kept[~pad]
    for stats in (dense, sparse, ReconstructionStats().update(x[:1], x[:1], kept[:1], pad[:1])):
        if stats.n_tokens < len(tokens):
            stats.update(x[1:], x[1:], Latents(values[1:], indices[1:], 9), pad[1:])
        assert stats.largest.tolist() == tokens.amax(0).tolist()
        assert torch.allclose(stats.mean_square, tokens.double().square().mean(0), rtol=1e-12)
    assert sparse.l1.item() == pytest.approx(dense.l1.item(), rel=1e-12)
    with pytest.raises(InputError, match="leading axes"):
        ReconstructionStats().update(x, x, Latents(values[:2], indices[:2], 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_divergence_is_its_definition(dtype):
    one, other = 5 * tokens_of(2, 3, 6, dtype=dtype), 5 * tokens_of(2, 3, 6, seed=1, dtype=dtype)
    found = metrics.kl_divergence_per_token(one, other)
    p, q = (torch.softmax(v.double(), -1).numpy() for v in (one, other))
    np.testing.assert_allclose(
        found.double().numpy(), (p * (np.log(p) - np.log(q))).sum(-1), rtol=1e-5, atol=1e-6
    )
    assert (metrics.kl_divergence_per_token(one, one) == 0).all()
    pad = torch.tensor([[True, False, False], [False, False, True]])
    assert torch.equal(metrics.kl_divergence_per_token(one, other, pad).isnan(), pad)
    assert torch.equal(metrics.kl_divergence_per_token(one, other, pad)[~pad], found[~pad])
    with pytest.raises(InputError, match=r"two logits \[b, s, v\]"):
        metrics.kl_divergence_per_token(one, other[:1])
    with pytest.raises(InputError, match="bool pad mask"):
        metrics.kl_divergence_per_token(one, other, torch.zeros(2, 3))


def test_densities_fall_in_their_bins():
    frequency = torch.tensor([0.0, 1.0, 0.5, 0.1, 0.0999, 0.011, 0.0, 0.002], dtype=torch.float64)
    found = metrics.density_histogram(frequency, per_decade=1)
    assert found.edges == pytest.approx([1e-3, 1e-2, 1e-1, 1])
    assert found.counts == [1, 2, 3]  # the edge 0.1 belongs to the bin above it
    assert found.never == 2
    fine = metrics.density_histogram(frequency)
    assert len(fine.counts) == 12
    assert sum(fine.counts) + fine.never == 8
    nothing = metrics.density_histogram(torch.zeros(5))
    assert (sum(nothing.counts), nothing.never) == (0, 5)
    always = metrics.density_histogram(torch.ones(5))
    assert (sum(always.counts), always.never) == (5, 0)
