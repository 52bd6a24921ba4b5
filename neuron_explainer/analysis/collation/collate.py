"""The public functions: :func:`collate` with files, :func:`collect` in memory."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from neuron_explainer import files
from neuron_explainer.activations.windows import TokenWindows, check_same_settings
from neuron_explainer.analysis.collation import partial
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.findings import Findings
from neuron_explainer.analysis.collation.partial import Progress, State
from neuron_explainer.analysis.collation.passes import Collation
from neuron_explainer.analysis.collation.units import Watched, What, watched, weights_sha256
from neuron_explainer.analysis.records import Collected
from neuron_explainer.analysis.store_file import StoreFile
from neuron_explainer.analysis.store_format import write_store
from neuron_explainer.analysis.store_names import file_name
from neuron_explainer.analysis.token_store import TOKENS_FOLDER, TokenStore
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.files.writing import Guard
from neuron_explainer.interrupts import interrupts_wait
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.progress import progress_bar

_PARTIAL = "partial"
_KIND, _VERSION = "collation", 1
_OURS = re.compile(r"partial|tokens|workspace\.sqlite.*|.+\.store|\..+")
_POLL_S = 0.2


def collect(
    context: ModelContext,
    what: What,
    windows: TokenWindows,
    config: CollateConfig | None = None,
    *,
    progress: bool = False,
) -> dict[str, Collected]:
    """What :func:`collate` finds out, in memory: for a short text.

    Returns:
        for each dictionary or location, by name, all that was found out about its units.
    """
    config = CollateConfig() if config is None else config
    places = watched(context, what, config)
    collation = Collation(context, places, windows, config)
    found = [collation.findings(place) for place in places]
    with _bar(collation, progress) as bar:
        for part, batches in enumerate(collation.parts):
            for number in batches:
                for index, seen in collation.see(number):
                    found[index].add(seen, part)
                bar.update()
    provenance = collation.provenance(_model_sha256(context))
    return {
        place.name: collation.result(place, each, provenance)
        for place, each in zip(places, found, strict=True)
    }


def collate(
    context: ModelContext,
    what: What,
    windows: TokenWindows,
    out: str | Path,
    config: CollateConfig | None = None,
    *,
    origins: Mapping[str, Mapping[str, str]] | None = None,
    progress: bool = True,
    save_every_s: float = 600.0,
) -> dict[str, Path]:
    """Read a corpus once, and write the examples and figures of every unit to stores in a folder.

    The same call goes on with an interrupted collation. After Ctrl-C the batch is finished and what was
    found is saved. Under ``torchrun``, with the process group open, the processes divide the corpus, also
    one that other processes began; the stores are the same to the bit.

    A unit's examples are exact (:class:`~neuron_explainer.analysis.records.ExampleTable`): they are those
    of all contexts together, and do not depend on how the windows are ordered, or on how many of them make
    a batch, beyond what the model's own rounding does.

    Args:
        context: the model.
        what: autoencoders (a context, a multi-context, or a mapping from names to autoencoders),
            locations, or several of these: see :mod:`~neuron_explainer.analysis.collation.units`.
        windows: the corpus, cut into windows: one epoch. Pieces of documents that repeat earlier ones
            count in the figures, and give no examples.
        out: the folder for the stores. It may hold stores of other units on the same corpus.
        config: how many examples to keep, and more.
        origins: what the provenance of each dictionary or location is to say too, by name, and under the
            name ``""`` that of all: ``model`` and ``autoencoder``, by which the command line opens them.
        progress: show a progress bar.
        save_every_s: seconds between two saves.

    Returns:
        the file of each store, by the name of the dictionary or location.
    """
    config = CollateConfig() if config is None else config
    run = _Run(context, watched(context, what, config), windows, files.local_path(out), config)
    run.origins = dict(origins or {})
    with run.opened():
        if not run.is_finished:
            run.read(progress, save_every_s)
            run.write()
    return run.stores


class _World(NamedTuple):
    """The processes that divide the work."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> "_World":
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "WORLD_SIZE says that there are several processes, but they are not connected: call "
                "torch.distributed.init_process_group first, or collate from the command line."
            )
        return cls(0, 1)

    def on_rank_zero(self, function: Callable[[], None]) -> None:
        """Call a function in the first process; an error is raised in all."""
        error: list[Any] = [None]
        if self.rank == 0:
            try:
                function()
            except Exception as problem:  # whatever it is, the others must not wait for ever
                if self.size == 1:
                    raise
                error = [problem]
        if self.size > 1:
            told = [None if error[0] is None else str(error[0])]
            dist.broadcast_object_list(told, 0)
            if told[0] is not None:
                raise error[0] or InputError(told[0])

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


class _Run:
    """One call of :func:`collate` in one process."""

    def __init__(
        self,
        context: ModelContext,
        places: list[Watched],
        windows: TokenWindows,
        out: Path,
        config: CollateConfig,
    ) -> None:
        self.places, self.out, self.folder = places, out, out / _PARTIAL
        self.world = _World.here()
        self.collation = Collation(context, places, windows, config)
        self.provenance = self.collation.provenance(_model_sha256(context))
        self.stores = {place.name: out / file_name(place.name) for place in places}
        if len(set(self.stores.values())) < len(places):
            raise InputError(f"two of {', '.join(self.stores)} would have the same file name.")
        self.origins: dict[str, Mapping[str, str]] = {}
        self.progress: Progress = {}
        self.absorbed: dict[str, Path] = {}
        self.found: list[Findings] = []
        self.tokens: TokenStore | None = None
        self.guards: list[Guard] = []

    # ---- the folder --------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, checked, made and locked."""
        with ExitStack() as stack:
            self.world.on_rank_zero(lambda: self._open(stack))
            yield

    @property
    def is_finished(self) -> bool:
        """Whether all stores are there, and no process is at work on them."""
        return all(map(Path.exists, self.stores.values())) and not self.folder.exists()

    def _open(self, stack: ExitStack) -> None:
        self._check_out()
        if self.is_finished:
            files.remove_abandoned(self.folder)  # of a process that was killed as its last step
            return
        self.guards = [
            stack.enter_context(files.claim(self.folder, "collation")),
            stack.enter_context(files.guard(self.out)),
        ]
        path = self.folder / "config.json"
        if path.exists():
            there = files.read_json(path)
            if (there.get("kind"), there.get("format_version")) != (_KIND, _VERSION):
                raise CheckpointError(f"{self.folder} does not hold an interrupted collation.")
            for name, settings in self._settings().items():
                check_same_settings(there["settings"][name], settings, f"settings ({name})")
        else:
            header = {"kind": _KIND, "format_version": _VERSION, "settings": self._settings()}
            files.write_json(path, header)
        files.remove_leftovers(self.folder)
        partial.remove_absorbed(self.folder)
        # Before the work: this finds out whether the folder's stores are of another corpus.
        corpus, context = self.collation.windows.corpus, self.collation.context
        self.tokens = TokenStore.of_context(self.out / TOKENS_FOLDER, corpus, context)

    def _check_out(self) -> None:
        """Refuse a folder with other things in it, and one where the stores are finished."""
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise InputError(f"{self.out} is a file; the stores of a collation are in a folder.")
        foreign = [name for name in files.list_folder(self.out) if not _OURS.fullmatch(name)]
        if foreign:
            raise InputError(
                f"{self.out} holds {foreign[0]!r}, which is not of a collation; choose another folder."
            )
        there = [place for place in self.places if self.stores[place.name].exists()]
        begun = (self.folder / "config.json").exists()
        if there and not begun and not all(map(self._is_written, self.places)):
            raise InputError(
                f"{self.stores[there[0].name]} exists: this has been collated already. Choose another "
                "folder, or delete it."
            )

    def _is_written(self, place: Watched) -> bool:
        """Whether the store of a place is there, and says that it is what this call would write."""
        if not (path := self.stores[place.name]).exists():
            return False
        store = StoreFile(path)
        store.close()
        meta, wanted = store.meta, {**self.provenance, **place.provenance()}
        del wanted["versions"]  # an earlier version's store is as good
        found = {name: meta["provenance"].get(name) for name in wanted}
        settings = {name: meta["settings"].get(name) for name in self.collation.settings()}
        return bool(found == wanted and settings == self.collation.settings())

    def _settings(self) -> dict[str, Any]:
        """What an interrupted collation must have had in common with this one."""
        what = {
            place.name: {
                "kind": place.kind,
                "location": place.location,
                "signed": place.signed,
                "n_units": place.n_units,
                **place.provenance(),
            }
            for place in self.places
        }
        kept = {key: value for key, value in self.provenance.items() if key != "versions"}
        return {"what": what, "model and corpus": kept, **self.collation.settings()}

    # ---- reading -----------------------------------------------------------------------------------

    def read(self, progress: bool, save_every_s: float) -> None:
        """Read this process's share of the corpus, and save what was found."""
        work = self._take_up()
        saved = time.monotonic()
        total = sum(len(batches) for _, batches in work)
        with (
            interrupts_wait() as asked,
            progress_bar(
                total=total,
                desc="collating",
                unit=" batches",
                disable=not progress or self.world.rank > 0,
            ) as bar,
        ):
            for part, batches in work:
                self.progress.setdefault(part, batches.start)
                for number in batches:
                    for index, seen in self.collation.see(number):
                        self.found[index].add(seen, part)
                    self.progress[part] = number + 1
                    bar.update()
                    if asked or time.monotonic() - saved > save_every_s:
                        self._save()
                        saved = time.monotonic()
                    if asked:
                        raise KeyboardInterrupt
        self._save()
        self.found = []

    def _take_up(self) -> list[tuple[int, range]]:
        """Load this process's share of what is there; the parts, with the batches left, to read."""
        there = partial.states(self.folder)
        # The state of this process's own number is among them: it will be replaced by the next one.
        own = [s for rank, s in there.items() if rank % self.world.size == self.world.rank]
        self.world.wait()  # until everybody has seen what is there
        self.found = [self.collation.findings(place) for place in self.places]
        for state in own:
            for index, found in enumerate(self.found):
                state.load(index, found)
            self.progress |= state.progress
            self.absorbed[state.identity] = state.folder
        begun = {part for state in there.values() for part in state.progress}
        new = [part for part in range(len(self.collation.parts)) if part not in begun]
        parts = sorted([*self.progress, *new[self.world.rank :: self.world.size]])
        work = []
        for part in parts:
            batches = self.collation.parts[part]
            work.append((part, range(self.progress.get(part, batches.start), batches.stop)))
        return work

    def _save(self) -> None:
        folder = partial.folder_of(self.folder, self.world.rank)
        partial.save(folder, self.found, self.progress, self.absorbed)
        self.absorbed = {}

    # ---- writing -----------------------------------------------------------------------------------

    def write(self) -> None:
        """In the first process, merge what all have found and write the stores; the others wait."""
        if self.world.rank > 0:
            while self.folder.exists():
                time.sleep(_POLL_S)
            return
        while (there := self._everything()) is None:
            self._check_in_place()
            time.sleep(_POLL_S)
        for index, place in enumerate(self.places):
            if self.stores[place.name].exists():  # written before an interruption
                continue
            found = self.collation.findings(place)
            for state in there:
                state.load(index, found)
            noted = {**self.origins.get("", {}), **self.origins.get(place.name, {})}
            provenance = {**self.provenance, **noted}
            collected = self.collation.result(place, found, provenance)
            del found
            assert self.tokens is not None
            write_store(self.stores[place.name], collected, self.tokens)
        files.remove(self.folder)

    def _check_in_place(self) -> None:
        for guard in self.guards:
            guard.check()

    def _everything(self) -> list[State] | None:
        """The states of all processes, if these have read the whole corpus."""
        try:
            there = list(partial.states(self.folder).values())
        except SourceError:  # another process has just replaced its state, or deleted one
            return None
        progress: Progress = {}
        for state in there:
            progress |= state.progress
        parts = enumerate(self.collation.parts)
        whole = all(progress.get(part, -1) == batches.stop for part, batches in parts)
        return there if whole else None


def _bar(collation: Collation, progress: bool) -> Any:
    total = collation.windows.batches_per_epoch
    return progress_bar(total=total, desc="collating", unit=" batches", disable=not progress)


def _model_sha256(context: ModelContext) -> str:
    model: Any = context.get_or_create_model()
    return weights_sha256(model if isinstance(model, nn.Module) else model.model)
