"""A causal language model of Hugging Face behind the interface of :class:`ModelContext`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.errors import InputError, SourceError, optional_module
from neuron_explainer.models.devices import Device, get_default_device
from neuron_explainer.models.huggingface.families import Architecture, Tap, sizes_of
from neuron_explainer.models.huggingface.model import HuggingFaceModel
from neuron_explainer.models.huggingface.tokenizer import HuggingFaceTokenizer
from neuron_explainer.models.locks import Lock
from neuron_explainer.models.model_context import (
    ModelContext,
    canonical_device,
    size_of,
)
from neuron_explainer.models.weight_names import (
    Dimension,
    LayerIndex,
    WeightLocationType,
)

__all__ = ["Architecture", "HuggingFaceModelContext", "Tap"]


class HuggingFaceModelContext(ModelContext):
    """The context of any causal language model that transformers loads.

    Families with an entry in :mod:`~neuron_explainer.models.huggingface.families` need nothing more.
    For another family, ``architecture`` says where the places of the hook tree are. Everything is lazy.
    Weights come from the loaded model.

    Args:
        name_or_folder: a folder, or a name on the Hugging Face Hub.
        device: default: :func:`~neuron_explainer.models.model_context.get_default_device`.
        dtype: the dtype that weights are cast to; default: as stored.
        architecture: where the places of the hook tree are; default: as the family's table says.
        revision: a branch, tag or commit of a name on the Hub.
        local_files_only: do not contact the Hub, not even to look for a newer version.
    """

    def __init__(
        self,
        name_or_folder: str | Path,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
        *,
        architecture: Architecture | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(str(name_or_folder), get_default_device() if device is None else device)
        self.dtype = dtype
        self.architecture = architecture
        self._options: dict[str, Any] = {
            "revision": revision or "main",
            "local_files_only": local_files_only or Path(name_or_folder).is_dir(),
        }
        self._config: Any = None
        self._tokenizer: HuggingFaceTokenizer | None = None
        self._models: dict[torch.device, HuggingFaceModel] = {}
        self._lock = Lock()

    @property
    def reference(self) -> str:
        """The name by which :func:`~neuron_explainer.models.open_model.open_model` opens this model."""
        return f"hf:{self.model_name}"

    @classmethod
    def from_model(
        cls, model: Any, tokenizer: Any = None, architecture: Architecture | None = None
    ) -> "HuggingFaceModelContext":
        """The context of a model that is already loaded; the model is put in eval mode.

        Args:
            model: a model of transformers, as ``AutoModelForCausalLM.from_pretrained`` returns it.
            tokenizer: a tokenizer of transformers; None: token ids only.
            architecture: where the places of the hook tree are; default: as the family's table says.
        """
        context = cls(
            model.config.name_or_path or type(model).__name__,
            model.device,
            model.dtype,
            architecture=architecture,
        )
        context._config = model.config
        context._tokenizer = None if tokenizer is None else HuggingFaceTokenizer(tokenizer)
        wrapped = HuggingFaceModel(model, context._tokenizer, architecture)
        context._models[canonical_device(context.device)] = wrapped
        return context

    def _load(self, auto_class: str, **options: Any) -> Any:
        transformers = optional_module("transformers", "models of Hugging Face")
        loader = getattr(transformers, auto_class)
        try:
            return loader.from_pretrained(self.model_name, **self._options, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first_line = (str(error).strip().splitlines() or ["no details"])[0]
            raise SourceError(
                f"{self.model_name}: transformers' {auto_class} cannot load this "
                f"({type(error).__name__}: {first_line}). Expected a folder with config.json and "
                "weights, or a name on the Hugging Face Hub; a model that lies on this machine is "
                "given by the path of its folder."
            ) from error

    @property
    def config(self) -> Any:
        """transformers' config, read at the first use."""
        with self._lock:
            if self._config is None:
                self._config = self._load("AutoConfig")
            return self._config

    def get_encoding(self) -> HuggingFaceTokenizer:
        """The tokenizer, loaded at the first use."""
        with self._lock:
            if self._tokenizer is None:
                if self._models:
                    return next(
                        iter(self._models.values())
                    ).enc  # raises the error that there is none
                self._tokenizer = HuggingFaceTokenizer(self._load("AutoTokenizer"))
            return self._tokenizer

    def encode(self, string: str) -> list[int]:
        """The tokens of a text, with nothing added. Special tokens that it spells out are read as such."""
        return self.get_encoding().encode(string)

    def decode(self, token_ints: Iterable[int]) -> str:
        """The text of tokens, decoded as a whole."""
        return self.get_encoding().decode(token_ints)

    def decode_token(self, token_int: int) -> str:
        """The text of one token within a text: a space at its front is kept."""
        return self.get_encoding().decode_continuation([token_int])

    def get_dim_size(self, model_dim: Dimension) -> int:
        """The length of an axis in this model."""
        return size_of(sizes_of(self.config.get_text_config()), model_dim, self.model_name)

    def get_model_config_as_dict(self) -> dict[str, Any]:
        """transformers' config."""
        config: dict[str, Any] = json.loads(self.config.to_json_string(use_diff=False))
        return config

    def get_or_create_model(
        self, device: Device | None = None, simplify: bool = False
    ) -> HuggingFaceModel:
        """The model; the same object whenever the device is the same."""
        if simplify:
            raise InputError(
                f"{self.model_name}: simplify folds the norms of GPT-2's architecture as this package "
                "has it; load the model with StandardModelContext for that."
            )
        key = canonical_device(self.device if device is None else torch.device(device))
        with self._lock:
            if key not in self._models:
                self._models[key] = self._load_model(key)
            return self._models[key]

    def _load_model(self, device: torch.device) -> HuggingFaceModel:
        model = self._load("AutoModelForCausalLM", dtype=self.dtype or "auto").to(device)
        try:
            tokenizer = self.get_encoding()
        except SourceError:  # a model without tokenizer files runs on token ids
            tokenizer = None
        return HuggingFaceModel(model, tokenizer, self.architecture)

    @property
    def norms_subtract_mean(self) -> bool:
        """True if norms subtract the mean over the width (LayerNorm), False if they do not (RMSNorm)."""
        return self.get_or_create_model().norms_subtract_mean

    @property
    def norms_what_is_added(self) -> bool:
        """True if what attention and the MLP compute passes a norm before it is added to the stream."""
        return self.get_or_create_model().norms_what_is_added

    def _get_weight_helper(
        self, location_type: WeightLocationType, layer: LayerIndex, device: torch.device
    ) -> Tensor:
        """The weight of the model, which is loaded if it has not been."""
        return self.get_or_create_model().weight(location_type, layer)


ModelContext.kinds["hf:"] = HuggingFaceModelContext
