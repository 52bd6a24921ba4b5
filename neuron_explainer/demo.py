"""The whole loop in one minute: each step is shown, run as shown, and its result printed.

The steps are source text because that is the point of a demonstration: what the reader sees is what
ran, so they cannot come apart.
"""

import ast
import io
import time
from contextlib import redirect_stdout
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One thing to show."""

    title: str
    why: str
    code: str


STEPS = [
    Step(
        "Load a model",
        "tiny-tales ships with the package: a GPT-2 architecture trained on public-domain tales.",
        """\
import torch
from neuron_explainer.models.transformer import Transformer
model = Transformer.load("tiny-tales", device="cpu", dtype=torch.float32)
print(f"{model.cfg.n_layers} layers, width {model.cfg.d_model}, {model.n_vocab} tokens")""",
    ),
    Step(
        "Sample from it",
        "Greedy or random, one prompt or many of unequal length, with or without hooks.",
        """\
out = model.sample("Once upon a time there was a", num_tokens=40, temperature=0.7, top_p=0.9, seed=0)
print(out["strings"][0])""",
    ),
    Step(
        "Look inside",
        "One forward pass gives the activations at any set of places, and stops once it has them.",
        """\
text = "The king gave his daughter a golden"
with torch.no_grad():
    found = model.capture(text, ["3/resid.torso.delta_mlp", "1/attn.qk_probs"])
print(found)""",
    ),
    Step(
        "Encode activations as sparse latents",
        "A TopK autoencoder was trained at each layer; only a few of its latents fire on a token.",
        """\
from neuron_explainer.models.model_registry import make_autoencoder_context
context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device="cpu")
latents = context.get_autoencoder(3).encode(found["3/resid.torso.delta_mlp"][0])
for token, row in zip(model.enc.encode(text), latents):
    strongest = ", ".join(f"{i}: {row[i]:.2f}" for i in row.topk(3).indices.tolist())
    print(f"{model.enc.decode([token])!r:>12}  {int((row > 0).sum())} fire; strongest  {strongest}")""",
    ),
    Step(
        "Intervene",
        "Splice the autoencoder into the forward pass, its error added back, and switch off the latent "
        "that is strongest on the last token: what follows changes, because of that one latent alone.",
        """\
latent = int(latents[-1].argmax())
def ablate(latents):
    latents[..., latent] = 0
    return latents
hooks = context.hooks(on_latents=ablate, layers=[3])
tokens = torch.tensor([model.enc.encode(text)])
with torch.no_grad():
    before = model(tokens)[0][0, -1].softmax(-1)
    after = model(tokens, hooks=hooks)[0][0, -1].softmax(-1)
print(f"latent {latent} of layer 3 off; the next token's probability, before and after:")
for i in (after - before).abs().topk(5).indices.tolist():
    print(f"{model.enc.decode([i])!r:>12}  {before[i]:.3f} -> {after[i]:.3f}")""",
    ),
    Step(
        "Ablate while sampling",
        "A hook is any function (x, layer=..., **kwargs) -> x, at any place, and runs at every step. Here "
        "attention in layer 1 adds nothing to the stream.",
        """\
from neuron_explainer.models.hooks import AtLayers, TransformerHooks
def nothing(x):
    return torch.zeros_like(x)
hooks = TransformerHooks()
hooks.resid.torso.delta_attn.append_fwd(AtLayers(1).append(nothing))
print(hooks)
print(text + model.sample(text, num_tokens=12, temperature=0)["strings"][0])
print(text + model.sample(text, num_tokens=12, temperature=0, hooks=hooks)["strings"][0])""",
    ),
]


def run(steps: list[Step] = STEPS, echo: bool = True) -> list[dict[str, Any]]:
    """Run the steps in one namespace; print each as it happens where ``echo`` is set.

    Returns:
        A dict a step: ``title``, ``why``, ``code``, ``output``, ``seconds``.
    """
    namespace: dict[str, Any] = {}
    results = []
    for number, step in enumerate(steps, start=1):
        if echo:
            print(f"\n{number}. {step.title}. {step.why}\n")
            print(as_session(step.code) + "\n")
        start, output = time.perf_counter(), io.StringIO()
        with redirect_stdout(output):
            exec(compile(step.code, f"<step {number}>", "exec"), namespace)
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
    )
