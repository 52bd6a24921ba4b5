"""Measures the stored model and its stored autoencoders on the held-out books.

Everything is computed in float32 from the float16 weights on disk, with the library's own model,
hooks and autoencoders, so that the figures are those of what a user loads.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from neuron_explainer import files
from neuron_explainer.errors import SourceError
from neuron_explainer.evaluation.metrics import ce_recovered
from neuron_explainer.evaluation.running import ReconstructionStats
from neuron_explainer.experiments.tiny_tales.data import EvalWindow, evaluation_windows
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.transformer import Transformer

WINDOWS_PER_BATCH = 32


@dataclass(frozen=True)
class EvalBatch:
    """Windows of one length: inputs and targets ``[b, s]``, and which predictions are counted."""

    inputs: Tensor
    targets: Tensor
    counted: Tensor


def held_out_windows(
    books: dict[str, str], enc: tiktoken.Encoding, ctx_window: int, stride: int
) -> list[EvalWindow]:
    """The windows of every book, each book from its own ``<|endoftext|>``."""
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


def mean_loss(
    model: Transformer, windows: list[EvalWindow], hooks: TransformerHooks | None = None
) -> float:
    """Mean cross entropy of the counted predictions, in nats a token."""
    total, count = 0.0, 0
    for batch in batches(windows):
        logits, _ = model(batch.inputs, hooks=hooks)
        losses = F.cross_entropy(
            logits[batch.counted], batch.targets[batch.counted], reduction="sum"
        )
        total += float(losses)
        count += int(batch.counted.sum())
    return total / count


@dataclass(frozen=True)
class ModelFigures:
    """How well the model predicts the held-out books; lower is better.

    The headline lets every prediction see at least half a window. ``side_by_side`` cuts the books
    into windows without overlap, so that many predictions see little.
    """

    bits_per_byte: float
    bits_per_byte_side_by_side: float
    loss_per_token: float
    tokens: int
    bytes: int


@torch.no_grad()
def measure_model(
    model: Transformer, books: dict[str, str], enc: tiktoken.Encoding
) -> ModelFigures:
    """Bits per byte of all the books' text, from the sum over their tokens."""
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


@dataclass(frozen=True)
class AutoencoderFigures:
    """What one autoencoder keeps of its activations and of the model's predictions.

    ``fvu`` is ``sum |x - x̂|² / sum |x - mean(x)|²`` over all held-out tokens. ``loss_recovered`` is
    ``(loss(ablated) - loss(x̂)) / (loss(ablated) - loss)``, the ablation setting the activation to
    zero or to its mean. ``dead_share`` counts latents that are active on none of ``tokens``.
    """

    fvu: float
    l0: float
    dead_share: float
    tokens: int
    loss_recovered_zero: float
    loss_recovered_mean: float
    loss_clean: float
    loss_spliced: float
    loss_zero_ablated: float
    loss_mean_ablated: float
    loss_tokens: int


class _Measurement:
    """Running totals of one autoencoder: the metrics' own, and the mean activation."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.stats = ReconstructionStats()
        self.total = torch.zeros(autoencoder.n_inputs, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Account for activations ``[b, n]``."""
        _, latents, recons = self.autoencoder(x)
        self.stats.update(x, recons, latents)
        self.total += x.double().sum(0)

    def replacements(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Hooks that put the reconstruction, zero and the mean in an activation's place."""
        mean = (self.total / self.stats.n_tokens).float()
        return self.autoencoder.reconstruct, torch.zeros_like, mean.expand_as


def load_autoencoders(folder: Path) -> dict[ActivationLocation, tuple[Path, Autoencoder]]:
    """Every autoencoder saved below ``folder``, with its own folder."""
    found = [path.parent for path in sorted(folder.glob("*/*/config.json"))]
    if not found:
        raise SourceError(f"No autoencoders below {str(folder)!r}: train them first.")
    result: dict[ActivationLocation, tuple[Path, Autoencoder]] = {}
    for path in found:
        autoencoder = Autoencoder.load(path)
        assert autoencoder.location is not None
        result[autoencoder.location] = (path, autoencoder)
    return result


@torch.no_grad()
def measure_autoencoders(
    model: Transformer,
    autoencoders: dict[ActivationLocation, Autoencoder],
    windows: list[EvalWindow],
    loss_every: int = 4,
) -> dict[ActivationLocation, AutoencoderFigures]:
    """Reconstruction on all ``windows``, losses on every ``loss_every``-th of them."""
    measured = {location: _Measurement(ae) for location, ae in autoencoders.items()}
    for batch in tqdm(list(batches(windows)), desc="reconstruction", unit="batch"):
        captured = model.capture(batch.inputs, list(autoencoders))
        for location, measurement in measured.items():
            measurement.add(captured[location][batch.counted])
    some = windows[::loss_every]
    loss_tokens = sum(len(window.tokens) - 1 - window.count_from for window in some)
    clean = mean_loss(model, some)
    figures: dict[ActivationLocation, AutoencoderFigures] = {}
    for location, measurement in tqdm(measured.items(), desc="losses", unit="autoencoder"):
        spliced, zero, mean = (
            mean_loss(model, some, TransformerHooks().append_at(location, replacement))
            for replacement in measurement.replacements()
        )
        figures[location] = AutoencoderFigures(
            fvu=float(measurement.stats.fvu),
            l0=float(measurement.stats.l0),
            dead_share=float(measurement.stats.dead_share),
            tokens=measurement.stats.n_tokens,
            loss_recovered_zero=_recovered(clean, spliced, zero),
            loss_recovered_mean=_recovered(clean, spliced, mean),
            loss_clean=clean,
            loss_spliced=spliced,
            loss_zero_ablated=zero,
            loss_mean_ablated=mean,
            loss_tokens=loss_tokens,
        )
    return figures


def _recovered(*losses: float) -> float:
    return float(ce_recovered(*torch.tensor(losses, dtype=torch.float64)))


def record(folder: Path, **entries: Any) -> None:
    """Put entries into the metadata of a saved model or autoencoder."""
    path = folder / "config.json"
    config = files.read_json(path)
    config["metadata"] = {**config["metadata"], **entries}
    files.write_json(path, config)


def rounded(figures: ModelFigures | AutoencoderFigures) -> dict[str, float]:
    """Figures with the digits that mean something."""
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in asdict(figures).items()
    }


def table(figures: dict[ActivationLocation, AutoencoderFigures]) -> str:
    """One line an autoencoder."""
    lines = [
        f"{'location':<28} {'FVU':>7} {'L0':>6} {'dead':>6} {'recovered':>9} {'(mean abl.)':>11}"
    ]
    for location, f in sorted(figures.items(), key=lambda item: (item[0].path, item[0].layer)):
        lines.append(
            f"{location!s:<28} {f.fvu:7.4f} {f.l0:6.2f} {f.dead_share:6.1%} "
            f"{f.loss_recovered_zero:9.4f} {f.loss_recovered_mean:11.4f}"
        )
    return "\n".join(lines)
