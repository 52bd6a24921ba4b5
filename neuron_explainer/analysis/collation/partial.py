"""What an interrupted collation leaves on disk, and how it goes on.

While a collation runs, its folder holds ``partial/``, with ``config.json`` (the settings) and a folder for
each process, which is replaced as a whole whenever the process saves what it has found. A saved state names
the states that it has taken up, so that nothing counts twice if a process is killed before it deletes those.

A state holds ``config.json`` (how far each part of the corpus has been read), and for each place ``N`` that
is looked at ``N.sums.safetensors`` and ``N.GROUP.npy``, several arrays of records one after the other.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from neuron_explainer import files
from neuron_explainer.analysis.collation.findings import Findings
from neuron_explainer.analysis.collation.moments import PartSums, Totals
from neuron_explainer.analysis.collation.reservoirs import Entries
from neuron_explainer.analysis.records import Ints
from neuron_explainer.errors import CheckpointError, SourceError

Progress = dict[int, int]
"""For each part of the corpus that has been begun: the batch to go on with."""
_KIND, _VERSION = "collation_state", 1
_TOTALS = ("max", "min", "last_active", "histogram")


@dataclass(frozen=True)
class State:
    """What one process has saved."""

    folder: Path
    identity: str
    progress: Progress
    n_tokens: list[int]
    """For each place that is looked at."""

    @classmethod
    def read(cls, folder: Path) -> tuple["State", list[str]]:
        """A state, and the identities of those that it has taken up."""
        found = files.read_json(folder / "config.json")
        if (found.get("kind"), found.get("format_version")) != (_KIND, _VERSION):
            raise CheckpointError(f"{folder} does not hold the state of a collation.")
        progress = {int(part): int(number) for part, number in found["progress"].items()}
        state = cls(folder, str(found["identity"]), progress, list(found["n_tokens"]))
        return state, list(found["absorbed"])

    def load(self, index: int, into: Findings) -> None:
        """Add what is known about one place to ``into``."""
        sums = load_file(self.folder / f"{index}.sums.safetensors")
        into.examples.raise_to(sums["largest"])
        for group in into.examples.groups:
            for unit, entries in _read_entries(self.folder / f"{index}.{group}.npy"):
                into.examples.absorb(group, unit, entries)
        into.totals.absorb(_totals(sums, into.totals, self.n_tokens[index]))
        if into.together is not None:
            into.together.absorb(sums["together.units"], sums["together.counts"])


def states(partial: Path) -> dict[int, State]:
    """The states in a folder by the number of their process, without those that another has taken up."""
    found, absorbed = {}, set()
    for folder in sorted(partial.glob("rank-*")):
        state, others = State.read(folder)
        found[int(folder.name.removeprefix("rank-"))] = state
        absorbed |= set(others)
    return {rank: state for rank, state in found.items() if state.identity not in absorbed}


def remove_absorbed(partial: Path) -> None:
    """Delete the states that another one has taken up. Only while no process is at work."""
    kept = {state.folder for state in states(partial).values()}
    for folder in partial.glob("rank-*"):
        if folder not in kept:
            files.remove(folder)


def folder_of(partial: Path, rank: int) -> Path:
    """Where a process saves its state."""
    return partial / f"rank-{rank:03d}"


def save(
    folder: Path, found: list[Findings], progress: Progress, absorbed: Mapping[str, Path]
) -> None:
    """Write the state of a process to ``folder``, in the place of an earlier one.

    Args:
        folder: see :func:`folder_of`.
        found: for each place that is looked at.
        progress: how far each part of the corpus has been read.
        absorbed: states of other processes that are part of this one, by identity; they are deleted.
    """
    with files.atomic_folder(folder, overwrite=True) as temporary:
        for index, each in enumerate(found):
            with files.plain_write(temporary / f"{index}.sums.safetensors") as path:
                save_file(_sums(each), path)
            for group in each.examples.groups:
                path = temporary / f"{index}.{group}.npy"
                with files.plain_write(path), path.open("wb") as out:
                    for unit, entries in each.examples.blocks(group):
                        np.save(out, _records(unit, entries), allow_pickle=False)
        header = {
            "kind": _KIND,
            "format_version": _VERSION,
            "identity": secrets.token_hex(8),
            "absorbed": list(absorbed),
            "progress": {str(part): number for part, number in progress.items()},
            "n_tokens": [each.totals.n_tokens for each in found],
        }
        files.write_json(temporary / "config.json", header)
    for other in absorbed.values():
        if other != folder:
            with contextlib.suppress(SourceError):  # another process is removing it too
                files.remove(other)


def _sums(found: Findings) -> dict[str, npt.NDArray[Any]]:
    totals = found.totals
    arrays = {name: getattr(totals, name) for name in _TOTALS}
    arrays["largest"] = found.examples.largest
    for part, sums in totals.parts.items():
        arrays |= {f"{part}.{name}": array for name, array in sums.arrays().items()}
    if found.together is not None:
        arrays |= {f"together.{name}": x for name, x in found.together.arrays().items()}
    return arrays


def _totals(sums: dict[str, npt.NDArray[Any]], like: Totals, n_tokens: int) -> Totals:
    totals = Totals(like.n_units, like.dense)
    totals.n_tokens = n_tokens
    for name in _TOTALS:
        setattr(totals, name, sums[name])
    by_part: dict[int, dict[str, npt.NDArray[Any]]] = {}
    for key, array in sums.items():
        part, _, name = key.partition(".")
        if part.isdecimal():
            by_part.setdefault(int(part), {})[name] = array
    totals.parts = {part: PartSums.from_arrays(arrays) for part, arrays in by_part.items()}
    return totals


_FIELDS = ("key", "position", "value", "offset", "length", "peak", "activations")


def _records(unit: Ints, entries: Entries) -> npt.NDArray[Any]:
    columns = {"unit": unit} | {name: getattr(entries, name) for name in _FIELDS}
    dtype = [(name, x.dtype, x.shape[1:]) for name, x in columns.items()]
    records = np.empty(len(unit), dtype=dtype)
    for name, column in columns.items():
        records[name] = column
    return records


def _read_entries(path: Path) -> Iterator[tuple[Ints, Entries]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            records = np.load(file, allow_pickle=False)
            yield records["unit"], Entries(*(records[name] for name in _FIELDS))
