"""Names of remote files, none of which leads out of its folder, and the private folder of the copies."""

import contextlib
import hashlib
import ipaddress
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from neuron_explainer.errors import SourceError, in_way, shown
from neuron_explainer.files.steps import step

REMOTE_PREFIXES = ("az://", "https://", "http://", "hf:")
_AZURE_HOST = ".blob.core.windows.net"


@dataclass(frozen=True)
class Remote:
    """One remote file: the name that the user gave, its URL, and the place of its copy."""

    source: str  # for messages: without the query, which may hold a secret
    url: str  # https://, http:// (loopback) or hf://, complete
    parts: tuple[str, ...]  # path of the copy below files/
    size: int | None = None  # what the caller expects, like sha256
    sha256: str | None = None

    @property
    def path(self) -> Path:
        return inside_cache("files", *self.parts)

    @property
    def state(self) -> Path:
        """The folder of the record, the lock and the unfinished download.

        Its name is a hash, so that no remote name can be that of one of these files.
        """
        return inside_cache("state", hashlib.sha256(self.url.encode()).hexdigest()[:32])

    @property
    def azure(self) -> tuple[str, str] | None:
        """``(account, path)`` of an Azure blob; None for other files."""
        found = urlsplit(self.url)
        host = found.hostname or ""
        if not host.endswith(_AZURE_HOST):
            return None
        return host.removesuffix(_AZURE_HOST), unquote(found.path.lstrip("/"))


def is_remote(source: str | Path) -> bool:
    """Whether ``source`` is an ``az://``, ``https://``, ``http://`` or ``hf:`` name.

    ``http://`` is remote by form; :func:`fetch` accepts it from this machine only. A ``Path`` is
    always local.
    """
    return isinstance(source, str) and source.startswith(REMOTE_PREFIXES)


def parse(source: str) -> Remote:
    """The file that a name stands for. Both spellings of an Azure blob give the same file."""
    _check_text(source)
    if source.startswith("az://"):
        account, _, rest = source.removeprefix("az://").partition("/")
        if not (account.isascii() and account.isalnum() and account == account.lower()):
            raise SourceError(f"{source}: {account!r} is no name of an Azure storage account")
        found = urlsplit(f"https://{account}{_AZURE_HOST}/{quote(rest)}")
    elif source.startswith("hf:"):
        return _parse_hf(source)
    else:
        found = split_url(source)
    shown = without_query(source) if found.query else source
    host = checked_host(found, shown)
    names = [unquote(name) for name in found.path.split("/")[1:]]
    _check_names(names or [""], shown)
    parts = [_file_name(name) for name in names]
    if found.query:
        parts[-1] += "@" + hashlib.sha256(found.query.encode()).hexdigest()[:16]
    path = quote("/" + "/".join(names), safe="/:@!$&'()*+,;=~")
    url = urlunsplit((found.scheme, host, path, found.query, ""))
    return Remote(shown, url, (found.scheme, _file_name(host), *parts))


def _parse_hf(source: str) -> Remote:
    text = source.removeprefix("hf:").removeprefix("//")
    names = text.split("/")
    _check_names(names, source)
    if len(names) < 3:
        raise SourceError(f"{source}: expected hf:owner/name/path or hf:owner/name@revision/path")
    return Remote(source, f"hf://{text}", ("hf", *map(_file_name, names)))


def _check_text(name: str) -> None:
    """Refuse half a surrogate pair, which has no form in bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{shown(name)} cannot be the name of a file") from None


def split_url(url: str) -> SplitResult:
    """The parts of a URL; SourceError for text that is no URL, such as ``http://[::1``."""
    try:
        return urlsplit(url)
    except ValueError as error:
        raise SourceError(f"{without_query(url)}: not a URL: {error}") from None


def checked_host(found: SplitResult, shown: str) -> str:
    """Host and port of a URL; SourceError if the URL may not be read from."""
    if "@" in found.netloc:
        raise SourceError(
            f"{found.scheme}://{found.hostname}: URLs with a user or password are not "
            "accepted; use a link without one"
        )
    if not found.hostname:
        raise SourceError(f"{shown}: a URL without a host")
    if found.scheme == "http" and not is_loopback(found.hostname):
        raise SourceError(
            f"{shown}: plain http can be changed on its way and is accepted from this machine "
            "only; use https"
        )
    return found.netloc.lower()


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: ``localhost``, or an address of its loopback network."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_names(names: Sequence[str], source: str) -> None:
    """Refuse names that lead out of a folder on any system; remote indexes hold names too."""
    for name in names:
        if name in ("", ".", "..") or any(c in "/\\" or ord(c) < 32 for c in name):
            hint = " (a folder's name, not a file's?)" if name == names[-1] == "" else ""
            raise SourceError(f"{source}: the part {name!r} is not accepted in a name{hint}")


def _file_name(name: str) -> str:
    """A name that every file system accepts, and that differs for different names."""
    safe = quote(name, safe=" !#$&'()+,;=@[]^_`{}~.-")
    if len(safe) <= 120:
        return safe
    return f"{safe[:80]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def without_query(url: str) -> str:
    """The URL without its query, which may hold a signature."""
    head, mark, _ = url.partition("?")
    return head + ("?…" if mark else "")


def join(folder: str | Path, *parts: str) -> str | Path:
    """``folder/part/…`` of a path or a URL. Parts may hold ``/`` but never lead out of the folder.

    Parts are plain names, not URL-encoded ones: they are encoded here where the URL needs it.
    """
    for part in (str(folder), *parts):
        _check_text(part)
    for part in parts:
        if PureWindowsPath(part).drive:
            raise SourceError(f"{part!r}: a path of its own, expected one within {folder}")
        _check_names(part.split("/"), f"{folder} + {part!r}")
    if not is_remote(folder):
        return Path(folder, *parts)
    url = str(folder)
    if url.startswith(("az://", "hf:")):
        return "/".join((url.rstrip("/"), *parts))
    found = split_url(url)
    path = "/".join((found.path.rstrip("/"), *map(quote, parts)))
    return urlunsplit(found._replace(path=path))


# --- the private folder of downloads ---


CACHE_VARIABLE = "NEURON_EXPLAINER_CACHE"


def cache_dir() -> Path:
    """The private folder of downloaded files; it is made if it does not exist.

    It is ``$NEURON_EXPLAINER_CACHE``, or else the user's cache folder. A folder that others own or can
    write to is refused: they could choose which weights are loaded.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(os.path.abspath(Path(chosen).expanduser())) if chosen else _user_cache()
    try:
        if not folder.is_dir():
            step("make", folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        where = f" ({CACHE_VARIABLE})" if chosen else f"; set {CACHE_VARIABLE} to another"
        raise SourceError(
            f"cannot make the cache folder {folder}{where}: {in_way(error, folder)}"
        ) from error
    _check_private(folder)
    return folder


def _user_cache() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData/Local") / "neuron_explainer/Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/neuron_explainer"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "neuron_explainer"


def _check_private(folder: Path) -> None:
    if not hasattr(os, "geteuid"):
        return  # Windows has access lists, not modes, and the user's folder is private
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise SourceError(
            f"the cache folder {folder} belongs to user {found.st_uid}, not to you "
            f"({os.geteuid()}), who could change what you load. "
            f"Set {CACHE_VARIABLE} to a folder of your own."
        )
    if found.st_mode & stat.S_IWOTH:
        raise SourceError(
            f"everyone may write to the cache folder {folder} and so change what you load. "
            f"Run chmod o-w on it, or set {CACHE_VARIABLE} to a private folder."
        )


def inside_cache(*parts: str) -> Path:
    """A path within the cache; SourceError if a symbolic link in it leads out of the cache."""
    root = cache_dir()
    path = root.joinpath(*parts)
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise SourceError(
            f"{path} leads out of the cache, to {real}, through a symbolic link; "
            "remove the link, or give the file's own path instead of a URL"
        )
    return path
