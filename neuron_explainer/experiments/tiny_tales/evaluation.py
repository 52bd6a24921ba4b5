"""Measures the stored model on the held-out books; autoencoders are measured by ``evaluation/``.

Everything is computed in float32 from the float16 weights on disk, with the library's own model and
autoencoders, so that the figures are those of what a user loads.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.errors import SourceError
from neuron_explainer.evaluation import Evaluation
from neuron_explainer.experiments.tiny_tales.data import EvalWindow, evaluation_windows
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.transformer import Transformer

WINDOWS_PER_BATCH = 32


@dataclass(frozen=True)
class EvalBatch:
    """Windows of one length, ``[b, s]``."""

    inputs: Tensor
    targets: Tensor
    counted: Tensor
    """Which predictions count."""


def held_out_windows(
    books: dict[str, str], enc: tiktoken.Encoding, ctx_window: int, stride: int
) -> list[EvalWindow]:
    """The windows of every book; each book begins with ``<|endoftext|>``."""
    windows: list[EvalWindow] = []
    for text in books.values():
        tokens = np.asarray(enc.encode_ordinary(text), dtype=np.int64)
        windows.extend(evaluation_windows(tokens, ctx_window, stride, enc.eot_token))
    return windows


def batches(windows: list[EvalWindow], size: int = WINDOWS_PER_BATCH) -> Iterator[EvalBatch]:
    """Stack neighbouring windows of equal length."""
    for _, same in itertools.groupby(windows, key=lambda window: len(window.tokens)):
        while chunk := list(itertools.islice(same, size)):
            tokens = torch.from_numpy(np.stack([window.tokens for window in chunk]))
            first = torch.tensor([window.count_from for window in chunk])
            yield EvalBatch(
                inputs=tokens[:, :-1],
                targets=tokens[:, 1:],
                counted=torch.arange(tokens.shape[1] - 1) >= first[:, None],
            )


def mean_loss(model: Transformer, windows: list[EvalWindow]) -> float:
    """Mean cross-entropy of the counted predictions, in nats per token."""
    total, count = 0.0, 0
    for batch in batches(windows):
        logits, _ = model(batch.inputs)
        losses = F.cross_entropy(
            logits[batch.counted], batch.targets[batch.counted], reduction="sum"
        )
        total += float(losses)
        count += int(batch.counted.sum())
    return total / count


@dataclass(frozen=True)
class ModelFigures:
    """How well the model predicts the held-out books; lower is better."""

    bits_per_byte: float
    """Where every prediction sees at least half a window."""
    bits_per_byte_side_by_side: float
    """With the books cut into windows without overlap, so that many predictions see little."""
    loss_per_token: float
    tokens: int
    bytes: int


@torch.no_grad()
def measure_model(
    model: Transformer, books: dict[str, str], enc: tiktoken.Encoding
) -> ModelFigures:
    """Measure the model on the text of all books."""
    ctx = model.cfg.ctx_window
    n_bytes = sum(len(text.encode()) for text in books.values())
    overlapping = held_out_windows(books, enc, ctx, ctx // 2)
    side_by_side = held_out_windows(books, enc, ctx, ctx)
    n_tokens = sum(len(window.tokens) - 1 - window.count_from for window in side_by_side)
    loss = mean_loss(model, overlapping)
    per_byte = n_tokens / n_bytes / math.log(2)
    return ModelFigures(
        bits_per_byte=loss * per_byte,
        bits_per_byte_side_by_side=mean_loss(model, side_by_side) * per_byte,
        loss_per_token=loss,
        tokens=n_tokens,
        bytes=n_bytes,
    )


def load_autoencoders(folder: Path) -> dict[ActivationLocation, tuple[Path, Autoencoder]]:
    """Every autoencoder saved below ``folder``, by location, with its folder."""
    # Hidden folders are what a killed process has left.
    found = [path.parent for path in sorted(folder.glob("[!.]*/[!.]*/config.json"))]
    if not found:
        raise SourceError(f"No autoencoders below {str(folder)!r}: train them first.")
    result: dict[ActivationLocation, tuple[Path, Autoencoder]] = {}
    for path in found:
        autoencoder = Autoencoder.load(path)
        assert autoencoder.location is not None
        result[autoencoder.location] = (path, autoencoder)
    return result


def held_out_figures(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation under the names that the configs of stored autoencoders give its figures."""
    losses = evaluation.losses
    assert losses is not None
    return {
        "fvu": evaluation.fvu,
        "l0": evaluation.l0,
        "dead_share": evaluation.dead_share,
        "tokens": evaluation.n_tokens,
        "loss_recovered_zero": losses.recovered_zero,
        "loss_recovered_mean": losses.recovered_mean,
        "loss_clean": losses.ce_original,
        "loss_spliced": losses.ce_spliced,
        "loss_zero_ablated": losses.ce_zero_ablated,
        "loss_mean_ablated": losses.ce_mean_ablated,
        "loss_tokens": losses.n_tokens,
    }


def record(folder: Path, **entries: Any) -> None:
    """Put entries into the metadata of a saved model or autoencoder."""
    path = folder / "config.json"
    config = files.read_json(path)
    config["metadata"] = {**config["metadata"], **entries}
    files.write_json(path, config)


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures with the digits that mean something."""
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in figures.items()
    }
