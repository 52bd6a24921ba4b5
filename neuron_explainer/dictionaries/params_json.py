"""Reads the ``params.json`` of the ``dictionary_learning`` training script.

Each entry is ``{"value": …, "description": …}``. Other settings are fixed in the script's code: ReLU with an
L1 coefficient of 2, eight times as many latents as inputs, a learning rate of 3e-4 that warms up in the first
tenth of the steps, the residual stream after a block, no normalisation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from neuron_explainer import files
from neuron_explainer.activations.data_config import DataConfig
from neuron_explainer.dictionaries.config import TrainConfig
from neuron_explainer.errors import InputError
from neuron_explainer.settings import from_dict, split_fields


@dataclass(frozen=True)
class _Entries:
    """The entries of a ``params.json``; the defaults are the script's."""

    context_length: int = 128
    llm_batch_size: int = 512
    sae_batch_size: int = 8192
    device: str | None = None
    save_dir: str = "sae_results/"
    model_name: str = "EleutherAI/pythia-70m-deduped"
    random_seed: int = 42
    layer: int = 3
    dataset_name: str = "monology/pile-uncopyrighted"
    num_tokens: int = 10_000


class Params(NamedTuple):
    """What a ``params.json`` asks for."""

    values: dict[str, Any]
    """By field of ``TrainConfig`` and ``DataConfig``."""
    text: str
    """The data set."""
    folder: str
    """Folder for the results."""

    @property
    def config(self) -> TrainConfig:
        """How to train."""
        for_training, _ = split_fields(self.values, (TrainConfig, DataConfig), "params.json")
        return from_dict(TrainConfig, for_training)


def read_params(path: str | Path) -> Params:
    """Read a ``params.json``. Entries that are absent have the script's defaults, except for the device,
    which is the best one available.

    Model and data set are names on the Hugging Face hub, unless they are names or paths of this library.
    """
    entries = from_dict(_Entries, files.read_json(path), str(path))
    if entries.sae_batch_size < 1:
        raise InputError(
            f"{path}: sae_batch_size must be at least 1, found {entries.sae_batch_size}."
        )
    steps = entries.num_tokens // entries.sae_batch_size
    fields = {
        "objective": {"name": "relu", "l1_coefficient": 2.0},
        "expansion": 8.0,
        "num_tokens": entries.num_tokens,
        "batch_size": entries.sae_batch_size,
        "lr": 3e-4,
        "warmup_steps": steps // 10,
        "decay": "none",
        "input_normalization": "none",
        "log_every": max(1, steps // 10),
        "seed": entries.random_seed,
        "device": entries.device,
        "location": f"{entries.layer}/resid.torso.post_mlp",
        "model_name": _here_or_on_the_hub(entries.model_name),
        "context_length": entries.context_length,
        "windows_per_forward": entries.llm_batch_size,
        # A data set on the hub may be larger than any memory. The other half is for what is held out.
        "corpus_tokens": 2 * entries.num_tokens,
    }
    return Params(fields, _here_or_on_the_hub(entries.dataset_name), entries.save_dir)


def _here_or_on_the_hub(name: str) -> str:
    """``owner/name`` as a name on the hub, unless it is a local path."""
    on_hub = name.count("/") == 1 and not (files.is_remote(name) or Path(name).exists())
    return f"hf:{name}" if on_hub else name
