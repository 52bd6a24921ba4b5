"""The autoencoders of one location, layer by layer: :class:`AutoencoderContext`.

A context loads each autoencoder when it is first asked for, keeps it, freezes it, and can splice
all of them into a forward pass.

Shape legend: ``n`` inputs of an autoencoder, ``l`` latents, ``…`` any leading axes.
"""

import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder, InputNormalization
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.checkpoints.autoencoders.state import select_latents
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.hooks import AutoencoderHooks, Hook, TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension, LayerIndex

ACTIVATION_FREQUENCY_THRESHOLD_FOR_DEAD_LATENTS = 1e-8


@dataclass(frozen=True)
class AutoencoderConfig:
    """Where the autoencoders of one location are, and what their files may not say."""

    location: LocationLike
    """Where in a layer their inputs come from; an :class:`ActivationLocation` once made."""
    autoencoder_path_by_layer_index: (
        Mapping[int, str | Path] | Mapping[None, str | Path] | Mapping[LayerIndex, str | Path]
    )
    """Folder or ``.pt`` file of each, path or URL. The layer None stands for a place that a model has
    once, or for one autoencoder that serves every layer; then it is the only entry."""
    input_normalization: InputNormalization | None = None
    """For files that do not record it; None where they do."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the files do not say and :meth:`Autoencoder.load` has to be told, such as
    ``{"norm_factor": 0.9}``."""

    def __post_init__(self) -> None:
        location = ActivationLocation.parse(self.location)
        paths = self.paths
        if location.layer is not None:
            raise LocationError(
                f"AutoencoderConfig: the layer is the key of each path; expected the location "
                f"{str(location.at(None))!r}, found {str(location)!r}."
            )
        if not paths:
            raise InputError(f"AutoencoderConfig: no autoencoder is given for {location}.")
        if None in paths and len(paths) > 1:
            raise InputError(
                f"AutoencoderConfig: layer None stands for all layers of {location} and must be "
                f"the only one, found {list(paths)}."
            )
        for layer in paths:
            location.at(layer)  # a layer of a place without layers is an error
        object.__setattr__(self, "location", location)
        object.__setattr__(self, "autoencoder_path_by_layer_index", paths)

    @property
    def paths(self) -> dict[LayerIndex, str]:
        """``autoencoder_path_by_layer_index`` as text."""
        return {layer: str(path) for layer, path in self.autoencoder_path_by_layer_index.items()}

    @classmethod
    def from_spec(cls, spec: "AutoencoderConfig") -> Self:
        """From an entry of the registry."""
        return cls(
            spec.location,
            spec.autoencoder_path_by_layer_index,
            spec.input_normalization,
            spec.stated,
        )


class AutoencoderSpec(AutoencoderConfig):
    """An entry of the registry of published autoencoders."""


class HasSizes(Protocol):
    """A ``ModelContext``, or what knows sizes as one does."""

    def get_dim_size(self, model_dim: Dimension) -> int:
        """How long an axis is in this model."""


class HasConfig(Protocol):
    """A ``Transformer``, or what has its config."""

    @property
    def cfg(self) -> TransformerConfig:
        """Sizes of the model."""


@dataclass(frozen=True, eq=False)
class AutoencoderContext:
    """One autoencoder a layer at one location: loaded when first needed, kept, frozen.

    Args:
        autoencoder_config: where they are.
        device: where to put them.
        omit_dead_latents: leave latents that never fired in training out of memory; every index, and
            every latent of those that are kept, stays what it is (:func:`omit_dead_latents`).
        dtype: of the weights in memory: that of the model they are to be spliced into.
    """

    autoencoder_config: AutoencoderConfig
    device: torch.device | str
    omit_dead_latents: bool = False
    dtype: torch.dtype = torch.float32
    _loaded: dict[str, Autoencoder] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    @property
    def location(self) -> ActivationLocation:
        """The place in a layer, without the layer."""
        return ActivationLocation.parse(self.autoencoder_config.location)

    @property
    def layer_indices(self) -> set[LayerIndex]:
        """The layers that have an autoencoder; ``{None}`` if one serves all, or there are none."""
        return set(self._paths)

    @property
    def _paths(self) -> dict[LayerIndex, str]:
        return self.autoencoder_config.paths

    @property
    def num_autoencoder_directions(self) -> int:
        """Latents of each autoencoder, those left out of memory included. Loads one to find out."""
        return self.get_autoencoder(next(iter(self._paths))).n_latents

    def get_parameterized_dimension_sizes(self) -> dict[Dimension, int]:
        """Lengths of the axes that autoencoders add to a model's."""
        return {Dimension.AUTOENCODER_LATENTS: self.num_autoencoder_directions}

    def get_autoencoder(self, layer_index: LayerIndex) -> Autoencoder:
        """The autoencoder of a layer, in eval mode and without gradients for its weights."""
        paths = self._paths
        if layer_index not in paths:
            raise InputError(
                f"there is no autoencoder of {self.location} in layer {layer_index!r}. "
                f"Layers: {', '.join(map(str, paths))}."
            )
        path = paths[layer_index]
        with self._lock:
            if path not in self._loaded:
                # One file may serve several layers; then it is loaded once and is of none of them.
                layers = [layer for layer, other in paths.items() if other == path]
                location = self.location.at(layers[0] if len(layers) == 1 else None)
                self._loaded[path] = self._load(path, location)
            return self._loaded[path]

    def _load(self, path: str, location: ActivationLocation) -> Autoencoder:
        autoencoder = Autoencoder.load(
            path,
            strict=False,  # the statistics in published files vary
            input_normalization=self.autoencoder_config.input_normalization,
            location=location,
            dtype=self.dtype,
            **self.autoencoder_config.stated,
        )
        if self.omit_dead_latents:
            autoencoder = omit_dead_latents(autoencoder)
        return autoencoder.to(self.device).eval().requires_grad_(False)

    def warmup(self) -> None:
        """Load all of them now."""
        for layer_index in self._paths:
            self.get_autoencoder(layer_index)

    def check_model(
        self,
        model: HasSizes | HasConfig | TransformerConfig,
        layers: Iterable[LayerIndex] | None = None,
    ) -> None:
        """Raise unless every autoencoder fits its location in ``model``.

        Args:
            model: a ``Transformer``, its config, or a ``ModelContext``.
            layers: which of them; None for all.
        """
        size = _sizes_of(model)
        width = self.location.site.width(size)
        for layer in self._paths:
            self.location.at(layer).expand(size(Dimension.LAYERS))
            autoencoder = self.get_autoencoder(layer)
            if autoencoder.n_inputs != width:
                raise InputError(
                    f"the autoencoder of {self.location.at(layer)} takes inputs of width "
                    f"{autoencoder.n_inputs}, this model has width {width} there."
                )

    def verify(
        self,
        model_context: ModelContext,
        text: str | None = None,
        layers: Iterable[LayerIndex] | None = None,
        bos: bool = False,
    ) -> dict[LayerIndex, Any]:
        """Measure the autoencoders on a text: are they what was published, applied as trained?

        A short way to :func:`neuron_explainer.evaluation.verify.verify`, which stands in a room
        above this one and is therefore looked up when called, not imported.

        Args:
            model_context: the model that they were trained on.
            text: what to run; a built-in passage if not given.
            layers: which of them; None for all.
            bos: begin with the start token, for autoencoders that were trained so.

        Returns:
            ``{layer: figures}``, each a :class:`~neuron_explainer.evaluation.verify.Verification`.
        """
        evaluation = importlib.import_module("neuron_explainer.evaluation.verify")
        measured: dict[LayerIndex, Any] = evaluation.verify(self, model_context, text, layers, bos)
        return measured

    def hooks(
        self,
        on_latents: Hook | None = None,
        add_error: bool = True,
        layers: Iterable[LayerIndex] | None = None,
    ) -> TransformerHooks:
        """Hooks that pass the activations at the location through the autoencoders.

        Args:
            on_latents: a hook ``(latents, layer=…) -> latents`` for the latents ``[…, l]`` of every
                one of these layers.
            add_error: add back what the autoencoders do not capture, so that nothing changes unless
                ``on_latents`` edits something; then the edit of a latent moves the activation along
                that latent's decoder direction. Without, activations are replaced by their
                reconstructions.
            layers: which of the layers; None for all that have an autoencoder.
        """
        hooks = TransformerHooks()
        self._splice(hooks, on_latents, add_error, layers)
        return hooks

    def _splice(
        self,
        hooks: TransformerHooks,
        on_latents: Hook | None,
        add_error: bool,
        layers: Iterable[LayerIndex] | None = None,
    ) -> None:
        chosen = self._paths if layers is None else layers
        for layer in chosen:
            autoencoder = self.get_autoencoder(layer)
            if autoencoder.is_transcoder:
                raise InputError(
                    f"{autoencoder._name()}: is a transcoder, whose output stands for another "
                    "activation than its input: it cannot take its input's place."
                )
            inside = AutoencoderHooks.from_autoencoder(autoencoder, add_error)
            if on_latents is not None:
                inside.latents.append_fwd(on_latents)
            hooks.append_at(self.location.at(layer), inside)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self._paths))
        return (
            f"AutoencoderContext({str(self.location)!r}, layers=[{layers}], "
            f"device={str(self.device)!r}, omit_dead_latents={self.omit_dead_latents}, "
            f"{len(self._loaded)} loaded)"
        )


@dataclass(frozen=True, eq=False)
class MultiAutoencoderContext:
    """Several contexts, one a location."""

    autoencoder_context_by_location: Mapping[ActivationLocation, AutoencoderContext]

    @classmethod
    def from_context_or_multi_context(
        cls, context: "AutoencoderContext | MultiAutoencoderContext | None"
    ) -> "MultiAutoencoderContext | None":
        """One context as a multi-context; a multi-context, or None, as it is."""
        if isinstance(context, AutoencoderContext):
            return cls.from_autoencoder_context_list([context])
        return context

    @classmethod
    def from_autoencoder_context_list(cls, contexts: Iterable[AutoencoderContext]) -> Self:
        """Contexts of different locations."""
        by_location: dict[ActivationLocation, AutoencoderContext] = {}
        for context in contexts:
            if context.location in by_location:
                raise InputError(
                    f"two autoencoder contexts are of {context.location}; there may be one a "
                    "location."
                )
            by_location[context.location] = context
        return cls(by_location)

    @property
    def has_single_autoencoder_context(self) -> bool:
        """Whether there is exactly one."""
        return len(self.autoencoder_context_by_location) == 1

    def get_single_autoencoder_context(self) -> AutoencoderContext:
        """The only one; an error if there are others."""
        if not self.has_single_autoencoder_context:
            raise InputError(f"a location is needed to choose among {self._locations()}.")
        return next(iter(self.autoencoder_context_by_location.values()))

    def get_autoencoder_context(self, location: LocationLike | None = None) -> AutoencoderContext:
        """The context of a location; of the only one if none is named."""
        if location is None:
            return self.get_single_autoencoder_context()
        found = ActivationLocation.parse(location).at(None)
        if found not in self.autoencoder_context_by_location:
            raise InputError(
                f"there are no autoencoders of {found}. Locations: {self._locations()}."
            )
        return self.autoencoder_context_by_location[found]

    def get_autoencoder(
        self, layer_index: LayerIndex, location: LocationLike | None = None
    ) -> Autoencoder:
        """The autoencoder of a layer at a location."""
        return self.get_autoencoder_context(location).get_autoencoder(layer_index)

    def warmup(self) -> None:
        """Load all of them now."""
        for context in self.autoencoder_context_by_location.values():
            context.warmup()

    def hooks(
        self, on_latents: Mapping[LocationLike, Hook] | None = None, add_error: bool = True
    ) -> TransformerHooks:
        """Hooks that pass activations through the autoencoders of all locations.

        Args:
            on_latents: a hook for the latents of each location that has one.
            add_error: see :meth:`AutoencoderContext.hooks`.
        """
        by_context = {
            id(self.get_autoencoder_context(location)): hook
            for location, hook in (on_latents or {}).items()
        }
        hooks = TransformerHooks()
        for context in self.autoencoder_context_by_location.values():
            context._splice(hooks, by_context.get(id(context)), add_error)
        return hooks

    def _locations(self) -> str:
        return ", ".join(map(str, self.autoencoder_context_by_location)) or "none"


# ---- sizes of the model ----------------------------------------------------------------------------


def _sizes_of(model: HasSizes | HasConfig | TransformerConfig) -> Callable[[Dimension], int]:
    if isinstance(model, TransformerConfig):
        cfg = model
    elif hasattr(model, "get_dim_size"):
        return model.get_dim_size
    else:
        cfg = model.cfg
    return cfg.sizes.__getitem__


# ---- weights and dead latents ----------------------------------------------------------------------


def get_decoder_weight(autoencoder: Autoencoder) -> Tensor:
    """The direction of each latent, ``[l, n]``; zeros for latents that were left out of memory."""
    weight: Tensor = autoencoder.decoder.weight.t()
    if isinstance(autoencoder, PrunedAutoencoder):
        full = weight.new_zeros(autoencoder.n_latents, autoencoder.n_inputs)
        return full.index_copy(0, autoencoder.kept, weight)
    return weight


def get_autoencoder_output_weight_by_layer_index(
    autoencoder_context: AutoencoderContext,
) -> dict[LayerIndex, Tensor]:
    """:func:`get_decoder_weight` of every layer."""
    return {
        layer: get_decoder_weight(autoencoder_context.get_autoencoder(layer))
        for layer in autoencoder_context._paths
    }


def count_dead_latents(autoencoder: Autoencoder) -> int:
    """Latents that were active on less than 1e-8 of the training tokens, by its statistics."""
    return int((~_alive(autoencoder)).sum())


def _alive(autoencoder: Autoencoder) -> Tensor:
    frequency = autoencoder.latents_activation_frequency
    if not frequency.any():
        raise InputError(
            f"{autoencoder._name()}: its statistics say that no latent was ever active: they were "
            "not recorded, and cannot tell which latents are dead."
        )
    return frequency >= ACTIVATION_FREQUENCY_THRESHOLD_FOR_DEAD_LATENTS


def omit_dead_latents(autoencoder: Autoencoder) -> Autoencoder:
    """The autoencoder without its dead latents in memory; every index stays what it is."""
    return omit_least_active_latents(autoencoder, int(_alive(autoencoder).sum()))


def omit_least_active_latents(
    autoencoder: Autoencoder, n_latents_to_keep: int, preserve_indices: bool = True
) -> Autoencoder:
    """The autoencoder with only its most active latents in memory.

    Activity is ``latents_activation_frequency``; of equally active latents the first are kept. Biases,
    activation function, tying and input normalisation stay. With TopK, the place among the ``k`` of a
    latent that is left out goes to the next.

    Args:
        autoencoder: left as it is.
        n_latents_to_keep: how many.
        preserve_indices: if True, latents keep their indices: the result is a
            :class:`PrunedAutoencoder`. If False, it is an ordinary, smaller autoencoder in which the
            latents that are left have moved together.
    """
    n_latents = autoencoder.n_latents
    if not 1 <= n_latents_to_keep <= n_latents:
        raise InputError(
            f"{autoencoder._name()}: n_latents_to_keep must lie in 1 to {n_latents}, found "
            f"{n_latents_to_keep}."
        )
    if isinstance(autoencoder, PrunedAutoencoder):
        raise InputError(f"{autoencoder._name()}: latents were left out already; load it whole.")
    if preserve_indices and n_latents_to_keep == n_latents:
        return autoencoder
    order = autoencoder.latents_activation_frequency.argsort(descending=True, stable=True)
    kept = order[:n_latents_to_keep].sort().values
    return PrunedAutoencoder(autoencoder, kept) if preserve_indices else _reduced(autoencoder, kept)


def _reduced(whole: Autoencoder, kept: Tensor) -> Autoencoder:
    """An autoencoder of the latents ``kept`` only."""
    state_dict = select_latents(whole.state_dict(), kept)
    return Autoencoder.from_state_dict(
        state_dict,
        input_normalization=whole.input_normalization,
        location=whole.location,
        output_location=whole.output_location,
        model_name=whole.model_name,
        metadata=whole.metadata,
    )


class PrunedAutoencoder(Autoencoder):
    """An autoencoder that has left latents out of memory and still speaks of all ``l`` by index.

    Latents that were left out are zero, before and after the activation function. Statistics are
    those of all latents. It is a way of using an autoencoder, not of storing one: it is not saved.
    """

    kept: Tensor
    """``[kept]`` int64, ascending: the latents that are there."""

    def __init__(self, whole: Autoencoder, kept: Tensor) -> None:
        small = _reduced(whole, kept)
        super().__init__(
            small.n_latents,
            small.n_inputs,
            small.activation,
            small.tied,
            input_normalization=small.input_normalization,
            n_outputs=small.n_outputs if small.is_transcoder else None,
            location=small.location,
            output_location=small.output_location,
            model_name=small.model_name,
            metadata=small.metadata,
            device="meta",
        )
        self.pre_bias, self.latent_bias = small.pre_bias, small.latent_bias
        self.encoder, self.decoder = small.encoder, small.decoder
        self.post_bias, self.skip, self.glu = small.post_bias, small.skip, small.glu
        for name, _ in list(small.named_buffers(recurse=False)):
            setattr(self, name, getattr(whole, name).clone())
        self.register_buffer("kept", kept.clone())
        self.n_latents, self.group_sizes = whole.n_latents, whole.group_sizes
        self.train(whole.training)

    def _all(self, kept: Tensor) -> Tensor:
        """``[…, kept] -> […, l]``."""
        return kept.new_zeros(*kept.shape[:-1], self.n_latents).index_copy(-1, self.kept, kept)

    def _pre_act(
        self, x_hat: Tensor, latent_slice: slice = slice(None), relu: bool = False
    ) -> Tensor:
        return self._all(super()._pre_act(x_hat, relu=relu))[..., latent_slice]

    def _latents(self, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        pre_act = super()._pre_act(x_hat)
        return self._all(pre_act), self._all(self._activate(pre_act))

    def _top_k(self, x_hat: Tensor) -> Latents:
        found = super()._top_k(x_hat)
        return found._replace(indices=self.kept[found.indices])

    def _plain_latents(self, x_hat: Tensor) -> Tensor:
        return self._all(self._activate(super()._pre_act(x_hat)))

    def _decode_normalized(self, latents: Tensor | Latents) -> Tensor:
        if isinstance(latents, Latents):
            place = self.kept.new_full((self.n_latents,), -1)
            place[self.kept] = torch.arange(len(self.kept), device=place.device)
            indices = place[latents.indices]
            lost = latents.indices[(indices < 0) & (latents.values != 0)]
            used: Tensor | Latents = Latents(latents.values, indices.clamp(min=0), len(self.kept))
        else:
            used = latents.index_select(-1, self.kept)
            lost = self.kept[:0]
            if (used != 0).sum() != (latents != 0).sum():
                active = (latents != 0).reshape(-1, self.n_latents).any(0)
                lost = active.index_fill(0, self.kept, False).nonzero().flatten()
        # Without this, an edit of a latent that is not there would be lost without a word.
        if len(lost):
            raise InputError(
                f"{self._name()}: latent {int(lost[0])} is not zero but was left out of memory; load "
                "the autoencoder with omit_dead_latents=False to set it."
            )
        return super()._decode_normalized(used)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:  # type: ignore[override]
        """Refused: it would be read as a smaller autoencoder, in which every index has moved."""
        raise InputError(f"{self._name()}: latents were left out; save or copy the whole one.")

    def save(self, *args: object, **kwargs: object) -> None:
        """Refused, see :meth:`state_dict`."""
        self.state_dict()

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}, in memory={len(self.kept)})"
