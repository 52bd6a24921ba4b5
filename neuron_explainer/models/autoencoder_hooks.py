"""Autoencoders spliced into a model: a hook with sites of its own for latents, reconstruction and error."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from neuron_explainer.models.autoencoders.splicing import LatentEdit
from neuron_explainer.models.hook_lists import (
    AtLayers,
    DescribedHook,
    FwdBwdHooks,
    HookCollection,
    HookNode,
    Hooks,
    checked,
)
from neuron_explainer.models.hook_signatures import Hook

Decode = Callable[[Tensor], Tensor]


class CodeOfInput(Protocol):
    """The latents of one input and the decoder for them."""

    @property
    def latents(self) -> Tensor: ...

    @property
    def decode(self) -> Decode: ...


class CodingAutoencoder(Protocol):
    """What :meth:`AutoencoderHooks.from_autoencoder` needs of an autoencoder."""

    @property
    def n_inputs(self) -> int: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor, stats: Any = None) -> Tensor: ...

    def code(self, x: Tensor) -> CodeOfInput: ...

    def spliced(self, x: Tensor, edits: Any, add_error: bool) -> Tensor | None: ...


class AutoencoderHooks(HookCollection):
    """A hook that passes an activation through an autoencoder, with hooks of its own inside.

    ``latents``, ``reconstruction`` and ``error`` are sites with ``fwd``, ``bwd`` and ``fwd2``.

    Without ``add_error`` the activation is replaced by its reconstruction. With it, what the
    autoencoder does not capture is added back: ``decode(hooked latents) + (x - decode(latents))``.
    Then nothing changes unless a hook edits something, and editing a latent moves the output by
    that latent's direction (:attr:`Autoencoder.directions`).

    Args:
        encode: ``[..., n] -> [..., l]``.
        decode: ``[..., l] -> [..., n]``.
        add_error: whether to add the reconstruction error back.
    """

    latents: FwdBwdHooks
    reconstruction: FwdBwdHooks
    error: FwdBwdHooks

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        add_error: bool = False,
    ) -> None:
        super().__init__()
        self.encode = encode
        self.decode = decode
        self.add_error = add_error
        self._autoencoder: CodingAutoencoder | None = None
        for name in ("latents", "reconstruction", "error"):
            self.add_subhooks(name, FwdBwdHooks())
        self._place("")

    @classmethod
    def from_autoencoder(cls, autoencoder: CodingAutoencoder, add_error: bool = False) -> Self:
        """Hooks around an autoencoder, whatever its input normalisation.

        An activation is normalised once. The statistics that undo it go to the decoder within the
        call and are never kept on the autoencoder: two forward passes may interleave.
        """
        new = cls(autoencoder.encode, autoencoder.decode, add_error)
        new._autoencoder = autoencoder
        return new

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the activations that the autoencoder takes now; None if that is not known."""
        dtype = getattr(getattr(self.encode, "__self__", None), "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def n_inputs(self) -> int | None:
        """The width of the activations that the autoencoder takes; None if that is not known."""
        return None if self._autoencoder is None else self._autoencoder.n_inputs

    def is_same_splice(self, other: "AutoencoderHooks") -> bool:
        """Whether both pass the activation through one autoencoder, and have hooks on latents at most."""
        others = [self.reconstruction, self.error, other.reconstruction, other.error]
        return (
            self._autoencoder is not None
            and self._autoencoder is other._autoencoder
            and self.add_error == other.add_error
            and all(site.is_empty() for site in others)
        )

    def is_empty(self) -> bool:
        return False  # even without hooks inside, the activation goes through the autoencoder

    def is_empty_at(self, layer: int | None) -> bool:
        return False

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Tensor:
        if self._joins_heads(x):
            return self._run(x.flatten(2), args, kwargs, where).view_as(x)
        if (columns := self._columns(x, kwargs)) is not None:
            return self._run_at(columns, x, args, kwargs, where)

        def at(site: FwdBwdHooks, value: Tensor, name: str) -> Tensor:
            return site._run(value, args, kwargs, f"{where} > {name}")

        if (fast := self._fast(x, at, kwargs)) is not None:
            return checked(fast, x, where, "AutoencoderHooks", kwargs.get("layer"))
        code = self._autoencoder.code(x) if self._autoencoder else None
        latents, decode = (code.latents, code.decode) if code else (self.encode(x), self.decode)
        # A hook that edits in place gets its own copy: the error is that of the latents as encoded,
        # and the backward pass of a ReLU reads what it returned.
        hooked = latents if self.latents.is_empty() else latents.clone()
        hooked = at(self.latents, hooked, "latents")
        result = at(self.reconstruction, decode(hooked), "reconstruction")
        if self.add_error:
            result = result + at(self.error, x - decode(latents), "error")
        elif not self.error.is_empty():
            at(self.error, x - result, "error")  # to be looked at: it goes nowhere
        return checked(result, x, where, "AutoencoderHooks", kwargs.get("layer"))

    def _joins_heads(self, x: Tensor) -> bool:
        """Whether the autoencoder takes heads ``[b, s, h, d_head]`` side by side."""
        width = None if self._autoencoder is None else self._autoencoder.n_inputs
        return x.dim() == 4 and x.shape[-1] != width and x.shape[2] * x.shape[3] == width

    def _columns(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """``[c]``: the columns of ``x`` ``[b, s, n]`` where a row is edited; None if all are needed."""
        positions, hooks = kwargs.get("positions"), self._described(kwargs)
        others = (self.reconstruction, self.error)
        exact = self.add_error and all(site.is_empty() for site in others)
        if not exact or not hooks or positions is None or x.dim() != 3:
            return None
        masks = [hook.changes_at(positions) for hook in hooks]
        known = [mask for mask in masks if mask is not None]
        if len(known) < len(masks):
            return None
        columns = torch.stack(known).flatten(0, 1).any(dim=0).nonzero()[:, 0]
        return columns if len(columns) < x.shape[1] else None

    def _run_at(
        self, columns: Tensor, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str
    ) -> Tensor:
        """The result where only some columns are encoded: elsewhere the error restores the input."""
        if not len(columns):
            return x
        part = kwargs | {"positions": kwargs["positions"][:, columns]}
        return x.index_copy(1, columns, self._run(x[:, columns], args, part, where))

    def _fast(
        self, x: Tensor, at: Callable[[FwdBwdHooks, Tensor, str], Tensor], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The result as the autoencoder computes it fastest; None if only the formula will do."""
        if self._autoencoder is None or not (
            self.reconstruction.is_empty() and self.error.is_empty()
        ):
            return None
        edits = self._edits(kwargs)
        if edits is None:
            return self._autoencoder.spliced(
                x, lambda latents: at(self.latents, latents, "latents"), self.add_error
            )
        return self._autoencoder.spliced(x, edits, self.add_error)

    def _edits(self, kwargs: dict[str, Any]) -> list[LatentEdit] | None:
        """The edits of single latents that run in this layer; None if a hook needs all latents."""
        hooks = self._described(kwargs)
        if hooks is None:
            return None
        found = []
        for hook in hooks:
            if hook.only_latents is None:
                return None
            change = partial(hook.edit, positions=kwargs.get("positions"))
            found.append(LatentEdit(hook.only_latents, change))
        return found

    def _described(self, kwargs: dict[str, Any]) -> list[DescribedHook] | None:
        """The hooks on latents that run in this layer; None if one does not say what it changes."""
        site = self.latents
        if not (site.bwd.is_empty() and site.fwd2.is_empty()) or site.fwd.bound_kwargs:
            return None
        found: list[DescribedHook] = []
        for hook in chain.from_iterable(_running(h, kwargs.get("layer")) for h in site.fwd._hooks):
            if not isinstance(hook, DescribedHook):
                return None
            found.append(hook)
        return found

    def __repr__(self) -> str:
        inside = super().__repr__().partition("(")[2].strip("()\n")
        return (
            f"AutoencoderHooks(add_error={self.add_error}{', ' if inside else ''}{inside.strip()})"
        )


def _running(hook: Hook, layer: int | None) -> Iterator[Hook]:
    """The hooks inside ``AtLayers`` that run in a layer; any other hook itself."""
    if isinstance(hook, AtLayers):
        if layer in hook.at_layers:
            yield from chain.from_iterable(_running(inner, layer) for inner in hook._hooks)
    else:
        yield hook


def autoencoders_in(hook: Hook) -> Iterator[AutoencoderHooks]:
    """The autoencoders among a hook and those inside it."""
    if isinstance(hook, AutoencoderHooks):
        yield hook
    elif isinstance(hook, HookNode):
        for inner in hook._inside():
            yield from autoencoders_in(inner)


# --- two trees as one ---


def joined(hooks: Hooks, new: Hook) -> bool:
    """Whether ``new`` splices in an autoencoder that ``hooks`` end with, and its hooks have joined it."""
    layers, inside = _spliced(new)
    if inside is None:
        return False
    for attached in reversed(hooks._attached):
        its_layers, there = _spliced(attached.hook)
        if there is not None and its_layers == layers and there.is_same_splice(inside):
            there.latents.fwd._attached += inside.latents.fwd._attached
            there.latents.bwd._attached += inside.latents.bwd._attached
            there.latents.fwd2._attached += inside.latents.fwd2._attached
            return True
        node, at = attached.node, [None] if layers is None else layers
        if node is None or not all(node.is_empty_at(layer) for layer in at):
            return False  # something comes between
    return False


def _spliced(hook: Hook) -> "tuple[list[int] | None, AutoencoderHooks | None]":
    """The layers (None: all) and the autoencoder of a hook that is nothing but a splice."""
    if isinstance(hook, AutoencoderHooks):
        return None, hook
    if (
        isinstance(hook, AtLayers)
        and len(hook) == 1
        and isinstance(hook._hooks[0], AutoencoderHooks)
    ):
        return hook.at_layers, hook._hooks[0]
    return None, None
