"""The ``manifest.json`` that says what a folder of tokens or activations holds."""

from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError

MANIFEST_FILE = "manifest.json"


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """What it says; an error if it is of another kind of folder, or of a version not known here."""
    path = folder / MANIFEST_FILE
    manifest = files.read_json(path)
    if (manifest.get("kind"), manifest.get("format_version")) != (kind, version):
        raise CheckpointError(
            f"{path}: expected kind {kind!r} of format_version {version}, found "
            f"{manifest.get('kind')!r} of {manifest.get('format_version')!r}."
        )
    return manifest
