"""Sentences as vectors: the mean activation of each at a location and its latents, in a few numbers.

A sentence's activation is the mean over its tokens, without pads and without a start token before it.
Its latents can be two different things, and both are given: the mean of its tokens' codes, which says
what the autoencoder saw, or the code of its mean activation.

A sentence longer than the model's context is cut into windows, and all of them count.

Shape legend: ``s`` sequence, ``n`` width at the location, ``l`` latents, ``t`` tokens.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.evaluation.pieces import coded_pieces
from neuron_explainer.evaluation.placed import Placed, placed
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.sampling import prep_input_and_pad
from neuron_explainer.models.weight_names import Dimension
from neuron_explainer.tables import text_table

Code = Literal["mean_of_codes", "code_of_mean"]

COLUMNS = (
    "Sentence",
    *("Orig Mean", "Orig Var", "Orig Max Weight", "Orig Max Pos"),
    *("Sparse Mean", "Sparse Var", "Sparse Max Weight", "Sparse Max Pos"),
)
"""Columns of the table. If there are several locations, the column ``Location`` comes before them."""


@dataclass(frozen=True)
class VectorSummary:
    """A vector in four numbers."""

    mean: float
    """The mean of the entries."""
    variance: float
    """The mean squared distance of the entries from their mean (of a population, not of a sample)."""
    max: float
    """The largest entry."""
    position: int
    """The index of the largest entry; the first one if there are several."""

    @classmethod
    def of(cls, vector: Tensor) -> "VectorSummary":
        """Summarise ``[w]``."""
        vector = vector.double()
        position = int((vector == vector.max()).nonzero()[0])
        return cls(
            float(vector.mean()),
            float(vector.var(correction=0)),
            float(vector[position]),
            position,
        )


@dataclass(frozen=True)
class SentenceSummary:
    """A sentence at one location."""

    sentence: str
    location: str
    """Such as ``3/resid.torso.delta_mlp``: where the autoencoder's inputs come from."""
    n_tokens: int
    activation: VectorSummary
    """Summary of the mean activation over its tokens, ``[n]``."""
    mean_of_codes: VectorSummary
    """Summary of the mean of its tokens' latents, ``[l]``."""
    code_of_mean: VectorSummary
    """Summary of the latents of the mean activation, ``[l]``."""

    def row(self, code: Code = "mean_of_codes") -> dict[str, Any]:
        """The row of the table, by :data:`COLUMNS`."""
        latents = self.mean_of_codes if code == "mean_of_codes" else self.code_of_mean
        numbers = [v for part in (self.activation, latents) for v in vars(part).values()]
        return dict(zip(COLUMNS, [self.sentence, *numbers], strict=True))


@torch.no_grad()
def summarize_sentences(
    context: ModelContext,
    sentences: Sequence[str],
    autoencoders: Mapping[str, Autoencoder] | AutoencoderContext,
    *,
    bos: bool = False,
    batch_size: int = 32,
) -> list[SentenceSummary]:
    """Summarise each sentence at the location of each autoencoder.

    Args:
        context: the model.
        sentences: texts, none of them empty.
        autoencoders: by name, as for :func:`~neuron_explainer.evaluation.evaluate.evaluate_all`; or
            a context, for all of its layers.
        bos: put the start token before each, for autoencoders that were trained so. It does not count.
        batch_size: how many sentences go through the model at once; numbers do not depend on it.

    Returns:
        All sentences at the first location, then all at the next.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}.")
    ids = [context.encode(sentence) for sentence in sentences]
    empty = [number for number, found in enumerate(ids, 1) if not found]
    if empty or not ids:
        what = f"sentence {empty[0]} is empty" if empty else "there are no sentences"
        raise InputError(f"{what}: a mean needs at least one token.")
    subjects = placed(autoencoders, context.get_dim_size(Dimension.LAYERS))
    found: dict[str, list[SentenceSummary]] = {name: [] for name in subjects}
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        for name, means in _means(context, ids[part], subjects, bos).items():
            for sentence, tokens, x, codes in zip(sentences[part], ids[part], *means, strict=True):
                found[name].append(_summary(sentence, len(tokens), subjects[name], x, codes))
    return [summary for summaries in found.values() for summary in summaries]


def _summary(
    sentence: str, n_tokens: int, subject: Placed, x: Tensor, codes: Tensor
) -> SentenceSummary:
    autoencoder = subject.autoencoder
    code = autoencoder.encode(x.to(autoencoder.device, autoencoder.dtype)[None])[0]
    return SentenceSummary(
        sentence,
        str(subject.source),
        n_tokens,
        VectorSummary.of(x),
        VectorSummary.of(codes),
        VectorSummary.of(code),
    )


def _means(
    context: ModelContext, ids: list[list[int]], subjects: Mapping[str, Placed], bos: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean activation ``[sentences, n]`` and mean code ``[sentences, l]`` by name, in float64."""
    model = context.get_or_create_model()
    size = context.get_dim_size(Dimension.MAX_CONTEXT_LENGTH) - int(bos)
    windows = [
        (sentence, tokens[start : start + size])
        for sentence, tokens in enumerate(ids)
        for start in range(0, len(tokens), size)
    ]
    tokens, pad = prep_input_and_pad([window for _, window in windows], "right", model.device)
    places = [subject.source for subject in subjects.values()]
    captured = model.capture(tokens, list(dict.fromkeys(places)), pad, bos=bos)
    owner = torch.tensor([sentence for sentence, _ in windows], device=pad.device)
    owner = owner[:, None].expand_as(pad)[~pad]
    found = {}
    for name, subject in subjects.items():
        rows = captured[subject.source].flatten(2)[:, int(bos) :][~pad]
        codes = rows.new_zeros(len(ids), subject.autoencoder.n_latents, dtype=torch.float64)
        for piece, coded in coded_pieces(subject.autoencoder, rows):
            codes.index_add_(0, owner[piece], coded.latents.dense().to(codes))
        sums = rows.new_zeros(len(ids), rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, owner, rows.double())
        counts = owner.bincount(minlength=len(ids))[:, None]
        found[name] = (sums / counts, codes / counts)
    return found


# ---- files ---------------------------------------------------------------------------------------


def read_sentences(path: str | Path, column: str = "sentence") -> list[str]:
    """The sentences of a CSV file with a header, in UTF-8.

    Args:
        path: the file.
        column: the header of the column with the sentences.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8, but byte {error.start} is not part of it; save the file as UTF-8."
        ) from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if column not in (reader.fieldnames or []):
        raise InputError(
            f"{path}: expected a header with the column {column!r}, found "
            f"{', '.join(map(repr, reader.fieldnames or [])) or 'nothing'}."
        )
    sentences = []
    for row in reader:
        if not (row[column] or "").strip():
            raise InputError(
                f"{path}, line {reader.line_num}: the sentence is empty; fill it in or remove the line."
            )
        if None in row:
            raise InputError(
                f"{path}, line {reader.line_num}: the row has more fields than the header; a sentence with "
                "a comma must stand in quotes."
            )
        sentences.append(row[column])
    return sentences


def rows_of(
    summaries: Iterable[SentenceSummary], code: Code = "mean_of_codes"
) -> list[dict[str, Any]]:
    """The table's rows by column, with ``Location`` first if there are several locations."""
    summaries = list(summaries)
    several = len({summary.location for summary in summaries}) > 1
    return [
        ({"Location": summary.location} if several else {}) | summary.row(code)
        for summary in summaries
    ]


def to_csv(summaries: Iterable[SentenceSummary], code: Code = "mean_of_codes") -> str:
    """The table as CSV, with all digits."""
    rows = rows_of(summaries, code)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0] if rows else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def is_table_of(path: str | Path, texts: Sequence[str]) -> bool:
    """Whether a file looks like a CSV table of these sentences; numbers are not compared."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            found = {row.get(COLUMNS[0]) for row in csv.DictReader(file, strict=True)}
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return found == set(texts)


def to_json(summaries: Iterable[SentenceSummary], code: Code = "mean_of_codes") -> str:
    """The table's rows as a list of objects."""
    return json.dumps(rows_of(summaries, code), indent=1, ensure_ascii=False) + "\n"


def to_table(
    summaries: Iterable[SentenceSummary], code: Code = "mean_of_codes", width: int = 40
) -> str:
    """The table as text; long sentences are cut to ``width`` characters."""
    rows = rows_of(summaries, code)
    head = list(rows[0] if rows else COLUMNS)
    cells = [[_cell(value, width) for value in row.values()] for row in rows]
    return text_table(head, cells, n_left=len(head) - len(COLUMNS) + 1, rule=True)


def _cell(value: Any, width: int) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(str(value).split())
    return text if len(text) <= width else text[: width - 1] + "…"
