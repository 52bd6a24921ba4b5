"""Codes against scikit-learn's Lasso, the conditions of the minimum, and each other."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from neuron_explainer.models.autoencoders.fista import fista, ista
from tests.reference import fista_numpy

N_INPUTS, N_LATENTS, ROWS, PENALTY = 64, 256, 8, 0.3


def problem(seed=0, n=N_INPUTS, n_latents=N_LATENTS):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(n, n_latents, generator=generator, dtype=torch.float64)
    dictionary /= dictionary.norm(dim=0)
    return torch.randn(ROWS, n, generator=generator, dtype=torch.float64), dictionary


def lasso(x, dictionary, penalty):
    """scikit-learn's objective is ours divided by n."""
    model = Lasso(
        alpha=penalty / len(dictionary),
        positive=True,
        fit_intercept=False,
        max_iter=200_000,
        tol=1e-10,
    )
    return np.stack([model.fit(dictionary.numpy(), row).coef_.copy() for row in x.numpy()])


@pytest.mark.parametrize(("n", "n_latents"), [(64, 256), (64, 40)])  # without a Gram matrix, with
@pytest.mark.parametrize("penalty", [0.1, PENALTY])
def test_equals_scikit_learn(n, n_latents, penalty):
    x, dictionary = problem(n=n, n_latents=n_latents)
    expected = lasso(x, dictionary, penalty)
    assert (expected > 0).any(axis=1).all()
    exact = fista(x, dictionary, penalty, max_iterations=20_000, tolerance=1e-9)
    np.testing.assert_allclose(exact.latents.numpy(), expected, atol=1e-5)
    single = fista(x.float(), dictionary.float(), penalty, max_iterations=20_000, tolerance=1e-6)
    np.testing.assert_allclose(single.latents.numpy(), expected, atol=1e-3)


def test_the_conditions_of_the_minimum_hold_at_the_default_tolerance():
    x, dictionary = problem()
    a = fista(x, dictionary, PENALTY).latents
    correlations = (x - a @ dictionary.T) @ dictionary
    assert (correlations - PENALTY)[a > 0].abs().max() < 1e-3
    assert correlations[a == 0].max() <= PENALTY + 1e-3


def test_ista_and_fista_agree():
    x, dictionary = problem()
    found, slow = (
        solve(x[:4], dictionary, 1.0, max_iterations=50_000, tolerance=1e-7)
        for solve in (fista, ista)
    )
    torch.testing.assert_close(found.latents, slow.latents, atol=1e-5, rtol=0)
    assert found.iterations.sum() < slow.iterations.sum() / 2


def test_restarts_save_iterations_and_change_no_code():
    x, dictionary = problem()
    code = fista(x, dictionary, PENALTY, max_iterations=5000, tolerance=1e-7)
    iterations = int(code.iterations.max())
    published = fista(x, dictionary, PENALTY, max_iterations=10 * iterations, tolerance=0)
    torch.testing.assert_close(code.latents, published.latents, atol=1e-4, rtol=0)
    as_long = fista(x, dictionary, PENALTY, max_iterations=iterations, tolerance=0)
    assert (code.violation < as_long.violation / 10).all()


@pytest.mark.parametrize("n_latents", [N_LATENTS, 40])
def test_a_batch_has_the_codes_of_its_rows(n_latents):
    x, dictionary = problem(n_latents=n_latents)
    together = fista(x, dictionary, PENALTY).latents
    for row, code in zip(x, together, strict=True):
        torch.testing.assert_close(fista(row, dictionary, PENALTY).latents, code)


def test_the_objective_keeps_falling_to_the_minimum():
    """FISTA may rise now and then; the lowest value so far comes near the minimum like 1/k²."""
    x, dictionary = (part.numpy() for part in problem())
    row = x[0]

    def objective(iterations):
        code = fista(
            torch.from_numpy(row),
            torch.from_numpy(dictionary),
            PENALTY,
            max_iterations=iterations,
            tolerance=0,
        ).latents
        return fista_numpy.objective(row, dictionary, code.numpy(), PENALTY)

    looks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
    best = np.minimum.accumulate([objective(n) for n in looks])
    code = lasso(torch.from_numpy(x[:1]), torch.from_numpy(dictionary), PENALTY)[0]
    lowest = fista_numpy.objective(row, dictionary, code, PENALTY)
    eigenvalue = np.linalg.eigvalsh(dictionary @ dictionary.T)[-1]
    bound = 2 * eigenvalue * (code @ code) / (np.array(looks) + 1) ** 2  # theorem 4.4
    assert (best - lowest <= bound).all()
    assert best[-1] - lowest < 1e-8
