"""Trains the language model: Muon for the hidden matrices, AdamW for the rest, bf16 products.

The loop is resumable bit for bit: weights, optimiser states and the step are in the checkpoint, and
the batches are a function of the seed and the step (``data.TrainingWindows``).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neuron_explainer.experiments.tiny_tales.checkpoints import load_checkpoint, save_checkpoint
from neuron_explainer.experiments.tiny_tales.data import TrainingWindows
from neuron_explainer.experiments.tiny_tales.fused_loss import linear_cross_entropy
from neuron_explainer.experiments.tiny_tales.schedule import warmup_stable_decay
from neuron_explainer.kernels.denormals import flush_denormals
from neuron_explainer.models.transformer import (
    MultiHeadedDotProductSelfAttention,
    Transformer,
    merge_heads,
    split_heads,
)

CHECKPOINT_FILE = "model_training.pt"


@dataclass(frozen=True)
class ModelTrainingConfig:
    """Everything that decides the weights, next to the data and the model's own sizes."""

    steps: int
    decay_steps: int
    warmup_steps: int = 150
    batch_size: int = 32
    muon_lr: float = 4e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    bos_share: float = 0.25
    seed: int = 0


def tie_embeddings(model: Transformer) -> None:
    """One tensor embeds and unembeds, as in GPT-2: without it there would be a third more weights."""
    model.unembed.weight = model.tok_embed.weight


def final_hidden(model: Transformer, tokens: Tensor) -> Tensor:
    """What the unembedding reads, ``[b, s, d]``: the model's own arithmetic, arranged for speed.

    On CPUs, bfloat16 products with the attention matrix written out are twice as fast as the fused
    attention. A test holds the equality with ``model(tokens)``.
    """
    sequence = tokens.shape[1]
    mask = torch.triu(torch.full((sequence, sequence), -1e9, dtype=torch.bfloat16), diagonal=1)
    with torch.autocast("cpu", torch.bfloat16):
        x = model.tok_embed(tokens) + model.pos_embed.weight[:sequence]
        for layer in model.layers:
            x = x + _attention(layer.attn, layer.ln_1(x), mask)
            x = x + layer.mlp(layer.ln_2(x))
        hidden: Tensor = model.final_ln(x)
    return hidden


def _attention(attn: MultiHeadedDotProductSelfAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (
        split_heads(proj(x), attn.n_heads).transpose(1, 2)
        for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    logits = (q * attn.qk_scale**2) @ k.transpose(-1, -2) + mask
    mixed = torch.softmax(logits, dim=-1, dtype=torch.bfloat16) @ v
    result: Tensor = attn.out_proj(merge_heads(mixed.transpose(1, 2)))
    return result


class ModelTrainer:
    """A model, its two optimisers and the step they have reached."""

    def __init__(self, model: Transformer, config: ModelTrainingConfig) -> None:
        self.model, self.config, self.step = model, config, 0
        tie_embeddings(model)
        # Muon is for matrices between hidden activations; embeddings, biases and norms are AdamW's
        # (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
        # By name: optimiser states know their parameters by position alone.
        named = sorted(model.named_parameters())
        hidden = [p for name, p in named if _is_hidden_matrix(name, p)]
        others = [p for name, p in named if not _is_hidden_matrix(name, p)]
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

    def train_step(self, inputs: Tensor, targets: Tensor) -> float:
        """One update of all weights; returns the batch's loss in nats a token."""
        c = self.config
        factor = warmup_stable_decay(self.step, c.steps, c.warmup_steps, c.decay_steps)
        for optimiser, base_lrs in zip(self.optimisers, self._base_lrs, strict=True):
            for group, lr in zip(optimiser.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
        hidden = final_hidden(self.model, inputs)
        weight = self.model.unembed.weight
        loss = linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), c.gradient_clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Write the checkpoint whole or not at all."""
        save_checkpoint(
            folder / CHECKPOINT_FILE,
            config=asdict(self.config),
            step=self.step,
            state={
                "model": self.model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            },
        )

    def load(self, folder: Path) -> bool:
        """Take up the checkpoint in ``folder``, if there is one; says whether there was."""
        stored = load_checkpoint(folder / CHECKPOINT_FILE, asdict(self.config))
        if stored is None:
            return False
        self.model.load_state_dict(stored.state["model"])
        for optimiser, state in zip(self.optimisers, stored.state["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step = stored.step
        return True


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and name.startswith("xf_layers.")


def train(
    trainer: ModelTrainer, windows: TrainingWindows, folder: Path, checkpoint_every: int = 100
) -> None:
    """Run to ``config.steps``, from the checkpoint in ``folder`` where there is one."""
    trainer.load(folder)
    average: float | None = None
    with (  # products of tiny probabilities cost many times more otherwise
        flush_denormals(),
        tqdm(total=trainer.config.steps, initial=trainer.step, unit="step") as bar,
    ):
        while trainer.step < trainer.config.steps:
            loss = trainer.train_step(*windows.batch(trainer.step))
            average = loss if average is None else 0.98 * average + 0.02 * loss
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            if trainer.step % checkpoint_every == 0 or trainer.step == trainer.config.steps:
                trainer.save(folder)
