"""Nonlinearities: what turns the pre-activations of an encoder into latents.

Each class says everything about itself: the name under which it is stored, its fields, which of them
hold one number for each latent, and what may be done with it. Nothing outside of this module asks for
a class or a name, so a new nonlinearity is one class here (or in a program that uses this library):

    class Shifted(Nonlinearity):
        name = "Shifted"
        fields = ("shift",)

        def __init__(self, shift: float) -> None: ...

        def forward(self, x: Tensor) -> Tensor: ...

A stored name that is not known is an error. (Others read it as ReLU: a TopK autoencoder is then
silently loaded as something else, and every latent is wrong.)

Shape legend: ``l`` latents, ``k`` latents kept of a row, ``…`` any leading axes.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoders.fista import (
    MAX_ITERATIONS,
    TOLERANCE,
    check_settings,
    solve,
)

ACTIVATIONS_CLASSES: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "Identity": nn.Identity}
"""Every known nonlinearity by the name under which it is stored. Subclasses of :class:`Nonlinearity`
that have a name are added when they are defined."""


class Nonlinearity(nn.Module):
    """Base class: ``[…, l]`` pre-activations ``-> […, l]`` latents, and what is known of the map.

    torch's ``nn.ReLU`` and ``nn.Identity`` are nonlinearities too; :func:`as_nonlinearity` gives them
    this interface.
    """

    name: ClassVar[str]
    """The name under which it is stored; also what registers the class."""
    fields: ClassVar[tuple[str, ...]] = ()
    """What it is stored with: arguments of the constructor, and attributes."""
    optional: ClassVar[tuple[str, ...]] = ()
    """The fields that may be missing."""
    tensors: ClassVar[tuple[str, ...]] = ()
    """The fields that are tensors: parameters or buffers."""
    per_latent: ClassVar[tuple[str, ...]] = ()
    """The fields with one number for each latent; a subset of ``tensors``."""
    biases: ClassVar[tuple[str, ...]] = ()
    """The fields that can make a latent active whose pre-activation is 0; with 0 there they cannot."""
    joint: ClassVar[bool] = False
    """Whether latents depend on one another in a way that does not allow leaving some out."""
    needs_dictionary: ClassVar[bool] = False
    """Whether it solves for latents in the decoder's directions: for tied autoencoders only. The
    solver prepares the dictionary once for each call, so it is given all rows at once."""
    needs_normalization: ClassVar[bool] = False
    """Whether published files with it that say nothing of input normalisation often need one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        known = ACTIVATIONS_CLASSES.get(cls.name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise InputError(
                f"a nonlinearity {cls.name!r} exists already: {known.__module__}.{known.__qualname__}."
            )
        ACTIVATIONS_CLASSES[cls.name] = cls

    @property
    def top_k(self) -> int | None:
        """The number of largest pre-activations that alone become latents; None if it is not such a
        map. Then the encoder may look for these without computing the others' latents."""
        return None

    @property
    def is_relu(self) -> bool:
        """Whether it is exactly a ReLU, which a product can apply in the same pass."""
        return False

    def after_top_k(self, values: Tensor) -> Tensor:
        """``[…, k] -> […, k]``: the latents of the ``top_k`` largest pre-activations."""
        return values

    def latents(self, pre_act: Tensor, dictionary: Tensor) -> Tensor:
        """``[…, l] -> […, l]``; ``dictionary`` ``[n, l]`` are the decoder's directions."""
        found: Tensor = self(pre_act)
        return found

    def can_be_negative(self, weight: Tensor) -> bool:
        """Whether latents can be below 0, found out by trying it with the dtype, device and number of
        latents of the encoder's ``weight`` ``[l, n]``."""
        if self.needs_dictionary:
            return False  # a non-negative code
        probes = torch.tensor([-10.0, -1.0, -0.1], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            if self.top_k is not None:
                return bool((self.after_top_k(probes) < 0).any())
            return bool((self(probes[:, None].expand(-1, len(weight))) < 0).any())

    def check(self, n_latents: int) -> None:
        """Raise InputError unless this can be applied to ``n_latents`` latents."""
        for field in self.per_latent:
            n_found = len(getattr(self, field))
            if n_found != n_latents:
                raise InputError(
                    f"{self.name}: {field} has {n_found} numbers for {n_latents} latents."
                )

    def select(self, kept: Tensor) -> Self:
        """The nonlinearity of an autoencoder that has only the latents ``kept`` (int64 indices)."""
        if self.joint:
            raise InputError(
                f"latents cannot be left out: {self.name} finds each of them among the others."
            )
        state = self.state_dict()
        return self.from_fields(state | {field: state[field][kept] for field in self.per_latent})

    # ---- stored as fields --------------------------------------------------------------------------

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The nonlinearity that was stored with these fields, its ``state_dict()``."""
        if unknown := sorted(set(fields) - set(cls.fields)):
            raise CheckpointError(
                f"{cls.name}: unknown field {unknown[0]!r}. Known: {', '.join(cls.fields) or 'none'}."
            )
        for field in cls.tensors:
            if not isinstance(fields.get(field), Tensor):
                raise CheckpointError(
                    f"{cls.name}: expected a tensor {field!r}, found {fields.get(field)!r}."
                )
        for field in cls.fields:
            if field not in fields and field not in cls.optional:
                raise CheckpointError(f"{cls.name}: the field {field!r} is missing.")
        return cls(**fields)

    def plain_fields(self) -> dict[str, Any]:
        """The fields that are no tensors, as JSON can hold them."""
        return {field: getattr(self, field) for field in self.fields if field not in self.tensors}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for field, value in self.plain_fields().items():
            destination[prefix + field] = value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = {f: state_dict[prefix + f] for f in self.fields if prefix + f in state_dict}
        new = self.from_fields(self.state_dict() | given)  # checks them
        for field in self.plain_fields():
            state_dict.pop(prefix + field, None)
            setattr(self, field, getattr(new, field))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _TorchModule(Nonlinearity):
    """A nonlinearity that is a plain module: torch's, or one that can be applied but not stored."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def is_relu(self) -> bool:
        return type(self.module) is nn.ReLU

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found

    def select(self, kept: Tensor) -> Self:
        return self


def as_nonlinearity(activation: nn.Module) -> Nonlinearity:
    """The module itself, or torch's module with the interface of :class:`Nonlinearity`."""
    return activation if isinstance(activation, Nonlinearity) else _TorchModule(activation)


def activation_name(activation: nn.Module) -> str:
    """The name under which a nonlinearity is stored; an error if its class could not be read back."""
    for name, cls in ACTIVATIONS_CLASSES.items():
        if type(activation) is cls:
            return name
    raise InputError(
        f"unknown latent activation {type(activation).__name__}: it could be applied but not read "
        f"back after saving. Known: {', '.join(ACTIVATIONS_CLASSES)}."
    )


def make_activation(name: str, fields: Mapping[str, Any]) -> nn.Module:
    """The nonlinearity stored as ``name`` with ``fields``, its ``state_dict()``."""
    if name not in ACTIVATIONS_CLASSES:
        raise CheckpointError(
            f"unknown latent activation {name!r}.{did_you_mean(str(name), ACTIVATIONS_CLASSES)} "
            f"Known: {', '.join(ACTIVATIONS_CLASSES)}."
        )
    cls = ACTIVATIONS_CLASSES[name]
    if issubclass(cls, Nonlinearity):
        return cls.from_fields(fields)
    if fields:
        raise CheckpointError(f"{name}: unknown field {sorted(fields)[0]!r}. Known: none.")
    return cls()


def select_fields(name: str, fields: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """The fields of a stored nonlinearity for the latents ``kept`` (int64 indices) only."""
    return as_nonlinearity(make_activation(name, fields)).select(kept).state_dict()


def _read_k(k: Any, where: str) -> int:
    """``k`` as an ``int``: files also hold it as an integer tensor without axes."""
    try:
        value = operator.index(k)
    except TypeError:
        value = 0
    if isinstance(k, bool) or value < 1:
        raise InputError(f"{where}: k must be a whole number >= 1, found {k!r}.")
    return value


# ---- the nonlinearities ----------------------------------------------------------------------------

_POSTACTS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "Identity": nn.Identity}


class TopK(Nonlinearity):
    """Keeps the ``k`` largest pre-activations of each row and passes them through ``postact_fn``.

    ``[…, l] -> […, l]``, dense: all other latents are zero. With the default ReLU fewer than ``k``
    latents are active in a row with fewer than ``k`` positive pre-activations.

    Exactly ``k`` entries are kept. Of pre-activations equal to the smallest kept one, those with the
    lowest indices are kept. A NaN counts as the largest value, so that a row holding one yields a NaN
    and is noticed further on.

    The gradient is that of the kept entries; the choice itself has none.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    """

    name = "TopK"
    fields = ("k", "postact_fn")
    optional = ("postact_fn",)
    needs_normalization = True  # OpenAI's v5 files, trained on layer-normed inputs, do not say so

    def __init__(self, k: int, postact_fn: nn.Module | None = None) -> None:
        super().__init__()
        self.k = _read_k(k, "TopK")
        self.postact_fn = nn.ReLU() if postact_fn is None else postact_fn

    @property
    def top_k(self) -> int:
        return self.k

    def after_top_k(self, values: Tensor) -> Tensor:
        found: Tensor = self.postact_fn(values)
        return found

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape[-1])
        indices = top_k(x, self.k)[1]
        return torch.zeros_like(x).scatter(-1, indices, self.after_top_k(x.gather(-1, indices)))

    def check(self, n_latents: int) -> None:
        if n_latents < self.k:
            raise InputError(
                f"TopK(k={self.k}) on {n_latents} latents: k must be at most their number."
            )

    def select(self, kept: Tensor) -> "TopK":
        """The same with a ``k`` that is at most the number of latents left."""
        return type(self)(min(self.k, len(kept)), self.postact_fn)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        postact = fields.get("postact_fn", "ReLU")
        if postact not in _POSTACTS:
            raise CheckpointError(
                f"TopK: unknown postact_fn {postact!r}.{did_you_mean(str(postact), _POSTACTS)} "
                f"Known: {', '.join(_POSTACTS)}."
            )
        return super().from_fields({**fields, "postact_fn": _POSTACTS[postact]()})

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], strict: bool = True) -> "TopK":
        """The inverse of ``state_dict()``; with ``strict=False`` unknown entries are left out."""
        found = {key: v for key, v in state_dict.items() if strict or key in cls.fields}
        return cls.from_fields(found)

    def plain_fields(self) -> dict[str, Any]:
        for name, cls in _POSTACTS.items():
            if type(self.postact_fn) is cls:
                return {"k": self.k, "postact_fn": name}
        raise InputError(
            f"TopK: postact_fn {type(self.postact_fn).__name__} cannot be stored. "
            f"Known: {', '.join(_POSTACTS)}."
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, postact_fn={type(self.postact_fn).__name__}"

    def __repr__(self) -> str:
        return f"TopK({self.extra_repr()})"


class _Threshold(Nonlinearity):
    """What JumpReLU and BatchTopK share: ``relu(x)`` where ``x > threshold``, else zero."""

    threshold: Tensor

    def forward(self, x: Tensor) -> Tensor:
        # Written with <= so that a NaN, which is never <= anything, comes out as NaN.
        return torch.where(x <= self.threshold, 0.0, torch.relu(x))


class JumpReLU(_Threshold):
    """``relu(x)`` where ``x > threshold``, else zero; one threshold for each latent.

    ``[…, l] -> […, l]``. A pre-activation equal to the threshold is off.

    The gradient here is the plain derivative: that of ReLU above the threshold, none for the
    threshold itself. Learning a threshold takes straight-through estimators, which belong to the
    training objective, so that a dictionary in use never has two derivatives.

    Rajamanoharan et al. 2024, "Jumping Ahead", equation 3 (with the inner ReLU of later releases;
    the two agree for thresholds >= 0).
    """

    name = "JumpReLU"
    fields = tensors = per_latent = ("threshold",)

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold = nn.Parameter(_per_latent("JumpReLU", "threshold", threshold))

    def forward(self, x: Tensor) -> Tensor:
        _check_last_axis(self, x, len(self.threshold))
        return super().forward(x)

    def __repr__(self) -> str:
        return f"JumpReLU(threshold=[{len(self.threshold)}])"


class BatchTopK(_Threshold):
    """BatchTopK as it is applied: ``relu(x)`` where ``x > threshold``, else zero.

    ``[…, l] -> […, l]``. In training BatchTopK keeps the ``k`` times batch size largest entries of
    the whole batch; a latent would then depend on the other rows. Applied, it uses one threshold
    for all latents, estimated in training, so the latents of a row depend on this row alone. ``k``
    (the mean number of active latents aimed at) is only recorded.

    Bussmann et al. 2024, "BatchTopK sparse autoencoders", section 3.
    """

    name = "BatchTopK"
    fields = ("threshold", "k")
    tensors = ("threshold",)
    optional = ("k",)

    def __init__(self, threshold: float | Tensor, k: int | None = None) -> None:
        super().__init__()
        value = torch.as_tensor(threshold)
        if value.ndim != 0 or not value.is_floating_point() or not math.isfinite(float(value)):
            raise InputError(
                f"BatchTopK: threshold must be one finite floating-point number, found {threshold!r}."
            )
        self.register_buffer("threshold", value.detach().clone())
        self.k = None if k is None else _read_k(k, "BatchTopK")

    def __repr__(self) -> str:
        return f"BatchTopK(threshold={float(self.threshold):.6g}, k={self.k})"


class GroupMax(Nonlinearity):
    """Keeps the largest pre-activation of each of ``k`` equal groups of neighbours, rectified.

    ``[…, l] -> […, l]``, dense. Of equal ones the first is kept (``torch.max`` promises that). The
    ``groupmax`` of EleutherAI's sparsify.
    """

    name = "GroupMax"
    fields = ("k",)
    joint = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _read_k(k, "GroupMax")

    def check(self, n_latents: int) -> None:
        if n_latents % self.k:
            raise InputError(f"GroupMax: {n_latents} latents are not {self.k} equal groups.")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape[-1])
        groups = torch.relu(x).view(*x.shape[:-1], self.k, x.shape[-1] // self.k)
        top = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, top.indices, top.values).flatten(-2)

    def __repr__(self) -> str:
        return f"GroupMax(k={self.k})"


class Gated(Nonlinearity):
    """``relu(exp(r_mag) · x + b_mag)`` where ``x + b_gate > 0``, else zero: gate and magnitude.

    ``[…, l] -> […, l]``; each of the three is ``[l]``. Both paths share the encoder's weights, so
    they are functions of one pre-activation. The gate has no gradient, as a step has none.

    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders",
    equations 6 and 7.
    """

    name = "Gated"
    fields = tensors = per_latent = ("b_gate", "r_mag", "b_mag")
    biases = ("b_gate", "b_mag")

    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> None:
        super().__init__()
        for name, value in (("b_gate", b_gate), ("r_mag", r_mag), ("b_mag", b_mag)):
            checked = _per_latent("Gated", name, value, len(b_gate) if b_gate.ndim else 1)
            setattr(self, name, nn.Parameter(checked))

    def forward(self, x: Tensor) -> Tensor:
        _check_last_axis(self, x, len(self.b_gate))
        magnitude = torch.relu(x * self.r_mag.exp() + self.b_mag)
        # Written with <= so that a NaN comes out as NaN.
        return torch.where(x + self.b_gate <= 0, 0.0, magnitude)

    def __repr__(self) -> str:
        return f"Gated([{len(self.b_gate)}])"


def _per_latent(where: str, field: str, value: Tensor, n_latents: int | None = None) -> Tensor:
    """A copy of a field with one number for each latent, ``[l]``."""
    wrong_length = n_latents is not None and value.ndim == 1 and len(value) != n_latents
    if value.ndim != 1 or not value.is_floating_point() or wrong_length:
        raise InputError(
            f"{where}: {field} must be a floating-point tensor [l], one number for each latent, found "
            f"shape {list(value.shape)}, {value.dtype}."
        )
    return value.detach().clone()


def _check_last_axis(nonlinearity: Nonlinearity, x: Tensor, n_latents: int) -> None:
    if x.shape[-1] != n_latents:
        raise InputError(
            f"{nonlinearity.name}: expected {n_latents} latents in the last axis, found shape "
            f"{list(x.shape)}."
        )


class Fista(Nonlinearity):
    """The non-negative sparse code as a nonlinearity of ``Φᵀx``, for a tied autoencoder.

    ``[…, l] -> […, l]``. The minimisation needs two things: ``Φᵀx``, which is the pre-activation of
    an autoencoder whose encoder is the transpose of its decoder Φ; and Φ, which is given at the call.

    No gradient runs through it: asking for one is an error, because a silent zero would mislead.
    """

    name = "Fista"
    fields = ("penalty", "max_iterations", "tolerance")
    joint = True
    needs_dictionary = True

    def __init__(
        self, penalty: float, max_iterations: int = MAX_ITERATIONS, tolerance: float = TOLERANCE
    ) -> None:
        super().__init__()
        check_settings(penalty, max_iterations, tolerance)
        self.penalty = float(penalty)
        self.max_iterations = max_iterations
        self.tolerance = float(tolerance)

    def latents(self, pre_act: Tensor, dictionary: Tensor) -> Tensor:
        found: Tensor = self(pre_act, dictionary)
        return found

    def forward(self, correlations: Tensor, dictionary: Tensor) -> Tensor:
        code = solve(
            correlations,
            dictionary,
            self.penalty,
            self.max_iterations,
            self.tolerance,
            momentum=True,
        )
        return _refuse_gradient(correlations, code.latents)

    def __repr__(self) -> str:
        return (
            f"Fista(penalty={self.penalty:g}, max_iterations={self.max_iterations}, "
            f"tolerance={self.tolerance:g})"
        )


class _Refusal(torch.autograd.Function):
    """Passes the code on, and fails where a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, correlations: Tensor, latents: Tensor) -> Tensor:
        return latents.view_as(latents)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InputError(
            "no gradient runs through a sparse code found by FISTA. Detach the latents, or run the "
            "autoencoder under torch.no_grad()."
        )


def _refuse_gradient(correlations: Tensor, latents: Tensor) -> Tensor:
    return _Refusal.apply(correlations, latents)  # type: ignore[no-any-return,no-untyped-call]
