"""Files and folders that appear whole or not at all."""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.files._local import DISK_FULL, FORBIDDEN, disk_reason, make_folder

_SAVED_FOLDER_MARKS = ("config.json", "cfg.json")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file that becomes ``path``, on disk to the last byte, if the block ends well.

    If it does not, ``path`` is what it was. A symbolic link is written through; a process that is
    killed may leave a hidden ``.name.….tmp`` beside the target, which can be deleted.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise SourceError(f"{target} is a folder where a file is expected")
    make_folder(target.parent)
    temporary = _temporary_beside(target)
    try:
        with explain_refusal(target):
            # Not mkstemp: its 0600 would stay on the file. This takes the usual mode, or the old one.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            if target.exists():
                shutil.copymode(target, temporary)
            mode = temporary.stat().st_mode
            yield temporary
            os.chmod(
                temporary, mode
            )  # safetensors puts a file of its own there, for its owner alone
            _sync_file(temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, whole and on disk, if the block ends well.

    ``path`` must be absent or empty, unless ``overwrite``: then an existing folder is replaced as
    one whole (nothing of it remains), but only if it is a saved thing, that is, holds a
    ``config.json`` or ``cfg.json``: a mistyped path must not cost someone's home folder. On Linux
    the two folders change places in one step; elsewhere there is a moment, between two renames,
    when the old folder is only to be found under its ``.name.….tmp`` name.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(target, overwrite)
    make_folder(target.parent)
    temporary = _temporary_beside(target)
    try:
        with explain_refusal(target):
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary, temporary.stat().st_mode & 0o666)
            _check_replaceable(target, overwrite)  # again: the block may have taken hours
            _swap_in(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(target.parent)


def _temporary_beside(target: Path) -> Path:
    return target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.tmp"


@contextlib.contextmanager
def explain_refusal(target: Path) -> Iterator[None]:
    """A disk that is full or may not be written to is the user's to mend, and becomes a
    :class:`SourceError` that names ``target``; any other error says itself what it is."""
    try:
        yield
    except (
        Exception
    ) as error:  # safetensors' own, which is none of the system's, says the number in words
        words = re.search(r"\(os error (\d+)\)", str(error))
        known = OSError(int(words[1]), str(error)) if words else error
        if isinstance(known, OSError) and known.errno in DISK_FULL | FORBIDDEN:
            reason = disk_reason(known, target.parent)
            raise SourceError(f"cannot write {target}: {reason}") from error
        raise


def check_writable(path: str | Path) -> None:
    """An error, before hours of work, if ``path`` could not be written where it is to be."""
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    with explain_refusal(target), tempfile.TemporaryFile(dir=target.parent):
        pass


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SourceError(f"{target} is a file where a folder is expected")
    names = os.listdir(target)
    if not names:
        return
    if not overwrite:
        raise InputError(f"{target} exists and is not empty; pass overwrite=True to replace it")
    if not set(names) & set(_SAVED_FOLDER_MARKS):
        raise InputError(
            f"{target} is not replaced: it holds none of {', '.join(_SAVED_FOLDER_MARKS)}, so it "
            "is no saved model or autoencoder. Choose another path, or empty the folder yourself."
        )


def _swap_in(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    if _exchange(temporary, target):
        return  # the old folder is now the temporary one, and goes with it
    old = _temporary_beside(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename last. Windows cannot, and some network file systems will not."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path, mode: int) -> None:
    """Files get the usual mode: safetensors writes its own for their owner alone."""
    for root, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(root, name), mode)
            _sync_file(Path(root, name))
        sync_folder(Path(root))
