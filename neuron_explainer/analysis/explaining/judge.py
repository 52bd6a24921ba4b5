"""What a judge is: something that answers prompts, such as a language model behind an endpoint.

Explainers and scorers make :class:`Prompt` values and read :class:`Reply` values; they know no more of a
judge than :class:`Judge`. Where no reply came, or one that cannot be read, there is a
:class:`~neuron_explainer.analysis.explaining.explanation.Failure`: it is counted, and never taken for a
prediction.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from neuron_explainer.analysis.explaining.explanation import Cost, Failure


class Message(NamedTuple):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked."""

    kind: str
    """What it is for, such as ``"detection"``; also the name of the schema."""
    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None = None
    """JSON schema of the reply; None: the reply is free text."""
    sample: Any = ""
    """A reply of the expected form and length, for previews of cost; text if there is no schema."""
    max_tokens: int = 256
    """The longest reply."""
    top_logprobs: int = 0
    """How many alternatives of each token of the reply are wanted, at most 20. A judge may give none."""
    version: str = ""
    """The hash of the prompt's fixed words, see ``prompts.py``."""

    @property
    def text(self) -> str:
        """All messages, for estimates of length."""
        return "\n".join(message.content for message in self.messages)


class ReplyToken(NamedTuple):
    """A token of a reply, and the log-probabilities of what could have stood there."""

    text: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """What a judge answered."""

    text: str = ""
    value: Any = None
    """What the JSON of the text says, where a schema was asked for."""
    failure: Failure | None = None
    """Why there is no usable reply; None: there is one."""
    tokens: tuple[ReplyToken, ...] = ()
    """The tokens of the text, where the judge gives log-probabilities."""
    cost: Cost = field(default_factory=Cost)
    """What it took, now or when it was first asked for."""


class Judge(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """The model's name, as explanations and scores record it."""
        ...

    def ask(self, prompts: Iterable[Prompt]) -> Iterator[Reply]:
        """The replies, in the order of the prompts. Prompts are taken as they are needed."""
        ...


CHARACTERS_PER_TOKEN = 3.5
"""For estimates. English text has about 4.3 in current tokenizers, JSON and code fewer."""
_MESSAGE_TOKENS = 6  # role and separators of a message


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has; a byte beyond ASCII counts as a token's third."""
    ascii_only = sum(character < "\x80" for character in text)
    others = len(text) - ascii_only
    return math.ceil(ascii_only / CHARACTERS_PER_TOKEN + others)


def estimated_prompt_tokens(prompt: Prompt) -> int:
    """About how many tokens are sent with a prompt, its schema included."""
    schema = "" if prompt.schema is None else json.dumps(prompt.schema)
    return (
        estimated_tokens(prompt.text)
        + estimated_tokens(schema)
        + _MESSAGE_TOKENS * len(prompt.messages)
    )


def sample_text(prompt: Prompt) -> str:
    """A reply of the expected form."""
    return prompt.sample if prompt.schema is None else json.dumps(prompt.sample)


def prompt_key(prompt: Prompt, **settings: Any) -> str:
    """The hash of what is asked, and of the settings with which it is asked; SHA-256 in hex.

    Args:
        prompt: the prompt.
        settings: plain values that decide the reply, such as the model and its seed.
    """
    asked = [
        prompt.kind,
        [list(message) for message in prompt.messages],
        prompt.schema,
        prompt.max_tokens,
        prompt.top_logprobs,
        settings,
    ]
    # surrogatepass: a text may hold half a surrogate pair, which has no form in UTF-8.
    text = json.dumps(asked, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
