"""Reading what a language model wrote: JSON among other text, answers by number, log-probabilities.

Replies are untrusted text. Whatever does not say exactly what was asked for is a ``Failure`` of the kind
``"unparsable"``: nothing is cut, filled up or guessed. What is accepted beyond the asked form is
unambiguous: text around the JSON, booleans as the words true and false, 0 and 1, a list in the order of the
questions, numbers that begin at 0.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from neuron_explainer.analysis.explaining.explanation import Failure
from neuron_explainer.analysis.explaining.judge import Reply, ReplyToken
from neuron_explainer.errors import shown

LONGEST_REPLY = 200_000
"""Characters; a longer reply is not looked through."""
_MOST_TRIES = 200  # places where JSON may begin
_THOUGHTS = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


class JsonError(ValueError):
    """There is no JSON in a text, or it cannot be relied on."""

    def __init__(self, reason: str, *, may_help_to_ask_again: bool) -> None:
        super().__init__(reason)
        self.may_help_to_ask_again = may_help_to_ask_again


class _DuplicateError(ValueError):
    pass


def json_in(text: str) -> Any:
    """The JSON object in a reply, whatever stands around it.

    Raises:
        JsonError: there is none, there are several different ones, or an object says a key twice.
    """
    if len(text) > LONGEST_REPLY:
        raise JsonError(f"more than {LONGEST_REPLY} characters", may_help_to_ask_again=False)
    text = without_thoughts(text)
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    try:
        try:
            whole = decoder.decode(text.strip().removeprefix("\ufeff"))
        except _DuplicateError:
            raise
        except ValueError:
            pass
        else:
            if isinstance(whole, dict | list):
                return whole
            raise JsonError(
                f"expected a JSON object, found {shown(whole)}", may_help_to_ask_again=True
            )
        found = _objects_in(text, decoder)
    except _DuplicateError as error:
        raise JsonError(f"the key {error} is there twice", may_help_to_ask_again=False) from None
    except RecursionError:
        raise JsonError("JSON that is nested too deep", may_help_to_ask_again=False) from None
    if not found:
        raise JsonError(f"no JSON in {shown(text)}", may_help_to_ask_again=True)
    if any(other != found[0] for other in found[1:]):
        raise JsonError(f"{len(found)} different JSON objects", may_help_to_ask_again=True)
    return found[0]


def without_thoughts(text: str) -> str:
    """A reply without what a reasoning model wrote between ``<think>`` and ``</think>`` at its beginning."""
    return _THOUGHTS.sub("", text, count=1)


def _objects_in(text: str, decoder: json.JSONDecoder) -> list[Any]:
    found: list[Any] = []
    place = text.find("{")
    for _ in range(_MOST_TRIES):
        if place < 0:
            return found
        try:
            value, end = decoder.raw_decode(text, place)
        except _DuplicateError:
            raise
        except ValueError:
            end = place + 1
        else:
            found.append(value)
        place = text.find("{", end)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateError(shown(next(key for key in keys if keys.count(key) > 1)))
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# --- answers ---


def answers(value: Any, n: int) -> list[Any] | Failure:
    """The answers to ``n`` numbered questions, in their order.

    Args:
        value: an object whose keys are the numbers, from 1 or from 0, or a list in their order. Either may
            be the only value of an object.
        n: how many there must be.
    """
    while isinstance(value, dict) and len(value) == 1 and isinstance(_only(value), dict | list):
        value = _only(value)
    if isinstance(value, list) and len(value) == n:
        return value
    if isinstance(value, dict) and len(value) == n:
        for first in (1, 0):
            keys = [str(number) for number in range(first, first + n)]
            if all(key in value for key in keys):
                return [value[key] for key in keys]
        return _unparsable(f"the numbers 1 to {n} as keys", list(value))
    found = f"{len(value)} answers" if isinstance(value, dict | list) else shown(value)
    return Failure("unparsable", f"expected {n} answers, found {found}")


def _only(value: dict[str, Any]) -> Any:
    return next(iter(value.values()))


def booleans(value: Any, n: int) -> list[bool] | Failure:
    """``n`` answers yes or no, see :func:`answers`."""
    given = answers(value, n)
    if isinstance(given, Failure):
        return given
    found = [boolean(each) for each in given]
    for each, answer in zip(given, found, strict=True):
        if answer is None:
            return _unparsable("true or false", each)
    return [answer is True for answer in found]


def boolean(value: Any) -> bool | None:
    """True or false, also as a word or as 1 or 0; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        return _BOOLEANS.get(str(value).strip().casefold())
    return None


def numbers(value: Any, n: int, low: float, high: float) -> list[float] | Failure:
    """``n`` numbers within limits, see :func:`answers`."""
    given = answers(value, n)
    if isinstance(given, Failure):
        return given
    found = []
    for each in given:
        number = _number(each)
        if number is None or not low <= number <= high:
            return _unparsable(f"a number from {low:g} to {high:g}", each)
        found.append(number)
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def field_text(value: Any, key: str, longest: int) -> str | Failure:
    """The text in a field of an object, on one line; control characters become spaces.

    Args:
        value: the object.
        key: the field.
        longest: characters; a longer text is a failure.
    """
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str):
        return _unparsable(f"an object with the text {shown(key)}", value)
    text = one_line(found)
    if not text:
        return Failure("unparsable", f"{key} is empty")
    if len(text) > longest:
        return Failure("unparsable", f"{key} has {len(text)} characters, more than {longest}")
    return text


def one_line(text: str) -> str:
    """Text without line ends and control characters, which could not be stored or shown either."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(plain.split())


def choice(value: Any, key: str, choices: Sequence[str]) -> int | Failure:
    """The index of the choice that a field of an object names; capitals do not matter."""
    found = value.get(key) if isinstance(value, dict) else None
    names = [name.casefold() for name in choices]
    if isinstance(found, str) and (name := found.strip().casefold()) in names:
        return names.index(name)
    return _unparsable(f"one of {', '.join(choices)} as {shown(key)}", value)


def texts(value: Any, key: str, n: int, longest: int) -> list[str] | Failure:
    """``n`` texts in a field of an object; they may have several lines."""
    given = answers(value.get(key) if isinstance(value, dict) else None, n)
    if isinstance(given, Failure):
        return given
    for each in given:
        if not isinstance(each, str) or not each.strip() or len(each) > longest:
            return _unparsable(f"texts of 1 to {longest} characters", each)
    # JSON can write half a character, which no tokenizer reads.
    return [each.encode(errors="replace").decode() for each in given]


def _unparsable(expected: str, found: Any) -> Failure:
    return Failure("unparsable", f"expected {expected}, found {shown(found)}")


# --- log-probabilities ---


def probabilities(reply: Reply, n: int) -> list[float] | None:
    """The probability of "true" for each of ``n`` answers, in the order in which the reply gives them.

    P(true) / (P(true) + P(false)) over the alternatives of each token that says true or false. None where
    the reply has no log-probabilities, or where its tokens do not say true or false ``n`` times.
    """
    said = [token for token in reply.tokens if _plain(token.text) in ("true", "false")]
    if len(said) != n:
        return None
    found = []
    for token in said:
        weights = _weights(token, {"true": 1.0, "false": 0.0})
        if not weights:
            return None
        found.append(sum(value * weight for value, weight in weights) / _total(weights))
    return found


def expected_values(reply: Reply, values: Sequence[float], highest: int) -> list[float]:
    """The expected value at each number of a reply, by the log-probabilities of its tokens.

    sum v p(v) / sum p(v) over the alternatives that are whole numbers from 0 to ``highest``, at the token
    that writes the number. Where there is no such token, because the judge gives no log-probabilities or
    writes a number with several tokens, it is the number itself.

    Args:
        reply: its text has the numbers as the values of an object, in order, or as a list.
        values: the numbers as they were read.
        highest: the end of the scale.
    """
    starts = [
        (match.start(1), match[1])
        for match in re.finditer(r"[:\[,]\s*\"?(\d+)\"?(?=\s*[,}\]])", reply.text)
    ]
    if not reply.tokens or [float(text) for _, text in starts] != list(values):
        return list(values)
    places: dict[int, ReplyToken] = {}
    place = 0
    for token in reply.tokens:
        places[place + len(token.text) - len(token.text.lstrip())] = token
        place += len(token.text)
    scale = {str(number): float(number) for number in range(highest + 1)}
    found = []
    for (start, text), value in zip(starts, values, strict=True):
        at = places.get(start)
        weights = _weights(at, scale) if at is not None and _plain(at.text) == text else []
        found.append(sum(v * p for v, p in weights) / _total(weights) if weights else value)
    return found


def _weights(token: ReplyToken, values: Mapping[str, float]) -> list[tuple[float, float]]:
    """Value and probability of the alternatives that have a value; " 1" and "1" are the same."""
    found = [
        (values[_plain(text)], math.exp(min(logprob, 0.0)))
        for text, logprob in token.alternatives.items()
        if _plain(text) in values
    ]
    return [(value, weight) for value, weight in found if weight > 0]  # vLLM's "not there" is -9999


def _total(weights: Sequence[tuple[float, float]]) -> float:
    return sum(weight for _, weight in weights)


def _plain(token: str) -> str:
    return token.strip(" \t\n\r\"',").casefold()
