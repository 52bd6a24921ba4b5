"""From a name to a local file."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from neuron_explainer.errors import SourceError
from neuron_explainer.files._download import ATTEMPTS, backoff, download
from neuron_explainer.files._local import local_file, local_path, make_folder
from neuron_explainer.files._names import Remote, is_remote, parse
from neuron_explainer.files._records import why_unusable
from neuron_explainer.files._routes import RetryError, UnreachableError, exists_at
from neuron_explainer.files._transfer import Transfer


def fetch(
    source: str | Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """The local file of ``source``: a local path itself, a remote file's checked copy.

    ``size`` in bytes and ``sha256`` in hex, where given, must be those of the file.
    """
    if not is_remote(source):
        return local_file(source, size, sha256)
    with Transfer(progress=progress) as transfer:
        return _fetch(str(source), transfer, size, sha256)


def fetch_all(sources: Sequence[str], *, threads: int = 8, progress: bool = True) -> list[Path]:
    """:func:`fetch` of many at once, in their order, with one bar and one error for all."""
    with Transfer(progress=progress, threads=threads) as transfer:
        futures = _run_all(sources, transfer, threads)
    failures = [str(error) for future in futures if (error := future.exception()) is not None]
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, SourceError):
            raise error
    if failures:
        listed = "\n".join(f"- {text}" for text in failures)
        raise SourceError(f"{len(failures)} of {len(sources)} files cannot be had:\n{listed}")
    return [future.result() for future in futures]


def _run_all(sources: Sequence[str], transfer: Transfer, threads: int) -> list[Future[Path]]:
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="fetch") as pool:
        futures = [pool.submit(_fetch, source, transfer, None, None) for source in sources]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C: let the threads stop at their next chunk, not at the end
            transfer.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return futures


def _fetch(source: str, transfer: Transfer, size: int | None, sha256: str | None) -> Path:
    """One file, by whichever thread."""
    if not is_remote(source):
        return local_file(source, size, sha256)
    remote = replace(parse(source), size=size, sha256=sha256 and sha256.lower())
    if why_unusable(remote) is None:
        return remote.path
    import filelock

    make_folder(remote.state)
    with filelock.FileLock(remote.state / "lock"):
        why = why_unusable(remote)  # again: another process may have been here
        if why is not None:
            download(remote, transfer, why)
    return remote.path


def exists(source: str | Path) -> bool:
    """Whether there is such a local file or folder, or such a remote file.

    A remote file in the cache is not asked for again. SourceError where no answer can be had.
    """
    if not is_remote(source):
        return local_path(source).exists()
    remote = parse(str(source))
    if why_unusable(remote) is None:
        return True
    with Transfer(progress=False) as transfer:
        return _exists_remotely(remote, transfer)


def _exists_remotely(remote: Remote, transfer: Transfer) -> bool:
    failures = 0
    while True:
        try:
            return exists_at(remote, transfer.session())
        except SourceError as error:
            raise SourceError(f"cannot see {remote.source}: {error}") from error
        except RetryError as error:
            failures += 1
            if failures >= ATTEMPTS or isinstance(error, UnreachableError):
                raise SourceError(f"cannot see {remote.source}: {error}") from error
            transfer.pause(max(error.wait_seconds, backoff(failures)))
