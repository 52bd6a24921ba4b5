"""Clients of an application, and the token that they send."""

from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from neuron_explainer.server import create_app

TOKEN = "0123456789abcdef-test"
API = "/api/v1"


def app_with(stores: Any = ("tiny-tales",), **settings: Any) -> FastAPI:
    """An application whose token is :data:`TOKEN`."""
    return create_app(stores, token=TOKEN, **settings)


def client_of(app: FastAPI, token: str | None = TOKEN, **headers: str) -> TestClient:
    """A client on this machine, which sends the token."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    # A server's error is an answer to look at, as it is for other clients.
    return TestClient(app, "http://127.0.0.1:8321", headers=headers, raise_server_exceptions=False)
