"""What an endpoint's answer says: the reply in a chat completion, or embeddings.

Servers differ in what they leave out, and answers are untrusted: whatever in one has another type than
expected counts as not there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.explaining.explanation import Failure
from neuron_explainer.analysis.explaining.judge import Reply, ReplyToken
from neuron_explainer.analysis.explaining.replies import one_line
from neuron_explainer.analysis.explaining.spending import StoppedError
from neuron_explainer.errors import shown

Floats = npt.NDArray[np.float32]
_MOST_USAGE = 10**9  # tokens of one request; a larger count is nonsense
_MOST_LOGPROB = 1e9


@dataclass(frozen=True)
class Chat:
    """The answer to one request."""

    text: str
    failure: Failure | None
    cut_off: bool
    tokens: tuple[ReplyToken, ...]
    usage: tuple[int, int] | None
    """Tokens of the prompt and of the reply, as the server says."""

    @classmethod
    def of(cls, answer: Mapping[str, Any], use_reasoning: bool) -> "Chat":
        """Read an answer.

        Args:
            answer: the JSON of a response.
            use_reasoning: where there is no content, take the model's reasoning.
        """
        choice = _first(answer.get("choices"))
        message = _object(choice.get("message"))
        text = _content(message.get("content"))
        thoughts = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
        reason = choice.get("finish_reason")
        failure = None
        if refusal := _text(message.get("refusal")):
            failure = f"the model refused: {one_line(refusal)[:200]}"
        elif reason == "content_filter":
            failure = "the endpoint's content filter withheld the reply"
        elif reason == "length":
            failure = (
                "the reply was cut off at twice the length that was expected; a reasoning model needs room "
                "to think: thinking_tokens=2000"
            )
        elif not text.strip() and thoughts and use_reasoning:
            text = thoughts
        elif not text.strip():
            failure = "the reply has no content" + (
                ", only the model's reasoning: serve the model without a reasoning parser or without "
                "reasoning, or take that as the reply with use_reasoning=True"
                if thoughts
                else ""
            )
        return cls(
            text,
            None if failure is None else Failure("failed", failure),
            reason == "length",
            _tokens(_object(choice.get("logprobs")).get("content")),
            _usage(answer.get("usage")),
        )

    def reply(self, value: Any = None, failure: Failure | None = None) -> Reply:
        """As a reply."""
        return Reply(self.text, value, failure or self.failure, self.tokens)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(value: Any) -> Mapping[str, Any]:
    return _object(value[0]) if isinstance(value, list) and value else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _content(value: Any) -> str:
    """The text of a message, which some servers give in parts."""
    if isinstance(value, list):
        return "".join(_text(_object(part).get("text")) for part in value)
    return _text(value)


def _tokens(value: Any) -> tuple[ReplyToken, ...]:
    found = []
    for each in value if isinstance(value, list) else []:
        token = _object(each)
        top = token.get("top_logprobs")
        choices = [token, *(top if isinstance(top, list) else [])]
        alternatives: dict[str, float] = {}
        for choice in map(_object, choices):
            logprob = choice.get("logprob")
            # Comparing keeps out NaN, and whole numbers that no float can hold.
            if isinstance(logprob, int | float) and -math.inf <= logprob <= _MOST_LOGPROB:
                value = float(max(logprob, -_MOST_LOGPROB))
                alternatives.setdefault(_text(choice.get("token")), value)
        found.append(ReplyToken(_text(token.get("token")), alternatives))
    return tuple(found)


def _usage(value: Any) -> tuple[int, int] | None:
    found = _object(value)
    counts = found.get("prompt_tokens"), found.get("completion_tokens")
    prompt, completion = counts
    if type(prompt) is not int or type(completion) is not int:
        return None
    if not (0 <= prompt <= _MOST_USAGE and 0 <= completion <= _MOST_USAGE):
        return None
    return prompt, completion


def embeddings_of(answer: Mapping[str, Any], n: int) -> list[Floats]:
    """The vectors of an answer to ``/embeddings``, ``n`` of them ``[d]``, in the order of the texts."""
    rows = answer.get("data")
    rows = [_object(row) for row in rows] if isinstance(rows, list) else []
    rows.sort(key=lambda row: row.get("index") if isinstance(row.get("index"), int) else 0)
    try:
        found = [np.asarray(row.get("embedding"), np.float32) for row in rows]
    except (TypeError, ValueError):
        found = []
    if len(found) != n or not all(x.ndim == 1 and len(x) and np.isfinite(x).all() for x in found):
        raise StoppedError(
            f"expected {n} embeddings of finite numbers, found {shown(answer)}. Does this endpoint serve "
            "embeddings?"
        )
    return found
