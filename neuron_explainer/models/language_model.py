"""The base class of both kinds of model, with everything that they have in common.

:class:`LanguageModel` holds the calls and checks that do not depend on how a model computes:
prompts, captures, sampling, and what is refused.

Shape legend: ``b`` batch, ``s`` sequence, ``v`` vocabulary.
"""

import functools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from neuron_explainer.errors import (
    HookError,
    InputError,
    LocationError,
    NeuronExplainerError,
    did_you_mean,
)
from neuron_explainer.models.checks import check_seed, check_tensor
from neuron_explainer.models.devices import Device
from neuron_explainer.models.hooks import NO_HOOKS, AtLayers, HookNode, TransformerHooks
from neuron_explainer.models.kv_cache import State
from neuron_explainer.models.locations import (
    SITES,
    ActivationLocation,
    LocationLike,
    parse_locations,
)
from neuron_explainer.models.sampling import (
    check_sampling_settings,
    prep_input_and_pad,
    prep_pos_from_pad_and_prev_lens,
    sample_from_logits,
)
from neuron_explainer.models.weight_names import Dimension, LayerIndex, WeightLocationType

Encode = Callable[[str], list[int]]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""Text, token ids, or a list of either."""
Step = Callable[[Tensor, Tensor], Tensor]
"""Takes the next tokens and their pad mask ``[b, s]``; returns the logits ``[b, v]`` after the last."""

logger = logging.getLogger(__name__)

_READERS = (
    "resid.torso.post_ln_attn",
    "resid.torso.post_ln_mlp",
    "resid.post_ln_f",
    "mlp.pre_act",
)


class Activations(dict[ActivationLocation, Tensor]):
    """What :meth:`LanguageModel.capture` returns: ``{location: tensor}``. Keys may also be text."""

    def __init__(self, tokens: Tensor, pad: Tensor | None) -> None:
        super().__init__()
        self.tokens = tokens
        """The token ids ``[b, s]`` that were run, start token included."""
        self.pad = pad
        """Their pad mask ``[b, s]``, or None."""

    def __getitem__(self, key: LocationLike, /) -> Tensor:
        location = ActivationLocation.parse(key)
        if location not in self:
            raise KeyError(f"{location} was not captured; captured: {', '.join(map(str, self))}")
        return super().__getitem__(location)

    def get(self, key: LocationLike, default: Any = None, /) -> Any:
        return super().get(ActivationLocation.parse(key), default)

    def __contains__(self, key: object, /) -> bool:
        return super().__contains__(ActivationLocation.parse(key) if isinstance(key, str) else key)

    def _ipython_key_completions_(self) -> list[str]:
        """What notebooks and IPython offer after ``found["``."""
        return [str(location) for location in self]

    def __repr__(self) -> str:
        return "\n".join(
            [f"{key}: {list(value.shape)} {value.dtype}" for key, value in self.items()]
        )


class Sample(dict[str, Any]):
    """What ``sample`` returns: ``{"tokens": list[list[int]], "strings": list[str]}``.

    Token ids need no vocabulary. If the vocabulary is not available, ``strings`` is missing, and asking
    for it raises the error that says why.
    """

    reason: NeuronExplainerError | None = None

    @classmethod
    def of(cls, tokens: list[list[int]], decode: Callable[[], list[str]]) -> Self:
        """The tokens, and their text if it is available."""
        sample = cls(tokens=tokens)
        try:
            sample["strings"] = decode()
        except NeuronExplainerError as error:
            sample.reason = error
        return sample

    def __missing__(self, key: str) -> Any:
        if key == "strings" and self.reason is not None:
            raise self.reason
        raise KeyError(key)


class LanguageModel(ABC):
    """A causal language model with hooks: what our own and Hugging Face's models both promise.

    - Hooks are given to a call, and the model keeps none. A tree with hooks for layers or places that
      this model lacks is refused.
    - Each row of a padded batch gets the result that it has alone.
    - ``model(tokens, H)`` continues from the state ``H`` of an earlier call. If a call raises, ``H`` is
      as it was before. The state of a model of other sizes is refused.
    """

    sizes: Mapping[Dimension, int]
    """Length of each axis. A size that this model does not have is absent."""

    # --- what each kind of model defines ---

    @abstractmethod
    def __call__(
        self,
        tokens: "Tensor | Prompts",
        H: Any = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits ``[b, s, v]`` and the state to continue from."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the parameters."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""

    @abstractmethod
    def weight(self, location_type: WeightLocationType, layer: LayerIndex) -> Tensor:
        """A weight with the axes that ``location_type.shape_spec`` names; may be a view of the parameter."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of tokens that continue another text."""

    @abstractmethod
    def _start_token(self) -> int:
        """The start token; an InputError with a way out if the model has none."""

    @abstractmethod
    def _run_until(
        self,
        wanted: list[ActivationLocation],
        tokens: Tensor,
        pad: Tensor | None,
        hooks: TransformerHooks,
    ) -> None:
        """Run a pass that ends after the last of the places in ``wanted``."""

    @abstractmethod
    def _reader(self, place: ActivationLocation) -> nn.Module:
        """The module of :meth:`reader`, for a place that is checked."""

    @abstractmethod
    def _generation(
        self, n_rows: int, prompt_length: int, num_tokens: int, hooks: TransformerHooks | None
    ) -> AbstractContextManager[Step]:
        """A context in which one generation runs; its value computes the next logits."""

    # --- what it is ---

    @property
    def name(self) -> str:
        """What the model is called in errors."""
        return type(self).__name__

    @property
    def paths(self) -> Sequence[str]:
        """The hook paths that this model has, in the order of a forward pass."""
        return list(SITES)

    def reader(self, location: LocationLike) -> nn.Module:
        """The module that computes a place from the residual stream, or from a norm of it.

        These are the norms before attention (``3/resid.torso.post_ln_attn``), before the MLP
        (``3/resid.torso.post_ln_mlp``) and at the end (``resid.post_ln_f``), ``[…, d] -> […, d]``; and
        the MLP's first matrix (``3/mlp.pre_act``; in a gated MLP the gate's), which reads the norm's
        output, ``[…, d] -> […, f]``.
        """
        place = ActivationLocation.parse(location)
        if place.path not in _READERS:
            raise LocationError(
                f"{place} is not computed by one module from a norm or from the residual stream; "
                f"these are: {', '.join(_READERS)}."
            )
        place.depth(self.n_layers)  # a layer must be named, …
        place.expand(self.n_layers)  # … and exist
        return self._reader(place)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.sizes[Dimension.LAYERS]

    @property
    def n_vocab(self) -> int:
        """Number of rows of the embedding; may be more than the tokenizer knows."""
        return self.sizes[Dimension.VOCAB_SIZE]

    @property
    def _activation_dtype(self) -> torch.dtype | None:
        """The dtype of activations; None if it is not the same everywhere."""
        return None if torch.is_autocast_enabled(self.device.type) else self.dtype

    @property
    def _fillers(self) -> set[int]:
        """Tokens with which batches are filled up: 0, which :meth:`to_batch` uses, and those of others."""
        return {0}

    @property
    def _context(self) -> int | None:
        """The most tokens that a row may have; None if there is no limit."""
        return self.sizes.get(Dimension.MAX_CONTEXT_LENGTH)

    # --- prompts ---

    def prompt_ids(self, prompts: Prompts, bos: bool | int = False) -> list[list[int]]:
        """Token ids of prompts in any form that :meth:`sample` takes, after the start token if asked."""
        start = [] if bos is False else [self._bos_id(bos)]
        ids = prompts_to_ids(prompts, self._encode, start)
        for row in ids:
            if (low := min(row)) < 0 or max(row) >= self.n_vocab:
                raise _unknown_token(low if low < 0 else max(row), self.n_vocab)
        return ids

    def to_batch(
        self, tokens: Tensor | Prompts, pad: Tensor | None = None, bos: bool | int = False
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids ``[b, s]`` and their pad mask: prompts are padded on the right, a tensor stays."""
        if not isinstance(tokens, Tensor):
            if pad is not None:
                raise InputError(
                    "pad belongs to tokens that are a tensor. Prompts are padded here: leave pad out."
                )
            return prep_input_and_pad(self.prompt_ids(tokens, bos), "right", self.device)
        if bos is False:
            return tokens, pad
        check_tokens(tokens, pad, self.n_vocab, self.device)
        return prepend(tokens, pad, self._bos_id(bos))

    def _bos_id(self, bos: bool | int) -> int:
        if not isinstance(bos, int):
            raise InputError(f"bos must be True, False or a token id, found {bos!r}.")
        return self._start_token() if bos is True else bos

    # --- checks that begin every call ---

    def require(self, path: str) -> None:
        """Raise a LocationError unless this model has the hook path."""
        if path not in self.paths:
            raise LocationError(
                f"{self.name} has no {path!r}.{did_you_mean(path, self.paths)} "
                f"It has: {', '.join(self.paths)}."
            )

    def _check_hooks(self, hooks: object, end: int | None = None) -> None:
        """Refuse anything but a tree for a whole model, and hooks for what this model or a text of
        ``end`` tokens lacks."""
        if not isinstance(hooks, TransformerHooks):
            found = repr(hooks) if isinstance(hooks, HookNode) else type(hooks).__name__
            raise HookError(
                "hooks must be a TransformerHooks tree, such as `TransformerHooks().append_at("
                f"'3/mlp.post_act', hook)`, found {found}."
            )
        if hooks is NO_HOOKS:
            return
        for path, leaf in hooks.leaves():
            if not leaf.is_empty():
                self.require(path.rpartition(".")[0])
        hooks.check_model(self.sizes, end)
        for path, autoencoder in hooks.autoencoders():
            self._check_width(path.rpartition(".")[0], autoencoder.n_inputs)
            dtype = self._activation_dtype
            if dtype is not None and autoencoder.dtype not in (None, dtype):
                raise HookError(
                    f"{path}: the autoencoder is {autoencoder.dtype}, the model {dtype}; convert one of them "
                    f"with .to(dtype), or load the autoencoder with dtype={dtype}."
                )

    def _check_width(self, path: str, n_inputs: int | None) -> None:
        """Refuse an autoencoder that is spliced in where activations have another width."""
        site = SITES[path]
        try:
            width = site.width(self.sizes.__getitem__)
        except KeyError:  # a model without this size
            return
        heads = self.sizes.get(Dimension.ATTN_HEADS, 1) if site.shape[-1] == "d_head" else 1
        if n_inputs not in (None, width, width * heads):
            joined = f", {width * heads} with its heads joined" if heads > 1 else ""
            raise InputError(
                f"{path}: the autoencoder takes inputs of width {n_inputs}, {self.name} has width {width} "
                f"there{joined}."
            )

    def _check_whole(
        self, tokens: Tensor, pad: Tensor | None, hooks: TransformerHooks | None
    ) -> None:
        """Refuse hooks for positions that a text lacks which is given whole, not to be continued."""
        if hooks is not None:
            check_tokens(tokens, pad, self.n_vocab, self.device)
            self._check_hooks(hooks, longest_row(tokens, pad))

    def _advance(self, tokens: Tensor, H: State, pad: Tensor | None) -> Tensor | None:
        """Check the tokens of a call, and note in ``H`` their positions and the new lengths of the rows.

        Returns:
            The pad mask ``[b, s]``; None if nothing is padded.
        """
        check_tokens(tokens, pad, self.n_vocab, self.device)
        if pad is None and isinstance(H.prev_lens, int):
            _warn_of_pads(tokens, self._fillers)
        if self.dtype is torch.float16 and tokens.is_cpu:
            _say_that_float16_is_slow()
        if isinstance(H.prev_lens, Tensor) and len(H.prev_lens) != len(tokens):
            raise InputError(
                f"H holds a batch of {len(H.prev_lens)} rows, tokens one of {len(tokens)}."
            )
        if pad is not None and not pad.any():
            pad = None
        if pad is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            positions = positions + H.prev_lens
            lens = tokens.new_full((tokens.shape[0], 1), tokens.shape[1])
        else:
            positions = prep_pos_from_pad_and_prev_lens(pad, H.prev_lens)
            lens = (~pad).sum(dim=-1, keepdim=True)
        lens = lens + H.prev_lens
        if self._context is not None:
            if (longest := int(lens.max())) > self._context:
                raise InputError(
                    f"a row would have {longest} tokens, more than the context of {self._context}."
                )
            # A pad after a full context would have one position too many; pads may have any.
            positions = positions.clamp(max=self._context - 1)
        H.positions, H.prev_lens = positions, lens
        return pad

    # --- looking and sampling ---

    def capture(
        self,
        tokens: Tensor | Prompts,
        locations: LocationLike | Sequence[LocationLike],
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
        bos: bool | int = False,
    ) -> Activations:
        """The activations at any set of locations, from one forward pass.

        The pass stops after the last layer needed. Values are those after ``hooks``. They are not
        copies, but nothing changes them afterwards. Use ``torch.no_grad()`` if you want no gradient.

        Args:
            tokens: ids ``[b, s]``, or prompts as :meth:`sample` takes them (padded on the right).
            locations: such as ``"3/mlp.post_act"``; without a layer it means every layer.
            pad: pad mask ``[b, s]``, if tokens are a tensor.
            hooks: what to replace on the way.
            bos: prepend the start token (True: the tokenizer's; or a token id). It is then position 0
                of everything returned.

        Returns:
            ``{location: tensor}``, with the tokens and their pad mask as attributes.
        """
        tokens, pad = self.to_batch(tokens, pad, bos)
        self._check_whole(tokens, pad, hooks)
        wanted = [
            place
            for location in parse_locations(locations)
            for place in location.expand(self.n_layers)
        ]
        for place in wanted:
            self.require(place.path)
        found = Activations(tokens, pad)
        self._run_until(wanted, tokens, pad, with_recorder(hooks, wanted, found))
        return found

    @torch.no_grad()
    def sample(
        self,
        prompts: Prompts,
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

        Args:
            prompts: text, token ids, or a list of either, of any lengths.
            temperature: 0 takes the likeliest token each time.
            top_p: draw from the nucleus only
                (:func:`~neuron_explainer.models.sampling.nucleus_sample`); None or 1: from all tokens.
            hooks: run at every step on the new tokens; ``positions`` tells a hook which they are.
                Hooks on keys and values see all tokens so far.
            top_k: draw from the ``top_k`` likeliest only.
            generator: makes the draws. Or give ``seed`` for a new one. Default: torch's global one.
            stop: tokens that end a row, as ids or as text such as ``"<|endoftext|>"``. They are not
                returned. None: each row gets exactly ``num_tokens``.
            bos: prepend the start token (True: the tokenizer's; or a token id).

        Returns:
            ``{"tokens": list[list[int]], "strings": list[str]}``: the new tokens of each prompt.
        """
        check_sampling_settings(num_tokens, temperature, top_k, top_p)
        ids = self.prompt_ids(prompts, bos)
        longest = max(map(len, ids))
        self._check_room(longest, num_tokens, hooks)
        choose = _chooser(temperature, top_k, top_p, _make_generator(generator, seed, self.device))
        stops = _stops_to_ids(stop, self._encode)
        with self._generation(len(ids), longest, num_tokens, hooks) as step:
            rows = _generate(step, ids, num_tokens, choose, stops, self.device)
        return Sample.of(rows, lambda: [self._decode(row) for row in rows])

    def stream(
        self,
        prompt: str | Sequence[int],
        num_tokens: int = 5,
        temperature: float = 1.0,
        top_p: float | None = None,
        hooks: TransformerHooks | None = None,
        *,
        top_k: int | None = None,
        seed: int | None = None,
        bos: bool | int = False,
    ) -> Iterator[tuple[int, float]]:
        """The tokens that :meth:`sample` draws for one prompt, each as soon as it is drawn.

        What is wrong with the arguments is raised by the call, before the first token is asked for.

        Returns:
            Of each token its id, and the probability that the model gives it (whatever the temperature is).
        """
        check_sampling_settings(num_tokens, temperature, top_k, top_p)
        ids = self.prompt_ids(prompt, bos)
        if len(ids) > 1:
            raise InputError(f"stream takes one prompt, found {len(ids)}.")
        self._check_room(len(ids[0]), num_tokens, hooks)
        choose = _chooser(temperature, top_k, top_p, _make_generator(None, seed, self.device))
        return self._stream(ids, num_tokens, choose, hooks)

    @torch.no_grad()
    def _stream(
        self,
        ids: list[list[int]],
        num_tokens: int,
        choose: Callable[[Tensor], Tensor],
        hooks: TransformerHooks | None,
    ) -> Iterator[tuple[int, float]]:
        tokens, pad = prep_input_and_pad(ids, "left", self.device)
        with self._generation(1, len(ids[0]), num_tokens, hooks) as step:
            for _ in range(num_tokens):
                logits = step(tokens, pad)
                chosen = choose(logits)
                yield int(chosen), float(logits.double().softmax(dim=-1)[0, chosen])
                tokens, pad = chosen[:, None], torch.zeros_like(chosen[:, None], dtype=torch.bool)

    def _check_room(self, longest: int, num_tokens: int, hooks: TransformerHooks | None) -> None:
        """Refuse a generation that is longer than the context, and hooks for positions beyond it."""
        if hooks is not None:
            self._check_hooks(hooks, longest + num_tokens - 1)
        if self._context is not None and longest + num_tokens - 1 > self._context:
            raise InputError(
                f"the longest prompt has {longest} tokens; with num_tokens={num_tokens} that is more "
                f"than the context of {self._context} holds (the last token is not read)."
            )


class UnmarkedPadsWarning(UserWarning):
    """Tokens that look like a padded batch were run without a pad mask."""


def _warn_of_pads(tokens: Tensor, fillers: set[int]) -> None:
    """Warn if some rows of ``[b, s]``, but not all, begin or end with the same filler twice."""
    if len(tokens) < 2 or tokens.shape[1] < 3:
        return
    for edge, side in ((tokens[:, -2:], "ends"), (tokens[:, :2], "begins")):
        for filler in sorted(fillers):
            rows = (edge == filler).all(dim=1).nonzero().flatten().tolist()
            if 0 < len(rows) < len(tokens):
                warnings.warn(
                    f"row {rows[0]} of tokens {side} with token {filler} repeated, as if it were padded, and "
                    "no pad mask is given: the pads are read as text. Give pad=, which is True at pads, "
                    "or give the prompts themselves, which are padded and masked here.",
                    UnmarkedPadsWarning,
                    stacklevel=2,
                )
                return


@functools.cache  # once a process
def _say_that_float16_is_slow() -> None:
    logger.warning(
        "A model in float16 is slow on a CPU (about five times slower than in float32). Load it with "
        "dtype=torch.float32, or convert it with model.float()."
    )


def prompts_to_ids(prompts: Any, encode: Encode, start: Sequence[int] = ()) -> list[list[int]]:
    """Prompts in any accepted form as lists of token ids.

    Args:
        prompts: text, token ids, or a list of either.
        encode: turns text into token ids.
        start: tokens to put before each prompt.
    """
    if not isinstance(prompts, str | Sequence):
        raise InputError(f"prompts must be text or token ids, found {type(prompts).__name__}.")
    batch: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if batch and all(isinstance(p, int) and not isinstance(p, bool) for p in batch):
        batch = [batch]
    if not batch:
        raise InputError("prompts must hold at least one prompt, found none.")
    is_text = all(isinstance(p, str) for p in batch)
    if not is_text and not all(
        isinstance(p, Sequence) and all(isinstance(i, int) for i in p) for p in batch
    ):
        raise InputError(
            "prompts must be a str, a list of str, a list of token ids, or a list of lists of "
            f"token ids, found {type(prompts).__name__} of {sorted({type(p).__name__ for p in batch})}."
        )
    ids = [[*start, *(encode(p) if is_text else p)] for p in batch]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise InputError(
            f"prompt {empty[0]} has no tokens; give it at least one, or bos=True to start from "
            "the start token."
        )
    return ids


def longest_row(tokens: Tensor, pad: Tensor | None) -> int:
    """The number of tokens of the longest row, without pads."""
    return tokens.shape[1] if pad is None else int((~pad).sum(dim=1).max())


def _stops_to_ids(stop: int | str | Sequence[int | str] | None, encode: Encode) -> list[int]:
    """The tokens that end a row, given as ids or as text of one token each."""
    if stop is not None and not isinstance(stop, int | str | Sequence):
        raise InputError(f"stop must be tokens, as ids or as text, found {stop!r}.")
    ids: list[int] = []
    for token in [] if stop is None else [stop] if isinstance(stop, int | str) else stop:
        if not isinstance(token, int | str):
            raise InputError(f"stop must be tokens, as ids or as text, found {token!r}.")
        encoded = [token] if isinstance(token, int) else encode(token)
        if len(encoded) != 1:
            raise InputError(f"stop {token!r} must be one token, found {len(encoded)}: {encoded}.")
        ids += encoded
    return ids


def prepend(tokens: Tensor, pad: Tensor | None, start: int) -> tuple[Tensor, Tensor | None]:
    """Put a column of start tokens in front. Pads may follow it, since they take no position."""
    tokens = torch.cat([tokens.new_full((tokens.shape[0], 1), start), tokens], dim=1)
    if pad is not None:
        pad = torch.cat([pad.new_zeros(pad.shape[0], 1), pad], dim=1)
    return tokens, pad


def check_tokens(tokens: Any, pad: Any, n_vocab: int, device: torch.device | None = None) -> None:
    """Refuse tokens that are not a batch of ids below ``n_vocab``, and a pad mask that does not fit."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.long or tokens.dim() != 2:
        found = (
            f"{tokens.dtype} {list(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise InputError(f"tokens must be an int64 tensor [batch, pos], found {found}.")
    check_tensor(tokens, "tokens", device)
    if tokens.numel() == 0:
        raise InputError(f"tokens must hold at least one token, found {list(tokens.shape)}.")
    if pad is not None:
        check_tensor(pad, "pad", device)
    if pad is not None and (pad.dtype != torch.bool or pad.shape != tokens.shape):
        raise InputError(
            f"pad must be bool and of tokens' shape {list(tokens.shape)}, "
            f"found {pad.dtype} {list(pad.shape)}."
        )
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= n_vocab:
        raise _unknown_token(low if low < 0 else high, n_vocab)


def _unknown_token(token: int, n_vocab: int) -> InputError:
    return InputError(f"token ids must lie in 0 to {n_vocab - 1}, found {token}.")


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """From the logits of the next token of each row to its id."""
    return functools.partial(
        sample_from_logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )


def _make_generator(
    generator: torch.Generator | None, seed: int | None, device: Device
) -> torch.Generator | None:
    """The generator that was given, or a new one with the seed; None: torch's global generator."""
    if seed is None:
        return generator
    if generator is not None:
        raise InputError("give generator or seed, not both.")
    check_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def _generate(
    step: Step,
    ids: Sequence[Sequence[int]],
    num_tokens: int,
    choose: Callable[[Tensor], Tensor],
    stops: Sequence[int],
    device: Device,
) -> list[list[int]]:
    """The new tokens of each row; a row ends before the first of its ``stops``.

    Args:
        step: computes the next logits. In its first call the pads are on the left.
        choose: ``[b, v] -> [b]``.
    """
    tokens, pad = prep_input_and_pad(ids, "left", device)
    stop_ids = torch.tensor(stops, dtype=torch.long, device=device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    new: list[Tensor] = []
    for _ in range(num_tokens):
        chosen = choose(step(tokens, pad))
        done = done | torch.isin(chosen, stop_ids)
        new.append(chosen.masked_fill(done, -1))
        if done.all():
            break
        tokens, pad = chosen[:, None], done[:, None]
    return [[i for i in row if i >= 0] for row in torch.stack(new, dim=1).tolist()]


def with_recorder(
    hooks: TransformerHooks | None, wanted: list[ActivationLocation], found: Activations
) -> TransformerHooks:
    """A copy of ``hooks`` whose last hooks put what passes at the ``wanted`` places into ``found``."""
    hooks = (NO_HOOKS if hooks is None else hooks).copy()
    for path in dict.fromkeys(place.path for place in wanted):

        def keep(x: Tensor, layer: int | None, path: str = path) -> Tensor:
            # The first value: with recomputation, layers run again in the backward pass.
            found.setdefault(ActivationLocation(path, layer), x)
            return x

        layers = [p.layer for p in wanted if p.path == path and p.layer is not None]
        hooks.append_to_path(f"{path}.fwd2", AtLayers(layers).append(keep) if layers else keep)
    return hooks
