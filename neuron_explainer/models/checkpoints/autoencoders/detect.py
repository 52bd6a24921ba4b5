"""Which format a file or folder is of: told by its content, never by a name alone."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, SourceError
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Format,
    Source,
    file_kind,
    read_content,
)

_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".safetensors", ".pkl", ".pickle")


def open_source(path: str | Path, formats: Sequence[Format]) -> tuple[Source, Format]:
    """The source at a path or URL, and the one format that it is of."""
    if not _is_file(path):
        found = _of_remote_folder if files.is_remote(path) else _of_folder
        return Source(path), found(path, formats)
    local = files.fetch(path)
    kind = file_kind(local, path)
    source = Source(path, read_content(local, path, kind))
    assert source.content is not None
    for form in formats:
        if kind in form.holds and form.holds[kind](source.content):
            return source, form
    keys = ", ".join(sorted(map(str, source.content))[:10]) or "nothing"
    if kind == "safetensors":
        raise CheckpointError(
            f"{path}: the tensors alone ({keys}) do not say how they are applied; give the folder, "
            f"with its {' or '.join(_config_names(formats))}."
        )
    raise CheckpointError(
        f"{path}: not an autoencoder of a known format (found the keys: {keys}). {_layouts(formats)}"
    )


def _is_file(source: str | Path) -> bool:
    """Whether a source is a single file; a remote one cannot be looked at, so its ending tells."""
    if files.is_remote(source):
        return str(source).lower().endswith(_FILE_SUFFIXES)
    return Path(source).expanduser().is_file()


def _of_folder(source: str | Path, formats: Sequence[Format]) -> Format:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise SourceError(f"{source}: no such file or folder.")
    names = sorted(path.name for path in folder.iterdir())
    found: dict[str, str] = {}  # name of a format -> the file that tells it
    for name in _config_names(formats):
        if (folder / name).is_file():
            config = files.read_json(folder / name)
            found |= {form.name: name for form in formats if form.fits(name, config)}
    for name in names:
        marked = [form.name for form in formats if _is_marked(form, name)]
        if marked:
            found[next((form for form in marked if form in found), marked[0])] = name
    if len(found) > 1:
        marks = ", ".join(f"{name} ({mark})" for name, mark in found.items())
        raise CheckpointError(
            f"{source}: holds files of several formats: {marks}. Keep each autoencoder in a folder of "
            "its own."
        )
    if not found:
        listed = ", ".join(names[:10]) or "nothing"
        raise CheckpointError(
            f"{source}: of no known format (found: {listed}). {_layouts(formats)}"
        )
    return next(form for form in formats if form.name in found)


def _of_remote_folder(source: str | Path, formats: Sequence[Format]) -> Format:
    """A remote folder cannot be listed: the files that each format must have are asked for.

    What is in the cache needs no answer, so that a folder that was read once is read offline too.
    """
    unanswered: SourceError | None = None
    marks = [mark for form in formats for mark in form.marks if "*" not in mark]
    for name in dict.fromkeys([*_config_names(formats), *marks]):
        path = files.join(source, name)
        try:
            there = files.exists(path)
        except SourceError as error:
            unanswered = unanswered or error
            continue
        if not there:
            continue
        config = files.read_json(files.fetch(path)) if name in _config_names(formats) else {}
        for form in formats:
            if _is_marked(form, name) or form.fits(name, config):
                return form
    if unanswered is not None:
        raise unanswered
    raise CheckpointError(f"{source}: of no known format. {_layouts(formats)}")


def _config_names(formats: Sequence[Format]) -> list[str]:
    return list(dict.fromkeys(name for form in formats for name in form.configs))


def _is_marked(form: Format, name: str) -> bool:
    return any(fnmatchcase(name, mark) for mark in form.marks)


def _layouts(formats: Sequence[Format]) -> str:
    shown = [form for form in formats if form.layout]
    folders = [form.layout for form in shown if form.marks or form.configs]
    others = [form.layout for form in shown if not (form.marks or form.configs)]
    return f"Expected a folder with {'; '.join(folders)}; or {'; '.join(others)}."
