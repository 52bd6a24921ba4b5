"""The autoencoders of one location, layer by layer: :class:`AutoencoderContext`.

A context loads each autoencoder when it is first asked for, keeps it, freezes it, and can splice
all of them into a forward pass.

Shape legend: ``n`` inputs of an autoencoder, ``l`` latents, ``…`` any leading axes.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder, InputNormalization
from neuron_explainer.models.autoencoders.pruned import omit_dead_latents
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.hooks import AtLayers, AutoencoderHooks, Hook, TransformerHooks
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.locks import Lock
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension, LayerIndex


@dataclass(frozen=True)
class AutoencoderConfig:
    """Where the autoencoders for one location are stored, and what their files do not say."""

    location: LocationLike
    """Where in a layer their inputs come from; stored as an :class:`ActivationLocation`."""
    autoencoder_path_by_layer_index: (
        Mapping[int, str | Path] | Mapping[None, str | Path] | Mapping[LayerIndex, str | Path]
    )
    """The folder or file of each, as a path or URL. The layer None stands for a location that a model
    has only once, or for one autoencoder that serves every layer; then it is the only entry."""
    input_normalization: InputNormalization | None = None
    """For files that do not record it; None where they do."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """Other things that the files do not say and :meth:`Autoencoder.load` must be told, for example
    ``{"norm_factor": 0.9}``."""
    stated_by_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """The same where it differs from layer to layer."""

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
        """Return the config that an entry of the registry describes."""
        return cls(
            spec.location,
            spec.autoencoder_path_by_layer_index,
            spec.input_normalization,
            spec.stated,
            spec.stated_by_layer,
        )


class AutoencoderSpec(AutoencoderConfig):
    """An entry of the registry of published autoencoders."""


class HasSizes(Protocol):
    """A ``ModelContext``, or another object that knows a model's sizes."""

    def get_dim_size(self, model_dim: Dimension) -> int:
        """Return the length of an axis in this model."""


class HasConfig(Protocol):
    """A ``Transformer``, or another object with its config."""

    @property
    def cfg(self) -> TransformerConfig:
        """Sizes of the model."""


Layers = Iterable[LayerIndex] | LayerIndex
"""A layer, several of them, or None for all that have an autoencoder."""


@dataclass(frozen=True, eq=False)
class AutoencoderContext:
    """One autoencoder for each layer, at one location: loaded when first needed, kept, frozen.

    Args:
        autoencoder_config: where the autoencoders are stored.
        device: where to put them.
        omit_dead_latents: leave latents that never fired in training out of memory; indices and the
            values of the other latents do not change (:func:`omit_dead_latents`).
        dtype: the dtype of the weights in memory; use that of the model they are spliced into.
    """

    autoencoder_config: AutoencoderConfig
    device: torch.device | str
    omit_dead_latents: bool = False
    dtype: torch.dtype = torch.float32
    _loaded: dict[str, Autoencoder] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @classmethod
    def of(cls, autoencoders: Iterable[Autoencoder]) -> Self:
        """The context of autoencoders in memory, which record where they belong: one site, other layers."""
        by_layer: dict[LayerIndex, Autoencoder] = {}
        paths: set[ActivationLocation] = set()
        for autoencoder in autoencoders:
            place = autoencoder.location
            if place is None:
                raise InputError(
                    f"{autoencoder._name()}: it does not record its location; load it with location=."
                )
            paths.add(place.at(None))
            if place.layer in by_layer or len(paths) > 1:
                raise InputError(
                    "expected autoencoders of one site, each of another layer; found a second one of "
                    f"{place}."
                    if len(paths) == 1
                    else f"expected autoencoders of one site, found {', '.join(sorted(map(str, paths)))}."
                )
            by_layer[place.layer] = autoencoder
        if not by_layer:
            raise InputError("expected at least one autoencoder, found none.")
        first = next(iter(by_layer.values()))
        names = {layer: f"<in memory, layer {layer}>" for layer in by_layer}
        context = cls(AutoencoderConfig(paths.pop(), names), first.device, dtype=first.dtype)
        for layer, autoencoder in by_layer.items():
            context._loaded[names[layer]] = autoencoder.eval().requires_grad_(False)
        return context

    @property
    def location(self) -> ActivationLocation:
        """The location, without the layer."""
        return ActivationLocation.parse(self.autoencoder_config.location)

    @property
    def layer_indices(self) -> set[LayerIndex]:
        """The layers with an autoencoder; ``{None}`` if one serves all, or the location has no layers."""
        return set(self._paths)

    @property
    def _paths(self) -> dict[LayerIndex, str]:
        return self.autoencoder_config.paths

    @property
    def _serves_all(self) -> bool:
        """Whether one autoencoder serves every layer."""
        return None in self._paths and self.location.site.per_layer

    @property
    def num_autoencoder_directions(self) -> int:
        """The number of latents of each autoencoder, including those left out of memory. Loads one
        autoencoder to find out."""
        return self.get_autoencoder(next(iter(self._paths))).n_latents

    def get_parameterized_dimension_sizes(self) -> dict[Dimension, int]:
        """Lengths of the axes that autoencoders add to a model's."""
        return {Dimension.AUTOENCODER_LATENTS: self.num_autoencoder_directions}

    def chosen_layers(self, layers: Layers = None) -> list[LayerIndex]:
        """The layers that ``layers`` names, each once: one layer, several, or None for all that have an
        autoencoder (``[None]`` if one serves all). An InputError names a layer that has none."""
        if layers is None:
            return list(self._paths)
        # A str is Iterable too: its letters are no layers, and are refused below.
        given = layers if isinstance(layers, Iterable) else [layers]
        chosen: dict[LayerIndex, None] = {}
        for layer in given:
            whole = layer is None or (isinstance(layer, int) and not isinstance(layer, bool))
            if not whole or not (layer in self._paths or self._serves_all):
                raise InputError(
                    f"there is no autoencoder of {self.location} in layer {layer!r}. "
                    f"Layers: {', '.join(map(str, self._paths))}."
                )
            chosen[layer] = None
        return list(chosen)

    def get_autoencoder(self, layer_index: LayerIndex) -> Autoencoder:
        """The autoencoder of a layer, in eval mode and without gradients for its weights."""
        paths = self._paths
        (layer_index,) = self.chosen_layers([layer_index])
        path = paths[None if self._serves_all else layer_index]
        with self._lock:
            if path not in self._loaded:
                # One file may serve several layers; then it is loaded once, and names no layer.
                layers = [layer for layer, other in paths.items() if other == path]
                location = self.location.at(layers[0] if len(layers) == 1 else None)
                self._loaded[path] = self._load(path, location)
            return self._loaded[path]

    def _load(self, path: str, location: ActivationLocation) -> Autoencoder:
        config = self.autoencoder_config
        of_layer = {} if location.layer is None else config.stated_by_layer.get(location.layer, {})
        autoencoder = Autoencoder.load(
            path,
            strict=False,  # the statistics in published files vary
            input_normalization=config.input_normalization,
            location=location,
            dtype=self.dtype,
            **{**config.stated, **of_layer},
        )
        if self.omit_dead_latents:
            autoencoder = omit_dead_latents(autoencoder)
        return autoencoder.to(self.device).eval().requires_grad_(False)

    def warmup(self) -> None:
        """Load all autoencoders now."""
        for layer_index in self._paths:
            self.get_autoencoder(layer_index)

    def check_model(
        self,
        model: HasSizes | HasConfig | TransformerConfig | LanguageModel,
        layers: Layers = None,
    ) -> None:
        """Raise unless every autoencoder fits its location in ``model``.

        Args:
            model: a language model, its config, or a ``ModelContext``.
            layers: a layer or several; None for all.
        """
        size = _sizes_of(model)
        width = self.location.site.width(size)
        has_heads = self.location.site.shape[-1] == "d_head"
        joined = width * size(Dimension.ATTN_HEADS) if has_heads else width
        for layer in self.chosen_layers(layers):
            self.location.at(layer).expand(size(Dimension.LAYERS))
            autoencoder = self.get_autoencoder(layer)
            if autoencoder.n_inputs not in (width, joined):
                raise InputError(
                    f"the autoencoder of {self.location.at(layer)} takes inputs of width "
                    f"{autoencoder.n_inputs}, this model has width {width} there"
                    f"{f', {joined} with its heads joined' if has_heads else ''}."
                )

    def verify(
        self,
        model_context: ModelContext,
        text: str | None = None,
        layers: Layers = None,
        bos: bool = False,
    ) -> dict[LayerIndex, Any]:
        """Measure the autoencoders on a text: are they what was published, and applied as trained?

        This calls :func:`neuron_explainer.evaluation.verify.verify`, which is looked up at the call because
        its room stands above this one.

        Args:
            model_context: the model that they were trained on.
            text: the text to run; None: a built-in passage.
            layers: a layer or several; None for all.
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
        layers: Layers = None,
    ) -> TransformerHooks:
        """Hooks that pass the activations at the location through the autoencoders.

        Args:
            on_latents: a hook ``(latents, layer=…) -> latents`` for the latents ``[…, l]`` of every
                one of these layers.
            add_error: add back what the autoencoders do not capture, so that nothing changes unless
                ``on_latents`` edits something; then the edit of a latent moves the activation along
                that latent's decoder direction. Without, activations are replaced by their
                reconstructions.
            layers: a layer or several; None for all that have an autoencoder.
        """
        hooks = TransformerHooks()
        self._splice(hooks, [] if on_latents is None else [(None, on_latents)], add_error, layers)
        return hooks

    def splice(
        self, layer: LayerIndex, on_latents: Iterable[Hook] = (), add_error: bool = True
    ) -> AutoencoderHooks:
        """A hook that passes activations through the autoencoder of a layer, as in :meth:`hooks`."""
        autoencoder = self.get_autoencoder(layer)
        if autoencoder.is_transcoder:
            raise InputError(
                f"{autoencoder._name()}: is a transcoder, whose output stands for another "
                "activation than its input: it cannot take its input's place."
            )
        inside = AutoencoderHooks.from_autoencoder(autoencoder, add_error)
        for hook in on_latents:
            inside.latents.append_fwd(hook)
        return inside

    def _splice(
        self,
        hooks: TransformerHooks,
        on_latents: Iterable[tuple[LayerIndex, Hook]],
        add_error: bool,
        layers: Layers = None,
    ) -> None:
        """Add the autoencoders to ``hooks``. ``on_latents`` has hooks and the layer of each (None: all)."""
        chosen = self.chosen_layers(layers)
        for at, _ in on_latents:
            if at is not None and None not in chosen and at not in chosen:
                raise InputError(
                    f"on_latents has a hook for {self.location.at(at)}, where no autoencoder is spliced "
                    f"in; the layers are {', '.join(map(str, chosen))}."
                )
        for layer in chosen:
            its = [
                hook if at in (None, layer) else AtLayers(at).append(hook)
                for at, hook in on_latents
                if layer is None or at in (None, layer)  # layer None: one autoencoder serves all
            ]
            inside = self.splice(layer, its, add_error)
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
    """Several contexts, one for each location."""

    autoencoder_context_by_location: Mapping[ActivationLocation, AutoencoderContext]

    @classmethod
    def from_context_or_multi_context(
        cls, context: "AutoencoderContext | MultiAutoencoderContext | None"
    ) -> "MultiAutoencoderContext | None":
        """Return one context as a multi-context; a multi-context or None is returned unchanged."""
        if isinstance(context, AutoencoderContext):
            return cls.from_autoencoder_context_list([context])
        return context

    @classmethod
    def from_autoencoder_context_list(cls, contexts: Iterable[AutoencoderContext]) -> Self:
        """Return a multi-context of contexts of different locations."""
        by_location: dict[ActivationLocation, AutoencoderContext] = {}
        for context in contexts:
            if context.location in by_location:
                raise InputError(
                    f"two autoencoder contexts are of {context.location}; expected at most one for each "
                    "location."
                )
            by_location[context.location] = context
        return cls(by_location)

    @property
    def has_single_autoencoder_context(self) -> bool:
        """True if there is exactly one context."""
        return len(self.autoencoder_context_by_location) == 1

    def get_single_autoencoder_context(self) -> AutoencoderContext:
        """Return the only context; an InputError if there are several."""
        if not self.has_single_autoencoder_context:
            raise InputError(f"a location is needed to choose among {self._locations()}.")
        return next(iter(self.autoencoder_context_by_location.values()))

    def get_autoencoder_context(self, location: LocationLike | None = None) -> AutoencoderContext:
        """Return the context of a location; without a location, the only context."""
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
        """Return the autoencoder of a layer at a location."""
        named = None if location is None else ActivationLocation.parse(location).layer
        if named not in (None, layer_index):
            raise InputError(f"the location is in layer {named}, layer_index says {layer_index}.")
        return self.get_autoencoder_context(location).get_autoencoder(layer_index)

    def warmup(self) -> None:
        """Load all autoencoders now."""
        for context in self.autoencoder_context_by_location.values():
            context.warmup()

    def hooks(
        self,
        on_latents: Mapping[LocationLike, Hook] | Hook | None = None,
        add_error: bool = True,
        layers: Layers = None,
    ) -> TransformerHooks:
        """Hooks that pass activations through the autoencoders of all locations.

        Args:
            on_latents: a hook for the latents of each location that has one, or one hook for all.
                ``{"2/mlp.post_act": f}`` runs in layer 2 only, ``{"mlp.post_act": f}`` in every layer.
            add_error: see :meth:`AutoencoderContext.hooks`.
            layers: a layer or several, of each context; None for all that have an autoencoder.
        """
        contexts = self.autoencoder_context_by_location
        given: dict[ActivationLocation, list[tuple[LayerIndex, Hook]]] = {at: [] for at in contexts}
        if on_latents is None or isinstance(on_latents, Mapping):
            for text, hook in (on_latents or {}).items():
                place = ActivationLocation.parse(text)
                given[self.get_autoencoder_context(place).location].append((place.layer, hook))
        else:
            given = {at: [(None, on_latents)] for at in contexts}
        hooks = TransformerHooks()
        chosen = list(layers) if isinstance(layers, Iterable) else layers
        for at, context in contexts.items():
            context._splice(hooks, given[at], add_error, chosen)
        return hooks

    def _locations(self) -> str:
        return ", ".join(map(str, self.autoencoder_context_by_location)) or "none"


# ---- sizes of the model ----------------------------------------------------------------------------


def _sizes_of(
    model: HasSizes | HasConfig | TransformerConfig | LanguageModel,
) -> Callable[[Dimension], int]:
    if isinstance(model, TransformerConfig):
        cfg = model
    elif isinstance(model, LanguageModel):
        return model.sizes.__getitem__
    elif hasattr(model, "get_dim_size"):
        return model.get_dim_size
    else:
        cfg = model.cfg
    return cfg.sizes.__getitem__


# ---- weights -----------------------------------------------------------------------------------------


def get_autoencoder_output_weight_by_layer_index(
    autoencoder_context: AutoencoderContext,
) -> dict[LayerIndex, Tensor]:
    """Return :attr:`Autoencoder.directions` of every layer."""
    return {
        layer: autoencoder_context.get_autoencoder(layer).directions
        for layer in autoencoder_context._paths
    }
