"""What an experiment measures: one number for each prompt, from the logits.

A target is a value: :func:`logit_difference`, :func:`probability`, :func:`loss` and :func:`kl` make the
usual ones, :class:`Target` takes a function of one's own. Targets are differentiable.

Shape legend: ``n`` rows, each of one prompt, ``s`` positions, ``v`` vocabulary.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from neuron_explainer.errors import InputError, NeuronExplainerError, shown
from neuron_explainer.models.language_model import LanguageModel

TokenLike = str | int
TokensLike = TokenLike | Sequence[TokenLike]
"""One token or a set of tokens, as ids or as text of one token each."""


@dataclass(frozen=True)
class Reading:
    """Logits of some rows, and what a target may compare them with."""

    logits: Tensor
    """``[n, v]`` after the last token of each row; for a target of every position ``[n, s, v]``."""
    prompt: Tensor
    """``[n]`` int64: which prompt each row is of."""
    clean: Tensor
    """The logits of the unchanged run, in the same shape."""
    tokens: Tensor
    """``[n, s]`` int64, padded on the right."""
    pad: Tensor
    """``[n, s]`` bool."""


@dataclass(frozen=True)
class Target:
    """A number for each row."""

    name: str
    of: Callable[[Reading], Tensor]
    """``[n]`` from a :class:`Reading`."""
    every_position: bool = False
    """Whether it reads the logits of every position, which cost a product each, or of the last alone."""
    compares: bool = False
    """Whether it is a distance from the unchanged run. There it is 0 and has no gradient, so it can be
    measured under changes, but not attributed by gradients."""

    def __call__(self, reading: Reading) -> Tensor:
        """``[n]``; an error if the function returns anything else."""
        found = self.of(reading)
        if not isinstance(found, Tensor) or found.shape != reading.prompt.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"target {self.name!r} must return one number a row, [{len(reading.prompt)}], found {shape}."
            )
        return found

    def unchanged(self, reading: Reading) -> Tensor:
        """``[n]`` on an unchanged run; an error if it is NaN, which nothing can be compared with."""
        found = self(reading)
        if bool((wrong := found.isnan()).any()):
            prompt = int(reading.prompt[wrong][0])
            raise InputError(
                f"{self.name} is NaN on the unchanged run of prompt {prompt}: the model's weights are not "
                "finite, its dtype is too narrow, or the target's function has no value there."
            )
        return found

    def __repr__(self) -> str:
        return f"Target({self.name!r})"


def token_id(model: LanguageModel, token: TokenLike) -> int:
    """The id of a token given as text or as its id; an InputError unless the text is one token."""
    if isinstance(token, str):
        ids = model.prompt_ids(token)[0] if token else []
        if len(ids) == 1:
            return ids[0]
        pieces = ", ".join(map(shown, token_texts(model, ids[:8]))) or "none"
        other = _other_spelling(model, token)
        raise InputError(
            f"a target must be one token; {shown(token)} is {len(ids)}: {pieces}."
            + (f" Did you mean {shown(other)}?" if other else "")
        )
    try:
        found = -1 if isinstance(token, bool) else operator.index(token)
    except TypeError:
        found = -1
    if not 0 <= found < model.n_vocab:
        raise InputError(
            f"a target token is a text or an id of 0 to {model.n_vocab - 1}, found {shown(token)}."
        )
    return found


def _other_spelling(model: LanguageModel, token: str) -> str | None:
    """The text with a space before it, or without the one that it has; None unless that is one token."""
    other = token[1:] if token.startswith(" ") else f" {token}"
    return other if other and len(model.prompt_ids(other)[0]) == 1 else None


@torch.no_grad()
def likelier_spellings(
    model: LanguageModel,
    prompt: str | Sequence[int],
    tokens: Sequence[TokenLike],
    bos: bool | int = False,
) -> list[str]:
    """A sentence for each target token that is less likely after the prompt than its other spelling.

    ``"ring"`` and ``" ring"`` are different tokens. In the middle of a text the one with the space is
    usually meant, but both are valid targets.
    """
    spellings = {text: _other_spelling(model, text) for text in tokens if isinstance(text, str)}
    pairs = [(text, other) for text, other in spellings.items() if other is not None]
    if not pairs:
        return []
    logits: Tensor = model(model.prompt_ids(prompt, bos))[0][0, -1]
    probs = logits.double().softmax(dim=-1)
    lines = []
    for text, other in pairs:
        taken, left = (float(probs[token_id(model, each)]) for each in (text, other))
        if left > taken:
            how = "without the space" if text.startswith(" ") else "with a space"
            lines.append(
                f"{shown(text)} was taken, which has a probability of {taken:.2g} after the prompt; "
                f"{shown(other)}, {how} before it, has {left:.2g}."
            )
    return lines


def token_texts(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """Each token as text; its number where the model came without a vocabulary."""
    try:
        return [model._decode([i]) for i in ids]
    except NeuronExplainerError:
        return [str(i) for i in ids]


def token_ids(model: LanguageModel, tokens: TokensLike) -> list[int]:
    """The ids of one token or of several."""
    several: list[Any] = list(tokens) if _is_list(tokens) else [tokens]
    if not several:
        raise InputError("expected at least one target token, found none.")
    return [token_id(model, token) for token in several]


def _is_list(tokens: object) -> TypeGuard[Iterable[Any]]:
    """Whether this is several tokens: a list, tuple, array, …, and neither a text nor a number."""
    one = isinstance(tokens, str) or getattr(tokens, "ndim", 1) == 0
    return isinstance(tokens, Iterable) and not one


def _per_prompt(
    model: LanguageModel, tokens: TokensLike | Sequence[Sequence[TokenLike]]
) -> list[list[int]]:
    """Token sets: one for all prompts, or, from a list of lists, one for each prompt."""
    several: list[Any] = list(tokens) if _is_list(tokens) else [tokens]
    if several and all(_is_list(part) for part in several):
        return [token_ids(model, part) for part in several]
    return [token_ids(model, several)]


def _mean_over(values: Tensor, sets: list[list[int]], prompt: Tensor) -> Tensor:
    """``[n]``: the mean of ``values`` ``[n, v]`` over each row's set of tokens."""
    means = torch.stack([values[:, ids].mean(dim=-1) for ids in sets])  # [sets, n]
    return means[0] if len(sets) == 1 else _of_prompt(means, prompt)


def _of_prompt(by_set: Tensor, prompt: Tensor) -> Tensor:
    if len(by_set) <= int(prompt.max()):
        raise InputError(
            f"the target has {len(by_set)} sets of tokens, for {int(prompt.max()) + 1} prompts."
        )
    return by_set[prompt, torch.arange(len(prompt), device=prompt.device)]


def logit_difference(
    model: LanguageModel,
    target: TokensLike | Sequence[Sequence[TokenLike]],
    against: TokensLike | Sequence[Sequence[TokenLike]] | None = None,
) -> Target:
    """Mean logit of the target tokens minus mean logit of ``against`` after the last token.

    Give a list of lists for other tokens in each prompt. Without ``against``: the mean logit alone.
    """
    up = _per_prompt(model, target)
    down = [] if against is None else _per_prompt(model, against)
    if len({len(sets) for sets in (up, down)} - {0, 1}) > 1:
        raise InputError(
            f"target has {len(up)} sets of tokens, against {len(down)}: give one for each prompt, or one."
        )
    if len(up) == len(down) and any({*a} == {*b} for a, b in zip(up, down, strict=True)):
        raise InputError(f"{_words(target)} is compared with the same tokens: the difference is 0.")

    def of(reading: Reading) -> Tensor:
        found = _mean_over(reading.logits, up, reading.prompt)
        return found - _mean_over(reading.logits, down, reading.prompt) if down else found

    name = f"logit of {_words(target)}"
    return Target(name if against is None else f"{name} minus {_words(against)}", of)


def probability(model: LanguageModel, target: TokensLike | Sequence[Sequence[TokenLike]]) -> Target:
    """Probability of the target tokens together after the last token."""
    sets = [list(dict.fromkeys(ids)) for ids in _per_prompt(model, target)]  # each counts once

    def of(reading: Reading) -> Tensor:
        probs = reading.logits.softmax(dim=-1)
        sums = torch.stack([probs[:, ids].sum(dim=-1) for ids in sets])
        return sums[0] if len(sets) == 1 else _of_prompt(sums, reading.prompt)

    return Target(f"probability of {_words(target)}", of)


def kl(every_position: bool = False) -> Target:
    """Kullback-Leibler divergence, in nats, of the changed prediction from the unchanged one.

    Sum over the vocabulary of p log(p / q), p unchanged; after the last token, or the mean over all
    positions.
    """

    def of(reading: Reading) -> Tensor:
        p, q = reading.clean.log_softmax(dim=-1), reading.logits.log_softmax(dim=-1)
        divergence = (p.exp() * (p - q)).sum(dim=-1)
        return _mean_of_tokens(divergence, ~reading.pad) if every_position else divergence

    return Target("KL divergence", of, every_position, compares=True)


def loss() -> Target:
    """Mean cross-entropy, in nats, of each prompt's own next tokens."""

    def of(reading: Reading) -> Tensor:
        if int((~reading.pad).sum(dim=1).min()) < 2:
            raise InputError("the loss needs prompts of at least two tokens.")
        logs = reading.logits[:, :-1].log_softmax(dim=-1)
        found = -logs.gather(-1, reading.tokens[:, 1:, None])[..., 0]
        return _mean_of_tokens(found, ~reading.pad[:, 1:])

    return Target("loss", of, every_position=True)


def _mean_of_tokens(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum(dim=-1) / counted.sum(dim=-1)


def _words(tokens: object) -> str:
    several = (
        [tokens] if isinstance(tokens, str | int) or not isinstance(tokens, Sequence) else tokens
    )
    return ", ".join(shown(t) if isinstance(t, str) else str(t) for t in list(several)[:4])


Metric = Target | Callable[[Tensor], Tensor]
"""A target, or a function of the last logits ``[n, v]`` that returns ``[n]``."""


def with_gradient(metric: Metric, what: str) -> Target:
    """A target for ``what``, which reads gradients at the unchanged run; an InputError if it has none."""
    target = as_target(metric)
    if target.compares:
        raise InputError(
            f"{target.name} is a distance from the unchanged run, where it is 0 and has no gradient: {what} "
            "would hold only zeros. Take a target such as logit_difference or loss, or measure changes "
            "with sweep."
        )
    return target


def as_target(metric: Metric) -> Target:
    """A plain function of the last logits as a target."""
    if isinstance(metric, Target):
        return metric
    if not callable(metric):
        raise InputError(
            f"a metric is a Target, such as logit_difference(model, {shown(metric)}) makes of tokens, or a "
            f"function of logits [n, v]; found {shown(metric)}."
        )
    return Target(getattr(metric, "__name__", "metric"), lambda reading: metric(reading.logits))
