"""What a request to the model may ask for, by name."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

from neuron_explainer.server.compute import (
    attention,
    debugging,
    details,
    features,
    reading,
    tokens,
)
from neuron_explainer.server.compute.session import Session

__all__ = ["OPERATIONS", "Session", "answer"]

OPERATIONS: dict[str, Callable[[Session, dict[str, Any]], Any]] = {
    "tokenize": tokens.tokenize,
    "activations": tokens.activations,
    "debug": debugging.debug,
    "debug_streamed": debugging.streamed,
    "node": details.node,
    "attention": attention.attention,
    "head": attention.head,
    "head_latents": attention.head_latents,
    "lens": reading.lens,
    "generate": reading.generate,
    "logits": features.logits,
    "neighbours": features.neighbours,
    "map": features.dictionary_map,
}
"""A generator yields parts, each with the name of its event, and returns the end; any other function
returns the answer."""


def answer(
    session: Session, operation: str, request: dict[str, Any], guard: Callable[[], None]
) -> Iterator[tuple[str, Any]]:
    """``("part", …)`` for each part, then ``("done", …)``."""
    session.begin(guard)
    found = OPERATIONS[operation](session, request)
    if isinstance(found, Generator):
        try:
            while True:
                yield "part", next(found)
        except StopIteration as end:
            found = end.value
    yield "done", found
