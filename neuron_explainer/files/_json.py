"""JSON objects in files: written strictly, read with errors that name the place."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from neuron_explainer.errors import CheckpointError, shown
from neuron_explainer.files._local import local_file
from neuron_explainer.files._writing import atomic_write


def write_json(path: str | Path, obj: object) -> None:
    """Write ``obj`` as JSON that every reader accepts: UTF-8, no NaN, whole or not at all."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: this cannot be written as JSON: {error}") from error
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. A key that stands twice is refused: which one was meant?

    ``NaN`` and ``Infinity`` are read, though they are not JSON, because others write them.
    """
    file = local_file(path, None, None)
    try:
        found = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}, byte {error.start}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # a key twice, or nested too deep
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        more = ", …" if len(twice) > 3 else ""
        raise ValueError(
            f"the key {', '.join(map(shown, twice[:3]))}{more} stands twice in one object"
        )
    return found
