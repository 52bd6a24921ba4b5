"""The generator does what its config says, and the measures order what must be ordered."""

from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.floors import permuted_directions, random_autoencoder
from neuron_explainer.evaluation.recovery import (
    Recovery,
    RecoveryStats,
    cosines,
    matched_cosine,
    measure_recovery,
)
from neuron_explainer.evaluation.synthetic import (
    SyntheticActivations,
    SyntheticBatch,
    SyntheticConfig,
    zipf,
)
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents

# Wide enough that random directions get a cosine below 0.3.
SMALL = SyntheticConfig(n_features=200, width=128, n_roots=2, rank=5)
N_LATENTS = 80


@pytest.fixture(scope="module")
def source() -> SyntheticActivations:
    return SyntheticActivations(SMALL)


@pytest.fixture(scope="module")
def batch(source: SyntheticActivations) -> SyntheticBatch:
    return source.sample(20_000, seed=1)


def scored(
    source: SyntheticActivations,
    batch: SyntheticBatch,
    latents: Tensor,
    directions: Tensor | None = None,
) -> Recovery:
    """The figures of latents ``[t, l]`` that write the first features, or other directions."""
    rows = source.directions[: latents.shape[1]] if directions is None else directions
    sparse = Latents.of(latents)
    stats = RecoveryStats(rows, source.directions)
    return stats.update(batch, sparse, sparse.decode(rows) + source.bias).result()


# ---- the generator ---------------------------------------------------------------------------------


def test_children_fire_only_below_their_parent_and_never_beside_a_sibling(
    source: SyntheticActivations, batch: SyntheticBatch
) -> None:
    active, parents = batch.features > 0, source.parents
    children = (parents >= 0).nonzero().flatten()
    assert len(children) == 2 * (4 + 16 + 64)
    assert not (active[:, children] & ~active[:, parents[children]]).any()
    for parent in parents.unique()[1:]:
        siblings = active[:, parents == parent]
        assert siblings.sum(dim=1).max() <= 1


def test_features_fire_as_often_as_zipf_says(
    source: SyntheticActivations, batch: SyntheticBatch
) -> None:
    rate = (batch.features > 0).double().mean(dim=0)
    alone = (source.parents < 0).nonzero().flatten()
    expected = source.probability[alone].double()
    spread = (expected * (1 - expected) / len(batch.x)).sqrt()
    assert ((rate[alone] - expected).abs() < 5 * spread).all()
    law = zipf(1000, 0.5, 0.4, 5e-4)
    assert (float(law[0]), float(law[-1])) == pytest.approx((0.4, 5e-4))
    inner = (law[[1, 3]] - law[-1]) / (law[0] - law[-1])
    raw = torch.tensor([2.0, 4.0, 1000.0]) ** -0.5
    torch.testing.assert_close(inner, (raw[:2] - raw[2]) / (1 - raw[2]))


def test_values_have_their_mean_and_children_grow_with_their_parent(
    source: SyntheticActivations, batch: SyntheticBatch
) -> None:
    values = batch.features
    root = values[:, 0][values[:, 0] > 0]
    assert float(root.mean()) == pytest.approx(float(source.mean[0]), abs=0.05)
    assert float(root.std()) == pytest.approx(float(source.sd[0]), abs=0.05)
    child = int((source.parents == 0).nonzero()[0])
    both = values[:, child] > 0
    pair = torch.stack([values[both, 0], values[both, child]])
    # The child's own noise is independent, so what they share is the factor.
    assert float(torch.corrcoef(pair)[0, 1]) > 0.1
    ratio = values[both, child] / (values[both, 0] / source.mean[0])
    assert float(ratio.mean()) == pytest.approx(float(source.mean[child]), abs=0.2)


def test_common_factors_correlate_features() -> None:
    plain = replace(SMALL, n_features=60, width=8, n_roots=0, orthogonal_steps=0, exponent=0.0)
    found = []
    for rank in (0, 8):
        config = replace(plain, rank=rank, correlation=0.3, most=0.4, least=0.4)
        active = SyntheticActivations(config).sample(20_000).features > 0
        assert float(active.double().mean()) == pytest.approx(0.4, abs=0.01)
        correlation = torch.corrcoef(active.double().t()) - torch.eye(60)
        found.append(float(correlation.abs().mean()))
    assert found[0] < 0.01 < 0.05 < found[1]


def test_tokens_are_sums_of_directions(source: SyntheticActivations, batch: SyntheticBatch) -> None:
    torch.testing.assert_close(batch.x, batch.features @ source.directions + source.bias)
    torch.testing.assert_close(source.directions.norm(dim=1), torch.ones(200))
    assert float(source.bias.norm()) == pytest.approx(0.5)


def test_directions_are_pushed_apart() -> None:
    config = replace(SMALL, n_features=64, width=16, n_roots=0)
    before, after = (
        SyntheticActivations(replace(config, orthogonal_steps=n, orthogonal_lr=1e-2))
        for n in (0, 100)
    )
    off = [float((d @ d.t()).square().sum()) for d in (before.directions, after.directions)]
    assert off[1] < 0.9 * off[0]


def test_the_seed_decides(source: SyntheticActivations) -> None:
    again = SyntheticActivations(SMALL)
    assert torch.equal(again.directions, source.directions)
    assert torch.equal(again.sample(50, 3).x, source.sample(50, 3).x)
    assert not torch.equal(source.sample(50, 3).x, source.sample(50, 4).x)
    first, second = source.batches(100, 50, seed=3)
    assert torch.equal(first.x, source.sample(50, 3).x)
    assert not torch.equal(first.x, second.x)


def test_the_default_is_a_sixteenth_of_the_published_model() -> None:
    config = SyntheticConfig(orthogonal_steps=0)
    source = SyntheticActivations(config)
    assert (config.n_features, config.width, int((source.parents >= 0).sum())) == (1024, 96, 672)
    l0 = float((source.sample(4000).features > 0).sum() / 4000)
    assert l0 == pytest.approx(7.2, abs=0.3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"least": 0.5}, "least <= most"),
        ({"rank": 100}, "must be below 1"),
        ({"n_features": 0}, "n_features must be at least 1"),
        ({"depth": -1}, "depth must be at least 0"),
        ({"bias": float("nan")}, "bias: expected a finite number, found nan"),
        ({"exponent": float("inf")}, "exponent: expected a finite number, found inf"),
        ({"magnitude_sd": (0.5, float("nan"))}, "magnitude_sd"),
    ],
)
def test_configs_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SyntheticConfig(**wrong)


# ---- the measures ----------------------------------------------------------------------------------


def test_the_oracle_is_perfect(source: SyntheticActivations, batch: SyntheticBatch) -> None:
    found = scored(source, batch, batch.features)
    assert found.mcc > 0.999
    assert found.f1 > 0.99
    assert found.uniqueness == 1
    assert found.explained_variance > 0.999
    assert found.norm_ratio == pytest.approx(1, abs=1e-3)
    assert found.l0 == pytest.approx(float((batch.features > 0).sum() / len(batch.x)))


def test_what_has_learned_nothing_is_near_the_floor(
    source: SyntheticActivations, batch: SyntheticBatch
) -> None:
    latents = batch.features[:, :N_LATENTS]
    permuted = scored(source, batch, latents, permuted_directions(source.directions[:N_LATENTS]))
    assert permuted.mcc < 0.3
    assert permuted.f1 < 0.2
    like = Autoencoder(N_LATENTS, SMALL.width)
    random = measure_recovery(random_autoencoder(like, 5.0), [batch], source.directions)
    assert random.mcc < 0.3
    assert random.f1 < 0.2
    assert random.l0 == pytest.approx(5, abs=0.1)


def test_measures_order_what_is_worse_and_worse(
    source: SyntheticActivations, batch: SyntheticBatch
) -> None:
    """From the oracle to random directions, all figures fall."""
    latents, rows = batch.features[:, :N_LATENTS], source.directions[:N_LATENTS]
    noise = permuted_directions(rows)
    kept = torch.rand(latents.shape, generator=torch.Generator().manual_seed(0))
    found = [
        scored(source, batch, latents * (kept > amount), (1 - amount) * rows + amount * noise)
        for amount in (0.0, 0.3, 0.6, 0.9)
    ]
    for name in ("f1", "mcc", "recall", "explained_variance"):
        values = [each.figures()[name] for each in found]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] + 0.1


def test_two_latents_of_one_feature_are_not_unique(
    source: SyntheticActivations, batch: SyntheticBatch
) -> None:
    twice = torch.cat([batch.features[:, :40], batch.features[:, :10]], dim=1)
    found = scored(source, batch, twice, source.directions[[*range(40), *range(10)]])
    assert found.uniqueness == 40 / 50
    assert found.mcc < 0.9  # the second ones have to take features that they do not point to


def test_counts_equal_brute_force(source: SyntheticActivations, batch: SyntheticBatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, features = batch.x[:500], batch.features[:500]
    latents = torch.rand(500, 30, generator=generator)
    latents *= torch.rand(500, 30, generator=generator) < 0.1
    latents[:, 4] = 0  # dead
    latents[:, 6] *= -1
    rows = torch.randn(30, SMALL.width, generator=generator)
    found = scored(source, SyntheticBatch(x, features), latents, rows)
    f1, precision, recall = [], [], []
    for latent in range(30):
        cosine = [
            abs(float(torch.cosine_similarity(rows[latent], d, 0))) for d in source.directions
        ]
        best = max(range(200), key=lambda i: cosine[i])
        assert best == int(found.best[latent])
        fires, active = latents[:, latent] != 0, features[:, best] > 0
        both = int((fires & active).sum())
        precision.append(both / max(1, int(fires.sum())))
        recall.append(both / max(1, int(active.sum())))
        f1.append(2 * both / max(1, int(fires.sum()) + int(active.sum())))
    assert found.f1 == pytest.approx(sum(f1) / 30)
    assert found.precision == pytest.approx(sum(precision) / 30)
    assert found.recall == pytest.approx(sum(recall) / 30)
    assert found.dead_share == pytest.approx(1 / 30)


def test_the_matching_is_the_best_of_all() -> None:
    cosine = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    every = [
        sum(float(cosine[i, j]) for i, j in enumerate(p)) / 4 for p in permutations(range(5), 4)
    ]
    assert matched_cosine(cosine) == pytest.approx(max(every))
    assert cosines(torch.zeros(1, 3), torch.eye(3)).tolist() == [[0, 0, 0]]


def test_merged_shards_equal_a_single_pass(
    source: SyntheticActivations, batch: SyntheticBatch
) -> None:
    like = Autoencoder(N_LATENTS, SMALL.width)
    autoencoder = random_autoencoder(like, 5.0)

    def stats(shards: list[slice]) -> RecoveryStats:
        found = RecoveryStats(autoencoder.directions, source.directions)
        for shard in shards:
            some = SyntheticBatch(batch.x[shard], batch.features[shard])
            code = autoencoder.code_sparse(some.x)
            found.update(some, code.latents, code.decode(code.latents))
        return found

    cuts = [0, 700, 701, 2000, 4000]
    shards = [slice(a, b) for a, b in pairwise(cuts)]
    whole, parts = stats([slice(0, 4000)]), [stats([shard]) for shard in shards]
    merged = parts[2].merge(parts[0]).merge(parts[3]).merge(parts[1])
    assert torch.equal(merged.hits, whole.hits)
    assert torch.equal(merged.fired, whole.fired)
    assert torch.equal(merged.active, whole.active)
    assert merged.result().figures() == pytest.approx(whole.result().figures(), rel=1e-9)
    other = RecoveryStats(permuted_directions(autoencoder.directions), source.directions)
    with pytest.raises(InputError, match="same directions"):
        merged.merge(other)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="same width"):
        RecoveryStats(torch.randn(3, 4), torch.randn(3, 5))
