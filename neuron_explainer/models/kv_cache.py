"""What a transformer keeps between calls: the keys and values of the tokens so far.

Shape legend: ``b`` batch, ``s`` sequence (of one call), ``k`` key (all tokens so far), ``d`` width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.kernels.products import WeightCopies


class KeyValueCache:
    """Keys and values of one layer for the tokens seen so far, as projected: unscaled and un-hooked.

    Without gradients, tokens are written into a buffer with room to spare, so that a generation costs
    no copy of the past a step. With gradients, each call concatenates: autograd needs the old values.
    """

    def __init__(
        self, K_cache: Tensor, V_cache: Tensor, pad_cache: Tensor | None = None, capacity: int = 0
    ) -> None:
        self._buffers = {"K": K_cache, "V": V_cache}
        if pad_cache is not None:
            self._buffers["pad"] = pad_cache
        self._len = K_cache.shape[1]
        self.capacity = capacity
        """Tokens to make room for when the buffers have to grow."""

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
        """Pad mask ``[b, k]``, or None where there has been no pad."""
        pad = self._buffers.get("pad")
        return None if pad is None else pad[:, : self._len]

    def __len__(self) -> int:
        return self._len

    def update(self, K: Tensor, V: Tensor, pad: Tensor | None = None) -> None:
        """Append the keys and values ``[b, s, d]`` and pad mask ``[b, s]`` of new tokens, in place."""
        new = {"K": K, "V": V}
        if pad is not None or "pad" in self._buffers:
            if "pad" not in self._buffers:
                self._buffers["pad"] = K.new_zeros(self._buffers["K"].shape[:2], dtype=torch.bool)
            new["pad"] = K.new_zeros(K.shape[:2], dtype=torch.bool) if pad is None else pad
        end = self._len + K.shape[1]
        for name, value in new.items():
            old = self._buffers[name]
            if torch.is_grad_enabled():
                self._buffers[name] = torch.cat([old[:, : self._len], value], dim=1)
                continue
            # Under inference_mode torch makes tensors that cannot be written to outside of it.
            stuck = old.is_inference() and not torch.is_inference_mode_enabled()
            if old.shape[1] < end or stuck:
                room = max(self.capacity, end + end // 2)
                grown = old.new_empty(old.shape[0], room, *old.shape[2:])
                grown[:, : self._len] = old[:, : self._len]
                self._buffers[name] = old = grown
            old[:, self._len : end] = value
        self._len = end

    def copy(self) -> "KeyValueCache":
        """A cache with tensors of its own: going on with one leaves the other as it is."""
        new = KeyValueCache(self.K_cache.clone(), self.V_cache.clone(), capacity=self.capacity)
        if self.pad_cache is not None:
            new._buffers["pad"] = self.pad_cache.clone()
        return new

    def _fork(self) -> "KeyValueCache":
        """A cache that shares the old tensors; only for updates with gradients, which replace them."""
        return KeyValueCache(self.K_cache, self.V_cache, self.pad_cache, self.capacity)

    def __repr__(self) -> str:
        return f"KeyValueCache({self._len} tokens, batch {self._buffers['K'].shape[0]})"


class HiddenState:
    """What a model keeps between calls: each layer's keys and values, each row's number of tokens.

    ``forward`` updates the one it is given and returns it; :meth:`copy` branches a generation.
    """

    def __init__(self, n_layers: int, capacity: int = 0) -> None:
        self.prev_lens: Tensor | int = 0
        """Tokens so far that are no pads, ``[b, 1]``; 0 at the start."""
        self.positions: Tensor | None = None
        """Positions ``[b, s]`` of the tokens of the latest call; hooks are given them."""
        self.kv_caches: list[KeyValueCache | None] = [None] * n_layers
        self.capacity = capacity
        self.weight_copies: WeightCopies | None = None
        """Copies of the model's weights to multiply with, within a generation."""

    def set_prev_lens(self, prev_lens: Tensor | int) -> None:
        """Set the number of tokens that each row has had."""
        self.prev_lens = prev_lens

    def __getitem__(self, layer: int) -> KeyValueCache | None:
        return self.kv_caches[layer]

    def __setitem__(self, layer: int, kv_cache: KeyValueCache | None) -> None:
        self.kv_caches[layer] = kv_cache

    def __len__(self) -> int:
        return len(self.kv_caches)

    def copy(self) -> "HiddenState":
        """An independent copy."""
        new = HiddenState(len(self), self.capacity)
        new.prev_lens, new.positions = self.prev_lens, self.positions
        new.weight_copies = self.weight_copies
        new.kv_caches = [None if cache is None else cache.copy() for cache in self.kv_caches]
        return new

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Take back what a call that raises has done, so that one can go on from before it.

        Cheap: a cache only ever writes behind its length, or replaces its tensors.
        """
        lens, positions, caches = self.prev_lens, self.positions, list(self.kv_caches)
        inside = [None if c is None else (c._len, dict(c._buffers)) for c in caches]
        try:
            yield
        except BaseException:
            self.prev_lens, self.positions, self.kv_caches = lens, positions, caches
            for cache, before in zip(caches, inside, strict=True):
                if cache is not None and before is not None:
                    cache._len, cache._buffers = before
            raise

    def __repr__(self) -> str:
        first = self.kv_caches[0]
        return f"HiddenState({len(self)} layers, {first if first is not None else 'empty'})"


def check_state(H: object, n_layers: int) -> None:
    """Refuse what is not the state of a model with so many layers."""
    if not isinstance(H, HiddenState) or len(H) != n_layers:
        raise InputError(
            f"H must be a HiddenState of {n_layers} layers, as an earlier call returned, found {H!r}."
        )
