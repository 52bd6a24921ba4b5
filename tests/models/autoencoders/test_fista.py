"""Sparse codes: the conditions of the minimum, and independent numpy, decide what is right."""

import itertools

import numpy as np
import pytest
import torch

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoders.fista import fista, ista, largest_eigenvalue
from neuron_explainer.models.autoencoders.nonlinearities import Fista
from tests.reference import fista_numpy

N_INPUTS, N_LATENTS, ROWS, PENALTY = 12, 24, 5, 0.3


def problem(dtype=torch.float64, n=N_INPUTS, n_latents=N_LATENTS, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(n, n_latents, generator=generator, dtype=torch.float64)
    dictionary /= dictionary.norm(dim=0)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64) * 2
    return x.to(dtype), dictionary.to(dtype)


@pytest.mark.parametrize("solver", [fista, ista])
@pytest.mark.parametrize("penalty", [0.2, 1.0])
def test_the_conditions_of_the_minimum_hold(solver, penalty):
    x, dictionary = problem()
    code = solver(x, dictionary, penalty, max_iterations=50_000, tolerance=1e-8)
    assert (code.violation <= 1e-8).all()
    a = code.latents
    gradient = (a @ dictionary.T - x) @ dictionary + penalty
    assert (a >= 0).all()
    assert (a > 0).any()
    assert gradient[a > 0].abs().max() < 1e-7
    assert gradient[a == 0].min() > -1e-7


@pytest.mark.parametrize("solver", [fista, ista])
@pytest.mark.parametrize(("n", "n_latents"), [(12, 24), (12, 7), (1, 3)])
def test_equals_coordinate_descent(solver, n, n_latents):
    x, dictionary = problem(n=n, n_latents=n_latents, rows=2)
    found = solver(x, dictionary, PENALTY, max_iterations=50_000, tolerance=1e-9)
    for row, code in zip(x.numpy(), found.latents.numpy(), strict=True):
        expected = fista_numpy.coordinate_descent(row, dictionary.numpy(), PENALTY)
        assert fista_numpy.objective(row, dictionary.numpy(), code, PENALTY) == pytest.approx(
            fista_numpy.objective(row, dictionary.numpy(), expected, PENALTY), rel=1e-9
        )
        if n > 1:  # the minimum is unique where atoms are in general position
            np.testing.assert_allclose(code, expected, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 15, 100])
def test_a_fixed_number_of_iterations_is_the_published_program(iterations):
    x, dictionary = problem()
    found = fista(x, dictionary, PENALTY, max_iterations=iterations, tolerance=0)
    expected = fista_numpy.fista(x.numpy(), dictionary.numpy(), PENALTY, iterations)
    np.testing.assert_allclose(found.latents.numpy(), expected, atol=1e-12)
    assert (found.iterations == iterations).all()


def test_ista_never_raises_the_objective():
    x, dictionary = problem(rows=1)
    values = [
        fista_numpy.objective(
            x[0].numpy(),
            dictionary.numpy(),
            ista(x[0], dictionary, PENALTY, max_iterations=n, tolerance=0).latents.numpy(),
            PENALTY,
        )
        for n in range(1, 30)
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))


def test_a_row_has_the_code_that_it_has_alone():
    x, dictionary = problem()
    x[3] *= 50  # rows that take different numbers of iterations
    x[4] *= 0.1
    whole = fista(x, dictionary, PENALTY)
    assert len(set(whole.iterations.tolist())) > 1
    for i, row in enumerate(x):
        alone = fista(row, dictionary, PENALTY)
        assert alone.iterations == whole.iterations[i]
        torch.testing.assert_close(alone.latents, whole.latents[i], rtol=1e-9, atol=1e-12)
    cube = fista(x[:4].view(2, 2, N_INPUTS), dictionary, PENALTY)
    assert cube.latents.shape == (2, 2, N_LATENTS)
    assert cube.violation.shape == (2, 2)
    torch.testing.assert_close(cube.latents.flatten(0, 1), whole.latents[:4])
    assert fista(x[:0], dictionary, PENALTY).latents.shape == (0, N_LATENTS)


def test_the_stopping_rule_is_the_one_stated():
    x, dictionary = problem(torch.float32)
    for tolerance in (1e-2, 1e-4):
        code = fista(x, dictionary, PENALTY, tolerance=tolerance, max_iterations=5000)
        assert (code.violation <= tolerance).all()
        assert (code.iterations % 10 == 0).all()
        gradient = (code.latents @ dictionary.T - x) @ dictionary + PENALTY
        off = torch.where(code.latents > 0, gradient.abs(), torch.relu(-gradient)).amax(-1)
        scale = (x @ dictionary).abs().amax(-1)
        torch.testing.assert_close(code.violation, off / scale, atol=1e-6, rtol=1e-3)
    short = fista(x, dictionary, PENALTY, tolerance=1e-6, max_iterations=3)
    assert (short.iterations == 3).all()
    assert (short.violation > 1e-6).all()


def test_float32_reaches_the_minimum():
    x, dictionary = problem(torch.float32)
    exact = fista(x.double(), dictionary.double(), PENALTY, tolerance=1e-9, max_iterations=20_000)
    found = fista(x, dictionary, PENALTY, tolerance=1e-6, max_iterations=5000)
    assert (found.latents - exact.latents).abs().max() < 1e-4 * exact.latents.abs().max()


def test_ends_of_the_range():
    x, dictionary = problem()
    nothing = fista(x, dictionary, 1e6)
    assert not nothing.latents.any()
    assert not nothing.violation.any()
    assert not fista(torch.zeros_like(x), dictionary, 0.0).latents.any()
    assert not fista(x, torch.zeros_like(dictionary), PENALTY).latents.any()
    x[2, 3] = float("nan")
    code = fista(x, dictionary, PENALTY)
    assert code.latents.isnan().all(dim=-1).tolist() == [i == 2 for i in range(ROWS)]
    assert largest_eigenvalue(dictionary) == pytest.approx(
        float(torch.linalg.matrix_norm(dictionary, 2)) ** 2
    )


def test_no_gradient_is_an_error_and_not_zero():
    x, dictionary = problem()
    correlations = (x @ dictionary).requires_grad_()
    latents = Fista(PENALTY)(correlations, dictionary)
    torch.testing.assert_close(latents.detach(), fista(x, dictionary, PENALTY).latents)
    with pytest.raises(InputError, match="no gradient runs through a sparse code"):
        latents.sum().backward()
    assert not Fista(PENALTY)(x @ dictionary, dictionary).requires_grad


def test_an_activation_is_saved_and_read_back():
    activation = Fista(0.25, max_iterations=70, tolerance=1e-4)
    state = activation.state_dict()
    assert dict(state) == {"penalty": 0.25, "max_iterations": 70, "tolerance": 1e-4}
    other = Fista(9.0)
    other.load_state_dict(state)
    assert repr(other) == "Fista(penalty=0.25, max_iterations=70, tolerance=0.0001)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty": -1.0}, "penalty must be a number >= 0, found -1.0"),
        ({"penalty": float("nan")}, "penalty must be a number"),
        ({"penalty": True}, "penalty must be a number"),
        ({"tolerance": -1e-3}, "tolerance must be a number >= 0"),
        ({"max_iterations": 0}, "max_iterations must be a whole number >= 1, found 0"),
        ({"max_iterations": 2.5}, "max_iterations must be a whole number"),
        ({"x": torch.zeros(3, 7)}, r"expected x of width 12.* found shape \[3, 7\]"),
        ({"x": torch.tensor(1.0)}, r"expected x of width 12.* found shape \[\]"),
        ({"x": torch.zeros(3, 12)}, r"is torch\.float64, x is torch\.float32"),
        ({"dictionary": torch.zeros(16)}, r"dictionary must be \[n, l\], found \[16\]"),
    ],
)
def test_bad_input(changes, message):
    x, dictionary = problem()
    arguments = {"x": x, "dictionary": dictionary, "penalty": PENALTY} | changes
    with pytest.raises(InputError, match=message):
        fista(**arguments)
