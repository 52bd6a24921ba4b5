"""Non-negative sparse codes in numpy and float64: coordinate descent, and FISTA as first published.

Independent of the package: neither torch nor any of its functions. Vectors are rows here.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def objective(x: Array, dictionary: Array, code: Array, penalty: float) -> float:
    """½ ‖x - Φ a‖² + penalty · Σ a of one vector ``[n]``."""
    residual = x - dictionary @ code
    return float(0.5 * residual @ residual + penalty * code.sum())


def coordinate_descent(
    x: Array, dictionary: Array, penalty: float, sweeps: int = 20000, tolerance: float = 1e-13
) -> Array:
    """The code of one vector ``[n]``: each entry in turn set to its exact best value."""
    code = np.zeros(dictionary.shape[1])
    residual = x.copy()
    squares = (dictionary**2).sum(axis=0)
    for _ in range(sweeps):
        largest = 0.0
        for i, atom in enumerate(dictionary.T):
            best = max(0.0, code[i] + (atom @ residual - penalty) / squares[i])
            residual -= (best - code[i]) * atom
            largest = max(largest, abs(best - code[i]))
            code[i] = best
        if largest <= tolerance * max(1e-300, code.max()):
            break
    return code


def fista(x: Array, dictionary: Array, penalty: float, iterations: int) -> Array:
    """Codes ``[rows, l]`` after a fixed number of iterations, as the first programs had it."""
    step = 1 / np.linalg.eigvalsh(dictionary @ dictionary.T)[-1]
    code = np.zeros((len(x), dictionary.shape[1]))
    y, t = code.copy(), 1.0
    for _ in range(iterations):
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        residual = x - y @ dictionary.T
        new = np.maximum(0, y + step * residual @ dictionary - step * penalty)
        y = new + (t - 1) / t_new * (new - code)
        code, t = new, t_new
    return code
