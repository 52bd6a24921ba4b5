"""Looking in the browser: serve."""

import argparse
import contextlib
import logging
import math
import os
import socket
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, option, positive, say
from neuron_explainer.errors import InputError, SourceError, optional_module

if TYPE_CHECKING:
    from fastapi import FastAPI

DEFAULT_STORE = "tiny-tales"
DEFAULT_PORT = 8321
_SECONDS_TO_FINISH = 5


def register(verbs: Any) -> None:
    """Declare the verb and its options."""
    serve = add_verb(
        verbs,
        "serve",
        "pages of a model and its dictionaries, in the browser",
        run_serve,
        show_serve,
        example="neuron-explainer serve",
    )
    serve.add_argument(
        "--store",
        action="append",
        metavar="PATH",
        help=f"a store or a folder of stores; may be given several times (default: {DEFAULT_STORE})",
    )
    serve.add_argument("--model", metavar="NAME", help="the model (default: the one of the stores)")
    serve.add_argument(
        "--autoencoder", action="append", metavar="NAME", help="may be given several times"
    )
    serve.add_argument(
        "--factors",
        action="append",
        default=[],
        metavar="EXAMPLES",
        help="a folder that factors collate wrote; may be given several times",
    )
    serve.add_argument("--device", metavar="NAME", help="where the model runs, such as cuda:0")
    option(
        serve, "--memory", "GiB for autoencoders; those used longest ago are dropped", 4.0, type=gib
    )
    option(
        serve,
        "--cache",
        "GiB for results of earlier requests; those used longest ago are dropped",
        0.5,
        type=gib,
    )
    option(serve, "--max-tokens", "longest prompt", 256, type=positive)
    serve.add_argument("--no-model", action="store_true", help="show the stores only")
    _declare_access(serve)
    serve.add_argument("--open", action="store_true", help="open the page in the browser")
    serve.add_argument(
        "--verbose", action="store_true", help="a line for each request, without its text"
    )
    serve.add_argument(
        "--log-prompts",
        action="store_true",
        help="lines for each request, with the texts that it gives to the model",
    )


def _declare_access(serve: argparse.ArgumentParser) -> None:
    """Where the server is reached, and by whom."""
    option(serve, "--host", "address to listen on", "127.0.0.1")
    option(serve, "--port", "0: any free one", DEFAULT_PORT)
    token = serve.add_mutually_exclusive_group()
    token.add_argument("--token", help="what clients must send (default: a random one)")
    token.add_argument("--token-file", metavar="PATH", help="a file that holds the token")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this server",
    )
    serve.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="another web page that may use the API, such as https://lab.example",
    )
    option(serve, "--base-path", "path under which a proxy shows this server", "")
    option(serve, "--frame-ancestors", "who may show the pages in a frame", "'self'")
    serve.add_argument("--read-only", action="store_true", help="labels cannot be changed")


def gib(text: str) -> float:
    """A finite number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def run_serve(args: argparse.Namespace) -> Result:
    """Serve pages until Ctrl-C."""
    optional_module("fastapi", "serve", "'neuron_explainer[serve]'")
    uvicorn = optional_module("uvicorn", "serve", "'neuron_explainer[serve]'")
    from neuron_explainer.server.connections import protocol_with_deadline

    token = _token(args)
    app = _app(args, token)
    with contextlib.ExitStack() as stack:
        stack.callback(app.state.serving.registry.close)
        listening = _listen(args.host, args.port)
        for each in listening:
            stack.enter_context(each)
        port = listening[0].getsockname()[1]
        if args.verbose or args.log_prompts:
            logging.getLogger("neuron_explainer").setLevel(logging.DEBUG)
        config = uvicorn.Config(
            app,
            lifespan="on",
            access_log=False,  # it would hold the queries
            log_config=None,
            server_header=False,
            proxy_headers=False,  # anyone can send these
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
            h11_max_incomplete_event_size=64 << 10,
            http=protocol_with_deadline(app.state.serving.limits.header_seconds),
            ws="none",
        )
        url = _url(args, app, port)
        say(f"Looking at {_contents(app)}.\n\n    {url}\n\nCtrl-C ends it.")
        sys.stdout.flush()  # whoever reads this through a pipe waits for the address
        if args.open:
            import webbrowser

            webbrowser.open(url)
        uvicorn.Server(config).run(sockets=listening)
    return {"stopped": True}


def show_serve(result: Result) -> None:
    """Say that it has ended."""
    say("Stopped.")


# --- what the options mean ---


def _token(args: argparse.Namespace) -> str | None:
    """The token that was given; None: the server makes one. Other machines need one that was chosen."""
    from neuron_explainer.server.security import is_loopback

    if args.token_file:
        path = files.local_path(args.token_file)
        files.check_regular(path)
        try:
            token: str | None = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"cannot read the token from {path}: {error}") from error
    else:
        token = args.token
    if token is None and not is_loopback(args.host):
        raise InputError(
            f"--host {args.host} shows this server to other machines: whoever has the token can read all "
            "stores and labels, change labels (but with --read-only) and run the model. Choose the token "
            "yourself, with --token-file PATH or --token TOKEN, and put a proxy with TLS in front: the "
            "token is sent as it is."
        )
    return token


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen on an address; on that of this machine, in both versions of the protocol."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = [_bound(family, str(address[0]), port)]
    except OSError as error:
        raise SourceError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. --port 0 takes any free port."
        ) from error
    if host == "127.0.0.1":
        with contextlib.suppress(OSError):  # a machine without IPv6
            found.append(_bound(socket.AF_INET6, "::1", found[0].getsockname()[1]))
    return found


def _bound(family: int, host: str, port: int) -> socket.socket:
    # asyncio sends small parts at once (TCP_NODELAY) only where the protocol is named; without that
    # every answer waits 40 ms for an acknowledgement of its header.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind((host, port))
        found.listen(128)
    except BaseException:
        found.close()
        raise
    return found


def _app(args: argparse.Namespace, token: str | None) -> "FastAPI":
    from neuron_explainer.server.app import create_app
    from neuron_explainer.server.limits import Limits
    from neuron_explainer.server.registry import Registry, not_remote

    if not 0 <= args.port <= 65535:
        raise InputError(f"expected a port from 0 to 65535, found {args.port}.")
    registry = Registry(args.store or [DEFAULT_STORE])
    model = args.model or not_remote(registry.model)
    if model is None and not args.no_model:
        say("No model: --model says which one the stores belong to.")
    return create_app(
        registry,
        None if args.no_model else model,
        [_absolute(name) for name in args.autoencoder or ()],
        token=token,
        base_path=args.base_path,
        read_only=args.read_only,
        factors=args.factors,
        hosts=[args.host, *args.allow_host],
        any_address=args.host in ("0.0.0.0", "::"),
        origins=args.allow_origin,
        frame_ancestors=args.frame_ancestors,
        limits=Limits(
            max_tokens=args.max_tokens,
            autoencoder_bytes=round(args.memory * 2**30),
            kept_bytes=round(args.cache * 2**30),
        ),
        device=args.device,
        log_prompts=args.log_prompts,
    )


def _absolute(name: str) -> str:
    """A path as the model's process finds it; other names stay as they are."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _url(args: argparse.Namespace, app: "FastAPI", port: int) -> str:
    policy = app.state.serving.policy
    host = "127.0.0.1" if args.host in ("0.0.0.0", "::", "localhost") else args.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}{policy.base_path}/?token={quote(policy.token, safe='')}"


def _contents(app: "FastAPI") -> str:
    served = app.state.serving
    n = len(served.registry)
    units = sum(shelf.n for shelf in served.registry)
    what = "1 dictionary" if n == 1 else f"{n} dictionaries"
    return f"{what}, {units:,} units" + (f", of {served.model_name}" if served.model_name else "")
