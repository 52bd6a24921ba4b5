"""What the viewer's model answers, and how soon: the debugger on a model of GPT-2 small's shape.

Weights are random. Requests have 64 tokens and are answered in this process, as the worker's loop answers
them: no HTTP, no other process. Dictionaries have 32,768 latents (ReLU, about 450 active at a token) at what
each layer's attention and MLP write. A request for a table has a prompt of its own each time, of which
nothing is known yet; one for an intervention follows one for the same prompt without it, as on the page, and
differs from those before it. Wall time is with two threads and depends on who else computes; the CPU time of
one thread hardly does.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

N_TOKENS = 64
THREADS = 2


def run(quick: bool) -> str:
    """Measure, and return a table."""
    with tempfile.TemporaryDirectory() as scratch:
        session = make_session(Path(scratch), quick)
        lines = [
            "| request | p50, ms | p95, ms | CPU with one thread, ms | goal |",
            "|---|--:|--:|--:|---|",
            _row("products of a forward and a backward pass", _floor(session), "", 5),
        ]
        for what, call, goal in calls(session):
            rounds = 2 if quick else 3 if "every" in what else 15
            lines.append(_row(what, call, goal, rounds))
    return "\n".join(lines)


def make_session(folder: Path, quick: bool) -> Any:
    """A session with a random model and a dictionary for each layer's attention and MLP."""
    import torch

    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.transformer import Transformer, TransformerConfig
    from neuron_explainer.server.compute.operations import Session
    from neuron_explainer.server.compute.setup import DictionarySource, Setup

    torch.set_num_threads(THREADS)
    sizes: dict[str, Any] = {"d_model": 768, "n_layers": 12, "n_heads": 12, "n_vocab": 50257}
    if quick:
        sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_vocab": 500}
    n_latents = 64 * sizes["d_model"] // 3 * 2 if not quick else 128
    config = TransformerConfig(enc="none", ctx_window=1024, m_mlp=4, **sizes)
    Transformer(config, seed=0).save(folder / "model")
    autoencoder = Autoencoder(
        n_latents, sizes["d_model"], tied=True, input_normalization="layer_norm"
    )
    with torch.no_grad():
        torch.nn.init.normal_(autoencoder.encoder.weight, std=sizes["d_model"] ** -0.5)
        autoencoder.latent_bias.fill_(-2.2)
    autoencoder.save(folder / "autoencoder")
    sources = [
        DictionarySource(f"{part}.{layer}", f"{layer}/resid.torso.delta_{part}", "latent",
                         str(folder / "autoencoder"))
        for part in ("attn", "mlp")
        for layer in range(sizes["n_layers"])
    ]  # fmt: skip
    session = Session(Setup(str(folder / "model"), tuple(sources), device="cpu"))
    session.autoencoders([source.id for source in sources])
    return session


def ask(session: Any, operation: str, request: dict[str, Any]) -> Any:
    """The answer to a request."""
    from neuron_explainer.server.compute.operations import answer

    *_, (_, payload) = answer(session, operation, request, lambda: None)
    return payload


def first_rows(session: Any, request: dict[str, Any]) -> None:
    """Ask for a table in parts, until the rows of the first sublayer are there."""
    from neuron_explainer.server.compute.operations import answer

    for _, (name, part) in answer(session, "debug_streamed", request, lambda: None):
        if name == "nodes" and part["number"] == 2:  # the first is the embedding
            return


def calls(session: Any) -> list[tuple[str, Callable[[], Any], str]]:
    """Title, what to measure, and the goal in milliseconds."""
    n_layers, n = session.model.n_layers, 2 * session.model.n_layers
    numbers = itertools.count()
    latents = {"units": {"mlp": "latent", "attention": "latent"}}
    every = {"position": "all"}

    def debug(**more: Any) -> dict[str, Any]:
        prompt = {"text": _ids(session, next(numbers)), "target": [5], "distractor": [9]}
        metrics = ["activation", "write_norm", "direct", "act_grad"]
        sizes = {"position": -1, "top_k": 20, "top_logits": 20}
        return {"prompts": [prompt], "metrics": metrics, **sizes, **more}

    def changed(node: dict[str, Any], **more: Any) -> Callable[[], Any]:
        plain = debug(**more)
        ask(session, "debug", plain)
        others = itertools.count()

        def next_one() -> Any:
            unit = next(others) % session.facts()["n_heads"]
            change = {"node": node | {"unit": unit, "position": next(others)}, "action": "zero"}
            return ask(session, "debug", plain | {"interventions": [change]})

        return next_one

    middle = n_layers // 2
    head = {"location": f"{middle}/attn.v_out"}
    latent = {"location": f"{middle}/resid.torso.delta_mlp", "dictionary": f"mlp.{middle}"}
    known, choices = debug(**latents, **every), itertools.cycle(range(2, 20))

    def chosen_anew() -> Any:
        return ask(session, "debug", known | {"top_k": next(choices)})

    return [
        ("debug, neurons and heads, last token", lambda: ask(session, "debug", debug()), "500"),
        (
            "debug, neurons and heads, all tokens",
            lambda: ask(session, "debug", debug(**every)),
            "500",
        ),
        (
            f"debug, {n} dictionaries, last token",
            lambda: ask(session, "debug", debug(**latents)),
            "800",
        ),
        (
            f"debug, {n} dictionaries, every token",
            lambda: ask(session, "debug", debug(**latents, **every)),
            "2,500",
        ),
        (
            f"first rows of debug, {n} dictionaries, all tokens",
            lambda: first_rows(session, debug(**latents, **every)),
            "500",
        ),
        ("a head ablated, neurons and heads", changed(head), "600"),
        (f"a head ablated, {n} dictionaries", changed(head, **latents), "600"),
        (f"a latent ablated, {n} dictionaries", changed(latent, **latents), "600"),
        (
            f"a latent ablated, {n} dictionaries, every token",
            changed(latent, **latents, **every),
            "",
        ),
        (f"other nodes of a table, {n} dictionaries, every token", chosen_anew, ""),
        *_other_calls(session, head),
    ]


def _other_calls(session: Any, head: dict[str, Any]) -> list[tuple[str, Callable[[], Any], str]]:
    """What is not the debugger."""
    ids, n_layers = _ids(session, 0), session.model.n_layers
    generate: dict[str, Any] = {"prompt": ids, "max_new": 20, "seed": 0, "temperature": 1.0}
    change = {"node": head | {"unit": 1, "position": -1}, "action": "zero"}
    generate |= {"top_p": None, "interventions": [change], "baseline": True}
    heads = [[layer, head] for layer in range(n_layers) for head in range(4)]
    attention = {"text": ids, "heads": heads, "kind": "pattern"}
    lens = {"text": ids, "points": ["post"], "positions": None, "k": 5}
    logits = {"dictionary": "mlp.0", "unit": 7, "k": 10}
    return [
        ("attention, 48 heads", lambda: ask(session, "attention", attention), "250"),
        ("lens, every token, after each layer", lambda: ask(session, "lens", lens), "1,200"),
        ("tokens of a latent", lambda: ask(session, "logits", logits), ""),
        ("two texts of 20 new tokens", lambda: ask(session, "generate", generate), ""),
    ]


def _ids(session: Any, number: int) -> list[int]:
    """A prompt, another one for each number."""
    return [(7919 * i + 13 + 104_729 * number) % session.model.n_vocab for i in range(N_TOKENS)]


def _floor(session: Any) -> Any:
    """The products of a pass and of its gradients for 64 tokens, and nothing else."""
    import torch

    d, n_layers = session.facts()["d_model"], session.model.n_layers
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    weights = [torch.randn(shape) for shape in shapes]
    inputs = [torch.randn(N_TOKENS, shape[0]) for shape in shapes]

    def products() -> None:
        for _ in range(2 * n_layers):  # forward, and back to the inputs
            for x, weight in zip(inputs, weights, strict=True):
                torch.mm(x, weight)

    return products


def _row(what: str, call: Any, goal: str, rounds: int) -> str:
    import torch

    call()
    walls = _times(call, rounds, time.perf_counter)
    torch.set_num_threads(1)  # threads that wait for each other would count too
    cpu = _times(call, min(rounds, 5), time.process_time)
    torch.set_num_threads(THREADS)
    p95 = sorted(walls)[round(0.95 * (len(walls) - 1))]
    return (
        f"| {what} | {statistics.median(walls):,.0f} | {p95:,.0f} | {statistics.median(cpu):,.0f} | "
        f"{goal} |"
    )


def _times(call: Any, rounds: int, clock: Any) -> list[float]:
    """Milliseconds of each round."""
    found = []
    for _ in range(rounds):
        begin = clock()
        call()
        found.append(1e3 * (clock() - begin))
    return found
