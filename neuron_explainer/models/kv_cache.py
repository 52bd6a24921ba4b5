"""What a model keeps between calls: the keys and values of the tokens so far.

Shape legend: ``b`` batch, ``s`` sequence (of one call), ``k`` key (all tokens so far), ``d`` width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.sampling import prep_pos_from_pad_and_prev_lens


class KeyValueCache:
    """Keys and values of one layer for the tokens so far, as projected: unscaled, before hooks.

    Without gradients, tokens are written into a buffer with spare room, so that a generation does not
    copy the past at each step. With gradients each call concatenates, because autograd needs the old
    values.

    Args:
        K_cache: keys ``[b, k, d]``; None for an empty cache.
        V_cache: values ``[b, k, d]``; None for an empty cache.
        pad_cache: pad mask ``[b, k]``; None if there has been no pad.
        capacity: number of tokens to make room for when the buffers have to grow.
    """

    def __init__(
        self,
        K_cache: Tensor | None = None,
        V_cache: Tensor | None = None,
        pad_cache: Tensor | None = None,
        capacity: int = 0,
    ) -> None:
        given = {"K": K_cache, "V": V_cache, "pad": pad_cache}
        self._buffers = {name: x for name, x in given.items() if x is not None}
        self._len = 0 if K_cache is None else K_cache.shape[1]
        self.capacity = capacity

    @property
    def K_cache(self) -> Tensor:
        """Keys ``[b, k, d]``."""
        return self._buffers["K"][:, : self._len]

    @property
    def V_cache(self) -> Tensor:
        """Values ``[b, k, d]``."""
        return self._buffers["V"][:, : self._len]

    @property
    def pad_cache(self) -> Tensor | None:
        """Pad mask ``[b, k]``, or None if there has been no pad."""
        pad = self._buffers.get("pad")
        return None if pad is None else pad[:, : self._len]

    @property
    def positions(self) -> Tensor:
        """Positions ``[b, k]`` of the tokens so far; pads take none."""
        pad = self.pad_cache
        if pad is None:
            batch, length = self.K_cache.shape[:2]
            return torch.arange(length, device=self.K_cache.device).expand(batch, -1)
        return prep_pos_from_pad_and_prev_lens(pad, 0)

    def __len__(self) -> int:
        return self._len

    def update(self, K: Tensor, V: Tensor, pad: Tensor | None = None) -> None:
        """Append the keys and values ``[b, s, d]`` and the pad mask ``[b, s]`` of new tokens, in place."""
        old, new = dict(self._buffers), {"K": K, "V": V}
        if pad is not None or "pad" in old:
            if old and "pad" not in old:
                old["pad"] = K.new_zeros(old["K"].shape[:2], dtype=torch.bool)
            new["pad"] = K.new_zeros(K.shape[:2], dtype=torch.bool) if pad is None else pad
        if old:
            new = {name: self._extended(old[name], value) for name, value in new.items()}
        self._buffers = new
        self._len += K.shape[1]

    def _extended(self, old: Tensor, value: Tensor) -> Tensor:
        """A buffer that holds ``value`` after the tokens so far; ``old`` itself if it has the room."""
        if torch.is_grad_enabled():
            return torch.cat([old[:, : self._len], value], dim=1)
        end = self._len + value.shape[1]
        # Tensors that torch made in inference mode cannot be written to outside of it.
        frozen = old.is_inference() and not torch.is_inference_mode_enabled()
        if old.shape[1] < end or frozen:
            room = max(self.capacity, end + end // 2)
            grown = old.new_empty(old.shape[0], room, *old.shape[2:])
            grown[:, : self._len] = old[:, : self._len]
            old = grown
        old[:, self._len : end] = value
        return old

    def copy(self) -> "KeyValueCache":
        """A cache with tensors of its own: continuing one leaves the other as it is."""
        new = self.fork()
        new._buffers = {name: x[:, : self._len].clone() for name, x in self._buffers.items()}
        return new

    def fork(self) -> "KeyValueCache":
        """A cache that shares the tensors. It is only for updates with gradients, which replace them."""
        new = KeyValueCache(capacity=self.capacity)
        new._buffers = {name: x[:, : self._len] for name, x in self._buffers.items()}
        new._len = self._len
        return new

    def undo(self) -> Callable[[], None]:
        """A function that takes back every update made after this call.

        It costs no copy: an update writes only behind the tokens so far, or replaces the buffers.
        """
        length, buffers = self._len, self._buffers

        def restore() -> None:
            self._len, self._buffers = length, buffers

        return restore

    def __repr__(self) -> str:
        batch = f", batch {self._buffers['K'].shape[0]}" if self._buffers else ""
        return f"KeyValueCache({self._len} tokens{batch})"


class State(ABC):
    """What a model keeps between calls. A call updates the state it is given, and returns it."""

    def __init__(self) -> None:
        self.prev_lens: Tensor | int = 0
        """Number of tokens so far, without pads, ``[b, 1]``; 0 at the start."""
        self.positions: Tensor | None = None
        """Positions ``[b, s]`` of the tokens of the latest call; hooks are given them."""

    @abstractmethod
    def copy(self) -> Self:
        """An independent copy, to branch a generation."""

    @abstractmethod
    def _undo(self) -> Callable[[], None]:
        """A function that takes back what calls have done to the caches since."""

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """If the block raises (a hook's error, Ctrl-C), the state is as it was before the block."""
        lens, positions, undo = self.prev_lens, self.positions, self._undo()
        try:
            yield
        except BaseException:
            self.prev_lens, self.positions = lens, positions
            undo()
            raise


class HiddenState(State):
    """The state of a :class:`~neuron_explainer.models.transformer.Transformer`: a cache for each layer.

    Args:
        n_layers: number of layers of the model.
        capacity: number of tokens to make room for, if it is known.
    """

    def __init__(self, n_layers: int, capacity: int = 0) -> None:
        super().__init__()
        self.kv_caches = [KeyValueCache(capacity=capacity) for _ in range(n_layers)]

    def set_prev_lens(self, prev_lens: Tensor | int) -> None:
        """Set the number of tokens that each row has had."""
        self.prev_lens = prev_lens

    def __getitem__(self, layer: int) -> KeyValueCache:
        return self.kv_caches[layer]

    def __setitem__(self, layer: int, kv_cache: KeyValueCache) -> None:
        self.kv_caches[layer] = kv_cache

    def __len__(self) -> int:
        return len(self.kv_caches)

    def copy(self) -> Self:
        new = type(self)(0)
        new.prev_lens, new.positions = self.prev_lens, self.positions
        new.kv_caches = [cache.copy() for cache in self.kv_caches]
        return new

    def _undo(self) -> Callable[[], None]:
        caches = list(self.kv_caches)
        inside = [cache.undo() for cache in caches]

        def restore() -> None:
            self.kv_caches = caches
            for undo in inside:
                undo()

        return restore

    def __repr__(self) -> str:
        filled = len(self) and len(self[0])
        return f"HiddenState({len(self)} layers, {self[0] if filled else 'empty'})"


def check_state(H: object, n_layers: int, width: int) -> None:
    """Raise an InputError if ``H`` is not the state of a model of these sizes.

    Args:
        width: width of the keys over all heads.
    """
    if not isinstance(H, HiddenState):
        raise InputError(f"{_expected(n_layers, width)} {H!r}.")
    widths = {cache.K_cache.shape[-1] for cache in H.kv_caches if len(cache)}
    if len(H) != n_layers or widths - {width}:
        keys = f" with keys of width {', '.join(map(str, sorted(widths)))}" if widths else ""
        raise InputError(f"{_expected(n_layers, width)} {H!r}{keys}.")


def _expected(n_layers: int, width: int) -> str:
    return (
        f"H must be a HiddenState of {n_layers} layers and keys of width {width}, as an earlier call of "
        "this model returned, found"
    )
