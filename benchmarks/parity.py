"""How far results differ from independent ones: Hugging Face, solo runs, plain paths.

The model has random weights and GPT-2 small's shape, in float32. Each figure is the largest difference
divided by the largest value of the other result. For trained dictionaries the table also says how often
a certified search (``neuron_explainer/kernels/certified.py``) cannot prove its answer and is repeated in
float32.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.kernels.certified import certified_top_k, prepare
from neuron_explainer.models.autoencoder import TopK
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.sampling import prep_input_and_pad
from neuron_explainer.models.transformer import Transformer


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference divided by the largest finite value."""
    finite = expected.isfinite()
    difference = (found.double() - expected.double())[finite].abs().max()
    return float(difference / expected[finite].abs().max())


def run(repeats: int) -> str:
    """The table; each figure is the worst of ``repeats`` batches."""
    torch.manual_seed(0)
    theirs, ours = _models()
    worst: dict[str, float] = {}
    for _ in range(min(repeats, 3)):
        for name, value in _figures(theirs, ours).items():
            worst[name] = max(worst.get(name, 0.0), value)
    lines = [f"{name:<58} {value:.1e}" for name, value in worst.items()]
    return "\n".join([*lines, "", *_rows_redone()])


@torch.no_grad()
def _rows_redone() -> list[str]:
    """For every autoencoder of ``tiny-tales``, how many rows of a text are redone in float32."""
    model = Transformer.load("tiny-tales", dtype=torch.float32, device="cpu")
    lines = []
    for name in ("ae-mlp-post-act", "ae-resid-delta-attn", "ae-resid-delta-mlp"):
        context = make_autoencoder_context("tiny-tales", name, device="cpu")
        for layer in range(model.cfg.n_layers):
            autoencoder = context.get_autoencoder(layer)
            location = context.location.at(layer)
            found = model.capture(PASSAGE.split("\n\n"), location)
            assert found.pad is not None
            rows = autoencoder.normalize(found[location][~found.pad])[0] - autoencoder.pre_bias
            weight, bias = autoencoder.encoder.weight, autoencoder.latent_bias
            assert isinstance(autoencoder.activation, TopK)
            k = autoencoder.activation.k
            proven = certified_top_k(rows, weight, bias, k, prepare(weight, bias))[2]
            shown = f"rows redone, {location}, {len(weight)} latents, k = {k}"
            lines.append(f"{shown:<58} {len(rows) - int(proven.sum())} of {len(rows)}")
    return lines


def _models() -> tuple[torch.nn.Module, Transformer]:
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval()
    with torch.no_grad():  # fresh biases are 0 and gains 1, which would hide most mistakes
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, Transformer.load(Path(folder), device="cpu", dtype=torch.float32)


def _figures(theirs: torch.nn.Module, ours: Transformer) -> dict[str, float]:
    tokens = torch.randint(0, ours.n_vocab, (2, 64))
    figures = {}
    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True, output_attentions=True)
        found = ours.capture(
            tokens, ["resid.post_emb", "resid.torso.post_mlp", "attn.qk_probs", "logits"]
        )
        logits = found["logits"]
        figures["logits, against transformers"] = relative(logits, out.logits)
        last = ours.cfg.n_layers - 1  # transformers' last hidden state is normed
        figures["residual stream, against transformers"] = max(
            relative(found[f"{i}/resid.torso.post_mlp"], out.hidden_states[i + 1])
            for i in range(last)
        )
        figures["attention patterns, against transformers"] = max(
            relative(found[f"{i}/attn.qk_probs"].permute(0, 3, 1, 2), out.attentions[i])
            for i in range(ours.cfg.n_layers)
        )
        everywhere = TransformerHooks()
        for path in SITES:
            everywhere.append_at(path, lambda x: x)
        figures["logits with identity hooks at every site"] = relative(
            ours(tokens, hooks=everywhere)[0], logits
        )
        _, H = ours(tokens[:, :20])
        figures["logits, cached in two calls"] = relative(
            ours(tokens[:, 20:], H)[0], logits[:, 20:]
        )
        rows = [row[:n].tolist() for row, n in zip(tokens, (64, 23), strict=True)]
        batch, pad = prep_input_and_pad(rows, "left")
        figures["a padded row, against its solo run"] = relative(
            ours(batch, pad=pad)[0][1, 41:], ours(torch.tensor([rows[1]]))[0][0]
        )
    figures["gradients of parameters, against transformers"] = _gradients(theirs, ours, tokens)
    with torch.no_grad():
        before = ours(tokens)[0]
        copy = Transformer(ours.cfg)
        copy.load_state_dict(ours.state_dict())
        figures["logits after simplify()"] = relative(copy.simplify()(tokens)[0], before)
    return figures


def _gradients(theirs: torch.nn.Module, ours: Transformer, tokens: Tensor) -> float:
    """The worst of the parameters that have exactly one counterpart."""
    for model in (theirs, ours):
        model.zero_grad()
    theirs(tokens).logits.log_softmax(-1)[..., 0].sum().backward()
    ours(tokens)[0].log_softmax(-1)[..., 0].sum().backward()
    pairs = []
    for i in range(ours.cfg.n_layers):
        block = theirs.get_submodule(f"transformer.h.{i}")
        layer = ours.get_submodule(f"xf_layers.{i}")
        pairs += [
            (
                layer.get_parameter("mlp.in_layer.weight"),
                block.get_parameter("mlp.c_fc.weight"),
                True,
            ),
            (
                layer.get_parameter("mlp.out_layer.bias"),
                block.get_parameter("mlp.c_proj.bias"),
                False,
            ),
            (
                layer.get_parameter("attn.out_proj.weight"),
                block.get_parameter("attn.c_proj.weight"),
                True,
            ),
            (layer.get_parameter("ln_1.weight"), block.get_parameter("ln_1.weight"), False),
        ]
    worst = 0.0
    for mine, other, transposed in pairs:
        assert mine.grad is not None
        assert other.grad is not None
        worst = max(worst, relative(mine.grad, other.grad.T if transposed else other.grad))
    return worst
