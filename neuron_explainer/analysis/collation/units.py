"""What is looked at: the latents of autoencoders, and the units of locations.

    autoencoders           a context, a multi-context, or a mapping from names to autoencoders
    "3/mlp.post_act"       neurons, one value a token
    "3/resid.torso.…"      channels of a vector, which may be negative
    "3/attn.qk_probs"      heads: the pattern, one value for each pair of tokens
    "3/attn.write_norm"    heads: the pattern times the norm of what the value of the key writes to the
                           residual stream

A location without a layer stands for every layer.

Shape legend: ``b`` rows, ``s`` positions, ``t`` tokens looked at, ``h`` heads, ``n`` inputs, ``u`` units.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.places import Places
from neuron_explainer.analysis.collation.seen import DenseSeen, PairsSeen, Seen, SparseSeen
from neuron_explainer.analysis.records import Floats, Kind
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.evaluation.placed import placed
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import (
    AutoencoderContext,
    MultiAutoencoderContext,
)
from neuron_explainer.models.autoencoders.nonlinearities import as_nonlinearity
from neuron_explainer.models.language_model import Activations
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import WeightLocationType

Autoencoders = AutoencoderContext | MultiAutoencoderContext | Mapping[str, Autoencoder]
What = Autoencoders | LocationLike | Iterable[Autoencoders | LocationLike]
"""What :func:`collate` takes: one of these, or several."""

PATTERN, WRITE_NORM = "attn.qk_probs", "attn.write_norm"


class Watched(ABC):
    """The units at one place."""

    name: str
    kind: Kind
    location: str
    signed: bool
    n_units: int
    sources: tuple[ActivationLocation, ...]
    """The activations that they are computed from."""

    @abstractmethod
    def see(self, captured: Activations, places: Places) -> Seen:
        """The units in one batch; an error if a value is NaN or infinite."""

    def provenance(self) -> dict[str, Any]:
        """What tells these units from others, as JSON values."""
        return {}

    @property
    def dense(self) -> bool:
        """Whether values that are not active can be other than 0."""
        return True

    def shown(self, config: CollateConfig) -> tuple[int, int]:
        """The most tokens shown of an example, and its number of activations."""
        return config.window, config.window

    def _refuse(self, value: float, where: str, unit: int) -> None:
        what = "NaN" if np.isnan(value) else value
        raise InputError(
            f"{self.name}: {self.kind} {unit} is {what} at {where}. Examples cannot be ordered by such "
            "values. If the model and the dictionary are sound, a wider dtype helps."
        )


class Latents(Watched):
    """The latents of an autoencoder."""

    kind: Kind = "latent"

    def __init__(self, name: str, autoencoder: Autoencoder, source: ActivationLocation) -> None:
        self.name, self.autoencoder = name, autoencoder
        self.location, self.sources = str(source), (source,)
        self.n_units = autoencoder.n_latents
        nonlinearity = as_nonlinearity(autoencoder.activation)
        self.signed = nonlinearity.can_be_negative(autoencoder.encoder.weight)
        self._sha256 = weights_sha256(autoencoder)

    @property
    def dense(self) -> bool:
        return False

    def see(self, captured: Activations, places: Places) -> SparseSeen:
        x = _rows(captured[self.sources[0]], places)
        autoencoder = self.autoencoder
        found = autoencoder.encode_sparse(x.to(autoencoder.device, autoencoder.dtype))
        values, indices = (each.cpu() for each in (found.values.float(), found.indices))
        if not bool(torch.isfinite(values).all()):
            token, column = (~torch.isfinite(values)).nonzero()[0].tolist()
            value, unit = float(values[token, column]), int(indices[token, column])
            self._refuse(value, places.name(token), unit)
        active = (values != 0) if self.signed else (values > 0)
        where = active.nonzero(as_tuple=True)
        found_units, found_values = indices[where].numpy(), values[where].numpy()
        return SparseSeen(places, where[0].numpy(), found_units, found_values, self.n_units)

    def provenance(self) -> dict[str, Any]:
        return {"autoencoder_sha256": self._sha256}


class Vectors(Watched):
    """The entries of a location with one vector for each token."""

    def __init__(self, location: ActivationLocation, n_units: int) -> None:
        # Neurons come before or after the nonlinearity of the MLP, where only positive values count.
        neurons = location.site.shape[-1] == "f"
        self.kind: Kind = "neuron" if neurons else "channel"
        self.location, self.sources = str(location), (location,)
        self.name = f"{location}.{self.kind}s"
        self.signed, self.n_units = not neurons, n_units

    def see(self, captured: Activations, places: Places) -> DenseSeen:
        x = _rows(captured[self.sources[0]], places).float().cpu().numpy()
        self._check(x, places)
        return DenseSeen(places, x, self.signed)

    def _check(self, x: Floats, places: Places) -> None:
        if not np.isfinite(x).all():
            token, unit = np.argwhere(~np.isfinite(x))[0].tolist()
            self._refuse(float(x[token, unit]), places.name(token), unit)


class Heads(Watched):
    """The attention heads of a layer, with a value for each pair of tokens."""

    kind: Kind = "head"
    signed = False

    def __init__(self, context: ModelContext, layer: int, figure: str, reach: int) -> None:
        self.location = f"{layer}/{figure}"
        self.name = f"{self.location}.heads"
        self.n_units = context.n_attention_heads
        self.reach = reach
        self.sources = (ActivationLocation(PATTERN, layer),)
        self._out: Tensor | None = None
        if figure == WRITE_NORM:
            self.sources = (*self.sources, ActivationLocation("attn.v", layer))
            # [h, d_head, d]; only |v W_O| is needed, and for that W_O W_Oᵀ is enough.
            out = context.get_weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).double()
            self._out = out @ out.transpose(1, 2)

    def shown(self, config: CollateConfig) -> tuple[int, int]:
        return config.head_window, config.head_window * (config.head_window + 1) // 2

    def see(self, captured: Activations, places: Places) -> PairsSeen:
        values = captured[self.sources[0]].float()
        if self._out is not None:
            values = values * self._written(captured[self.sources[1]], self._out)[:, None]
        found = PairsSeen(places, values.cpu().numpy(), self.reach)
        if not np.isfinite(found.x).all():
            pair, unit = np.argwhere(~np.isfinite(found.x))[0].tolist()
            where = places.name(found.query[pair])
            self._refuse(float(found.x[pair, unit]), f"the query in {where}", unit)
        return found

    @staticmethod
    def _written(v: Tensor, gram: Tensor) -> Tensor:
        """``[b, s, h]``: the norm of what each value writes, if it is attended to in full."""
        v = v.double()
        square = torch.einsum("bshd,hde,bshe->bsh", v, gram.to(v.device), v)
        return square.clamp(min=0).sqrt().float()


def watched(context: ModelContext, what: What, config: CollateConfig) -> list[Watched]:
    """Everything in ``what``, one entry for each dictionary or location."""
    found: list[Watched] = []
    for part in _parts(what):
        if isinstance(part, str | ActivationLocation):
            found += _of_location(context, part, config)
        else:
            found += _of_autoencoders(context, part)
    if not found:
        raise InputError("nothing to look at: expected autoencoders or locations.")
    names = [each.name for each in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"{', '.join(sorted(twice))} is asked for twice. Dictionaries of one location need names of "
            "their own: give a mapping from names to autoencoders."
        )
    return found


def _parts(what: What) -> Iterator[Autoencoders | LocationLike]:
    if isinstance(
        what, str | ActivationLocation | AutoencoderContext | MultiAutoencoderContext | Mapping
    ):
        yield what
    elif isinstance(what, Autoencoder):
        raise InputError('an autoencoder needs a name or location: {"NAME": autoencoder}.')
    elif isinstance(what, Iterable):
        for part in what:
            yield from _parts(part)
    else:
        raise InputError(
            f"expected autoencoders or locations to look at, found {type(what).__name__}."
        )


def _of_autoencoders(context: ModelContext, autoencoders: Autoencoders) -> Iterator[Watched]:
    if isinstance(autoencoders, MultiAutoencoderContext):
        for one_location in autoencoders.autoencoder_context_by_location.values():
            yield from _of_autoencoders(context, one_location)
        return
    for name, each in placed(autoencoders, context.n_layers).items():
        width = _width(context, each.source)
        if each.autoencoder.n_inputs != width:
            raise InputError(
                f"autoencoder {name!r} takes inputs of width {each.autoencoder.n_inputs}, "
                f"{each.source} of {context.model_name} has width {width}."
            )
        yield Latents(name, each.autoencoder, each.source)


def _width(context: ModelContext, location: ActivationLocation) -> int:
    """The number of values for each token; heads are side by side."""
    with_heads = location.site.shape[2:3] == ("h",)
    width = location.site.width(context.get_dim_size)
    return width * context.n_attention_heads if with_heads else width


def _of_location(
    context: ModelContext, location: LocationLike, config: CollateConfig
) -> Iterator[Watched]:
    layer_text, slash, path = str(location).rpartition("/")
    if path == WRITE_NORM:
        place = ActivationLocation.parse(f"{layer_text}{slash}{PATTERN}")
    else:
        place = ActivationLocation.parse(location)
    for single in place.expand(context.n_layers):
        if single.path == PATTERN:
            assert single.layer is not None
            figure = WRITE_NORM if path == WRITE_NORM else PATTERN
            yield Heads(context, single.layer, figure, config.head_window)
        elif "k" in single.site.shape[2:]:
            raise LocationError(
                f"{single} holds a number for each pair of tokens; of these, only {PATTERN} and "
                f"{WRITE_NORM} can be collated."
            )
        else:
            yield Vectors(single, _width(context, single))


def _rows(x: Tensor, places: Places) -> Tensor:
    """``[b, s, …] -> [t, n]``: the tokens looked at; heads are side by side."""
    rows = x.flatten(2).flatten(0, 1)
    if len(places) == len(rows):
        return rows
    return rows[torch.from_numpy(places.cell).to(rows.device)]


def weights_sha256(module: nn.Module) -> str:
    """The SHA-256 of names, dtypes, shapes and values of all tensors of a module, in hex."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            content = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(content.numpy().data)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()
