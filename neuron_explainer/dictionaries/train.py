"""The loop: batches in, autoencoders out. It knows no objective; it owns order, schedule and state.

    autoencoder = train(TrainConfig(TopKConfig(k=32), n_latents=4096, steps=10_000), batches)

With a folder it writes checkpoints and a log, and a run that was killed at any moment goes on when
it is started again, to the same weights bit for bit (CPU, same machine and number of threads).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.dictionaries.batches import BatchSource, TensorBatches
from neuron_explainer.dictionaries.config import TrainConfig
from neuron_explainer.dictionaries.distributed import ALONE, World
from neuron_explainer.dictionaries.interrupts import step_is_finished
from neuron_explainer.dictionaries.logs import Logs
from neuron_explainer.dictionaries.objectives import Loss
from neuron_explainer.dictionaries.run_folder import RunFolder
from neuron_explainer.dictionaries.trainee import Trainee
from neuron_explainer.errors import InputError
from neuron_explainer.kernels import memory as sparse_memory
from neuron_explainer.kernels.denormals import flush_denormals
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.settings import to_dict

ONLY = "autoencoder"
"""Name of the dictionary where there is only one."""

# All dictionaries of a run share these: one step, one checkpoint, one line of the log for all.
_SHARED = ("total_steps", "sample_batches", "checkpointing", "keep_checkpoints", "log_every")

Batch = Mapping[str, tuple[Tensor, Tensor]]
"""By dictionary: inputs ``[b, n]`` and targets ``[b, o]``, the same tensor but for transcoders."""


class StepReport(NamedTuple):
    """What callbacks get after each step. Looking into a tensor waits for the device."""

    step: int
    """Steps done so far, this one included."""
    losses: Mapping[str, Loss]
    """By dictionary."""
    trainees: Mapping[str, Trainee]
    """By dictionary; not to be changed."""


Callback = Callable[[StepReport], None]


def train(
    config: TrainConfig,
    batches: Iterable[Any],
    folder: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    log_to: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    world: World = ALONE,
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
        record: what else the folder's config is to say, of the data for example; a run is resumed
            only with the same.
        world: the processes that train together, of
            :func:`~neuron_explainer.dictionaries.distributed.open_world`. Each is given the same
            ``batches``, whole, and all see the same ``folder``. Where each holds some of the latents,
            the first process gets the autoencoder and the others what they hold of it.
    """
    if isinstance(batches, Tensor):
        batches = TensorBatches(batches, config.batch_size, config.seed)
    run = _Run({ONLY: config}, batches, single=True, record=record, world=world)
    return run.to_end(folder, callbacks, progress, log_to)[ONLY]


def train_many(
    configs: Mapping[str, TrainConfig],
    batches: Iterable[Mapping[Any, Any] | Tensor | tuple[Tensor, Tensor]],
    folder: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    log_to: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    world: World = ALONE,
) -> dict[str, Autoencoder]:
    """:func:`train` of several dictionaries at once, on batches ``{name: tensor}``, or on tensors (of
    transcoders pairs) that all of them learn from.

    For activations of many locations that come from one forward pass, or for a sweep over one. The
    dictionaries may differ in everything but the number of steps and how often there is a checkpoint or
    a line of the log.
    """
    if not configs:
        raise InputError("train_many: no configs were given.")
    run = _Run(dict(configs), batches, single=False, record=record, world=world)
    return run.to_end(folder, callbacks, progress, log_to)


class _Run:
    """Dictionaries, their optimiser, their batches, and the step they have reached."""

    def __init__(
        self,
        configs: dict[str, TrainConfig],
        batches: Iterable[Any],
        *,
        single: bool,
        record: Mapping[str, Any] | None = None,
        world: World = ALONE,
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
        self.source = BatchSource(batches)
        self.step = 0
        self.tokens = 0
        self.last_metrics: dict[str, dict[str, float]] = {}
        self.batch: Batch = {}  # the last one, with the parts of all processes
        self.n_tokens = 0  # of it
        self.trainees: dict[str, Trainee] = {}
        self.unchecked: list[tuple[int, str, Tensor, Mapping[str, Tensor]]] = []

    # ---- beginning ---------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        dictionaries = {name: to_dict(c) for name, c in self.configs.items()}
        settings: dict[str, Any] = {"dictionaries": dictionaries}
        if self.record:
            settings["record"] = self.record
        if self.world.splits_latents:  # a checkpoint then has a part for each process
            settings["processes"] = self.world.size
        return settings

    def begin(self) -> None:
        """A new run: sizes, means and scales come from the first batches, left for training."""
        sample = [self.read(raw) for raw in self.source.peek(self.shared.sample_batches)]
        for name, config in self.configs.items():
            pairs = [batch[name] for batch in sample]
            (x, target) = pairs[0]
            n_outputs = target.shape[1] if config.transcoder else None
            trainee = Trainee(config, x.shape[1], n_outputs, x.device, self.world)
            self.trainees[name] = trainee.measure(pairs)
        self.make_optimizer()

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, config in self.configs.items():
            n_inputs, n_outputs, device = state["sizes"][name]
            place = self.world.device or torch.device(config.device or device)
            trainee = Trainee(config, n_inputs, n_outputs, place, self.world)
            trainee.load_state(state["trainees"][name])
            self.trainees[name] = trainee
        self.make_optimizer()
        for name, moments in state["optimizer"].items():
            parameter = self.parameters[name]
            # "step" too: fused Adam keeps it beside the parameter.
            self.optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in moments.items()
            }
        self.step, self.tokens = state["step"], state["tokens"]
        self.last_metrics = state["metrics"]
        self.source.restore(state["source"])

    def make_optimizer(self) -> None:
        self.parameters = {
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
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def state(self) -> dict[str, Any]:
        """All that :meth:`resume` needs."""
        sizes = {}
        for name, trainee in self.trainees.items():
            d = trainee.dictionary
            n_outputs = d.n_outputs if d.is_transcoder else None
            sizes[name] = [d.n_inputs, n_outputs, str(d.encoder.device)]
        return {
            "sizes": sizes,
            "trainees": {name: trainee.state() for name, trainee in self.trainees.items()},
            "optimizer": {
                name: dict(self.optimizer.state[parameter])
                for name, parameter in self.parameters.items()
                if parameter in self.optimizer.state
            },
            "step": self.step,
            "tokens": self.tokens,
            "metrics": self.last_metrics,
            "source": self.source.state(),
        }

    # ---- one step --------------------------------------------------------------------------------

    def read(self, raw: Any) -> Batch:
        """A batch as it came, as pairs on the right device, or an error that says what it is."""
        by_name = dict.fromkeys(self.configs, raw) if self._for_all(raw) else raw
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
        return {
            name: _pair(by_name[name], config, self.trainees.get(name), self.world)
            for name, config in self.configs.items()
        }

    def _for_all(self, raw: Any) -> bool:
        return self.single or isinstance(raw, Tensor | tuple)

    def train_step(self) -> tuple[dict[str, Loss], Batch]:
        """One update of every dictionary; losses of the whole batch, and its part that is here,
        normalised."""
        batch = self.read(self.source.next())
        self.batch, self.n_tokens = batch, len(next(iter(batch.values()))[0])
        n_tokens = self.n_tokens
        self.tokens += n_tokens
        rows = self.world.rows(n_tokens)
        self.optimizer.zero_grad()
        losses, seen = {}, {}
        for group, (name, trainee) in zip(
            self.optimizer.param_groups, self.trainees.items(), strict=True
        ):
            group["lr"] = trainee.lr(self.step)
            x, target = trainee.normalize(*_part(batch[name], rows))
            loss = trainee.backward(trainee.loss(x, target, self.step, n_tokens), n_tokens)
            self.note(name, loss, x, target)
            losses[name], seen[name] = loss, (x, target)
        for trainee in self.trainees.values():
            trainee.before_step()
        self.optimizer.step()
        for name, trainee in self.trainees.items():
            trainee.after_step(*seen[name], losses[name], self.step, n_tokens, self.optimizer)
        self.step += 1
        return losses, seen

    def note(self, name: str, loss: Loss, x: Tensor, target: Tensor) -> None:
        """Look at once for NaN where that costs nothing; elsewhere before the next log line."""
        self.unchecked.append((self.step, name, loss.total.detach(), loss.terms))
        if loss.total.device.type == "cpu":
            self.check(x, target)

    def check(self, x: Tensor | None = None, target: Tensor | None = None) -> None:
        """An error if a loss since the last look was not finite."""
        for step, name, total, terms in self.unchecked:
            if bool(torch.isfinite(total)):
                continue
            bad = [term for term, value in terms.items() if not bool(torch.isfinite(value))]
            what = f"the term {', '.join(bad) or 'total'} of the loss is not finite"
            if any(t is not None and not bool(torch.isfinite(t).all()) for t in (x, target)):
                what = f"the batch holds NaN or infinity, so that {what}"
            raise InputError(
                f"step {step + 1}, {name}: {what}. Nothing of this step is saved; a checkpoint from before "
                "it stays. Look at the batch, or lower the learning rate."
            )
        self.unchecked.clear()

    # ---- the loop --------------------------------------------------------------------------------

    def to_end(
        self,
        folder: str | Path | None,
        callbacks: Sequence[Callback],
        progress: bool,
        log_to: Sequence[str],
    ) -> dict[str, Autoencoder]:
        with flush_denormals(), sparse_memory.kept():
            if folder is None:
                self.begin()
                self.loop(None, callbacks, progress, log_to)
                return {name: trainee.finish() for name, trainee in self.trainees.items()}
            place = RunFolder(folder, self.settings(), self.shared.keep_checkpoints, self.world)
            with place.open():
                state = place.load_checkpoint()
                if state is None:
                    self.begin()
                else:
                    self.resume(state)
                place.begin()
                self.loop(place, callbacks, progress, log_to)
                return self.save_results(place)

    def loop(
        self,
        place: RunFolder | None,
        callbacks: Sequence[Callback],
        progress: bool,
        log_to: Sequence[str],
    ) -> None:
        """Steps, from the one reached to the last."""
        c = self.shared
        if not self.world.is_first:  # the first one speaks for all
            progress, log_to = False, ()
        logged = place if self.world.is_first else None
        logs_of = c.total_steps, self.step, logged, progress, log_to, self.settings()
        # Several processes are not interrupted after the same step.
        wait = place is not None and self.world.size == 1
        with step_is_finished(wait) as interrupted, Logs(*logs_of) as logs:
            logs.start_clock(self.tokens)
            while self.step < c.total_steps and not interrupted:
                losses, seen = self.train_step()
                logs.step()
                last = self.step == c.total_steps
                if self.step % c.log_every == 0 or last:
                    self.check()
                    self.last_metrics = self.metrics(losses, seen)
                    logs.write(self.step, self.tokens, self.last_metrics)
                # Before the checkpoint: a run that dies in between calls them again, never not.
                for callback in callbacks:
                    callback(StepReport(self.step, losses, self.trainees))
                due = self.step % c.checkpointing == 0 or last or interrupted
                if place is not None and due:
                    self.check()
                    logs.sync()
                    place.save_checkpoint(self.step, self.state())
        if interrupted and self.step < c.total_steps:
            raise KeyboardInterrupt

    def metrics(self, losses: Mapping[str, Loss], seen: Batch) -> dict[str, dict[str, float]]:
        """What the log says of the step that was just done."""
        found = {}
        for name, trainee in self.trainees.items():
            raw = self.batch[name][1][self.world.rows(self.n_tokens)]
            found[name] = {
                **trainee.metrics(losses[name], seen[name][1], raw, self.n_tokens, self.tokens),
                "lr": trainee.lr(self.step - 1),
            }
        return found

    def save_results(self, place: RunFolder) -> dict[str, Autoencoder]:
        found = {name: trainee.finish() for name, trainee in self.trainees.items()}

        def save() -> None:
            for name, autoencoder in found.items():
                autoencoder.save(result_folder(place.path, name), overwrite=True)
            folded = {name: trainee.folded() for name, trainee in self.trainees.items()}
            place.finish(self.step, self.last_metrics, folded_normalization=folded)

        self.world.on_first(save)
        return found


def result_folder(folder: str | Path, name: str = ONLY) -> Path:
    """Where a run's folder holds a finished autoencoder."""
    if name == ONLY:
        return Path(folder) / ONLY
    return Path(folder) / "autoencoders" / re.sub(r"[^\w.+-]", "-", name)


def _part(pair: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """Rows of both; one tensor stays one."""
    x = pair[0][rows]
    return x, x if pair[1] is pair[0] else pair[1][rows]


def _pair(
    found: Any, config: TrainConfig, trainee: Trainee | None, world: World
) -> tuple[Tensor, Tensor]:
    """Input and target of one dictionary, on its device and of its dtype."""
    pair = tuple(found) if isinstance(found, tuple | list) else (found,)
    expected = "a pair of tensors [b, n], [b, o]" if config.transcoder else "a tensor [b, n]"
    if len(pair) != 1 + config.transcoder or not all(
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
    if trainee is not None:
        d = trainee.dictionary
        widths = [x.shape[1] for x in pair]
        if widths != [d.n_inputs, d.n_outputs][: len(pair)]:
            raise InputError(f"the batches' width was {d.n_inputs}, and now it is {widths[0]}.")
    first = world.device or config.device
    device = first if trainee is None else trainee.dictionary.encoder.device
    moved = tuple(x.detach().to(device=device, dtype=config.torch_dtype) for x in pair)
    return moved[0], moved[-1]
