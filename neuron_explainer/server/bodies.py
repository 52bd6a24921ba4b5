"""Bodies of requests as JSON: strict, so that no value comes in that a reply could not hold."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response


class StrictRequest(Request):
    """A request whose JSON has no NaN, no infinity, no half surrogate pairs and no bottomless nesting."""

    async def json(self) -> Any:
        """The body; what is wrong with it is the error of ``json.loads``."""
        body = await self.body()
        value = orjson.loads(body)
        try:
            orjson.dumps(
                value
            )  # reads nest deeper than orjson writes: what came in must go out again
        except orjson.JSONEncodeError:
            raise json.JSONDecodeError("nested too deeply", "", 0) from None
        return value


class StrictRoute(APIRoute):
    """A route whose bodies are read by :class:`StrictRequest`: ``APIRouter(route_class=StrictRoute)``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's way to give a route another kind of request."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
