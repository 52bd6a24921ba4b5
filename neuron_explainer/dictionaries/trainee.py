"""One dictionary in training: its parameters, its objective, its dead latents, its random numbers.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``d`` dead ones.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.config import TrainConfig
from neuron_explainer.dictionaries.dead_latents import (
    ActivityCounter,
    forget_moments,
    ghost_loss,
    resample,
)
from neuron_explainer.dictionaries.dictionary import Dictionary
from neuron_explainer.dictionaries.normalization import first_bias, mean_and_scale, variance
from neuron_explainer.dictionaries.objectives import Loss, Moment, SparseLatents, make_objective
from neuron_explainer.dictionaries.objectives.base import squared_error
from neuron_explainer.dictionaries.schedules import learning_rate_factor, ramp
from neuron_explainer.models.autoencoder import Autoencoder


class Trainee(nn.Module):
    """A dictionary with all that its training needs, but for the optimiser.

    Args:
        config: of the run.
        n_inputs: width of inputs.
        n_outputs: width of targets of a transcoder, else None.
        device: where it lives.
    """

    def __init__(
        self, config: TrainConfig, n_inputs: int, n_outputs: int | None, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.dictionary = Dictionary(
            config.latents_for(n_inputs),
            n_inputs,
            n_outputs,
            tied=config.tied,
            skip=config.skip,
            autocast=config.autocast,
            dtype=config.torch_dtype,
            generator=self.generator,
        )
        self.objective = make_objective(config.objective, self.dictionary)
        self.dictionary.latent_bias.requires_grad_(self.objective.trains_latent_bias)
        self.counter = ActivityCounter(self.dictionary.n_latents)
        self.to(device)
        # Normalises each vector by itself; folded normalisation is the dictionary's.
        each = config.input_normalization
        self._per_vector = (
            Autoencoder(1, n_inputs, input_normalization=each, dtype=config.torch_dtype)
            if each in ("center", "layer_norm", "rms")
            else None
        )

    @torch.no_grad()
    def measure(self, sample: Sequence[tuple[Tensor, Tensor]]) -> Self:
        """Take mean, scale and first bias from pairs (input ``[b, n]``, target ``[b, o]``)."""
        d = self.dictionary
        x, target = (torch.cat(side) for side in zip(*sample, strict=True))
        if self.config.input_normalization == "constant":
            for side, rows in (("input", x), ("target", target)):
                mean, scale = mean_and_scale(rows)
                getattr(d, f"{side}_mean").copy_(mean)
                getattr(d, f"{side}_scale").copy_(scale)
        x, target = self.normalize(x, target)
        d.variance.copy_(variance(target))
        d.pre_bias.copy_(first_bias(x, self.config.decoder_bias))
        if d.post_bias is not None:
            d.post_bias.copy_(first_bias(target, self.config.decoder_bias))
        return self

    def normalize(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Activations as the dictionary takes them; an autoencoder's target is its input."""
        same = x is target
        if self._per_vector is not None:
            x = self._per_vector.normalize(x)[0]
            return x, x if same else target
        d = self.dictionary
        if self.config.input_normalization == "none":
            return x, target
        x = (x - d.input_mean) / d.input_scale
        return x, x if same else (target - d.target_mean) / d.target_scale

    def loss(self, x: Tensor, target: Tensor, step: int) -> Loss:
        """Of normalised activations; counts which latents were active."""
        dead = self.counter.dead(self.config.dead_after_tokens)
        moment = self.moment(step, dead)
        loss: Loss = self.objective.loss(self.dictionary, x, target, moment)
        self.counter.update(loss.latents, len(x))
        if self.config.remedy != "ghost" or not len(dead):
            return loss
        # In the units of the objective's own reconstruction term.
        unit = loss.terms["reconstruction"] / squared_error(loss.error)
        ghost = unit * ghost_loss(self.dictionary, x, loss.error, dead)
        return loss._replace(
            total=loss.total + ghost, terms={**loss.terms, "ghost": ghost.detach()}
        )

    def moment(self, step: int, dead: Tensor) -> Moment:
        """What an objective is told of a step."""
        c = self.config
        return Moment(step, c.total_steps, ramp(step, c.sparsity_warmup_steps), dead)

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        c = self.config
        return c.lr * learning_rate_factor(
            step,
            c.total_steps,
            c.warmup_steps,
            c.decay,
            c.decay_steps or c.total_steps,
            c.lr_end,
            c.resample_every if c.remedy == "resample" else 0,
        )

    def before_step(self) -> None:
        """Gradients are there: clip them and keep them on the rows' sphere."""
        self.dictionary.constrain_gradient(self.config.decoder_norm)
        if self.config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.config.grad_clip)

    @torch.no_grad()
    def after_step(
        self,
        x: Tensor,
        target: Tensor,
        loss: Loss,
        step: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Parameters have changed: rows back to their norm, dead latents to life."""
        c = self.config
        self.dictionary.constrain_rows(c.decoder_norm)
        self.objective.after_step(self.dictionary, loss, self.moment(step, self.counter.silent[:0]))
        if c.remedy != "resample" or (step + 1) % c.resample_every or step + 1 == c.total_steps:
            return
        dead = self.counter.dead(c.dead_after_tokens)
        dead = resample(self.dictionary, dead, x, target, loss.error, self.generator)
        forget_moments(dict(self.named_parameters()), optimizer, dead, self.dictionary.n_latents)
        self.objective.revive(dead)
        self.counter.revive(dead)

    def metrics(self, loss: Loss, target: Tensor) -> dict[str, float]:
        """What the log says of a batch. Waits for the device."""
        active = (
            loss.latents.values if isinstance(loss.latents, SparseLatents) else loss.latents
        ) > 0
        dead = self.counter.dead(self.config.dead_after_tokens)
        return {
            "loss": float(loss.total),
            **{name: float(term) for name, term in loss.terms.items()},
            "fvu": float(squared_error(loss.error) / variance(target)),
            "l0": float(active.sum()) / len(target),
            "dead": len(dead),
        }

    @torch.no_grad()
    def finish(self) -> Autoencoder:
        """The dictionary as a plain autoencoder of activations as the model has them."""
        c, d, each = self.config, self.dictionary, self._per_vector
        autoencoder = Autoencoder(
            d.n_latents,
            d.n_inputs,
            self.objective.activation(d),
            c.tied,
            input_normalization="none" if each is None else each.input_normalization,
            n_outputs=d.n_outputs if d.is_transcoder else None,
            skip=c.skip,
            group_sizes=self.objective.group_sizes(),
            location=c.location,
            output_location=c.output_location,
            model_name=c.model_name,
            device=d.encoder.device,
            dtype=c.torch_dtype,
        )
        d.fold_into(autoencoder)
        return autoencoder

    def state(self) -> dict[str, Any]:
        """All that changes in training, but for the optimiser."""
        return {"module": dict(self.state_dict()), "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.load_state_dict(state["module"])
        self.generator.set_state(state["generator"])
