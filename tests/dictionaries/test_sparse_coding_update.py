"""The dictionary step and the frequency weights, against sums written out."""

import numpy as np
import pytest
import torch

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.dictionaries.sparse_coding import (
    SparseCodingConfig,
    count_tokens,
    frequency_weights,
)
from neuron_explainer.dictionaries.sparse_coding.data import Batch, Place, shuffled_parts
from neuron_explainer.dictionaries.sparse_coding.dictionary_update import (
    initial_dictionary,
    normalize_columns,
    updated_dictionary,
)
from neuron_explainer.dictionaries.sparse_coding.learner import DictionaryLearner
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoders.fista import fista
from neuron_explainer.models.locations import ActivationLocation

N_INPUTS, N_LATENTS, ROWS = 5, 8, 6


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_is_the_sum_over_rows_atom_by_atom(weighted):
    dictionary = normalize_columns(random(N_INPUTS, N_LATENTS))
    residual, latents = random(ROWS, N_INPUTS, seed=1), random(ROWS, N_LATENTS, seed=2).relu()
    hessian = random(N_LATENTS, seed=3).square()
    weights = random(ROWS, seed=4).square() if weighted else None
    found = updated_dictionary(
        dictionary, residual, latents, hessian, step_size=0.1, floor=0.01, weights=weights
    )
    for i in range(N_LATENTS):
        step = np.zeros(N_INPUTS)
        for r in range(ROWS):
            weight = 1.0 if weights is None else float(weights[r])
            step += weight * residual[r].numpy() * float(latents[r, i]) / ROWS
        column = dictionary[:, i].numpy() + 0.1 * step / (float(hessian[i]) + 0.01)
        np.testing.assert_allclose(found[:, i].numpy(), column / np.linalg.norm(column), rtol=1e-12)


def test_the_step_goes_against_the_gradient():
    dictionary = normalize_columns(random(N_INPUTS, N_LATENTS))
    x, latents = random(ROWS, N_INPUTS, seed=1), random(ROWS, N_LATENTS, seed=2).relu()
    free = dictionary.clone().requires_grad_()
    loss = 0.5 * (x - latents @ free.T).square().sum() / ROWS
    (gradient,) = torch.autograd.grad(loss, free)
    floor = 1.0  # and a Hessian of zero: a plain step down the gradient
    found = updated_dictionary(
        dictionary,
        x - latents @ dictionary.T,
        latents,
        torch.zeros(N_LATENTS, dtype=torch.float64),
        step_size=0.05,
        floor=floor,
    )
    torch.testing.assert_close(found, normalize_columns(dictionary - 0.05 * gradient))


def test_columns_have_length_one():
    columns = random(N_INPUTS, N_LATENTS) * 1e3
    columns[:, 2] *= 1e-9
    columns[:, 3] = 0
    norms = normalize_columns(columns.float()).norm(dim=0)
    expected = torch.ones(N_LATENTS)
    expected[3] = 0
    torch.testing.assert_close(norms, expected, atol=1e-6, rtol=0)
    first = initial_dictionary(N_INPUTS, 50, seed=1)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(50, dtype=torch.float64))
    assert torch.equal(first, initial_dictionary(N_INPUTS, 50, seed=1))
    assert not torch.equal(first, initial_dictionary(N_INPUTS, 50, seed=2))


def test_hessian_and_statistics_are_moving_averages_recomputed():
    config = SparseCodingConfig(N_LATENTS, 0.2, history=7, step_size=0.05)
    learner = DictionaryLearner(config, N_INPUTS, random(1))
    batches = [random(ROWS + i, N_INPUTS, seed=i) for i in range(20)]
    hessian, act_l1 = np.zeros(N_LATENTS), np.zeros(N_LATENTS)
    signal = noise = l0 = 0.0
    fired = np.zeros(N_LATENTS, dtype=int)
    for x in batches:
        a = fista(x, learner.dictionary, 0.2).latents.numpy()
        residual = x.numpy() - a @ learner.dictionary.numpy().T
        learner.learn(x)
        hessian = (1 - 1 / 7) * hessian + (a**2).mean(0) / 7
        act_l1 = (1 - 1 / 7) * act_l1 + np.abs(a).mean(0) / 7
        signal = (1 - 1 / 7) * signal + (x.numpy() ** 2).sum() / len(x) / 7
        noise = (1 - 1 / 7) * noise + (residual**2).sum() / len(x) / 7
        l0 = (1 - 1 / 7) * l0 + (a > 0).sum() / len(x) / 7
        fired += (a > 0).sum(0)
        torch.testing.assert_close(
            learner.dictionary.norm(dim=0), torch.ones(N_LATENTS, dtype=torch.float64)
        )
    share = 1 - (1 - 1 / 7) ** 20
    np.testing.assert_allclose(learner.hessian.numpy(), hessian, rtol=1e-9)
    found = learner.statistics()
    assert found["snr"] == pytest.approx(signal / noise)
    assert found["act_l1_max"] == pytest.approx(act_l1.max() / share)
    assert found["act_l1_min"] == pytest.approx(act_l1.min() / share)
    assert found["l0"] == pytest.approx(l0 / share)
    assert found["cut_short"] == 0
    assert found["rows"] == sum(map(len, batches))
    autoencoder = learner.autoencoder(None, None, {})
    np.testing.assert_allclose(
        autoencoder.latents_activation_frequency.numpy(), fired / found["rows"], rtol=1e-6
    )
    np.testing.assert_allclose(autoencoder.latents_mean_square.numpy(), hessian / share, rtol=1e-6)


def test_solves_that_end_early_are_counted():
    config = SparseCodingConfig(N_LATENTS, 0.01, max_iterations=3)
    learner = DictionaryLearner(config, N_INPUTS, random(1))
    learner.learn(random(ROWS, N_INPUTS))
    assert learner.statistics()["cut_short"] == pytest.approx(1)


def test_latents_that_rest_are_known():
    config = SparseCodingConfig(2, 0.1, step_size=1e-9)
    learner = DictionaryLearner(config, 2, random(1))
    learner.dictionary = torch.eye(2, dtype=torch.float64)
    for x in ([[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]):
        learner.learn(torch.tensor(x, dtype=torch.float64))
    autoencoder = learner.autoencoder(None, None, {})
    assert autoencoder.stats_last_nonzero.tolist() == [2, 0]
    assert autoencoder.latents_activation_frequency.tolist() == [0.5, 0.75]


# ---- frequency weights -----------------------------------------------------------------------------


def test_weights_are_inverse_roots_of_counts_by_id():
    counts = count_tokens([torch.tensor([[5, 5, 5, 5], [2, 5, 2, 5]]), torch.tensor([2, 2, 7])], 10)
    assert counts.tolist() == [0, 0, 4, 0, 0, 6, 0, 1, 0, 0]
    weights = frequency_weights(torch.tensor([[5, 2], [7, 0]]), counts)
    torch.testing.assert_close(
        weights, torch.tensor([[6**-0.5, 0.5], [1.0, 1.0]], dtype=torch.float64)
    )
    assert weights[0, 0] < weights[1, 0]  # frequent below rare
    # beyond the counted ids, which another vocabulary may have: not known either
    assert frequency_weights(torch.tensor([12]), counts).tolist() == [1.0]


def test_pads_are_not_counted():
    tokens = torch.tensor([[0, 0, 3, 1], [3, 3, 3, 3]])
    pad = torch.tensor([[True, True, False, False], [False] * 4])
    place = torch.zeros_like(tokens)
    counts = count_tokens([TokenBatch(tokens, place, place, pad)], 4)
    assert counts.tolist() == [0, 1, 0, 5]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([1.0]), "must be whole numbers, found torch.float32"),
        (torch.tensor([3, -1]), "must be >= 0, found -1"),
        (torch.tensor([3, 4]), "token 4 is outside a vocabulary of 4"),
    ],
)
def test_ids_that_are_none(tokens, message):
    with pytest.raises(InputError, match=message):
        count_tokens([tokens], 4)


def test_weights_stay_with_their_rows():
    """Rows of two places are joined, shuffled and cut: each keeps the weight of its token."""
    tokens = torch.tensor([0, 1, 2, 1, 1, 0, 3])
    x = tokens[:, None].double()
    counts = torch.tensor([1, 4, 16, 64])
    config = SparseCodingConfig(4, 0.1, batch_size=4)
    places: list[Place] = [None, ActivationLocation("logits")]
    batch = Batch(dict(zip(places, (x, x + 10), strict=True)), tokens)
    parts = list(shuffled_parts(batch, places, config, 3, counts))
    assert [len(rows) for rows, _ in parts] == [4, 4, 3, 3]
    rows, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    assert sorted(rows.flatten().tolist()) == sorted([*x.flatten(), *(x + 10).flatten()])
    assert rows.flatten().tolist() != [*x.flatten(), *(x + 10).flatten()]
    expected = counts[rows.flatten().long() % 10].double().rsqrt()
    torch.testing.assert_close(weights, expected)
    again = list(shuffled_parts(batch, places, config, 3, None))
    assert torch.equal(torch.cat([rows for rows, _ in again]), rows)
    later = list(shuffled_parts(batch, places, config, 4, None))
    assert not torch.equal(torch.cat([rows for rows, _ in later]), rows)
