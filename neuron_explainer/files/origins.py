"""The record of where activations came from, as files hold it: no path in it tells of a user's folders.

A record names the model and the text (``model``, ``source``), which may be paths. In memory they are
absolute. A file holds them relative to its own folder, beginning with ``.``, so that folders that lie side by
side can be moved together. What was trained on a store has the store's own record within its own
(``harvest``).
"""

import os
import posixpath
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from neuron_explainer.files.names import is_remote

_PATHS = ("model", "source")
_HUB = "hf:"  # may stand before the path of a model's folder


def full_path(reference: str) -> str:
    """The name of a model or text; of a local file or folder its absolute path."""
    prefix, path = _split(reference)
    here = os.path.exists(path) and not (prefix == "" and is_remote(path))
    return prefix + os.path.realpath(path) if here else reference


def for_folder(record: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """A record as a file in ``folder`` holds it."""
    return _mapped(record, partial(_relative, os.path.realpath(folder)))


def from_folder(record: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The record that a file in ``folder`` (a path or a URL) holds, with absolute paths or URLs."""
    if is_remote(folder):
        return _mapped(record, partial(_remote, str(folder)))
    return _mapped(record, partial(_absolute, os.path.realpath(folder)))


def metadata_for_folder(metadata: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The metadata of an autoencoder, with its ``record`` if any, as a file in ``folder`` holds it."""
    return _with_record(metadata, for_folder, folder)


def metadata_from_folder(metadata: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The metadata that a file in ``folder`` holds, with absolute paths in its record."""
    return _with_record(metadata, from_folder, folder)


def _with_record(
    metadata: Mapping[str, Any],
    change: Callable[[Mapping[str, Any], str | Path], dict[str, Any]],
    folder: str | Path,
) -> dict[str, Any]:
    record = metadata.get("record")
    changed = {"record": change(record, folder)} if isinstance(record, Mapping) else {}
    return {**metadata, **changed}


def _mapped(record: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    found = dict(record)
    for key in _PATHS:
        if isinstance(found.get(key), str):
            found[key] = change(found[key])
    if isinstance(found.get("harvest"), Mapping):
        found["harvest"] = _mapped(found["harvest"], change)
    return found


def _split(reference: str) -> tuple[str, str]:
    prefix = _HUB if reference.startswith(_HUB) else ""
    return prefix, reference.removeprefix(prefix)


def _relative(folder: str, reference: str) -> str:
    prefix, path = _split(reference)
    if not os.path.isabs(path):
        return reference
    try:
        found = os.path.relpath(os.path.realpath(path), folder)
    except ValueError:  # on another drive of Windows: there is no such path
        return prefix + Path(path).name
    return prefix + (found if found.startswith("..") else os.path.join(".", found))


def _absolute(folder: str, reference: str) -> str:
    prefix, path = _split(reference)
    is_path = path.startswith(".")
    return prefix + os.path.realpath(os.path.join(folder, path)) if is_path else reference


def _remote(folder: str, reference: str) -> str:
    """The URL of what lies beside a remote folder: a relative path would mean a local file here."""
    _, path = _split(reference)
    if not path.startswith("."):
        return reference
    mark = "://" if "://" in folder else ":"
    scheme, _, rest = folder.partition(mark)
    host, _, place = rest.partition("/")
    found = posixpath.normpath(posixpath.join(place, path))
    return posixpath.basename(found) if found.startswith("..") else f"{scheme}{mark}{host}/{found}"
