"""Loading and saving of a model: :class:`Checkpointed`, the part of ``Transformer`` that knows files."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.models.checkpoints import load_checkpoint, save_native, save_pieces
from neuron_explainer.models.checks import check_dtype
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.devices import Device, check_device, default_device
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.names import ASSETS, resolve_model_source
from neuron_explainer.models.tokenizer_files import TokenizerSpec
from neuron_explainer.models.weight_layouts import TRANSFORMER_WEIGHTS
from neuron_explainer.models.weight_names import LayerIndex, WeightLocationType


class Checkpointed(nn.Module, LanguageModel):
    """A model that is made from a config, and can be loaded and saved."""

    cfg: TransformerConfig
    tokenizer: TokenizerSpec | None
    metadata: dict[str, Any]
    """What the checkpoint says about itself (training data, figures); saved with the model."""

    @abstractmethod
    def simplify(self) -> Self:
        """Fold norms into the linear maps behind them, in place, and return the model."""

    def weight(self, location_type: WeightLocationType, layer: LayerIndex) -> Tensor:
        parameter, layout = TRANSFORMER_WEIGHTS[location_type]
        below = parameter if layer is None else f"xf_layers.{layer}.{parameter}"
        return layout(self.get_parameter(below), self.sizes)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
        simplify: bool = False,
        simplify_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Load a model.

        Args:
            name_or_path: a folder (this library's format, the original's pieces, or Hugging Face's
                GPT-2), a name (``"tiny-tales"``, ``"gpt2-small"`` or ``"gpt2/small"``, …; a folder of
                that name wins), or an ``https://`` or ``az://`` folder.
            device: default: CUDA if there is one, else the CPU.
            dtype: to which all parameters are cast; default: as stored. By its name, the built-in model
                is loaded as float32 by default (it is stored in float16).
            simplify: whether to fold layer norms (:meth:`simplify`).

        Raises:
            SourceError: nothing is there, or it cannot be read; the message says what was tried.
            CheckpointError: the files are damaged or do not fit together; the message lists all problems.
        """
        if simplify_kwargs:
            raise InputError(f"simplify takes no options, found {simplify_kwargs!r}.")
        source = resolve_model_source(name_or_path)
        is_built_in = isinstance(source, Path) and source.parent == Path(str(ASSETS))
        if dtype is None and is_built_in and str(source) != str(name_or_path):  # by its name
            dtype = torch.float32
        model = cls.from_checkpoint(source, device, dtype)
        return model.simplify() if simplify else model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load from a folder or URL. Names are not looked up."""
        device = default_device() if device is None else check_device(device)
        if dtype is not None:
            check_dtype(dtype)
        loaded = load_checkpoint(path, dtype=dtype, device=device)
        # On "meta" nothing is allocated: the loaded tensors become the parameters, in memory once.
        model = cls(loaded.config, device="meta", tokenizer=loaded.tokenizer)
        model.load_state_dict(loaded.state_dict, assign=True)
        model.metadata = loaded.metadata
        return model.requires_grad_(True)

    def load_state_from_checkpoint(
        self, path: str | Path, device: Device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Replace the weights by those of a checkpoint of the same sizes."""
        loaded = load_checkpoint(path, dtype=dtype or self.dtype, device=device or self.device)
        if loaded.config != self.cfg:
            raise CheckpointError(f"{path}: expected {self.cfg}, found {loaded.config}.")
        # Copied into the parameters, which stay the same objects: an optimizer may hold them.
        self.load_state_dict(loaded.state_dict)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder of ``config.json`` and ``model.safetensors``; tied tensors are stored once.

        The folder appears whole or not at all. An existing one is replaced only with ``overwrite``.
        """
        save_native(
            path, self.cfg, self.state_dict(), self.tokenizer, self.metadata, overwrite=overwrite
        )

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the original's layout: ``config.json`` and one ``model_pieces/<key>.pt`` a tensor.

        As in the original, an earlier checkpoint there is replaced (here once the new one is whole).
        """
        save_pieces(path, self.cfg, self.state_dict(), self.tokenizer, overwrite=True)
