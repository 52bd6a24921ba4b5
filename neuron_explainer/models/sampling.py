"""From logits to the next token, and from prompts to padded batches: pure functions.

Shape legend: ``b`` batch, ``s`` sequence, ``v`` vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.devices import Device


def prep_input_and_pad(
    X: Sequence[Sequence[int]], pad_side: str, device: Device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Put token lists of unequal length into one batch.

    Returns:
        Token ids ``[b, s]`` (int64, 0 at pads) and the pad mask ``[b, s]`` (bool, True = pad).
    """
    if pad_side not in ("left", "right"):
        raise InputError(f"pad_side must be 'left' or 'right', found {pad_side!r}.")
    longest = max(map(len, X), default=0)
    tokens = torch.zeros(len(X), longest, dtype=torch.long)
    pad = torch.ones(len(X), longest, dtype=torch.bool)
    for row, ids in enumerate(X):
        span = slice(longest - len(ids), longest) if pad_side == "left" else slice(0, len(ids))
        tokens[row, span] = torch.tensor(ids, dtype=torch.long)
        pad[row, span] = False
    return tokens.to(device), pad.to(device)


def prep_input_and_right_pad_for_forward_pass(
    X: Sequence[Sequence[int]], device: Device = "cpu"
) -> tuple[Tensor, Tensor]:
    """:func:`prep_input_and_pad` with pads on the right."""
    return prep_input_and_pad(X, "right", device)


def prep_pos_from_pad_and_prev_lens(pad: Tensor, prev_lens: Tensor | int) -> Tensor:
    """Positions ``[b, s]`` of the tokens: pads take none, so a row's positions are its solo run's.

    Args:
        pad: pad mask ``[b, s]``.
        prev_lens: tokens that each row had before, ``[b, 1]``, or 0.
    """
    return (torch.cumsum(~pad, dim=-1) - 1).clamp(min=0) + prev_lens


def nucleus_sample(
    logits: Tensor, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw from the smallest set of likeliest tokens whose probability reaches ``top_p``.

    The token that crosses the threshold belongs to the set (Holtzman et al. 2020, eq. 2).

    Args:
        logits: ``[..., v]``.

    Returns:
        Token ids ``[...]``.
    """
    return _draw(_keep_nucleus(logits, top_p), generator)


def sample_from_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row: ``[..., v] -> [...]``.

    Temperature 0 takes the likeliest token (the lowest id among equals). Otherwise logits are divided
    by the temperature, cut to the ``top_k`` likeliest, then to the nucleus of ``top_p``, and drawn.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The largest logit is subtracted, so that a tiny temperature gives 0 and -inf, never inf. In float64,
    # because in float32 a temperature below 1e-38 may be flushed to 0 (torch.set_flush_denormal).
    logits = logits.double()
    logits = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).float()
    if top_k is not None and top_k < logits.shape[-1]:
        top = logits.topk(top_k, dim=-1)  # by index: exactly top_k, even if several are equal
        logits = torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)
    if top_p is not None:
        logits = _keep_nucleus(logits, top_p)
    return _draw(logits, generator)


def check_sampling_settings(
    num_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise an InputError for settings that :func:`sample_from_logits` cannot work with."""
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise InputError(f"num_tokens must be a whole number >= 1, found {num_tokens!r}.")
    # 1e300: whole numbers of any size are numbers too, and only floats can divide logits.
    if not isinstance(temperature, int | float) or not 0 <= temperature < 1e300:
        raise InputError(f"temperature must be a finite number >= 0, found {temperature!r}.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k must be a whole number >= 1 or None, found {top_k!r}.")
    if top_p is not None and not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise InputError(f"top_p must lie in (0, 1] or be None, found {top_p!r}.")


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with -inf outside the nucleus."""
    if top_p >= 1:  # all tokens; rounded sums of probabilities may reach 1 before the last
        return logits.float()
    ordered, order = logits.float().sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    # Probability before the token: below top_p for the token that crosses it, 0 for the first one.
    before = probs.cumsum(dim=-1) - probs
    outside = before >= top_p
    outside[..., 0] = False
    return logits.float().masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    probs = logits.float().softmax(dim=-1)
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
    return flat.reshape(probs.shape[:-1])
