"""A small run of sparse coding that tests interrupt; as a program, one that is killed on the way.

python -m tests.dictionaries.sparse_coding_runs FOLDER batch 5      while batch 5 is read
python -m tests.dictionaries.sparse_coding_runs FOLDER sync 9       at the 9th fsync of a file
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.dictionaries.sparse_coding import SparseCodingConfig, train_sparse_coding
from neuron_explainer.models.autoencoder import Autoencoder

CONFIG = SparseCodingConfig(
    24, 0.2, epochs=2, batch_size=16, step_size=0.05, log_every=1, checkpoint_every=2
)
COUNTS = torch.arange(1, 8)
N_BATCHES = 7


class Batches:
    """Seven batches of rows and tokens, the same each time; ``on_read`` is told the running number."""

    def __init__(self, on_read=lambda number: None):
        self.on_read, self.number = on_read, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(N_BATCHES):
            self.number += 1
            self.on_read(self.number)
            x = torch.randn(40, 12, generator=generator)
            yield x, torch.randint(0, 9, (40,), generator=generator)


def run(folder: Path | None, batches: Batches | None = None, **changes) -> Autoencoder:
    config = SparseCodingConfig(**{**CONFIG.__dict__, **changes})
    return train_sparse_coding(
        config, Batches() if batches is None else batches, folder, token_counts=COUNTS
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of the log all that does not depend on the clock."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
    rate = rb' "tokens_per_second": [^,]+,'
    return found | {
        name: re.sub(rate, b"", text) for name, text in found.items() if name == "log.jsonl"
    }


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_at_sync(number: int) -> None:
    """Let the process die in the ``number``-th fsync: in the middle of writing something."""
    usual, seen = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            _kill()
        usual(handle)

    os.fsync = fsync  # type: ignore[assignment]


def main() -> None:
    folder, moment, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    if moment == "sync":
        _killed_at_sync(number)
    run(folder, Batches(lambda n: _kill() if (moment, n) == ("batch", number) else None))


if __name__ == "__main__":
    main()
