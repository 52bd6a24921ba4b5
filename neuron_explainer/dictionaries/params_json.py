"""The ``params.json`` of the ``dictionary_learning`` training script, read as what it does.

Each entry is ``{"value": …, "description": …}``. The script has more settings than the file, fixed in
its code: ReLU with an L1 of 2, eight latents for each entry, a learning rate of 3e-4 that warms up in
the first tenth of the steps, the residual stream after a block, activations as they are.
"""

from pathlib import Path
from typing import Any, NamedTuple

from neuron_explainer import files
from neuron_explainer.activations import DataConfig
from neuron_explainer.dictionaries.config import TrainConfig
from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.settings.from_files import from_dict, plain_value, split_fields

_KNOWN: dict[str, type[Any]] = {
    "context_length": int,
    "llm_batch_size": int,
    "sae_batch_size": int,
    "device": str,
    "save_dir": str,
    "model_name": str,
    "random_seed": int,
    "layer": int,
    "dataset_name": str,
    "num_tokens": int,
}
_DEFAULTS: dict[str, Any] = {
    "context_length": 128,
    "llm_batch_size": 512,
    "sae_batch_size": 8192,
    "save_dir": "sae_results/",
    "model_name": "EleutherAI/pythia-70m-deduped",
    "random_seed": 42,
    "layer": 3,
    "dataset_name": "monology/pile-uncopyrighted",
    "num_tokens": 10_000,
}


class Params(NamedTuple):
    """What a ``params.json`` asks for."""

    values: dict[str, Any]
    """By field of ``TrainConfig`` and ``DataConfig``."""
    text: str
    """The data set."""
    folder: str
    """Where results go."""

    @property
    def config(self) -> TrainConfig:
        """How to train."""
        for_training, _ = split_fields(self.values, (TrainConfig, DataConfig), "params.json")
        return from_dict(TrainConfig, for_training)


def read_params(path: str | Path) -> Params:
    """Read a ``params.json``; what is not in it is as the script has it, but for the device, which is
    then the best there is.

    Model and data set are names on the Hugging Face hub, but for those that are names or paths here.
    """
    values = dict(_DEFAULTS)
    for name, entry in files.read_json(path).items():
        if name not in _KNOWN:
            raise InputError(
                f"{path}: unknown entry {name!r}.{did_you_mean(name, _KNOWN)} "
                f"Known: {', '.join(_KNOWN)}."
            )
        value = plain_value(entry)
        if type(value) is not _KNOWN[name]:
            raise InputError(f"{path}: {name}: expected {_KNOWN[name].__name__}, found {value!r}.")
        values[name] = value
    steps = values["num_tokens"] // values["sae_batch_size"]
    fields = {
        "objective": {"name": "relu", "l1_coefficient": 2.0},
        "expansion": 8.0,
        "num_tokens": values["num_tokens"],
        "batch_size": values["sae_batch_size"],
        "lr": 3e-4,
        "warmup_steps": steps // 10,
        "decay": "none",
        "input_normalization": "none",
        "log_every": max(1, steps // 10),
        "seed": values["random_seed"],
        "device": values.get("device"),
        "location": f"{values['layer']}/resid.torso.post_mlp",
        "model_name": _here_or_on_the_hub(values["model_name"]),
        "context_length": values["context_length"],
        "windows_per_forward": values["llm_batch_size"],
        # A data set of the hub may be larger than any memory; the rest is for what is held out.
        "corpus_tokens": 2 * values["num_tokens"],
    }
    return Params(fields, _here_or_on_the_hub(values["dataset_name"]), values["save_dir"])


def _here_or_on_the_hub(name: str) -> str:
    """``owner/name`` is meant to be on the hub, unless it is a path here."""
    on_hub = name.count("/") == 1 and not (files.is_remote(name) or Path(name).exists())
    return f"hf:{name}" if on_hub else name
