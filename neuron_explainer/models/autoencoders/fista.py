"""Non-negative sparse coding with a fixed dictionary, by FISTA or ISTA.

    code(x) = argmin over a >= 0 of  ½ ‖x - Φ a‖² + penalty · Σᵢ aᵢ

This module only encodes; the dictionary Φ is learned elsewhere. The gradient step is 1/λ_max(Φ Φᵀ), the
largest with which the iteration cannot diverge:

    y, t     = a₀ = 0, 1
    aₖ₊₁     = max(0, y - step · (Φᵀ(Φ y - x) + penalty))
    tₖ₊₁     = (1 + √(1 + 4 tₖ²)) / 2                     (ISTA: y = aₖ₊₁)
    y        = aₖ₊₁ + (tₖ - 1) / tₖ₊₁ · (aₖ₊₁ - aₖ)

The momentum of a row restarts (tₖ = 1) where it leads uphill: (y - aₖ₊₁) · (aₖ₊₁ - aₖ) > 0. Without
restarts FISTA overshoots, and needs up to twice as many iterations near the minimum.

**Stopping rule.** At the minimum the gradient g = Φᵀ(Φ a - x) + penalty is 0 where a > 0 and >= 0
where a = 0 (conditions of Karush, Kuhn and Tucker). Every tenth iteration is checked. A row stops at the
first check that finds no entry further from these conditions than ``tolerance · max |Φᵀx|``, or after
``max_iterations``. Each row stops by itself, so its code does not depend on the other rows.

Beck and Teboulle 2009, "A fast iterative shrinkage-thresholding algorithm", sections 3 and 4; Yun
et al. 2021, "Transformer visualization via dictionary learning", whose dictionaries are coded with
500 of these iterations. Restarts: O'Donoghue and Candès 2015, "Adaptive restart for accelerated
gradient schemes", section 3.2.

Shape legend: ``n`` inputs, ``l`` latents (atoms of the dictionary), ``r`` rows, ``…`` leading axes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.checks import check_tensor
from neuron_explainer.tables import by_shape

MAX_ITERATIONS = 500
TOLERANCE = 1e-5
_LOOK_EVERY = 10


class SparseCode(NamedTuple):
    """The result of a solve."""

    latents: Tensor
    """``[…, l]``, all >= 0."""
    iterations: Tensor
    """``[…]`` int64: iterations taken."""
    violation: Tensor
    """``[…]`` furthest distance from the conditions of the minimum, relative to ``max |Φᵀx|``."""

    def __repr__(self) -> str:
        return by_shape(self)


def fista(
    x: Tensor,
    dictionary: Tensor,
    penalty: float,
    *,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> SparseCode:
    """Return the codes of ``x`` ``[…, n]`` in ``dictionary`` ``[n, l]``, found by FISTA.

    ``tolerance=0`` takes exactly ``max_iterations`` without restarts, as earlier programs did.
    """
    correlations = _correlations(x, dictionary)
    return solve(correlations, dictionary, penalty, max_iterations, tolerance, momentum=True)


def ista(
    x: Tensor,
    dictionary: Tensor,
    penalty: float,
    *,
    max_iterations: int = 10 * MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> SparseCode:
    """Return the same codes, found by ISTA: without momentum, in more iterations, and with an objective
    that never rises."""
    correlations = _correlations(x, dictionary)
    return solve(correlations, dictionary, penalty, max_iterations, tolerance, momentum=False)


def solve(
    correlations: Tensor,
    dictionary: Tensor,
    penalty: float,
    max_iterations: int,
    tolerance: float,
    *,
    momentum: bool,
) -> SparseCode:
    """Return codes from ``correlations`` Φᵀx ``[…, l]``; nothing else about x is needed."""
    check_settings(penalty, max_iterations, tolerance)
    with torch.no_grad():
        rows = correlations.detach().reshape(-1, correlations.shape[-1])
        state = _Solve(rows, dictionary.detach(), penalty)
        latents, iterations, violation = state.run(max_iterations, tolerance, momentum)
    leading = correlations.shape[:-1]
    return SparseCode(
        latents.view(correlations.shape), iterations.view(leading), violation.view(leading)
    )


class _Solve:
    """The solution of one batch. Rows that have converged are taken out of it."""

    def __init__(self, correlations: Tensor, dictionary: Tensor, penalty: float) -> None:
        self.correlations = correlations  # [r, l]
        self.dictionary = dictionary  # [n, l]
        self.penalty = penalty
        n_inputs, n_latents = dictionary.shape
        # ΦᵀΦ, where a product with it is cheaper than one with Φ and one with Φᵀ.
        self.gram = dictionary.T @ dictionary if n_latents < 2 * n_inputs else None
        self.step = 1 / largest_eigenvalue(dictionary)

    def run(
        self, max_iterations: int, tolerance: float, momentum: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents ``[r, l]``, iterations ``[r]`` and violation ``[r]``."""
        n_rows = len(self.correlations)
        latents = torch.zeros_like(self.correlations)
        iterations = torch.zeros(n_rows, dtype=torch.int64, device=latents.device)
        violation = torch.zeros(n_rows, dtype=latents.dtype, device=latents.device)
        rows = torch.arange(n_rows, device=latents.device)  # those not converged yet
        target = self.correlations
        a = y = torch.zeros_like(target)
        t = torch.ones_like(target[:, :1])
        for iteration in range(1, max_iterations + 1):
            new = self._descend(y, target)
            if momentum:
                y, t = self._extrapolate(new, a, y, t, restart=tolerance > 0)
            else:
                y = new
            a = new
            if iteration % _LOOK_EVERY and iteration < max_iterations:
                continue
            off = self._violation(a, target)
            # With a tolerance of zero a row that converges early continues: the count is fixed.
            done = off <= tolerance if tolerance else torch.zeros_like(off, dtype=torch.bool)
            if iteration == max_iterations:
                done = torch.ones_like(done)
            arrived, under_way = rows[done], ~done
            latents[arrived], violation[arrived], iterations[arrived] = (
                a[done],
                off[done],
                iteration,
            )
            if not under_way.any():
                break
            rows, target = rows[under_way], target[under_way]
            a, y, t = a[under_way], y[under_way], t[under_way]
        return latents, iterations, violation

    def _descend(self, y: Tensor, correlations: Tensor) -> Tensor:
        """Return max(0, y - step · gradient), ``[r, l]``, in few passes over memory."""
        if self.gram is not None:
            new = torch.addmm(y, y, self.gram, alpha=-self.step)
        else:
            new = torch.addmm(y, y @ self.dictionary.T, self.dictionary, alpha=-self.step)
        new.add_(correlations, alpha=self.step).sub_(self.step * self.penalty)
        return new.relu_()

    @staticmethod
    def _extrapolate(
        new: Tensor, old: Tensor, y: Tensor, t: Tensor, restart: bool
    ) -> tuple[Tensor, Tensor]:
        """Return where the next gradient is taken ``[r, l]``, and the momentum ``[r, 1]``."""
        step = new - old
        if restart:
            uphill = torch.linalg.vecdot(y - new, step)[:, None] > 0
            t = torch.where(uphill, 1.0, t)
        t_new = (1 + (1 + 4 * t * t).sqrt()) / 2
        return torch.addcmul(new, step, (t - 1) / t_new), t_new

    def _gradient(self, a: Tensor, correlations: Tensor) -> Tensor:
        """The gradient of the objective, ``[r, l]``: Φᵀ(Φ a - x) + penalty."""
        if self.gram is not None:
            return a @ self.gram - correlations + self.penalty
        return (a @ self.dictionary.T) @ self.dictionary - correlations + self.penalty

    def _violation(self, a: Tensor, correlations: Tensor) -> Tensor:
        """Return the relative violation of the conditions, ``[r]``. A row with NaN has NaN, and never
        converges."""
        gradient = self._gradient(a, correlations)
        off = torch.where(a > 0, gradient.abs(), torch.relu(-gradient)).amax(dim=-1)
        scale = correlations.abs().amax(dim=-1)
        return torch.where(off == 0, off, off / scale)


def largest_eigenvalue(dictionary: Tensor) -> float:
    """Return λ_max(Φ Φᵀ), computed from the smaller of the two Gram matrices; 1 if Φ is zero."""
    wide = dictionary.shape[0] <= dictionary.shape[1]
    gram = dictionary @ dictionary.T if wide else dictionary.T @ dictionary
    # In float64: an eigenvalue that is too small would make the step too large.
    value = float(torch.linalg.eigvalsh(gram.double())[-1])
    return value if value > 0 else 1.0


def check_settings(penalty: float, max_iterations: int, tolerance: float) -> None:
    """Raise InputError for numbers with which the problem, or its solution, has no meaning."""
    for name, value in (("penalty", penalty), ("tolerance", tolerance)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise InputError(f"FISTA: {name} must be a number >= 0, found {value!r}.")
    whole = isinstance(max_iterations, int) and not isinstance(max_iterations, bool)
    if not whole or max_iterations < 1:
        raise InputError(
            f"FISTA: max_iterations must be a whole number >= 1, found {max_iterations!r}."
        )


def _correlations(x: Tensor, dictionary: Tensor) -> Tensor:
    """Φᵀx, ``[…, l]``."""
    check_tensor(dictionary, "FISTA: dictionary")
    check_tensor(x, "FISTA: x", dictionary.device)
    if dictionary.ndim != 2:
        raise InputError(f"FISTA: dictionary must be [n, l], found {list(dictionary.shape)}.")
    if x.ndim == 0 or x.shape[-1] != len(dictionary):
        raise InputError(
            f"FISTA: expected x of width {len(dictionary)}, as the dictionary "
            f"{list(dictionary.shape)}, in the last axis, found shape {list(x.shape)}."
        )
    if x.dtype != dictionary.dtype:
        raise InputError(
            f"FISTA: the dictionary is {dictionary.dtype}, x is {x.dtype}; convert one of them."
        )
    return x @ dictionary
