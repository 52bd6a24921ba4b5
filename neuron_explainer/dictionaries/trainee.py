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
from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, World
from neuron_explainer.dictionaries.first_batches import first_bias, mean_and_scale, variance
from neuron_explainer.dictionaries.objectives import (
    Loss,
    Objective,
    SparseLatents,
    StepFacts,
    make_objective,
)
from neuron_explainer.dictionaries.objectives.base import squared_error
from neuron_explainer.dictionaries.schedules import learning_rate_factor, ramp
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.metrics import fvu, n_active
from neuron_explainer.kernels.workspace import Workspace
from neuron_explainer.models.autoencoder import Autoencoder, InputNormalization
from neuron_explainer.models.autoencoders.input_normalization import normalize_input


class Trainee(nn.Module):
    """A dictionary with everything that its training needs, except for the optimiser.

    Args:
        config: of the run.
        n_inputs: width of inputs.
        n_outputs: width of targets of a transcoder, else None.
        device: where it lives.
        world: the processes that train it, each with the whole of it or with some of its latents.
    """

    def __init__(
        self,
        config: TrainConfig,
        n_inputs: int,
        n_outputs: int | None,
        device: torch.device,
        world: World = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.config, self.world = config, world
        n_latents = config.latents_for(n_inputs)
        self.peak_lr = config.lr_for(n_latents)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.dictionary = LearnedDictionary(
            n_latents,
            n_inputs,
            n_outputs,
            tied=config.tied,
            skip=config.skip,
            autocast=config.autocast,
            dtype=config.torch_dtype,
            generator=self.generator,
            world=world,
        )
        self.objective = make_objective(config.objective, self.dictionary)
        if not config.tied:
            with torch.no_grad():
                self.dictionary.encoder.mul_(self.objective.first_encoder_norm)
        check_split(config, self.objective, n_latents, world)
        self.dictionary.latent_bias.requires_grad_(self.objective.trains_latent_bias)
        self.counter = ActivityCounter(self.dictionary.n_latents)
        self.to(device)
        # Normalises each vector by itself; folded normalisation is the dictionary's.
        each = config.input_normalization
        self._per_vector: InputNormalization = "none" if each == "constant" else each

    @torch.no_grad()
    def measure(self, sample: Sequence[tuple[Tensor, Tensor]]) -> Self:
        """Set mean, scale and initial bias from pairs (input ``[b, n]``, target ``[b, o]``)."""
        d = self.dictionary
        self.config.check_remedy(len(sample[0][0]))
        x, target = (torch.cat(side) for side in zip(*sample, strict=True))
        if not float(variance(target)):
            raise InputError(
                f"the first {len(x)} activations are all equal: there is nothing to learn from. If batches "
                "are of one row each, give larger ones."
            )
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
        for tensor in (*self.shared_parameters(), *d.buffers()):
            self.world.broadcast(tensor)
        return self

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters of which every process has the same copy."""
        if not self.world.splits_latents:
            return list(self.parameters())
        own = [*self.dictionary.per_latent(), *self._of_objective()]
        return [p for p in self.parameters() if all(p is not q for q in own)]

    def _of_objective(self) -> list[nn.Parameter]:
        """The objective's parameters that have one row for each latent."""
        return [self.objective.get_parameter(name) for name in self.objective.per_latent]

    def normalize(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised inputs and targets; an autoencoder's target is its input."""
        same = x is target
        if self._per_vector != "none":
            x = normalize_input(x, self._per_vector)[0]
            return x, x if same else target
        d = self.dictionary
        if self.config.input_normalization == "none":
            return x, target
        x = (x - d.input_mean) / d.input_scale
        return x, x if same else (target - d.target_mean) / d.target_scale

    def folded(self) -> dict[str, float]:
        """Scale, and norm of the mean, of the normalisation that :meth:`finish` folds into the weights."""
        d, sides = self.dictionary, ("input", "target") if self.config.transcoder else ("input",)
        if self.config.input_normalization != "constant":
            return {}
        return {
            name: float(value)
            for side in sides
            for name, value in (
                (f"{side}_scale", getattr(d, f"{side}_scale")),
                (f"{side}_mean_norm", torch.linalg.vector_norm(getattr(d, f"{side}_mean"))),
            )
        }

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        step: int,
        n_tokens: int | None = None,
        workspace: Workspace | None = None,
    ) -> Loss:
        """The loss of normalised activations: this process's rows of a batch of ``n_tokens`` (all of
        them if not given). Nothing is counted here, so that a loss may be computed again."""
        n_tokens = len(x) if n_tokens is None else n_tokens
        dead = self.counter.dead(self.config.dead_after(n_tokens))
        facts = self.facts(step, dead, n_tokens)._replace(workspace=workspace)
        loss: Loss = self.objective.loss(self.dictionary, x, target, facts)
        if self.config.remedy != "ghost":
            return loss
        if "reconstruction" not in loss.terms:
            raise InputError(
                f"remedy = ghost scales its loss to the term 'reconstruction', which the objective "
                f"{self.config.objective.name} does not have; it has "
                f"{', '.join(loss.terms) or 'none'}."
            )
        if not len(dead):
            return loss
        # The ghost loss gets the units of the objective's own reconstruction term.
        unit = loss.terms["reconstruction"] / squared_error(loss.error)
        ghost = unit * ghost_loss(self.dictionary, x, loss.error, dead)
        return loss._replace(
            total=loss.total + ghost, terms={**loss.terms, "ghost": ghost.detach()}
        )

    def facts(self, step: int, dead: Tensor, n_tokens: int = 0) -> StepFacts:
        """What an objective needs to know about a step."""
        c = self.config
        sparsity = ramp(step, c.sparsity_warmup_steps)
        return StepFacts(step, c.total_steps, sparsity, dead, n_tokens)

    def backward(self, loss: Loss, n_tokens: int) -> Loss:
        """Compute the gradients of the loss of the whole batch; return that loss, summed over processes."""
        share = self.world.share(n_tokens)
        (loss.total * share if share < 1 else loss.total).backward()  # type: ignore[no-untyped-call]
        self.world.sum_gradients(self.shared_parameters())
        total = loss.total.detach()
        if not self.world.splits_batch:
            return loss._replace(total=total)
        parts = torch.stack([total, *(term.to(total) for term in loss.terms.values())])
        total, *terms = self.world.all_reduce_sum(parts * share)
        return loss._replace(total=total, terms=dict(zip(loss.terms, terms, strict=True)))

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        c = self.config
        return self.peak_lr * learning_rate_factor(
            step,
            c.total_steps,
            c.n_warmup_steps,
            c.decay,
            c.n_decay_steps,
            c.lr_end,
            c.resample_interval if c.remedy == "resample" else 0,
        )

    def before_step(self) -> None:
        """Before the optimiser's step: constrain and clip gradients."""
        self.dictionary.constrain_gradient(self.config.decoder_norm)
        if self.config.grad_clip is not None:
            self._clip_gradient(self.config.grad_clip)

    def _clip_gradient(self, most: float) -> None:
        if not self.world.splits_latents:
            nn.utils.clip_grad_norm_(self.parameters(), most)
            return
        shared = {id(parameter) for parameter in self.shared_parameters()}
        squares = self.dictionary.encoder.new_zeros(
            2
        )  # of parameters of this process only, and of shared ones
        for parameter in self.parameters():
            if parameter.grad is not None:
                squares[int(id(parameter) in shared)] += parameter.grad.square().sum()
        norm = (self.world.all_reduce_sum(squares[0].clone()) + squares[1]).sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters(), most, norm)

    @torch.no_grad()
    def after_step(
        self,
        x: Tensor,
        target: Tensor,
        loss: Loss,
        step: int,
        n_tokens: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """After the parameters have changed: count active latents, bring rows back to their norm and
        dead latents back to life."""
        c = self.config
        self.counter.update(loss.latents, n_tokens)
        self.counter.silent.copy_(self.world.min_over_batch(self.counter.silent))
        self.dictionary.constrain_rows(c.decoder_norm)
        facts = self.facts(step, self.counter.silent[:0], n_tokens)
        self.objective.after_step(self.dictionary, loss, facts)
        if c.remedy != "resample" or (step + 1) % c.resample_interval or step + 1 == c.total_steps:
            return
        dead = self.counter.dead(c.dead_after(n_tokens))
        x, target, error = (self.world.gather_rows(t, n_tokens) for t in (x, target, loss.error))
        dead = resample(self.dictionary, dead, x, target, error, self.generator)
        forget_moments([*self.dictionary.per_latent(), *self._of_objective()], optimizer, dead)
        self.objective.revive(dead)
        self.counter.revive(dead)

    def metrics(
        self, loss: Loss, target: Tensor, raw: Tensor, n_tokens: int, tokens_so_far: int
    ) -> dict[str, float]:
        """The numbers of a batch for the log. Waits for the device and for all processes.

        ``fvu`` is that of activations as the model has them (``raw``; ``target`` is normalised). ``dead``
        counts the latents that were not active in the last ``dead_window`` tokens.
        """
        error = loss.error
        # A scale for each vector changes FVU; one scale for all vectors does not.
        _, stats = normalize_input(raw, self._per_vector)
        if stats is not None and not self.config.transcoder:
            error, target = raw - stats.undo(target - error), raw
        error, target = (self.world.gather_rows(t, n_tokens).double() for t in (error, target))
        values = loss.latents.values if isinstance(loss.latents, SparseLatents) else loss.latents
        window = min(self.config.dead_after(n_tokens), tokens_so_far)
        dead = self.counter.dead(window)
        return {
            "loss": float(loss.total),
            **{name: float(term) for name, term in loss.terms.items()},
            "fvu": float(fvu(target, target - error)),
            "l0": int(self.world.all_reduce_sum(n_active(values))) / n_tokens,
            "dead": int(self.dictionary.total(torch.tensor(len(dead)))),
            "dead_window": window,
        }

    @torch.no_grad()
    def finish(self) -> Autoencoder:
        """The dictionary as a plain autoencoder of activations without normalisation.

        Where each process has some of the latents, the first process returns all of them, on the CPU, and
        the others return their own.
        """
        own = self._empty(self.dictionary.n_latents, self.dictionary.encoder.device)
        for name, value in self.dictionary.weights().items():
            own.get_parameter(name).copy_(value)
        return self._join(own) if self.world.splits_latents else own

    def _join(self, own: Autoencoder) -> Autoencoder:
        """The latents of all processes, one process after the other."""
        n_latents = self.dictionary.n_latents_everywhere
        whole = self._empty(n_latents, torch.device("cpu")) if self.world.is_rank_zero else own
        for theirs, ours in zip(own.parameters(), whole.parameters(), strict=True):
            if theirs.shape == ours.shape:
                ours.copy_(theirs)
        for rank in range(self.world.size):
            rows = slice(len(own.latent_bias) * rank, len(own.latent_bias) * (rank + 1))
            for here, there in zip(_rows_of(own), _rows_of(whole), strict=True):
                part = self.world.send_to_rank_zero(here, rank, here.shape)
                if part is not None:
                    there[rows] = part
        return whole

    def _empty(self, n_latents: int, device: torch.device) -> Autoencoder:
        """An autoencoder with the settings of this run; its weights are still to be written."""
        c, d = self.config, self.dictionary
        activation, groups = self.objective.activation(d), self.objective.group_sizes()
        for parameter in activation.parameters():
            if parameter.ndim and len(parameter) != n_latents:  # the other processes have the rest
                parameter.data = parameter.new_zeros(n_latents)
        return Autoencoder(
            n_latents,
            d.n_inputs,
            activation,
            c.tied,
            input_normalization=self._per_vector,
            n_outputs=d.n_outputs if d.is_transcoder else None,
            skip=c.skip,
            group_sizes=groups if groups and sum(groups) == n_latents else None,
            location=c.location,
            output_location=c.output_location,
            model_name=c.model_name,
            device=device,
            dtype=c.torch_dtype,
        )

    def state(self) -> dict[str, Any]:
        """Everything that training changes, except for the optimiser's state."""
        return {"module": dict(self.state_dict()), "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state`."""
        self.load_state_dict(state["module"])
        self.generator.set_state(state["generator"])


def _rows_of(autoencoder: Autoencoder) -> list[Tensor]:
    """The tensors that have one row for each latent."""
    found = [autoencoder.encoder.weight, autoencoder.latent_bias]
    found += [p for p in autoencoder.activation.parameters() if p.ndim]
    return found if autoencoder.tied else [*found, autoencoder.decoder.weight.t()]


def check_split(
    config: TrainConfig, objective: Objective[Any], n_latents: int, world: World
) -> None:
    """Raise InputError if latents are divided among processes and the run needs them in one process."""
    if not world.splits_latents:
        return
    if not objective.splits_latents:
        raise InputError(
            f"{config.objective.name} needs all latents in one process: divide the data instead."
        )
    here, k = len(world.latents(n_latents)), getattr(config.objective, "k", 1)
    if k > here:
        raise InputError(
            f"k = {k} is more than the {here} latents of each process; take fewer processes."
        )
    if config.remedy != "none":
        raise InputError(
            f"remedy = {config.remedy} needs all latents in one process; AuxK does without one."
        )
