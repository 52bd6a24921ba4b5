"""From paths and URLs to local files: a private cache that is always checked, and atomic writes.

Every read of the library goes through :func:`fetch`, every write through :func:`atomic_write` or
:func:`atomic_folder`, and stops at each step for who watches (``steps.py``). A remote file is downloaded
once and checked at every later use:

- It is received into ``state/<key>/partial``. An interrupted download continues with a ``Range`` request
  if the server still has the same ETag. The file is compared with every length and checksum that is
  known, synced to disk, and only then renamed to ``files/<host>/<path>``, under a lock.
- ``state/<key>/record.json`` holds source, size, ETag, SHA-256 and date. A load compares the size, and the
  hash once in each process. A file that differs is fetched again or refused, never used.
- A file that is present and right is used without asking a server, so a full cache works offline.

Public blobs of Azure (``az://account/container/name``) are read over plain https. ``blobfile`` is used only
if that is refused and the user has Azure credentials: it looks for credentials first, so that an expired
``az login`` would end the download of a public file, and it needs the right to list the container.
"""

from neuron_explainer.files.cache import (
    CacheEntry,
    list_cache,
    remove_from_cache,
    verify_cache,
)
from neuron_explainer.files.download import exists, fetch, fetch_all, options
from neuron_explainer.files.names import cache_dir, is_remote, join
from neuron_explainer.files.steps import plain_write, step, watch_steps
from neuron_explainer.files.writing import (
    atomic_folder,
    atomic_write,
    check_regular,
    check_replaceable,
    check_writable,
    claim,
    explain_refusal,
    guard,
    is_leftover,
    list_folder,
    local_path,
    make_folder,
    read_json,
    remove,
    remove_abandoned,
    remove_leftovers,
    sha256_of,
    write_json,
    write_once,
)

__all__ = [
    "CacheEntry",
    "atomic_folder",
    "atomic_write",
    "cache_dir",
    "check_regular",
    "check_replaceable",
    "check_writable",
    "claim",
    "exists",
    "explain_refusal",
    "fetch",
    "fetch_all",
    "guard",
    "is_leftover",
    "is_remote",
    "join",
    "list_cache",
    "list_folder",
    "local_path",
    "make_folder",
    "options",
    "plain_write",
    "read_json",
    "remove",
    "remove_abandoned",
    "remove_from_cache",
    "remove_leftovers",
    "sha256_of",
    "step",
    "verify_cache",
    "watch_steps",
    "write_json",
    "write_once",
]
