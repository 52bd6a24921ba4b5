"""What captures and generation have in common, whatever the model: inputs, loop, results.

Shape legend: ``b`` batch, ``s`` sequence, ``v`` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError, NeuronExplainerError
from neuron_explainer.models.hooks import NO_HOOKS, AtLayers, HookNode, TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.sampling import Device, prep_input_and_pad, sample_from_logits

Encode = Callable[[str], list[int]]


class Activations(dict[ActivationLocation, Tensor]):
    """What :meth:`Transformer.capture` returns: ``{location: tensor}``; text names a location too."""

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

    def __repr__(self) -> str:
        return "\n".join(
            [f"{key}: {list(value.shape)} {value.dtype}" for key, value in self.items()]
        )


class Sample(dict[str, Any]):
    """What ``sample`` returns: ``{"tokens": list[list[int]], "strings": list[str]}``.

    Token ids need no vocabulary: where it cannot be had, ``strings`` is missing, and asking for it says
    why.
    """

    reason: NeuronExplainerError | None = None

    @classmethod
    def of(cls, tokens: list[list[int]], decode: Callable[[], list[str]]) -> Self:
        """The tokens, and their text if it can be had."""
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


def prompts_to_ids(
    prompts: Any, encode: Encode, start: Sequence[int] = ()
) -> tuple[list[list[int]], bool]:
    """Prompts in any accepted form as lists of ids, and whether they were text.

    Args:
        prompts: text, token ids, or a list of either.
        encode: text to token ids.
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
    return ids, is_text


def stops_to_ids(stop: int | str | Sequence[int | str] | None, encode: Encode) -> list[int]:
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
    """A column of start tokens in front; pads may follow it, since they take no position."""
    tokens = torch.cat([tokens.new_full((tokens.shape[0], 1), start), tokens], dim=1)
    if pad is not None:
        pad = torch.cat([pad.new_zeros(pad.shape[0], 1), pad], dim=1)
    return tokens, pad


def check_tokens(tokens: Any, pad: Any, n_vocab: int) -> None:
    """Refuse tokens that would index outside the embedding, with the numbers."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.long or tokens.dim() != 2:
        found = (
            f"{tokens.dtype} {list(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise InputError(f"tokens must be an int64 tensor [batch, pos], found {found}.")
    if tokens.numel() == 0:
        raise InputError(f"tokens must hold at least one token, found {list(tokens.shape)}.")
    if pad is not None and not isinstance(pad, Tensor):
        raise InputError(f"pad must be a bool tensor, found {type(pad).__name__}.")
    if pad is not None and (pad.dtype != torch.bool or pad.shape != tokens.shape):
        raise InputError(
            f"pad must be bool and of tokens' shape {list(tokens.shape)}, "
            f"found {pad.dtype} {list(pad.shape)}."
        )
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= n_vocab:
        raise InputError(
            f"token ids must lie in 0 to {n_vocab - 1}, found {low if low < 0 else high}."
        )


def check_hooks(hooks: object, n_layers: int) -> None:
    """Refuse what is not a tree for a whole model, or has hooks for layers that this one lacks."""
    if not isinstance(hooks, TransformerHooks):
        found = repr(hooks) if isinstance(hooks, HookNode) else type(hooks).__name__
        raise HookError(
            "hooks must be a TransformerHooks tree, such as `TransformerHooks().append_at("
            f"'3/mlp.post_act', hook)`, found {found}."
        )
    hooks.check_layers(n_layers)


def make_generator(
    generator: torch.Generator | None, seed: int | None, device: Device
) -> torch.Generator | None:
    """The one of the two that was given; None: torch's global generator."""
    if seed is None:
        return generator
    if generator is not None:
        raise InputError("give generator or seed, not both.")
    if not isinstance(seed, int):
        raise InputError(f"seed must be a whole number, found {seed!r}.")
    return torch.Generator(device).manual_seed(seed)


def generate(
    step: Callable[[Tensor, Tensor], Tensor],
    ids: Sequence[Sequence[int]],
    num_tokens: int,
    choose: Callable[[Tensor], Tensor],
    stops: Sequence[int],
    device: Device,
) -> list[list[int]]:
    """The new tokens of each row; a row ends before the first of its ``stops``.

    Args:
        step: of tokens and their pad mask ``[b, s]`` that come after those of the step before, the
            logits ``[b, v]`` after the last one. The first step's pads are on the left.
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


def chooser(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Callable[[Tensor], Tensor]:
    """:func:`~neuron_explainer.models.sampling.sample_from_logits` with its settings fixed."""

    def choose(logits: Tensor) -> Tensor:
        return sample_from_logits(logits, temperature, top_k, top_p, generator)

    return choose


def with_recorder(
    hooks: TransformerHooks | None, wanted: list[ActivationLocation], found: Activations
) -> TransformerHooks:
    """A copy of ``hooks`` whose last ones keep what passes at the ``wanted`` places in ``found``."""
    hooks = (NO_HOOKS if hooks is None else hooks).copy()
    for path in dict.fromkeys(place.path for place in wanted):

        def keep(x: Tensor, layer: int | None, path: str = path) -> Tensor:
            # The first: with recomputation, layers run again in the backward pass.
            found.setdefault(ActivationLocation(path, layer), x)
            return x

        layers = [p.layer for p in wanted if p.path == path and p.layer is not None]
        hooks.append_to_path(f"{path}.fwd2", AtLayers(layers).append(keep) if layers else keep)
    return hooks
