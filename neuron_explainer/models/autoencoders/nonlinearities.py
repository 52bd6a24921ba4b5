"""Activation functions of autoencoder latents, each known by one strict name.

An unknown name is an error. (Reading it as ReLU, as others do, loads a TopK autoencoder without a
word as something else, and every latent is wrong.)

Shape legend: ``l`` latents, ``…`` any leading axes.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoders.fista import Fista

_POSTACTS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "Identity": nn.Identity}


def _read_k(k: Any, where: str) -> int:
    """``k`` as an ``int``: files also hold it as an integer tensor without axes."""
    try:
        value = operator.index(k)
    except TypeError:
        value = 0
    if isinstance(k, bool) or value < 1:
        raise InputError(f"{where}: k must be a whole number >= 1, found {k!r}.")
    return value


class TopK(nn.Module):
    """Keeps the ``k`` largest pre-activations of each row, passes them through ``postact_fn``.

    ``[…, l] -> […, l]``, dense: all other latents are zero. With the default ReLU fewer than ``k``
    latents are active in a row with fewer than ``k`` positive pre-activations.

    Exactly ``k`` entries are kept. Of pre-activations equal to the smallest kept one, those with the
    lowest indices are kept. A NaN counts as the largest value, so that a row holding one yields a NaN
    and is noticed further on.

    The gradient is that of the kept entries; the choice itself has none.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    """

    def __init__(self, k: int, postact_fn: nn.Module | None = None) -> None:
        super().__init__()
        self.k = _read_k(k, "TopK")
        self.postact_fn = nn.ReLU() if postact_fn is None else postact_fn

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.k:
            raise InputError(f"TopK: k={self.k} is more than the {x.shape[-1]} latents given.")
        indices = top_k(x, self.k)[1]
        return torch.zeros_like(x).scatter(-1, indices, self.postact_fn(x.gather(-1, indices)))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "k"] = self.k
        destination[prefix + "postact_fn"] = _postact_name(self.postact_fn)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        new = self.from_state_dict(_without_prefix(state_dict, prefix))
        self.k, self.postact_fn = new.k, new.postact_fn

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], strict: bool = True) -> "TopK":
        """The inverse of ``state_dict()``, which holds ``k`` and the name of ``postact_fn``."""
        fields = dict(state_dict)
        k, postact = fields.pop("k", None), fields.pop("postact_fn", "ReLU")
        if strict:
            _no_more_fields("TopK", fields, ["k", "postact_fn"])
        if postact not in _POSTACTS:
            raise CheckpointError(
                f"TopK: unknown postact_fn {postact!r}.{did_you_mean(str(postact), _POSTACTS)} "
                f"Known: {', '.join(_POSTACTS)}."
            )
        return cls(_read_k(k, "TopK"), _POSTACTS[postact]())

    def extra_repr(self) -> str:
        return f"k={self.k}, postact_fn={type(self.postact_fn).__name__}"

    def __repr__(self) -> str:
        return f"TopK({self.extra_repr()})"


class _Threshold(nn.Module):
    """What JumpReLU and BatchTopK share: ``relu(x)`` where ``x > threshold``, else zero."""

    threshold: Tensor

    def forward(self, x: Tensor) -> Tensor:
        # Written with <= so that a NaN, which is never <= anything, comes out as NaN.
        return torch.where(x <= self.threshold, 0.0, torch.relu(x))


class JumpReLU(_Threshold):
    """``relu(x)`` where ``x > threshold``, else zero; one threshold a latent.

    ``[…, l] -> […, l]``. A pre-activation equal to the threshold is off.

    The gradient here is the plain derivative: that of ReLU above the threshold, none for the
    threshold itself. Learning a threshold takes straight-through estimators, which belong to the
    training objective, so that a dictionary in use never has two derivatives.

    Rajamanoharan et al. 2024, "Jumping Ahead", equation 3 (with the inner ReLU of later releases;
    the two agree for thresholds >= 0).
    """

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        if threshold.ndim != 1 or not threshold.is_floating_point():
            raise InputError(
                "JumpReLU: threshold must be a floating-point tensor [l], one number a latent, "
                f"found shape {list(threshold.shape)}, {threshold.dtype}."
            )
        self.threshold = nn.Parameter(threshold.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.threshold):
            raise InputError(
                f"JumpReLU: expected {len(self.threshold)} latents in the last axis, found shape "
                f"{list(x.shape)}."
            )
        return super().forward(x)

    def __repr__(self) -> str:
        return f"JumpReLU(threshold=[{len(self.threshold)}])"


class BatchTopK(_Threshold):
    """BatchTopK as it is applied: ``relu(x)`` where ``x > threshold``, else zero.

    ``[…, l] -> […, l]``. In training BatchTopK keeps the ``k`` times batch size largest entries of
    the whole batch; a latent would then depend on the other rows. Applied, it uses one threshold
    for all latents, estimated in training, so a row's code is its own. ``k`` (mean number of active
    latents aimed at) is only recorded.

    Bussmann et al. 2024, "BatchTopK sparse autoencoders", section 3.
    """

    def __init__(self, threshold: float | Tensor, k: int | None = None) -> None:
        super().__init__()
        value = torch.as_tensor(threshold)
        if value.ndim != 0 or not value.is_floating_point() or not math.isfinite(float(value)):
            raise InputError(
                f"BatchTopK: threshold must be one finite floating-point number, found {threshold!r}."
            )
        self.register_buffer("threshold", value.detach().clone())
        self.k = None if k is None else _read_k(k, "BatchTopK")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "k"] = self.k

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        k = state_dict.pop(prefix + "k", None)
        self.k = None if k is None else _read_k(k, "BatchTopK")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return f"BatchTopK(threshold={float(self.threshold):.6g}, k={self.k})"


class GroupMax(nn.Module):
    """Keeps the largest pre-activation of each of ``k`` equal groups of neighbours, rectified.

    ``[…, l] -> […, l]``, dense. Of equal ones the first is kept (``torch.max`` promises that). The
    ``groupmax`` of EleutherAI's sparsify.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _read_k(k, "GroupMax")

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.k:
            raise InputError(f"GroupMax: {x.shape[-1]} latents are not {self.k} equal groups.")
        groups = torch.relu(x).view(*x.shape[:-1], self.k, x.shape[-1] // self.k)
        top = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, top.indices, top.values).flatten(-2)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "k"] = self.k

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.k = _read_k(state_dict[prefix + "k"], "GroupMax")

    def __repr__(self) -> str:
        return f"GroupMax(k={self.k})"


class Gated(nn.Module):
    """``relu(exp(r_mag) · x + b_mag)`` where ``x + b_gate > 0``, else zero: gate and magnitude.

    ``[…, l] -> […, l]``; each of the three is ``[l]``. Both paths share the encoder's weights, so
    they are functions of one pre-activation. The gate has no gradient, as a step has none.

    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders",
    equations 6 and 7.
    """

    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> None:
        super().__init__()
        for name, value in (("b_gate", b_gate), ("r_mag", r_mag), ("b_mag", b_mag)):
            if value.ndim != 1 or not value.is_floating_point() or len(value) != len(b_gate):
                raise InputError(
                    f"Gated: {name} must be a floating-point tensor [l], one number a latent, found "
                    f"shape {list(value.shape)}, {value.dtype}."
                )
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.b_gate):
            raise InputError(
                f"Gated: expected {len(self.b_gate)} latents in the last axis, found shape "
                f"{list(x.shape)}."
            )
        magnitude = torch.relu(x * self.r_mag.exp() + self.b_mag)
        # Written with <= so that a NaN comes out as NaN.
        return torch.where(x + self.b_gate <= 0, 0.0, magnitude)

    def __repr__(self) -> str:
        return f"Gated([{len(self.b_gate)}])"


ACTIVATIONS_CLASSES: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU,
    "Identity": nn.Identity,
    "TopK": TopK,
    "JumpReLU": JumpReLU,
    "BatchTopK": BatchTopK,
    "GroupMax": GroupMax,
    "Gated": Gated,
    "Fista": Fista,
}
"""Every known activation by the name under which it is stored."""

_FIELDS: dict[str, list[str]] = {
    "ReLU": [],
    "Identity": [],
    "TopK": ["k", "postact_fn"],
    "JumpReLU": ["threshold"],
    "BatchTopK": ["threshold", "k"],
    "GroupMax": ["k"],
    "Gated": ["b_gate", "r_mag", "b_mag"],
    "Fista": ["penalty", "max_iterations", "tolerance"],
}
# Fields with one number a latent.
PER_LATENT_FIELDS: dict[str, list[str]] = {
    "JumpReLU": ["threshold"],
    "Gated": ["b_gate", "r_mag", "b_mag"],
}


def activation_name(activation: nn.Module) -> str:
    """The stored name of an activation; a class that could not be read back is an error."""
    for name, cls in ACTIVATIONS_CLASSES.items():
        if type(activation) is cls:
            return name
    raise InputError(
        f"unknown latent activation {type(activation).__name__}: it could be applied but not read "
        f"back after saving. Known: {', '.join(ACTIVATIONS_CLASSES)}."
    )


def make_activation(name: str, fields: Mapping[str, Any]) -> nn.Module:
    """The activation stored as ``name`` with ``fields``, its ``state_dict()``."""
    if name not in ACTIVATIONS_CLASSES:
        raise CheckpointError(
            f"unknown latent activation {name!r}.{did_you_mean(str(name), ACTIVATIONS_CLASSES)} "
            f"Known: {', '.join(ACTIVATIONS_CLASSES)}."
        )
    _no_more_fields(name, fields, _FIELDS[name])
    if name == "TopK":
        return TopK.from_state_dict(fields)
    if name == "JumpReLU":
        return JumpReLU(_tensor(name, fields, "threshold"))
    if name == "BatchTopK":
        return BatchTopK(_tensor(name, fields, "threshold"), fields.get("k"))
    if name == "Gated":
        return Gated(*(_tensor(name, fields, field) for field in _FIELDS[name]))
    return _from_numbers(name, fields)


def _from_numbers(name: str, fields: Mapping[str, Any]) -> nn.Module:
    """An activation whose fields are plain numbers, none of which may be missing."""
    missing = [field for field in _FIELDS[name] if field not in fields]
    if missing:
        raise CheckpointError(f"{name}: the field {missing[0]!r} is missing.")
    return ACTIVATIONS_CLASSES[name](**fields)


def _tensor(name: str, fields: Mapping[str, Any], field: str) -> Tensor:
    value = fields.get(field)
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name}: expected a tensor {field!r}, found {value!r}.")
    return value


def _postact_name(postact_fn: nn.Module) -> str:
    for name, cls in _POSTACTS.items():
        if type(postact_fn) is cls:
            return name
    raise InputError(
        f"TopK: postact_fn {type(postact_fn).__name__} cannot be stored. "
        f"Known: {', '.join(_POSTACTS)}."
    )


def _no_more_fields(name: str, fields: Mapping[str, Any], known: list[str]) -> None:
    if unknown := sorted(set(fields) - set(known)):
        raise CheckpointError(
            f"{name}: unknown field {unknown[0]!r}. Known: {', '.join(known) or 'none'}."
        )


def _without_prefix(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: v for key, v in state_dict.items() if key.startswith(prefix)}
