"""Everything that the package writes goes through ``neuron_explainer/files``, whose steps can be watched.

A write elsewhere would be missing from the kill points of ``tests/test_kill_points.py``, could leave half a
file, and would answer a full disk with a traceback.
"""

import ast
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import neuron_explainer
from neuron_explainer import files
from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.files.steps import Kind
from neuron_explainer.files.writing import guard

PACKAGE = Path(neuron_explainer.__file__).parent

WRITERS = {
    *("write_text", "write_bytes", "save_file", "serialize_file", "tofile", "savez", "savetxt"),
    *("savez_compressed", "savefig", "to_csv_file", "memmap", "truncate", "SummaryWriter"),
}
"""Calls that write a file, whatever they are called on; what ``save`` and ``open`` do depends on more."""
METHODS = {"write_text", "write_bytes", "tofile", "truncate"}
"""Those of them that are always called on something; a function of this name is a module's own."""
_OF_A_MODULE = {("torch", "save"), ("np", "save"), ("sqlite3", "connect")}
CHANGERS = {
    *("rename", "unlink", "mkdir", "makedirs", "rmdir", "removedirs", "touch", "symlink_to"),
    *("hardlink_to", "rmtree", "move", "copyfile", "copytree", "copymode", "chmod", "fsync"),
    *("NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp"),
}
"""Calls that change names or folders; they are for ``files`` alone."""
FRAMES = {"plain_write", "atomic_write"}
"""A write stands in a ``with`` block of one of these."""

REASONS = {
    ("analysis/store_file.py", "connect"): "opens a store to be read",
    ("analysis/workspace.py", "open"): "asks whether the file may be written; writes nothing",
    ("experiments/boards/essay.py", "savefig"): "into memory; the files of it in atomic_write",
    ("analysis/workspace.py", "connect"): "a user's edits, which SQLite's journal keeps whole",
    ("server/sessions.py", "connect"): "states of pages, which SQLite's journal keeps whole",
    ("analysis/plots.py", "savefig"): "into memory, for a page that is written as a whole",
    ("activations/token_files.py", "memmap"): "maps a file to be read",
    (
        "dictionaries/logs.py",
        "open",
    ): "stays open; each line that is written is in a files.plain_write block",
    ("dictionaries/logs.py", "fsync"): "of the open log; after files.step",
    (
        "dictionaries/logs.py",
        "SummaryWriter",
    ): "TensorBoard's own files, which no result depends on",
}


def calls(tree: ast.AST, framed: bool = False) -> Iterator[tuple[ast.Call, bool]]:
    """Every call, and whether it stands in a block of FRAMES."""
    if isinstance(tree, ast.Call):
        yield tree, framed
    if isinstance(tree, ast.With):
        here = framed
        for item in tree.items:
            yield from calls(item, here)
            expression = item.context_expr
            here |= isinstance(expression, ast.Call) and _name(expression.func)[1] in FRAMES
        for statement in tree.body:
            yield from calls(statement, here)
        return
    for child in ast.iter_child_nodes(tree):
        yield from calls(child, framed)


def _name(function: ast.expr) -> tuple[str, str]:
    """(What it is called on, the name) of a call: ``torch.save`` is ("torch", "save")."""
    if isinstance(function, ast.Attribute):
        owner = function.value
        return (owner.id if isinstance(owner, ast.Name) else ""), function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def _opens_to_write(call: ast.Call) -> bool:
    place = 1 if isinstance(call.func, ast.Name) else 0  # open(path, mode), path.open(mode)
    modes = [
        *call.args[place : place + 1],
        *(word.value for word in call.keywords if word.arg == "mode"),
    ]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
    return any(isinstance(text, str) and set("wax+") & set(text) for text in texts)


def writes(path: Path) -> Iterator[tuple[str, int]]:
    """Name and line of each call of a module that changes the disk apart from ``files``."""
    for call, framed in calls(ast.parse(path.read_text("utf-8"))):
        owner, name = _name(call.func)
        wrote = name in WRITERS or (owner, name) in _OF_A_MODULE
        wrote &= isinstance(call.func, ast.Attribute) or name not in METHODS
        wrote |= name == "open" and _opens_to_write(call)
        changed = name in CHANGERS or (owner, name) == ("os", "replace")
        if owner != "files" and (changed or (wrote and not framed)):
            yield name, call.lineno


def test_nothing_is_written_apart_from_files() -> None:
    found: dict[tuple[str, str], int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if not module.startswith("files/"):
            found |= {(module, name): line for name, line in writes(path)}
    unknown = [f"{module}:{found[module, name]}: {name}" for module, name in found.keys() - REASONS]
    assert not unknown, (
        f"{unknown}: write inside `with files.atomic_write(path) as temporary:` (or, in a folder of "
        "files.atomic_folder, `with files.plain_write(path):`), remove with files.remove, make folders with "
        "files.make_folder. Then tests/test_kill_points.py stands at these steps too."
    )
    assert REASONS.keys() <= found.keys()  # no reason outlives what it is for


@pytest.mark.parametrize(
    "line",
    [
        "open('x', 'w')",
        "open('x', mode='ab')",
        "Path('x').open('x')",
        "Path('x').write_text('')",
        "torch.save(x, 'x')",
        "save_file({}, 'x')",
        "os.replace('x', 'y')",
        "with files.plain_write(path):\n    shutil.rmtree('x')",
        "with other(path):\n    save_file({}, path)",
    ],
)
def test_such_a_write_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert list(writes(tmp_path / "module.py"))


@pytest.mark.parametrize(
    "line",
    [
        "open('x')",
        "open('x', 'rb')",
        "'x'.replace('w', 'a')",
        "files.remove(path)",
        "with files.plain_write(path), path.open('wb') as out:\n    save_file({}, path)",
        "with files.atomic_write(path) as temporary:\n    temporary.write_text('')",
    ],
)
def test_other_calls_are_not(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert not list(writes(tmp_path / "module.py"))


# ---- the steps themselves --------------------------------------------------------------------------


def test_the_steps_of_a_write_and_of_a_folder(tmp_path: Path) -> None:
    seen: list[tuple[Kind, str]] = []
    with files.watch_steps(lambda kind, path: seen.append((kind, path.name.lstrip(".")[:4]))):
        files.write_json(tmp_path / "file.json", {})
        folder = files.atomic_folder(tmp_path / "place", overwrite=True)
        with folder as temporary, files.plain_write(temporary / "part") as path:
            path.write_text("x")
    above = tmp_path.name[:4]
    assert seen == [
        *(("make", "file"), ("write", "file"), ("written", "file"), ("sync", "file")),
        *(("rename", "file"), ("sync", above)),
        *(("make", "plac"), ("write", "part"), ("written", "part"), ("sync", "part")),
        *(("sync", "plac"), ("rename", "plac"), ("sync", above)),
    ]
    files.write_json(tmp_path / "file.json", {})
    assert len(seen) == 13  # nobody watches any more


def test_a_guarded_folder_that_goes_ends_the_next_step(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    files.write_json(folder / "kept.json", {})
    with guard(folder) as found:
        files.write_json(folder / "one.json", {})
        found.keep(folder / "kept.json")
        files.write_json(tmp_path / "beside.json", {})
        folder.rename(tmp_path / "there")
        with pytest.raises(SourceError, match="here was renamed, replaced or emptied"):
            files.write_json(folder / "two.json", {})
        assert not folder.exists()
        files.write_json(tmp_path / "beside.json", {})  # another folder does not matter
        (tmp_path / "there").rename(folder)
        (folder / "kept.json").unlink()
        with pytest.raises(SourceError, match="emptied"):
            files.write_json(folder / "two.json", {})


def test_an_old_folder_that_lost_its_name_to_no_new_one_is_put_back(tmp_path: Path) -> None:
    """Where folders cannot change places in one step, a kill between two renames leaves this."""
    old = tmp_path / ".place.0123456789ab.old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    with (
        pytest.raises(RuntimeError),
        files.atomic_folder(tmp_path / "place", overwrite=True),
    ):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["place"]
    assert os.listdir(tmp_path / "place") == ["config.json"]


def test_write_once_takes_what_is_there_already(tmp_path: Path) -> None:
    def write(text: str) -> None:
        once = files.write_once(tmp_path / "out", "choose another --out")
        with once as out, files.atomic_folder(out) as temporary:
            files.write_json(temporary / "config.json", {"text": text})

    write("one")
    (tmp_path / "out" / "report.html").write_text("of a later command")
    write("one")
    with pytest.raises(InputError, match="out is there; choose another --out"):
        write("two")
    assert files.read_json(tmp_path / "out" / "config.json") == {"text": "one"}
    with (
        pytest.raises(InputError, match="out is there; give another"),
        files.write_once(tmp_path / "out", "give another", lambda there: "x" in there.name),
    ):
        raise AssertionError("no work is begun")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert (tmp_path / "out" / "report.html").exists()


def test_what_is_left_of_a_comparison_is_removed(tmp_path: Path) -> None:
    """What write_once compares is itself written to a temporary folder first."""
    (tmp_path / ".out.0123456789ab.tmp").mkdir()
    (tmp_path / "..out.0123456789ab.tmp.ba9876543210.tmp").mkdir()
    (tmp_path / "..other.0123456789ab.tmp.ba9876543210.tmp").mkdir()
    with files.atomic_folder(tmp_path / "out") as temporary:
        files.write_json(temporary / "config.json", {})
    assert sorted(os.listdir(tmp_path)) == ["..other.0123456789ab.tmp.ba9876543210.tmp", "out"]


def test_a_file_that_cannot_be_removed_is_one_error(tmp_path: Path) -> None:
    def full(kind: Kind, path: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / "x").touch()
    with (
        files.watch_steps(full),
        pytest.raises(SourceError, match=r"cannot remove .*x: Permission"),
    ):
        files.remove(tmp_path / "x")


def test_a_file_is_whole_at_every_step_of_its_replacement(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"n": 1})
    seen: list[int] = []
    read = files.read_json
    with files.watch_steps(lambda kind, path: seen.append(read(tmp_path / "x.json")["n"])):
        files.write_json(tmp_path / "x.json", {"n": 2})
    assert seen == [1, 1, 1, 1, 1, 2]
