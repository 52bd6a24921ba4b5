"""A model with its tokenizer and device, behind one interface: :class:`ModelContext`.

Code that explains a model asks a context for tokens, sizes and weights, so it works with every kind of
model. Sizes and weights are read without loading the whole model.

Shape legend: ``d`` model width, ``f`` MLP width, ``h`` heads, ``v`` vocabulary.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import CheckpointError, InputError, NeuronExplainerError
from neuron_explainer.models.checkpoints import LoadedCheckpoint, load_checkpoint
from neuron_explainer.models.checks import check_dtype
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.devices import Device
from neuron_explainer.models.devices import get_default_device as get_default_device
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locks import Lock
from neuron_explainer.models.names import resolve_model_source
from neuron_explainer.models.tokenizers import decode, encode_prompt, load_encoding
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.models.weight_layouts import TRANSFORMER_WEIGHTS
from neuron_explainer.models.weight_names import (
    Dimension,
    LayerIndex,
    WeightLocationType,
    get_dimension_index_of_weight_location_type,
)

ALLOWED_SPECIAL_TOKENS = {"<|endoftext|>"}
"""GPT-2's special tokens. :meth:`ModelContext.encode` recognises those of every tokenizer."""


class InvalidTokenException(InputError):
    """A text that should be exactly one token has none or several."""


class _SizesOnlyError(NeuronExplainerError, NotImplementedError):
    """A context that knows only sizes was asked for something else."""


class ModelContext(ABC):
    """A model, its tokenizer, and the device on which its tensors are returned."""

    kinds: ClassVar[dict[str, Callable[..., "ModelContext"]]] = {}
    """What opens the models whose names begin with a prefix, such as ``"hf:"``."""

    def __init__(self, model_name: str, device: Device) -> None:
        self.model_name = model_name
        self.device = torch.device(device)

    @property
    def short_name(self) -> str:
        """``model_name`` as files hold it: of a model in a local folder, the folder's own name."""
        folder = os.path.expanduser(self.model_name)
        return Path(os.path.abspath(folder)).name if os.path.isdir(folder) else self.model_name

    @property
    def reference(self) -> str:
        """The name by which :func:`~neuron_explainer.models.open_model.open_model` opens this model."""
        return self.model_name

    # --- what each kind of model defines ---

    @abstractmethod
    def _get_weight_helper(
        self, location_type: WeightLocationType, layer: LayerIndex, device: torch.device
    ) -> Tensor:
        """The weight with the axes of ``location_type.shape_spec``; it may share memory with the model."""

    @abstractmethod
    def get_encoding(self) -> Any:
        """The tokenizer; for GPT-2 a ``tiktoken.Encoding``."""

    @abstractmethod
    def get_dim_size(self, model_dim: Dimension) -> int:
        """The length of an axis in this model."""

    @abstractmethod
    def get_or_create_model(
        self, device: Device | None = None, simplify: bool = False
    ) -> LanguageModel:
        """The model; it is loaded at the first call."""

    @abstractmethod
    def get_model_config_as_dict(self) -> dict[str, Any]:
        """The model's sizes and settings as JSON values."""

    # --- weights ---

    def get_weight(
        self,
        location_type: WeightLocationType | str,
        layer: LayerIndex = None,
        normalize_dim: Dimension | None = None,
        device: Device | None = None,
    ) -> Tensor:
        """One weight, with the axes that ``location_type.shape_spec`` names.

        The result is a detached copy: editing it changes neither the model nor what later calls return.
        Attention weights have an axis of heads. ``ATTN_TO_QUERY`` and ``ATTN_TO_KEY`` do not contain the
        factor d_head^-1/4 that the activations contain.

        Args:
            location_type: which weight.
            layer: its layer; None for weights that a model has once.
            normalize_dim: scale to Euclidean length 1 along this axis.
            device: default: the context's.
        """
        location_type = _weight_location(location_type)
        self._check_layer(location_type, layer)
        where = self.device if device is None else torch.device(device)
        weight = self._get_weight_helper(location_type, layer, where).detach()
        expected = self.get_shape_from_spec(location_type.shape_spec)
        if tuple(weight.shape) != expected:
            raise CheckpointError(
                f"{self.model_name}: {location_type.value} of layer {layer} should have the shape "
                f"{list(expected)}, found {list(weight.shape)}."
            )
        if normalize_dim is not None:
            axis = get_dimension_index_of_weight_location_type(location_type, normalize_dim)
            return F.normalize(weight, dim=axis).to(where).contiguous()
        return weight.to(where, copy=True, memory_format=torch.contiguous_format)

    def _check_layer(self, location_type: WeightLocationType, layer: LayerIndex) -> None:
        if location_type.has_no_layers:
            if layer is not None:
                raise InputError(
                    f"{location_type.value} exists once in a model, not in each layer; "
                    f"found layer {layer}."
                )
            return
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.n_layers:
            raise InputError(
                f"{location_type.value} needs a layer of 0 to {self.n_layers - 1}, found {layer!r}."
            )

    def get_shape_from_spec(self, shape_spec: Iterable[Dimension]) -> tuple[int, ...]:
        """The lengths of these axes."""
        return tuple(self.get_dim_size(dim) for dim in shape_spec)

    # --- norms ---

    @property
    def norms_subtract_mean(self) -> bool:
        """True if norms subtract the mean over the width (LayerNorm), False if they do not (RMSNorm)."""
        return True

    @property
    def norms_what_is_added(self) -> bool:
        """True if what attention and the MLP compute passes a norm before it is added to the stream."""
        return False

    # --- tokens ---

    def encode(self, string: str) -> list[int]:
        """The tokens of a text; ``<|endoftext|>`` in the text is the special token."""
        return encode_prompt(self.get_encoding(), string)

    def decode(self, token_ints: Iterable[int]) -> str:
        """The text of tokens, decoded together, so that characters made of several tokens are right."""
        return decode(self.get_encoding(), token_ints)

    def decode_token(self, token_int: int) -> str:
        """The text of one token; an incomplete character becomes U+FFFD."""
        return self.decode([token_int])

    def decode_token_list(self, token_ints: Iterable[int]) -> list[str]:
        """The text of each token."""
        return [self.decode_token(token_int) for token_int in token_ints]

    def encode_token_str(self, token_str: str) -> int:
        """The token of a text; an InvalidTokenException unless the text is exactly one token."""
        tokens = self.encode(token_str)
        if len(tokens) != 1:
            parts = [self.decode_token(token) for token in tokens]
            raise InvalidTokenException(
                f"{token_str!r} should be one token of {self.model_name}, found {len(tokens)}: "
                f"{', '.join(map(repr, parts)) or 'none'}."
            )
        return tokens[0]

    def encode_token_str_list(self, token_strs: Iterable[str]) -> list[int]:
        """The token of each text."""
        return [self.encode_token_str(token_str) for token_str in token_strs]

    # --- sizes ---

    @property
    def n_neurons(self) -> int:
        """Number of MLP units in a layer."""
        return self.get_dim_size(Dimension.MLP_ACTS)

    @property
    def n_attention_heads(self) -> int:
        """Number of attention heads in a layer."""
        return self.get_dim_size(Dimension.ATTN_HEADS)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.get_dim_size(Dimension.LAYERS)

    @property
    def n_residual_stream_channels(self) -> int:
        """Width of the residual stream."""
        return self.get_dim_size(Dimension.RESIDUAL_STREAM_CHANNELS)

    @property
    def n_vocab(self) -> int:
        """Number of rows of the embedding; it may be larger than the tokenizer's vocabulary."""
        return self.get_dim_size(Dimension.VOCAB_SIZE)

    @property
    def n_context(self) -> int:
        """The largest number of positions in a sequence."""
        return self.get_dim_size(Dimension.MAX_CONTEXT_LENGTH)

    @staticmethod
    def from_model_type(model_type: str | Path, **kwargs: Any) -> "ModelContext":
        """The context of a model of any kind; ``kwargs`` go to the class of the context.

        Args:
            model_type: ``hf:NAME`` or ``hf:FOLDER`` for any causal language model of transformers
                (:class:`~neuron_explainer.models.huggingface.context.HuggingFaceModelContext`). Anything
                else is a model of this library (:class:`StandardModelContext`): a name
                (``"gpt2-small"``), a folder, or the URL of a folder.
        """
        for prefix, make in ModelContext.kinds.items():
            if isinstance(model_type, str) and model_type.startswith(prefix):
                return make(model_type.removeprefix(prefix), **kwargs)
        return StandardModelContext(model_type, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_name!r}, device={str(self.device)!r})"


def _weight_location(value: WeightLocationType | str) -> WeightLocationType:
    try:
        return WeightLocationType(value)
    except ValueError:
        known = ", ".join(kind.value for kind in WeightLocationType)
        raise InputError(f"unknown weight {value!r}. Known: {known}.") from None


def size_of(sizes: Mapping[Dimension, int], dim: Dimension, of: str) -> int:
    """The size of an axis; an InputError that lists the known axes if it is not among them."""
    if dim not in sizes:
        known = ", ".join(known.value for known in sizes)
        raise InputError(f"{of} has no size for {str(dim)!r}. It has: {known or 'none'}.")
    return sizes[dim]


class StandardModelContext(ModelContext):
    """The context of a :class:`~neuron_explainer.models.transformer.Transformer`.

    Everything is lazy: the config is read when a size is asked for, the vocabulary at the first text,
    single tensors for single weights, and all tensors for the model. What was read is kept.

    Args:
        model_name: a name (``"gpt2-small"``, ``"tiny-tales"``), a folder, or the URL of one.
        device: default: :func:`get_default_device`.
        dtype: of the model and of weights. Default: float32, as in the original; None: as stored.
    """

    def __init__(
        self,
        model_name: str | Path,
        device: Device | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(str(model_name), get_default_device() if device is None else device)
        if dtype is not None:
            check_dtype(dtype)
        self.dtype = dtype
        self.load_path = resolve_model_source(model_name)
        """The folder or URL."""
        self._checkpoint: LoadedCheckpoint | None = None  # the header, without tensors
        self._tensors: dict[str, Tensor] = {}  # tensors read for single weights, by key
        self._models: dict[tuple[torch.device, bool], Transformer] = {}  # (device, simplify)
        self._lock = Lock()

    @property
    def config(self) -> TransformerConfig:
        """The model's sizes, read at the first use."""
        return self._read_header().config

    def _read_header(self) -> LoadedCheckpoint:
        with self._lock:
            if self._checkpoint is None:
                self._checkpoint = load_checkpoint(self.load_path, keys=())
            return self._checkpoint

    def get_encoding(self) -> Any:
        """The ``tiktoken.Encoding``; the first use reads its vocabulary."""
        header = self._read_header()
        return load_encoding(header.tokenizer or header.config.enc)

    def get_dim_size(self, model_dim: Dimension) -> int:
        """The length of an axis in this model."""
        return size_of(self.config.sizes, model_dim, self.model_name)

    def get_model_config_as_dict(self) -> dict[str, Any]:
        """The fields of :class:`~neuron_explainer.models.config.TransformerConfig`."""
        return self.config.to_dict()

    def get_or_create_model(
        self, device: Device | None = None, simplify: bool = False
    ) -> Transformer:
        """The model; the same object whenever device and ``simplify`` are the same.

        A simplified model is loaded separately, because folding norms edits weights.
        """
        key = (canonical_device(self.device if device is None else torch.device(device)), simplify)
        with self._lock:
            if key not in self._models:
                model = Transformer.from_checkpoint(self.load_path, key[0], self.dtype)
                self._models[key] = model.simplify() if simplify else model
                if not simplify:
                    self._tensors.clear()  # the model holds them
            return self._models[key]

    def _get_weight_helper(
        self, location_type: WeightLocationType, layer: LayerIndex, device: torch.device
    ) -> Tensor:
        """The weight of a loaded model, else of the checkpoint.

        So weights fit the activations that the model computes: edits of the model are seen. If only a
        simplified model has been loaded, the weights are folded.
        """
        key, layout = TRANSFORMER_WEIGHTS[location_type]
        key = key if layer is None else f"xf_layers.{layer}.{key}"
        return layout(self._tensor(key, device), self.config.sizes)

    def _tensor(self, key: str, device: torch.device) -> Tensor:
        with self._lock:
            here = canonical_device(device)
            # Prefer a model that is not simplified, and among those the one on this device.
            by_fit = sorted(self._models, key=lambda of: (of[1], of[0] != here))
            if by_fit:
                return self._models[by_fit[0]].get_parameter(key)
            if key not in self._tensors:
                loaded = load_checkpoint(
                    self.load_path, dtype=self.dtype, device=self.device, keys=[key]
                )
                self._tensors |= loaded.state_dict
            return self._tensors[key]


def canonical_device(device: torch.device) -> torch.device:
    """The device as tensors name it (``cuda`` is ``cuda:0``, ``cpu:0`` is ``cpu``): one key for a device."""
    return torch.empty(0, device=device).device


class StubModelContext(ModelContext):
    """A context that knows only sizes, for code that needs no more. Everything else is refused."""

    def __init__(self, dim_sizes: Mapping[Dimension, int]) -> None:
        super().__init__("stub", "cpu")
        self._dim_sizes = dict(dim_sizes)

    def get_dim_size(self, model_dim: Dimension) -> int:
        """The size that was given."""
        return size_of(self._dim_sizes, model_dim, "this StubModelContext")

    def _get_weight_helper(
        self, location_type: WeightLocationType, layer: LayerIndex, device: torch.device
    ) -> Tensor:
        raise self._refusal("weights")

    def get_encoding(self) -> Any:
        """Refused."""
        raise self._refusal("tokenizer")

    def get_or_create_model(
        self, device: Device | None = None, simplify: bool = False
    ) -> LanguageModel:
        """Refused."""
        raise self._refusal("model")

    def get_model_config_as_dict(self) -> dict[str, Any]:
        """Refused."""
        raise self._refusal("config")

    def _check_layer(self, location_type: WeightLocationType, layer: LayerIndex) -> None:
        raise self._refusal("weights")

    @staticmethod
    def _refusal(wanted: str) -> _SizesOnlyError:
        return _SizesOnlyError(f"a StubModelContext knows sizes only; it has no {wanted}.")


def get_unembedding_with_ln_gain(model_context: ModelContext) -> Tensor:
    """The final norm's gain times the unembedding, ``[d, v]``: what a direction does to the logits.

    The norm's division by the scale and its bias are not included.
    """
    gain = model_context.get_weight(WeightLocationType.LAYER_NORM_GAIN_FINAL)
    return gain[:, None] * model_context.get_weight(WeightLocationType.UNEMBEDDING)


def get_embedding(model_context: ModelContext) -> Tensor:
    """The token embedding ``[v, d]``."""
    return model_context.get_weight(WeightLocationType.EMBEDDING)
