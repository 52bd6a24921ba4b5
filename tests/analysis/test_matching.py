"""Neighbours, matchings and stability, against brute force in float64."""

import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from neuron_explainer.analysis.matching import (
    encoder_decoder_cosine,
    match,
    nearest,
    neuron_alignment,
    rows_of,
    stability,
)
from neuron_explainer.errors import InputError, MissingExtraError
from neuron_explainer.models.autoencoders.pruned import omit_least_active_latents
from tests.analysis.direction_models import array, autoencoder


def random_rows(n: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    x, y = array(a), array(b)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    found: np.ndarray = x @ y.T
    return found


def test_neighbours_are_those_of_all_cosines() -> None:
    rows, others = random_rows(30), random_rows(20, seed=1)
    within, across = cosines(rows, rows), cosines(rows, others)
    np.fill_diagonal(within, -2)
    for unit in (0, 17):
        found = nearest(rows, unit, k=4)
        assert found.units == tuple(np.argsort(-within[unit])[:4].tolist())
        np.testing.assert_allclose(found.cosines, np.sort(within[unit])[::-1][:4], atol=1e-6)
        assert nearest(rows, unit, others, 50).units == tuple(np.argsort(-across[unit]).tolist())
        opposite = nearest(rows, unit, others, 3, signed=True)
        order = np.argsort(-np.abs(across[unit]))[:3]
        assert opposite.units == tuple(order.tolist())
        np.testing.assert_allclose(opposite.cosines, across[unit][order], atol=1e-6)
    assert "nearest decoder rows to 17" in repr(nearest(rows, 17, k=2))


def test_rows_of_zeros_take_no_part() -> None:
    rows = random_rows(6)
    rows[2] = 0
    assert 2 not in nearest(rows, 0).units
    assert len(nearest(rows, 0).units) == 4
    with pytest.raises(InputError, match="direction 2 is zero"):
        nearest(rows, 2)
    found = match(rows, random_rows(5, seed=1), one_to_one=True)
    assert found.nearest_of_a[2] == -1
    assert np.isnan(found.cosine_of_a[2])
    assert found.partner_of_a is not None
    assert found.partner_of_a[2] == -1
    assert 2 not in found.nearest_of_b
    assert not np.isnan(found.mmcs)
    assert np.isnan(match(torch.zeros(3, 12), rows).mmcs)
    # Not even where every other cosine is negative.
    opposite = match(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [-1.0, 0.1]]))
    assert opposite.nearest_of_a.tolist() == [1]
    assert opposite.nearest_of_b.tolist() == [-1, 0]


def test_sides_of_an_autoencoder_and_of_a_pruned_one() -> None:
    made = autoencoder("0/resid.torso.post_mlp")
    torch.testing.assert_close(rows_of(made), made.decoder.weight.t())
    torch.testing.assert_close(rows_of(made, "encoder"), made.encoder.weight)
    expected = np.diag(cosines(made.encoder.weight, made.decoder.weight.t()))
    np.testing.assert_allclose(encoder_decoder_cosine(made), expected, atol=1e-6)
    made.latents_activation_frequency[:] = torch.arange(40).float()
    pruned = omit_least_active_latents(made, 10)
    assert not rows_of(pruned, "encoder")[:30].any()
    torch.testing.assert_close(rows_of(pruned, "encoder")[30:], made.encoder.weight[30:])
    found = encoder_decoder_cosine(pruned)
    assert found[:30].isnan().all()
    np.testing.assert_allclose(found[30:], expected[30:], atol=1e-6)
    transcoder = autoencoder("0/resid.torso.post_ln_mlp", n_outputs=16)
    with pytest.raises(InputError, match="reads and writes at different places"):
        encoder_decoder_cosine(transcoder)
    with pytest.raises(InputError, match="side must be"):
        rows_of(made, "both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="they are 0 to 39"):
        nearest(made, 40)
    with pytest.raises(InputError, match="cannot be compared"):
        nearest(made, 0, random_rows(3))


def test_alignment_with_neurons() -> None:
    row = torch.tensor([[0.5, -3.0, 1.0, 2.0, 0.0]])
    found = neuron_alignment(row, 0, 2)
    assert (found.entries, found.values) == ((3, 2), (2.0, 1.0))
    assert found.shares == pytest.approx((2 / 6.5, 1 / 6.5))
    signed = neuron_alignment(row, 0, 2, signed=True)
    assert (signed.entries, signed.values) == ((1, 3), (-3.0, 2.0))


@pytest.mark.parametrize("signed", [False, True])
def test_a_matching_is_that_of_all_cosines(signed: bool) -> None:
    a, b = random_rows(23), random_rows(17, seed=1)
    expected = cosines(a, b)
    expected = np.abs(expected) if signed else expected
    found = match(a, b, one_to_one=True, signed=signed, chunk_bytes=4 * 17 * 5)  # 5 rows at a time
    assert found.nearest_of_a.tolist() == expected.argmax(1).tolist()
    assert found.nearest_of_b.tolist() == expected.argmax(0).tolist()
    np.testing.assert_allclose(found.cosine_of_b, expected.max(0), atol=1e-6)
    assert found.mmcs == pytest.approx(expected.max(1).mean(), abs=1e-6)
    assert found.mmcs_of_b == pytest.approx(expected.max(0).mean(), abs=1e-6)
    first, second = linear_sum_assignment(expected, maximize=True)
    assert found.partner_of_a is not None
    assert found.partner_of_a[first].tolist() == second.tolist()
    assert (found.partner_of_a == -1).sum() == 6
    assert found.mean_partner_cosine == pytest.approx(expected[first, second].mean(), abs=1e-6)
    assert found.share_above(0.5) == pytest.approx((expected.max(1) > 0.5).mean())
    assert "one to one" in repr(found)


def test_planted_copies_are_found_and_random_directions_are_the_floor() -> None:
    a = random_rows(200, 32)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    b = 3 * a[order] + 0.05 * random_rows(200, 32, seed=3)
    found = match(a, b, one_to_one=True)
    assert found.nearest_of_b.tolist() == order.tolist()
    assert found.mmcs > 0.99
    unrelated = match(a, random_rows(200, 32, seed=4))
    assert unrelated.mmcs == pytest.approx(unrelated.floor, abs=0.02)
    assert unrelated.floor == match(a, b).floor  # the same shape and seed
    assert f"random directions get {unrelated.floor:.3f}" in repr(unrelated)


def test_stability_over_seeds() -> None:
    shared = random_rows(60, 32)
    dictionaries = [
        torch.cat([shared, random_rows(40, 32, seed=10 + seed)])[torch.randperm(100)]
        for seed in range(3)
    ]
    found = stability(dictionaries, thresholds=(0.7, 0.99))
    pairs = [[cosines(x, y).max(1) for y in dictionaries if y is not x] for x in dictionaries]
    for each, expected in zip(found.cosines, pairs, strict=True):
        np.testing.assert_allclose(each, np.mean(expected, axis=0), atol=1e-6)
    assert found.share_above[0.99] == pytest.approx(0.6)
    assert found.floor_share_above[0.99] == 0
    assert 0.3 < found.floor < 0.7 < found.mean
    assert "3 dictionaries" in repr(found)
    with pytest.raises(InputError, match="two dictionaries or more"):
        stability(dictionaries[:1])


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match="pip install scipy"):
        match(random_rows(3), random_rows(3), one_to_one=True)
    match(random_rows(3), random_rows(3))
