"""Local files: clear errors, and writes of files and folders that appear whole or not at all."""

import contextlib
import ctypes
import errno
import filecmp
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from neuron_explainer.errors import (
    CheckpointError,
    InputError,
    SourceError,
    did_you_mean,
    in_way,
    shown,
)
from neuron_explainer.files.steps import Kind, plain_write, step, watch_steps

if sys.platform != "win32":
    import fcntl  # no locks there, and so nothing is cleared away

DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})

_NO_PLACE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def local_path(source: str | Path) -> Path:
    """The path ``source``, with a leading ``~`` expanded; SourceError if no file can have this name."""
    if not isinstance(source, str | os.PathLike):
        raise SourceError(f"expected a path or URL, found {type(source).__name__}.")
    try:
        path = Path(source).expanduser() if str(source).startswith("~") else Path(source)
        possible = b"\0" not in os.fsencode(path)
    except RuntimeError as error:
        raise SourceError(f"{shown(str(source))}: {error}") from None
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise SourceError(f"{shown(str(source))} cannot be the name of a file")
    return path


def local_file(source: str | Path, size: int | None, sha256: str | None) -> Path:
    """The path of an existing file; SourceError if its size or SHA-256 are not those given."""
    path = local_path(source)
    try:
        if path.is_dir():
            raise SourceError(f"{path} is a folder where a file is expected")
        if not path.exists():
            raise SourceError(f"there is no file {source}{_nearby(path)}")
        check_regular(path)
        check_expected(path, str(source), size, sha256 and sha256.lower())
    except OSError as error:  # no permission, a name too long
        raise SourceError(f"cannot read {source}: {error.strerror}") from error
    return path


def check_regular(path: Path) -> None:
    """Refuse a pipe, socket or device: reading one may never end."""
    if path.exists() and not path.is_file():
        raise SourceError(f"{path} is a pipe, socket or device where a file is expected")


def _nearby(path: Path) -> str:
    for parent in path.parents:
        if parent.is_file():
            return f": {parent} is a file where a folder is expected"
    if not path.parent.is_dir():
        return f": there is no folder {path.parent} either"
    # A folder may hold a file for each of 100,000 latents; comparing with some is enough.
    return did_you_mean(path.name, (p.name for p in islice(path.parent.iterdir(), 1000)))


def check_expected(path: Path, source: str, size: int | None, sha256: str | None) -> None:
    """Refuse a file that differs in size or SHA-256 from what the caller expects."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise SourceError(f"{source}: expected {size} bytes, found {found} in {path}")
    if sha256 is not None and (digest := sha256_of(path)) != sha256:
        raise SourceError(f"{source}: expected SHA-256 {sha256}, found {digest} in {path}")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, if they do not exist."""
    local_path(folder)
    try:
        if not folder.is_dir():
            step("make", folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"cannot make the folder {folder}: {in_way(error, folder)}") from error


def disk_reason(error: OSError, folder: Path) -> str:
    """Why writing in ``folder`` failed."""
    if error.errno not in DISK_FULL:
        return in_way(error, Path(error.filename or folder))
    free = shutil.disk_usage(folder).free
    return f"no room ({error.strerror}; {free} bytes are free in {folder})"


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    check_regular(Path(path))  # reading a pipe would wait, and a device might never end
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5_of(path: Path) -> str:
    """The MD5 of a file in base64, as servers state it; it guards against accidents only."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return b64encode(digest.digest()).decode()


# --- whole or not at all ---


_SAVED_FOLDER_MARKS = ("config.json", "cfg.json")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file that becomes ``path``, on disk to the last byte, if the block ends well.

    If it does not, ``path`` is what it was. A symbolic link is written through. A process that is
    killed may leave a hidden ``.name.….tmp`` beside the target, which the next write of it deletes.
    """
    target = _target(path)
    if os.path.isdir(target):
        raise SourceError(f"{target} is a folder where a file is expected")
    if os.path.exists(target):
        check_regular(target)  # to rename a file to /dev/null would replace it
    make_folder(target.parent)
    with explain_refusal(target), _temporary_beside(target, _new_file) as temporary:
        if target.exists():
            shutil.copymode(target, temporary)
        mode = temporary.stat().st_mode
        with plain_write(temporary):
            yield temporary
        os.chmod(
            temporary, mode
        )  # safetensors replaces the file by one that only its owner can read
        _sync_file(temporary)
        replace(temporary, target)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, whole and on disk, if the block ends well.

    ``path`` must be absent or empty. With ``overwrite``, an existing folder is replaced as a whole, but
    only if it is a saved thing, that is, holds a ``config.json`` or ``cfg.json``: a mistyped path must
    not cost someone's home folder. On Linux the two folders change places in one step; elsewhere there
    is a moment, between two renames, when the old folder is called ``.name.….old``. What a killed
    process left unfinished for the same ``path`` is put back (such an old folder) or deleted.
    """
    target = _target(path)
    _check_replaceable(target, overwrite)
    make_folder(target.parent)
    with explain_refusal(target), _temporary_beside(target, os.mkdir) as temporary:
        with guard(temporary, target.parent):
            yield temporary
            _sync_tree(temporary, temporary.stat().st_mode & 0o666)
        _check_replaceable(target, overwrite)  # again: the block may have taken hours
        _swap_in(temporary, target)


@contextlib.contextmanager
def write_once(
    path: str | Path, advice: str, possible: Callable[[Path], bool] = lambda there: True
) -> Iterator[Path]:
    """Where to write what ``path`` is to hold; fine if it holds just that already.

    So a command can be given again that was killed between its last write and its answer. InputError if
    something else is there, and ``advice`` says then what to do. ``possible(path)`` tells at a glance
    whether what is there may be the same; if not, the error comes before the block, that is, before any
    work.
    """
    target = _target(path)
    if not target.exists() or (target.is_dir() and not os.listdir(target)):
        yield target
        return
    refusal = InputError(f"{path} is there; {advice}.")
    if not possible(target):
        raise refusal
    with explain_refusal(target), _temporary_beside(target, os.mkdir) as temporary:
        # A folder has the same depth as the target, so that relative paths in its files are the same.
        made = temporary if target.is_dir() else temporary / target.name
        yield made
        wanted = [file for file in (made, *made.rglob("*")) if file.is_file()]
        if not wanted or not all(
            _same_file(file, target / file.relative_to(made)) for file in wanted
        ):
            raise refusal


def _same_file(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


class Guard:
    """Knows a folder again, whatever has its name now. See :func:`guard`."""

    def __init__(self, folder: Path, name: Path) -> None:
        self.folder, self._name = Path(os.path.realpath(folder)), name
        self._identity = self._now()
        self._kept: list[Path] = []

    def keep(self, path: Path) -> None:
        """A file that has to stay: if it goes, the folder was emptied."""
        self._kept.append(path)

    def check(self) -> None:
        """SourceError if the folder was renamed, replaced or emptied."""
        if self._now() != self._identity or not all(map(os.path.exists, self._kept)):
            raise SourceError(
                f"{self._name} was renamed, replaced or emptied while it was being written to. What was "
                "written is where the folder is now; put it back, and give the same command again."
            )

    def watch(self, kind: Kind, path: Path) -> None:
        """Check before a step in the folder."""
        if Path(os.path.realpath(path)).is_relative_to(self.folder):
            self.check()

    def _now(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.folder)
        except OSError:
            return None
        return status.st_dev, status.st_ino


@contextlib.contextmanager
def guard(folder: Path, name: Path | None = None) -> Iterator[Guard]:
    """In this block, every step in ``folder`` is an error if the folder is another one than now: the later
    part of a result must not lie apart from the earlier part. The error calls it ``name``."""
    found = Guard(folder, name or folder)
    with watch_steps(found.watch):
        yield found


@contextlib.contextmanager
def claim(folder: Path, what: str) -> Iterator[Guard]:
    """Make ``folder``, keep other processes out of it, and see that it stays where it is.

    While the block runs, a step in the folder is an error if the folder was renamed, replaced or emptied.
    InputError if another process has claimed it; ``what`` it is, such as "run", is said then. The file
    ``.lock`` stays.
    """
    import filelock

    make_folder(folder)
    lock_file = folder / ".lock"
    lock = filelock.FileLock(lock_file)
    with guard(folder) as found, contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        try:
            with explain_refusal(lock_file), plain_write(lock_file):
                lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(
                f"the {what} {folder} is in use: another process writes to it."
            ) from None
        found.keep(lock_file)
        yield found


def _target(path: str | Path) -> Path:
    """Where ``path`` leads; SourceError, before any work, if no file can have this name."""
    target = Path(os.path.realpath(local_path(path)))
    try:
        os.lstat(target)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SourceError(f"cannot write {target}: {error.strerror}") from None
    return target


def _new_file(path: Path) -> None:
    # Not mkstemp: the file would keep its mode 0600. This gives the usual mode.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _name_beside(target: Path, ending: str) -> Path:
    return target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.{ending}"


@contextlib.contextmanager
def _temporary_beside(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside ``target``, locked for as long as this process uses it.

    Unlocked ones for the same target are deleted: the processes that made them are gone.
    """
    remove_abandoned(target)
    with contextlib.ExitStack() as stack:
        while True:
            temporary = _name_beside(target, "tmp")
            step("make", temporary)
            make(temporary)
            stack.callback(_discard, temporary)
            if _hold(temporary, stack):
                break
        yield temporary


def _hold(path: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a temporary file or folder; False if another process has just deleted it as abandoned."""
    if sys.platform == "win32":
        return True
    with contextlib.suppress(OSError):  # some network file systems have no locks
        handle = os.open(path, os.O_RDONLY)
        stack.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)
        return path.exists() and os.path.samestat(os.fstat(handle), path.stat())
    return path.exists()


_BESIDE = re.compile(r"\.(.+)\.[0-9a-f]{12}\.(tmp|old)", re.DOTALL)


def remove_abandoned(target: Path) -> None:
    """Delete the temporary files and folders that killed processes left for ``target``, and put an old
    folder back that has lost its name to no new one."""
    # safetensors renames a file of its own to ours, and our lock is not on that file.
    if sys.platform == "win32" or target.suffix == ".safetensors":
        return
    for path in [*target.parent.iterdir()]:
        name, endings = path.name, []
        # More than once: what write_once compares is itself written to a temporary folder first.
        while found := _BESIDE.fullmatch(name):
            name = found[1]
            endings.append(found[2])
        if not endings or name != target.name[:100]:
            continue
        with contextlib.suppress(OSError):  # already gone, locked by its process, or no locks here
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if endings == ["old"] and not target.exists():
                    os.rename(path, target)
                else:
                    _discard(path)
            finally:
                os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; SourceError if it cannot be removed.

    A folder first gets the name of a temporary one: a process that is killed meanwhile leaves no part of
    the folder under its own name.
    """
    if not os.path.lexists(path):
        return
    try:
        if not path.is_dir() or path.is_symlink():
            step("remove", path)
            path.unlink(missing_ok=True)
            return
        gone = path
        if not is_leftover(path.name):
            gone = _name_beside(path, "tmp")
            step("rename", path)
            os.rename(path, gone)
        step("remove", gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise SourceError(f"cannot remove {path}: {error.strerror}") from error


def _discard(path: Path) -> None:
    """Remove something temporary, as far as that is possible."""
    with contextlib.suppress(SourceError):
        remove(path)


# Our own names, and the names of the temporary files that safetensors makes beside its target.
_LEFTOVER = re.compile(rf"{_BESIDE.pattern}|\.tmp[A-Za-z0-9]{{6}}", re.DOTALL)


def is_leftover(name: str) -> bool:
    """Whether this is the name of a temporary file or folder."""
    return _LEFTOVER.fullmatch(name) is not None


def list_folder(folder: Path, *, but: str = "") -> list[str]:
    """The names in a folder, sorted, without one of them."""
    return sorted(name for name in os.listdir(folder) if name != but)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that killed processes have left in ``folder``.

    Call this only if nobody else can be writing there now, for example with the folder's lock held.
    """
    for path in [*folder.iterdir()] if folder.is_dir() else ():
        if is_leftover(path.name):
            _discard(path)


@contextlib.contextmanager
def explain_refusal(target: Path) -> Iterator[None]:
    """Turn the errors of a full or write-protected disk into a :class:`SourceError` that names
    ``target``; other errors pass."""
    try:
        yield
    except (
        Exception
    ) as error:  # safetensors' own, which is none of the system's, says the number in words
        words = re.search(r"\(os error (\d+)\)", str(error))
        known = OSError(int(words[1]), str(error)) if words else error
        if not isinstance(known, OSError):
            raise
        # The last ones only for this very name: the block may have failed to read another file.
        name = str(known.filename or "")
        beside = str(target.parent / f".{target.name[:100]}.")
        here = words is not None or name == str(target) or name.startswith(beside)
        here |= not target.parent.is_dir()  # it was moved away
        if known.errno in DISK_FULL | FORBIDDEN or (here and known.errno in _NO_PLACE):
            raise SourceError(
                f"cannot write {target}: {disk_reason(known, target.parent)}"
            ) from error
        raise


def check_writable(path: str | Path) -> None:
    """Raise SourceError, before hours of work, if ``path`` could not be written."""
    target = _target(path)
    make_folder(target.parent)
    with explain_refusal(target):
        step("make", target)
        tempfile.TemporaryFile(dir=target.parent).close()


def check_replaceable(path: str | Path, *, overwrite: bool) -> None:
    """An error, before any work, if :func:`atomic_folder` would refuse to write ``path``."""
    _check_replaceable(_target(path), overwrite)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not os.path.exists(target):
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
    if target.exists():
        step("rename", target)
        if _exchange(
            temporary, target
        ):  # the old folder is now the temporary one, and goes with it
            sync_folder(target.parent)
            return
        with contextlib.ExitStack() as stack:
            _hold(target, stack)
            old = _name_beside(target, "old")
            os.rename(target, old)
            try:
                _rename(temporary, target)
            except BaseException:
                os.rename(old, target)
                raise
            _discard(old)
    else:
        _rename(temporary, target)


def _rename(temporary: Path, target: Path) -> None:
    step("rename", target)
    os.rename(temporary, target)
    sync_folder(target.parent)


def replace(temporary: Path, target: Path) -> None:
    """Give a file its final name, in the place of what has it now, and make that last."""
    step("rename", target)
    os.replace(temporary, target)
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False if the system cannot do that."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _sync_file(path: Path) -> None:
    step("sync", path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Sync a folder, so that a rename in it lasts. Windows and some network file systems cannot."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        step("sync", path)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync_tree(folder: Path, mode: int) -> None:
    """Sync a folder's files, and give them the usual mode: safetensors makes them private."""
    for root, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(root, name), mode)
            _sync_file(Path(root, name))
        sync_folder(Path(root))


# --- JSON ---


def write_json(path: str | Path, obj: object) -> None:
    """Write ``obj`` as JSON that every reader accepts, in UTF-8 and without NaN, whole or not at all."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: this cannot be written as JSON: {error}") from error
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. A repeated key is an error: nobody knows which value was meant.

    ``NaN`` and ``Infinity`` are read although they are not JSON, because other programs write them.
    """
    file = local_file(path, None, None)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}") from error
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
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
