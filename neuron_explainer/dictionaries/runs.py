"""The folder of a run: its config, its log, its checkpoints, and its results.

    config.json                      the run's settings, for the record and for resuming
    log.jsonl                        one line each log_every steps
    checkpoints/00001200/            state.json, state.safetensors: all that a resumed run needs, with
                                     checksums of both, so that a damaged checkpoint is passed over. Where
                                     each process holds some of the latents, each writes such a pair
    autoencoders/<name>/             the results (``autoencoder/`` where there is only one)
    finished.json                    written last

A folder is never overwritten. The same settings resume an unfinished run, and find a finished one done.

:class:`Run` reads such a folder, :class:`RunFolder` writes it.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, World
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.files import origins
from neuron_explainer.files.writing import Guard

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
KIND = "dictionary_training"
SINGLE_NAME = "autoencoder"
"""Name of the dictionary of a run that has only one."""
FREE_TO_CHANGE = ("epochs", "log_every", "checkpoint_every", "keep_checkpoints", "device")
"""Settings that alter no number of what is trained on the way."""
PLACES = ("model", "source")
"""Where the text and the model of a record lie now; their names and fingerprints stand beside them."""


class Run:
    """A run on disk, to be read.

    Args:
        path: its folder. :meth:`open` checks that there is a run in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The run in a folder; an error if there is none."""
        run = cls.find(folder)
        if run is None:
            raise InputError(f"{folder} holds no run: expected a folder that train has written.")
        return run

    @classmethod
    def find(cls, folder: str | Path) -> "Run | None":
        """The run in a folder; None if there is none."""
        run = Run(folder)
        return run if run.config.get("kind") == KIND else None

    @classmethod
    def containing(cls, result: str | Path) -> "Run | None":
        """The run that an autoencoder's folder is a result of; None if there is no such run."""
        parents = list(Path(result).resolve().parents)[:2]
        return next((run for run in map(cls.find, parents) if run is not None), None)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds; empty if there is none."""
        file = self.path / "config.json"
        stored = files.read_json(file) if file.is_file() else {}
        return stored if isinstance(stored, dict) else {}

    @property
    def dictionaries(self) -> dict[str, dict[str, Any]]:
        """The settings of each dictionary, by name; empty for a run of sparse coding."""
        return dict(self.config.get("dictionaries", {}))

    @property
    def record(self) -> dict[str, Any]:
        """Where its activations came from: model, text, how the text was cut; empty if not recorded."""
        return origins.from_folder(self.config.get("record", {}), self.path)

    @property
    def log(self) -> Path:
        """A line of JSON each ``log_every`` steps."""
        return self.path / "log.jsonl"

    @property
    def is_finished(self) -> bool:
        """True if all results have been written."""
        return self._finished.exists()

    @property
    def finished(self) -> dict[str, Any]:
        """What ``finished.json`` holds: ``step`` and the outcome. An error if the run has not finished."""
        if not self.is_finished:
            raise InputError(
                f"{self.path} is a run that has not finished; give its train command again."
            )
        return dict(files.read_json(self._finished))

    @property
    def results(self) -> dict[str, Path]:
        """The folders of the autoencoders of a finished run, by name."""
        _ = self.finished
        names = list(self.dictionaries)
        if not names:  # sparse coding names its dictionaries when it has seen activations
            folders = sorted((self.path / "autoencoders").glob("[!.]*"))
            names = [SINGLE_NAME, *(folder.name for folder in folders)]
        found = {name: self.result_folder(name) for name in names}
        return {name: folder for name, folder in found.items() if folder.exists()}

    def result_folder(self, name: str = SINGLE_NAME) -> Path:
        """Where the autoencoder of that name is, or will be."""
        if name == SINGLE_NAME:
            return self.path / SINGLE_NAME
        return self.path / "autoencoders" / re.sub(r"[^\w.+-]", "-", name)

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, newest first."""
        found = [path for path in self._checkpoints.glob("*") if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    @property
    def _finished(self) -> Path:
        return self.path / "finished.json"


class RunFolder(Run):
    """A run on disk, to be written.

    Args:
        path: absent, empty, or the folder of a run with the same settings.
        settings: the run's settings, as JSON can hold them; those in :data:`FREE_TO_CHANGE` may be different
            when the run is resumed.
        keep: how many checkpoints stay.
        world: the processes that share the folder. All read. The first one writes everything but those parts
            of a state that only the others have.
        extensible: whether a finished run may continue, if it is asked for more epochs.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        keep: int,
        world: World = SINGLE_PROCESS,
        extensible: bool = False,
    ) -> None:
        super().__init__(path)
        self._world, self._extensible = world, extensible
        part = f"-{world.rank + 1}-of-{world.size}" if world.splits_latents else ""
        self._state, self._tensors = f"state{part}.json", f"state{part}.safetensors"
        self._settings = {"format_version": FORMAT_VERSION, "kind": KIND, **settings}
        if "record" in settings:
            self._settings["record"] = origins.for_folder(settings["record"], path)
        self._keep = keep
        self._guard: Guard | None = None

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Check that the folder may be used, and keep other processes out of it in the meantime."""
        with contextlib.ExitStack() as stack:
            self._world.on_rank_zero(lambda: stack.enter_context(self._claimed()))
            yield

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        config = self._config
        if self.path.is_file():
            raise InputError(f"{self.path} is a file; a run needs a folder.")
        if not config.exists() and self.path.exists() and _visible(self.path):
            raise InputError(f"{self.path} is not empty and holds no run; choose another folder.")
        with files.claim(self.path, "run") as self._guard:
            if config.exists():
                self._check_same(files.read_json(config))
            yield

    def begin(self) -> None:
        """Write the settings: from here on the folder holds this run."""

        def note() -> None:
            files.write_json(self._config, self._settings)
            files.remove(self._finished)
            if self._guard is not None:
                self._guard.keep(self._config)

        self._world.on_rank_zero(note)

    def is_done(self) -> bool:
        """Whether a run with these settings has finished here, so that there is nothing left to do."""

        def done() -> bool:
            free = [name for name in FREE_TO_CHANGE if name != "epochs"]
            more = self._extensible and any(_differences(self.config, self._settings, free))
            return self.is_finished and not more

        return self._world.on_rank_zero(done)

    def check_in_place(self) -> None:
        """Raise SourceError, in all processes, if the folder was renamed, replaced or emptied since
        :meth:`begin`. What the first process writes checks this too."""

        def check() -> None:
            if self._guard is not None:
                self._guard.check()

        self._world.on_rank_zero(check)

    def _check_same(self, stored: Mapping[str, Any]) -> None:
        if any(stored.get(key) != self._settings[key] for key in ("format_version", "kind")):
            raise CheckpointError(f"{self._config} is not that of a run known here.")
        differences = "; ".join(list(_differences(stored, self._settings))[:5])
        if differences and self.is_finished:
            more = (
                " Settings stay the same when more epochs are asked for."
                if self._extensible
                else ""
            )
            raise InputError(
                f"{self.path} holds a finished run with other settings ({differences}): use what it "
                f"trained, or train in another folder.{more}"
            )
        if differences:
            raise InputError(
                f"{self.path} holds an unfinished run with other settings ({differences}). Give the same "
                "settings to resume it, or another folder."
            )

    # ---- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all; only then are older ones removed.

        All processes wait until it is there.
        """
        self.check_in_place()
        target = self._checkpoints / f"{step:08d}"
        with contextlib.ExitStack() as stack:

            def begin() -> str:
                if target.exists():  # a damaged one, passed over when the run was resumed
                    files.remove(target)
                return str(stack.enter_context(files.atomic_folder(target)))

            temporary = Path(self._world.on_rank_zero(begin))
            if self._world.is_rank_zero or self._world.splits_latents:
                self._write(temporary, step, state)
            self._world.all_true(True)  # has written
        self._world.on_rank_zero(self._remove_old)

    def _write(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        tree = _take_tensors(state, "", tensors)
        with files.plain_write(folder / self._tensors) as path:
            safetensors.torch.save_file(tensors, path)
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "sha256": files.sha256_of(folder / self._tensors),
            "state": tree,
        }
        content["checksum"] = _checksum(content)
        files.write_json(folder / self._state, content)

    def _remove_old(self) -> None:
        for old in self.checkpoints[self._keep :]:
            files.remove(old)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest state that all processes can read; None if there is no checkpoint.

        What killed processes left in the folder is removed: what is half written, and checkpoints that
        were to be removed.
        """
        found = self._world.on_rank_zero(self._tidied)
        for name in found:
            state = self._read(self._checkpoints / name)
            if self._world.all_true(state is not None):
                if name == found[0]:  # else one that is kept cannot be read
                    self._world.on_rank_zero(self._remove_old)
                return state
        if found:
            raise CheckpointError(
                f"none of the checkpoints in {self._checkpoints} can be read; remove them "
                "to begin the run anew."
            )
        return None

    def _tidied(self) -> list[str]:
        """The names of the checkpoints, newest first, after leftovers have been removed."""
        for folder in (self.path, self._checkpoints, self.path / "autoencoders"):
            if folder.is_dir():
                files.remove_leftovers(folder)
        if self.is_finished and not self.checkpoints:
            raise InputError(
                f"{self.path} holds a finished run, whose checkpoints were removed: use what it trained, "
                "or train in another folder."
            )
        return [folder.name for folder in self.checkpoints]

    def _read(self, folder: Path) -> dict[str, Any] | None:
        try:
            stored = files.read_json(folder / self._state)
            if stored.pop("checksum") != _checksum(stored) or stored["step"] != int(folder.name):
                raise ValueError(f"{self._state} is not what was written")
            if files.sha256_of(folder / self._tensors) != stored["sha256"]:
                raise ValueError(f"{self._tensors} is not what was written")
            tensors = safetensors.torch.load_file(folder / self._tensors)
            state: dict[str, Any] = _put_tensors(stored["state"], tensors)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            missing = "a field is missing: " if isinstance(error, KeyError) else ""
            logger.warning("%s is damaged and passed over: %s%s", folder, missing, error)
            return None
        return state

    def finish(self, step: int, metrics: dict[str, Any], **more: Any) -> None:
        """Mark the run as finished, with its metrics and whatever else is to be known."""
        files.write_json(self._finished, {"step": step, "metrics": metrics, **more})


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _checksum(content: Mapping[str, Any]) -> str:
    """A hash of every value in ``content`` and of its type (1 and 1.0 differ)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differences(
    old: Any, new: Any, free: Collection[str] = FREE_TO_CHANGE, where: str = ""
) -> Iterator[str]:
    """``name: old there, new now`` for every value that differs between two trees, but for ``free`` ones."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{where}.{key}" if where else str(key)
            values = old.get(key), new.get(key)
            if key not in free and not _is_place(inner, *values):
                yield from _differences(*values, free, inner)
    elif old != new:
        yield f"{where}: {old!r} there, {new!r} now"


def _is_place(where: str, *values: Any) -> bool:
    """Whether these are paths in a run's record, and not settings or descriptions of the same name."""
    *above, key = where.split(".")
    return key in PLACES and "record" in above and all(isinstance(v, str) for v in values)


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
