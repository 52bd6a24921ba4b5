"""Hooks: functions ``(x, layer=…, **kwargs) -> x`` that see, and may replace, what a model computes.

Hooks are a value that is passed to ``forward``; a model never holds any. So nothing has to be removed
after an experiment, an exception leaves nothing behind, and two experiments can interleave.

A tree of hooks has the model's shape::

    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(ablate)                        # every layer
    hooks.resid.torso.delta_mlp.append_fwd(AtLayers(3).append(store))
    model(tokens, hooks=hooks)

At each site (see :data:`neuron_explainer.models.locations.SITES` for their shapes) hooks run in this
order, and in the order of appending within each kind:

1. ``fwd``: functions of the activation;
2. ``bwd``: functions of the gradient that reaches the activation from what comes after, ``fwd2``
   hooks included. They run during the backward pass, so last appended first, last layer first;
3. ``fwd2``: functions of the activation whose effect on the loss is part of what ``bwd`` hooks see.

The very object that a user appends is called: a recorder with ``__call__``, a bound method or a module
keeps its state. (The original deep-copied the whole tree for each layer of each pass, which cost
milliseconds, cloned autoencoders, and left stateful hooks empty.)
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Self

from neuron_explainer.errors import HookError, LocationError
from neuron_explainer.models.autoencoder_hooks import AutoencoderHooks, autoencoders_in, joined
from neuron_explainer.models.hook_lists import (
    KINDS,
    AtLayers,
    Attached,
    ConditionalHooks,
    DescribedHook,
    FwdBwdHooks,
    GradHook,
    HookCollection,
    HookNode,
    Hooks,
    Kind,
    WrapperHooks,
    grad_hook_wrapper,
    hook_name,
)
from neuron_explainer.models.hook_signatures import Hook
from neuron_explainer.models.locations import SITES, ActivationLocation, LocationLike
from neuron_explainer.models.weight_names import Dimension

__all__ = [
    "NO_HOOKS",
    "AtLayers",
    "AttentionHooks",
    "AutoencoderHooks",
    "ConditionalHooks",
    "DescribedHook",
    "FwdBwdHooks",
    "GradHook",
    "Hook",
    "HookCollection",
    "HookNode",
    "Hooks",
    "Kind",
    "MLPHooks",
    "NormalizationHooks",
    "ResidualStreamHooks",
    "ResidualStreamTorsoHooks",
    "TransformerHooks",
    "WrapperHooks",
    "grad_hook_wrapper",
    "hook_name",
]


class _Group(HookCollection):
    """A part of the transformer's tree, made from :data:`SITES`: every site below ``_prefix``.

    The annotations of the subclasses are for readers, editors and type checkers; a site of the table
    that has none is an attribute like the others.
    """

    _prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self._path = self._prefix
        start = f"{self._prefix}." if self._prefix else ""
        below = [path.removeprefix(start) for path in SITES if path.startswith(start)]
        for name in dict.fromkeys(path.partition(".")[0] for path in below):
            is_site = f"{start}{name}" in SITES
            kind = FwdBwdHooks if is_site else _GROUPS.get(f"{start}{name}", NormalizationHooks)
            self.add_subhooks(name, kind())

    def __repr__(self) -> str:
        if self._path and all(leaf.is_empty() for _, leaf in self.leaves()):
            sites = dict.fromkeys(path.rpartition(".")[0] for path, _ in self.leaves(self._path))
            return f"{type(self).__name__}(no hooks yet at {', '.join(sites)})"
        return super().__repr__()


class NormalizationHooks(_Group):
    """Inside a layer norm, all in float32: centred input, its root mean square, their quotient."""

    _prefix = "resid.ln_f"  # all norms have the same sites
    post_mean_subtraction: FwdBwdHooks
    scale: FwdBwdHooks
    post_scale: FwdBwdHooks

    def __init__(self) -> None:
        super().__init__()
        self._place("")  # the tree that it is added to will say which norm it is


class MLPHooks(_Group):
    """Before and after the MLP's nonlinearity; ``post_act`` hooks are also given ``out_layer``."""

    _prefix = "mlp"
    pre_act: FwdBwdHooks
    post_act: FwdBwdHooks


class AttentionHooks(_Group):
    """Inside attention. q and k carry d_head^-1/4 each; the qk tensors are ``[b, q, k, h]``."""

    _prefix = "attn"
    q: FwdBwdHooks
    k: FwdBwdHooks
    v: FwdBwdHooks
    qk_logits: FwdBwdHooks
    qk_softmax_denominator: FwdBwdHooks
    qk_probs: FwdBwdHooks
    v_out: FwdBwdHooks

    def need_explicit(self, layer: int | None) -> bool:
        """True if a hook would see the attention pattern, which fused attention never computes."""
        sites = (self.qk_logits, self.qk_softmax_denominator, self.qk_probs)
        return not all(site.is_empty() or site.is_empty_at(layer) for site in sites)


class ResidualStreamTorsoHooks(_Group):
    """Along the residual stream in each layer."""

    _prefix = "resid.torso"
    ln_attn: NormalizationHooks
    post_ln_attn: FwdBwdHooks
    delta_attn: FwdBwdHooks
    post_attn: FwdBwdHooks
    ln_mlp: NormalizationHooks
    post_ln_mlp: FwdBwdHooks
    delta_mlp: FwdBwdHooks
    post_mlp: FwdBwdHooks


class ResidualStreamHooks(_Group):
    """Along the residual stream: after the embedding, in the layers, at the final norm."""

    _prefix = "resid"
    post_emb: FwdBwdHooks
    torso: ResidualStreamTorsoHooks
    ln_f: NormalizationHooks
    post_ln_f: FwdBwdHooks


class TransformerHooks(_Group):
    """The whole tree: ``mlp``, ``attn``, ``resid`` and ``logits``."""

    mlp: MLPHooks
    attn: AttentionHooks
    resid: ResidualStreamHooks
    logits: FwdBwdHooks

    def append_at(self, location: LocationLike, hook: Hook, kind: Kind = "fwd") -> Self:
        """Append a hook at a location: ``hooks.append_at("3/mlp.post_act", ablate)``."""
        location = ActivationLocation.parse(location)
        if location.layer is not None:
            hook = AtLayers(location.layer).append(hook)
        return self.append_to_path(f"{location.path}.{kind}", hook)

    def append_to_path(self, path: str, hook: Hook) -> Self:
        """Append ``hook`` at a dotted path that ends in a list: ``"resid.torso.post_mlp.fwd"``.

        Before ``.fwd``, ``.bwd`` or ``.fwd2`` may stand any location that :meth:`append_at` takes:
        ``"3/mlp.post_act.fwd"`` is for layer 3 alone.
        """
        if not isinstance(path, str):
            raise HookError(
                f"expected a path such as 'resid.torso.post_mlp.fwd', found {type(path).__name__}."
            )
        kind = next((kind for kind in KINDS if path.endswith(f".{kind}")), None)
        place = path if kind is None else path.removesuffix(f".{kind}")
        location = _location(place)
        if kind is None and location is not None:
            lists = ", ".join(f"{location}.{kind}" for kind in KINDS)
            raise HookError(
                f"{type(self).__name__} has no list of hooks at {path!r}. It goes on: {lists}. "
                f"Or: append_at({str(location)!r}, hook)."
            )
        if kind is not None and location is not None and str(location) != location.path:
            return self.append_at(location, hook, kind)
        path = path if kind is None or location is None else f"{location.path}.{kind}"
        return super().append_to_path(path, hook)

    def __add__(self, other: "TransformerHooks") -> Self:
        """A new tree: at each place the hooks of ``self``, then those of ``other``.

        Where both splice in the same autoencoder, it is spliced in once, with the hooks of both on its
        latents: a second encoding would see what the first edit left.
        """
        if not isinstance(other, TransformerHooks):
            return NotImplemented
        new = self.copy()
        lists = dict(new.leaves())
        for path, leaf in other.copy().leaves():
            mine = lists[path]
            if not leaf.is_empty() and (mine.bound_kwargs or leaf.bound_kwargs):
                # Lists inside the list: each keeps the keywords that are bound to it.
                both = [part for part in (mine.copy(), leaf) if not part.is_empty()]
                mine.bound_kwargs = {}
                mine._attached = tuple(Attached(part, None, part) for part in both)
                continue
            for attached in leaf._attached:
                if not joined(mine, attached.hook):
                    mine._attached += (attached,)
        return new

    def check_model(self, sizes: Mapping[Dimension, int], end: int | None) -> None:
        """Refuse hooks that would do nothing in a model of these sizes, or in a text of ``end`` tokens."""
        n_layers = sizes[Dimension.LAYERS]
        self.check_layers(n_layers)
        described: list[tuple[ActivationLocation, DescribedHook]] = []
        for path, leaf in self.leaves():
            place = ActivationLocation(path.rpartition(".")[0])
            for layer, hook in chain.from_iterable(map(_described, leaf._hooks)):
                hook.check(sizes, end)
                at = place if layer is None else place.at(layer)
                described += [(single, hook) for single in at.expand(n_layers)]
        _check_effect(described)

    def check_layers(self, n_layers: int) -> None:
        """Refuse hooks for layers that a model lacks: they would do nothing, without a word."""
        for path, leaf in self.leaves():
            for layer in (n for hook in leaf._hooks for n in _layers_chosen(hook)):
                if layer >= n_layers:
                    raise HookError(
                        f"{path}: a hook is for layer {layer}, which the model lacks; it has layers "
                        f"0 to {n_layers - 1}."
                    )

    def autoencoders(self) -> Iterator[tuple[str, AutoencoderHooks]]:
        """The autoencoders that are spliced in where activations have the model's dtype, with their paths."""
        for path, leaf in self.leaves():
            if path.rpartition(".")[0] not in _IN_FLOAT32:
                for hook in leaf._hooks:
                    yield from ((path, found) for found in autoencoders_in(hook))


_IN_FLOAT32 = {
    path for path in SITES if path.endswith(("post_mean_subtraction", ".scale", ".post_scale"))
}


def _location(text: str) -> ActivationLocation | None:
    try:
        return ActivationLocation.parse(text)
    except LocationError:
        return None


# --- checks of a tree ---


def _layers_chosen(hook: Hook) -> Iterator[int]:
    """The layers that a hook, and those inside it, are for."""
    if isinstance(hook, AtLayers):
        yield from hook.at_layers
    if isinstance(hook, HookNode):
        for inner in hook._inside():
            yield from _layers_chosen(inner)


def _described(hook: Hook, layer: int | None = None) -> Iterator[tuple[int | None, DescribedHook]]:
    """The described hooks of a list, each with its layer (None: every layer); not those on latents."""
    if isinstance(hook, DescribedHook):
        yield layer, hook
    elif isinstance(hook, AtLayers):
        for at in hook.at_layers:
            for inner in hook._hooks:
                yield from _described(inner, at)
    elif isinstance(hook, Hooks) and not isinstance(hook, ConditionalHooks):  # a list in the list
        for inner in hook._hooks:
            yield from _described(inner, layer)
    elif isinstance(hook, AutoencoderHooks):
        for _, leaf in hook.leaves():
            yield from ((layer, inner) for inner in leaf._hooks if isinstance(inner, DescribedHook))


_OVERWRITES = {
    "resid.torso.delta_attn": ("attn.", "resid.torso.post_ln_attn", "resid.torso.ln_attn."),
    "resid.torso.delta_mlp": ("mlp.", "resid.torso.post_ln_mlp", "resid.torso.ln_mlp."),
}
"""What has no other effect in its layer than through this place."""


def _check_effect(described: Sequence[tuple[ActivationLocation, DescribedHook]]) -> None:
    """Refuse a hook whose effect a later one replaces as a whole: it would do nothing, without a word."""
    order = list(SITES)
    for place, hook in described:
        if not hook.sets_all:
            continue
        for earlier, other in described:
            if other is hook or earlier.layer != place.layer:
                continue
            before = order.index(earlier.path) < order.index(place.path)
            inside = earlier.path.startswith(_OVERWRITES.get(place.path, ()))
            stream = place.path in ("resid.torso.post_attn", "resid.torso.post_mlp")
            same = earlier == place and _comes_before(other, hook, described)
            if same or (before and (inside or stream)):
                raise HookError(
                    f"{other!r} at {earlier} would have no effect: {hook!r} at {place} replaces it."
                )


def _comes_before(first: object, second: object, described: Sequence[tuple[Any, object]]) -> bool:
    hooks = [hook for _, hook in described]
    return next(i for i, h in enumerate(hooks) if h is first) < next(
        i for i, h in enumerate(hooks) if h is second
    )


_GROUPS: dict[str, type[_Group]] = {
    kind._prefix: kind
    for kind in (MLPHooks, AttentionHooks, ResidualStreamHooks, ResidualStreamTorsoHooks)
}

NO_HOOKS = TransformerHooks()
"""The empty tree used for ``hooks=None`` inside a pass. Users never get it."""
