"""Parquet: the figures and the examples of a store as two tables. It needs pyarrow (the extra ``data``)."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.analysis.latent_record import LatentRecord
from neuron_explainer.errors import InputError, MissingExtraError

ROWS = 4096
"""Examples that are held in memory at a time."""


def write_parquet(records: Iterable[LatentRecord], folder: str | Path) -> tuple[Path, Path]:
    """Write ``units.parquet`` and ``examples.parquet``, and return their paths.

    ``units`` has a row for each unit: its figures
    (:class:`~neuron_explainer.analysis.latent_record.UnitFigures`), label and histogram.
    ``examples`` has a row for each example: ``unit``, ``group``, ``interval``, ``rank``,
    ``value``, ``peak``, ``document``, ``position``, ``tokens`` (ids), ``pieces`` (the bytes of each
    token) and ``activations`` (float32; of heads, the lower triangle of pairs).

    Args:
        records: a store, or some of its records.
        folder: where the two files go.
    """
    pyarrow, parquet = _libraries()
    place = files.local_path(folder)
    units: list[dict[str, Any]] = []
    with files.atomic_write(place / "examples.parquet") as temporary:
        schema = _schema(pyarrow)
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            rows: list[dict[str, Any]] = []
            for record in records:
                units.append(_unit_row(record))
                rows += _example_rows(record)
                if len(rows) >= ROWS:
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                    rows = []
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        if not units:
            raise InputError("expected units, found none.")
    with files.atomic_write(place / "units.parquet") as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(units), temporary, compression="zstd")
    return place / "units.parquet", place / "examples.parquet"


def table_bytes(columns: Mapping[str, Any]) -> bytes:
    """A Parquet file of columns of the same length: arrays, or lists of plain values or None."""
    pyarrow, parquet = _libraries()
    out = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(dict(columns)), out, compression="zstd")
    return bytes(out.getvalue())


def _libraries() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            "Parquet needs pyarrow, which is not installed: pip install 'neuron_explainer[data]'"
        ) from error
    return pyarrow, parquet


def _schema(pyarrow: Any) -> Any:
    whole, number = pyarrow.int64(), pyarrow.float32()
    return pyarrow.schema(
        {
            **dict.fromkeys(("unit", "interval", "rank", "peak", "document", "position"), whole),
            "group": pyarrow.string(),
            "value": number,
            "tokens": pyarrow.list_(whole),
            "pieces": pyarrow.list_(pyarrow.binary()),
            "activations": pyarrow.list_(number),
        }
    )


def _unit_row(record: LatentRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "kind": record.kind,
        "location": record.location,
        "unit": record.unit,
        **asdict(record.statistics),
        "label": record.label,
        "histogram": record.histogram.tolist(),
    }


def _example_rows(record: LatentRecord) -> list[dict[str, Any]]:
    plain = ("group", "interval", "rank", "value", "peak", "document", "position", "pieces")
    return [
        {
            "unit": record.unit,
            **{name: getattr(each, name) for name in plain},
            "tokens": each.tokens.tolist(),
            "activations": each.activations.tolist(),
        }
        for each in record.all_examples
    ]
