"""Stores of examples: what was collected about all units of a dictionary or location, on disk.

    store = ExampleStore.open("out/2.resid.torso.delta_mlp.store")
    store[1234]                      # a LatentRecord; print it, or let a notebook show it
    store.sort("density", limit=10)  # numbers of units
    store.search("royal titles")     # labels that hold these words

Neither a model nor torch is needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis.explaining.explanation import Explained
from neuron_explainer.analysis.label_search import CANDIDATES, find_labels
from neuron_explainer.analysis.latent_record import (
    DENSE,
    Example,
    LatentRecord,
    Partner,
    UnitFigures,
)
from neuron_explainer.analysis.records import (
    GROUPS,
    CoActivation,
    Collected,
    ExampleTable,
    Kind,
    Moments,
    UnitStatistics,
)
from neuron_explainer.analysis.store_file import StoreFile
from neuron_explainer.analysis.store_format import (
    MOMENTS,
    Label,
    UnitRow,
    all_from_active,
    hashed_keys,
    write_store,
)
from neuron_explainer.analysis.store_names import SUFFIX, file_name, find_stores
from neuron_explainer.analysis.token_store import TOKENS_FOLDER, TokenStore
from neuron_explainer.analysis.workspace import WORKSPACE_FILE, Workspace, workspace_path
from neuron_explainer.errors import (
    CheckpointError,
    InputError,
    SourceError,
    did_you_mean,
    optional_module,
    shown,
)

if TYPE_CHECKING:
    import pandas

    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext

Ints = npt.NDArray[np.int64]
COLUMNS = (
    *("count", "density", "max", "min", "mean", "variance", "skewness", "kurtosis"),
    *("mean_all", "variance_all", "skewness_all", "kurtosis_all", "last_active"),
)
"""The figures of units by which a store sorts and filters; those of
:class:`~neuron_explainer.analysis.latent_record.UnitFigures`."""
_PEAKS = 3  # examples by whose tokens units are found


class ExampleStore:
    """The store of one dictionary or location, opened for reading.

    Args:
        path: a file ``NAME.store``; the folder ``tokens/`` stands beside it.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = StoreFile(path)
        self.path = self._file.path
        self.meta = self._file.meta
        self.tokens = TokenStore.open(self.path.parent / TOKENS_FOLDER)
        if self.tokens.sha256 != self.meta["tokens"]["sha256"]:
            raise CheckpointError(
                f"{self.path} points into another text ({shown(self.meta['tokens']['source'])}) than that "
                f"of {self.tokens.folder} ({shown(self.tokens.corpus.name)}): their SHA-256 differ. A store "
                "and its tokens belong together."
            )

    @classmethod
    def open(cls, path: str | Path, name: str | None = None) -> "ExampleStore":
        """Open a store.

        Args:
            path: a file ``NAME.store``, the folder of one store or several, or the name of one that comes
                with the package, ``"tiny-tales/ae-resid-delta-mlp/2"``.
            name: which store of a folder; it is not needed if there is only one.
        """
        path = find_stores(path)
        if not path.is_dir():
            return cls(path)
        found = _stores_in(path)
        if name is None and len(found) == 1:
            return cls(next(iter(found.values())))
        if name not in found:
            what = f"no store {name!r}" if name is not None else f"{len(found)} stores"
            raise InputError(
                f"{path} has {what}; give one of these names: {', '.join(found)}."
                f"{did_you_mean(name or '', found)}"
            )
        return cls(found[name])

    @classmethod
    def from_arrays(
        cls,
        folder: str | Path,
        collected: Collected,
        documents: Sequence[Sequence[int] | npt.NDArray[Any]],
        vocabulary: Sequence[bytes | str],
        *,
        source: str = "documents",
        tokenizer: str = "none",
        labels: Iterable[Label] = (),
    ) -> "ExampleStore":
        """Write a store from data of any origin, and open it.

        Args:
            folder: the folder of the store; stores of the same text share one.
            collected: figures and examples, see :class:`~neuron_explainer.analysis.records.Collected`. The
                columns of :class:`~neuron_explainer.analysis.records.ExampleTable` point into the documents:
                position 0 is the first token of the first one.
            documents: token ids of each document.
            vocabulary: what each token writes, by id.
            source: the name of the text.
            tokenizer: the name of the tokenizer.
            labels: what units mean, where it is known.
        """
        folder = files.local_path(folder)
        pieces = [text.encode() if isinstance(text, str) else text for text in vocabulary]
        corpus = TokenCorpus.of(documents, source)
        tokens = TokenStore.write(folder / TOKENS_FOLDER, corpus, pieces, tokenizer)
        path = folder / file_name(collected.name)
        write_store(path, collected, tokens, labels)
        return cls(path)

    # --- what it is about ---

    @property
    def name(self) -> str:
        """The name of the dictionary or location."""
        return str(self.meta["name"])

    @property
    def kind(self) -> Kind:
        """What a unit is: a latent, neuron, channel or head."""
        kind: Kind = self.meta["unit"]
        return kind

    @property
    def location(self) -> str:
        """Where in the network, such as ``"2/mlp.post_act"``."""
        return str(self.meta["location"])

    @property
    def signed(self) -> bool:
        """Whether units are active at values below 0 too."""
        return bool(self.meta["signed"])

    @property
    def n_tokens(self) -> int:
        """Number of tokens that were looked at."""
        return int(self.meta["n_tokens"])

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decided the result of the collation."""
        return dict(self.meta["settings"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Names and hashes of model, dictionary and corpus, and versions."""
        return dict(self.meta["provenance"])

    @property
    def subject(self) -> str:
        """The hash of the dictionary; for units of the model, that of the model and the location."""
        found = self.provenance
        if found.get("autoencoder_sha256"):
            return str(found["autoencoder_sha256"])
        return f"{found.get('model_sha256', self.name)}/{self.location}/{self.kind}"

    def __len__(self) -> int:
        return int(self.meta["n_units"])

    # --- records ---

    def __getitem__(self, unit: int) -> LatentRecord:
        number = self._checked(unit)
        row = self._file.unit(number)
        return LatentRecord(
            name=self.name,
            kind=self.kind,
            location=self.location,
            unit=number,
            signed=self.signed,
            statistics=UnitFigures(
                self.n_tokens, **{name: self.column(name)[number].item() for name in COLUMNS}
            ),
            histogram=row.histogram,
            all_examples=self.examples_of(row.examples),
            partners=self._partners(number, row),
            labels=tuple(self.labels(number)),
            explanations=tuple(self.explanations(number)),
            provenance=self.provenance,
            intervals=int(dict(self.settings.get("config", {})).get("intervals", 0)),
        )

    def first_example(self, unit: int) -> Example | None:
        """The first example of a unit, which is quicker to have than its record; None if there is none."""
        table = self._file.unit(self._checked(unit)).examples
        return self.examples_of(table.rows(slice(0, 1)))[0] if len(table) else None

    def __iter__(self) -> Iterator[LatentRecord]:
        return (self[unit] for unit in range(len(self)))

    def _checked(self, unit: int) -> int:
        number = unit.__index__()
        if not 0 <= number < len(self):
            raise InputError(
                f"{self.name} has no {self.kind} {number}: there are 0 to {len(self) - 1}."
            )
        return number

    def examples_of(self, table: ExampleTable) -> tuple[Example, ...]:
        """The examples of a table with their tokens, which are those of this store's text."""
        length = table.length.astype(np.int64)
        tokens, documents = self.tokens.windows(table.start, length)
        position = table.start - self.tokens.corpus.starts[documents]
        pairs = self.kind == "head"
        size = length * (length + 1) // 2 if pairs else length
        activations = table.activations.astype(np.float32)
        activations[np.arange(len(table)), table.peak] = table.value  # not rounded
        return tuple(
            Example(
                GROUPS[group],
                interval,
                rank,
                value,
                peak,
                start,
                document,
                at,
                ids,
                values[:n],
                pairs,
                self.tokens.pieces,
            )
            for group, interval, rank, value, peak, start, document, at, n, ids, values in zip(
                *(column.tolist() for column in (table.group, table.interval, table.rank)),
                *(column.tolist() for column in (table.value, table.peak, table.start)),
                *(column.tolist() for column in (documents, position, size)),
                tokens,
                activations,
                strict=True,
            )
        )

    def _partners(self, unit: int, row: UnitRow) -> tuple[Partner, ...]:
        counts = self._file_column("coactivation.count")
        if counts is None or not len(row.partner):
            return ()
        # The table of this unit, as number 0, and its partners, whose own rows are empty.
        n = len(row.partner)
        partner, both = np.full((n + 1, n), -1, np.int32), np.zeros((n + 1, n), np.int64)
        partner[0], both[0] = np.arange(1, n + 1), row.both
        n_tokens = int(self.meta["coactivation_tokens"])
        one = CoActivation(n_tokens, counts[[unit, *row.partner]], partner, both)
        scores = zip(row.partner, row.both, one.jaccard[0], one.pmi[0], one.phi[0], strict=True)
        return tuple(
            Partner(int(u), int(b), float(j), float(p), float(f)) for u, b, j, p, f in scores
        )

    def collected(self) -> Collected:
        """Everything in the store but labels, in memory: what :func:`write_store` took."""
        rows = list(self._file.all_units())
        tables = [row.examples for row in rows]
        examples = ExampleTable(
            **{
                field.name: np.concatenate([getattr(table, field.name) for table in tables])
                for field in fields(ExampleTable)
            }
        )
        if self.meta["hashed_keys"]:
            seed = int(self.settings["key_seed"])
            examples = hashed_keys(examples, seed, len(self), self.kind == "head")
        histogram = np.stack([row.histogram for row in rows])
        statistics = UnitStatistics(
            self.n_tokens,
            *self._moments,
            self._figure("max"),
            self._figure("min"),
            self._figure("last_active"),
            histogram,
        )
        return Collected(
            self.kind,
            self.location,
            self.name,
            self.signed,
            statistics,
            examples,
            self._coactivation(rows),
            self.settings,
            self.provenance,
            self._file_column("stratum_limits"),
        )

    def _coactivation(self, rows: Sequence[UnitRow]) -> CoActivation | None:
        count = self._file_column("coactivation.count")
        if count is None:
            return None
        shape = len(self), int(self.meta["partners"])
        partner, both = np.full(shape, -1, np.int32), np.zeros(shape, np.int64)
        for unit, row in enumerate(rows):
            partner[unit, : len(row.partner)] = row.partner
            both[unit, : len(row.both)] = row.both
        return CoActivation(int(self.meta["coactivation_tokens"]), count, partner, both)

    # --- figures of all units ---

    def column(self, name: str) -> npt.NDArray[Any]:
        """A figure of all units, ``[u]``; the names are :data:`COLUMNS`."""
        if name not in COLUMNS:
            raise InputError(
                f"unknown figure {shown(name)}.{did_you_mean(name, COLUMNS)} Known: "
                f"{', '.join(COLUMNS)}."
            )
        if name not in self._columns:
            active, over_all = self._moments
            if name in ("max", "min", "last_active"):
                found = self._figure(name)
            elif name == "density":
                found = active.count / max(self.n_tokens, 1)
            else:
                found = getattr(
                    over_all if name.endswith("_all") else active, name.removesuffix("_all")
                )
            self._columns[name] = found
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    @cached_property
    def _stored(self) -> dict[str, npt.NDArray[Any] | None]:
        return {}

    def _file_column(self, name: str) -> npt.NDArray[Any] | None:
        if name not in self._stored:
            self._stored[name] = self._file.column(name)
        return self._stored[name]

    def _figure(self, name: str) -> npt.NDArray[Any]:
        found = self._file_column(name)
        if found is None:
            raise CheckpointError(f"{self.path}: damaged: there is no column {name}.")
        return found

    @cached_property
    def _moments(self) -> tuple[Moments, Moments]:
        """Of the active tokens, and of all."""
        active = Moments(*(self._figure(f"active.{part}") for part in MOMENTS))
        if self.meta["all_from_active"]:
            return active, all_from_active(active, self.n_tokens)
        return active, Moments(*(self._figure(f"all.{part}") for part in MOMENTS))

    @property
    def alive(self) -> Ints:
        """The units that were active on some token."""
        return np.flatnonzero(self.column("count") > 0)

    @property
    def dead(self) -> Ints:
        """The units that were never active."""
        return np.flatnonzero(self.column("count") == 0)

    def dense(self, density: float = DENSE) -> Ints:
        """The units that are active on at least this share of the tokens."""
        return np.flatnonzero(self.column("density") >= density)

    def sort(
        self,
        by: str = "density",
        *,
        descending: bool = True,
        limit: int | None = None,
        among: npt.ArrayLike | None = None,
    ) -> Ints:
        """Units in the order of a figure; of equals, the lowest number comes first.

        Args:
            by: one of :data:`COLUMNS`.
            descending: the largest first.
            limit: how many.
            among: these units only, such as ``store.alive``.
        """
        order = self._order(by, descending)
        if among is not None:
            units = np.asarray(among, np.int64).reshape(-1)
            for unit in (units.min(), units.max()) if len(units) else ():
                self._checked(int(unit))
            chosen = np.zeros(len(self), dtype=bool)
            chosen[units] = True
            order = order[chosen[order]]
        return order[:limit]

    def _order(self, by: str, descending: bool) -> Ints:
        """All units in the order of a figure, which is made once."""
        key = by, descending
        if key not in self._orders:
            values = self.column(by)
            self._orders[key] = np.argsort(-values if descending else values, kind="stable")
        return self._orders[key]

    @cached_property
    def _orders(self) -> dict[tuple[str, bool], Ints]:
        return {}

    def filter(self, **limits: tuple[float | None, float | None]) -> Ints:
        """The units whose figures lie within limits: ``store.filter(density=(1e-4, 0.01), max=(5, None))``.

        Args:
            limits: the lowest and the highest value, both included, by the name of a figure.
        """
        chosen = np.ones(len(self), dtype=bool)
        for name, (low, high) in limits.items():
            values = self.column(name)
            chosen &= (low is None or values >= low) & (high is None or values <= high)
        return np.flatnonzero(chosen)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for each unit: its figures and its label; it needs pandas (the extra ``pandas``)."""
        pandas = optional_module("pandas", "a data frame")
        label = [""] * len(self)
        for found in reversed([*self._user_labels(), *self._stored_labels()]):
            label[found.unit] = found.text
        columns = {name: self.column(name) for name in COLUMNS} | {"label": label}
        return pandas.DataFrame(columns, index=pandas.RangeIndex(len(self), name="unit"))

    @cached_property
    def peak_tokens(self) -> Ints:
        """``[u, 3]``: the tokens at the peaks of each unit's first examples; -1 where there are fewer.

        The first use reads the row of every unit, which takes a second for 20,000 units or so.
        """
        found = np.full((len(self), _PEAKS), -1, np.int64)
        for unit, positions in enumerate(self._file.all_peaks(_PEAKS)):
            found[unit, : len(positions)] = positions
        there = found >= 0
        self.tokens.check_unchanged()
        found[there] = self.tokens.corpus.tokens[found[there]]
        return found

    def peaks_at_token(self, text: str) -> Ints:
        """``[u]``: how many of each unit's first three examples have their peak at a token.

        The token is the one that writes this text, or this word with other spaces and capitals.
        """
        counts: Ints = np.isin(self.peak_tokens, self.tokens.tokens_like(text)).sum(1)
        return counts

    def units_at_token(self, text: str) -> Ints:
        """The units with such peaks, those with the most first; see :meth:`peaks_at_token`."""
        counts = self.peaks_at_token(text)
        units = np.flatnonzero(counts)
        return units[np.argsort(-counts[units], kind="stable")]

    # --- labels ---

    def labels(self, unit: int) -> list[Label]:
        """What is said about a unit: by the user, then by what came with the store."""
        number = self._checked(unit)
        return [*self._user_labels(number), *self._stored_labels(number)]

    def all_labels(self, *, stored: bool = True) -> list[Label]:
        """The labels of all units: by the user, then, with ``stored``, those that came with the store."""
        return [*self._user_labels(), *(self._stored_labels() if stored else ())]

    def first_labels(self, units: Sequence[int]) -> dict[int, Label]:
        """The first label of each of these units that has one."""
        found: dict[int, Label] = {}
        for place in self.workspaces:
            for label in place.labels_of(units):
                found.setdefault(label.unit, label)
        if self._file.has_labels:
            for unit in units:
                if unit not in found and (stored := self._stored_labels(unit)):
                    found[unit] = stored[0]
        return found

    def label_scores(self) -> npt.NDArray[np.float64]:
        """``[u]``: the best score of any label of each unit; NaN where there is none."""
        found = np.full(len(self), np.nan)
        for label in [*self._user_labels(), *self._stored_labels()]:
            if label.score is not None:
                found[label.unit] = np.fmax(found[label.unit], label.score)
        return found

    def search(self, text: str, limit: int = 50) -> list[Label]:
        """Labels that hold all these words, the last one perhaps as the beginning of a word.

        Labels of the user come before those that came with the store, and short ones before long ones.
        """
        found = [label for place in self.workspaces for label in place.search(text, limit)]
        stored = self.search_stored(text, limit)
        if len(stored) < limit:
            stored += self.search_stored(text, limit, prefix=True)
        return list(dict.fromkeys([*found, *stored]))[:limit]

    def units_with_label(self, text: str) -> Ints:
        """The units that have a label with these words, in order."""
        most = 1 << 20
        found = [label for place in self.workspaces for label in place.search(text, most, most)]
        found += self.search_stored(text, most, candidates=most)
        found += self.search_stored(text, most, candidates=most, prefix=True)
        return np.unique(np.array([label.unit for label in found], np.int64))

    def search_stored(
        self, text: str, limit: int, *, prefix: bool = False, candidates: int = CANDIDATES
    ) -> list[Label]:
        """:meth:`search` among the labels that came with the store.

        Args:
            text: what somebody typed.
            limit: how many.
            prefix: the last word may be the beginning of a word, in place of a whole one.
            candidates: how many labels are looked at.
        """
        if not self._file.has_labels:
            return []
        return [
            Label(*row)
            for row in find_labels(
                self._file.query, text, limit, prefix=prefix, candidates=candidates
            )
        ]

    def explanations(self, unit: int, method: str | None = None) -> list[Explained]:
        """The explanations of a unit with their scores, latest first; of one method, or all."""
        number = self._checked(unit)
        return [each for place in self.workspaces for each in place.explained(number, method)]

    def _user_labels(self, unit: int | None = None) -> list[Label]:
        return [label for place in self.workspaces for label in place.labels(unit)]

    def _stored_labels(self, unit: int | None = None) -> list[Label]:
        if not self._file.has_labels:
            return []
        one, values = ("", ()) if unit is None else ("WHERE unit = ? ", (unit,))
        sql = f"SELECT unit, text, source, score FROM labels {one}ORDER BY unit, id"
        return [Label(*row) for row in self._file.query(sql, values)]

    @cached_property
    def workspace(self) -> Workspace:
        """Where the user's labels, bookmarks and scores of these units are."""
        return Workspace(workspace_path(self.path.parent), self.subject, len(self))

    @cached_property
    def workspaces(self) -> list[Workspace]:
        """The user's, and the one beside the store if that cannot be written."""
        beside = self.path.parent / WORKSPACE_FILE
        if self.workspace.path == beside or not beside.exists():
            return [self.workspace]
        return [self.workspace, Workspace(beside, self.subject, len(self))]

    # --- checks ---

    def check_model(self, context: "ModelContext") -> None:
        """An error unless the examples were collected from this model's weights."""
        from torch import nn  # brings torch

        model: Any = context.get_or_create_model()
        self._check_weights("model", model if isinstance(model, nn.Module) else model.model)

    def check_autoencoder(self, autoencoder: "Autoencoder") -> None:
        """An error unless the units are those of this autoencoder."""
        self._check_weights("autoencoder", autoencoder)

    def _check_weights(self, what: str, module: Any) -> None:
        from neuron_explainer.analysis.collation.units import weights_sha256  # brings torch

        expected, found = self.provenance.get(f"{what}_sha256"), weights_sha256(module)
        if expected != found:
            name = f" {shown(self.provenance[what])}" if what in self.provenance else ""
            raise InputError(
                f"{self.path} was collected with another {what}{name}: its weights have SHA-256 "
                f"{expected or 'that is not known'}, those given {found}. Another dtype counts as another."
            )

    def verify(self) -> None:
        """Read all of the store and its text, and compare them with the hashes that were written."""
        self._file.verify()
        self.tokens.verify()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        known = vars(self)  # what was never asked for is not looked up now
        for place in (known.get("workspace"), *known.get("workspaces", ())):
            if place is not None:
                place.close()

    def __enter__(self) -> "ExampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"ExampleStore({str(self.path)!r}, {len(self)} {self.kind}s of {self.location}, "
            f"{self.n_tokens:,} tokens of {self.tokens.corpus.name})"
        )


def open_stores(folder: str | Path) -> dict[str, ExampleStore]:
    """All stores of a folder, by name; ``"tiny-tales"`` is the folder of those of the embedded model."""
    return {name: ExampleStore(path) for name, path in _stores_in(find_stores(folder)).items()}


def _stores_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}")
    found = {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if not found:
        raise SourceError(f"{folder} holds no store of examples (NAME{SUFFIX}); collate makes one.")
    return found
