"""What asking an endpoint may cost, what it has cost, and how fast requests may follow each other."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from neuron_explainer.analysis.explaining.explanation import Cost
from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.settings import check_types


class StoppedError(SourceError):
    """No further request makes sense. What was answered before is kept."""


class BudgetError(StoppedError):
    """The budget does not allow another request."""


@dataclass(frozen=True)
class Price:
    """What a million tokens cost, in whatever currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        _check_not_negative("a price", (self.prompt, self.completion))

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Limits:
    """What may be spent; None: as much as it takes."""

    requests: int | None = None
    tokens: int | None = None
    """Of prompts and replies together."""
    price: float | None = None
    """In the currency of the :class:`Price`."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _check_not_negative("a budget", (self.requests, self.tokens, self.price))
        for rate in (self.requests_per_minute, self.tokens_per_minute):
            if rate is not None and not rate > 0:
                raise InputError(f"a rate per minute must be above 0, found {rate}.")


def _check_not_negative(what: str, values: tuple[float | None, ...]) -> None:
    for value in values:
        if value is not None and value < 0:
            raise InputError(f"{what} must be a number of at least 0, found {value}.")


class Meter:
    """Counts what is sent, and refuses or delays what the limits do not allow. Threads share one.

    A request is reserved with the most that it may cost, and settled with what it did cost, so that the
    requests that are under way never exceed the budget together, unless a server writes more than it was
    allowed to. Rates are kept by spacing: after a request of a share of the minute's limit, the next one
    begins that share of a minute later. No minute, wherever it begins, has more than its limit and one.

    Args:
        limits: what may be spent.
        price: of tokens.
        clock: seconds.
    """

    def __init__(
        self, limits: Limits, price: Price, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if limits.price is not None and not price.prompt + price.completion > 0:
            raise InputError(
                f"a budget of {limits.price:,} for the price needs the prices of a million tokens "
                "(--prompt-price, --completion-price); without them it would limit nothing."
            )
        self.limits, self.price, self._clock = limits, price, clock
        self._lock = threading.Lock()
        self._spent = self._reserved = Cost()
        self._next = -float("inf")  # when the next request may begin

    @property
    def spent(self) -> Cost:
        """What the requests have cost until now."""
        return self._spent

    def cost(self, prompt_tokens: int, completion_tokens: int, requests: int = 1) -> Cost:
        """The cost of so many tokens."""
        price = self.price.of(prompt_tokens, completion_tokens)
        return Cost(requests, prompt_tokens, completion_tokens, price)

    def reserve(self, most: Cost) -> None:
        """Set aside the most that a request may cost; a BudgetError if it is not there."""
        with self._lock:
            after = self._spent + self._reserved + most
            tokens = after.prompt_tokens + after.completion_tokens
            for name, limit, need in (
                ("requests", self.limits.requests, after.requests),
                ("tokens", self.limits.tokens, tokens),
                ("price", self.limits.price, after.price),
            ):
                if limit is not None and need > limit:
                    raise BudgetError(
                        f"the budget of {limit:,} {name} does not allow another request: "
                        f"{self._so_far(name)} spent. What was answered is kept; the same command with a "
                        "larger budget goes on from here."
                    )
            self._reserved += most

    def _so_far(self, name: str) -> str:
        spent = self._spent
        tokens = spent.prompt_tokens + spent.completion_tokens
        return {
            "requests": f"{spent.requests:,} are",
            "tokens": f"{tokens:,} are",
            "price": f"{spent.price:.4g} is",
        }[name]

    def settle(self, most: Cost, actual: Cost) -> None:
        """Replace what was set aside by what was spent."""
        with self._lock:
            back = Cost(-most.requests, -most.prompt_tokens, -most.completion_tokens, -most.price)
            self._reserved += back
            self._spent += actual

    def wait(self, tokens: int, stop: threading.Event) -> None:
        """Wait until a request of so many tokens may begin, or until ``stop`` is set."""
        with self._lock:
            now = self._clock()
            begin = max(now, self._next)
            shares = [0.0]
            if self.limits.requests_per_minute is not None:
                shares.append(1 / self.limits.requests_per_minute)
            if self.limits.tokens_per_minute is not None:
                shares.append(tokens / self.limits.tokens_per_minute)
            if max(shares) > 0:
                self._next = begin + 60 * max(shares)
        if begin > now:
            stop.wait(min(begin - now, threading.TIMEOUT_MAX))

    def pause(self, seconds: float) -> None:
        """No request begins for so long: the server asked for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
