"""Where something is in a network: a hook path and, for most paths, a layer.

Hooks, captures, autoencoders and files on disk all name a place with :class:`ActivationLocation`. Other
names of the same places (short names of published autoencoders, the strings of the original's
``ActivationLocationType``, TransformerLens hook names) are accepted wherever a location is parsed, and
are never written.

Shape legend: ``b`` batch, ``s`` sequence, ``q`` query, ``k`` key, ``h`` head, ``d_head`` width of a
head, ``d`` model width, ``f`` MLP width, ``v`` vocabulary, ``1`` a single number.
"""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsIndex, cast

from neuron_explainer.errors import LocationError, did_you_mean, shown
from neuron_explainer.models.weight_names import Dimension

Stage = Literal["embed", "layer", "final"]
"""When a pass reaches a site: before the layers, in each layer, or after the layers."""


@dataclass(frozen=True)
class Site:
    """One hook path: the shape of its tensor, when a pass reaches it, and what its hooks are given."""

    path: str
    """Dotted path in :class:`~neuron_explainer.models.hooks.TransformerHooks`."""
    shape: tuple[str, ...]
    """Names of the axes, in the letters of the module's legend."""
    stage: Stage = "layer"
    """Sites of the stages "embed" and "final" exist once in a model."""
    keywords: tuple[str, ...] = ("layer", "positions")
    """Keyword arguments given to hooks; ``layer`` is None where ``per_layer`` is False."""

    @property
    def per_layer(self) -> bool:
        """True if the site exists in each layer, False if it exists once in the model."""
        return self.stage == "layer"

    def width(self, size: Callable[[Dimension], int]) -> int:
        """Length of the last axis in a model whose axes have the lengths that ``size`` returns."""
        axis = self.shape[-1]
        if axis == "d_head" and self.path in ("attn.q", "attn.k"):
            return size(Dimension.QUERY_AND_KEY_CHANNELS)
        return size(_WIDTHS[axis]) if axis in _WIDTHS else 1

    def unit(self, text: str) -> "Unit":
        """The unit that a text means here: ``"3"``, or ``"3.17"`` for one channel of a head.

        Where there are heads, a unit is a head: ``"3"`` is head 3 with all its channels. Elsewhere a
        unit is one entry of the last axis.
        """
        first, dot, second = text.partition(".")
        has_channels = self.shape[-1] == "d_head"
        if not first.isdecimal() or (dot and not (second.isdecimal() and has_channels)):
            channel = ", or 3.17 for a channel of a head" if has_channels else ""
            raise LocationError(f"{self.path}: expected a unit such as 3{channel}; found {text!r}.")
        number = int(first)
        if not has_channels:
            return Unit(f"{_UNITS.get(self.shape[-1], 'entry')} {number}", (..., number))
        if not dot:
            return Unit(f"head {number}", (..., number, slice(None)))
        return Unit(f"channel {int(second)} of head {number}", (..., number, int(second)))


class Unit(NamedTuple):
    """What can be looked at or set at a site: a neuron, a channel of the stream, a head."""

    name: str
    """Such as ``"head 3"``."""
    where: tuple[Any, ...]
    """``x[where]`` is the unit's part of a tensor of the site."""


_UNITS = {"f": "neuron", "d": "channel", "h": "head", "v": "token"}
_WIDTHS = {
    "d_head": Dimension.VALUE_CHANNELS,
    "d": Dimension.RESIDUAL_STREAM_CHANNELS,
    "f": Dimension.MLP_ACTS,
    "h": Dimension.ATTN_HEADS,
    "v": Dimension.VOCAB_SIZE,
}


def _norm_sites(path: str, stage: Stage) -> list[Site]:
    return [
        Site(f"{path}.post_mean_subtraction", _BSD, stage),
        Site(f"{path}.scale", ("b", "s", "1"), stage),
        Site(f"{path}.post_scale", _BSD, stage),
    ]


_BSD = ("b", "s", "d")

SITES: dict[str, Site] = {
    site.path: site
    for site in [
        Site("resid.post_emb", _BSD, "embed"),
        *_norm_sites("resid.torso.ln_attn", "layer"),
        Site("resid.torso.post_ln_attn", _BSD),
        Site("attn.q", ("b", "q", "h", "d_head")),
        Site("attn.k", ("b", "k", "h", "d_head")),
        Site("attn.v", ("b", "k", "h", "d_head")),
        Site("attn.qk_logits", ("b", "q", "k", "h")),
        Site("attn.qk_softmax_denominator", ("b", "q", "1", "h")),
        Site("attn.qk_probs", ("b", "q", "k", "h")),
        Site("attn.v_out", ("b", "q", "h", "d_head")),
        Site("resid.torso.delta_attn", _BSD),
        Site("resid.torso.post_attn", _BSD),
        *_norm_sites("resid.torso.ln_mlp", "layer"),
        Site("resid.torso.post_ln_mlp", _BSD),
        Site("mlp.pre_act", ("b", "s", "f")),
        Site("mlp.post_act", ("b", "s", "f"), keywords=("layer", "positions", "out_layer")),
        Site("resid.torso.delta_mlp", _BSD),
        Site("resid.torso.post_mlp", _BSD),
        *_norm_sites("resid.ln_f", "final"),
        Site("resid.post_ln_f", _BSD, "final"),
        Site("logits", ("b", "s", "v"), "final"),
    ]
}
"""Every hook path, in the order in which a forward pass meets them. The tree of hooks
(:class:`~neuron_explainer.models.hooks.TransformerHooks`) is made from this table."""

_SOME_LOCATIONS = " Locations are such as 3/mlp.post_act, resid.torso.post_mlp, logits."

_ALIASES: dict[str, str] = {
    # short names in the paths of the published autoencoders
    "mlp_post_act": "mlp.post_act",
    "resid_delta_mlp": "resid.torso.delta_mlp",
    "resid_delta_attn": "resid.torso.delta_attn",
    "resid_post_mlp": "resid.torso.post_mlp",
    "resid_post_attn": "resid.torso.post_attn",
    # the original's ActivationLocationType, where it differs from the hook path
    "resid.delta_attn": "resid.torso.delta_attn",
    "resid.post_attn": "resid.torso.post_attn",
    "resid.delta_mlp": "resid.torso.delta_mlp",
    "resid.post_mlp": "resid.torso.post_mlp",
    "resid.post_attn_ln": "resid.torso.post_ln_attn",
    "resid.post_mlp_ln": "resid.torso.post_ln_mlp",
    "attn_ln.scale": "resid.torso.ln_attn.scale",
    "mlp_ln.scale": "resid.torso.ln_mlp.scale",
}

# TransformerLens names whose *values* are ours, held by a test against TransformerLens 3 and 4. (Layouts may
# differ: heads come last here, and hook_z is v_out before heads are merged.) Both of its kinds of model,
# HookedTransformer and the bridge of version 3 on, have the names that come first for a place; the bridge
# alone has the others. ``hook_normalized`` is a value before gain and bias. hook_q and hook_k are left out on
# purpose: there they are not scaled, here they carry d_head^-1/4 each, and an alias would change numbers
# without a word.
_TRANSFORMER_LENS_BLOCK: dict[str, str] = {
    "hook_resid_mid": "resid.torso.post_attn",
    "hook_resid_post": "resid.torso.post_mlp",
    "hook_attn_out": "resid.torso.delta_attn",
    "hook_mlp_out": "resid.torso.delta_mlp",
    "ln1.hook_normalized": "resid.torso.ln_attn.post_scale",
    "ln2.hook_normalized": "resid.torso.ln_mlp.post_scale",
    "ln1.hook_scale": "resid.torso.ln_attn.scale",
    "ln2.hook_scale": "resid.torso.ln_mlp.scale",
    "attn.hook_v": "attn.v",
    "attn.hook_z": "attn.v_out",
    "attn.hook_attn_scores": "attn.qk_logits",
    "attn.hook_pattern": "attn.qk_probs",
    "mlp.hook_pre": "mlp.pre_act",
    "mlp.hook_post": "mlp.post_act",
    "hook_out": "resid.torso.post_mlp",
    "ln1.hook_out": "resid.torso.post_ln_attn",
    "ln2.hook_in": "resid.torso.post_attn",
    "ln2.hook_out": "resid.torso.post_ln_mlp",
    "attn.hook_in": "resid.torso.post_ln_attn",
    "attn.q.hook_in": "resid.torso.post_ln_attn",
    "attn.k.hook_in": "resid.torso.post_ln_attn",
    "attn.v.hook_in": "resid.torso.post_ln_attn",
    "attn.v.hook_out": "attn.v",
    "attn.o.hook_in": "attn.v_out",
    "attn.o.hook_out": "resid.torso.delta_attn",
    "attn.hook_out": "resid.torso.delta_attn",
    "mlp.hook_in": "resid.torso.post_ln_mlp",
    "mlp.in.hook_in": "resid.torso.post_ln_mlp",
    "mlp.in.hook_out": "mlp.pre_act",
    "mlp.out.hook_in": "mlp.post_act",
    "mlp.out.hook_out": "resid.torso.delta_mlp",
    "mlp.hook_out": "resid.torso.delta_mlp",
}
# What comes into a layer: here, what the layer before leaves.
_TRANSFORMER_LENS_INPUTS = ("hook_resid_pre", "hook_in", "ln1.hook_in")
_TRANSFORMER_LENS_MODEL: dict[str, str] = {
    "ln_final.hook_scale": "resid.ln_f.scale",
    "ln_final.hook_normalized": "resid.ln_f.post_scale",
    "unembed.hook_in": "resid.post_ln_f",
    "unembed.hook_out": "logits",
    "ln_final.hook_out": "resid.post_ln_f",
    "hook_unembed": "logits",
}
_TRANSFORMER_LENS_NAME = re.compile(r"blocks\.([0-9]{1,9})\.(.+)")


@dataclass(frozen=True)
class ActivationLocation:
    """A place in the network: ``ActivationLocation("mlp.post_act", 3)``, in text ``3/mlp.post_act``.

    ``layer`` is None for the sites that a model has once (``resid.post_emb``, ``logits``, …). For a
    site that each layer has, None means every layer: an autoencoder context is at ``mlp.post_act``, its
    autoencoder of layer 3 at ``3/mlp.post_act``.
    """

    path: str
    layer: int | None = None

    def __post_init__(self) -> None:
        path = _ALIASES.get(self.path, self.path) if isinstance(self.path, str) else None
        if path is None or path not in SITES:
            near = did_you_mean(str(self.path), [*SITES, *_ALIASES])
            raise LocationError(
                f"unknown location {shown(self.path)}.{near or _SOME_LOCATIONS} The README's table of "
                "places, and neuron_explainer.models.locations.SITES, list all."
            )
        object.__setattr__(self, "path", path)
        if self.layer is not None and not self.site.per_layer:
            raise LocationError(
                f"{path!r} exists once in a model, not in each layer; found layer {self.layer}."
            )
        if self.layer is not None:
            object.__setattr__(self, "layer", _layer_number(self.layer, path))

    @property
    def site(self) -> Site:
        """Shape and keywords of the hook path."""
        return SITES[self.path]

    def at(self, layer: int | None) -> "ActivationLocation":
        """The same hook path at another layer."""
        return ActivationLocation(self.path, layer)

    def depth(self, n_layers: int) -> int:
        """How many of ``n_layers`` layers have run when a pass reaches this place.

        0 before the layers, ``i`` within layer ``i``, ``n_layers`` after the layers.
        """
        if self.layer is not None:
            return self.layer
        if self.site.per_layer:
            raise LocationError(f"{self} is in every layer; name one, such as '0/{self}'.")
        return 0 if self.site.stage == "embed" else n_layers

    def expand(self, n_layers: int) -> list["ActivationLocation"]:
        """The single places that this means in a model of ``n_layers``: all layers if none is named."""
        if not self.site.per_layer:
            return [self]
        if self.layer is None:
            return [self.at(layer) for layer in range(n_layers)]
        if self.layer >= n_layers:
            raise LocationError(
                f"{self} is outside the model: it has layers 0 to {n_layers - 1} ({n_layers} in all)."
            )
        return [self]

    @property
    def transformer_lens_name(self) -> str | None:
        """TransformerLens's name for the same place; None if there is none, or if a layer is missing."""
        # Reversed: of several names for a place the first wins.
        blocks = {path: name for name, path in reversed(_TRANSFORMER_LENS_BLOCK.items())}
        model = {path: name for name, path in reversed(_TRANSFORMER_LENS_MODEL.items())}
        if self.path == "resid.post_emb":
            return "blocks.0.hook_resid_pre"
        if self.path in blocks and self.layer is not None:
            return f"blocks.{self.layer}.{blocks[self.path]}"
        return model.get(self.path)

    @classmethod
    def parse(cls, text: "str | ActivationLocation") -> "ActivationLocation":
        """Read ``"3/mlp.post_act"``, ``"mlp.post_act"``, any alias or a TransformerLens hook name.

        ``hook_resid_pre`` of layer ``i`` is ``resid.torso.post_mlp`` of the layer before, and
        ``resid.post_emb`` where there is none.
        """
        if isinstance(text, ActivationLocation):
            return text
        if not isinstance(text, str):
            raise LocationError(
                f"expected a location such as '3/mlp.post_act', found {shown(text)}."
            )
        if match := _TRANSFORMER_LENS_NAME.fullmatch(text):
            layer, name = int(match[1]), match[2]
            if name in _TRANSFORMER_LENS_INPUTS:
                return cls("resid.torso.post_mlp", layer - 1) if layer else cls("resid.post_emb")
            if name in _TRANSFORMER_LENS_BLOCK:
                return cls(_TRANSFORMER_LENS_BLOCK[name], layer)
            raise LocationError(
                f"TransformerLens's {text!r} has no counterpart here."
                f"{did_you_mean(name, [*_TRANSFORMER_LENS_BLOCK, *_TRANSFORMER_LENS_INPUTS])}"
            )
        if text in _TRANSFORMER_LENS_MODEL:
            return cls(_TRANSFORMER_LENS_MODEL[text])
        layer_text, slash, path = text.partition("/")
        if not slash:
            return cls(text)
        if not re.fullmatch("[0-9]{1,9}", layer_text):
            raise LocationError(
                f"expected a location such as '3/mlp.post_act' (layer, slash, path), found {text!r}."
            )
        return cls(path, int(layer_text))

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.layer}/{self.path}"


def _layer_number(layer: object, path: str) -> int:
    try:
        number = -1 if isinstance(layer, bool) else operator.index(cast(SupportsIndex, layer))
    except TypeError:
        number = -1
    if number < 0:
        raise LocationError(
            f"layer of {path!r} must be a whole number of at least 0, found {shown(layer)}."
        )
    return number


LocationLike = str | ActivationLocation


def parse_locations(locations: LocationLike | Iterable[LocationLike]) -> list[ActivationLocation]:
    """A list of :class:`ActivationLocation` from one location or several, given as text or not."""
    if isinstance(locations, str | ActivationLocation) or not isinstance(locations, Iterable):
        locations = [locations]
    return [ActivationLocation.parse(location) for location in locations]
