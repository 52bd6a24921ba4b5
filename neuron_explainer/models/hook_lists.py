"""Lists and trees of hooks: appending, running, conditions, gradients, and the check of what a hook returns.

The trees of a model and of an autoencoder are made of them, see :mod:`neuron_explainer.models.hooks`.
"""

import operator
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from neuron_explainer.errors import HookError, did_you_mean
from neuron_explainer.models.hook_signatures import Hook, Signature, missing, misspelt
from neuron_explainer.models.locations import SITES, Site
from neuron_explainer.models.weight_names import Dimension

Kind = Literal["fwd", "bwd", "fwd2"]
"""The lists of a site, in the order in which they are called."""
KINDS: tuple[Kind, ...] = ("fwd", "bwd", "fwd2")


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

    def changes_at(self, positions: Tensor) -> Tensor | None:
        """Bool ``[b, s]``: where it changes anything at all, and for which positions alone it can be called.

        None if it must be called for all of a row's positions.
        """
        return None

    def edit(self, chosen: Tensor, positions: Tensor | None = None) -> Tensor:
        """New values ``[…, u]`` of ``only_latents``, for hooks that name such latents."""
        raise HookError(f"{self!r} names no latents that it changes apart from the others.")


def hook_name(hook: Hook) -> str:
    """The name of a hook in ``repr`` and in errors."""
    if isinstance(hook, HookNode | nn.Module | DescribedHook):
        return repr(hook)
    if isinstance(hook, partial):
        return f"partial({hook_name(hook.func)})"
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


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


def checked(result: Any, x: Tensor, where: str, name: str, layer: Any) -> Tensor:
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
                x = checked(result, x, where, name, kwargs.get("layer"))
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
