"""k-sparse probes find planted latents, are at chance where there is nothing, and never look at test rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.floors import permuted_directions, random_autoencoder
from neuron_explainer.evaluation.linear_probes import (
    balanced,
    best_threshold,
    columns_of,
    fit_probe,
    mean_difference,
    quality,
    split_rows,
)
from neuron_explainer.evaluation.probing import SparseProbing, probing_table, sparse_probing
from neuron_explainer.evaluation.spread import Spread
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents

N_TOKENS, WIDTH, N_LATENTS = 3000, 24, 40


def planted(seed: int = 0) -> tuple[Latents, Tensor, Tensor, Tensor]:
    """Latents of which number 7 is nearly a label; activations, that label, and a label of nothing."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.rand(N_TOKENS, generator=generator) < 0.3
    values = torch.rand(N_TOKENS, N_LATENTS, generator=generator)
    values *= torch.rand(N_TOKENS, N_LATENTS, generator=generator) < 0.1
    flipped = torch.rand(N_TOKENS, generator=generator) < 0.005
    values[:, 7] = (label ^ flipped) * (1 + torch.rand(N_TOKENS, generator=generator))
    directions = torch.randn(N_LATENTS, WIDTH, generator=generator)
    nothing = torch.rand(N_TOKENS, generator=generator) < 0.4
    return Latents.of(values), values @ directions, label, nothing


@pytest.fixture(scope="module")
def found() -> dict[str, SparseProbing]:
    latents, x, label, nothing = planted()
    random = Latents.of(latents.dense()[torch.randperm(N_TOKENS)])
    labels = {"planted": label, "nothing": nothing}
    return sparse_probing(latents, labels, x, ks=(1, 2, 5), floor=random)


def test_a_planted_latent_is_found_by_one(found: dict[str, SparseProbing]) -> None:
    each = found["planted"]
    assert each.chosen[0] == 7
    assert each.accuracy[1].mean >= 0.98
    assert each.dense is not None
    assert each.dense.mean >= 0.98
    assert each.dense.mean > each.channels[5].mean >= each.channels[1].mean > 0.55
    assert (each.n_train, each.n_test) == pytest.approx((1200, 600), abs=80)


def test_chance_where_there_is_nothing(found: dict[str, SparseProbing]) -> None:
    for k in (1, 2, 5):
        assert found["nothing"].accuracy[k].mean == pytest.approx(0.5, abs=0.05)
        assert found["planted"].shuffled[k].mean == pytest.approx(0.5, abs=0.05)
        assert found["planted"].floor[k].mean == pytest.approx(0.5, abs=0.05)


def test_more_latents_are_never_worse_in_training(found: dict[str, SparseProbing]) -> None:
    for each in found.values():
        for seed in range(3):
            by_k = [each.train_accuracy[k].values[seed] for k in (1, 2, 5)]
            assert by_k == sorted(by_k)


def test_test_rows_decide_nothing() -> None:
    """With other latents in all test rows the same latents are chosen and training is as good."""
    latents, _, label, _ = planted()
    dense = latents.dense()
    test = split_rows(N_TOKENS, 0).test
    dense[test] = dense[test].roll(1, dims=1)
    one, other = (
        sparse_probing(each, {"planted": label}, seeds=(0,))["planted"]
        for each in (latents, Latents.of(dense))
    )
    assert one.chosen == other.chosen
    assert one.train_accuracy == other.train_accuracy
    assert other.accuracy[1].mean < 0.6


def test_logistic_probes_agree() -> None:
    latents, x, label, _ = planted()
    found = sparse_probing(latents, {"planted": label}, x, seeds=(0,), method="logistic")
    assert found["planted"].accuracy[1].mean >= 0.98


def test_trained_and_random_differ_only_where_there_is_something() -> None:
    """More than five standard deviations on planted labels, less than two on a label of nothing."""
    generator = torch.Generator().manual_seed(0)
    features = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    active = torch.rand(N_TOKENS, WIDTH, generator=generator) < 0.2
    x = active * (1 + torch.rand(N_TOKENS, WIDTH, generator=generator)) @ features
    autoencoder = Autoencoder(2 * WIDTH, WIDTH).requires_grad_(False)
    autoencoder.encoder.weight.zero_()
    autoencoder.encoder.weight[:WIDTH] = features
    autoencoder.decoder.weight[:, :WIDTH] = features.t()
    floor = random_autoencoder(autoencoder, 5.0)
    labels = {"planted": active[:, 3], "nothing": torch.rand(N_TOKENS, generator=generator) < 0.3}
    found = sparse_probing(
        autoencoder.encode_sparse(x), labels, x, ks=(1,), floor=floor.encode_sparse(x)
    )
    planted, nothing = found["planted"], found["nothing"]
    assert planted.accuracy[1].differs_from(planted.floor[1], sds=5)
    assert planted.accuracy[1].mean > planted.floor[1].mean
    assert not nothing.accuracy[1].differs_from(nothing.floor[1], sds=3)


def test_labels_without_enough_tokens_are_left_out() -> None:
    latents, x, label, _ = planted()
    rare = torch.zeros_like(label)
    rare[:20] = True
    found = sparse_probing(latents, {"rare": rare, "all": ~rare | True}, x, seeds=(0,))
    assert found == {}
    assert "no label" in probing_table(found)


def test_documents_are_on_one_side() -> None:
    groups = torch.arange(100) // 7
    split = split_rows(100, 0, groups)
    assert not set(groups[split.train].tolist()) & set(groups[split.test].tolist())
    assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(100))
    with pytest.raises(InputError, match="two groups"):
        split_rows(5, 0, torch.zeros(5))


def test_dense_latents_are_sparse_ones() -> None:
    latents, _, label, _ = planted()
    one, other = (
        sparse_probing(each, {"planted": label}, seeds=(0,))["planted"].to_dict()
        for each in (latents, latents.dense())
    )
    assert one == other


def test_what_does_not_fit_is_refused() -> None:
    latents, x, label, _ = planted()
    with pytest.raises(
        InputError, match=r"planted: expected a bool .* found \[3000\] of torch.int64"
    ):
        sparse_probing(latents, {"planted": label.long()})
    wrong: Any = label.numpy()
    with pytest.raises(InputError, match="planted must be a tensor"):
        sparse_probing(latents, {"planted": wrong})
    with pytest.raises(InputError, match=r"expected latents \[t, l\], found \[30, 100, 40\]"):
        sparse_probing(latents.dense().view(30, 100, 40), {"planted": label})
    bad = x.clone()
    bad[:, 3] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        sparse_probing(latents, {"planted": label}, bad)
    with pytest.raises(InputError, match="planted: expected 3000 rows"):
        sparse_probing(latents, {"planted": label[1:]})
    with pytest.raises(InputError, match="ks must be"):
        sparse_probing(latents, {"planted": label}, ks=(0,))
    with pytest.raises(InputError, match="with the label and rows without"):
        fit_probe(x, torch.ones(N_TOKENS, dtype=torch.bool))


@pytest.mark.parametrize("aim", ["accuracy", "f1"])
def test_no_other_threshold_is_better(aim: str) -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(60, generator=generator) < 0.4
    scores = ((torch.randn(60, generator=generator) + y) * 4).round() / 4  # with equal ones
    best = best_threshold(scores.double(), y, "f1" if aim == "f1" else "accuracy")
    every = [getattr(quality(scores > t, y), aim) for t in scores.unique() - 0.01]
    assert getattr(quality(scores > best, y), aim) == pytest.approx(max(every))


def test_sparse_sums_equal_dense_ones() -> None:
    latents, _, label, _ = planted()
    dense = latents.dense()
    chosen = torch.tensor([7, 0, 39])
    assert torch.equal(columns_of(latents, chosen), dense[:, chosen])
    expected = dense[label].double().mean(0) - dense[~label].double().mean(0)
    torch.testing.assert_close(mean_difference(latents, label), expected)
    rows = balanced(torch.arange(N_TOKENS), label, 100, 0)
    assert (len(rows), int(label[rows].sum())) == (100, 50)


def test_the_discriminant_finds_a_direction_among_correlated_columns() -> None:
    """The difference of means alone would be misled by a column of large variance."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(2000, generator=generator) < 0.5
    shared = 5 * torch.randn(2000, generator=generator)
    x = torch.stack([shared + y, shared], dim=1)
    probe = fit_probe(x, y)
    assert quality(probe.predict(x), y).accuracy > 0.99
    torch.testing.assert_close(
        probe.direction,
        torch.tensor([1, -1], dtype=torch.float64) / 2**0.5,
        atol=0.02,
        rtol=0,
    )


def test_the_direction_is_that_of_linear_discriminant_analysis() -> None:
    """As scikit-learn finds it, where both classes have as many rows."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    y = torch.arange(400) % 2 == 0
    x = torch.randn(400, 6, generator=generator) @ mix + y[:, None] * torch.randn(
        6, generator=generator
    )
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x.double().numpy(), y.numpy()).coef_[0]
    ours = fit_probe(x, y, ridge=1e-9).direction
    cosine = torch.cosine_similarity(ours, torch.from_numpy(theirs), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    # One class rarer than the other: the products of all rows give the same as those of each class.
    rare = torch.arange(400) % 10 == 0
    for label in (rare, ~rare):
        rows = x.double()
        given = fit_probe(x, label, products=rows.t() @ rows)
        first, second = (torch.cov(rows[side].t(), correction=0) for side in (label, ~label))
        within = first + second
        scale = within.diagonal().sqrt()
        scaled = within / torch.outer(scale, scale) + 1e-3 * torch.eye(6)
        difference = rows[label].mean(0) - rows[~label].mean(0)
        expected = torch.linalg.solve(scaled, difference / scale) / scale
        torch.testing.assert_close(given.direction, expected / expected.norm())


def test_a_random_autoencoder_has_the_same_shape_and_its_own_directions() -> None:
    torch.manual_seed(0)
    like = Autoencoder(32, 8, input_normalization="layer_norm", location="1/mlp.post_act")
    one, same, other = (random_autoencoder(like, 3.4, seed) for seed in (0, 0, 1))
    x = torch.randn(50, 8)
    assert int((one.encode(x) != 0).sum(1).max()) <= 3
    assert (one.n_latents, one.location, one.input_normalization) == (
        32,
        like.location,
        "layer_norm",
    )
    torch.testing.assert_close(one.directions.norm(dim=1), torch.ones(32))
    assert torch.equal(one.directions, same.directions)
    assert not torch.equal(one.directions, other.directions)
    with pytest.raises(InputError, match="at most 32"):
        random_autoencoder(like, 0.0)


def test_permuted_directions_keep_lengths_and_angles() -> None:
    rows = torch.randn(12, 6)
    moved = permuted_directions(rows, 3)
    torch.testing.assert_close(
        (moved @ moved.t()).flatten().sort().values, (rows @ rows.t()).flatten().sort().values
    )
    assert not torch.equal(moved, rows)


def test_spread() -> None:
    spread = Spread.of([1, 2, 3])
    assert (spread.mean, spread.sd, spread.smallest_difference) == (2, 1, 2.8)
    assert f"{spread:.1f}" == "2.0 ± 1.0"
    assert spread.differs_from(Spread.of([5, 5, 5.1]))
    assert not spread.differs_from(Spread.of([3.9, 4, 3.9]))
    assert not spread.differs_from(Spread.of([9]).__class__.of([2.5, 2.4]))
    one = Spread.of([4])
    assert not one.differs_from(spread)
    assert f"{one}" == "4.000"
    assert one.to_dict() == {"mean": 4, "sd": None, "smallest_difference": None, "values": [4]}
    with pytest.raises(InputError, match="at least one"):
        Spread.of([])
