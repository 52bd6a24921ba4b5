"""Which tokens' embeddings excite a unit: what it reads when one token is all there is.

The embedding of a token is put where the residual stream stands before the part that the unit reads,
and the unit's pre-activation is computed from it by the model's own norm and matrices and the
autoencoder's own encoder:

- a neuron (``3/mlp.pre_act`` or ``3/mlp.post_act``): embedding, norm, first matrix of the MLP with its
  bias; in a gated MLP this is the gate;
- a latent that reads a norm's output (``post_ln_attn``, ``post_ln_mlp``): embedding, norm, encoder;
- a latent that reads the stream (``resid.post_emb``, ``post_attn``, ``post_mlp``): embedding, encoder;
- a latent that reads what a part of the model computes (``attn.v_out``, ``delta_attn``,
  ``mlp.post_act``, ``delta_mlp``): embedding, norm, attention (to the token itself) or MLP, encoder. The
  model runs over its whole vocabulary for this, up to that layer: a minute for a late layer of GPT-2
  small.

In layer 0 this is exact for what attention reads at a token's place (with ``position=``, where a model
adds positions to its embeddings). Behind attention, and in later layers, it is the *direct path only*:
what earlier parts add to the stream is not in it, and neither is their part in the norm's scale. The
pre-activation is what stands before the nonlinearity; with TopK it does not say whether the latent is
among the ``k`` largest.

Shape legend: ``m`` units, ``k`` tokens of a list, ``n`` inputs of an autoencoder, ``d`` model width,
``f`` MLP width, ``v`` vocabulary, ``t`` tokens of a piece.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron_explainer.analysis.hardly_trained import TokenTexts, find_hardly_trained
from neuron_explainer.analysis.token_lists import (
    TokenValue,
    TokenValues,
    lists_as_html,
    lists_as_text,
)
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import WeightLocationType
from neuron_explainer.progress import progress_bar

_NORMED = ("resid.torso.post_ln_attn", "resid.torso.post_ln_mlp")
_STREAM = ("resid.post_emb", "resid.torso.post_attn", "resid.torso.post_mlp")
_NEURONS = ("mlp.pre_act", "mlp.post_act")
_OF_ATTENTION = ("attn.v_out", "resid.torso.delta_attn")
_OF_MLP = ("mlp.post_act", "resid.torso.delta_mlp")
_TOKENS_AT_ONCE = 2**11


@dataclass(frozen=True, repr=False)
class InputTokens:
    """The tokens whose embeddings alone give a unit the largest and the smallest pre-activation."""

    unit: str
    """Such as ``"neuron 17 of 3/mlp.post_act"``."""
    top: TokenValues
    """Largest pre-activation first."""
    bottom: TokenValues
    """Smallest pre-activation first."""
    direct_path_only: bool
    """Whether the unit reads more than the embedding: what earlier parts of the model add."""
    n_left_out: int
    """How many hardly trained tokens are left out of the two lists."""

    @property
    def note(self) -> str:
        """How the numbers are meant, in one sentence."""
        parts = ["pre-activation when the stream holds the token's embedding alone"]
        if self.direct_path_only:
            parts.append("direct path only: what earlier parts of the model add is not in it")
        if self.n_left_out:
            parts.append(f"{self.n_left_out:,} hardly trained tokens left out")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"{self.unit} ({self.note})\n{lists_as_text(_TITLES, self.top, self.bottom)}"

    def _repr_html_(self) -> str:
        return (
            f"<div><b>{html.escape(self.unit)}</b><br><small>{html.escape(self.note)}</small>"
            f"{lists_as_html(_TITLES, self.top, self.bottom)}</div>"
        )


_TITLES = ("excited by", "least by")


def input_tokens(
    context: ModelContext,
    what: Autoencoder | LocationLike,
    unit: int,
    k: int = 10,
    *,
    location: LocationLike | None = None,
    position: int | None = None,
    keep_hardly_trained: bool = False,
) -> InputTokens:
    """The tokens whose embeddings excite one unit most and least.

    For more than one unit make an :class:`InputReader` once; the arguments are its own.
    """
    reader = InputReader(
        context,
        what,
        location=location,
        position=position,
        keep_hardly_trained=keep_hardly_trained,
    )
    return reader.top_tokens([unit], k)[0]


@torch.no_grad()
def tokens_along(
    context: ModelContext,
    direction: Tensor,
    k: int = 10,
    *,
    embedding: Tensor | None = None,
    listed: Tensor | None = None,
) -> TokenValues:
    """The tokens whose embeddings lie furthest along a direction ``[d]`` of the stream, largest first.

    Along the gradient of a unit's pre-activation these are the tokens that would excite it most, to
    first order. Values are relative to the mean over the vocabulary.

    Args:
        embedding: ``[v, d]``; None: it is read from the model.
        listed: ``[v]`` bool, which tokens may be listed; None: those that training touched.
    """
    if embedding is None:
        embedding = context.get_weight(WeightLocationType.EMBEDDING)
    texts = TokenTexts(context)
    if listed is None:
        listed = ~find_hardly_trained(embedding, texts).marked
    values = embedding @ direction.to(embedding)
    values = (values - values.mean()).float().cpu()
    ids = listed.nonzero().flatten()
    best, places = top_k(values[ids], min(k, len(ids)))
    tokens = ids[places].tolist()
    return tuple(map(TokenValue, tokens, texts(tokens), best.tolist()))


class InputReader:
    """Reads the pre-activations of units for every token of a vocabulary.

    Args:
        context: the model, which is loaded.
        what: an autoencoder, or ``"3/mlp.post_act"`` for the neurons of a layer.
        location: where the autoencoder reads; None: the location that it records itself.
        position: add the embedding of this position; for models that have such embeddings.
        keep_hardly_trained: keep tokens that training hardly touched in the lists.
    """

    def __init__(
        self,
        context: ModelContext,
        what: Autoencoder | LocationLike,
        *,
        location: LocationLike | None = None,
        position: int | None = None,
        keep_hardly_trained: bool = False,
    ) -> None:
        self.context = context
        self.autoencoder = what if isinstance(what, Autoencoder) else None
        self.location = _read_location(what, location)
        if self.location.site.per_layer:
            self.location.expand(context.n_layers)
            self.location.depth(context.n_layers)
        self._check_place()
        self._position = None if position is None else self._position_embedding(position)
        self._texts = TokenTexts(context)
        embedding = context.get_weight(WeightLocationType.EMBEDDING)
        marks = find_hardly_trained(embedding, self._texts).marked
        self._listed = torch.ones_like(marks) if keep_hardly_trained else ~marks
        self._embedding = embedding

    @property
    def n_units(self) -> int:
        """How many units there are."""
        return self.context.n_neurons if self.autoencoder is None else self.autoencoder.n_latents

    @property
    def direct_path_only(self) -> bool:
        """Whether units read more than the embedding: what earlier parts of the model add."""
        path = self.location.path
        if path == "resid.post_emb":
            return False
        return self.location.layer != 0 or path not in (_NORMED[0], *_OF_ATTENTION)

    @torch.no_grad()
    def pre_activations(self, units: Sequence[int], *, progress: bool = False) -> Tensor:
        """Of each unit for each token of the vocabulary, ``[m, v]`` float32."""
        for unit in units:
            if not 0 <= unit < self.n_units:
                raise InputError(
                    f"there is no unit {unit} at {self.location}: they are 0 to {self.n_units - 1}."
                )
        read = self._neurons(units) if self.autoencoder is None else self._latents(units)
        n_tokens = len(self._embedding)
        found = []
        with progress_bar(total=n_tokens, desc="tokens", disable=not progress) as bar:
            for tokens in torch.split(torch.arange(n_tokens), _TOKENS_AT_ONCE):
                found.append(read(self._inputs(tokens)).float().t())
                bar.update(len(tokens))
        return torch.cat(found, dim=1)

    def top_tokens(
        self, units: Sequence[int], k: int = 10, *, progress: bool = False
    ) -> list[InputTokens]:
        """The ``k`` tokens with the largest and the smallest pre-activation of each unit."""
        values = self.pre_activations(units, progress=progress).cpu()
        ids = self._listed.nonzero().flatten()
        k = min(k, len(ids))
        noun = "neuron" if self.autoencoder is None else "latent"
        results = []
        for unit, row in zip(units, values[:, ids], strict=True):
            top, bottom = (self._list(ids, row, k, sign) for sign in (1, -1))
            results.append(
                InputTokens(
                    f"{noun} {unit} of {self.location}",
                    top,
                    bottom,
                    self.direct_path_only,
                    int((~self._listed).sum()),
                )
            )
        return results

    def __repr__(self) -> str:
        return f"InputReader({self.n_units:,} units at {self.location}, {self.context.model_name})"

    # --- parts ---

    def _list(self, ids: Tensor, row: Tensor, k: int, sign: int) -> TokenValues:
        values, places = top_k(sign * row, k)
        tokens = ids[places].tolist()
        return tuple(map(TokenValue, tokens, self._texts(tokens), (sign * values).tolist()))

    def _check_place(self) -> None:
        path = self.location.path
        known = (
            _NEURONS if self.autoencoder is None else (*_STREAM, *_NORMED, *_OF_ATTENTION, *_OF_MLP)
        )
        if path not in known:
            raise LocationError(
                f"what units read at {self.location} is not known; expected one of {', '.join(known)}."
            )

    def _position_embedding(self, position: int) -> Tensor:
        rows = self.context.get_weight(WeightLocationType.POSITION_EMBEDDING)
        if not 0 <= position < len(rows):
            raise InputError(f"position must be 0 to {len(rows) - 1}, found {position}.")
        return rows[position]

    def _stream(self, tokens: Tensor) -> Tensor:
        """The embeddings ``[t, d]`` as the stream."""
        x = self._embedding[tokens.to(self._embedding.device)]
        return x if self._position is None else x + self._position

    def _inputs(self, tokens: Tensor) -> Tensor:
        """What stands at the location for each token alone, ``[t, n]``."""
        x, path, layer = self._stream(tokens), self.location.path, self.location.layer
        model = self.context.get_or_create_model()
        x = x.to(model.device, model.dtype)
        if path in _STREAM:
            return x
        if path in _NORMED:
            return self._apply(model.reader(self.location), x)
        if self.autoencoder is None:
            normed = ActivationLocation("resid.torso.post_ln_mlp", layer)
            return self._apply(model.reader(normed), x)
        return self._run(tokens, x)

    @staticmethod
    def _apply(module: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = module(x)
        return found

    def _run(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The model's own pass over single tokens, with the stream set before the part that is read."""
        model = self.context.get_or_create_model()
        hooks = TransformerHooks().append_at(self._before_part(), lambda stream: x[:, None])
        caught = model.capture(tokens[:, None].to(model.device), self.location, hooks=hooks)
        return caught[self.location].reshape(len(tokens), -1)

    def _before_part(self) -> ActivationLocation:
        """The stream that the attention or the MLP of this layer reads."""
        layer = self.location.layer
        assert layer is not None
        serial = "resid.torso.post_attn" in self.context.get_or_create_model().paths
        if self.location.path in _OF_MLP and serial:
            return ActivationLocation("resid.torso.post_attn", layer)
        if layer == 0:
            return ActivationLocation("resid.post_emb")
        return ActivationLocation("resid.torso.post_mlp", layer - 1)

    def _latents(self, units: Sequence[int]) -> Callable[[Tensor], Tensor]:
        autoencoder = self.autoencoder
        assert autoencoder is not None
        dtype, device = autoencoder.dtype, autoencoder.device

        def read(x: Tensor) -> Tensor:
            x = x.to(device, dtype)
            parts = [autoencoder.encode_pre_act(x, slice(unit, unit + 1)) for unit in units]
            return torch.cat(parts, dim=-1)

        return read

    def _neurons(self, units: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The MLP's first matrix, for these neurons alone.

        The module is an affine map, stored in one way or another: its rows are read off by applying it
        to the unit vectors.
        """
        model = self.context.get_or_create_model()
        module = model.reader(ActivationLocation("mlp.pre_act", self.location.layer))
        chosen = torch.tensor(list(units), device=model.device)
        d = self.context.n_residual_stream_channels
        unit_vectors = torch.eye(d, device=model.device, dtype=model.dtype)
        bias = self._apply(module, torch.zeros_like(unit_vectors[:1]))[:, chosen]
        weight = torch.cat(
            [
                self._apply(module, some)[:, chosen] - bias
                for some in torch.split(unit_vectors, _TOKENS_AT_ONCE)
            ]
        )
        return lambda normed: normed @ weight + bias


def _read_location(
    what: Autoencoder | LocationLike, location: LocationLike | None
) -> ActivationLocation:
    if not isinstance(what, Autoencoder):
        return ActivationLocation.parse(what)
    if location is not None:
        return ActivationLocation.parse(location)
    if what.location is None:
        raise InputError(
            f"{what._name()}: it does not record where in the model it reads; say so with location=, such "
            "as location='3/resid.torso.post_ln_mlp'."
        )
    return what.location
