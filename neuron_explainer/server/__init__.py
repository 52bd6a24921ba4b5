"""The HTTP server and its API: ``create_app()`` makes an application that can be served or mounted.

    app = create_app(stores=["out"])             # a FastAPI application
    uvicorn.run(app, host="127.0.0.1", port=8321)

Needs the extra ``serve``. Importing it, and serving pages and stores, does not import torch: the model
lives in another process.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_explainer.server.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from neuron_explainer.errors import optional_module

        optional_module("fastapi", "serving pages", "'neuron_explainer[serve]'")
        from neuron_explainer.server.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
