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

import difflib
import inspect
import operator
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from neuron_explainer.errors import HookError, LocationError, did_you_mean
from neuron_explainer.models.autoencoders.splicing import LatentEdit
from neuron_explainer.models.locations import SITES, ActivationLocation, LocationLike, Site
from neuron_explainer.models.weight_names import Dimension

Hook = Callable[..., Any]
"""``hook(x, **keywords) -> x``; it gets the keywords of the site that its signature accepts."""


Kind = Literal["fwd", "bwd", "fwd2"]
"""The lists of a site, in the order in which they are called."""
_KINDS: tuple[Kind, ...] = ("fwd", "bwd", "fwd2")


class HookNode:
    """Base of lists and trees of hooks: called like a hook, and can say whether it would do anything."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._run(x, args, kwargs, type(self).__name__)

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Tensor:
        """Apply the hooks; ``where`` names the place for error messages."""
        raise NotImplementedError

    def _inside(self) -> Sequence[Hook]:
        """Everything that running this may call: hooks, lists and trees of hooks, conditions."""
        raise NotImplementedError

    def is_empty(self) -> bool:
        """True if there is nothing to run."""
        return self.is_empty_at(None)

    def is_empty_at(self, layer: int | None) -> bool:
        """True if nothing would run in this layer; with None, in any layer."""
        raise NotImplementedError

    def bind(self, **kwargs: Any) -> Self:
        """Pass these keyword arguments to every hook below, besides those of the call."""
        raise NotImplementedError

    def unbind(self, keys: Sequence[str]) -> Self:
        """Undo :meth:`bind` for these keywords."""
        raise NotImplementedError

    def copy(self) -> Self:
        """A copy that calls the same user objects. Appending to the copy does not change the original."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()


class Attached(NamedTuple):
    """A user's hook with the keywords that its signature accepts, which are looked up once."""

    hook: Hook
    keywords: frozenset[str] | None
    """None: any keyword."""
    node: "HookNode | None" = None
    """The hook itself if it is a list or tree of this module, else None. A user's subclass with its own
    ``__call__`` is treated as a plain function."""

    def __call__(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.keywords is not None:
            kwargs = {key: value for key, value in kwargs.items() if key in self.keywords}
        return self.hook(x, *args, **kwargs)


class DescribedHook(ABC):
    """A hook that says what it does, and what a model and a text must have for it."""

    @abstractmethod
    def __call__(
        self, x: Tensor, layer: int | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The changed activation."""

    @abstractmethod
    def __repr__(self) -> str:
        """What it does, in words."""

    @abstractmethod
    def check(self, sizes: Mapping[Dimension, int], end: int | None) -> None:
        """Raise a HookError if a model of these sizes, or a text of ``end`` tokens, lacks what it changes.

        ``end`` is None if it is not known how long the text will be.
        """

    @property
    def sets_all(self) -> bool:
        """Whether nothing of what was at the place is left."""
        return False

    @property
    def only_latents(self) -> Tensor | None:
        """``[u]``: the latents that it reads and changes, for :meth:`edit`; None if it needs all."""
        return None

    def edit(self, chosen: Tensor, positions: Tensor | None = None) -> Tensor:
        """New values ``[…, u]`` of ``only_latents``."""
        raise NotImplementedError


def hook_name(hook: Hook) -> str:
    """The name of a hook in ``repr`` and in errors."""
    if isinstance(hook, HookNode | nn.Module | DescribedHook):
        return repr(hook)
    if isinstance(hook, partial):
        return f"partial({hook_name(hook.func)})"
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


class Signature(NamedTuple):
    """What a function can be given, next to its first argument."""

    text: str
    """As written, for errors."""
    takes_x: bool
    """Whether it takes a positional argument at all."""
    by_position: tuple[str, ...]
    """Further arguments that it needs and that only a position can fill."""
    required: tuple[str, ...]
    """Keywords that it needs."""
    optional: tuple[str, ...]
    """Keywords that have a default, but for those that ``functools.partial`` has filled."""
    keywords: frozenset[str] | None
    """All keywords that it takes; None: any."""

    @classmethod
    def of(cls, hook: Hook) -> "Signature":
        """That of a function, a bound method, a module, any object with ``__call__``."""
        try:
            # Calling a module calls its forward, whose signature nn.Module.__call__ hides.
            found = inspect.signature(hook.forward if isinstance(hook, nn.Module) else hook)
        except (TypeError, ValueError):  # functions written in C, such as torch.relu
            return cls("(…)", True, (), (), (), frozenset())
        parameters = list(found.parameters.values())
        takes_x = any(
            p.kind in (*_BY_POSITION, inspect.Parameter.VAR_POSITIONAL) for p in parameters
        )
        if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            parameters = parameters[1:]  # the first is x
        named = [p for p in parameters if p.kind in _BY_NAME]
        filled = hook.keywords if isinstance(hook, partial) else {}
        return cls(
            str(found),
            takes_x,
            tuple(
                p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty
            ),
            tuple(p.name for p in named if p.default is p.empty),
            tuple(p.name for p in named if p.default is not p.empty and p.name not in filled),
            None
            if any(p.kind is p.VAR_KEYWORD for p in parameters)
            else frozenset(p.name for p in named),
        )


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def missing(signature: Signature, available: Collection[str] | None) -> list[str]:
    """What a function needs and would not be given; ``available`` None: any keyword may come."""
    if available is None:
        return list(signature.by_position)
    absent = [name for name in signature.required if name not in available]
    return [*signature.by_position, *absent]


def misspelt(signature: Signature, available: Collection[str]) -> dict[str, str]:
    """Optional keywords that no call fills, each with the keyword that is spelt nearly so."""
    close = {
        name: difflib.get_close_matches(name, available, n=1, cutoff=0.75)
        for name in signature.optional
        if name not in available
    }
    # A function that takes both names has a parameter of its own beside ours.
    taken = {*signature.required, *signature.optional}
    return {name: near[0] for name, near in close.items() if near and near[0] not in taken}


def _attach(hook: Hook, available: Collection[str] | None, where: str) -> Attached:
    """Look up what ``hook`` takes; refuse one that no call at this place could satisfy."""
    if not callable(hook):
        raise HookError(f"{where}: a hook is a function (x, **kwargs) -> x, found {hook!r}.")
    # A subclass with its own __call__ is run by that, like any other function.
    if isinstance(hook, HookNode) and type(hook).__call__.__module__ == __name__:
        if available is not None:
            bound = hook.bound_kwargs if isinstance(hook, Hooks) else ()
            for inner in hook._inside():
                _attach(inner, (*available, *bound), where)
        return Attached(hook, None, hook)
    signature = Signature.of(hook)
    name = f"{where}: hook {hook_name(hook)}{signature.text}"
    if not signature.takes_x:
        raise HookError(
            f"{name} takes no positional argument; a hook is called as hook(x, **kwargs)."
        )
    if absent := missing(signature, available):
        raise HookError(
            f"{name} needs {', '.join(absent)}, which it would not be given. Keywords at this "
            f"place: {', '.join(available or ['none by position'])}."
        )
    for wrong, right in misspelt(signature, available or ()).items():
        raise HookError(
            f"{name} would never be given {wrong!r}. Did you mean {right!r}? If {wrong!r} is a "
            f"parameter of your own, give it another name or set it with functools.partial."
        )
    return Attached(hook, signature.keywords)


def _checked(result: Any, x: Tensor, where: str, name: str, layer: Any) -> Tensor:
    """The hook's result; an error if its type, shape or dtype is not that of ``x``."""
    if isinstance(result, Tensor) and result.shape == x.shape and result.dtype == x.dtype:
        return result
    found = (
        f"{list(result.shape)} of {result.dtype}" if isinstance(result, Tensor) else repr(result)
    )
    hint = " A hook must return x, changed or not." if result is None else ""
    raise HookError(
        f"{where}, layer {layer}: hook {name} returned {found}, expected a tensor "
        f"{list(x.shape)} of {x.dtype}.{hint}"
    )


class Hooks(HookNode):
    """A list of hooks that run one after the other."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        # A tuple: a hook may append to the list that is running; the next run then has the new hook.
        self._attached: tuple[Attached, ...] = ()
        self.bound_kwargs: dict[str, Any] = {}
        self._path = type(self).__name__
        self._site: Site | None = None
        for hook in hooks:
            self.append(hook)

    @property
    def _hooks(self) -> list[Hook]:
        return [attached.hook for attached in self._attached]

    def _inside(self) -> Sequence[Hook]:
        return self._hooks

    @property
    def name(self) -> str:
        """The path of the list in its tree; the name of the class outside a tree."""
        return self._path

    def append(self, hook: Hook) -> Self:
        """Add a hook to the end of the list. A hook that could not work here is refused."""
        attached = self._validated(hook)
        self._attached += (attached,)
        return self

    def _validated(self, hook: Hook) -> Attached:
        available = None if self._site is None else (*self._site.keywords, *self.bound_kwargs)
        attached = _attach(hook, available, self._path)
        if self._site is not None and not self._site.per_layer and _needs_layer(hook):
            raise HookError(
                f"{self._path}: {hook_name(hook)} chooses layers, but this site exists once in a "
                "model, not in each layer. Append the hooks themselves."
            )
        return attached

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Tensor:
        if self.bound_kwargs:
            kwargs = {**kwargs, **self.bound_kwargs}
        for attached in self._attached:
            if attached.node is not None:
                x = attached.node._run(x, args, kwargs, where)
                continue
            try:
                result = attached(x, args, kwargs)
            except Exception as error:  # whatever a user's function raises: told where, and raised
                name = hook_name(attached.hook)
                error.add_note(f"in hook {name} at {where}, layer {kwargs.get('layer')}")
                raise
            if result is not x:
                name = hook_name(attached.hook)
                x = _checked(result, x, where, name, kwargs.get("layer"))
        return x

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._run(x, args, kwargs, self._path)

    def is_empty(self) -> bool:
        return not self._attached

    def is_empty_at(self, layer: int | None) -> bool:
        if layer is None:
            return self.is_empty()
        return all(a.node is not None and a.node.is_empty_at(layer) for a in self._attached)

    def bind(self, **kwargs: Any) -> Self:
        if again := sorted(set(kwargs) & set(self.bound_kwargs)):
            raise HookError(f"{self._path}: {again[0]!r} is already bound; unbind it first.")
        self.bound_kwargs.update(kwargs)
        return self

    def unbind(self, keys: Sequence[str]) -> Self:
        for key in keys:
            self.bound_kwargs.pop(key, None)
        return self

    def copy(self) -> Self:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.bound_kwargs = dict(self.bound_kwargs)
        new._attached = tuple(
            a if a.node is None else Attached(copy := a.node.copy(), a.keywords, copy)
            for a in self._attached
        )
        return new

    def __len__(self) -> int:
        return len(self._attached)

    def __repr__(self) -> str:
        return f"{type(self).__name__}[{', '.join(map(hook_name, self._hooks))}]"


class ConditionalHooks(Hooks):
    """Hooks that run only if ``condition(x, **keywords)`` is true."""

    def __init__(self, condition: Callable[..., bool]) -> None:
        super().__init__()
        self.condition = condition
        self._takes = _attach(condition, None, type(self).__name__)

    def _inside(self) -> Sequence[Hook]:
        return [self.condition, *self._hooks]

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Tensor:
        if self._attached and self._takes(x, args, {**kwargs, **self.bound_kwargs}):
            return super()._run(x, args, kwargs, where)
        return x


class _InLayers:
    """The condition of :class:`AtLayers`, which holds the layers and not the hooks: an object that
    refers to itself keeps what its hooks keep (whole captures) until the garbage collector runs."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers

    def __call__(self, x: Tensor, layer: int | None = None) -> bool:
        if layer is None:
            layers = ", ".join(map(str, self.layers))
            raise HookError(f"AtLayers({layers}) chooses layers and was called without one.")
        return layer in self.layers


class AtLayers(ConditionalHooks):
    """Hooks that run only in some layers: ``AtLayers(3).append(store)``, ``AtLayers([0, 1])``."""

    def __init__(self, at_layers: int | Sequence[int]) -> None:
        try:  # one whole number or several, of any type (numpy's too)
            given = at_layers if isinstance(at_layers, Iterable) else [at_layers]
            layers = [operator.index(layer) for layer in given]
        except TypeError:
            layers = [-1]
        if any(layer < 0 for layer in layers):
            raise HookError(
                f"AtLayers takes a layer or a list of layers >= 0, found {at_layers!r}."
            )
        self.at_layers = layers
        super().__init__(_InLayers(layers))

    def is_empty_at(self, layer: int | None) -> bool:
        return (layer is not None and layer not in self.at_layers) or super().is_empty_at(layer)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.at_layers))
        return f"AtLayers({layers})[{', '.join(map(hook_name, self._hooks))}]"


def _needs_layer(hook: Hook) -> bool:
    """True if a hook, or one inside it, chooses layers."""
    if isinstance(hook, AtLayers):
        return True
    return isinstance(hook, HookNode) and any(map(_needs_layer, hook._inside()))


class _Gradient(torch.autograd.Function):
    """The identity, whose backward pass lets a hook replace the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.run = run
        # Not x itself: autograd forbids in-place edits (by fwd2 hooks) of an input that is returned.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        # A copy, since a hook may edit in place: autograd may give one tensor to several branches (both
        # sides of a sum), or one number expanded to a shape.
        return ctx.run(grad[0].clone()), None


class GradHook(HookNode):
    """A forward hook that returns the activation unchanged and applies a hook to its gradient."""

    def __init__(self, grad_hook: Hook) -> None:
        self.grad_hook = grad_hook
        self._hooks = Hooks([grad_hook])

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        # autograd tracks a Function's arguments, so the keywords are passed in the closure.
        return _Gradient.apply(x, lambda grad: self._hooks._run(grad, args, kwargs, where))  # type: ignore[no-any-return, no-untyped-call]

    def _inside(self) -> Sequence[Hook]:
        return [self._hooks]

    def is_empty_at(self, layer: int | None) -> bool:
        return self._hooks.is_empty_at(layer)

    def copy(self) -> Self:
        new = type(self)(self.grad_hook)
        new._hooks = self._hooks.copy()
        return new

    def __repr__(self) -> str:
        return hook_name(self.grad_hook)


def grad_hook_wrapper(grad_hook: Hook) -> Hook:
    """A forward hook that changes no value and whose backward pass returns ``grad_hook(grad, …)``."""
    return GradHook(grad_hook)


class WrapperHooks(Hooks):
    """A list that wraps each hook with ``wrapper`` when it is appended (for gradients:
    ``grad_hook_wrapper``)."""

    def __init__(self, wrapper: Callable[[Hook], Hook]) -> None:
        super().__init__()
        self.wrapper = wrapper

    def append(self, hook: Hook) -> Self:
        self._validated(hook)
        self._attached += (_attach(self.wrapper(hook), None, self._path),)
        return self


class HookCollection(HookNode):
    """A tree: named children, each a list of hooks or a tree of its own."""

    def __init__(self) -> None:
        self.all_hooks: OrderedDict[str, HookNode] = OrderedDict()
        self._path = ""

    def add_subhooks(self, name: str, subhooks: HookNode) -> Self:
        """Add or replace a child, which becomes the attribute ``name``."""
        if not isinstance(subhooks, HookNode):
            raise HookError(
                f"{type(self).__name__}.{name} is a place for hooks, not a hook: append to it with "
                f"`….{name}.append_fwd(hook)`; found {subhooks!r}."
            )
        self.all_hooks[name] = subhooks
        # A real attribute, not __getattr__: a forward pass looks up about twenty in each layer.
        object.__setattr__(self, name, subhooks)
        self._place_child(name, subhooks)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("all_hooks", ()):
            self.add_subhooks(name, value)
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "all_hooks":
            raise AttributeError(name)
        if name in ("append", "append_fwd", "append_bwd", "append_fwd2"):
            hint = " Append to one of its sites."
        else:
            hint = did_you_mean(name, self.all_hooks)
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}.{hint} It has: {', '.join(self.all_hooks)}."
        )

    def _inside(self) -> Sequence[HookNode]:
        return list(self.all_hooks.values())

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Hooks]]:
        """The dotted path and list of hooks of every list below."""
        for name, child in self.all_hooks.items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, HookCollection):
                yield from child.leaves(path)
            elif isinstance(child, Hooks):
                yield path, child

    def _place(self, path: str) -> None:
        """Tell every list below its path, for its errors and its checks of new hooks."""
        self._path = path
        for name, child in self.all_hooks.items():
            self._place_child(name, child)

    def _place_child(self, name: str, child: HookNode) -> None:
        below = f"{self._path}.{name}" if self._path else name
        if isinstance(child, HookCollection):
            child._place(below)
        elif isinstance(child, Hooks):
            child._path, child._site = below, SITES.get(self._path)

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Tensor:
        raise HookError(
            f"{type(self).__name__} is a tree for a whole model or part of it, not a hook; append "
            f"hooks to one of its sites: {', '.join(path for path, _ in self.leaves())}."
        )

    def append_all(self, hook: Hook) -> Self:
        """Append ``hook`` to every list below: ``fwd``, ``bwd`` and ``fwd2`` of every site."""
        leaves = [leaf for _, leaf in self.leaves()]
        for leaf in leaves:  # if one list refuses the hook, none gets it
            leaf._validated(hook)
        for leaf in leaves:
            leaf.append(hook)
        return self

    def append_to_path(self, path: str, hook: Hook) -> Self:
        """Append ``hook`` at a dotted path that ends in a list: ``"resid.torso.post_mlp.fwd"``."""
        lists = dict(self.leaves())
        if path not in lists:
            kinds = [known for known in lists if known.startswith(f"{path}.")]
            hint = f" It goes on: {', '.join(kinds[:6])}." if kinds else did_you_mean(path, lists)
            raise HookError(f"{type(self).__name__} has no list of hooks at {path!r}.{hint}")
        lists[path].append(hook)
        return self

    def is_empty_at(self, layer: int | None) -> bool:
        return all(child.is_empty_at(layer) for child in self._inside())

    def bind(self, **kwargs: Any) -> Self:
        for _, leaf in self.leaves():
            leaf.bind(**kwargs)
        return self

    def unbind(self, keys: Sequence[str]) -> Self:
        for _, leaf in self.leaves():
            leaf.unbind(keys)
        return self

    def copy(self) -> Self:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.all_hooks = OrderedDict()
        for name, child in self.all_hooks.items():
            copied = child.copy()
            new.all_hooks[name] = copied
            object.__setattr__(new, name, copied)
        return new

    def __repr__(self) -> str:
        filled = [(path, leaf) for path, leaf in self.leaves() if not leaf.is_empty()]
        if not filled:
            return f"{type(self).__name__}()"
        lines = [f"  {path}: {', '.join(map(hook_name, leaf._hooks))}" for path, leaf in filled]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


class FwdBwdHooks(HookCollection):
    """The hooks of one site, called in the order ``fwd``, ``bwd``, ``fwd2`` (see the module's docstring)."""

    fwd: Hooks
    bwd: WrapperHooks
    fwd2: Hooks

    def __init__(self) -> None:
        super().__init__()
        self.add_subhooks("fwd", Hooks())
        self.add_subhooks("bwd", WrapperHooks(grad_hook_wrapper))
        self.add_subhooks("fwd2", Hooks())

    def append_fwd(self, hook: Hook) -> Self:
        """Append a function of the activation."""
        self.fwd.append(hook)
        return self

    def append_bwd(self, hook: Hook) -> Self:
        """Append a function of the gradient of the loss with respect to the activation."""
        self.bwd.append(hook)
        return self

    def append_fwd2(self, hook: Hook) -> Self:
        """Append a function of the activation that runs after the point whose gradient ``bwd`` hooks see."""
        self.fwd2.append(hook)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "append":
            raise AttributeError(
                "FwdBwdHooks has no 'append': use append_fwd(hook) for the activation, append_bwd(hook) "
                "for its gradient, append_fwd2(hook) for the activation after the bwd hooks."
            )
        return super().__getattr__(name)

    def is_empty(self) -> bool:
        return not (self.fwd._attached or self.bwd._attached or self.fwd2._attached)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (self.fwd._attached or self.bwd._attached or self.fwd2._attached):
            return x
        return self._run(x, args, kwargs, self.fwd._path.rpartition(".")[0])

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Tensor:
        x = self.fwd._run(x, args, kwargs, f"{where}.fwd")
        x = self.bwd._run(x, args, kwargs, f"{where}.bwd")
        return self.fwd2._run(x, args, kwargs, f"{where}.fwd2")


Decode = Callable[[Tensor], Tensor]


class CodeOfInput(Protocol):
    """The latents of one input and the decoder for them."""

    @property
    def latents(self) -> Tensor: ...

    @property
    def decode(self) -> Decode: ...


class CodingAutoencoder(Protocol):
    """What :meth:`AutoencoderHooks.from_autoencoder` needs of an autoencoder."""

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
        def at(site: FwdBwdHooks, value: Tensor, name: str) -> Tensor:
            return site._run(value, args, kwargs, f"{where} > {name}")

        if (fast := self._fast(x, at, kwargs)) is not None:
            return _checked(fast, x, where, "AutoencoderHooks", kwargs.get("layer"))
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
        return _checked(result, x, where, "AutoencoderHooks", kwargs.get("layer"))

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
        """The hooks on latents that run in this layer; None if one needs all latents."""
        site = self.latents
        if not (site.bwd.is_empty() and site.fwd2.is_empty()) or site.fwd.bound_kwargs:
            return None
        found = []
        for hook in chain.from_iterable(_running(h, kwargs.get("layer")) for h in site.fwd._hooks):
            if not isinstance(hook, DescribedHook) or hook.only_latents is None:
                return None
            change = partial(hook.edit, positions=kwargs.get("positions"))
            found.append(LatentEdit(hook.only_latents, change))
        return found

    def __repr__(self) -> str:
        inside = super().__repr__().partition("(")[2].strip("()\n")
        return (
            f"AutoencoderHooks(add_error={self.add_error}{', ' if inside else ''}{inside.strip()})"
        )


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
        kind = next((kind for kind in _KINDS if path.endswith(f".{kind}")), None)
        place = path if kind is None else path.removesuffix(f".{kind}")
        location = _location(place)
        if kind is None and location is not None:
            lists = ", ".join(f"{location}.{kind}" for kind in _KINDS)
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
            for attached in leaf._attached:
                if not _joined(lists[path], attached.hook):
                    lists[path]._attached += (attached,)
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
                    yield from ((path, found) for found in _autoencoders_in(hook))


_IN_FLOAT32 = {
    path for path in SITES if path.endswith(("post_mean_subtraction", ".scale", ".post_scale"))
}


def _autoencoders_in(hook: Hook) -> Iterator[AutoencoderHooks]:
    """The autoencoders among a hook and those inside it."""
    if isinstance(hook, AutoencoderHooks):
        yield hook
    elif isinstance(hook, HookNode):
        for inner in hook._inside():
            yield from _autoencoders_in(inner)


def _location(text: str) -> ActivationLocation | None:
    try:
        return ActivationLocation.parse(text)
    except LocationError:
        return None


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


def _joined(hooks: Hooks, new: Hook) -> bool:
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


def _running(hook: Hook, layer: int | None) -> Iterator[Hook]:
    """The hooks inside ``AtLayers`` that run in a layer; any other hook itself."""
    if isinstance(hook, AtLayers):
        if layer in hook.at_layers:
            yield from chain.from_iterable(_running(inner, layer) for inner in hook._hooks)
    else:
        yield hook


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


_GROUPS: dict[str, type[_Group]] = {
    kind._prefix: kind
    for kind in (MLPHooks, AttentionHooks, ResidualStreamHooks, ResidualStreamTorsoHooks)
}

NO_HOOKS = TransformerHooks()
"""The empty tree used for ``hooks=None`` inside a pass. Users never get it."""
