"""What the pictures are drawn from: two models, their boards, and recordings that are made once.

study = Study.of()                       # the models that come with the package
pictures_of_claims.probes(study).figure  # a matplotlib figure
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_explainer.errors import InputError, optional_module
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.drawing import Boards
from neuron_explainer.experiments.boards.gpt import BoardGPT
from neuron_explainer.experiments.boards.lea import LEA
from neuron_explainer.experiments.boards.model_files import load_model, shipped
from neuron_explainer.experiments.boards.objects import Ints
from neuron_explainer.experiments.boards.recording import (
    Recording,
    record,
    record_points,
    stream_points,
)
from neuron_explainer.experiments.boards.speech import spoken
from neuron_explainer.experiments.boards.training import load_run, read_log

USUAL_BOARDS, FEWEST_BOARDS = 150, 10


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows, as a page of an essay."""

    name: str
    """Of its files."""
    title: str
    text: str
    """What is claimed, how it was measured, in a paragraph."""
    number: str
    """What came out, in a sentence."""
    figure: Any
    """A matplotlib ``Figure``."""
    module: str
    """Where the function is that draws it."""

    def code(self, study: "Study") -> str:
        """Python that draws it again from the same study."""
        room = "neuron_explainer.experiments.boards"
        return (
            f"from {room} import {self.module}\nfrom {room}.study import Study\n\n"
            f'picture = {self.module}.{self.name}({study.call})\npicture.figure.savefig("{self.name}.png")'
        )


@dataclass(frozen=True, eq=False)
class Study:
    """The two models, and what was recorded of them."""

    model: BoardGPT
    lea: LEA
    dataset: BoardDataset
    """Of the factored transformer."""
    lea_dataset: BoardDataset
    sources: dict[str, str] = field(default_factory=dict)
    """Where each model came from, and what its folder says about its training."""
    call: str = "Study.of()"
    """Python that makes this study."""
    logs: dict[str, Path] = field(default_factory=dict)
    """The log of a model's training, where its run has one."""
    seed: int = 0
    boards: int = USUAL_BOARDS
    """Boards of each kind in a recording; all other counts are in proportion."""

    @classmethod
    def of(cls, *folders: str | Path, boards: int = USUAL_BOARDS) -> "Study":
        """A study of the models in up to two folders (of runs or models), else those of the package."""
        if boards < FEWEST_BOARDS:
            raise InputError(
                f"figures need at least {FEWEST_BOARDS} boards of each kind, found {boards}."
            )
        found = [(Path(folder), load_run(folder)) for folder in folders]
        gpt = [entry for entry in found if isinstance(entry[1].model, BoardGPT)]
        lea = [entry for entry in found if isinstance(entry[1].model, LEA)]
        if len(gpt) > 1 or len(lea) > 1:
            raise InputError("give at most one model of each architecture, gpt and lea.")
        chosen = {
            "gpt": gpt[0] if gpt else (shipped("gpt"), load_model(shipped("gpt"), "board_gpt")),
            "lea": lea[0] if lea else (shipped("lea"), load_model(shipped("lea"), "board_lea")),
        }
        sources: dict[str, str] = {}
        logs: dict[str, Path] = {}
        for name, (folder, stored) in chosen.items():
            own = stored.config.get("training", {})
            where = "the package's model" if folder == shipped(name) else folder.name
            done, pace = own.get("epochs_done", own.get("epochs", 0)), own.get("pace", 1)
            sources[name] = f"{where}, {done:g} epochs of {own.get('boards_per_epoch')} boards"
            if pace != 1:
                sources[name] += f", the curriculum at {pace:g} times its pace"
            for log in (folder / "log.jsonl", folder.parent / "log.jsonl"):
                if log.is_file():
                    logs.setdefault(name, log)
        given = [repr(str(folder)) for folder in folders]
        given += [f"boards={boards}"] if boards != USUAL_BOARDS else []
        model, other = chosen["gpt"][1], chosen["lea"][1]
        assert isinstance(model.model, BoardGPT)
        assert isinstance(other.model, LEA)
        return cls(
            *(model.model, other.model, model.dataset, other.dataset, sources),
            call=f"Study.of({', '.join(given)})",
            logs=logs,
            boards=boards,
        )

    def n(self, usual: int) -> int:
        """A count of boards or cells that is ``usual`` in a study of the usual number of boards."""
        return max(2, round(usual * self.boards / USUAL_BOARDS))

    @property
    def n_layers(self) -> int:
        """Blocks of the factored transformer."""
        return self.model.sizes.n_layers

    @functools.cached_property
    def recording(self) -> Recording:
        """Boards of all kinds, a quarter of their cells hidden, with every record point."""
        places = record_points(self.n_layers)
        return record(self.model, self.dataset, places, n=self.boards, seed=self.seed)

    @functools.cached_property
    def stream(self) -> Recording:
        """The same boards with every other cell of objects hidden, with the stream along depth."""
        places = stream_points(self.n_layers)
        return record(self.model, self.dataset, places, n=self.boards, mask=0.5, seed=self.seed)

    def lea_stream(self, mask: float) -> Recording:
        """Boards of all kinds with LEA's picture stream along depth, while it reads them masked."""
        places = stream_points(self.lea.sizes.n_layers)
        boards = self.lea_dataset
        return record(self.lea, boards, places, n=self.boards, mask=mask, seed=self.seed)

    @functools.cached_property
    def spoken(self) -> tuple[Boards, Ints]:
        """Single boards and LEA's sentences about them."""
        return spoken(self.lea, self.lea_dataset, self.n(2000), seed=self.seed)

    def log(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log of a model's training; empty if there is none."""
        path = self.logs.get(name)
        return [] if path is None else read_log(path)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure of its own and its axes, ``[rows, columns]``; sizes in inches."""
    figure = optional_module("matplotlib.figure", "figures").Figure(
        figsize=(width, height), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for each in axes.ravel():
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=7)
    return figure, axes


def label(axes: Any, x: str = "", y: str = "", title: str = "") -> None:
    """Axis labels and title in the sizes of these figures."""
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.set_title(title, fontsize=9)


def legend_above(axes: Any, columns: int) -> None:
    """A legend between the title and the axes, where it hides no line."""
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 0.98),
        ncol=columns,
        fontsize=7,
        frameon=False,
        columnspacing=1.2,
    )
    axes.set_title(axes.get_title(), fontsize=9, pad=18)


def short(place: Any) -> str:
    """A place in few letters: ``1/resid.torso.post_mlp`` is ``1 post_mlp``."""
    layer, _, path = str(place).rpartition("/")
    return f"{layer} {path.rpartition('.')[2]}".strip()
