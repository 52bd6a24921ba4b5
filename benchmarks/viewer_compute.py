"""What the viewer's model answers, and how soon: the debugger on a model of GPT-2 small's shape.

Weights are random. Requests have 64 tokens and are answered in this process, as the worker's loop answers
them: no HTTP, no other process. Dictionaries have 32,768 latents (ReLU, about 450 active at a token) at what
each layer's attention and MLP write. Wall time is with two threads and
depends on who else computes; the CPU time of one thread hardly does.
"""

import statistics
import tempfile
import time
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
        for what, operation, request, goal in requests(session):
            rounds = 2 if quick else 3 if "every" in what else 15
            lines.append(
                _row(what, lambda o=operation, r=request: ask(session, o, r), goal, rounds)
            )
    return "\n".join(lines)


def make_session(folder: Path, quick: bool) -> Any:
    """A session with a random model and a dictionary for each layer's attention and MLP."""
    import torch

    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import StandardModelContext
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
    context = StandardModelContext(str(folder / "model"), "cpu")
    session = Session(Setup(context, tuple(sources)))
    session.autoencoders([source.id for source in sources])
    return session


def ask(session: Any, operation: str, request: dict[str, Any]) -> Any:
    """The answer to a request."""
    from neuron_explainer.server.compute.operations import answer

    *_, (_, payload) = answer(session, operation, request, lambda: None)
    return payload


def requests(session: Any) -> list[tuple[str, str, dict[str, Any], str]]:
    """Title, operation, request and the goal in milliseconds."""
    n_vocab, n_layers = session.model.n_vocab, session.model.n_layers
    ids = [(7919 * i + 13) % n_vocab for i in range(N_TOKENS)]
    debug: dict[str, Any] = {
        "prompts": [{"text": ids, "target": [5], "distractor": [9]}],
        "metrics": ["activation", "write_norm", "direct", "act_grad"],
        "position": -1,
        "top_k": 20,
        "top_logits": 20,
    }
    latents = {"units": {"mlp": "latent", "attention": "latent"}}
    middle = n_layers // 2
    head = {"node": {"location": f"{middle}/attn.v_out", "unit": 1, "position": -1}}
    latent = {
        "node": {
            "location": f"{middle}/resid.torso.delta_mlp",
            "unit": 7,
            "position": -1,
            "dictionary": f"mlp.{middle}",
        }
    }
    every = {"position": "all"}
    heads = [[layer, head] for layer in range(n_layers) for head in range(4)]
    generate: dict[str, Any] = {"prompt": ids, "max_new": 20, "seed": 0, "temperature": 1.0}
    generate |= {"top_p": None, "interventions": [{**head, "action": "zero"}], "baseline": True}
    n = 2 * n_layers
    return [
        ("debug, neurons and heads, last token", "debug", debug, "500"),
        ("debug, neurons and heads, all tokens", "debug", debug | every, "500"),
        (f"debug, {n} dictionaries, last token", "debug", debug | latents, "800"),
        (f"debug, {n} dictionaries, every token", "debug", debug | latents | every, "2,500"),
        (
            "a head ablated, neurons and heads",
            "debug",
            debug | {"interventions": [{**head, "action": "zero"}]},
            "600",
        ),
        (
            f"a latent ablated, {n} dictionaries",
            "debug",
            debug | latents | {"interventions": [{**latent, "action": "zero"}]},
            "600",
        ),
        (
            "attention, 48 heads",
            "attention",
            {"text": ids, "heads": heads, "kind": "pattern"},
            "250",
        ),
        (
            "lens, every token, after each layer",
            "lens",
            {"text": ids, "points": ["post"], "positions": None, "k": 5},
            "1,200",
        ),
        ("tokens of a latent", "logits", {"dictionary": "mlp.0", "unit": 7, "k": 10}, ""),
        ("two texts of 20 new tokens", "generate", generate, ""),
    ]


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
