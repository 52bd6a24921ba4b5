"""Judges that send nothing: a function in this process, and the one that counts what would be sent."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from neuron_explainer.analysis.explaining.explanation import Failure
from neuron_explainer.analysis.explaining.judge import (
    Prompt,
    Reply,
    estimated_prompt_tokens,
    estimated_tokens,
    sample_text,
)
from neuron_explainer.analysis.explaining.replies import JsonError, json_in
from neuron_explainer.analysis.explaining.spending import Price


class ScriptedJudge:
    """A judge that is a function, for tests and for models in this process.

    Args:
        answer: the text of a reply, or a whole reply.
        name: what it is called.
    """

    def __init__(self, answer: Callable[[Prompt], str | Reply], name: str = "scripted") -> None:
        self.answer, self.name = answer, name

    def ask(self, prompts: Iterable[Prompt]) -> Iterator[Reply]:
        """One reply after the other."""
        for prompt in prompts:
            found = self.answer(prompt)
            yield found if isinstance(found, Reply) else understood(prompt, found)


def understood(prompt: Prompt, text: str, **more: Any) -> Reply:
    """A reply with this text; with a failure where JSON was asked for and cannot be found in it.

    Args:
        prompt: what was asked.
        text: what was answered.
        more: further fields of the reply.
    """
    if prompt.schema is None:
        return Reply(text, **more)
    try:
        return Reply(text, json_in(text), **more)
    except JsonError as error:
        return Reply(text, failure=Failure("unparsable", str(error)), **more)


@dataclass
class Preview:
    """What would be sent."""

    calls: int = 0
    known: int = 0
    """Prompts whose reply is known already."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    most_completion_tokens: int = 0
    """If every reply were as long as it may be."""

    def cost(self, price: Price) -> float:
        """About what it would cost."""
        return price.of(self.prompt_tokens, self.completion_tokens)

    def most(self, price: Price) -> float:
        """What it would cost if every reply were as long as it may be."""
        return price.of(self.prompt_tokens, self.most_completion_tokens)


class PreviewJudge:
    """A judge that sends nothing: it answers with what is known, else with the prompt's sample, and counts.

    Args:
        name: of the model that would be asked.
        known: the reply to a prompt that was asked before, see ``EndpointJudge.known``.
        thinking_tokens: see ``Endpoint``.
    """

    def __init__(
        self,
        name: str,
        known: Callable[[Prompt], Reply | None] = lambda prompt: None,
        thinking_tokens: int = 0,
    ) -> None:
        self.name, self._known, self._thinking = name, known, thinking_tokens
        self.preview = Preview()

    def ask(self, prompts: Iterable[Prompt]) -> Iterator[Reply]:
        """Samples, so that what comes after an explanation is counted too."""
        for prompt in prompts:
            reply = self._known(prompt)
            text = sample_text(prompt)
            if reply is not None:
                self.preview.known += 1
            else:
                self.preview.calls += 1
                self.preview.prompt_tokens += estimated_prompt_tokens(prompt)
                self.preview.completion_tokens += estimated_tokens(text)
                self.preview.most_completion_tokens += prompt.max_tokens + self._thinking
            yield understood(prompt, text) if reply is None else reply
