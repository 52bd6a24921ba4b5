"""What the model is shown at each epoch: how many cells are hidden, which kinds of boards, and the losses.

All of it is a function of the epoch alone. The schedules are those of the paper's programs: boards of one
root come first, and masking grows. Shape legend: ``b`` boards, ``s`` cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.drawing import hide
from neuron_explainer.experiments.boards.objects import KINDS

Mix = tuple[float, float, float]


class Ramp(NamedTuple):
    """A number that goes from ``first`` to ``last`` between two epochs, and stays the same outside."""

    first: float
    last: float
    start: float
    end: float

    def at(self, epoch: float) -> float:
        """The number at an epoch."""
        if epoch < self.start:
            return self.first
        if epoch > self.end:
            return self.last
        return self.first + (self.last - self.first) * (epoch - self.start) / (
            self.end - self.start
        )


ALWAYS, NEVER = Ramp(1.0, 1.0, 0.0, 1.0), Ramp(0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Curriculum:
    """The schedules of one architecture, in epochs of the paper's programs."""

    mask: float
    """Probability of a cell to be hidden, once masking has reached its full strength."""
    mask_least: float
    """The least probability, from the first epoch."""
    mask_end: float
    """Epoch at which masking reaches its full strength."""
    patch: float
    """From ``mask_end``, the probability of a board to lose a whole patch besides."""
    mix_first: Mix
    """Probabilities of single, double and composite boards at first."""
    mix_last: Mix
    """At last."""
    mix_start: float
    mix_end: float
    """Between these epochs the mix changes."""
    words: Ramp = ALWAYS
    """Weight of the losses of speech (LEA)."""
    blank: Ramp = NEVER
    """Weight of the loss on words that are not blank (LEA)."""

    @property
    def end(self) -> float:
        """The epoch at which nothing changes any more."""
        return max(self.mask_end, self.mix_end, self.words.end, self.blank.end)

    def mask_probability(self, epoch: float) -> float:
        """Probability of a cell to be hidden."""
        return max(self.mask * min(1.0, epoch / self.mask_end), self.mask_least)

    def patch_probability(self, epoch: float) -> float:
        """Probability of a board to lose a patch."""
        return self.patch if epoch >= self.mask_end else 0.0

    def board_mix(self, epoch: float) -> tuple[float, ...]:
        """Probabilities of single, double and composite boards."""
        ends = zip(self.mix_first, self.mix_last, strict=True)
        mix = [Ramp(a, b, self.mix_start, self.mix_end).at(epoch) for a, b in ends]
        return tuple(share / sum(mix) for share in mix)

    def unreached(self, epoch: float) -> str:
        """What training until ``epoch`` does not reach, as a sentence; empty if it reaches everything."""
        missing = []
        if epoch < self.mask_end:
            full = f"masking of {self.mask:g} (it ends at {self.mask_probability(epoch):.3g})"
            missing.append(full + (" and hidden patches" if self.patch else ""))
        if epoch < self.mix_end:
            mix = "/".join(f"{share:.2g}" for share in self.board_mix(epoch))
            goal = "/".join(f"{share:.2g}" for share in self.mix_last)
            missing.append(f"the mix of boards {goal} (it ends at {mix})")
        if epoch < self.words.end:
            missing.append(
                f"the full loss of reconstruction from words (its weight ends at {self.words.at(epoch):.2g})"
            )
        return "; ".join(missing)


THIRD = 1 / 3
CURRICULA: dict[str, Curriculum] = {
    "gpt": Curriculum(
        mask=0.25,
        mask_least=0.01,
        mask_end=750,
        patch=0.5,
        mix_first=(0.8, 0.1, 0.1),
        mix_last=(THIRD, THIRD, THIRD),
        mix_start=250,
        mix_end=1000,
    ),
    "lea": Curriculum(
        mask=0.25,
        mask_least=0.01,
        mask_end=3000,
        patch=0.0,
        mix_first=(0.95, 0.05, 0.0),
        mix_last=(0.6, 0.4, 0.0),
        mix_start=1000,
        mix_end=2000,
        words=Ramp(0.0, 1.0, 250, 1000),
        # The program ramps it between 1000 and 3000, from 0 to 0.
        blank=Ramp(0.0, 0.0, 1000, 3000),
    ),
}
"""By architecture."""


class BoardBatch(NamedTuple):
    """Boards as they are, and as the model sees them."""

    tokens: Tensor
    """``[b, s]``."""
    masked: Tensor
    """``[b, s]``: the same, hidden cells with the token for that."""


class BoardBatches:
    """The batches of a training, in epochs. A batch depends on its number alone, so a resumed run needs no
    more than the number.

    Args:
        dataset: boards of its training sets are drawn, with replacement.
        curriculum: what is drawn at each epoch, and how it is masked.
        boards_per_epoch: the last batch of an epoch may be smaller than the others.
        batch_size: boards of a batch.
        seed: of the draws.
        pace: epochs of the curriculum that go by in an epoch.
    """

    def __init__(
        self,
        dataset: BoardDataset,
        curriculum: Curriculum,
        boards_per_epoch: int,
        batch_size: int,
        seed: int,
        pace: float = 1.0,
    ) -> None:
        self.dataset, self.curriculum, self.seed, self.pace = dataset, curriculum, seed, pace
        self.boards_per_epoch, self.batch_size = boards_per_epoch, batch_size
        self.per_epoch = -(-boards_per_epoch // batch_size)
        """Batches of an epoch."""
        self._next = 0
        self._epoch_has_ended = False
        for kind, first, last in zip(KINDS, curriculum.mix_first, curriculum.mix_last, strict=True):
            if (first or last) and not len(dataset.places(kind, "train")):
                raise InputError(
                    f"training needs {kind} boards, and the data set holds none out of test."
                )

    def batch(self, number: int) -> BoardBatch:
        """The batch of that number, counted from 0 over all epochs."""
        epoch, within = divmod(number, self.per_epoch)
        n = min(self.batch_size, self.boards_per_epoch - within * self.batch_size)
        rng = np.random.default_rng([self.seed, number])
        at = epoch * self.pace
        counts = rng.multinomial(n, self.curriculum.board_mix(at))
        p, patch = self.curriculum.mask_probability(at), self.curriculum.patch_probability(at)
        tokens, masked = [], []
        for kind, count in zip(KINDS, counts.tolist(), strict=True):
            if count:
                boards = self.dataset.draw(kind, "train", count, rng)
                tokens.append(boards.tokens)
                masked.append(hide(boards, p, patch, rng))
        both = (torch.from_numpy(np.concatenate(part)) for part in (tokens, masked))
        return BoardBatch(*both)

    def __iter__(self) -> Iterator[BoardBatch]:
        """The batches that are left of the current epoch."""
        if (
            self._epoch_has_ended
        ):  # a run is resumed that was stopped right after the last of an epoch
            self._epoch_has_ended = False
            return
        while True:
            self._next += 1
            yield self.batch(self._next - 1)
            if self._next % self.per_epoch == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
        self._epoch_has_ended = self._next > 0 and self._next % self.per_epoch == 0
