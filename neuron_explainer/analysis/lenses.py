"""Reading a prediction off the residual stream, layer by layer.

- :func:`logit_lens` (nostalgebraist 2020) reads every layer's stream by the model's own end: final norm
  and unembedding. With a :class:`TunedLens` (Belrose et al. 2023), each layer's stream first goes
  through an affine map that was trained to predict the model's output.
- :func:`logit_attribution` splits a target into what each layer's attention and MLP, or each head, writes
  directly to the logits.
- :func:`token_losses` is the loss of each token of a text.

Shape legend: ``s`` positions, ``d`` model width, ``v`` vocabulary, ``p`` points along the stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.analysis.effects import nodes
from neuron_explainer.analysis.node_parts import checked_positions, final_norm
from neuron_explainer.analysis.targets import Metric, token_texts
from neuron_explainer.errors import CheckpointError, InputError, optional_module
from neuron_explainer.kernels.products import linear
from neuron_explainer.models.checkpoints.tensor_files import torch_load
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.kv_cache import HiddenState
from neuron_explainer.models.language_model import LanguageModel, Prompts
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.tables import escaped, text_table

__all__ = ["Lens", "TunedLens", "logit_attribution", "logit_lens", "read_out", "token_losses"]

Points = Literal["layers", "sublayers"]


@torch.no_grad()
def read_out(
    model: LanguageModel, tokens: Tensor, stream: Tensor, positions: Sequence[int] | None = None
) -> Tensor:
    """Logits ``[b, s, v]`` that the model's own end gives for a residual stream ``[b, s, d]``.

    With ``positions``, at these alone.
    """
    read = slice(None) if positions is None else list(positions)
    if isinstance(model, Transformer):
        state = HiddenState(model.n_layers)
        state.positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x, state = model.run_ln_f(stream[:, read], state)
        return linear(x, model.unembed)
    # Any other model: a whole pass whose last stream is replaced, so that its own end is used as it is.
    last = f"{model.n_layers - 1}/resid.torso.post_mlp"
    hooks = TransformerHooks().append_at(last, lambda x: stream.to(x.dtype))
    logits: Tensor = model(tokens, hooks=hooks)[0]
    return logits[:, read]


@dataclass(frozen=True, repr=False)
class Lens:
    """What each point of the stream predicts, at each position."""

    points: list[str]
    """Such as ``3/resid.torso.post_mlp``, in the order of a pass."""
    tokens: list[str]
    """The tokens at the positions that are read."""
    top_tokens: list[list[list[str]]]
    """``[p][s][k]``: the likeliest next tokens."""
    top_ids: npt.NDArray[np.int64]
    """``[p, s, k]``: the same as ids."""
    top_probs: npt.NDArray[np.float64]
    """``[p, s, k]``: their probabilities."""
    kl: npt.NDArray[np.float64]
    """``[p, s]``: divergence of the model's final prediction from that of the point, in nats."""
    name: str

    def to_dataframe(self) -> Any:
        """One row a point and position (needs pandas)."""
        pandas = optional_module("pandas", "a data frame")
        rows = [
            {
                "point": point,
                "position": s,
                "token": self.tokens[s],
                "predicted": self.top_tokens[p][s][0],
                "probability": self.top_probs[p, s, 0],
                "kl": self.kl[p, s],
            }
            for p, point in enumerate(self.points)
            for s in range(len(self.tokens))
        ]
        return pandas.DataFrame(rows)

    def plot(self) -> Any:
        """A table of the likeliest tokens, coloured by probability (matplotlib's figure)."""
        pyplot = optional_module("matplotlib.pyplot", "a plot")
        probs = self.top_probs[:, :, 0]
        width = max(4.0, 0.8 * len(self.tokens) + 2)
        figure, axes = pyplot.subplots(
            figsize=(width, 0.35 * len(self.points) + 1.2), layout="constrained"
        )
        image = axes.imshow(probs, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", origin="lower")
        for p, row in enumerate(self.top_tokens):
            for s, likeliest in enumerate(row):
                colour = "white" if probs[p, s] > 0.55 else "black"
                text = escaped(likeliest[0]).replace("\n", "⏎").replace("$", r"\$")
                axes.text(s, p, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_yticks(range(len(self.points)), self.points, fontsize=7)
        labels = [escaped(token).replace("\n", "⏎").replace("$", r"\$") for token in self.tokens]
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
        figure.colorbar(image, ax=axes, label="probability of the likeliest token")
        return figure

    def __repr__(self) -> str:
        rows = [
            [
                point,
                *(
                    f"{escaped(repr(token))} {prob:.2f}"
                    for token, prob in zip(
                        self.top_tokens[p][-1][:3], self.top_probs[p, -1], strict=False
                    )
                ),
                f"{self.kl[p, -1]:.3f}",
            ]
            for p, point in enumerate(self.points)
        ]
        n = len(rows[0]) - 2
        head = ["point", *(f"{i + 1}." for i in range(n)), "KL"]
        title = f"{self.name} after {escaped(repr(self.tokens[-1]))} (the last of {len(self.tokens)} tokens)"
        return f"{title}\n{text_table(head, rows, n_left=n + 1, rule=True)}"


@torch.no_grad()
def logit_lens(
    model: LanguageModel,
    prompt: str | Sequence[int],
    *,
    points: Points = "layers",
    tuned: "TunedLens | None" = None,
    top_k: int = 5,
    bos: bool | int = False,
    positions: Sequence[int] | None = None,
) -> Lens:
    """What the stream predicts after the embedding and after each layer, or after each sublayer.

    Args:
        points: "layers": after the embedding and each layer; "sublayers": also after each attention.
        tuned: maps each layer's stream before it is read; then ``points`` is "layers", and the
            embedding counts as the input of layer 0.
        positions: where the stream is read; None: at every token. The cost grows with their number.
    """
    if points not in ("layers", "sublayers"):
        raise InputError(f"points must be 'layers' or 'sublayers', found {points!r}.")
    if tuned is not None:
        tuned.check(model)
        if points != "layers":
            raise InputError(
                "a tuned lens has a map for each layer, and none between attention and MLP."
            )
    tokens, _ = model.to_batch(prompt if isinstance(prompt, str) else [list(prompt)], None, bos)
    names = ["resid.post_emb"]
    for layer in range(model.n_layers):
        if points == "sublayers":
            names.append(f"{layer}/resid.torso.post_attn")
        names.append(f"{layer}/resid.torso.post_mlp")
    found = model.capture(tokens, names)
    read = list(checked_positions(positions, tokens.shape[1]))
    final = _log_probs(model, tokens, found[names[-1]], read)
    top_ids, top_probs, kl = [], [], []
    for number, name in enumerate(names):
        stream = found[name]
        if tuned is not None and number < model.n_layers:
            stream = tuned(number, stream)
        logs = final if name == names[-1] else _log_probs(model, tokens, stream, read)
        top = logs.topk(min(top_k, logs.shape[-1]), dim=-1)
        top_probs.append(top.values.double().exp().cpu().numpy())
        top_ids.append(top.indices.cpu().numpy())
        divergence = (final.exp() * (final - logs)).sum(dim=-1, dtype=torch.float64)
        kl.append(divergence.cpu().numpy())
    top_tokens = [[token_texts(model, row) for row in rows.tolist()] for rows in top_ids]
    texts = token_texts(model, tokens[0, read].tolist())
    title = "Logit lens" if tuned is None else "Tuned lens"
    return Lens(
        names, texts, top_tokens, np.stack(top_ids), np.stack(top_probs), np.stack(kl), title
    )


def _log_probs(model: LanguageModel, tokens: Tensor, stream: Tensor, read: list[int]) -> Tensor:
    """``[s, v]`` in at least float32: what the stream ``[1, …, d]`` predicts at the positions ``read``."""
    logits = read_out(model, tokens, stream, read)[0]
    return (logits if logits.dtype is torch.float64 else logits.float()).log_softmax(dim=-1)


class TunedLens:
    """The affine maps of a trained tuned lens: layer ``i``'s reads ``h + A_i h + b_i``, ``h`` its input.

    Loads the folders of the published library (``tuned-lens``): ``config.json`` and ``params.pt``.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], base_model: str = ""
    ) -> None:
        widths = {tuple(weight.shape) for weight in weights} | {(len(b), len(b)) for b in biases}
        if not weights or len(weights) != len(biases) or len(widths) != 1:
            raise InputError(
                "a tuned lens needs a square map [d, d] and a bias [d] for each layer."
            )
        self.weights, self.biases, self.base_model = list(weights), list(biases), base_model

    @classmethod
    def load(cls, folder: str | Path) -> "TunedLens":
        """From a folder of the published library."""
        folder = files.local_path(folder)
        config = files.read_json(folder / "config.json")
        if config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
            raise CheckpointError(
                f"{folder}: expected lens_type 'linear_tuned_lens', found {config['lens_type']!r}."
            )
        n_layers, width = config.get("num_hidden_layers"), config.get("d_model")
        if not isinstance(n_layers, int) or not isinstance(width, int) or n_layers < 1:
            raise CheckpointError(
                f"{folder / 'config.json'}: num_hidden_layers and d_model are missing."
            )
        tensors = torch_load(folder / "params.pt")
        wanted = [f"{i}.{name}" for i in range(n_layers) for name in ("weight", "bias")]
        missing = [key for key in wanted if not isinstance(tensors, dict) or key not in tensors]
        if missing:
            raise CheckpointError(f"{folder / 'params.pt'}: missing {', '.join(missing[:4])}.")
        lens = cls(
            [tensors[f"{i}.weight"].float() for i in range(n_layers)],
            [tensors[f"{i}.bias"].float() for i in range(n_layers)],
            str(config.get("base_model_name_or_path", "")),
        )
        if lens.weights[0].shape[0] != width:
            raise CheckpointError(
                f"{folder}: config.json says d_model {width}, the maps have {lens.weights[0].shape[0]}."
            )
        return lens

    def check(self, model: LanguageModel) -> None:
        """Refuse a model of other sizes."""
        if len(self.weights) != model.n_layers:
            raise InputError(
                f"the tuned lens has {len(self.weights)} layers, {model.name} has {model.n_layers}."
            )

    def __call__(self, layer: int, stream: Tensor) -> Tensor:
        """The input of a layer ``[…, d]``, mapped."""
        weight, bias = (
            x[layer].to(stream.device, stream.dtype) for x in (self.weights, self.biases)
        )
        if stream.shape[-1] != len(bias):
            raise InputError(
                f"the tuned lens is of width {len(bias)}, the stream of {stream.shape[-1]}."
            )
        return stream + stream @ weight.T + bias

    def __repr__(self) -> str:
        return f"TunedLens({self.base_model!r}, {len(self.weights)} layers of width {len(self.biases[0])})"


def logit_attribution(
    model: LanguageModel,
    prompt: str | Sequence[int],
    target: Metric,
    *,
    by: Literal["sublayer", "head"] = "sublayer",
    bos: bool | int = False,
) -> dict[str, float]:
    """What each part writes directly to a target (linear in the logits); the values sum to it.

    Names are ``embedding``, ``3/attn``, ``3/mlp`` (or ``3/attn head 5`` and ``3/attn bias``), and
    ``final norm``, its bias through the unembedding. A model that does not show the final norm's scale has
    it differentiated as well; what is left over then counts for ``final norm``.
    """
    if by not in ("sublayer", "head"):
        raise InputError(f"by must be 'sublayer' or 'head', found {by!r}.")
    table = nodes(model, prompt, target, ["direct"], 2**62, freeze=final_norm(model), bos=bos)
    found: dict[str, float] = {}
    for node, value in zip(table.nodes, table.values["direct"].tolist(), strict=True):
        layer, _, path = node.location.partition("/")
        if node.kind == "embedding":
            name = "embedding"
        elif node.location == "resid.post_ln_f":
            name = "final norm"
        elif "attn" in path:
            part = f" head {node.unit}" if node.kind == "head" else " bias"
            name = f"{layer}/attn{part if by == 'head' else ''}"
        else:
            name = f"{layer}/mlp"
        found[name] = found.get(name, 0.0) + value
    return found


@torch.no_grad()
def token_losses(
    model: LanguageModel, prompts: Prompts, *, bos: bool | int = False
) -> list[list[float]]:
    """The loss in nats of each token given those before it: one list a prompt, without its first token."""
    tokens, pad = model.to_batch(prompts, None, bos)
    logs = model(tokens, pad=pad)[0][:, :-1].double().log_softmax(dim=-1)
    losses = -logs.gather(-1, tokens[:, 1:, None])[..., 0]
    lengths = [tokens.shape[1]] * len(tokens) if pad is None else (~pad).sum(dim=1).tolist()
    return [row[: n - 1].tolist() for row, n in zip(losses, lengths, strict=True)]
