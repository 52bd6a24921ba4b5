"""The folders of transformer factors' examples that a server shows.

Reading them needs torch, which the pages of stores do without: it is imported when somebody asks for them.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neuron_explainer import files
from neuron_explainer.server.problems import Problem

if TYPE_CHECKING:
    from neuron_explainer.analysis.factors import FactorExamples, Importance
    from neuron_explainer.models.model_context import ModelContext


@dataclass
class Run:
    """One folder of examples, opened."""

    id: str
    folder: Path
    examples: "FactorExamples"
    importance: "Importance"
    context: "ModelContext"

    def vocabulary(self, ids: Iterable[int]) -> dict[str, dict[str, str]]:
        """``vocab`` and, of tokens that are not whole UTF-8, ``vocab_bytes``."""
        encoding, text, raw = self.context.get_encoding(), {}, {}
        for token in sorted(set(ids)):
            piece = encoding.decode_single_token_bytes(token)
            text[str(token)] = piece.decode(errors="replace")
            if text[str(token)].encode() != piece:
                raw[str(token)] = piece.hex()
        return {"vocab": text, "vocab_bytes": raw}

    def python(self, result: str) -> str:
        """Python that gives the same numbers."""
        return (
            "from neuron_explainer.analysis.factors import FactorExamples, importance\n\n"
            f"examples = FactorExamples.load({str(self.folder)!r})\nfound = importance(examples)\n"
            f"result = {result}\n"
        )


class FactorRuns:
    """The folders of a server, by id. Each is opened when it is first asked for, and kept."""

    def __init__(self, folders: Sequence[str | Path] = ()) -> None:
        self._folders: dict[str, Path] = {}
        for folder in map(files.local_path, folders):
            name = re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name)[:100] or "factors"
            number = 2
            while name in self._folders:
                name, number = f"{name.rsplit('~')[0]}.{number}", number + 1
            self._folders[name] = folder
        self._open: dict[str, Run] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __getitem__(self, id: str) -> Run:
        if id not in self._folders:
            raise Problem(
                404,
                "unknown_factors",
                f"There are no factors called {id!r} here.",
                loc=("path", "run"),
                allowed=list(self._folders),
            )
        with self._lock:
            if id not in self._open:
                self._open[id] = _open(id, self._folders[id])
            return self._open[id]


def _open(id: str, folder: Path) -> Run:
    from neuron_explainer.analysis.factors import FactorExamples, importance
    from neuron_explainer.models.model_context import ModelContext

    examples = FactorExamples.load(folder)
    context = ModelContext.from_model_type(str(examples.settings["model"]))
    return Run(id, folder, examples, importance(examples), context)
