"""The private folder that downloads go to."""

import os
import stat
import sys
from pathlib import Path

from neuron_explainer.errors import SourceError
from neuron_explainer.files._local import in_way

CACHE_VARIABLE = "NEURON_EXPLAINER_CACHE"


def cache_dir() -> Path:
    """The private folder of downloaded files, made when it is not there.

    ``$NEURON_EXPLAINER_CACHE``, or the user's cache folder. A folder that others own or can write
    to is refused: who can plant a file there chooses which weights are loaded.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(os.path.abspath(Path(chosen).expanduser())) if chosen else _user_cache()
    try:
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
    # A relative XDG path is to be ignored, says the specification.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "neuron_explainer"


def _check_private(folder: Path) -> None:
    if not hasattr(os, "geteuid"):
        return  # Windows: access lists, not modes, and the user's folder is the user's
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
    """A path within the cache, of which no part is a link to somewhere else."""
    root = cache_dir()
    path = root.joinpath(*parts)
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise SourceError(
            f"{path} leads out of the cache, to {real}, through a symbolic link; "
            "remove the link, or give the file's own path instead of a URL"
        )
    return path
