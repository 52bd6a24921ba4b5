"""Trains the language model: Muon for the hidden matrices, AdamW for the rest, bfloat16 products.

The library's training loop drives it, so a run continues from its newest checkpoint, bit for bit.

Shape legend: ``b`` windows of a batch, ``s`` tokens of a window, ``d`` model width.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.batches import BatchSource
from neuron_explainer.dictionaries.loop import Loop, Plan
from neuron_explainer.dictionaries.schedules import learning_rate_factor
from neuron_explainer.experiments.tiny_tales.data import ModelBatches
from neuron_explainer.experiments.tiny_tales.fused_loss import linear_cross_entropy
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.settings import check_types


@dataclass(frozen=True)
class ModelTrainingConfig:
    """Everything that decides the weights, besides the data and the model's own sizes."""

    steps: int
    decay_steps: int
    """Over the last so many steps the learning rate falls to zero."""
    warmup_steps: int = 150
    batch_size: int = 32
    """Windows per step."""
    muon_lr: float = 4e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)


def tie_embeddings(model: Transformer) -> None:
    """Make one tensor embed and unembed, as in GPT-2; otherwise there would be a third more weights."""
    model.unembed.weight = model.tok_embed.weight


def final_hidden(model: Transformer, tokens: Tensor) -> Tensor:
    """What the unembedding reads, ``[b, s] -> [b, s, d]``, with products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        x, state, _, _ = model.run_embed(tokens)
        x, state = model.run_torso(x, state)
        return model.run_ln_f(x, state)[0]


class ModelStep(NamedTuple):
    """What one step computed."""

    n_tokens: int
    loss: float
    """In nats per token."""


class ModelTrainer:
    """A model and its two optimisers: the learner that the training loop drives.

    Args:
        model: is trained in place.
        config: settings.
        result: folder to save the model to in float16 at the end, before the run counts as finished.
    """

    def __init__(
        self, model: Transformer, config: ModelTrainingConfig, result: Path | None = None
    ) -> None:
        self.model, self.config, self.result = model, config, result
        self.loss: float | None = None
        """A running mean."""
        tie_embeddings(model)
        # Muon is for matrices between hidden activations; embeddings, biases and norms are AdamW's
        # (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
        self._named = dict(sorted(model.named_parameters()))
        hidden = [p for name, p in self._named.items() if _is_hidden_matrix(name, p)]
        others = [p for name, p in self._named.items() if not _is_hidden_matrix(name, p)]
        adamw_groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.ndim == 2]},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden,
                lr=config.muon_lr,
                weight_decay=config.weight_decay,
                # updates of AdamW's size (Liu et al. 2025, arXiv:2502.16982)
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                adamw_groups,
                lr=config.adamw_lr,
                betas=(0.9, 0.95),
                weight_decay=config.weight_decay,
            ),
        ]
        self._base_lrs = [[g["lr"] for g in o.param_groups] for o in self.optimisers]

    def settings(self) -> dict[str, Any]:
        """What the run's ``config.json`` records."""
        return {"method": "language model", "config": asdict(self.config)}

    def begin(self, source: BatchSource) -> None:
        """Nothing to do: the weights do not depend on the data."""

    def learn(self, batch: tuple[Tensor, Tensor], step: int) -> ModelStep:
        """One update of all weights, from inputs and targets ``[b, s]``."""
        c, (inputs, targets) = self.config, batch
        factor = learning_rate_factor(step, c.steps, c.warmup_steps, "linear", c.decay_steps, 0.0)
        for optimiser, base_lrs in zip(self.optimisers, self._base_lrs, strict=True):
            for group, lr in zip(optimiser.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
        hidden = final_hidden(self.model, inputs)
        weight = self.model.unembed.weight
        loss = linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), c.gradient_clip)
        for optimiser in self.optimisers:
            optimiser.step()
        found = float(loss.detach())
        self.loss = found if self.loss is None else 0.98 * self.loss + 0.02 * found
        return ModelStep(targets.numel(), found)

    def metrics(self, result: ModelStep, step: int, tokens: int) -> dict[str, dict[str, float]]:
        """The running mean of the loss."""
        return {"model": {"loss": result.loss if self.loss is None else self.loss}}

    def state(self) -> dict[str, Any]:
        """Weights and moments, by the parameters' names."""
        moments = {
            name: dict(optimiser.state[parameter])
            for name, parameter in self._named.items()
            for optimiser in self.optimisers
            if parameter in optimiser.state
        }
        return {"model": dict(self.model.state_dict()), "moments": moments, "loss": self.loss}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self.model.load_state_dict(state["model"])
        for name, parameter in self._named.items():
            for optimiser in self.optimisers:
                if any(parameter is p for group in optimiser.param_groups for p in group["params"]):
                    optimiser.state[parameter] = state["moments"][name]
        self.loss = state["loss"]

    def finish(self) -> dict[str, Autoencoder]:
        """Save the model; there are no autoencoders."""
        if self.result is not None:
            self.model.half().save(self.result, overwrite=True)
        return {}

    def outcome(self) -> dict[str, Any]:
        """The last loss."""
        return {"metrics": {"loss": self.loss}}


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and name.startswith("xf_layers.")


def train(
    trainer: ModelTrainer,
    batches: ModelBatches,
    folder: Path,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> None:
    """Train to the end, from the newest checkpoint in ``folder`` if there is one."""
    plan = Plan(
        log_every=10,
        checkpoint_interval=checkpoint_every,
        keep_checkpoints=1,
        total_steps=trainer.config.steps,
    )
    Loop(trainer, batches, plan).run(folder, progress=progress)
