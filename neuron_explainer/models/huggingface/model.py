"""Any causal language model of Hugging Face, run with our hooks: :class:`HuggingFaceModel`.

The model's own code computes. How our hooks come into it is described in
:mod:`~neuron_explainer.models.huggingface.hooking`.

Shape legend: ``b`` batch, ``s`` sequence (of this call), ``k`` tokens of earlier calls and of this one,
``v`` vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from neuron_explainer.errors import InputError, LocationError, SourceError
from neuron_explainer.models.hooks import NO_HOOKS, TransformerHooks
from neuron_explainer.models.huggingface.families import (
    Architecture,
    architecture_of,
    attention_window,
    counts_places,
    sizes_of,
)
from neuron_explainer.models.huggingface.hooking import HookedCall, Wiring, find_module
from neuron_explainer.models.huggingface.tokenizer import HuggingFaceTokenizer
from neuron_explainer.models.kv_cache import State
from neuron_explainer.models.language_model import LanguageModel, Prompts, Step
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.sampling import prep_input_and_pad
from neuron_explainer.models.weight_names import (
    Dimension,
    LayerIndex,
    WeightLocationType,
)

# Layers of transformers' caches that replace their tensors and never write into them.
_REPLACING_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


class HuggingFaceState(State):
    """What a model keeps between calls: transformers' cache, and which tokens so far are pads."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None
        """transformers' cache of keys and values."""
        self.pad: Tensor | None = None
        """Pad mask ``[b, k]`` of all tokens so far."""
        self.sizes: dict[Dimension, int] | None = None
        """Sizes of the model that has filled it."""

    def copy(self) -> "HuggingFaceState":
        new = copy.copy(self)
        # Tensors that carry gradients cannot be deep-copied; the rest of the cache can.
        layers = getattr(self.cache, "layers", [])
        tensors = [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)]
        new.cache = copy.deepcopy(self.cache, {id(tensor): tensor.clone() for tensor in tensors})
        return new

    def _undo(self) -> Callable[[], None]:
        cache, pad, sizes = self.cache, self.pad, self.sizes
        layers = getattr(cache, "layers", None)
        if layers is not None and all(type(x).__name__ in _REPLACING_LAYERS for x in layers):
            before = [(layer, dict(vars(layer))) for layer in layers]
            outside = dict(vars(cache)) | {"layers": list(layers)}
        else:  # it may write into its tensors
            before, outside, cache = [], {}, self.copy().cache

        def restore() -> None:
            self.cache, self.pad, self.sizes = cache, pad, sizes
            for layer, values in [(cache, outside), *before]:
                if values:
                    vars(layer).clear()
                    vars(layer).update(values)

        return restore

    def __repr__(self) -> str:
        shape = (
            "empty" if self.pad is None else f"{self.pad.shape[1]} tokens, batch {len(self.pad)}"
        )
        return f"HuggingFaceState({shape})"


class HuggingFaceModel(LanguageModel):
    """A model of transformers with the calls of :class:`~neuron_explainer.models.transformer.Transformer`.

    Models that keep no keys and values (Mamba, RWKV) run too, with three differences: pads must be on
    the right, a call cannot continue from an earlier one, and :meth:`sample` reads the whole text at
    each step, so hooks see all tokens then.

    Args:
        model: any causal language model; it is put in eval mode, and not changed otherwise.
        tokenizer: what reads and writes its text; None: token ids only.
        architecture: where the places of the hook tree are; default: the entry of the family's table.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: HuggingFaceTokenizer | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self._given = architecture  # None: that of the family
        if architecture is None:
            architecture = architecture_of(model.config)
        self.architecture = architecture.for_config(self.config)
        self.tokenizer = tokenizer
        self.sizes: dict[Dimension, int] = sizes_of(self.config)
        self._wiring = Wiring(model, self.architecture, self.sizes.get(Dimension.ATTN_HEADS))
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        recurrent = getattr(model, "_is_stateful", False) or Dimension.ATTN_HEADS not in self.sizes
        self._keeps_keys = "past_key_values" in self._accepts and not recurrent

    @property
    def name(self) -> str:
        """The name of the model's class, for errors."""
        return self._wiring.name

    @property
    def layers(self) -> list[nn.Module]:
        """The modules of the layers."""
        return self._wiring.layers

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def enc(self) -> HuggingFaceTokenizer:
        """The tokenizer."""
        if self.tokenizer is None:
            raise SourceError(f"{self.name} came without a tokenizer; give token ids, not text.")
        return self.tokenizer

    @property
    def paths(self) -> list[str]:
        """The hook paths that this architecture has."""
        return self.architecture.paths

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle or a copy is made of what the model was made of: the table of families has functions
        that cannot be pickled."""
        return type(self), (self.model, self.tokenizer, self._given)

    def __repr__(self) -> str:
        return f"HuggingFaceModel({self.name}, {self.n_layers} layers, {self.dtype}, {self.device})"

    @property
    def _activation_dtype(self) -> torch.dtype | None:
        mixed = any(p.dtype != self.dtype for p in self.model.parameters())
        return None if mixed else super()._activation_dtype

    @property
    def _fillers(self) -> set[int]:
        named = [getattr(self.config, f"{name}_token_id", None) for name in ("pad", "eos")]
        return super()._fillers | {token for token in named if isinstance(token, int)}

    # --- forward ---

    def __call__(
        self,
        tokens: Tensor | Prompts,
        H: HuggingFaceState | None = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
    ) -> tuple[Tensor, HuggingFaceState]:
        """Logits ``[b, s, v]`` of the next token after each token, and the state to continue from.

        Arguments are those of :meth:`Transformer.forward
        <neuron_explainer.models.transformer.Transformer.forward>`.
        """
        tokens, pad = self.to_batch(tokens, pad)
        if H is None:  # with H, a hook may be for tokens of another call
            self._check_whole(tokens, pad, hooks)
            H = HuggingFaceState()
        self._check_state(H)
        with H.restored_on_error():
            logits = self._run(tokens, H, pad, NO_HOOKS if hooks is None else hooks)
        assert logits is not None
        return logits, H

    def _check_state(self, H: object) -> None:
        if not isinstance(H, HuggingFaceState):
            raise InputError(
                f"H must be a HuggingFaceState, as an earlier call returned, found {H!r}."
            )
        if H.sizes is not None and H.sizes != self.sizes:
            raise InputError("H is the state of a model of other sizes.")
        if H.pad is not None and not self._keeps_keys:
            raise InputError(
                f"{self.name} keeps no keys and values to continue from: give all tokens in one call, or "
                "use sample."
            )

    def _run(
        self,
        tokens: Tensor,
        H: HuggingFaceState,
        pad: Tensor | None,
        hooks: TransformerHooks,
        *,
        use_cache: bool = True,
        last_only: bool = False,
        stop_at: tuple[nn.Module, str] | None = None,
    ) -> Tensor | None:
        """Logits ``[b, s, v]``, or ``[b, 1, v]`` of the last token alone; None if the pass stopped."""
        self._check_hooks(hooks)
        pad = self._advance(tokens, H, pad)
        pad = torch.zeros_like(tokens, dtype=torch.bool) if pad is None else pad
        H.pad = pad if H.pad is None else torch.cat([H.pad, pad], dim=1)
        H.sizes = self.sizes
        self._check_pads(H.pad)
        assert H.positions is not None
        use_cache = use_cache and self._keeps_keys
        output: Any = None
        with HookedCall(self._wiring, hooks, H.positions, stop_at).attached():
            output = self.model(**self._arguments(tokens, H, use_cache, last_only))
        if output is None:
            return None
        if use_cache:
            H.cache = output.past_key_values
        return hooks.logits(output.logits, layer=None, positions=H.positions)

    def _arguments(
        self, tokens: Tensor, H: HuggingFaceState, use_cache: bool, last_only: bool
    ) -> dict[str, Any]:
        assert H.pad is not None
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": (~H.pad).long(),
            "use_cache": use_cache,
            "return_dict": True,
        }
        if self._keeps_keys:
            arguments["past_key_values"] = H.cache
        if "position_ids" in self._accepts:  # the others have no positions, or count by the mask
            arguments["position_ids"] = H.positions
        if last_only and "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = 1
        return arguments

    def _check_pads(self, pad: Tensor) -> None:
        """Refuse pads with which a row would silently differ from its solo run."""
        if not self._keeps_keys and bool((pad[:, :-1] & ~pad[:, 1:]).any()):
            raise InputError(
                f"{self.name} has no attention that could leave out pads: a row with pads before its "
                "tokens would differ from its solo run. Pad on the right."
            )
        n_places, window = pad.shape[1], attention_window(self.config)
        if counts_places(self.config):
            context = self._context
            if context is not None and n_places > context:
                raise InputError(
                    f"a row would have {n_places} places, pads included, more than the context of "
                    f"{context}."
                )
            if _has_pads_between_tokens(pad):
                raise InputError(
                    f"{self.name} counts pads as tokens where it measures how far apart tokens are: a row "
                    "with pads between its tokens would differ from its solo run. Pad on the left."
                )
        # Sliding windows count pads as tokens.
        if window is not None and n_places > window and _has_pads_between_tokens(pad):
            raise InputError(
                f"{self.name} attends to the last {window} places of a row, pads included; a row with "
                f"pads between its tokens and {n_places} places in all would see other tokens "
                "than alone. Pad on the left."
            )

    # --- looking and sampling, for LanguageModel ---

    def _run_until(
        self,
        wanted: list[ActivationLocation],
        tokens: Tensor,
        pad: Tensor | None,
        hooks: TransformerHooks,
    ) -> None:
        stop_at = self._last_needed(wanted)
        self._run(tokens, HuggingFaceState(), pad, hooks, use_cache=False, stop_at=stop_at)

    def _last_needed(self, wanted: list[ActivationLocation]) -> tuple[nn.Module, str] | None:
        """The module, and its side, after which nothing more is needed; None if the whole pass is."""
        if any(place.path == "logits" for place in wanted):
            return None
        if any(place.site.stage == "final" for place in wanted):
            assert self._wiring.final_norm is not None
            return self._wiring.final_norm, "out"
        layers = [place.layer for place in wanted if place.layer is not None]
        return (self.layers[max(layers)], "out") if layers else (self.layers[0], "in")

    @contextmanager
    def _generation(
        self, n_rows: int, prompt_length: int, num_tokens: int, hooks: TransformerHooks | None
    ) -> Iterator[Step]:
        tree = NO_HOOKS if hooks is None else hooks
        # Hooks on the logits see those of every token, so all are computed then.
        last_only = tree.logits.is_empty()
        H = HuggingFaceState()

        def step(tokens: Tensor, pad: Tensor) -> Tensor:
            logits = self._run(tokens, H, pad, tree, last_only=last_only)
            assert logits is not None
            return logits[:, -1]

        yield step if self._keeps_keys else _Reader(self, tree)

    def _encode(self, text: str) -> list[int]:
        return self.enc.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self.enc.decode_continuation(ids)

    def _start_token(self) -> int:
        return self.enc.bos_token

    # --- norms ---

    @cached_property
    def norms_subtract_mean(self) -> bool:
        """Whether norms subtract the mean over the width (LayerNorm) or not (RMSNorm).

        Found by trying: the classes of such modules are many.
        """
        norm = self._wiring.final_norm
        if norm is None:
            raise LocationError(f"{self.name} has no norm before its unembedding.")
        width = self.sizes[Dimension.RESIDUAL_STREAM_CHANNELS]
        x = torch.linspace(-1, 1, width, device=self.device, dtype=self.dtype)[None]
        with torch.no_grad():
            plain, moved = norm(x).float(), norm(x + 1).float()
        return bool((plain - moved).norm() < 0.1 * plain.norm())

    @property
    def norms_what_is_added(self) -> bool:
        """Whether what attention and the MLP compute passes a norm before it is added to the stream."""
        tap = self.architecture.sites.get("resid.torso.delta_mlp")
        return tap is not None and "norm" in tap.module.rpartition(".")[2].lower()

    def _reader(self, place: ActivationLocation) -> nn.Module:
        if place.layer is None:
            if self._wiring.final_norm is None:
                raise LocationError(f"{self.name} has no norm before its unembedding.")
            return self._wiring.final_norm
        tap = self.architecture.sites.get(place.path)
        if tap is not None and tap.side == "out":
            return self._wiring.modules[place.layer][place.path]
        gains = {
            "resid.torso.post_ln_attn": WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN,
            "resid.torso.post_ln_mlp": WeightLocationType.LAYER_NORM_GAIN_PRE_MLP,
        }
        gain = gains.get(place.path)
        if gain is None or gain not in self.architecture.weights:
            raise LocationError(f"{self.name}: no single module is known that computes {place}.")
        path = self.architecture.weights[gain].parameter.partition(":")[0]
        return find_module(self.layers[place.layer], path)

    # --- weights ---

    def weight(self, location_type: WeightLocationType, layer: LayerIndex) -> Tensor:
        known = self.architecture.weights
        if location_type not in known:
            raise LocationError(
                f"{self.name} has no single weight {location_type.value!r}. It has: "
                f"{', '.join(kind.value for kind in known) or 'none that the architecture names'}."
            )
        path, _, name = known[location_type].parameter.partition(":")
        root = self.model if layer is None else self.layers[layer]
        parameter = getattr(find_module(root, path), name or "weight", None)
        if not isinstance(parameter, Tensor):
            raise LocationError(f"{self.name}: {path} has no {name or 'weight'}.")
        return known[location_type].layout(parameter, self.sizes)


def _has_pads_between_tokens(pad: Tensor) -> bool:
    """Whether a row of a pad mask ``[b, k]`` has a pad with tokens on both sides."""
    after_a_token = pad[:, 1:] & ~pad[:, :-1]
    before_a_token = (~pad).flip(1).cumsum(1).flip(1)[:, 1:] > 0
    return bool((after_a_token & before_a_token).any())


class _Reader:
    """The steps of a generation by a model that keeps no keys and values: each reads the whole text."""

    def __init__(self, model: HuggingFaceModel, hooks: TransformerHooks) -> None:
        self._model, self._hooks = model, hooks
        self._rows: list[list[int]] = []

    def __call__(self, tokens: Tensor, pad: Tensor) -> Tensor:
        new = [row[~skip].tolist() for row, skip in zip(tokens, pad, strict=True)]
        self._rows = [
            old + row for old, row in zip(self._rows or [[]] * len(new), new, strict=True)
        ]
        tokens, pad = prep_input_and_pad(self._rows, "right", tokens.device)
        logits, _ = self._model(tokens, HuggingFaceState(), pad, self._hooks)
        last = (~pad).sum(dim=-1) - 1
        return logits[torch.arange(len(last), device=last.device), last]
