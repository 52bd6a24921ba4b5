"""Which words of a sentence make a factor active: a linear model of many disturbed copies (LIME).

For the factor c at token j of a sentence:

1. Of the tokens 0 to j, ``num_samples - 1`` random sets are chosen: first their size, uniform in 1 to j + 1,
   then their places. In each copy of the sentence the tokens of one set are replaced. The first sample is the
   sentence itself. Later tokens play no part: the model is causal, so they cannot change the factor at j.
2. Each copy is run through the model; y is the value of factor c at token j.
3. z says for each token whether it was kept. A copy counts with the weight
   ``sqrt(exp(-d² / kernel_width²))``, where d is 100 times the cosine distance of z from all ones.
4. A weighted ridge regression of y on z (penalty 0.01) finds the ``num_features`` tokens with the largest
   coefficients; a second one (penalty ``alpha``) on these alone gives their weights. All others have 0.

Copies that are equal are run once: a short sentence has few.

**The replacement.** BERT has a token for "unknown", and the published program uses it. GPT-2 has none; its
one special token, ``<|endoftext|>``, is the border of a document. The model has learned to read what follows
it as a new text, so replacing one word by it also takes weight from all words before. The default,
``"neutral"``, is the tokenizer's unknown token if that is a token of its own, else the token of a single
space, which says little and begins no document. ``"start"`` gives what the published program does on GPT-2.

Ribeiro et al. 2016, "Why should I trust you?" (LIME), section 3; Yun et al. 2021, whose program takes 2001
samples, 30 features and LIME's other defaults.

Shape legend: ``p`` samples, ``s`` tokens up to the target, ``v`` different copies.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neuron_explainer import files
from neuron_explainer.activations.corpus import start_token
from neuron_explainer.analysis.factors.examples import FactorExample
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.settings.fields import check_types

Floats = npt.NDArray[np.float64]
Masks = npt.NDArray[np.bool_]

KIND, FORMAT_VERSION = "factor_saliency", 1
SALIENCY_FILE = "saliency.jsonl"
_SELECTION_PENALTY = 0.01


@dataclass(frozen=True)
class SaliencyConfig:
    """How saliency is found; the defaults are those of LIME and of Yun et al."""

    num_samples: int = 2001
    """Number of samples, of which the first is the sentence as it is."""
    num_features: int = 30
    """Number of tokens that get a weight."""
    replacement: str = "neutral"
    """What stands for a removed token: neutral, unknown, pad, start, or a text that is one token.
    neutral: the tokenizer's unknown token, or a single space where there is none. start: the token before
    every text, which GPT-2 reads as the border of a document."""
    kernel_width: float = 25.0
    """Distance, in hundredths of cosine distance, over which a sample loses weight."""
    alpha: float = 1.0
    """Penalty of the ridge regression."""
    saliency_seed: int = 0
    """Random seed of the samples."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("num_samples", 2), ("num_features", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}.")
        for name in ("kernel_width", "alpha"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, found {getattr(self, name)}.")
        if not 0 <= self.saliency_seed < 2**32:
            raise InputError(
                f"saliency_seed must lie in 0 to 2**32 - 1, found {self.saliency_seed}."
            )


@dataclass(frozen=True)
class Saliency:
    """The weight of each token of a sentence for a factor at one of its tokens."""

    factor: int
    location: str
    position: int
    """The target's place in the corpus."""
    index: int
    """Its place in the sentence."""
    score: float
    """The factor there, in the sentence as it is."""
    weights: tuple[float, ...]
    """For the tokens 0 to ``index``: what keeping the token adds to the factor. Later ones have none."""
    intercept: float
    r2: float | None
    """The share of the samples' weighted variance that the linear model explains; None if the factor was the
    same in all of them. If it is low, the weights say little."""


def saliency_of(
    context: ModelContext,
    autoencoder: Autoencoder,
    example: FactorExample,
    config: SaliencyConfig | None = None,
    *,
    bos: int | None,
    batch_size: int = 64,
) -> Saliency:
    """The saliency of one example; the same whenever the seed, the example and the settings are.

    Args:
        context: the model.
        autoencoder: the dictionary that the factor is of, on the model's device.
        example: the factor, the location, the sentence, and the token to explain.
        config: settings.
        bos: id of the start token before the sentence, as it was when the example was found; None for none.
        batch_size: copies that go through the model at once.
    """
    config = config or SaliencyConfig()
    if not 0 <= example.factor < autoencoder.n_latents:
        raise InputError(
            f"factors are numbered 0 to {autoencoder.n_latents - 1}; found {example.factor}."
        )
    tokens = np.array(example.tokens[: example.index + 1], np.int64)
    kept = samples(len(tokens), config, example.index, example.factor)
    different, which = np.unique(kept, axis=0, return_inverse=True)
    replacement = replacement_token(context, config.replacement)
    copies = np.where(different, tokens, replacement)
    values = _values(context, autoencoder, example, copies, bos, batch_size)[which.reshape(-1)]
    weights, intercept, r2 = explain(kept, values, config)
    return Saliency(
        example.factor,
        str(example.location),
        example.position,
        example.index,
        float(values[0]),
        tuple(weights.tolist()),
        intercept,
        r2,
    )


def samples(n_tokens: int, config: SaliencyConfig, *key: int) -> Masks:
    """Which tokens each sample keeps, ``[p, s]``; the first keeps all, every other removes at least one."""
    # RandomState's numbers are promised to stay the same; those of newer generators are not.
    random = np.random.RandomState([config.saliency_seed, *key])
    n = config.num_samples - 1
    counts = random.randint(1, n_tokens + 1, size=n)
    rank = random.random_sample((n, n_tokens)).argsort(axis=1).argsort(axis=1)
    removed = rank < counts[:, None]
    return np.concatenate([np.ones((1, n_tokens), np.bool_), ~removed])


@torch.no_grad()
def _values(
    context: ModelContext,
    autoencoder: Autoencoder,
    example: FactorExample,
    copies: npt.NDArray[np.int64],
    bos: int | None,
    batch_size: int,
) -> Floats:
    """The factor at the last token of each copy ``[v, s]``: ``[v]``."""
    model = context.get_or_create_model()
    found = []
    for batch in torch.split(torch.from_numpy(copies), batch_size):
        tokens = batch.to(model.device)
        captured = model.capture(tokens, example.location, bos=False if bos is None else int(bos))
        x = captured[example.location][:, -1].flatten(1)
        latents = autoencoder.encode(x.to(autoencoder.device, autoencoder.dtype))
        found.append(latents[:, example.factor].double().cpu())
    return torch.cat(found).numpy()


def explain(
    kept: Masks, values: Floats, config: SaliencyConfig
) -> tuple[Floats, float, float | None]:
    """The weights ``[s]``, the intercept and R² of the linear model of ``values`` ``[p]``.

    ``kept`` ``[p, s]`` says which tokens each sample keeps. Of equal coefficients the earlier tokens' are
    taken first.
    """
    z = kept.astype(np.float64)
    share = z.mean(axis=1)
    # The cosine of z and all ones; that of a sample without any token is 0.
    distance = 100 * (1 - np.sqrt(share))
    importance = np.sqrt(np.exp(-(distance**2) / config.kernel_width**2))
    coefficients, _ = weighted_ridge(z, values, importance, _SELECTION_PENALTY)
    chosen = np.sort(np.argsort(-np.abs(coefficients), kind="stable")[: config.num_features])
    weights = np.zeros(z.shape[1])
    weights[chosen], intercept = weighted_ridge(z[:, chosen], values, importance, config.alpha)
    error = importance @ (values - z @ weights - intercept) ** 2
    variance = importance @ (values - np.average(values, weights=importance)) ** 2
    return weights, intercept, float(1 - error / variance) if variance > 0 else None


def weighted_ridge(x: Floats, y: Floats, importance: Floats, alpha: float) -> tuple[Floats, float]:
    """The coefficients and the intercept that minimise Σ importance (y - x b - a)² + alpha ‖b‖².

    Args:
        x: ``[p, s]``.
        y: ``[p]``.
        importance: ``[p]``, at least 0.
        alpha: penalty, above 0; the intercept has none.
    """
    x_mean, y_mean = np.average(x, axis=0, weights=importance), np.average(y, weights=importance)
    centred = x - x_mean
    weighted = centred.T * importance
    gram = weighted @ centred + alpha * np.eye(x.shape[1])
    coefficients = np.linalg.solve(gram, weighted @ (y - y_mean)).astype(np.float64)
    return coefficients, float(y_mean - x_mean @ coefficients)


# ---- the replacement -------------------------------------------------------------------------------


def replacement_token(context: ModelContext, choice: str) -> int:
    """The id of the token that stands for removed ones.

    Args:
        context: the model.
        choice: as ``SaliencyConfig.replacement`` describes it.
    """
    if choice == "start":
        return start_token(context)
    if choice == "neutral":
        unknown = _special(context, "unk_token_id")
        # Some tokenizers name the border of a document as their unknown token.
        if unknown is not None and unknown != _border(context):
            return unknown
        choice = " "
    if choice in ("unknown", "pad"):
        found = _special(context, "unk_token_id" if choice == "unknown" else "pad_token_id")
        if found is None:
            raise InputError(
                f"the tokenizer of {context.model_name} has no {choice} token; give replacement='neutral', "
                "'start', or a text that is one token."
            )
        return found
    ids = context.encode(choice)
    if len(ids) != 1:
        raise InputError(
            f"replacement must be neutral, unknown, pad, start or a text that is one token of "
            f"{context.model_name}; {choice!r} is {len(ids)} tokens."
        )
    return ids[0]


def _special(context: ModelContext, name: str) -> int | None:
    """A special token of a tokenizer of transformers; others have only the start token."""
    found = getattr(getattr(context.get_encoding(), "tokenizer", None), name, None)
    return None if found is None else int(found)


def _border(context: ModelContext) -> int | None:
    try:
        return start_token(context)
    except InputError:
        return None


# ---- files -----------------------------------------------------------------------------------------


class SaliencyFile:
    """Saliencies as JSON lines: one with the settings, then one for each example.

    Lines are added and never changed, so that an interrupted computation continues; a line that was cut
    off is left out when the file is read.

    Args:
        folder: that of the examples.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = files.local_path(folder) / SALIENCY_FILE

    def read(self) -> list[Saliency]:
        """All saliencies; none if there is no file."""
        return [_saliency(line, self.path) for line in self._lines()[1:]]

    def begin(self, config: SaliencyConfig, replacement: int) -> list[Saliency]:
        """Write the settings to a new file; what a file with the same settings holds already.

        Raises:
            InputError: the file holds saliencies of other settings.
        """
        settings = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            **asdict(config),
            "replacement_token": replacement,
        }
        lines = self._lines()
        if not lines:
            self._rewrite([settings])
            return []
        if lines[0] != settings:
            raise InputError(
                f"{self.path} holds saliencies with other settings ({_differences(lines[0], settings)}); "
                "give the same, or remove the file."
            )
        self._rewrite(lines)  # without a line that was cut off
        return self.read()

    def add(self, found: Iterable[Saliency]) -> None:
        """Add saliencies to the end."""
        with (
            files.explain_refusal(self.path),
            files.plain_write(self.path),
            self.path.open("a", encoding="utf-8") as out,
        ):
            out.writelines(_line(asdict(each)) for each in found)

    def _rewrite(self, lines: Iterable[Mapping[str, Any]]) -> None:
        with files.atomic_write(self.path) as temporary:
            temporary.write_text("".join(map(_line, lines)), "utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        try:
            text = self.path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}.") from None
        try:
            lines = [json.loads(line) for line in text.split("\n")[:-1]]
        except ValueError as error:
            raise CheckpointError(f"{self.path} is damaged: {error}.") from None
        if lines and (not isinstance(lines[0], dict) or lines[0].get("kind") != KIND):
            raise CheckpointError(f"{self.path} does not begin with the settings of saliencies.")
        return lines


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _saliency(line: Mapping[str, Any], path: Path) -> Saliency:
    try:
        return Saliency(**{**line, "weights": tuple(map(float, line["weights"]))})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a line is no saliency: {error}.") from None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    keys = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} {old.get(key)!r} there, {new[key]!r} now" for key in keys)


def key_of(found: Saliency) -> tuple[int, ActivationLocation, int]:
    """What a saliency belongs to: factor, location and corpus position."""
    return found.factor, ActivationLocation.parse(found.location), found.position
