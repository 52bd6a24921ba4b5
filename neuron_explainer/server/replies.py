"""Replies as JSON: compressed where it pays, and with an ETag where they can be read again."""

import gzip
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from fastapi import Request
from starlette.responses import Response

_SMALLEST_COMPRESSED = 1400  # what fits into one packet is not made faster
_LEVEL = 5


def dumps(content: Any) -> bytes:
    """JSON. A number that is not finite is null; arrays of numpy are lists."""
    return orjson.dumps(content, _default, orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _default(value: object) -> Any:
    """What orjson does not take: arrays that are not contiguous, text with half a surrogate pair."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def json_reply(request: Request, content: Any, *, etag: bool = True) -> Response:
    """A reply to a read: 304 where the client has it already."""
    return bytes_reply(request, dumps(content), "application/json", etag=etag)


def bytes_reply(
    request: Request,
    body: bytes,
    media_type: str,
    *,
    etag: bool = True,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A reply of these bytes, compressed if the client takes that."""
    headers = dict(headers or {})
    if etag:
        tag = f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        headers["ETag"] = tag
        if tag in _tags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
    if len(body) >= _SMALLEST_COMPRESSED:
        headers["Vary"] = "Accept-Encoding"
        if takes_gzip(request):
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, _LEVEL, mtime=0)
    return Response(body, headers=headers, media_type=media_type)


def takes_gzip(request: Request) -> bool:
    """Whether a client takes compressed replies."""
    for part in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, weight = part.partition(";")
        if name.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _tags(header: str) -> set[str]:
    """The ETags of a header; weak and strong ones count as the same here."""
    tags = {tag.strip() for tag in header.split(",")}
    return tags | {f"W/{tag}" for tag in tags if tag.startswith('"')}
