"""What the model's weights say about a unit: the tokens that it promotes, and those that excite it.

A store of examples can be read without its model. Where the model can be had too, these two lists go
beside the examples on the page of a unit, as text and as HTML.
"""

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from neuron_explainer.analysis.directions import Directions, TopLogits
from neuron_explainer.analysis.input_tokens import InputReader, InputTokens
from neuron_explainer.analysis.page import Section
from neuron_explainer.analysis.token_lists import lists_as_html, lists_as_text
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import LocationLike
from neuron_explainer.models.model_context import ModelContext

_LOGITS = ("raises", "lowers")
_INPUTS = ("excited most by", "least by")
T = TypeVar("T")


@dataclass(frozen=True)
class UnitTokens:
    """Lists of tokens of one unit; each is None where it is not defined."""

    logits: TopLogits | None
    """What the unit raises and lowers."""
    inputs: InputTokens | None
    """What excites it."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a list is missing, by what it would show."""

    def text(self) -> str:
        """Both lists as text, and why one is missing."""
        parts = []
        if self.logits is not None:
            table = lists_as_text(_LOGITS, self.logits.top, self.logits.bottom)
            parts.append(f"Next tokens ({self.logits.note})\n{_indented(table)}")
        if self.inputs is not None:
            table = lists_as_text(_INPUTS, self.inputs.top, self.inputs.bottom)
            parts.append(f"Input tokens ({self.inputs.note})\n{_indented(table)}")
        parts += [f"{what} are left out: {why}" for what, why in self.missing.items()]
        return "\n\n".join(parts)

    def sections(self) -> list[Section]:
        """Both lists side by side, as a part of a page; none if both are missing."""
        lists = ("Next tokens", _LOGITS, self.logits), ("Input tokens", _INPUTS, self.inputs)
        body = "".join(
            f"<div><h3>{title}</h3>{lists_as_html(heads, found.top, found.bottom)}"
            f"<small>{html.escape(found.note)}</small></div>"
            for title, heads, found in lists
            if found is not None
        )
        return [Section("Tokens", f'<div class="tokens">{body}</div>')] if body else []

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = {"missing": self.missing}
        for name, lists in (("logits", self.logits), ("inputs", self.inputs)):
            found[name] = lists and {
                "note": lists.note,
                "top": [each._asdict() for each in lists.top],
                "bottom": [each._asdict() for each in lists.bottom],
            }
        return found


def unit_tokens(
    context: ModelContext,
    what: Autoencoder | LocationLike,
    unit: int,
    k: int = 10,
    *,
    location: LocationLike | None = None,
) -> UnitTokens:
    """The lists of a unit, as far as they are defined for its location.

    Args:
        context: the model.
        what: an autoencoder, or a location of the model.
        unit: the number of the unit.
        k: the length of each list.
        location: where the autoencoder reads and writes; None: the locations that it records itself.
    """
    missing: dict[str, str] = {}
    # Where a transcoder writes is not where it reads.
    target = None if isinstance(what, Autoencoder) and what.is_transcoder else location

    def attempt(name: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except NeuronExplainerError as error:
            missing[name] = str(error)
            return None

    logits = attempt(
        "Next tokens", lambda: Directions(context, what, location=target).top_logits(unit, k)
    )
    inputs = attempt(
        "Input tokens",
        lambda: InputReader(context, what, location=location).top_tokens([unit], k)[0],
    )
    return UnitTokens(logits, inputs, missing)


def _indented(table: str) -> str:
    return "\n".join(f"  {line}" for line in table.splitlines())
