"""The folder of a run: its config, its log, its checkpoints, and what comes of it in the end.

    config.json                      the run's settings, for the record and for resuming
    log.jsonl                        one line each log_every steps
    checkpoints/00001200/            state.json, state.safetensors: all that is needed to go on (one
                                     of each for every process where these hold some latents each),
                                     with a checksum: one that is damaged is passed over
    autoencoders/<name>/             what was trained (``autoencoder/`` where there is only one)
    finished.json                    written last

A folder is never overwritten. The same settings on an unfinished one go on with it.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, World
from neuron_explainer.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FREE_TO_CHANGE = ("epochs", "log_every", "checkpoint_every", "keep_checkpoints", "device")
"""Settings that alter no number of what is trained on the way."""


class RunFolder:
    """One run on disk.

    Args:
        path: absent, empty, or the folder of an unfinished run with the same settings.
        settings: of the run, as JSON can hold them; those of :data:`FREE_TO_CHANGE` may be others when
            it is gone on with.
        keep: how many checkpoints stay.
        world: the processes that share it. The first one writes, but for the parts of a state that
            others alone have; all read.
        extensible: whether a finished run may be gone on with, by asking for more epochs.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        keep: int,
        world: World = SINGLE_PROCESS,
        extensible: bool = False,
    ) -> None:
        self.path, self._world, self._extensible = Path(path), world, extensible
        part = f"-{world.rank + 1}-of-{world.size}" if world.splits_latents else ""
        self._state, self._tensors = f"state{part}.json", f"state{part}.safetensors"
        self._settings, self._keep = settings, keep

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Check that the folder is ours to use, and keep others out of it in the meantime."""
        with contextlib.ExitStack() as stack:
            self._world.on_rank_zero(lambda: stack.enter_context(self._open()))
            yield

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        config = self.path / "config.json"
        if self.path.is_file():
            raise InputError(f"{self.path} is a file; a run needs a folder.")
        if not config.exists() and self.path.exists() and _visible(self.path):
            raise InputError(f"{self.path} is not empty and holds no run; choose another folder.")
        files.make_folder(self.path)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            with files.explain_refusal(self.path / ".lock"):
                lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"{self.path} is in use: another process trains there.") from None
        try:
            if config.exists():
                self._check_same(files.read_json(config))
            yield
        finally:
            lock.release()

    def begin(self) -> None:
        """Note the settings: nothing stands in the way any more, and the run begins or goes on."""

        def note() -> None:
            known = {"format_version": FORMAT_VERSION, "kind": "dictionary_training"}
            files.write_json(self.path / "config.json", {**known, **self._settings})
            (self.path / "finished.json").unlink(missing_ok=True)

        self._world.on_rank_zero(note)

    def _check_same(self, stored: Mapping[str, Any]) -> None:
        unchanged = all(stored.get(key) == value for key, value in self._settings.items())
        if (self.path / "finished.json").exists() and (unchanged or not self._extensible):
            more = ", ask for more epochs," if self._extensible else ","
            raise InputError(
                f"{self.path} holds a finished run: load what it trained with Autoencoder.load{more} or "
                "train in another folder."
            )
        known = {"format_version": FORMAT_VERSION, "kind": "dictionary_training"}
        if any(stored.get(key) != value for key, value in known.items()):
            raise CheckpointError(f"{self.path / 'config.json'} is not that of a run known here.")
        differences = list(_differences(stored, {**known, **self._settings}))
        if differences:
            raise InputError(
                f"{self.path} holds an unfinished run with other settings ("
                + "; ".join(differences[:5])
                + "). Give the same settings to go on with it, or another folder."
            )

    # ---- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all; then, and only then, older ones may go.

        Nobody goes on before it is there.
        """
        target = self.path / "checkpoints" / f"{step:08d}"
        with contextlib.ExitStack() as stack:

            def begin() -> str:
                if target.exists():  # a damaged one, passed over when the run was resumed
                    shutil.rmtree(target)
                return str(stack.enter_context(files.atomic_folder(target)))

            temporary = Path(self._world.on_rank_zero(begin))
            if self._world.is_rank_zero or self._world.splits_latents:
                self._write(temporary, step, state)
            self._world.all_true(True)  # has written
        self._world.on_rank_zero(self._remove_old)

    def _write(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        tree = _take_tensors(state, "", tensors)
        safetensors.torch.save_file(tensors, folder / self._tensors)
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "sha256": files.sha256_of(folder / self._tensors),
            "state": tree,
        }
        files.write_json(folder / self._state, content)

    def _remove_old(self) -> None:
        for old in self._checkpoints()[self._keep :]:
            shutil.rmtree(old)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest state that can be read, by all processes; None if there is none.

        Leftovers of writes that were cut off are removed.
        """
        found = self._world.on_rank_zero(self._tidied)
        for name in found:
            state = self._read(self.path / "checkpoints" / name)
            if self._world.all_true(state is not None):
                return state
        if found:
            raise CheckpointError(
                f"none of the checkpoints in {self.path / 'checkpoints'} can be read; remove them "
                "to begin the run anew."
            )
        return None

    def _tidied(self) -> list[str]:
        """Names of checkpoints, newest first, when leftovers are gone."""
        for leftover in (self.path / "checkpoints").glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        return [folder.name for folder in self._checkpoints()]

    def _read(self, folder: Path) -> dict[str, Any] | None:
        try:
            stored = files.read_json(folder / self._state)
            if files.sha256_of(folder / self._tensors) != stored["sha256"]:
                raise ValueError(f"{self._tensors} is not what was written")
            tensors = safetensors.torch.load_file(folder / self._tensors)
            state: dict[str, Any] = _put_tensors(stored["state"], tensors)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            logger.warning("%s is damaged and passed over: %s", folder, error)
            return None
        return state

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        folder = self.path / "checkpoints"
        if not folder.exists():
            return []
        found = [path for path in folder.iterdir() if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def finish(self, step: int, metrics: dict[str, Any], **more: Any) -> None:
        """Mark the run as finished, with what else is to be known of its results."""
        files.write_json(self.path / "finished.json", {"step": step, "metrics": metrics, **more})


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """``name: old -> new`` for every value that is not the same in two trees."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{where}.{key}" if where else str(key)
            if key not in FREE_TO_CHANGE:
                yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{where}: {old!r} there, {new!r} now"


def _take_tensors(tree: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``tree`` with each tensor moved to ``tensors`` and its name left in its place."""
    if isinstance(tree, Tensor):
        # A copy: safetensors refuses tensors that share memory.
        tensors[where] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": where}
    if isinstance(tree, Mapping):
        assert all(isinstance(key, str) for key in tree), f"{where}: keys must be text"
        return {"map": {k: _take_tensors(v, f"{where}/{k}", tensors) for k, v in tree.items()}}
    if isinstance(tree, list | tuple):
        return {"list": [_take_tensors(v, f"{where}/{i}", tensors) for i, v in enumerate(tree)]}
    return {"value": tree}


def _put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_take_tensors`; tuples have become lists."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _put_tensors(value, tensors) for key, value in content.items()}
    if kind == "list":
        return [_put_tensors(value, tensors) for value in content]
    return content
