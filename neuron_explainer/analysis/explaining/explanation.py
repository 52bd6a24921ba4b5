"""What is said about a unit and how good it is: :class:`Explanation` and :class:`Score`, as plain values.

Both are written to JSON with :func:`as_dict` and read with :func:`explanation_from` and :func:`score_from`,
which check what they read. Neither torch nor a model is needed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from neuron_explainer.settings import read_fields

Source = Literal["active", "random", "hard", "marked wrong"]
"""What a text is: one where the unit is active, a random one where it is not, one where it is not active but
a unit like it is, or (in fuzzing) an active one with marks at the wrong tokens."""


@dataclass(frozen=True)
class Cost:
    """What an explanation or a score took from an endpoint; all 0 where none was asked."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: float = 0.0
    """In the currency of the prices that were given; 0 if none were."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.price + other.price,
        )


FREE = Cost()


@dataclass(frozen=True)
class Explanation:
    """What a unit responds to, or what it does."""

    subject: str
    """The hash of what the unit belongs to, see :attr:`ExampleStore.subject`."""
    unit: int
    text: str
    """In words."""
    method: str
    """How it was found: ``"tokens"``, ``"rules"``, ``"logits"``, or the name of a prompt."""
    model: str = ""
    """The language model that wrote it; empty if none did."""
    prompt_hash: str = ""
    """The hash of the prompt's template and version; empty if there was no prompt."""
    seed: int = 0
    examples: tuple[int, ...] = ()
    """The ids of the examples that it was made from, see :class:`LabelledExample`."""
    payload: dict[str, Any] = field(default_factory=dict)
    """What a program can apply: ``{"rule": …}``, ``{"tokens": […]}``; empty if there are only words."""
    cost: Cost = FREE

    @property
    def key(self) -> str:
        """A hash of everything but the cost: equal explanations have equal keys."""
        values = as_dict(self)
        del values["cost"]
        return digest(values)


@dataclass(frozen=True)
class Counts:
    """How many texts were judged how. Failed and unparsable ones are not among the first four."""

    tp: int = 0
    """Active, and judged active."""
    fp: int = 0
    """Not active, but judged active."""
    tn: int = 0
    fn: int = 0
    failed: int = 0
    """No reply came: the request failed, or the judge refused."""
    unparsable: int = 0
    """A reply came that cannot be read."""

    @property
    def judged(self) -> int:
        """The texts with a reply that can be read."""
        return self.tp + self.fp + self.tn + self.fn


@dataclass(frozen=True)
class Failure:
    """Why a judge gave no answer about a text."""

    kind: Literal["failed", "unparsable"]
    reason: str = ""


Prediction = bool | float | None | Failure
"""What a rule or a judge says about one text: whether the unit is active there, or how probable that is;
None is a reply that cannot be read."""


@dataclass(frozen=True)
class Answer:
    """One text of a score: what is true, and what was predicted."""

    id: int
    """That of the example."""
    source: Source
    quantile: int
    """That of the example; -1 where the unit is not active."""
    predicted: bool | None
    """None: there was no answer that can be read."""
    probability: float | None = None
    """How probable "active" is; None if only yes or no is known."""
    failure: str = ""
    """Why there is no answer."""

    @property
    def active(self) -> bool:
        """Whether the unit is active in the text."""
        return self.source == "active"


@dataclass(frozen=True)
class Floor:
    """What a trivial or random competitor gets in the same measure."""

    name: str
    """``"token set"``, ``"other latent"``, ``"random autoencoder"``, or ``"chance"``."""
    value: float
    n: int = 1
    """Over how many competitors ``value`` is the mean."""
    spread: float | None = None
    """Standard deviation over them; None for a single one."""


@dataclass(frozen=True)
class Score:
    """How well an explanation predicts its unit, beside what trivial competitors get."""

    name: str
    """The scorer: ``"detection"``, ``"fuzzing"``, ``"simulation"``, …"""
    metric: str
    """What ``value`` is: ``"balanced accuracy"``, ``"AUC"``, ``"Pearson r"``, …"""
    value: float | None
    """None where it is not defined, as the correlation with a constant."""
    interval: tuple[float, ...] | None = None
    """The 95 % bootstrap interval: its low and its high end."""
    floors: tuple[Floor, ...] = ()
    smallest_difference: float | None = None
    """The smallest difference from a competitor that this sample can tell apart (95 %, with power 0.8)."""
    counts: Counts | None = None
    by_quantile: tuple[float | None, ...] = ()
    """By quantile of the active texts, the largest values first: the share of them that were recognized;
    for a correlation or an area under the curve, that of these texts and the inactive ones. None where there
    was no text."""
    details: dict[str, Any] = field(default_factory=dict)
    """Other figures, by name."""
    judge: str = ""
    """The language model that judged; empty if none did."""
    prompt_hash: str = ""
    seed: int = 0
    answers: tuple[Answer, ...] = ()
    """What was said about each text, in the order of the test examples."""
    cost: Cost = FREE

    @property
    def floor(self) -> Floor | None:
        """The highest floor: the competitor to beat."""
        return max(self.floors, key=lambda floor: floor.value, default=None)


@dataclass(frozen=True)
class Explained:
    """An explanation of a unit and its scores."""

    explanation: Explanation
    scores: tuple[Score, ...] = ()
    changed: str = ""
    """When it was written, in UTC (ISO 8601)."""


def as_dict(record: Any) -> dict[str, Any]:
    """An :class:`Explanation` or a :class:`Score` as JSON can hold it."""
    found: dict[str, Any] = _plain(record)
    return found


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def explanation_from(values: Mapping[str, Any]) -> Explanation:
    """The explanation of :func:`as_dict`; an InputError says what does not fit."""
    return read_fields(Explanation, values, "explanation")


def score_from(values: Mapping[str, Any]) -> Score:
    """The score of :func:`as_dict`; an InputError says what does not fit."""
    return read_fields(Score, values, "score")


def digest(values: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
