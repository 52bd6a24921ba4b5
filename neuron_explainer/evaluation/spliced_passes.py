"""Forward passes of one batch of tokens: unchanged, and with the activation at one location replaced.

Nothing before the location changes, so a pass with a replacement starts at the location's layer, from
the residual stream that the unchanged pass had there. Models other than ours run the whole pass.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` width at a location, ``v`` vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.transformer import Transformer

_LOGITS = ActivationLocation("logits")


def stream_before(location: ActivationLocation, n_layers: int) -> ActivationLocation | None:
    """The residual stream from which a pass with a replacement at ``location`` can start.

    None if it must start from the tokens.
    """
    depth = location.depth(n_layers)
    return ActivationLocation("resid.torso.post_mlp", depth - 1) if depth else None


class SplicedPasses:
    """The passes of one batch.

    Args:
        model: the model of a context.
        tokens: ids ``[b, s]``.
        pad: pad mask ``[b, s]``, or None.
        locations: whose activations to keep; each must name one layer.
        logits: whether to keep logits too. Without them the pass stops after the last location, and
            nothing can be replaced.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        pad: Tensor | None,
        locations: Iterable[ActivationLocation],
        logits: bool = True,
    ) -> None:
        self.model = model
        self.tokens = tokens.to(model.device)
        self.pad = None if pad is None else pad.to(model.device)
        wanted = dict.fromkeys(locations)
        if logits:
            wanted |= dict.fromkeys(self._streams(wanted))
            wanted[_LOGITS] = None
        self._found = model.capture(self.tokens, list(wanted), self.pad)

    def activation(self, location: ActivationLocation) -> Tensor:
        """``[b, s, n]`` as the model has it; at locations with heads, their vectors are concatenated."""
        axes = location.site.shape
        if sum(axis in ("s", "q", "k") for axis in axes) != 1:
            raise InputError(
                f"{location}: expected a location with one vector a token, found axes "
                f"{', '.join(axes)}."
            )
        return self._found[location].flatten(2)

    @property
    def logits(self) -> Tensor:
        """``[b, s, v]`` with nothing replaced."""
        return self._found[_LOGITS]

    def replaced(self, location: ActivationLocation, value: Tensor) -> Tensor:
        """Logits ``[b, s, v]`` with ``value`` ``[b, s, n]`` in place of the activation at ``location``."""

        def replace(x: Tensor) -> Tensor:
            return value.to(x.dtype).view_as(x)

        hooks = TransformerHooks().append_at(location, replace)
        if not isinstance(self.model, Transformer):
            return self.model(self.tokens, pad=self.pad, hooks=hooks)[0]
        n_layers = self.model.cfg.n_layers
        x, state, pad, hooks = self.model.run_embed(self.tokens, None, self.pad, hooks)
        stream = stream_before(location, n_layers)
        if stream is not None:
            x = self._found[stream]
        for layer in list(self.model.layers)[location.depth(n_layers) :]:
            x, _ = layer(x, pad=pad, hooks=hooks, positions=state.positions)
        x, state = self.model.run_ln_f(x, state, hooks)
        return self.model.run_unembed(x, state, hooks)[0]

    def _streams(self, locations: Iterable[ActivationLocation]) -> list[ActivationLocation]:
        if not isinstance(self.model, Transformer):
            return []
        found = [stream_before(place, self.model.cfg.n_layers) for place in locations]
        return [stream for stream in found if stream is not None]


def scored(tokens: Tensor, pad: Tensor | None, bos: Tensor | None, score_bos: bool) -> Tensor:
    """``[b, s]`` bool: True where activations count, which is neither at pads nor, unless
    ``score_bos``, at start tokens."""
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if pad is not None:
        counted &= ~pad.to(tokens.device)
    if bos is not None and not score_bos:
        counted &= ~bos.to(tokens.device)
    return counted
