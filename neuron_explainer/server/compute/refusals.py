"""Why a request to the model is not answered."""

from collections.abc import Iterable
from typing import Any


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        code: a short name of the error, for programs.
        detail: what was expected, what was found, and what to do.
        loc: the part of the request that is wrong.
        allowed: the values that are allowed there, or those nearest to what was given.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        loc: Iterable[str | int] | None = None,
        allowed: Iterable[str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.loc = None if loc is None else list(loc)
        self.allowed = None if allowed is None else list(allowed)
        self.retry_after = retry_after

    def facts(self) -> dict[str, Any]:
        """The arguments, to be sent to another process."""
        return vars(self)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Refusal":
        """From :meth:`facts`."""
        return cls(**facts)


class Cancelled(Exception):
    """Nobody waits for the answer any more."""
