"""How long a training step takes, beside the time that its matrix products alone would take."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from neuron_explainer.errors import InputError
from neuron_explainer.experiments.boards.curriculum import BoardBatches
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.training import (
    BoardTrainer,
    BoardTrainingConfig,
    make_model,
)


class StepTime(NamedTuple):
    """Seconds of a step, and of its products."""

    step: float
    """Median of a whole step: draw and mask boards, forward, backward, AdamW."""
    products: float
    """What its floating point operations take at the rate of a product of the model's own sizes."""
    operations: float
    """Floating point operations of the products of a step."""
    rate: float
    """Operations per second of such a product."""

    @property
    def ratio(self) -> float:
        """How many times as long as its products a step takes."""
        return self.step / self.products


def time_step(config: BoardTrainingConfig, dataset: BoardDataset, repeats: int = 10) -> StepTime:
    """Time steps late in the curriculum, in turn with the products that they are measured against."""
    if repeats < 1:
        raise InputError(f"expected a number of steps to time, at least 1, found {repeats}.")
    model = make_model(config, dataset)
    trainer = BoardTrainer(model, config, dataset)
    batches = BoardBatches(
        dataset, config.curriculum, config.boards_per_epoch, config.batch_size, config.seed
    )
    first = batches.per_epoch * int(config.curriculum.end)

    numbers = itertools.count(first)

    def step() -> None:
        number = next(numbers)
        trainer.learn(batches.batch(number), number)

    with FlopCounterMode(display=False) as counter:
        step()
    rows = config.batch_size * dataset.config.n_cells
    width = model.sizes.width
    x, weight = torch.randn(rows, width), torch.randn(width, 4 * width)
    steps, rates = [], []
    for _ in range(repeats):
        steps.append(_seconds(step))
        rates.append(2 * rows * width * 4 * width / _seconds(lambda: x @ weight))
    rate, operations = statistics.median(rates), float(counter.get_total_flops())
    return StepTime(statistics.median(steps), operations / rate, operations, rate)


def _seconds(run: Callable[[], object]) -> float:
    """Of this process alone, where it has one thread, so that a busy machine does not matter."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start
