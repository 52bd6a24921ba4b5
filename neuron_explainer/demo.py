"""The whole loop in one minute: each step is shown as source, run, and its result printed.

:func:`tour` is an ordinary function; its source, cut at each ``yield``, is what the reader sees. So what
is shown is what ran, and the tests, the linter and the type checker see it as well.
"""

import ast
import inspect
import io
import textwrap
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any, NamedTuple

WHY = {
    "Load a model": (
        "tiny-tales ships with the package: a GPT-2 architecture trained on public-domain tales."
    ),
    "Sample from it": (
        "Greedy or random, one prompt or many of unequal length, with or without hooks."
    ),
    "Look inside": (
        "One forward pass gives the activations at any set of locations, and stops once it has them."
    ),
    "Encode activations as sparse latents": (
        "A TopK autoencoder was trained at each layer; only a few of its latents fire on a token."
    ),
    "Intervene": (
        "Splice the autoencoder into the forward pass, add its error back, and switch off the latent "
        "that is strongest on the last token. What follows changes because of that one latent alone."
    ),
    "Ablate while sampling": (
        "A hook is any function (x, layer=..., **kwargs) -> x, at any location, and runs at every step. "
        "Here attention in layer 1 adds nothing to the stream."
    ),
}
"""For each step of :func:`tour`, by its title: what the step is about."""


def tour() -> Iterator[str]:
    """The demonstration. Each step begins where its title is yielded."""
    yield "Load a model"
    import torch

    from neuron_explainer.models.transformer import Transformer

    model = Transformer.load("tiny-tales", device="cpu", dtype=torch.float32)
    print(f"{model.cfg.n_layers} layers, width {model.cfg.d_model}, {model.n_vocab} tokens")

    yield "Sample from it"
    prompt = "Once upon a time there was a"
    out = model.sample(prompt, num_tokens=40, temperature=0.7, top_p=0.9, seed=0)
    print(out["strings"][0])

    yield "Look inside"
    text = "The king gave his daughter a golden"
    with torch.no_grad():
        found = model.capture(text, ["3/resid.torso.delta_mlp", "1/attn.qk_probs"])
    print(found)

    yield "Encode activations as sparse latents"
    from neuron_explainer.models.model_registry import make_autoencoder_context

    context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device="cpu")
    latents = context.get_autoencoder(3).encode(found["3/resid.torso.delta_mlp"][0])
    for token, row in zip(model.enc.encode(text), latents, strict=True):
        top = ", ".join(f"{i}: {row[i]:.2f}" for i in row.topk(3).indices.tolist())
        print(f"{model.enc.decode([token])!r:>12}  {int((row > 0).sum())} fire; strongest  {top}")

    yield "Intervene"
    latent = int(latents[-1].argmax())

    def ablate(latents: torch.Tensor) -> torch.Tensor:
        latents[..., latent] = 0
        return latents

    without_latent = context.hooks(on_latents=ablate, layers=[3])
    tokens = torch.tensor([model.enc.encode(text)])
    with torch.no_grad():
        before = model(tokens)[0][0, -1].softmax(-1)
        after = model(tokens, hooks=without_latent)[0][0, -1].softmax(-1)
    print(f"latent {latent} of layer 3 off; the next token's probability, before and after:")
    for i in (after - before).abs().topk(5).indices.tolist():
        print(f"{model.enc.decode([i])!r:>12}  {before[i]:.3f} -> {after[i]:.3f}")

    yield "Ablate while sampling"
    from neuron_explainer.models.hooks import AtLayers, TransformerHooks

    hooks = TransformerHooks()
    hooks.resid.torso.delta_attn.append_fwd(AtLayers(1).append(torch.zeros_like))
    print(hooks)
    print(text + model.sample(text, num_tokens=12, temperature=0)["strings"][0])
    print(text + model.sample(text, num_tokens=12, temperature=0, hooks=hooks)["strings"][0])


class Step(NamedTuple):
    """One thing that is shown."""

    title: str
    why: str
    code: str


def steps() -> list[Step]:
    """The steps of :func:`tour`, read from its source."""
    source = textwrap.dedent(inspect.getsource(tour))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    starts = [
        (node.lineno, node.value.value.value)
        for node in function.body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Yield)
        and isinstance(node.value.value, ast.Constant)
    ]
    lines = source.splitlines()
    ends = [line - 1 for line, _ in starts[1:]] + [len(lines)]
    return [
        Step(str(title), WHY[str(title)], textwrap.dedent("\n".join(lines[line:end])).strip())
        for (line, title), end in zip(starts, ends, strict=True)
    ]


def run(echo: bool = True) -> list[dict[str, Any]]:
    """Run :func:`tour`; print each step as it happens if ``echo`` is set.

    Returns:
        A dict for each step: ``title``, ``why``, ``code``, ``output``, ``seconds``.
    """
    results = []
    running = tour()
    next(running)
    for number, step in enumerate(steps(), start=1):
        if echo:
            print(f"\n{number}. {step.title}. {step.why}\n")
            print(as_session(step.code) + "\n")
        start, output = time.perf_counter(), io.StringIO()
        with redirect_stdout(output):
            next(running, None)
        if echo:
            print(output.getvalue(), end="", flush=True)
        results.append(
            step._asdict()
            | {"output": output.getvalue(), "seconds": round(time.perf_counter() - start, 3)}
        )
    return results


def as_session(code: str) -> str:
    """Source as it would look at Python's prompt: ``>>>`` before a statement, ``...`` inside one."""
    starts = {node.lineno for node in ast.parse(code).body}
    return "\n".join(
        f"    {'>>>' if number in starts else '...'} {line}"
        for number, line in enumerate(code.splitlines(), start=1)
        if line
    )
