"""Training dictionaries by gradient descent: many objectives, one optimiser, the shared loop.

    autoencoder = train(TrainConfig(TopKConfig(k=32), n_latents=4096, steps=10_000), batches)

With a folder, training writes checkpoints and a log. A run that was killed at any moment continues when it is
started again, to the same weights bit for bit (on a CPU, the same machine and number of threads).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.dictionaries.batches import BatchSource, TensorBatches
from neuron_explainer.dictionaries.config import TrainConfig
from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, World
from neuron_explainer.dictionaries.loop import Loop, Plan
from neuron_explainer.dictionaries.objectives import Loss
from neuron_explainer.dictionaries.runs import SINGLE_NAME
from neuron_explainer.dictionaries.trainee import Trainee
from neuron_explainer.errors import InputError
from neuron_explainer.kernels.workspace import Workspace
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.checks import check_tensor
from neuron_explainer.settings import to_dict

# All dictionaries of a run share these: one step, one checkpoint, one line of the log for all.
_SHARED = (
    "total_steps",
    "sample_batches",
    "checkpoint_interval",
    "keep_checkpoints",
    "log_interval",
)

Batch = Mapping[str, tuple[Tensor, Tensor]]
"""By dictionary: inputs ``[b, n]`` and targets ``[b, o]``, the same tensor unless it is a transcoder."""


class StepReport(NamedTuple):
    """What callbacks get after each step. Reading the value of a tensor waits for the device."""

    step: int
    """Steps done so far, this one included."""
    losses: Mapping[str, Loss]
    """By dictionary."""
    trainees: Mapping[str, Trainee]
    """By dictionary; not to be changed."""


Callback = Callable[[StepReport], None]


class StepResult(NamedTuple):
    """What one step computed. ``r`` rows of the batch are in this process."""

    n_tokens: int
    """``b``, of the whole batch."""
    losses: dict[str, Loss]
    """By dictionary; values are those of the whole batch."""
    normalized: dict[str, tuple[Tensor, Tensor]]
    """By dictionary: inputs ``[r, n]`` and targets ``[r, o]`` as the dictionary takes them."""
    targets: dict[str, Tensor]
    """By dictionary: ``[r, o]`` as the model has them."""


def train(
    config: TrainConfig,
    batches: Iterable[Any],
    folder: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    log_to: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    world: World = SINGLE_PROCESS,
) -> Autoencoder:
    """Train one dictionary and return it as an autoencoder of activations as the model has them.

    Args:
        config: what to train and how.
        batches: any iterable of tensors ``[b, n]``, or for a transcoder of pairs ``[b, n], [b, o]``.
            It is gone through again when it ends. A single tensor ``[N, n]`` is cut into shuffled
            batches of ``config.batch_size``.
        folder: for config, log, checkpoints and result; without it nothing is written. An
            unfinished run with the same config is resumed; any other content is an error.
        callbacks: called with a :class:`StepReport` after each step.
        progress: whether to show a progress bar.
        log_to: any of ``"tensorboard"``, ``"wandb"``, next to ``log.jsonl``.
        record: what else the folder's config says: by default where the activations of an
            ``open_buffer`` came from. A run is resumed only with the same record.
        world: the processes that train together, of
            :func:`~neuron_explainer.dictionaries.distributed.open_world`. Each is given the same
            ``batches``, whole, and all see the same ``folder``. Where each holds some of the latents,
            the first process gets the autoencoder and the others what they hold of it.
    """
    if isinstance(batches, Tensor):
        batches = TensorBatches(batches, config.batch_size, config.seed)
    record = getattr(batches, "record", None) if record is None else record
    learner = GradientDescent({SINGLE_NAME: config}, single=True, record=record, world=world)
    return learner.run(batches, folder, callbacks, progress, log_to)[SINGLE_NAME]


def train_many(
    configs: Mapping[str, TrainConfig],
    batches: Iterable[Mapping[Any, Any] | Tensor | tuple[Tensor, Tensor]],
    folder: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    log_to: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    world: World = SINGLE_PROCESS,
) -> dict[str, Autoencoder]:
    """:func:`train` of several dictionaries at once, on batches ``{name: tensor}``, or on tensors (of
    transcoders pairs) that all of them learn from.

    For activations of many locations that come from one forward pass, or for a sweep over one. The
    dictionaries may differ in everything but the number of steps and how often there is a checkpoint or
    a line of the log.
    """
    if not configs:
        raise InputError("train_many: no configs were given.")
    record = getattr(batches, "record", None) if record is None else record
    learner = GradientDescent(dict(configs), single=False, record=record, world=world)
    return learner.run(batches, folder, callbacks, progress, log_to)


class GradientDescent:
    """Dictionaries and the optimiser that they share: the learner that the loop drives."""

    def __init__(
        self,
        configs: dict[str, TrainConfig],
        *,
        single: bool,
        record: Mapping[str, Any] | None = None,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self.configs, self.single, self.record = configs, single, dict(record or {})
        self.shared, self.world = next(iter(configs.values())), world
        for name in _SHARED:
            values = {getattr(config, name) for config in configs.values()}
            if len(values) > 1:
                raise InputError(
                    f"dictionaries that are trained together need the same {name}, found "
                    f"{', '.join(map(str, sorted(values)))}."
                )
        self.trainees: dict[str, Trainee] = {}
        self.last_metrics: dict[str, dict[str, float]] = {}
        self._workspace = Workspace()
        self._unchecked: list[tuple[int, str, Tensor, Mapping[str, Tensor]]] = []

    def run(
        self,
        batches: Iterable[Any],
        folder: str | Path | None,
        callbacks: Sequence[Callback],
        progress: bool,
        log_to: Sequence[str],
    ) -> dict[str, Autoencoder]:
        """Train to the end."""
        c = self.shared
        plan = Plan(
            c.log_interval, c.checkpoint_interval, c.keep_checkpoints, total_steps=c.total_steps
        )

        def report(step: int, result: StepResult) -> None:
            for callback in callbacks:
                callback(StepReport(step, result.losses, self.trainees))

        return Loop(self, batches, plan, self.world).run(
            folder, callbacks=[report], progress=progress, log_to=log_to
        )

    # ---- beginning and resuming ----------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What ``config.json`` records."""
        dictionaries = {name: to_dict(c) for name, c in self.configs.items()}
        settings: dict[str, Any] = {"dictionaries": dictionaries}
        if self.record:
            settings["record"] = self.record
        if self.world.splits_latents:  # a checkpoint then has a part for each process
            settings["processes"] = self.world.size
        return settings

    def begin(self, source: BatchSource) -> None:
        """Make new dictionaries; sizes, means and scales are those of the first batches."""
        sample = [self._read(raw) for raw in source.peek(self.shared.sample_batches)]
        for name, config in self.configs.items():
            pairs = [batch[name] for batch in sample]
            (x, target) = pairs[0]
            n_outputs = target.shape[1] if config.transcoder else None
            trainee = Trainee(config, x.shape[1], n_outputs, x.device, self.world)
            self.trainees[name] = trainee.measure(pairs)
        self._make_optimizer()

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name, config in self.configs.items():
            n_inputs, n_outputs, device = state["sizes"][name]
            place = self.world.device or torch.device(config.device or device)
            trainee = Trainee(config, n_inputs, n_outputs, place, self.world)
            trainee.load_state(state["trainees"][name])
            self.trainees[name] = trainee
        self._make_optimizer()
        for name, moments in state["optimizer"].items():
            parameter = self._parameters[name]
            # "step" too: fused Adam keeps it beside the parameter.
            self._optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in moments.items()
            }
        self.last_metrics = state["metrics"]

    def _make_optimizer(self) -> None:
        self._parameters = {
            f"{name}/{inner}": parameter
            for name, trainee in self.trainees.items()
            for inner, parameter in trainee.named_parameters()
            if parameter.requires_grad
        }
        groups = [
            {
                "params": [p for p in trainee.parameters() if p.requires_grad],
                "lr": trainee.peak_lr,
                "betas": (trainee.config.beta1, trainee.config.beta2),
                "eps": trainee.config.eps,
            }
            for trainee in self.trainees.values()
        ]
        self._optimizer = torch.optim.Adam(groups, fused=True)

    def state(self) -> dict[str, Any]:
        """All that :meth:`resume` needs; an error if a loss was not finite."""
        self._check_finite()
        sizes = {}
        for name, trainee in self.trainees.items():
            d = trainee.dictionary
            n_outputs = d.n_outputs if d.is_transcoder else None
            sizes[name] = [d.n_inputs, n_outputs, str(d.encoder.device)]
        return {
            "sizes": sizes,
            "trainees": {name: trainee.state() for name, trainee in self.trainees.items()},
            "optimizer": {
                name: dict(self._optimizer.state[parameter])
                for name, parameter in self._parameters.items()
                if parameter in self._optimizer.state
            },
            "metrics": self.last_metrics,
        }

    # ---- one step ------------------------------------------------------------------------------

    def learn(self, batch: Any, step: int) -> StepResult:
        """One update of every dictionary."""
        pairs = self._read(batch)
        n_tokens = len(next(iter(pairs.values()))[0])
        rows = self.world.rows(n_tokens)
        result = StepResult(n_tokens, {}, {}, {})
        self._optimizer.zero_grad()
        self._workspace.next_step()
        for group, (name, trainee) in zip(
            self._optimizer.param_groups, self.trainees.items(), strict=True
        ):
            group["lr"] = trainee.lr(step)
            x, target = _part(pairs[name], rows)
            result.targets[name] = target
            x, target = trainee.normalize(x, target)
            loss = trainee.loss(x, target, step, n_tokens, self._workspace)
            loss = trainee.backward(loss, n_tokens)
            self._unchecked.append((step, name, loss.total, loss.terms))
            if loss.total.device.type == "cpu":  # looking costs nothing there
                self._check_finite(x, target)
            result.losses[name], result.normalized[name] = loss, (x, target)
        for trainee in self.trainees.values():
            trainee.before_step()
        self._optimizer.step()
        for name, trainee in self.trainees.items():
            x, target = result.normalized[name]
            trainee.after_step(x, target, result.losses[name], step, n_tokens, self._optimizer)
        return result

    def _check_finite(self, *batch: Tensor) -> None:
        """An error if a loss since the last check was not finite; ``batch`` is what the last one is of."""
        for step, name, total, terms in self._unchecked:
            if bool(torch.isfinite(total)):
                continue
            bad = [term for term, value in terms.items() if not bool(torch.isfinite(value))]
            what = f"the term {', '.join(bad) or 'total'} of the loss is not finite"
            if not all(bool(torch.isfinite(x).all()) for x in batch):
                what = f"the batch holds NaN or infinity, so that {what}"
            raise InputError(
                f"step {step + 1}, {name}: {what}. Nothing of this step is saved; a checkpoint from before "
                "it stays. Look at the batch, or lower the learning rate."
            )
        self._unchecked.clear()

    def metrics(self, result: StepResult, step: int, tokens: int) -> dict[str, dict[str, float]]:
        """What the log says of the step that was just done."""
        self._check_finite()
        self.last_metrics = {
            name: {
                **trainee.metrics(
                    result.losses[name],
                    result.normalized[name][1],
                    result.targets[name],
                    result.n_tokens,
                    tokens,
                ),
                "lr": trainee.lr(step - 1),
            }
            for name, trainee in self.trainees.items()
        }
        return self.last_metrics

    # ---- the end -------------------------------------------------------------------------------

    def finish(self) -> dict[str, Autoencoder]:
        """The dictionaries as autoencoders."""
        return {name: trainee.finish() for name, trainee in self.trainees.items()}

    def outcome(self) -> dict[str, Any]:
        """The last metrics, and the normalisation that was folded into the weights."""
        folded = {name: trainee.folded() for name, trainee in self.trainees.items()}
        return {"metrics": self.last_metrics, "folded_normalization": folded}

    # ---- batches -------------------------------------------------------------------------------

    def _read(self, raw: Any) -> Batch:
        """A batch as pairs on the right device, or an error that says what was found instead."""
        for_all = self.single or isinstance(raw, Tensor | tuple)
        by_name = dict.fromkeys(self.configs, raw) if for_all else raw
        if not isinstance(by_name, Mapping):
            raise InputError(
                f"expected batches {{name: tensor}} for {', '.join(self.configs)}, or a tensor for all of "
                f"them, found {type(raw).__name__}."
            )
        by_name = {str(name): x for name, x in by_name.items()}  # a location is known by its text
        missing = [name for name in self.configs if name not in by_name]
        if missing:
            raise InputError(
                f"a batch has nothing for {', '.join(missing)}; it has {', '.join(by_name)}."
            )
        return {name: self._pair(name, by_name[name]) for name in self.configs}

    def _pair(self, name: str, found: Any) -> tuple[Tensor, Tensor]:
        """Input and target of one dictionary, on its device and of its dtype."""
        config, trainee = self.configs[name], self.trainees.get(name)
        pair = check_pair(found, config.transcoder)
        device: torch.device | str | None = self.world.device or config.device
        if trainee is not None:
            d = trainee.dictionary
            device = d.encoder.device
            widths = [x.shape[1] for x in pair]
            if widths != [d.n_inputs, d.n_outputs][: len(pair)]:
                raise InputError(f"the batches' width was {d.n_inputs}, and now it is {widths[0]}.")
        moved = tuple(x.detach().to(device=device, dtype=config.torch_dtype) for x in pair)
        return moved[0], moved[-1]


def check_pair(found: Any, transcoder: bool) -> tuple[Tensor, ...]:
    """A batch as one tensor ``[b, n]`` or, for a transcoder, as two; an error if it is anything else."""
    pair = tuple(found) if isinstance(found, tuple | list) else (found,)
    expected = "a pair of tensors [b, n], [b, o]" if transcoder else "a tensor [b, n]"
    for x in pair:
        if isinstance(x, Tensor):
            check_tensor(x, "a batch")
    if len(pair) != 1 + transcoder or not all(
        isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point() and len(x) for x in pair
    ):
        found_are = [
            f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            for x in pair
        ]
        raise InputError(
            f"expected a batch to be {expected} of floating-point numbers, found {', '.join(found_are)}."
        )
    if len(pair[0]) != len(pair[-1]):
        raise InputError(f"inputs and targets differ in number: {len(pair[0])}, {len(pair[-1])}.")
    return pair


def _part(pair: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """The same rows of both; one tensor stays one."""
    x = pair[0][rows]
    return x, x if pair[1] is pair[0] else pair[1][rows]
