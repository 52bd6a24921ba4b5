"""Other libraries' figures, written out in numpy from their descriptions, one batch after the other.

``batches`` are lists of ``(x [t, n], recons [t, n], latents [t, l])``, ``losses`` lists of
``(original, spliced, zero)`` cross-entropies a prediction, all in float64.
"""

from typing import Any

import numpy as np

Batch = tuple[Any, Any, Any]


def saelens_legacy(batches: list[Batch]) -> dict[str, float]:
    """Averages over all tokens of both batches; x̄ is the batch's own."""
    legacy, errors, squares, bias = [], [], [], []
    for x, recons, _ in batches:
        centre = x.sum(axis=0) / len(x)
        for token, other in zip(x, recons, strict=True):
            error = np.dot(token - other, token - other)
            legacy.append(1 - error / np.dot(token - centre, token - centre))
            errors.append(error)
            squares.append(np.dot(token, token))
        bias.append(np.sum(recons**2) / np.sum(recons * x))
    return {
        "explained_variance_legacy": float(np.mean(legacy)),
        "explained_variance_about_zero": float(1 - np.sum(errors) / np.sum(squares)),
        "mse": float(np.mean(errors)),
        "relative_reconstruction_bias": float(np.mean(bias)),
    }


def dictionary_learning(batches: list[Batch]) -> dict[str, float]:
    """Averages over batches of each batch's figure; variances are those of a sample."""
    figures: dict[str, list[float]] = {}
    for x, recons, latents in batches:
        norm, other = np.sqrt((x**2).sum(1)), np.sqrt((recons**2).sum(1))
        of_batch = {
            "l2_loss": np.sqrt(((x - recons) ** 2).sum(1)).mean(),
            "l1_loss": np.abs(latents).sum(1).mean(),
            "l0": np.count_nonzero(latents, axis=1).mean(),
            "frac_variance_explained": 1 - np.cov((x - recons).T).trace() / np.cov(x.T).trace(),
            "cossim": (np.einsum("ij,ij->i", x, recons) / norm / other).mean(),
            "l2_ratio": (other / norm).mean(),
        }
        for name, value in of_batch.items():
            figures.setdefault(name, []).append(float(value))
    alive = np.any([np.abs(latents).sum(0) > 0 for _, _, latents in batches], axis=0)
    return {name: float(np.mean(v)) for name, v in figures.items()} | {
        "frac_alive": float(alive.mean())
    }


def frac_recovered(losses: list[tuple[Any, Any, Any]]) -> float:
    """dictionary_learning: the ratio of each batch's mean losses, averaged over batches."""
    ratios = []
    for original, spliced, zero in losses:
        ratios.append((np.mean(spliced) - np.mean(zero)) / (np.mean(original) - np.mean(zero)))
    return float(np.mean(ratios))


def sparsify_fvu(batches: list[Batch]) -> float:
    """Each batch's own fraction, averaged over batches."""
    return float(
        np.mean(
            [((x - recons) ** 2).sum() / (len(x) * x.var(axis=0)).sum() for x, recons, _ in batches]
        )
    )


def openai(batches: list[Batch]) -> dict[str, float]:
    """Ratios of means over the width, a token each; averages over tokens."""
    mse, l1 = [], []
    for x, recons, latents in batches:
        mse += list(((recons - x) ** 2).mean(1) / (x**2).mean(1))
        l1 += list(np.abs(latents).sum(1) / np.linalg.norm(x, axis=1))
    return {
        "normalized_mean_squared_error": float(np.mean(mse)),
        "normalized_L1_loss": float(np.mean(l1)),
    }
