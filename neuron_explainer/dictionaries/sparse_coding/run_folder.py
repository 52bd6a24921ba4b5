"""What a run leaves on disk: checkpoints, a log and the finished dictionaries.

    <folder>/checkpoints/<batches>/   config.json, state.safetensors: whole, the newest few
    <folder>/log.jsonl                one line a dictionary and look
    <folder>/autoencoder/             the dictionary of activations without a location
    <folder>/autoencoders/<path>/     the dictionary of several layers
    <folder>/autoencoders/<path>/<layer>/

A process that is killed leaves hidden temporary folders, a torn last line of the log and lines that
are ahead of the newest checkpoint; all three are gone when the run goes on.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.dictionaries.sparse_coding.config import FREE_TO_CHANGE, SparseCodingConfig
from neuron_explainer.dictionaries.sparse_coding.data import Place
from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.autoencoder import Autoencoder

_KIND, _FORMAT_VERSION = "sparse coding checkpoint", 1
_STATE_FILE = "state.safetensors"


class Checkpoint(NamedTuple):
    """A run at rest."""

    facts: dict[str, Any]
    """What JSON can hold; ``"batches"`` is how many have been learned from."""
    tensors: dict[str, Tensor]


class RunFolder:
    """The folder of one run, which one process at a time may use."""

    def __init__(self, folder: str | Path, config: SparseCodingConfig) -> None:
        self.folder, self.config = Path(folder), config
        self.log_file = self.folder / "log.jsonl"

    def resume(self) -> Checkpoint | None:
        """The newest checkpoint, None if there is none; tidies up after a killed process."""
        self._remove_leftovers()
        newest = max(self._checkpoints(), default=None)
        if newest is None:
            self._trim_log(0)
            return None
        facts = files.read_json(newest / "config.json")
        self._check(newest, facts)
        self._trim_log(facts["batches"])
        return Checkpoint(facts, safetensors.torch.load_file(newest / _STATE_FILE))

    def save(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, unless it is there, and delete those that are too old."""
        target = self.folder / "checkpoints" / f"{facts['batches']:09}"
        stored = {
            "format_version": _FORMAT_VERSION,
            "kind": _KIND,
            "config": asdict(self.config),
            **facts,
        }
        with files.atomic_folder(target, overwrite=True) as temporary:
            files.write_json(temporary / "config.json", stored)
            safetensors.torch.save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                temporary / _STATE_FILE,
            )
        for old in self._checkpoints()[: -self.config.keep_checkpoints]:
            # First out of sight: a folder with a checkpoint's name always is one.
            hidden = old.with_name(f".{old.name}.deleted")
            os.rename(old, hidden)
            shutil.rmtree(hidden)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Add lines to the log."""
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        # Appended and not replaced as a whole, so that it can be watched; _trim_log mends it.
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.writelines(lines)

    def save_autoencoders(self, autoencoders: Mapping[Place, Autoencoder]) -> None:
        """Write the finished dictionaries, in the place of earlier ones."""
        for place, autoencoder in autoencoders.items():
            if place is None:
                folder = self.folder / "autoencoder"
            else:
                folder = self.folder / "autoencoders" / place.path
                folder = folder if place.layer is None else folder / str(place.layer)
            autoencoder.save(folder, overwrite=True)

    def _checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted(
            path for path in (self.folder / "checkpoints").glob("*") if path.name.isdecimal()
        )

    def _remove_leftovers(self) -> None:
        for pattern in (".*.tmp", ".*.deleted"):
            for path in (self.folder / "checkpoints").glob(pattern):
                shutil.rmtree(path)

    def _check(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Refuse what is no checkpoint of this run."""
        found = facts.get("kind"), facts.get("format_version")
        if found != (_KIND, _FORMAT_VERSION):
            raise CheckpointError(
                f"{path}: expected a {_KIND} of format_version {_FORMAT_VERSION}, found {found[0]!r} "
                f"of {found[1]!r}."
            )
        asked, stored = asdict(self.config), facts["config"]
        changed = [
            f"{name}: {stored.get(name)!r} -> {value!r}"
            for name, value in asked.items()
            if name not in FREE_TO_CHANGE and value != stored.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}). Give the "
                "same settings to go on, or another folder to begin anew."
            )

    def _trim_log(self, batches: int) -> None:
        """Leave out whole or torn lines that are ahead of the checkpoint."""
        if not self.log_file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        lines = self.log_file.read_text("utf-8").splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["batches"] <= batches
        ]
        with files.atomic_write(self.log_file) as temporary:
            temporary.write_text("".join(kept), "utf-8")
