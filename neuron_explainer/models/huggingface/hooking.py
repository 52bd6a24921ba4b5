"""One forward pass of a model of Hugging Face with our hooks in it.

Hooks on modules pass the model's tensors to our tree of hooks, and the results back. They are attached
for one call and removed when it ends, also by an exception. They act only in the call that attached
them: in another thread, or in a call made inside a user's hook, they do nothing.

Shape legend: ``b`` batch, ``s`` sequence (of this call), ``q`` query (= s), ``k`` key (the tokens of
earlier calls and of this one), ``h`` head, ``d`` model width.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from neuron_explainer.errors import LocationError, did_you_mean
from neuron_explainer.models.hooks import FwdBwdHooks, TransformerHooks
from neuron_explainer.models.huggingface.families import Architecture, Tap
from neuron_explainer.models.weight_names import LayerIndex

_current: ContextVar["HookedCall | None"] = ContextVar(
    "current call of a hooked model", default=None
)
# torch numbers module hooks with an unguarded counter: two threads could get one number, and the
# hook of one would silently take the place of the other's.
_registering = threading.Lock()


def find_module(root: Any, path: str) -> nn.Module:
    """The module at a dotted path; a LocationError that names similar paths if there is none."""
    try:
        module: nn.Module = root.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in root.named_modules() if name]
        raise LocationError(
            f"{type(root).__name__} has no module {path!r}.{did_you_mean(path, known)}"
        ) from None
    return module


class Wiring:
    """The modules of one model that the places of an architecture name.

    All are looked up when the model is wrapped, so a wrong path is reported then.
    """

    def __init__(self, model: Any, architecture: Architecture, n_heads: int | None) -> None:
        self.model, self.architecture = model, architecture
        with_heads = {"attn.v_out", "attn.qk_probs"} & set(architecture.paths)
        if n_heads is None and with_heads:
            raise LocationError(
                f"the architecture names {' and '.join(sorted(with_heads))}, but the config of "
                f"{self.name} has no num_attention_heads. Leave them out."
            )
        self.n_heads = n_heads or 0
        layers = find_module(model, architecture.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise LocationError(
                f"{architecture.layers!r} of {self.name} should be the list of its layers, "
                f"found {type(layers).__name__}."
            )
        self.layers = list(layers)
        paths = {path: tap.module for path, tap in architecture.sites.items()}
        if architecture.attention is not None:
            paths["attn.qk_probs"] = architecture.attention
        self.modules = [
            {path: find_module(layer, below) for path, below in paths.items()}
            for layer in self.layers
        ]
        """For each layer: hook path -> module."""
        norm = architecture.final_norm
        self.final_norm = None if norm is None else find_module(model, norm)

    @property
    def name(self) -> str:
        """The name of the model's class, for errors."""
        return type(self.model).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def taps(self, path: str) -> Iterator[tuple[LayerIndex, Tap, nn.Module]]:
        """Where a hook path is in the model: layer, side and module of each place."""
        tap = self.architecture.sites.get(path)
        if tap is not None:
            for layer, modules in enumerate(self.modules):
                yield layer, tap, modules[path]
        elif path == "resid.post_emb":
            yield None, Tap("in", ""), self.layers[0]
        elif path == "resid.torso.post_mlp":
            for layer, module in enumerate(self.layers):
                yield layer, Tap("out", ""), module
        elif path == "resid.post_ln_f" and self.final_norm is not None:
            yield None, Tap("out", ""), self.final_norm


class _StopForward(Exception):
    """Ends a forward pass when nothing more is needed."""


@contextmanager
def _outside() -> Iterator[None]:
    """Around a user's hook: what it calls, even modules of the model, is not hooked."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


class _Registration(NamedTuple):
    module: nn.Module
    side: str
    run: Callable[[Tensor], Tensor]


class HookedCall:
    """One forward pass with its hooks."""

    def __init__(
        self,
        wiring: Wiring,
        hooks: TransformerHooks,
        positions: Tensor,
        stop_at: tuple[nn.Module, str] | None = None,
    ) -> None:
        self.wiring, self.hooks, self.positions, self.stop_at = wiring, hooks, positions, stop_at
        self.patterns = _Patterns(self)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Module hooks are attached inside this block, and none is left afterwards."""
        handles: list[RemovableHandle] = []
        token = _current.set(self)
        try:
            with _registering:
                for registration in self._registrations():
                    handles.append(self._register(registration))
                handles += self.patterns.register()
                if self.stop_at is not None:
                    handles.append(self._register(_Registration(*self.stop_at, _stop)))
            with self.patterns.watching():
                yield
        except _StopForward:
            pass
        finally:
            _current.reset(token)
            with _registering:
                for handle in handles:
                    handle.remove()

    def _registrations(self) -> Iterator[_Registration]:
        """What to attach: one entry for each place that has hooks."""
        for path in self.wiring.architecture.paths:
            site = site_of(self.hooks, path)
            if site.is_empty():
                continue
            for layer, tap, module in self.wiring.taps(path):
                if not site.is_empty_at(layer):
                    yield _Registration(module, tap.side, self._runner(path, layer, tap, module))

    def _runner(
        self, path: str, layer: LayerIndex, tap: Tap, module: nn.Module
    ) -> Callable[[Tensor], Tensor]:
        """A site as a function of the model's tensor."""
        keywords: dict[str, Any] = {"layer": layer, "positions": self.positions}
        if path == "mlp.post_act":
            keywords["out_layer"] = module
        site = functools.partial(site_of(self.hooks, path), **keywords)
        run = functools.partial(self._apply, site, path == "attn.v_out")
        if tap.is_stream:
            return _into_stream(run)
        return _apart(run) if self.wiring.architecture.works_in_place else run

    def _apply(self, site: Callable[[Tensor], Tensor], by_head: bool, x: Tensor) -> Tensor:
        """Run a site on a tensor that some models hold as ``[b * s, d]``, or with heads merged."""
        shape = x.shape
        seen = x if x.dim() == 3 else x.reshape(*self.positions.shape, -1)
        if by_head:
            seen = seen.reshape(*seen.shape[:-1], self.wiring.n_heads, -1)
        with _outside():
            result = site(seen)
        if result is seen:
            return x if seen is x else seen.reshape(shape)
        return result.reshape(shape)

    def _register(self, what: _Registration) -> RemovableHandle:
        # These hooks accept any arguments: while this thread removes them, another thread may call them
        # with or without the keywords, before they notice that the call is not theirs.
        def before(module: nn.Module, *arguments: Any) -> Any:
            if _current.get() is not self:
                return None
            return _replace_input(arguments[0], arguments[1], what.run)

        def after(module: nn.Module, *arguments: Any) -> Any:
            return _replace_output(arguments[-1], what.run) if _current.get() is self else None

        if what.side == "in":
            return what.module.register_forward_pre_hook(before, with_kwargs=True)
        return what.module.register_forward_hook(after)


def site_of(hooks: TransformerHooks, path: str) -> FwdBwdHooks:
    """The site at a hook path."""
    site: Any = functools.reduce(getattr, path.split("."), hooks)
    assert isinstance(site, FwdBwdHooks)
    return site


def _stop(x: Tensor) -> Tensor:
    raise _StopForward


def _into_stream(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Write the result into the stream's tensor, which the layer also uses after this module.

    Adding the difference later would round differently, and badly if a hook removes something large.
    Hooks get a copy, so that a tensor that they keep does not change.
    """

    def write(x: Tensor) -> Tensor:
        return x.copy_(run(x.clone()))

    return write


def _apart(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model continues with a copy, which it may change; what hooks saw and returned stays."""
    return lambda x: run(x).clone()


def _replace_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], run: Callable[[Tensor], Tensor]
) -> Any:
    """A module's arguments with the first tensor replaced; None if that stays the same object."""
    if args:
        result = run(args[0])
        return None if result is args[0] else ((result, *args[1:]), dict(kwargs))
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    result = run(kwargs[name])
    return None if result is kwargs[name] else (args, {**kwargs, name: result})


def _replace_output(output: Any, run: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with the (first) tensor replaced; None if that stays the same object."""
    x = output if isinstance(output, Tensor) else output[0]
    result = run(x)
    if result is x:
        return None
    return result if isinstance(output, Tensor) else type(output)((result, *output[1:]))


# --- attention patterns ---


class _Patterns(TorchFunctionMode):
    """Passes attention patterns to the hooks on ``attn.qk_probs``, in the layers that have such hooks.

    No module returns the pattern: it is computed inside a function. So this mode intercepts torch's
    softmax inside the attention modules of those layers, and replaces fused attention, which never forms
    the pattern, by an explicit computation. The mode belongs to one thread and ends with the call.
    """

    def __init__(self, call: HookedCall) -> None:
        super().__init__()
        self._call = call
        self._site = call.hooks.attn.qk_probs
        self._layer: int | None = None  # the layer whose attention module is running
        self._seen = 0

    @property
    def _layers(self) -> list[int]:
        if self._site.is_empty() or self._call.wiring.architecture.attention is None:
            return []
        numbers = range(len(self._call.wiring.layers))
        return [layer for layer in numbers if not self._site.is_empty_at(layer)]

    def watching(self) -> AbstractContextManager[Any]:
        """This mode, if it has something to do."""
        return self if self._layers else nullcontext()

    def register(self) -> list[RemovableHandle]:
        """Attach hooks that note when an attention module runs."""
        handles = []
        for layer in self._layers:
            module = self._call.wiring.modules[layer]["attn.qk_probs"]

            def enter(module: nn.Module, *arguments: Any, layer: int = layer) -> None:
                if _current.get() is self._call:
                    self._layer, self._seen = layer, 0

            def leave(module: nn.Module, *arguments: Any) -> None:
                if _current.get() is self._call:
                    self._layer = None
                    self._check_seen()

            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
        return handles

    def _check_seen(self) -> None:
        if self._seen != 1:
            raise LocationError(
                f"attn.qk_probs: expected one softmax in each attention of {self._call.wiring.name}, "
                f"found {self._seen}. Load the model with attn_implementation='eager'."
            )

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._layer is None or _current.get() is not self._call:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            return self._hooked(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _hooked(self, probs: Tensor) -> Tensor:
        """Run the hooks on a pattern ``[b, h, q, k]``; they see ``[b, q, k, h]`` in the model's dtype."""
        self._seen += 1
        n_heads = self._call.wiring.n_heads
        batch, n_new = self._call.positions.shape
        if probs.dim() != 4 or probs.shape[:3] != (batch, n_heads, n_new):
            raise LocationError(
                f"attn.qk_probs: expected a pattern [{batch}, {n_heads}, {n_new}, k], found a softmax "
                f"of {list(probs.shape)} in {self._call.wiring.name}."
            )
        seen = probs.permute(0, 2, 3, 1).to(self._call.wiring.dtype)
        # clone: softmax's backward reads its output, which a hook may edit in place.
        seen = seen.clone() if seen.data_ptr() == probs.data_ptr() else seen
        with _outside():
            result = self._site(seen, layer=self._layer, positions=self._call.positions)
        return result.permute(0, 3, 1, 2).to(probs.dtype)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``F.scaled_dot_product_attention`` with the pattern formed. ``[b, h, q, d_head]`` each."""
        shape, n_heads = query.shape, self._call.wiring.n_heads
        if shape[1] != n_heads:
            # With one query for each head, transformers passes the heads that share keys as queries.
            query = query.reshape(shape[0], n_heads, -1, shape[3])
            if attn_mask is not None and attn_mask.shape[1] != 1:
                attn_mask = attn_mask.reshape(shape[0], n_heads, -1, attn_mask.shape[3])
        key, value = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3)) * (
            1 / math.sqrt(shape[3]) if scale is None else scale
        )
        if is_causal:
            ones = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
            attn_mask = ones.tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # Not -inf: the query of a pad may have no key, and a softmax over none is NaN.
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        probs = self._hooked(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype))
        return (probs @ value).reshape(shape)
