"""Any causal language model of Hugging Face, run with our hooks: :class:`HuggingFaceModel`.

The model's own code computes; how our hooks come into it stands in
:mod:`~neuron_explainer.models.huggingface.hooking`.

Shape legend: ``b`` batch, ``s`` sequence (of this call), ``k`` tokens of earlier calls and of this one,
``v`` vocabulary.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuron_explainer.errors import InputError, LocationError, SourceError, did_you_mean
from neuron_explainer.models.hooks import NO_HOOKS, TransformerHooks
from neuron_explainer.models.huggingface.families import (
    Architecture,
    Sizes,
    architecture_of,
    attention_window,
    sizes_of,
)
from neuron_explainer.models.huggingface.hooking import HookedCall, Wiring, find_module
from neuron_explainer.models.huggingface.tokenizer import HuggingFaceTokenizer
from neuron_explainer.models.language_model import (
    Activations,
    Sample,
    check_tokens,
    chooser,
    generate,
    make_generator,
    prepend,
    prompts_to_ids,
    stops_to_ids,
    with_recorder,
)
from neuron_explainer.models.locations import ActivationLocation, LocationLike, parse_locations
from neuron_explainer.models.sampling import (
    check_sampling_settings,
    prep_input_and_pad,
    prep_pos_from_pad_and_prev_lens,
)
from neuron_explainer.models.weight_names import (
    Dimension,
    LayerIndex,
    WeightLocationType,
)


class HuggingFaceState:
    """What a model keeps between calls: the cache, and which tokens so far are pads.

    A call updates the one it is given and returns it; :meth:`copy` branches a generation.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        """transformers' cache of keys and values."""
        self.prev_lens: Tensor | int = 0
        """Tokens so far that are no pads, ``[b, 1]``; 0 at the start."""
        self.positions: Tensor | None = None
        """Positions ``[b, s]`` of the tokens of the latest call; hooks are given them."""
        self.pad: Tensor | None = None
        """Pad mask ``[b, k]`` of all tokens so far."""

    def copy(self) -> "HuggingFaceState":
        """An independent copy."""
        new = copy.copy(self)
        # Tensors that carry gradients cannot be deep-copied; the rest of the cache can.
        layers = getattr(self.cache, "layers", [])
        tensors = [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)]
        new.cache = copy.deepcopy(self.cache, {id(tensor): tensor.clone() for tensor in tensors})
        return new

    def __repr__(self) -> str:
        shape = (
            "empty" if self.pad is None else f"{self.pad.shape[1]} tokens, batch {len(self.pad)}"
        )
        return f"HuggingFaceState({shape})"


class HuggingFaceModel:
    """A model of transformers with the calls of :class:`~neuron_explainer.models.transformer.Transformer`.

    Args:
        model: any causal language model; it is put in eval mode, and not changed otherwise.
        tokenizer: what reads and writes its text; None: token ids only.
        architecture: where things are in it; default: the table's entry for its family.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: HuggingFaceTokenizer | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config()
        if architecture is None:
            architecture = architecture_of(self.config)
        self.architecture = architecture.for_config(self.config)
        self.tokenizer = tokenizer
        self.sizes = sizes_of(self.config)
        self._wiring = Wiring(model, self.architecture, self.sizes[Dimension.ATTN_HEADS])
        self._accepts = frozenset(inspect.signature(model.forward).parameters)

    @property
    def name(self) -> str:
        """The class of the model, for errors."""
        return self._wiring.name

    @property
    def layers(self) -> list[nn.Module]:
        """The model's layers."""
        return self._wiring.layers

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def n_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding."""
        return self.sizes[Dimension.VOCAB_SIZE]

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

    def __repr__(self) -> str:
        return f"HuggingFaceModel({self.name}, {self.n_layers} layers, {self.dtype}, {self.device})"

    # --- forward ---

    def __call__(
        self,
        tokens: Tensor,
        H: HuggingFaceState | None = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
    ) -> tuple[Tensor, HuggingFaceState]:
        """Logits of the next token after each token.

        Args:
            tokens: ids ``[b, s]``, int64; in a continuation the new ones only.
            H: what an earlier call returned, to go on from it (it is updated in place).
            pad: ``[b, s]`` bool, True where a position is padding. Each row's result at its tokens is
                that of its solo run.
            hooks: what to see or replace on the way.

        Returns:
            Logits ``[b, s, v]`` and the state to go on from.
        """
        H = HuggingFaceState() if H is None else H
        logits = self._run(tokens, H, pad, hooks)
        assert logits is not None
        return logits, H

    def _run(
        self,
        tokens: Tensor,
        H: HuggingFaceState,
        pad: Tensor | None,
        hooks: TransformerHooks | None,
        *,
        use_cache: bool = True,
        last_only: bool = False,
        stop_at: tuple[nn.Module, str] | None = None,
    ) -> Tensor | None:
        """Logits ``[b, s, v]`` (of the last token alone: ``[b, 1, v]``); None where the pass stopped."""
        hooks = NO_HOOKS if hooks is None else hooks
        self._check_hooks(hooks)
        positions = self._advance(tokens, H, pad)
        output: Any = None
        with HookedCall(self._wiring, hooks, positions, stop_at).attached():
            output = self.model(**self._arguments(tokens, H, use_cache, last_only))
        if output is None:
            return None
        if use_cache:
            H.cache = output.past_key_values
        return hooks.logits(output.logits, layer=None, positions=positions)

    def _arguments(
        self, tokens: Tensor, H: HuggingFaceState, use_cache: bool, last_only: bool
    ) -> dict[str, Any]:
        assert H.pad is not None
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": (~H.pad).long(),
            "past_key_values": H.cache,
            "use_cache": use_cache,
            "return_dict": True,
        }
        if "position_ids" in self._accepts:  # models without positions, or which count by the mask
            arguments["position_ids"] = H.positions
        if last_only and "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = 1
        return arguments

    def _advance(self, tokens: Tensor, H: HuggingFaceState, pad: Tensor | None) -> Tensor:
        """Check the tokens and note their positions, which are returned, and pads in ``H``."""
        check_tokens(tokens, pad, self.n_vocab)
        if H.pad is not None and len(H.pad) != len(tokens):
            raise InputError(f"H holds a batch of {len(H.pad)}, tokens one of {len(tokens)}.")
        pad = torch.zeros_like(tokens, dtype=torch.bool) if pad is None else pad
        lens = (~pad).sum(dim=-1, keepdim=True) + H.prev_lens
        longest, context = int(lens.max()), self.sizes.get(Dimension.MAX_CONTEXT_LENGTH)
        if context is not None and longest > context:
            raise InputError(
                f"a row would have {longest} tokens, more than the context of {context}."
            )
        all_pads = pad if H.pad is None else torch.cat([H.pad, pad], dim=1)
        self._check_window(all_pads)
        positions = prep_pos_from_pad_and_prev_lens(pad, H.prev_lens)
        # A pad after a full context would stand one past the last position; where it stands is moot.
        H.positions = positions if context is None else positions.clamp(max=context - 1)
        H.prev_lens, H.pad = lens, all_pads
        return H.positions

    def _check_window(self, pad: Tensor) -> None:
        """Refuse what would go wrong without a word: sliding windows count pads as tokens."""
        window = attention_window(self.config)
        if window is None or pad.shape[1] <= window:
            return
        between = pad[:, 1:] & ~pad[:, :-1]  # a pad after a token …
        later = (~pad).flip(1).cumsum(1).flip(1)[:, 1:] > 0  # … and a token after that
        if bool((between & later).any()):
            raise InputError(
                f"{self.name} attends to the last {window} places of a row, pads included; a row with "
                f"pads between its tokens and {pad.shape[1]} places in all would see other tokens "
                "than alone. Pad on the left."
            )

    def _check_hooks(self, hooks: TransformerHooks) -> None:
        for path, leaf in hooks.leaves():
            if not leaf.is_empty():
                self.require(path.rpartition(".")[0])

    def require(self, path: str) -> None:
        """An error unless this architecture has the hook path."""
        if path not in self.paths:
            raise LocationError(
                f"{self.name} has no {path!r}.{did_you_mean(path, self.paths)} "
                f"It has: {', '.join(self.paths)}."
            )

    # --- looking and sampling ---

    def capture(
        self,
        tokens: Any,
        locations: LocationLike | Sequence[LocationLike],
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
        bos: bool | int = False,
    ) -> Activations:
        """The activations at any set of locations, from one forward pass.

        As :meth:`Transformer.capture <neuron_explainer.models.transformer.Transformer.capture>`: the
        pass stops after the last place needed; values are those after ``hooks``.
        """
        if not isinstance(tokens, Tensor):
            if pad is not None:
                raise InputError("pad goes with tokens as a tensor; prompts are padded here.")
            ids, _ = self._prompt_ids(tokens, bos)
            tokens, pad = prep_input_and_pad(ids, "right", self.device)
        elif bos is not False:
            check_tokens(tokens, pad, self.n_vocab)
            tokens, pad = prepend(tokens, pad, self._bos_id(bos))
        wanted = [
            place
            for location in parse_locations(locations)
            for place in location.expand(self.n_layers)
        ]
        for place in wanted:
            self.require(place.path)
        found = Activations(tokens, pad)
        hooks = with_recorder(hooks, wanted, found)
        stop_at = self._last_needed(wanted)
        self._run(tokens, HuggingFaceState(), pad, hooks, use_cache=False, stop_at=stop_at)
        return found

    def _last_needed(self, wanted: list[ActivationLocation]) -> tuple[nn.Module, str] | None:
        """The module, and the side of it, after which nothing is needed; None: all is."""
        if any(place.path == "logits" for place in wanted):
            return None
        if any(place.site.stage == "final" for place in wanted):
            assert self._wiring.final_norm is not None
            return self._wiring.final_norm, "out"
        layers = [place.layer for place in wanted if place.layer is not None]
        return (self.layers[max(layers)], "out") if layers else (self.layers[0], "in")

    @torch.no_grad()
    def sample(
        self,
        prompts: Any,
        num_tokens: int = 5,
        temperature: float = 1.0,
        top_p: float | None = None,
        hooks: TransformerHooks | None = None,
        *,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        stop: int | str | Sequence[int | str] | None = None,
        bos: bool | int = False,
    ) -> Sample:
        """Continue each prompt by up to ``num_tokens`` tokens.

        As :meth:`Transformer.sample <neuron_explainer.models.transformer.Transformer.sample>`; ``bos``
        True is the tokenizer's start token.
        """
        check_sampling_settings(num_tokens, temperature, top_k, top_p)
        ids, _ = self._prompt_ids(prompts, bos)
        self._check_room(max(map(len, ids)), num_tokens)
        H = HuggingFaceState()

        def step(tokens: Tensor, pad: Tensor) -> Tensor:
            # With hooks on the logits all are computed: those of every token are what hooks see.
            last_only = hooks is None or hooks.logits.is_empty()
            logits = self._run(tokens, H, pad, hooks, last_only=last_only)
            assert logits is not None
            return logits[:, -1]

        choose = chooser(temperature, top_k, top_p, make_generator(generator, seed, self.device))
        stops = stops_to_ids(stop, self._encode)
        rows = generate(step, ids, num_tokens, choose, stops, self.device)
        return Sample.of(rows, lambda: [self.enc.decode_continuation(row) for row in rows])

    def _check_room(self, longest: int, num_tokens: int) -> None:
        context = self.sizes.get(Dimension.MAX_CONTEXT_LENGTH)
        if context is not None and longest + num_tokens - 1 > context:
            raise InputError(
                f"the longest prompt has {longest} tokens; with num_tokens={num_tokens} that is more "
                f"than the context of {context} holds (the last token is not read)."
            )

    def _encode(self, text: str) -> list[int]:
        return self.enc.encode(text)

    def _prompt_ids(self, prompts: Any, bos: bool | int) -> tuple[list[list[int]], bool]:
        start = [] if bos is False else [self._bos_id(bos)]
        return prompts_to_ids(prompts, self._encode, start)

    def _bos_id(self, bos: bool | int) -> int:
        return self.enc.bos_token if bos is True else int(bos)

    # --- weights ---

    def weight(self, location_type: WeightLocationType, layer: LayerIndex) -> Tensor:
        """A weight with the axes of its spec; may be a view of the parameter."""
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
        return known[location_type].layout(parameter, self.head_sizes)

    @property
    def head_sizes(self) -> Sizes:
        """Sizes that layouts depend on."""
        return Sizes(
            self.sizes[Dimension.RESIDUAL_STREAM_CHANNELS],
            self.sizes[Dimension.ATTN_HEADS],
            self.sizes[Dimension.VALUE_CHANNELS],
        )
