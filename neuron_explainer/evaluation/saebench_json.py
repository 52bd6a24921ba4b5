"""SAEBench's result files, so that figures of ours stand in its plots and its figures beside ours.

Written are results of its "core" evaluation; read are those of any. Where SAEBench's formula is another
one than ours (its explained variance is wrong where the mean is large, its MSE depends on the batch size)
the figure is ours, as :class:`~neuron_explainer.evaluation.figures.Evaluation` defines it; its own
definitions are filled in if the evaluation was made with ``compat="saelens_legacy"``. What is not known is
-1, as SAEBench has it. What its schema does not have stands in ``eval_result_unstructured``.
"""

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer import __version__, files
from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.evaluation.figures import Evaluation
from neuron_explainer.evaluation.geometry import nearest_cosines
from neuron_explainer.models.autoencoder import Autoencoder

MISSING = -1.0
CORE = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": (
        "explained_variance",
        "explained_variance_legacy",
        "mse",
        "cossim",
    ),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}
"""The figures of the core evaluation, by category."""
DETAILS = (
    "index",
    "feature_density",
    "consistent_activation_heuristic",
    "encoder_bias",
    "encoder_norm",
    "encoder_decoder_cosine_sim",
    "max_decoder_cosine_sim",
    "max_encoder_cosine_sim",
)
"""What the core evaluation says of each latent."""
_FIELDS: dict[str, tuple[type, ...]] = {
    "eval_type_id": (str,),
    "eval_config": (dict,),
    "eval_id": (str,),
    "datetime_epoch_millis": (int,),
    "eval_result_metrics": (dict,),
    "eval_result_details": (list, type(None)),
    "sae_bench_commit_hash": (str,),
    "sae_lens_id": (str, type(None)),
    "sae_lens_release_id": (str, type(None)),
    "sae_lens_version": (str, type(None)),
    "sae_cfg_dict": (dict, type(None)),
    "eval_result_unstructured": (dict, list, type(None)),
}
_MAY_BE_ABSENT = ("eval_result_details", "sae_cfg_dict", "eval_result_unstructured")


@dataclass(frozen=True)
class SAEBenchResult:
    """One result file."""

    eval_type: str
    """Such as ``"core"`` or ``"sparse_probing"``."""
    metrics: Mapping[str, Mapping[str, float | None]]
    """By category and name; None for what the file gives as -1 or null."""
    release: str | None
    """Which autoencoder it is of: SAELens's release, and its name there."""
    autoencoder: str | None
    config: Mapping[str, Any] = field(repr=False)
    """The settings of the evaluation."""
    details: tuple[Mapping[str, Any], ...] = field(repr=False)
    """One entry for each latent, or for each data set."""
    autoencoder_config: Mapping[str, Any] = field(repr=False)
    unstructured: Any = field(repr=False)

    def figures(self) -> dict[str, float]:
        """Every number that there is, as ``category/name``."""
        return {
            f"{category}/{name}": value
            for category, values in self.metrics.items()
            for name, value in values.items()
            if value is not None
        }


def read_saebench(path: str | Path) -> SAEBenchResult:
    """Read a result file of any of SAEBench's evaluations; an error if it is none."""
    content = files.read_json(path)
    problems = saebench_problems(content)
    if problems:
        raise CheckpointError(f"{path} is no result of SAEBench: {'; '.join(problems)}.")
    metrics = {
        category: {name: _known(value) for name, value in values.items()}
        for category, values in content["eval_result_metrics"].items()
    }
    return SAEBenchResult(
        eval_type=content["eval_type_id"],
        metrics=metrics,
        release=content["sae_lens_release_id"],
        autoencoder=content["sae_lens_id"],
        config=content["eval_config"],
        details=tuple(content.get("eval_result_details") or ()),
        autoencoder_config=content.get("sae_cfg_dict") or {},
        unstructured=content.get("eval_result_unstructured"),
    )


def write_saebench(
    path: str | Path,
    evaluation: Evaluation,
    autoencoder: Autoencoder,
    *,
    name: str = "custom_sae",
    settings: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write an evaluation as a result file of SAEBench's core evaluation.

    Args:
        path: the file; SAEBench calls it ``…_eval_results.json``.
        evaluation: the figures, of all tokens that count.
        autoencoder: what they are of.
        name: what SAEBench is to call it.
        settings: settings of the evaluation, such as the text.
        more: what else is to be kept, such as figures of several seeds and floors.
    """
    content = saebench_core(evaluation, autoencoder, name=name, settings=settings, more=more)
    problems = saebench_problems(content)
    if problems:
        raise InputError(f"this cannot be written as a result of SAEBench: {'; '.join(problems)}.")
    files.write_json(path, content)


def saebench_core(
    evaluation: Evaluation,
    autoencoder: Autoencoder,
    *,
    name: str = "custom_sae",
    settings: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of the file that :func:`write_saebench` writes."""
    encoder, decoder = _nearest_cosines(autoencoder)
    found = _figures(evaluation) | {
        "average_max_encoder_cosine_sim": _mean(encoder),
        "average_max_decoder_cosine_sim": _mean(decoder),
    }
    return {
        "eval_type_id": "core",
        "eval_config": dict(settings or {}),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {
            category: {metric: _or_missing(found.get(metric)) for metric in metrics}
            for category, metrics in CORE.items()
        },
        "eval_result_details": _details(evaluation, autoencoder, encoder, decoder),
        "sae_bench_commit_hash": "",
        "sae_lens_id": name,
        "sae_lens_release_id": "",
        "sae_lens_version": "",
        "sae_cfg_dict": {
            "d_in": autoencoder.n_inputs,
            "d_sae": autoencoder.n_latents,
            "hook_name": str(autoencoder.location or ""),
            "hook_layer": -1 if autoencoder.location is None else autoencoder.location.layer,
            "dtype": str(autoencoder.dtype).removeprefix("torch."),
            "model_name": autoencoder.model_name or "",
            "architecture": type(autoencoder.activation).__name__.lower(),
        },
        "eval_result_unstructured": {
            "neuron_explainer": {
                "version": __version__,
                "evaluation": _plain(evaluation.to_dict()),
                **_plain(dict(more or {})),
            }
        },
    }


def saebench_problems(content: Mapping[str, Any]) -> list[str]:
    """What keeps an object from being a result of SAEBench; empty if nothing does."""
    problems = [
        f"{key} is missing" for key in _FIELDS if key not in content and key not in _MAY_BE_ABSENT
    ]
    for key, value in content.items():
        if key not in _FIELDS:
            problems.append(f"unexpected {key!r}{did_you_mean(key, _FIELDS).rstrip('?')}")
        elif not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            expected = " or ".join(_called(kind) for kind in _FIELDS[key])
            problems.append(f"{key} must be {expected}, found {_called(type(value))}")
    metrics = content.get("eval_result_metrics")
    if not isinstance(metrics, Mapping):
        return problems
    for category, values in metrics.items():
        if not isinstance(values, Mapping):
            problems.append(
                f"{category} must be an object of numbers, found {_called(type(values))}"
            )
            continue
        for metric, value in values.items():
            if value is not None and not _is_number(value):
                problems.append(f"{category}/{metric} must be a number or null, found {value!r}")
    if content.get("eval_type_id") == "core":
        missing = [category for category in CORE if category not in metrics]
        problems += [f"the core category {category} is missing" for category in missing]
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _called(kind: type) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
    return names.get(kind, "null" if kind is type(None) else kind.__name__)


def _known(value: float | None) -> float | None:
    return None if value is None or value == MISSING else float(value)


def _or_missing(value: float | None) -> float:
    return MISSING if value is None or not math.isfinite(value) else value


def _figures(evaluation: Evaluation) -> dict[str, float | None]:
    """Our figures under SAEBench's names."""
    theirs: Mapping[str, float] = evaluation.compat.get("saelens_legacy", {})
    frequency = evaluation.frequency.double()
    found: dict[str, float | None] = {
        "explained_variance": evaluation.explained_variance,
        "explained_variance_legacy": theirs.get("explained_variance_legacy"),
        "mse": evaluation.mse,
        "cossim": evaluation.cosine_similarity,
        "l2_norm_in": theirs.get("l2_norm_in"),
        "l2_norm_out": theirs.get("l2_norm_out"),
        "l2_ratio": evaluation.norm_ratio,
        "relative_reconstruction_bias": evaluation.relative_reconstruction_bias,
        "l0": evaluation.l0,
        "l1": evaluation.l1,
        "total_tokens_eval_reconstruction": 0,
        "total_tokens_eval_sparsity_variance": evaluation.n_tokens,
        "frac_alive": 1 - evaluation.dead_share,
    }
    for percent in (1, 10):
        often = frequency > percent / 100
        found[f"freq_over_{percent}_percent"] = float(often.double().mean())
        share = float(frequency[often].sum() / frequency.sum())
        found[f"normalized_freq_over_{percent}_percent"] = share
    if (losses := evaluation.losses) is not None:
        found |= {
            "kl_div_score": 1 - losses.kl / losses.kl_zero_ablated,
            "kl_div_with_ablation": losses.kl_zero_ablated,
            "kl_div_with_sae": losses.kl,
            "ce_loss_score": losses.recovered_zero,
            "ce_loss_with_ablation": losses.ce_zero_ablated,
            "ce_loss_with_sae": losses.ce_spliced,
            "ce_loss_without_sae": losses.ce_original,
            "total_tokens_eval_reconstruction": losses.n_tokens,
        }
    return found


@torch.no_grad()
def _nearest_cosines(autoencoder: Autoencoder) -> tuple[Tensor | None, Tensor | None]:
    """For each latent the largest cosine of its encoder and of its decoder row with any other, ``[l]``.

    NaN for rows of zeros; None where the encoder has no row for each latent.
    """
    encoder = None
    if len(autoencoder.encoder.weight) == autoencoder.n_latents:
        encoder = _nearest_of_rows(autoencoder.encoder.weight)
    return encoder, _nearest_of_rows(autoencoder.directions)


def _nearest_of_rows(rows: Tensor) -> Tensor:
    rows = rows.detach().float()
    there = rows.any(dim=1)
    found = rows.new_full((len(rows),), torch.nan)
    if int(there.sum()) > 1:
        found[there] = nearest_cosines(F.normalize(rows[there], dim=1), len(rows))
    return found.cpu()


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values[~values.isnan()].mean())


@torch.no_grad()
def _details(
    evaluation: Evaluation,
    autoencoder: Autoencoder,
    encoder_cosine: Tensor | None,
    decoder_cosine: Tensor | None,
) -> list[dict[str, float]]:
    """One entry for each latent."""
    n = autoencoder.n_latents
    columns: dict[str, Tensor | None] = {
        "feature_density": evaluation.frequency,
        "consistent_activation_heuristic": None,
        "encoder_bias": autoencoder.latent_bias,
        "encoder_norm": None,
        "encoder_decoder_cosine_sim": None,
        "max_decoder_cosine_sim": decoder_cosine,
        "max_encoder_cosine_sim": encoder_cosine,
    }
    weight = autoencoder.encoder.weight.float()
    if len(weight) == n:
        columns["encoder_norm"] = weight.norm(dim=1)
        if not autoencoder.is_transcoder:
            directions = autoencoder.directions.float()
            cosine = F.cosine_similarity(weight, directions, dim=1)
            columns["encoder_decoder_cosine_sim"] = cosine
    lists = {
        name: [MISSING] * n
        if values is None or len(values) != n
        else [_or_missing(value) for value in values.double().tolist()]
        for name, values in columns.items()
    }
    return [{"index": i, **{name: lists[name][i] for name in lists}} for i in range(n)]


def _plain(value: Any) -> Any:
    """As JSON can hold it: a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
