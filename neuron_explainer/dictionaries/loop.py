"""The one training loop: batches in, a learner that learns from them, dictionaries out.

The loop knows no objective and no optimiser. It owns the order of things: batches, steps, logs, checkpoints,
interruptions, results. A :class:`Learner` turns a batch into better dictionaries, and can say what it would
need to go on in another process.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from neuron_explainer.dictionaries.batches import BatchSource
from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, World
from neuron_explainer.dictionaries.logs import Logs, Metrics
from neuron_explainer.dictionaries.runs import RunFolder
from neuron_explainer.interrupts import interrupts_wait
from neuron_explainer.models.autoencoder import Autoencoder


class Step(Protocol):
    """What a learner returns for each batch."""

    @property
    def n_tokens(self) -> int:
        """Activations in the batch."""


S = TypeVar("S", bound=Step)


class Learner(Protocol[S]):
    """What the loop drives: one dictionary, or several that learn side by side."""

    def settings(self) -> dict[str, Any]:
        """What ``config.json`` records. A run is resumed only with the same settings."""

    def begin(self, source: BatchSource) -> None:
        """Start a new run. Batches that are only peeked at are still learned from."""

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""

    def learn(self, batch: Any, step: int) -> S:
        """Learn from one batch, as the source gives it. Steps count from 0."""

    def metrics(self, result: S, step: int, tokens: int) -> Metrics:
        """Numbers for the log after ``step`` steps and ``tokens`` activations."""

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`resume` needs: tensors and what JSON can hold."""

    def finish(self) -> dict[str, Autoencoder]:
        """The trained dictionaries by name; :data:`SINGLE_NAME` if there is one without a name."""

    def outcome(self) -> dict[str, Any]:
        """What ``finished.json`` holds besides the number of steps."""


class Plan(NamedTuple):
    """How long a run is, and how often it writes. Intervals are in steps."""

    log_every: int
    checkpoint_interval: int
    keep_checkpoints: int
    total_steps: int | None = None
    """None: the run ends after ``passes`` over the batches."""
    passes: int | None = None
    """None: the batches start again as often as ``total_steps`` needs."""


class Loop(Generic[S]):
    """A run: a learner, its batches, and the step it has reached."""

    def __init__(
        self, learner: Learner[S], batches: Iterable[Any], plan: Plan, world: World = SINGLE_PROCESS
    ) -> None:
        self.learner, self.plan, self.world = learner, plan, world
        self.source = BatchSource(batches, plan.passes)
        self.step = 0
        self.tokens = 0

    def run(
        self,
        folder: str | Path | None,
        *,
        callbacks: Sequence[Callable[[int, S], None]] = (),
        progress: bool = True,
        log_to: Sequence[str] = (),
    ) -> dict[str, Autoencoder]:
        """Train to the end, from the start or from the newest checkpoint in ``folder``."""
        with _flush_denormals():
            if folder is None:
                self.learner.begin(self.source)
                self._steps(None, callbacks, progress, log_to)
                return self.learner.finish()
            settings, keep = self.learner.settings(), self.plan.keep_checkpoints
            extensible = self.plan.passes is not None
            place = RunFolder(folder, settings, keep, self.world, extensible)
            with place.claimed():
                state = place.load_checkpoint()
                if state is not None:
                    self._resume(state)
                    if place.is_done():  # the process was killed between the end and this answer
                        return self.learner.finish()
                else:
                    self.learner.begin(self.source)
                place.begin()
                self._steps(place, callbacks, progress, log_to)
                return self._save_results(place)

    def _resume(self, state: dict[str, Any]) -> None:
        self.learner.resume(state)
        self.step, self.tokens = state["step"], state["tokens"]
        self.source.restore(state["source"])

    def _steps(
        self,
        place: RunFolder | None,
        callbacks: Sequence[Callable[[int, S], None]],
        progress: bool,
        log_to: Sequence[str],
    ) -> None:
        """Take the steps that are left."""
        # Several processes would not be interrupted after the same step.
        wait = place is not None and self.world.size == 1
        saved = self.step
        with interrupts_wait(wait) as interrupted, self._logs(place, progress, log_to) as logs:
            while self.step != self.plan.total_steps and not interrupted:
                batch = self.source.next()
                if batch is None:
                    break
                result = self.learner.learn(batch, self.step)
                self.step += 1
                self.tokens += result.n_tokens
                logs.step()
                last = self.step == self.plan.total_steps
                if last or self.step % self.plan.log_every == 0:
                    if place is not None:
                        place.check_in_place()
                    metrics = self.learner.metrics(result, self.step, self.tokens)
                    epoch = None if self.plan.passes is None else self.source.epoch
                    logs.write(self.step, self.tokens, metrics, epoch)
                # Before the checkpoint: a run that dies in between calls them again, never not.
                for callback in callbacks:
                    callback(self.step, result)
                if self.step % self.plan.checkpoint_interval == 0:
                    saved = self._save(place, logs)
            if self.step > saved:
                self._save(place, logs)
        if interrupted and self.step != self.plan.total_steps:
            raise KeyboardInterrupt

    def _logs(self, place: RunFolder | None, progress: bool, log_to: Sequence[str]) -> Logs:
        if not self.world.is_rank_zero:  # the first process speaks for all
            place, progress, log_to = None, False, ()
        settings = self.learner.settings()
        total = self.plan.total_steps
        return Logs(total, self.step, self.tokens, place, progress, log_to, settings)

    def _save(self, place: RunFolder | None, logs: Logs) -> int:
        """Write a checkpoint if there is a folder; the step."""
        if place is not None:
            state = self.learner.state()
            state |= {"step": self.step, "tokens": self.tokens, "source": self.source.state()}
            logs.sync()
            place.save_checkpoint(self.step, state)
        return self.step

    def _save_results(self, place: RunFolder) -> dict[str, Autoencoder]:
        found = self.learner.finish()
        place.check_in_place()

        def save() -> None:
            for name, autoencoder in found.items():
                autoencoder.save(place.result_folder(name), overwrite=True)
            place.finish(self.step, **self.learner.outcome())

        self.world.on_rank_zero(save)
        return found


@contextlib.contextmanager
def _flush_denormals() -> Iterator[None]:
    """Treat the tiniest numbers as zero: Adam's moments of inactive latents decay into them, and CPUs compute
    a hundred times more slowly with them."""
    was_on = float(torch.tensor(1e-40) + torch.zeros(())) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)
