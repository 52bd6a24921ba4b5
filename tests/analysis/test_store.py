"""Stores of examples: what is written is read back to the bit, and damage is found before use."""

import contextlib
import json
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.activations.token_files import open_token_file
from neuron_explainer.analysis.records import GROUPS, Collected
from neuron_explainer.analysis.store import COLUMNS, ExampleStore, open_stores
from neuron_explainer.analysis.store_format import Label, hashed_keys, write_store
from neuron_explainer.analysis.token_store import TokenStore
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from tests.analysis.examples import (
    VOCABULARY,
    make_coactivation,
    make_collected,
    make_corpus,
)
from tests.dictionaries.test_resume import no_room

LABELS = [Label(1, "royal titles", "gpt", 0.5), Label(2, 'x" OR text:*'), Label(1, "kings")]


def same(a: Any, b: Any, place: str = "") -> None:
    """Equal to the bit, types of arrays included."""
    if hasattr(a, "__dataclass_fields__"):
        for field in fields(a):
            same(getattr(a, field.name), getattr(b, field.name), f"{place}.{field.name}")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, place
        np.testing.assert_array_equal(a, b, err_msg=place)
    else:
        assert a == b, place


def write(folder: Path, collected: Collected, corpus: TokenCorpus, **more: Any) -> Path:
    tokens = TokenStore.write(folder / "tokens", corpus, VOCABULARY, "made-up")
    path = folder / f"{collected.name}.store"
    write_store(path, collected, tokens, **more)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collected, Path]:
    corpus = make_corpus()
    collected = make_collected(
        corpus, coactivation=make_coactivation(5), stratum_limits=np.full((5, 2), np.inf)
    )
    return collected, write(tmp_path_factory.mktemp("out"), collected, corpus, labels=LABELS)


@pytest.fixture
def store(written: tuple[Collected, Path]) -> Iterator[ExampleStore]:
    with ExampleStore.open(written[1]) as store:
        yield store


@pytest.fixture
def copy(written: tuple[Collected, Path], tmp_path: Path) -> Path:
    """A store that may be damaged."""
    shutil.copytree(written[1].parent, tmp_path / "copy")
    return tmp_path / "copy" / written[1].name


# --- round trips ---


def test_everything_comes_back(written: tuple[Collected, Path], store: ExampleStore) -> None:
    same(store.collected(), written[0])
    store.verify()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_units=st.integers(1, 4),
    kind=st.sampled_from(["latent", "head"]),
    window=st.integers(1, 20),
    density=st.floats(0, 1),
    sizes=st.dictionaries(st.sampled_from(GROUPS), st.integers(0, 4), max_size=3),
    signed=st.booleans(),
)
def test_random_tables_come_back(tmp_path_factory: pytest.TempPathFactory, **how: Any) -> None:
    corpus = make_corpus(seed=how["seed"] % 3)
    collected = make_collected(corpus, **how)
    path = write(tmp_path_factory.mktemp("out"), collected, corpus)
    with ExampleStore.open(path) as store:
        same(store.collected(), collected)
        store.verify()
        for record in store:
            assert len(record.all_examples) == (collected.examples.unit == record.unit).sum()
            for example in record.all_examples:
                assert example.activations[example.peak] == np.float32(example.value)


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    corpus = make_corpus()
    paths = [write(tmp_path / name, make_collected(corpus), corpus) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_keys_and_moments_that_cannot_be_shortened(tmp_path: Path) -> None:
    corpus = make_corpus()
    found = make_collected(corpus)
    key = np.where(found.examples.group >= 2, found.examples.key / 3, found.examples.key)
    every = replace(found.statistics.all, mean=found.statistics.all.mean + 1)
    found = replace(
        found,
        examples=replace(found.examples, key=key),
        statistics=replace(found.statistics, all=every),
    )
    with ExampleStore(write(tmp_path, found, corpus)) as store:
        same(store.collected(), found)


def test_values_beyond_float16(tmp_path: Path) -> None:
    corpus = make_corpus()
    found = make_collected(corpus)
    value, activations = found.examples.value.copy(), found.examples.activations.copy()
    value[0] = 1e6
    with np.errstate(over="ignore"):
        activations[0, found.examples.peak[0]] = value[0]
    other = 0 if found.examples.peak[0] else 1
    activations[0, other] = -np.inf
    found = replace(found, examples=replace(found.examples, value=value, activations=activations))
    with ExampleStore(write(tmp_path, found, corpus)) as store:
        example = store[1].all_examples[0]
        assert example.value == example.activations[example.peak] == 1e6
        assert example.activations[other] == -65504


def test_the_reader_of_the_documentation(written: tuple[Collected, Path]) -> None:
    """``datasets.md`` tells the format, and reads it in a few lines of its own."""
    collected, path = written
    text = (Path(__file__).parents[2] / "datasets.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import base64, json.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    found, expected = names["read_unit"](path, 3), collected.examples.of_unit(3)
    for name in ("group", "interval", "length", "peak", "start", "value", "activations"):
        np.testing.assert_array_equal(found[name], getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(found["keys"], expected.key[expected.group >= 2])
    histogram = collected.statistics.histogram[3]
    np.testing.assert_array_equal(found["histogram"], histogram[np.flatnonzero(histogram)])
    assert collected.coactivation is not None
    np.testing.assert_array_equal(found["partner"], collected.coactivation.partner[3])
    np.testing.assert_array_equal(found["both"], collected.coactivation.both[3])
    with contextlib.closing(sqlite3.connect(path)) as db:
        column = db.execute("SELECT data FROM columns WHERE name = 'max'").fetchone()[0]
    planes = np.frombuffer(zlib.decompress(column, -15), "u1").reshape(4, 5)
    assert struct.unpack("<5f", planes[::-1].T.tobytes()) == tuple(collected.statistics.max)


def test_stores_of_version_1(tmp_path: Path) -> None:
    """The shipped stores are of version 1: what is read from one, and written again, is the same."""
    with ExampleStore.open("tiny-tales/ae-resid-delta-attn/0") as old:
        assert old.meta["format_version"] == 1, "this test needs a store of version 1"
        old.verify()
        found = old.collected()
        shutil.copytree(old.tokens.folder, tmp_path / "tokens")
        path = tmp_path / "new.store"
        write_store(path, found, TokenStore.open(tmp_path / "tokens"))
        with ExampleStore(path) as new:
            assert new.meta["format_version"] == 2
            same(new.collected(), found)
            np.testing.assert_array_equal(new.peak_tokens, old.peak_tokens)
        assert path.stat().st_size < old.path.stat().st_size


def test_size_of_sparse_latents(tmp_path: Path) -> None:
    """2 GiB for 36 times 32,768 latents, at 40 examples of 64 tokens with 16 activations that are not 0."""
    corpus, n = make_corpus(100_000), 200
    sizes = {"top": 15, "stratum": 15, "uniform": 5, "weighted": 5}
    limits = np.random.default_rng(0).random((n, 5)).astype(np.float32).astype(np.float64)
    found = make_collected(
        corpus,
        n,
        window=64,
        density=15 / 63,
        sizes=sizes,
        stratum_limits=limits,
        coactivation=make_coactivation(n, 10),
        settings={"key_seed": 1},
    )
    found = replace(found, examples=hashed_keys(found.examples, 1, n, pairs=False))
    path = write(tmp_path, found, corpus)
    assert 15.5 < np.count_nonzero(found.examples.activations) / len(found.examples) < 16.5
    with ExampleStore(path) as store:
        rows = store._file.query("SELECT sum(length(data)) FROM units")[0][0] / (n - 1)
        columns = store._file.query("SELECT sum(length(data)) FROM columns")[0][0] / n
    rows += (
        40 * 5 / 8 + 10
    )  # the text is short: places in a long one take 5 bits more, partners a byte
    rows += 18  # the row's number, checksum and lengths
    rows *= 1 + rows / 2 / 65536  # of each page, half a row is empty
    assert (rows + columns) * 36 * 32_768 <= 2 * 2**30


# --- what is asked of a store ---


def test_records(written: tuple[Collected, Path], store: ExampleStore) -> None:
    collected, record = written[0], store[3]
    statistics = collected.statistics
    assert (record.unit, record.name, record.kind) == (3, "made-up", "latent")
    assert record.statistics.count == statistics.active.count[3]
    assert record.statistics.kurtosis == statistics.active.kurtosis[3]
    assert record.statistics.mean_all == statistics.all.mean[3]
    np.testing.assert_array_equal(record.histogram, statistics.histogram[3])
    assert [example.rank for example in record.top] == [0, 1, 2, 3]
    assert len(record.examples()) == 16
    first, table = record.top[0], collected.examples.of_unit(3, "top")
    corpus = make_corpus()
    document = int(np.searchsorted(corpus.starts, table.start[0], side="right")) - 1
    assert first.document == document
    assert first.position == table.start[0] - corpus.starts[document]
    expected = corpus.tokens[first.start : first.start + len(first.tokens)]
    np.testing.assert_array_equal(first.tokens, expected)
    assert first.pieces == [VOCABULARY[i] for i in expected]
    pmi = collected.coactivation.pmi[3] if collected.coactivation else []
    assert [partner.pmi for partner in record.partners] == pytest.approx(list(pmi))
    with pytest.raises(InputError, match="unknown group 'tops'"):
        record.examples("tops")


@pytest.mark.parametrize("unit", [-1, 5, 2**40])
def test_a_unit_out_of_range(store: ExampleStore, unit: int) -> None:
    with pytest.raises(InputError, match=rf"no latent {unit}: there are 0 to 4"):
        store[unit]


def test_columns_sort_and_filter(written: tuple[Collected, Path], store: ExampleStore) -> None:
    statistics = written[0].statistics
    for name in ("mean", "variance", "skewness", "kurtosis"):
        np.testing.assert_array_equal(store.column(name), getattr(statistics.active, name))
        np.testing.assert_array_equal(store.column(f"{name}_all"), getattr(statistics.all, name))
    density = statistics.active.count / statistics.n_tokens
    np.testing.assert_array_equal(store.column("density"), density)
    assert store.sort("density").tolist() == np.argsort(-density, kind="stable").tolist()
    assert store.sort("max", descending=False, limit=2)[0] == 0
    assert store.sort("max", descending=False, among=store.alive)[0] != 0
    assert store.dead.tolist() == [0]
    assert store.alive.tolist() == [1, 2, 3, 4]
    assert store.dense(density[2]).tolist() == np.flatnonzero(density >= density[2]).tolist()
    low, high = sorted(density[1:3])
    assert set(store.filter(density=(low, high), count=(1, None)).tolist()) >= {1, 2}
    with pytest.raises(InputError, match=r"unknown figure 'maxi'. Did you mean 'max'"):
        store.sort("maxi")


def test_data_frame(store: ExampleStore) -> None:
    frame = store.to_dataframe()
    assert list(frame.columns) == [*COLUMNS, "label"]
    np.testing.assert_array_equal(frame["kurtosis"], store.column("kurtosis"))
    assert frame["label"].tolist() == ["", "royal titles", LABELS[1].text, "", ""]


def test_search(store: ExampleStore) -> None:
    assert [label.unit for label in store.search("royal titles")] == [1]
    assert [label.text for label in store.search("kin")] == ["kings"]
    assert store.search("roya titles") == []  # only the last word may be unfinished
    assert [label.unit for label in store.search('"x')] == [2]
    for hostile in ('"', "*", "NEAR(", 'a" OR "b', "text:", "-", "\0", "\ud800", "' --", ""):
        store.search(hostile)
    assert store[1].label == "royal titles"


def test_several_stores_in_a_folder(copy: Path) -> None:
    shutil.copy(copy, copy.with_name("other.store"))
    assert list(open_stores(copy.parent)) == ["made-up", "other"]
    with pytest.raises(InputError, match="2 stores; give one of these names: made-up, other"):
        ExampleStore.open(copy.parent)
    with pytest.raises(InputError, match=r"no store 'othr'.*Did you mean 'other'"):
        ExampleStore.open(copy.parent, "othr")
    ExampleStore.open(copy.parent, "other").close()


def test_many_threads_read(store: ExampleStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda unit: repr(store[unit]), [1, 2, 3, 4] * 10))
    assert found == [repr(store[unit]) for unit in [1, 2, 3, 4]] * 10


def test_folders_of_any_name(written: tuple[Collected, Path], tmp_path: Path) -> None:
    folder = tmp_path / "a ?mode=rwc&x#%41 é"
    shutil.copytree(written[1].parent, folder)
    with ExampleStore.open(folder) as store:
        store.workspace.set_label(2, "here")
        assert store[2].label == "here"
    assert (folder / "workspace.sqlite").exists()


def test_from_arrays(tmp_path: Path) -> None:
    corpus = make_corpus()
    documents = [corpus.document(i).tolist() for i in range(len(corpus))]
    collected = make_collected(corpus, name="1/mlp.post_act", kind="neuron")
    store = ExampleStore.from_arrays(
        tmp_path, collected, documents, VOCABULARY, source="mine", labels=LABELS
    )
    same(store.collected(), collected)
    assert store.path.name == "1.mlp.post_act.store"
    assert store.tokens.corpus.name == "mine"
    # A second one shares the text; another text is refused.
    ExampleStore.from_arrays(tmp_path, replace(collected, name="b"), documents, VOCABULARY)
    with pytest.raises(InputError, match="holds another corpus"):
        ExampleStore.from_arrays(tmp_path, collected, documents[::-1], VOCABULARY)
    # The text is a token file, so that it can be collated again.
    np.testing.assert_array_equal(open_token_file(tmp_path / "tokens").tokens, corpus.tokens)


def test_neither_torch_nor_a_model_is_needed(written: tuple[Collected, Path]) -> None:
    script = (
        "import sys\nfrom neuron_explainer.analysis.store import ExampleStore\n"
        f"with ExampleStore.open({str(written[1])!r}) as store: print(store[3], store[3].html())\n"
        "assert not {'torch', 'pandas', 'requests', 'tiktoken'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_dead_units_have_a_page(tmp_path: Path) -> None:
    corpus = make_corpus()
    found = make_collected(corpus, 1, sizes={})
    nothing = replace(found.statistics.active, count=np.zeros(1, np.int64))
    found = replace(found, statistics=replace(found.statistics, active=nothing))
    with ExampleStore(write(tmp_path, found, corpus)) as store:
        assert store.dead.tolist() == [0]
        assert "never active" in repr(store[0])
        assert "never active" in store[0]._repr_html_()
        assert "never active" in store[0].html()


# --- what is refused ---


@pytest.mark.parametrize(
    ("column", "row", "value", "expected"),
    [
        ("unit", 0, 9, "a unit between 0 and 4"),
        ("group", 0, 9, "a group between 0 and 5"),
        ("start", 0, 3999, "tokens within one document"),
        ("start", 0, -1, "tokens within one document"),
        ("length", 0, 0, "1 to 16 activations"),
        ("peak", 0, 16, "a peak among the activations"),
        ("value", 3, np.nan, r"example 3 \(unit 1, .* a finite value"),
        ("rank", 1, 2, "ranks that count from 0|its place in the order"),
        ("unit", 0, 4, "its place in the order"),
    ],
)
def test_tables_that_do_not_fit(
    tmp_path: Path, column: str, row: int, value: float, expected: str
) -> None:
    corpus = make_corpus()
    found = make_collected(corpus)
    values = getattr(found.examples, column).copy()
    values[row] = value
    found = replace(found, examples=replace(found.examples, **{column: values}))
    with pytest.raises(InputError, match=expected):
        write(tmp_path, found, corpus)
    assert not list(tmp_path.glob("*.store"))


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    corpus = make_corpus()
    found = make_collected(corpus)
    short = replace(found, examples=replace(found.examples, key=found.examples.key[1:]))
    with pytest.raises(InputError, match=r"key should have the shape \[64\], found \[63\]"):
        write(tmp_path, short, corpus)
    with pytest.raises(InputError, match="JSON values"):
        write(tmp_path, replace(found, settings={"a": object()}), corpus)
    with pytest.raises(InputError, match="label 'x' is of unit 5; units are 0 to 4"):
        write(tmp_path, found, corpus, labels=[Label(5, "x")])


def test_figures_that_do_not_fit(tmp_path: Path) -> None:
    corpus = make_corpus()
    found = make_collected(corpus)
    active = found.statistics.active
    for name, value, message in (
        ("count", 4001, "count 4001"),
        ("m2", -1.0, "m2 -1.0"),
        ("mean", np.nan, "mean nan"),
    ):
        column = getattr(active, name).copy()
        column[2] = value
        wrong = replace(found.statistics, active=replace(active, **{name: column}))
        with pytest.raises(InputError, match=f"active of unit 2: .*{message}"):
            write(tmp_path, replace(found, statistics=wrong), corpus)


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"between 0 and 7, .* found 8"):
        TokenStore.write(tmp_path / "tokens", TokenCorpus.of([[1, 8]]), VOCABULARY)


def test_a_truncated_store(copy: Path) -> None:
    content = copy.read_bytes()
    for size in (0, 50, 100, 4096, len(content) - 4096, len(content) - 1):
        copy.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"truncated|another kind"):
            ExampleStore.open(copy)


def change_row(db: sqlite3.Connection) -> None:
    db.execute("UPDATE units SET data = (SELECT data FROM units WHERE unit = 2) WHERE unit = 1")


def deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


def change_row_and_checksum(db: sqlite3.Connection) -> None:
    data = deflated(b"\0" * 10)
    crc = zlib.crc32(data, zlib.crc32((1).to_bytes(8, "little")))
    db.execute("UPDATE units SET data = ?, crc = ? WHERE unit = 1", (data, crc))


def bomb(db: sqlite3.Connection) -> None:
    data = deflated(b"\0" * (100 << 20))
    crc = zlib.crc32(data, zlib.crc32((1).to_bytes(8, "little")))
    db.execute("UPDATE units SET data = ?, crc = ? WHERE unit = 1", (data, crc))


def garbage(db: sqlite3.Connection) -> None:
    data = deflated(b"\xff" * 10)
    crc = zlib.crc32(data, zlib.crc32((1).to_bytes(8, "little")))
    db.execute("UPDATE units SET data = ?, crc = ? WHERE unit = 1", (data, crc))


def drop_row(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM units WHERE unit = 1")


def change_column(db: sqlite3.Connection) -> None:
    db.execute("UPDATE columns SET data = zeroblob(9) WHERE name = 'max'")


def change_meta(db: sqlite3.Connection) -> None:
    db.execute("UPDATE meta SET content = replace(content, 'made-up', 'another')")


def add_trigger(db: sqlite3.Connection) -> None:
    db.execute("CREATE TRIGGER evil AFTER UPDATE ON meta BEGIN SELECT 1; END")


def use_view(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE units RENAME TO old")
    db.execute("CREATE VIEW units AS SELECT * FROM old")


def change_label(db: sqlite3.Connection) -> None:
    db.execute("UPDATE labels SET text = 'another'")


@pytest.mark.parametrize(
    ("change", "when"),
    [
        (change_row, "read"),
        (garbage, "read"),
        (bomb, "read"),
        (drop_row, "read"),
        (change_column, "read"),
        (change_meta, "opened"),
        (add_trigger, "opened"),
        (use_view, "opened"),
        (change_row_and_checksum, "verified"),
        (change_label, "verified"),
    ],
)
def test_a_tampered_store(
    copy: Path, change: Callable[[sqlite3.Connection], None], when: str
) -> None:
    with sqlite3.connect(copy) as db:
        change(db)
    db.close()
    if when == "opened":
        with pytest.raises(CheckpointError):
            ExampleStore.open(copy)
        return
    with ExampleStore.open(copy) as store:
        if when == "read":
            with pytest.raises(CheckpointError, match="damaged"):
                store[1]
        with pytest.raises(CheckpointError):
            store.verify()


def test_any_changed_byte_is_noticed_or_harmless(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    expected = [repr(record) for record in ExampleStore.open(copy)]
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 60).tolist():
        changed = content.copy()
        changed[place] ^= 0x55
        copy.write_bytes(changed)
        try:
            with ExampleStore.open(copy) as store:
                found = [repr(record) for record in store]
        except CheckpointError:
            continue
        if found != expected:  # labels have no checksum of their own, but the content has
            with ExampleStore.open(copy) as store, pytest.raises(CheckpointError):
                store.verify()


def test_other_files_are_no_stores(tmp_path: Path) -> None:
    other = tmp_path / "other.store"
    with pytest.raises(SourceError, match="there is no store of examples"):
        ExampleStore.open(other)
    with pytest.raises(SourceError, match="no store of examples"):
        ExampleStore.open(tmp_path)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(CheckpointError, match="not a store of examples"):
        ExampleStore.open(other)


def test_a_store_that_changes_while_it_is_open(copy: Path) -> None:
    with ExampleStore.open(copy) as store:
        store[1]
        copy.write_bytes(copy.read_bytes() + b"\0")
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            store[1]


# --- the text ---


def test_another_text(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy.parent / "tokens")
    TokenStore.write(copy.parent / "tokens", make_corpus(seed=1), VOCABULARY)
    with pytest.raises(CheckpointError, match="points into another text"):
        ExampleStore.open(copy)


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "vocabulary.bin"])
def test_text_that_was_changed(copy: Path, name: str) -> None:
    path = copy.parent / "tokens" / name
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-2])
    with pytest.raises(CheckpointError):
        ExampleStore.open(copy)
    content[-4] ^= 1
    path.write_bytes(content)
    with (
        pytest.raises(CheckpointError, match=r"SHA-256|does not fit"),
        ExampleStore.open(copy) as s,
    ):
        s[1]


def test_text_that_changes_while_it_is_open(copy: Path) -> None:
    with ExampleStore.open(copy) as store:
        store[1]
        path = copy.parent / "tokens" / "tokens.bin"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])  # reading on would end the process
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            store[1]


def test_a_token_file_without_vocabulary(copy: Path) -> None:
    manifest = copy.parent / "tokens" / "manifest.json"
    found = json.loads(manifest.read_text())
    del found["sha256"]["vocabulary.bin"]
    manifest.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"without vocabulary.bin"):
        ExampleStore.open(copy)


def test_a_full_disk_leaves_what_was_there(copy: Path) -> None:
    before = copy.read_bytes()
    corpus = make_corpus()
    collected = make_collected(corpus, 40, name=copy.stem)
    tokens = TokenStore.open(copy.parent / "tokens")
    with no_room(20_000), pytest.raises(SourceError, match=r"cannot write .*made-up.store"):
        write_store(copy, collected, tokens)
    assert copy.read_bytes() == before
    assert sorted(path.name for path in copy.parent.iterdir()) == ["made-up.store", "tokens"]
