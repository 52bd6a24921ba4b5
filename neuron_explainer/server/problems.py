"""Errors as ``application/problem+json`` (RFC 9457): every reply that is not a success has this form."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response

from neuron_explainer.analysis.store_format import encodable
from neuron_explainer.errors import (
    CheckpointError,
    InputError,
    MissingExtraError,
    NeuronExplainerError,
    SourceError,
)

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
}
_MOST_ERRORS = 10


class ProblemReply(BaseModel):
    """What an error looks like."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    loc: list[str | int] | None = None
    allowed: list[str] | None = None
    retry_after: int | None = None
    request_id: str | None = None


class Problem(Exception):
    """An error to answer with.

    Args:
        status: the HTTP status.
        code: a short name of the error, for programs.
        detail: what was expected, what was found, and what to do.
        loc: the part of the request that is wrong, such as ``("body", "texts", 0)``.
        allowed: the values that are allowed there.
        retry_after: seconds after which the same request may succeed.
        headers: further headers of the reply.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        loc: Sequence[str | int] | None = None,
        allowed: Sequence[str] | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.loc, self.allowed = loc, allowed
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))
        self.headers = dict(headers or {})


def problem_reply(problem: Problem, request_id: str | None = None) -> Response:
    """The reply that states a problem."""
    content: dict[str, Any] = {
        "type": f"urn:neuron-explainer:problem:{problem.code}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": encodable(problem.detail),  # names of files may not be Unicode
        "code": problem.code,
        "loc": None if problem.loc is None else [_plain(part) for part in problem.loc],
        "allowed": None if problem.allowed is None else [_plain(each) for each in problem.allowed],
        "retry_after": problem.retry_after,
        "request_id": request_id,
    }
    headers = problem.headers
    if problem.retry_after is not None:
        headers = headers | {"Retry-After": str(problem.retry_after)}
    return Response(orjson.dumps(content), problem.status, headers, MEDIA_TYPE)


def _plain(part: str | int) -> str | int:
    return encodable(part)[:500] if isinstance(part, str) else part


def as_problem(error: NeuronExplainerError) -> Problem:
    """The problem that an error of the library is for a client."""
    if isinstance(error, InputError):
        return Problem(422, "invalid_input", str(error))
    if isinstance(error, MissingExtraError):
        return Problem(501, "missing_extra", str(error))
    if isinstance(error, CheckpointError):
        return Problem(503, "store_unavailable", str(error), retry_after=1)
    if isinstance(error, SourceError):
        return Problem(503, "source_unavailable", str(error), retry_after=1)
    return Problem(422, "invalid_input", str(error))


def _of_validation(error: RequestValidationError) -> Problem:
    """The first error, with its place and the values that are allowed there; the text lists more."""
    errors: list[Any] = list(error.errors())
    lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors[:_MOST_ERRORS]]
    if len(errors) > _MOST_ERRORS:
        lines.append(f"and {len(errors) - _MOST_ERRORS} more")
    first: Any = errors[0] if errors else {"loc": ()}
    allowed = None
    if first.get("type") in ("literal_error", "enum"):
        allowed = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
    return Problem(422, "invalid_request", "; ".join(lines), loc=first["loc"], allowed=allowed)


def _of_http(error: HTTPException) -> Problem:
    detail = error.detail if isinstance(error.detail, str) else HTTPStatus(error.status_code).phrase
    code = _CODES.get(error.status_code, f"http_{error.status_code}")
    return Problem(error.status_code, code, detail, headers=error.headers)


def install(app: FastAPI, secure: Callable[[MutableHeaders], None]) -> None:
    """Answer every error of an application with a problem.

    Args:
        app: the application.
        secure: adds the headers that every reply has. Errors that nobody foresaw are answered outside of
            the guard, which adds them to all other replies.
    """

    def reply(request: Request, problem: Problem) -> Response:
        return problem_reply(problem, getattr(request.state, "request_id", None))

    @app.exception_handler(Problem)
    async def of_problem(request: Request, error: Problem) -> Response:
        return reply(request, error)

    @app.exception_handler(NeuronExplainerError)
    async def of_library(request: Request, error: NeuronExplainerError) -> Response:
        return reply(request, as_problem(error))

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        return reply(request, _of_validation(error))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return reply(request, _of_http(error))

    @app.exception_handler(Exception)
    async def of_anything(request: Request, error: Exception) -> Response:
        # The text of an unforeseen error may hold what the client sent: it goes to the log only.
        text = "The server failed at this request. Its log has the reason, under this request_id."
        found = reply(request, Problem(500, "internal_error", text))
        secure(found.headers)
        found.headers["X-Request-Id"] = str(getattr(request.state, "request_id", ""))
        return found
