"""Downloads, the cache and atomic writes, each with the faults that real disks and networks have.

The server is real and on loopback; the processes that are killed are real processes.
"""

import base64
import hashlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, MissingExtraError, SourceError
from neuron_explainer.files import cache as cached
from neuron_explainer.files import download, names, writing
from tests.blob_server import Blob, BlobServer, Fault, ToLoopback

DATA = bytes(range(256)) * 4096  # 1 MiB: four chunks
AZURE = "https://openaipublic.blob.core.windows.net"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache and home, no credentials, no proxies, no long waits."""
    for name in download._AZURE_CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files.options, "backoff_seconds", 0.005)
    cached.verified.clear()
    return tmp_path / "cache"


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with BlobServer() as running:
        yield running


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python with ``code``; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []
    begin = "import os, signal, sys\nfrom neuron_explainer import files\n"
    begin += "from neuron_explainer.files import writing\n"
    begin += "files.options.backoff_seconds = 0.005\n"

    def start(code: str, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-c", begin + code, *args]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def closed_port() -> str:
    """The base URL of a server that is not there."""
    with BlobServer() as gone:
        return gone.base


TELLING = """
import tqdm

class Bar:
    def __init__(self, **_):
        self.n = self.total = 0

    def update(self, count):
        self.n += count
        print(self.n, flush=True)

    def close(self):
        pass

tqdm.tqdm = Bar
"""
"""Code for a child that says how many bytes it has written, over all files."""


def until_written(process: subprocess.Popen[str], n_bytes: int) -> None:
    """Wait until a :data:`TELLING` child has written so many bytes."""
    assert process.stdout is not None
    while True:
        line = process.stdout.readline()
        assert line, "the process ended early"
        if int(line) >= n_bytes:
            return


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def partials(cache: Path) -> list[Path]:
    return sorted(cache.glob("state/*/partial"))


def stored(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("files/**/*") if path.is_file())


def new_process() -> None:
    """What a later process knows: only what is on disk."""
    cached.verified.clear()


# ------------------------------------------------------------------------------- names, folders


def test_the_cache_folder_is_private(cache: Path) -> None:
    assert files.cache_dir() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_cache_that_everyone_may_write_to_is_refused(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(SourceError, match=r"everyone may write.*NEURON_EXPLAINER_CACHE"):
        files.cache_dir()


def test_a_cache_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.cache_dir()
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(SourceError, match="belongs to user"):
        files.cache_dir()


def test_a_file_in_the_place_of_the_cache(cache: Path) -> None:
    cache.write_text("no folder")
    with pytest.raises(SourceError, match="is a file where a folder is expected"):
        files.cache_dir()


def test_the_cache_is_the_users_when_nothing_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEURON_EXPLAINER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert files.cache_dir() == tmp_path / "home/.cache/neuron_explainer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_dir() == tmp_path / "xdg/neuron_explainer"


@pytest.mark.parametrize(
    ("source", "remote"),
    [
        ("az://account/container/x", True),
        ("https://host/x", True),
        ("http://127.0.0.1/x", True),
        ("hf:owner/name/x", True),
        ("hf://owner/name/x", True),
        ("/a/b", False),
        ("a/b", False),
        ("hf_models/x", False),
        ("s3://bucket/x", False),
        (Path("https://host/x"), False),
    ],
)
def test_is_remote(source: str | Path, remote: bool) -> None:
    assert files.is_remote(source) is remote


def test_azure_has_one_copy_under_both_names() -> None:
    one = names.parse("az://openaipublic/a/b c%.pt")
    other = names.parse(f"{AZURE}/a/b%20c%25.pt")
    assert (one.url, one.parts) == (other.url, other.parts)
    assert one.azure == ("openaipublic", "a/b c%.pt")


@pytest.mark.parametrize(
    "source",
    [
        "https://host/a/../b",
        "https://host/a/%2e%2e/b",
        "https://host/a/..%2fb",
        "https://host/a%5C..%5Cb",
        "https://host//etc/passwd",
        "https://host/a/./b",
        "https://host/a%00b",
        "https://host/folder/",
        "https://host",
        "https://host?x",
        "https:///x",
        "https://user:secret@host/x",
        "http://example.com/x",
        "az://account/container/../../x",
        "az://ACCOUNT/container/x",
        "az://evil.example.com#/container/x",
        "hf:owner/name",
        "hf:owner/../x",
    ],
)
def test_names_that_lead_elsewhere_are_refused(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Refused by name, before any server is asked.
    monkeypatch.delattr(download, "new_session")
    with pytest.raises(SourceError) as error:
        files.fetch(source)
    assert "secret" not in str(error.value)
    assert not stored(cache)


@given(st.text(min_size=1, max_size=300))
def test_any_name_gives_one_safe_file_name(name: str) -> None:
    made = names._file_name(name)
    assert made == Path(made).name or name in (".", "..")
    assert len(made) <= 120
    assert not set(made) & set('/\\:*?"<>|')


@given(st.lists(st.text(max_size=20), min_size=2, max_size=2, unique=True))
def test_different_names_have_different_files(pair: list[str]) -> None:
    assert names._file_name(pair[0]) != names._file_name(pair[1])


@pytest.mark.parametrize(
    ("folder", "parts", "joined"),
    [
        ("az://a/b/", ("c", "d/e"), "az://a/b/c/d/e"),
        ("https://h/a", ("b c",), "https://h/a/b%20c"),
        ("https://h/a/?sig=1", ("b",), "https://h/a/b?sig=1"),
        ("hf:o/n", ("x",), "hf:o/n/x"),
        ("folder", ("x", "y"), Path("folder/x/y")),
        (Path("/folder"), ("x",), Path("/folder/x")),
    ],
)
def test_join(folder: str | Path, parts: tuple[str, ...], joined: str | Path) -> None:
    assert files.join(folder, *parts) == joined


@pytest.mark.parametrize("part", ["..", "a/../../b", "/etc/passwd", "C:x", "a\\b", "", "a//b"])
@pytest.mark.parametrize("folder", ["https://h/a", "az://a/b", Path("folder")])
def test_join_never_leads_out(folder: str | Path, part: str) -> None:
    with pytest.raises(SourceError):
        files.join(folder, part)


# ------------------------------------------------------------------------------- local files


def test_a_local_path_comes_back_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"123")
    digest = hashlib.sha256(b"123").hexdigest()
    assert files.fetch(path) == files.fetch(str(path), size=3, sha256=digest.upper()) == path
    with pytest.raises(SourceError, match="expected 4 bytes, found 3"):
        files.fetch(path, size=4)
    with pytest.raises(SourceError, match="expected SHA-256 00"):
        files.fetch(path, sha256="00")


def test_a_local_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no file .*modle\.pt Did you mean 'model\.pt'\?"):
        files.fetch(tmp_path / "modle.pt")
    with pytest.raises(SourceError, match="is a folder where a file is expected"):
        files.fetch(tmp_path)
    with pytest.raises(SourceError, match=r"model\.pt is a file where a folder is expected"):
        files.fetch(tmp_path / "model.pt" / "x")
    with pytest.raises(SourceError, match=r"cannot read .*name too long"):
        files.fetch("x" * 5000)
    with pytest.raises(SourceError, match=r"s3:// is not among the known"):
        files.fetch("s3://bucket/x")


# ------------------------------------------------------------------------------- downloads


def test_a_download_is_recorded_and_had_once(server: BlobServer, cache: Path) -> None:
    url = server.put("/a/b.pt", DATA)
    path = files.fetch(url)
    assert path.read_bytes() == DATA
    assert path.is_relative_to(cache / "files")
    [entry] = files.list_cache()
    assert (entry.source, entry.path, entry.size, entry.etag) == (url, path, len(DATA), '"1"')
    assert entry.sha256 == hashlib.sha256(DATA).hexdigest()
    assert entry.date is not None
    assert entry.problem is None
    assert not partials(cache)
    new_process()
    assert files.fetch(url) == path
    assert len(server.seen) == 1


def test_an_empty_file(server: BlobServer) -> None:
    assert files.fetch(server.put("/empty", b"")).read_bytes() == b""


def test_a_query_is_part_of_the_name_but_never_shown(server: BlobServer, cache: Path) -> None:
    url = server.put("/x", b"one")
    path = files.fetch(url + "?sig=SECRET")
    assert files.fetch(url) != path
    server.blobs.clear()
    with pytest.raises(SourceError) as error:
        files.fetch(url + "?sig=SECRET2")
    assert "SECRET" not in str(error.value)
    kept = [path.read_text() for path in cache.glob("state/*/*.json")]
    assert len(kept) == 2
    assert "SECRET" not in "".join(kept)


def test_a_network_error_does_not_show_the_query() -> None:
    url = "https://host/x?sig=SECRET"
    error = download._network_error(requests.RequestException(f"no luck with {url}"), url)
    assert "no luck with https://host/x?…" in str(error)


def test_kill_in_the_middle_then_restart(
    server: BlobServer, cache: Path, child: Callable[..., subprocess.Popen[str]]
) -> None:
    url = server.put("/x", DATA, Fault(stall_after=600_000))
    process = child(TELLING + "files.fetch(sys.argv[1])", url)
    until_written(process, 524_288)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not stored(cache)
    [unfinished] = files.list_cache()
    assert unfinished.source == url
    assert "unfinished" in str(unfinished.problem)
    assert files.fetch(url).read_bytes() == DATA
    assert server.requests()[-1].headers["Range"] == "bytes=524288-"
    assert server.requests()[-1].headers["If-Range"] == '"1"'


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["/record.json", "/files/"])
def test_kill_when_all_has_come(
    server: BlobServer,
    cache: Path,
    child: Callable[..., subprocess.Popen[str]],
    name: str,
    when: str,
) -> None:
    url = server.put("/x", DATA)
    code = """
real = os.replace
def replace(old, new):
    if sys.argv[2] not in str(new):
        return real(old, new)
    if sys.argv[3] == "after":
        real(old, new)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
files.fetch(sys.argv[1])
"""
    assert child(code, url, name, when).wait() == -signal.SIGKILL
    assert bool(stored(cache)) == ((name, when) == ("/files/", "after"))
    recorded = [entry.sha256 for entry in files.list_cache() if entry.path in stored(cache)]
    assert None not in recorded, "a file without a record would be taken for one put by hand"
    assert files.fetch(url).read_bytes() == DATA
    assert len(server.requests()) == 1, "the whole file was there already"


RACER = """
import filelock
real = filelock.FileLock.acquire
def acquire(self, *args, **kwargs):
    filelock.FileLock.acquire = real
    print("asks for the lock", flush=True)
    return real(self, *args, **kwargs)
filelock.FileLock.acquire = acquire
print(files.fetch(sys.argv[1]))
"""


def test_two_processes_race_for_one_file(
    server: BlobServer, child: Callable[..., subprocess.Popen[str]]
) -> None:
    url = server.put("/x", DATA, Fault(stall_after=300_000))
    racers = [child(RACER, url) for _ in range(2)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "asks for the lock\n"
    server.wait_for_requests(1)
    server.release.set()
    told = [racer.communicate(timeout=30) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert Path(told[0][0].strip()).read_bytes() == DATA
    # The stalled answer was cut, continued once, and the second process asked for nothing.
    assert [seen.headers.get("Range") for seen in server.requests()] == [None, "bytes=262144-"]


def test_threads_race_for_one_file(server: BlobServer) -> None:
    url = server.put("/x", DATA)
    assert len(set(files.fetch_all([url] * 6))) == 1
    assert len(server.seen) == 1


@pytest.mark.parametrize("fault", [Fault(reset_after=600_000), Fault(cut_after=600_000)])
def test_a_broken_connection_is_continued(server: BlobServer, fault: Fault) -> None:
    url = server.put("/x", DATA, fault)
    assert files.fetch(url).read_bytes() == DATA
    first, second = server.requests()
    assert "Range" not in first.headers
    # A reset may take with it what had come but was not yet read.
    assert fault.cut_after is None or second.headers["Range"] == "bytes=524288-"


def test_a_line_that_breaks_often_still_brings_the_file(
    server: BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.options, "chunk_bytes", 65_536)
    faults = [Fault(cut_after=70_000) for _ in range(2 * files.options.attempts)]
    assert files.fetch(server.put("/x", DATA, *faults)).read_bytes() == DATA


def test_a_body_that_is_always_cut_is_given_up(server: BlobServer, cache: Path) -> None:
    url = server.put("/x", DATA, etag=None, always=Fault(cut_after=300_000))
    with pytest.raises(SourceError, match=r"cannot get http.*/x: .*tries in vain"):
        files.fetch(url)
    assert not stored(cache)


def test_500_then_success(server: BlobServer) -> None:
    url = server.put("/x", DATA, Fault(500), Fault(503, {"Retry-After": "0"}), Fault(429))
    assert files.fetch(url).read_bytes() == DATA


def test_500_for_ever(server: BlobServer) -> None:
    url = server.put("/x", DATA, always=Fault(500))
    with pytest.raises(SourceError, match=f"answered 500 .*{files.options.attempts} tries in vain"):
        files.fetch(url)
    assert len(server.seen) == files.options.attempts


@pytest.mark.parametrize("status", [401, 403, 404, 409, 410, 418])
def test_a_refusal_is_final(server: BlobServer, cache: Path, status: int) -> None:
    url = server.put("/x", DATA, always=Fault(status))
    with pytest.raises(SourceError, match=f"/x answered {status}"):
        files.fetch(url)
    assert len(server.seen) == 1
    assert not stored(cache)


def test_a_body_that_changed_since(server: BlobServer, cache: Path) -> None:
    url = server.put("/x", DATA, Fault(cut_after=600_000))
    server.blobs["/x"].faults.append(Fault(404))
    with pytest.raises(SourceError):
        files.fetch(url)
    assert partials(cache)
    server.blobs["/x"] = Blob(DATA[::-1] + b"longer", etag='"2"')
    assert files.fetch(url).read_bytes() == DATA[::-1] + b"longer"
    assert "If-Range" in server.requests()[-1].headers


def test_a_server_that_continues_another_version(server: BlobServer, cache: Path) -> None:
    url = server.put("/x", DATA, Fault(cut_after=600_000), Fault(404))
    with pytest.raises(SourceError):
        files.fetch(url)
    faults = [Fault(ignore_if_range=True)]
    server.put("/x", DATA[::-1], *faults, etag='"2"')
    assert files.fetch(url).read_bytes() == DATA[::-1]


def test_a_file_that_shrank_since(server: BlobServer) -> None:
    url = server.put("/x", DATA, Fault(cut_after=600_000), Fault(404))
    with pytest.raises(SourceError):
        files.fetch(url)
    server.put("/x", b"short")  # the same ETag: 416
    assert files.fetch(url).read_bytes() == b"short"


def test_without_an_etag_nothing_is_continued(server: BlobServer) -> None:
    for etag in (None, 'W/"1"'):
        url = server.put(f"/{etag is None}", DATA, Fault(cut_after=600_000), etag=etag)
        assert files.fetch(url).read_bytes() == DATA
        assert not any("Range" in seen.headers for seen in server.seen)


def test_wrong_length_and_wrong_hash(server: BlobServer, cache: Path) -> None:
    url = server.put("/x", DATA)
    with pytest.raises(SourceError, match=f"expected 7 bytes, and the server offers {len(DATA)}"):
        files.fetch(url, size=7)
    with pytest.raises(SourceError, match=r"expected SHA-256 00.*, received"):
        files.fetch(url, sha256="00" * 32)
    assert not stored(cache)
    digest = hashlib.sha256(DATA).hexdigest()
    assert files.fetch(url, size=len(DATA), sha256=digest).read_bytes() == DATA


def test_a_cached_file_that_is_not_the_one_asked_for(
    server: BlobServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.put("/x", b"old")
    files.fetch(url)
    server.put("/x", b"new")
    assert files.fetch(url).read_bytes() == b"old", "a copy that is right is not asked for again"
    digest = hashlib.sha256(b"new").hexdigest()
    assert files.fetch(url, sha256=digest).read_bytes() == b"new"
    assert "is not the file that it was" in caplog.text


@pytest.mark.parametrize("length", ["999999999", "10"])
def test_a_false_content_length(server: BlobServer, cache: Path, length: str) -> None:
    lie = Fault(extra_headers={"Content-Length": length}, cut_after=len(DATA) - 1)
    url = server.put("/x", DATA, always=lie)
    digest = hashlib.sha256(DATA).hexdigest()
    with pytest.raises(SourceError):
        files.fetch(url, sha256=digest)
    assert not stored(cache)


def test_a_body_of_unknown_length_needs_a_figure_to_check(server: BlobServer) -> None:
    url = server.put("/x", DATA, always=Fault(drop_headers=("Content-Length",)))
    with pytest.raises(SourceError, match="does not say how long"):
        files.fetch(url)
    with pytest.raises(SourceError, match=f"expected 100 bytes, received {len(DATA)}"):
        files.fetch(url, size=100)
    assert files.fetch(url, size=len(DATA)).read_bytes() == DATA
    cut = Fault(drop_headers=("Content-Length",), cut_after=300_000)
    server.put("/x", DATA, always=cut, etag=None)
    files.remove_from_cache(url)
    with pytest.raises(SourceError, match="tries in vain"):
        files.fetch(url, size=len(DATA))


def test_the_md5_that_azure_states_is_compared(server: BlobServer, cache: Path) -> None:
    md5 = base64.b64encode(hashlib.md5(DATA).digest()).decode()
    stated = {"Content-MD5": md5}
    garbled = Fault(extra_headers=stated, body=b"!" + DATA[1:])
    url = server.put("/x", DATA, garbled, Fault(extra_headers=stated))
    assert files.fetch(url).read_bytes() == DATA
    assert len(server.seen) == 2
    server.put("/y", DATA, always=garbled)
    with pytest.raises(SourceError, match="MD5"):
        files.fetch(server.base + "/y")
    assert len(stored(cache)) == 1


def test_a_damaged_beginning_is_found_by_the_hash(server: BlobServer, cache: Path) -> None:
    url = server.put("/x", DATA, Fault(cut_after=600_000), Fault(404))
    with pytest.raises(SourceError):
        files.fetch(url)
    [partial] = partials(cache)
    partial.write_bytes(bytes(partial.stat().st_size))  # as after a power cut
    assert files.fetch(url, sha256=hashlib.sha256(DATA).hexdigest()).read_bytes() == DATA


def test_compressed_though_not_asked_for(server: BlobServer) -> None:
    url = server.put("/x", DATA, Fault(extra_headers={"Content-Encoding": "gzip"}))
    with pytest.raises(SourceError, match="came as gzip"):
        files.fetch(url)


def test_redirects_are_followed_but_not_off_https(server: BlobServer) -> None:
    url = server.put("/a", b"", Fault(302, {"Location": "/b"}))
    server.put("/b", b"there")
    assert files.fetch(url).read_bytes() == b"there"
    with BlobServer() as other:
        other.put("/c", b"elsewhere")
        elsewhere = {"Location": other.base.replace("127.0.0.1", "0.0.0.0") + "/c"}
        server.put("/a2", b"", Fault(302, elsewhere))
        with pytest.raises(SourceError, match="plain http"):
            files.fetch(server.base + "/a2")


@pytest.mark.parametrize("ask", [files.fetch, files.exists])
@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (
            "http://middle.example/b",
            "redirects to http://middle.example/b|plain http can be changed",
        ),
        ("http://127.0.0.1:9/b", "from https to plain http"),
        ("ftp://middle.example/b", "from https to plain ftp"),
        ("https://user:word@middle.example/b", "URLs with a user or password"),
        ("https://[::1/b", "not a URL|Invalid|Failed to parse"),
        ("http://", "without a host|No host|Invalid"),
    ],
)
def test_every_hop_of_a_redirect_is_judged_before_it_is_asked(
    server: BlobServer,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[str], Any],
    middle: str,
    message: str,
) -> None:
    """https to http and back to https: what the middle plants must not even be asked for."""
    server.put("/a", b"", always=Fault(302, {"Location": middle}))
    server.put("/b", b"", always=Fault(302, {"Location": "https://last.example/c"}))
    server.put("/c", b"planted")
    real = download.new_session

    def session(threads: int) -> requests.Session:
        opened: requests.Session = real(threads)
        opened.mount("https://", ToLoopback(server.base))
        opened.mount("http://", ToLoopback(server.base))
        return opened

    monkeypatch.setattr(download, "new_session", session)
    with pytest.raises(SourceError, match=message):
        ask("https://first.example/a")
    assert {seen.path for seen in server.seen} == {"/a"}


def test_redirects_in_a_circle_end(server: BlobServer) -> None:
    url = server.put("/a", b"", always=Fault(302, {"Location": "/a"}))
    with pytest.raises(SourceError, match="redirects more than 10 times"):
        files.fetch(url)
    assert len(server.seen) == 11


@pytest.mark.parametrize("url", ["http://[::1", "https://[::1/x", "https://[x]/y", "https://a[b/c"])
def test_urls_that_are_none(url: str) -> None:
    for ask in (files.fetch, files.exists, lambda name: files.join(name, "x")):
        with pytest.raises(SourceError, match=r"not a URL"):
            ask(url)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    """To open a pipe waits for its other end, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", Path("/dev/zero")):
        for read in (files.fetch, files.read_json):
            with pytest.raises(SourceError, match="is a pipe, socket or device"):
                read(path)


def _write(name: str) -> None:
    with files.atomic_write(name) as temporary:
        temporary.write_text("new")


def _write_folder(name: str) -> None:
    with files.atomic_folder(name) as temporary:
        (temporary / "x").write_text("new")


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "x" * 300, "ü\ud800", "a\0b", "~no-such-user/x", "pipe", "pipe/x", "file/x"],
)
@pytest.mark.parametrize(
    "use", [files.fetch, files.read_json, _write, _write_folder, files.check_writable]
)
def test_names_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, use: Callable[[str], Any]
) -> None:
    """A name too long, half a surrogate pair, a pipe in the place of a file: one line each."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("file").write_text("old")
    if (use, name) == (files.check_writable, "pipe"):
        return  # its folder can be written to; the write itself is refused
    with pytest.raises(SourceError):
        use(name)
    assert sorted(os.listdir()) == ["file", "pipe"]
    assert stat.S_ISFIFO(os.stat("pipe").st_mode), "a rename to a device would replace it"


@pytest.mark.parametrize(
    "url", ["https://x.invalid/\ud800", "hf:a/\ud800/c", "az://a/\ud800", "https://\ud800/x"]
)
def test_urls_with_half_a_surrogate_pair(url: str) -> None:
    for ask in (files.fetch, files.exists, lambda name: files.join(name, "x")):
        with pytest.raises(SourceError, match="cannot be the name of a file"):
            ask(url)
    with pytest.raises(SourceError, match="cannot be the name of a file"):
        files.join("https://x.invalid", "\ud800")


def test_a_folder_that_goes_while_a_file_is_written(tmp_path: Path) -> None:
    def write() -> None:
        with files.atomic_write(tmp_path / "run" / "x") as temporary:
            temporary.unlink()
            (tmp_path / "run").rmdir()

    with pytest.raises(SourceError, match=r"cannot write .*run/x: .*No such file"):
        write()
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "x"):
        (tmp_path / "elsewhere").read_text()  # what the block itself reads is its own affair


DISK_FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    files.fetch(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_disk_full(
    server: BlobServer, cache: Path, child: Callable[..., subprocess.Popen[str]]
) -> None:
    url = server.put("/x", DATA)
    out, err = child(DISK_FULL, url).communicate(timeout=30)
    assert "cannot store" in out, err
    assert "no room" in out
    assert not stored(cache)
    assert not partials(cache), "what was received would keep the disk full"
    assert files.fetch(url).read_bytes() == DATA


def test_too_little_room_is_seen_before_the_first_byte(
    server: BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(SourceError, match=r"no room .*1048576 more bytes are needed"):
        files.fetch(server.put("/x", DATA))


def test_a_file_where_a_folder_is_expected(server: BlobServer) -> None:
    files.fetch(server.put("/a", b"a file"))
    with pytest.raises(SourceError, match="/a is a file where a folder is expected"):
        files.fetch(server.put("/a/b", b"below it"))
    files.fetch(server.put("/c/d", b""))
    with pytest.raises(SourceError, match="/c is a folder where a file is expected"):
        files.fetch(server.put("/c", b""))


def test_fetch_all_keeps_the_order_and_lists_every_failure(
    server: BlobServer, tmp_path: Path
) -> None:
    good = [server.put(f"/{i}", bytes([i]) * i) for i in range(20)]
    local = tmp_path / "local"
    local.write_bytes(b"here")
    paths = files.fetch_all([*good, str(local)], threads=4)
    assert [path.read_bytes() for path in paths] == [bytes([i]) * i for i in range(20)] + [b"here"]
    with pytest.raises(SourceError, match="2 of 3 files") as error:
        files.fetch_all([good[0], server.base + "/no1", str(tmp_path / "no2")])
    assert "/no1 answered 404" in str(error.value)
    assert "no2" in str(error.value)
    assert files.fetch_all([]) == []


def test_fetch_all_is_parallel(server: BlobServer) -> None:
    # Every answer waits for all four requests: one after the other, they would never end.
    urls = [server.put(f"/{i}", DATA, Fault(stall_after=300_000)) for i in range(4)]

    def release() -> None:
        server.wait_for_requests(4)
        server.release.set()

    releaser = threading.Thread(target=release)
    releaser.start()
    assert [path.read_bytes() for path in files.fetch_all(urls, threads=4)] == [DATA] * 4
    releaser.join()


def test_ctrl_c_stops_every_thread_and_loses_nothing(
    server: BlobServer, cache: Path, child: Callable[..., subprocess.Popen[str]]
) -> None:
    urls = [server.put(f"/{i}", DATA, Fault(stall_after=600_000)) for i in range(4)]
    # A long pause before the next try: it must end because of the signal.
    code = (
        # A process that a shell started in the background is deaf to it, and so are its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "files.options.backoff_seconds = 100\nfiles.fetch_all(sys.argv[1:], threads=2)"
    )
    process = child(TELLING + code, *urls)
    until_written(process, 2 * 524_288)
    process.send_signal(signal.SIGINT)
    server.release.set()
    _, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert len(server.seen) == 2
    assert not stored(cache)
    assert [path.read_bytes() for path in files.fetch_all(urls)] == [DATA] * 4


def test_the_bar_counts_each_byte_once(
    server: BlobServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, **settings: Any) -> None:
            assert settings["disable"] is None
            self.n, self.total = 0, settings["total"]
            bars.append(self)

        def update(self, count: int) -> None:
            self.n += count

        def close(self) -> None:
            pass

    monkeypatch.setattr("tqdm.tqdm", Bar)
    urls = [server.put("/0", DATA, Fault(cut_after=600_000)), server.put("/1", DATA)]
    urls.append(server.put("/2", DATA, Fault(cut_after=600_000), etag=None))
    files.fetch_all(urls)
    [bar] = bars
    assert bar.n == bar.total == 3 * len(DATA)
    files.fetch_all(urls)
    files.fetch(server.put("/3", DATA), progress=False)
    assert len(bars) == 1
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------- the cache later


def test_offline_with_a_warm_cache(server: BlobServer, child: Callable[..., Any]) -> None:
    url = server.put("/x", DATA)
    path = files.fetch(url)
    forbid = """
import socket
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
print(files.fetch(sys.argv[1]), files.exists(sys.argv[1]))
assert "requests" not in sys.modules and "torch" not in sys.modules
"""
    out, err = child(forbid, url).communicate(timeout=30)
    assert out.split() == [str(path), "True"], err


def test_offline_with_a_cold_cache(
    closed_port: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No waiting for a network that is not there.
    monkeypatch.setattr(files.options, "backoff_seconds", 1000)
    with pytest.raises(SourceError) as error:
        files.fetch(closed_port + "/folder/x.pt")
    said = str(error.value)
    assert f"tried {closed_port}/folder/x.pt" in said
    assert "refused" in said
    assert "NEURON_EXPLAINER_CACHE" in said
    assert "local path" in said
    assert "".join(traceback.format_exception(error.value)).count("Traceback") == 1
    # The path that the message names is indeed accepted.
    place = Path(said.partition("put the file at ")[2].partition(",")[0])
    place.parent.mkdir(parents=True)
    place.write_bytes(b"by hand")
    assert files.fetch(closed_port + "/folder/x.pt") == place
    with pytest.raises(SourceError, match="expected 5 bytes, found 7"):
        files.fetch(closed_port + "/folder/x.pt", size=5)
    [entry] = files.list_cache()
    assert entry.path == place
    assert entry.sha256 is None


def tamper(path: Path) -> None:
    """Other bytes, the same size and time: only the hash can tell."""
    before = path.stat()
    path.write_bytes(b"!" + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_tampered_file_is_found_by_its_hash(
    server: BlobServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.put("/x", DATA)
    path = files.fetch(url)
    tamper(path)
    new_process()
    assert files.fetch(url).read_bytes() == DATA
    assert "has changed since it was downloaded" in caplog.text


def test_a_tampered_file_is_never_used_offline(server: BlobServer) -> None:
    url = server.put("/x", DATA)
    tamper(files.fetch(url))
    new_process()
    server.put("/x", DATA, always=Fault(403))
    with pytest.raises(SourceError, match=r"answered 403.*cannot be used.*has changed since"):
        files.fetch(url)


def test_a_file_changed_within_the_process_is_found(
    server: BlobServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.put("/x", DATA)
    path = files.fetch(url)
    path.write_bytes(b"!" + DATA[1:])
    assert files.fetch(url).read_bytes() == DATA
    path.write_bytes(DATA[:-1])
    assert files.fetch(url).read_bytes() == DATA
    assert "has changed since" in caplog.messages[0]
    assert "has 1048575 bytes, and had 1048576" in caplog.messages[1]


def test_the_hash_is_taken_once_in_a_process(
    server: BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.put("/x", DATA)
    files.fetch(url)
    new_process()
    hashed: list[Path] = []
    real = files.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(cached, "sha256_of", counted)
    for _ in range(3):
        files.fetch(url)
    assert len(hashed) == 1


def test_a_damaged_record_is_no_reason_to_trust_the_file(server: BlobServer, cache: Path) -> None:
    url = server.put("/x", DATA)
    path = files.fetch(url)
    for damage in ("{", "{}", "[]", '{"size": 1}'):
        [record] = cache.glob("state/*/record.json")
        record.write_text(damage)
        path.write_bytes(b"poison")
        assert files.list_cache()[0].problem
        assert files.fetch(url).read_bytes() == DATA


def test_a_symlink_out_of_the_cache(server: BlobServer, cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    url = server.put("/folder/x", DATA)
    path = files.fetch(url)
    path.unlink()
    path.symlink_to(tmp_path / "outside" / "secret")
    with pytest.raises(SourceError, match="leads out of the cache"):
        files.fetch(url)
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(outside)
    with pytest.raises(SourceError, match="leads out of the cache"):
        files.fetch(url)
    assert not list(outside.iterdir())


def test_verify_list_and_remove(server: BlobServer, cache: Path) -> None:
    urls = [server.put(f"/folder/{i}", DATA[:1000]) for i in range(3)]
    paths = files.fetch_all(urls)
    assert [entry.source for entry in files.list_cache()] == urls
    tamper(paths[1])
    assert [entry.problem is None for entry in files.list_cache()] == [True] * 3
    problems = [entry.problem for entry in files.verify_cache()]
    assert problems[0] is problems[2] is None
    assert "SHA-256" in str(problems[1])
    paths[0].write_bytes(b"")
    paths[2].unlink()
    found = [str(entry.problem) for entry in files.list_cache()]
    assert "0 bytes" in found[0]
    assert "missing" in found[2]
    with pytest.raises(SourceError, match=r"nothing in .* matches 'https"):
        files.remove_from_cache("https://no/such")
    assert [entry.source for entry in files.remove_from_cache(urls[0])] == urls[:1]
    assert len(files.remove_from_cache("*/folder/*")) == 2
    assert files.list_cache() == []
    assert list((cache / "files").iterdir()) == []


def test_remove_takes_unfinished_and_hand_placed_files_too(
    server: BlobServer, cache: Path, tmp_path: Path
) -> None:
    url = server.put("/x", DATA, Fault(cut_after=600_000), Fault(404))
    with pytest.raises(SourceError):
        files.fetch(url)
    by_hand = cache / "files/https/host/y"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"y")
    keep = tmp_path / "keep"
    keep.write_bytes(b"")
    (cache / "files/https/host/link").symlink_to(keep)
    assert len(files.remove_from_cache("https://host/y")) == 1
    assert len(files.remove_from_cache(url)) == 1
    assert len(files.remove_from_cache("*link")) == 1
    assert keep.exists()
    assert files.list_cache() == []


def test_a_record_that_points_out_of_the_cache(
    server: BlobServer, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").write_bytes(b"years")
    files.fetch(server.put("/x", DATA))
    [record] = cache.glob("state/*/record.json")
    files.write_json(record, files.read_json(record) | {"path": "../thesis"})
    [_, thesis] = files.list_cache()
    assert "leads out of the cache" in str(thesis.problem)
    with pytest.raises(SourceError, match="leads out of the cache"):
        files.remove_from_cache(thesis.source)
    assert (tmp_path / "thesis").exists()


def test_exists(server: BlobServer, tmp_path: Path, closed_port: str) -> None:
    url = server.put("/x", DATA, Fault(500))
    assert files.exists(url)
    assert not files.exists(server.base + "/y")
    assert {seen.method for seen in server.seen} == {"HEAD"}
    assert files.exists(tmp_path)
    assert not files.exists(tmp_path / "no")
    with pytest.raises(SourceError, match=r"cannot see .*403"):
        files.exists(server.put("/z", b"", Fault(403)))
    with pytest.raises(SourceError, match=r"cannot see .*refused") as unreachable:
        files.exists(closed_port + "/x")
    assert "".join(traceback.format_exception(unreachable.value)).count("Traceback") == 1
    with pytest.raises(SourceError, match=r"cannot see .*500"):
        files.exists(server.put("/w", b"", always=Fault(500)))


# ------------------------------------------------------------------------------- Azure and the hub


@pytest.fixture
def azure(server: BlobServer, monkeypatch: pytest.MonkeyPatch) -> BlobServer:
    """Requests for every host of Azure's go to the server."""
    real = download.new_session

    def session(threads: int) -> Any:
        made = real(threads)
        made.mount("https://", ToLoopback(server.base))
        return made

    monkeypatch.setattr(download, "new_session", session)
    return server


def test_public_blobs_are_read_anonymously(azure: BlobServer, cache: Path) -> None:
    azure.put("/sparse-autoencoder/gpt2 small/0.pt", DATA, Fault(reset_after=600_000))
    path = files.fetch("az://openaipublic/sparse-autoencoder/gpt2 small/0.pt")
    assert path.read_bytes() == DATA
    assert path == files.fetch(f"{AZURE}/sparse-autoencoder/gpt2%20small/0.pt")
    assert path.relative_to(cache).as_posix() == (
        "files/https/openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2 small/0.pt"
    )
    assert len(azure.seen) == 2
    assert not any("Authorization" in seen.headers for seen in azure.seen)
    assert not files.exists("az://openaipublic/sparse-autoencoder/no.pt")
    assert files.remove_from_cache(f"{AZURE}/sparse-autoencoder/gpt2%20small/0.pt")


def azure_pool(server: BlobServer) -> Any:
    """blobfile's connection pool, with every host on loopback."""
    import urllib3

    class Pool(urllib3.PoolManager):
        def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
            found = urllib3.util.parse_url(url)
            return super().request(method, server.base + found.request_uri, *args, **kwargs)

    return Pool()


@pytest.fixture
def private(azure: BlobServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlobServer]:
    """A container that only a signed request may read or list."""
    import blobfile

    pool = azure_pool(azure)
    context = blobfile.create_context(
        retry_limit=2,
        save_access_token_to_disk=False,
        log_callback=logging.info,
        get_http_pool=lambda: pool,
    )
    monkeypatch.setattr(download, "_azure_context", lambda: context)
    monkeypatch.setenv("AZURE_STORAGE_KEY", base64.b64encode(b"key").decode())

    def listing(handler: Any) -> bool:
        if "comp=list" not in handler.path:
            return False
        handler._plain(200 if "Authorization" in handler.headers else 404)
        return True

    azure.listing = listing
    yield azure
    pool.clear()


WHEN = "Fri, 20 Nov 2026 20:00:00 GMT"
DATE = {"Last-Modified": WHEN, "x-ms-creation-time": WHEN}


def test_private_blobs_are_read_with_the_users_credentials(private: BlobServer) -> None:
    blob = Fault(extra_headers=DATE)
    private.put("/box/x.pt", DATA, always=blob, needs_header="Authorization")
    assert files.fetch("az://myaccount/box/x.pt").read_bytes() == DATA
    signed = [seen for seen in private.seen if "Authorization" in seen.headers]
    assert signed
    assert "Authorization" not in private.seen[0].headers, "first without"
    assert files.exists("az://myaccount/box/x.pt")
    assert not files.exists("az://myaccount/box/y.pt")
    with pytest.raises(SourceError, match=r"answered 404.*with your Azure credentials: .*y\.pt"):
        files.fetch("az://myaccount/box/y.pt")


def test_private_blobs_are_continued(private: BlobServer, cache: Path) -> None:
    private.put("/box2/x.pt", DATA, always=Fault(extra_headers=DATE))
    private.blobs["/box2/x.pt"].faults.extend([Fault(cut_after=600_000), Fault(404)])
    assert files.fetch("az://myaccount/box2/x.pt").read_bytes() == DATA
    [entry] = files.list_cache()
    assert entry.etag == '"1"'
    continued = [seen.headers["Range"] for seen in private.requests() if "If-Match" in seen.headers]
    assert continued[0].startswith("bytes=524288-")


def test_the_hub(server: BlobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    template = server.base + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.base)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.put("/owner/name/resolve/main/a/x.json", b"main")
    server.put("/owner/name/resolve/v2/a/x.json", b"two")
    assert files.fetch("hf:owner/name/a/x.json").read_bytes() == b"main"
    assert files.fetch("hf://owner/name@v2/a/x.json").read_bytes() == b"two"
    assert len(server.seen) == 2
    assert server.seen[0].headers["Authorization"] == "Bearer hf_secret"
    assert files.exists("hf:owner/name/a/x.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        files.fetch("hf:owner/name/y.json")


def test_the_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="pip install huggingface_hub"):
        files.fetch("hf:owner/name/x.json")
    with pytest.raises(MissingExtraError):
        files.fetch_all(["hf:owner/name/x.json"])


# ------------------------------------------------------------------------------- writing


def test_atomic_write_replaces_and_keeps_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    with files.atomic_write(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("one")
        assert not path.exists()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with files.atomic_write(path) as temporary:  # as safetensors writes
        (path.parent / "other").touch(mode=0o600)
        os.replace(path.parent / "other", temporary)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "y").touch(mode=0o600)
    assert stat.S_IMODE((tmp_path / "folder" / "y").stat().st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    with files.atomic_write(path) as temporary:
        temporary.write_text("two")
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["x"]


def test_atomic_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with files.atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_atomic_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with files.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_atomic_write_to_impossible_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="is a folder where a file"), files.atomic_write(tmp_path):
        pass
    inside = tmp_path / "file" / "x"
    with pytest.raises(SourceError, match="is a file where a folder"), files.atomic_write(inside):
        pass


WRITE_FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with files.atomic_write(sys.argv[1]) as temporary:
        temporary.write_bytes(bytes(2000))
except ValueError as error:
    print(error)
"""


def test_atomic_write_on_a_full_disk(tmp_path: Path, child: Callable[..., Any]) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    out, err = child(WRITE_FULL, str(path)).communicate(timeout=30)
    assert "cannot write" in out, err
    assert "no room" in out
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_atomic_write_killed(tmp_path: Path, child: Callable[..., Any]) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    code = """
with files.atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert child(code, str(path)).wait() == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of open files")
@pytest.mark.parametrize("how", ["atomic_write", "atomic_folder"])
def test_what_a_killed_process_left_goes_with_the_next_write(
    tmp_path: Path, child: Callable[..., Any], how: str
) -> None:
    """And what another process still writes, or another target's, stays."""
    code = f"""
with files.{how}(sys.argv[1]) as temporary:
    print(temporary.name, flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""
    path, other = tmp_path / "x", tmp_path / "x.json"
    for target in (path, other):
        assert child(code, str(target), "die").wait() == -signal.SIGKILL
    alive = child(code, str(path), "live")
    held = alive.stdout.readline().strip()
    assert len(os.listdir(tmp_path)) == 2  # the live one has cleared the dead one's away
    with getattr(files, how)(path) as temporary:
        if how == "atomic_write":
            temporary.write_text("new")
    left = set(os.listdir(tmp_path))
    assert held in left
    assert {name.startswith(".x.json.") for name in left - {"x", held}} == {True}


def test_what_is_renamed_is_on_disk_first(
    server: BlobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        happened.append("sync folder" if folder else f"sync {os.fstat(handle).st_size}")
        real_sync(handle)

    def move(a: Any, b: Any) -> None:
        happened.append("rename")
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    with files.atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("12345")
    assert happened == ["sync 5", "rename", "sync folder"]
    happened.clear()
    with files.atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "x").write_text("123")
    assert sorted(happened) == ["sync 3", *["sync folder"] * 3]  # both folders and their parent
    happened.clear()
    files.fetch(server.put("/x", DATA))
    assert happened.index(f"sync {len(DATA)}") < len(happened) - 2
    assert happened[-2:] == ["rename", "sync folder"]


def save(folder: Path, text: str, **settings: bool) -> None:
    with files.atomic_folder(folder, **settings) as temporary:
        (temporary / "config.json").write_text(text)
        (temporary / "deep").mkdir()
        (temporary / "deep" / "x").write_text(text)


def test_atomic_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"
    save(folder, "one")
    with pytest.raises(InputError, match="overwrite=True"):
        save(folder, "two")
    (folder / "stale").write_text("")
    save(folder, "two", overwrite=True)
    assert (folder / "deep" / "x").read_text() == "two"
    assert sorted(os.listdir(folder)) == ["config.json", "deep"]
    assert os.listdir(folder.parent) == ["model"]
    empty = tmp_path / "empty"
    empty.mkdir()
    save(empty, "three")
    assert (empty / "config.json").read_text() == "three"


def test_atomic_folder_takes_no_strangers_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="is no saved model"):
        save(tmp_path / "thesis", "", overwrite=True)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SourceError, match="is a file where a folder is expected"):
            save(path, "", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis"]


def test_atomic_folder_that_fails_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(folder, "old")

    def fail() -> None:
        with files.atomic_folder(folder, overwrite=True) as temporary:
            (temporary / "config.json").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (folder / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(InputError, match="exists"), files.atomic_folder(folder):
        save(folder, "theirs")
    assert (folder / "config.json").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["model"]


def test_two_renames_where_folders_cannot_change_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    folder = tmp_path / "model"
    save(folder, "one")
    save(folder, "two", overwrite=True)
    assert (folder / "config.json").read_text() == "two"
    real, calls = os.rename, []

    def second_fails(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise PermissionError
        real(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(PermissionError):
        save(folder, "three", overwrite=True)
    assert (folder / "config.json").read_text() == "two"
    assert os.listdir(tmp_path) == ["model"]


# Every call that changes a name or removes something: killed before it, and after it.
KILLED = """
when, count = int(sys.argv[2]), [0]
def tick():
    count[0] += 1
    if count[0] == when:
        os.kill(os.getpid(), signal.SIGKILL)
def deadly(real):
    def call(*args, **kwargs):
        tick()
        result = real(*args, **kwargs)
        tick()
        return result
    return call
for owner, name in ((os, "rename"), (os, "replace"), (writing.shutil, "rmtree"),
                    (writing, "_sync_tree"), (writing, "_exchange"), (os, "unlink")):
    setattr(owner, name, deadly(getattr(owner, name)))
with files.atomic_folder(sys.argv[1], overwrite=True) as temporary:
    files.write_json(temporary / "config.json", {"v": "new"})
    (temporary / "x").write_text("new")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere folders cannot change places")
def test_atomic_folder_killed_anywhere(tmp_path: Path, child: Callable[..., Any]) -> None:
    processes = []
    for when in range(1, 13):
        folder = tmp_path / str(when) / "model"
        save(folder, '{"v": "old"}')
        processes.append((folder, child(KILLED, str(folder), str(when))))
    ends, versions = [], []
    for folder, process in processes:
        ends.append(process.wait(timeout=30))
        version = files.read_json(folder / "config.json")["v"]
        assert sorted(os.listdir(folder)) == ["config.json", "deep" if version == "old" else "x"]
        versions.append(version)
    assert -signal.SIGKILL in ends
    assert {"old", "new"} == set(versions)


# ------------------------------------------------------------------------------- JSON


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"text": "naïve 🙂\u2028", "list": [1, 2.5, None], "deep": {"a": True}}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    assert "🙂" in (tmp_path / "x.json").read_text("utf-8")


@pytest.mark.parametrize("value", [{"x": float("nan")}, {"x": {1, 2}}, {"x": Path()}])
def test_what_is_not_json_is_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"x\.json: this cannot be written"):
        files.write_json(tmp_path / "x.json", value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1,\n "b" 2}', r"x\.json, line 2, column 6: not valid JSON"),
        (b"", r"x\.json, line 1, column 1"),
        (b'{"a": 1', r"x\.json, line 1, column 8"),
        (b'{"d": {"a": 1, "a": 2}}', r"x\.json: the key 'a' stands twice"),
        (b'{"a": "\xff"}', r"x\.json, byte 7: not UTF-8"),
        (b"[1]", r"x\.json: expected a JSON object, found list"),
        (b"[" * 200_000, r"x\.json: "),
        (b'{"a": ' + b"9" * 5000 + b"}", r"x\.json: "),
    ],
)
def test_what_is_not_json_is_not_read(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        files.read_json(tmp_path / "x.json")


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert files.read_json(tmp_path / "x.json") == {"a": 1}
    with pytest.raises(SourceError, match="no file"):
        files.read_json(tmp_path / "y.json")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    assert files.sha256_of(tmp_path / "x") == hashlib.sha256(DATA).hexdigest()
