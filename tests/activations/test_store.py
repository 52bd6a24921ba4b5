"""Stores: what is read is what was harvested, however it was written, and damage is named."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from neuron_explainer import files
from neuron_explainer.activations import (
    SOURCE_FILE,
    ActivationBatch,
    ActivationStore,
    DataConfig,
    Harvester,
    StoreWriter,
    TokenBatch,
    TokenWindows,
    harvest_to_store,
    open_windows,
    read_documents,
    tokenize,
)
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.settings import from_dict
from tests.activations.helpers import SITE, random_corpus, write_store

PLACES = [SITE, "0/resid.torso.post_mlp"]


def windows(**options: Any) -> TokenWindows:
    return TokenWindows(random_corpus([5, 9, 30, 2, 17]), 8, 2, **({"bos": 0} | options))


def live(context: ModelContext, dtype: str | None = None) -> list[ActivationBatch]:
    harvester = Harvester(context, PLACES, dtype=dtype)
    return [harvester(batch) for batch in windows()]


def assert_same(one: ActivationBatch, other: ActivationBatch) -> None:
    assert list(one.activations) == list(other.activations)
    for place, x in one.activations.items():
        assert x.dtype == other.activations[place].dtype
        assert torch.equal(x, other.activations[place])
    for name in ("tokens", "document", "position"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def everything(store: ActivationStore) -> ActivationBatch:
    return store.rows(0, len(store))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_read_equals_live(tmp_path: Path, context: ModelContext, dtype: str) -> None:
    harvester = Harvester(context, PLACES)
    store = harvest_to_store(tmp_path / "s", harvester, windows(), dtype=dtype, shard_rows=20)
    expected = ActivationBatch.cat(live(context, dtype))
    assert len(store.shards) > 2
    assert_same(everything(store), expected)
    assert_same(ActivationBatch.cat(list(store.batches(7))), expected)
    for begin, end in [(0, 1), (15, 40), (len(store) - 1, len(store))]:
        assert_same(store.rows(begin, end), expected.rows(slice(begin, end)))
    with pytest.raises(InputError, match="has rows 0 to"):
        store.rows(3, len(store) + 1)


def test_the_manifest_says_what_is_there(tmp_path: Path, context: ModelContext) -> None:
    store = harvest_to_store(tmp_path / "s", Harvester(context, PLACES), windows(), shard_rows=20)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["model"] == context.short_name
    assert manifest["locations"] == {SITE: 48, "0/resid.torso.post_mlp": 16}
    assert manifest["dtype"] == "float32"
    assert manifest["n_rows"] == len(store) == sum(shard["rows"] for shard in manifest["shards"])
    assert manifest["settings"][0]["windows"]["seed"] == 0
    assert all(len(shard["sha256"]) == 64 for shard in manifest["shards"])


def test_appended_equals_written_at_once(tmp_path: Path, context: ModelContext) -> None:
    batches = live(context)
    at_once = write_store(tmp_path / "one", batches, "tiny", shard_rows=20)
    for cut in (1, 3):
        folder = tmp_path / f"cut{cut}"
        write_store(folder, batches[:cut], "tiny", shard_rows=20)
        appended = write_store(folder, batches[cut:], "tiny", shard_rows=20, append=True)
        assert appended.n_batches == at_once.n_batches == len(batches)
        assert_same(everything(appended), everything(at_once))
    with pytest.raises(InputError, match="append=True"):
        write_store(tmp_path / "one", batches, "tiny")


class _KilledError(Exception):
    pass


class _Interrupted(Harvester):
    """Ends the process, as it were, after some batches."""

    def __init__(self, context: ModelContext, left: int) -> None:
        super().__init__(context, PLACES)
        self.left = left

    def __call__(self, batch: TokenBatch) -> ActivationBatch:
        if not self.left:
            raise _KilledError
        self.left -= 1
        return super().__call__(batch)


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_an_interrupted_harvest_goes_on(tmp_path: Path, context: ModelContext, stop: int) -> None:
    with pytest.raises(_KilledError):
        harvest_to_store(tmp_path / "s", _Interrupted(context, stop), windows(), shard_rows=20)
    if stop:
        assert ActivationStore(tmp_path / "s").n_batches == stop  # none is done again
    harvester = Harvester(context, PLACES)
    store = harvest_to_store(tmp_path / "s", harvester, windows(), shard_rows=20)
    assert_same(everything(store), ActivationBatch.cat(live(context)))
    before = harvester.forward_s
    again = harvest_to_store(tmp_path / "s", harvester, windows(), shard_rows=20)
    assert harvester.forward_s == before  # nothing left to do
    assert_same(everything(again), everything(store))


def test_a_harvest_goes_on_only_with_the_same_settings(
    tmp_path: Path, context: ModelContext
) -> None:
    harvest_to_store(tmp_path / "s", Harvester(context, SITE), windows(), num_tokens=20)
    with pytest.raises(CheckpointError, match="other windows settings: seed was 0, is 1"):
        harvest_to_store(tmp_path / "s", Harvester(context, SITE), windows(seed=1))
    with pytest.raises(CheckpointError, match="keep_bos was True, is False"):
        harvest_to_store(tmp_path / "s", Harvester(context, SITE, keep_bos=False), windows())


def test_windows_without_end_stop_at_num_tokens(tmp_path: Path, context: ModelContext) -> None:
    harvester = Harvester(context, SITE)
    with pytest.raises(InputError, match="need num_tokens"):
        harvest_to_store(tmp_path / "s", harvester, windows(epochs=None))
    store = harvest_to_store(
        tmp_path / "s", harvester, windows(epochs=None), num_tokens=200, progress=True
    )
    assert 200 <= len(store) < 200 + 16


@pytest.mark.parametrize(
    ("model", "dtype", "change", "message"),
    [
        ("other", "float32", None, "model 'tiny', not 'other'"),
        ("tiny", "float16", None, "dtype 'float32', not 'float16'"),
        (
            "tiny",
            "float32",
            "location",
            r"locations \{'1/mlp.post_act': 48.*not \{'0/mlp.post_act'",
        ),
        ("tiny", "float32", "width", r"'1/mlp.post_act': 48.*not \{'1/mlp.post_act': 47"),
    ],
)
def test_only_the_like_is_appended(
    tmp_path: Path, context: ModelContext, model: str, dtype: str, change: str | None, message: str
) -> None:
    batches = live(context)
    store = write_store(tmp_path / "s", batches, "tiny")
    batch = batches[0]
    if change == "location":
        other = {ActivationLocation("mlp.post_act", 0): batch.activations[store.locations[0]]}
        batch = ActivationBatch(other, batch.tokens, batch.document, batch.position)
    if change == "width":
        narrow = {place: x[:, 1:] for place, x in batch.activations.items()}
        batch = ActivationBatch(narrow, batch.tokens, batch.document, batch.position)
    with pytest.raises(InputError, match=message):
        write_store(tmp_path / "s", [batch], model, dtype=dtype, append=True)
    assert_same(everything(ActivationStore(tmp_path / "s")), everything(store))  # nothing is lost


def test_a_batch_that_cannot_be_stored_loses_nothing_of_those_before(
    tmp_path: Path, context: ModelContext
) -> None:
    batches = live(context)

    def with_nan() -> Iterator[ActivationBatch]:
        yield from batches[:3]
        bad = batches[3].rows(slice(0, None))
        bad.activations[ActivationLocation.parse(SITE)][2, 1] = float("nan")
        yield bad

    document, position = int(batches[3].document[2]), int(batches[3].position[2])
    with pytest.raises(
        InputError, match=rf"{SITE} is NaN.*document {document}, position {position}"
    ):
        write_store(tmp_path / "s", with_nan(), "tiny")
    store = ActivationStore(tmp_path / "s")
    assert_same(everything(store), ActivationBatch.cat(batches[:3]))


def test_a_crash_before_the_first_manifest_is_no_hindrance(
    tmp_path: Path, context: ModelContext
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "shard-00000.safetensors").write_bytes(b"half of it")
    (tmp_path / "s" / ".shard-00000.safetensors.0a1b2c3d4e5f.tmp").write_bytes(b"half")
    store = harvest_to_store(tmp_path / "s", Harvester(context, PLACES), windows())
    assert_same(everything(store), ActivationBatch.cat(live(context)))


@pytest.mark.parametrize("fate", ["moved", "emptied", "replaced"])
def test_a_folder_that_goes_while_it_is_written_ends_the_harvest(
    tmp_path: Path, context: ModelContext, fate: str
) -> None:
    folder = tmp_path / "s"

    def batches() -> Iterator[ActivationBatch]:
        for number, batch in enumerate(live(context)):
            if number == 3:
                if fate == "emptied":
                    for path in folder.iterdir():
                        path.unlink()
                else:
                    folder.rename(tmp_path / "elsewhere")
                if fate == "replaced":
                    shutil.copytree(tmp_path / "elsewhere", folder)
            yield batch

    with pytest.raises(SourceError, match="s was renamed, replaced or emptied"):
        write_store(folder, batches(), "tiny", shard_rows=20)
    if fate != "emptied":
        assert ActivationStore(tmp_path / "elsewhere").n_batches == 2


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "config.json", "shard-00000.safetensors.bak", ".hidden"]
)
def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, context: ModelContext, foreign: str
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / foreign).write_text("mine")
    with pytest.raises(InputError, match="is no store of activations"):
        harvest_to_store(tmp_path / "s", Harvester(context, PLACES), windows())
    assert (tmp_path / "s" / foreign).read_text() == "mine"


def test_a_store_made_in_python_says_where_it_is_from(
    tmp_path: Path, tales: ModelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that ``evaluate`` finds the text that was held out, as for one of the command line."""
    (tmp_path / "books").mkdir()
    for number in range(12):
        text = f"the king number {number} had a daughter. " * 8
        (tmp_path / "books" / f"{number:02d}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    corpus = tokenize(read_documents("books", split=r"\. "), tales, max_tokens=900)
    training, held_out = corpus.split(0.25, seed=3)
    windows = TokenWindows(training, 16, 4, seed=3)
    harvester = Harvester(tales, "1/mlp.post_act", keep_bos=False)
    store = harvest_to_store("store", harvester, windows)
    assert files.read_json(store.folder / SOURCE_FILE)["source"] == "../books"
    source = store.record
    assert (source["model"], source["source"]) == ("tiny-tales", str(tmp_path / "books"))
    config = from_dict(DataConfig, source["data"])
    assert (config.split, config.corpus_tokens, config.hold_out) == (r"\. ", 900, 0.25)
    assert (config.context_length, config.keep_bos, config.bos) == (16, False, False)
    again = open_windows(tales, source["source"], config, part="held_out").corpus
    assert again.numbers.tolist() == held_out.numbers.tolist()
    assert again.source_fingerprint == source["source_fingerprint"]
    by_hand = TokenWindows(random_corpus([40]), 12, 4)
    store = harvest_to_store("by_hand", harvester, by_hand)
    assert store.record["source"] is None


@pytest.mark.parametrize(
    "content", ["[]", '{"data": 3}', '{"source": 1.5}', '{"surprise": 1}', '{"model": [1]}', "{"]
)
def test_a_damaged_note_of_the_source_is_named(
    tmp_path: Path, context: ModelContext, content: str
) -> None:
    store = harvest_to_store(tmp_path / "s", Harvester(context, PLACES), windows())
    assert store.record["data"]["context_length"] == 8
    (tmp_path / "s" / SOURCE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"source\.json"):
        _ = store.record


def test_damage_is_named_and_the_rest_can_be_read(tmp_path: Path, context: ModelContext) -> None:
    folder = tmp_path / "s"
    store = write_store(folder, live(context), "tiny", shard_rows=20)
    path = folder / store.shards[1].file
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        CheckpointError, match=r"shard-00001\.safetensors: damaged: expected SHA-256"
    ):
        everything(ActivationStore(folder))
    assert len(ActivationStore(folder).rows(0, store.shards[0].rows)) == store.shards[0].rows
    assert len(everything(ActivationStore(folder, verify=False))) == len(store)
    path.write_bytes(whole[:-5])
    with pytest.raises(
        CheckpointError, match=r"shard-00001.*expected \d+ bytes, found \d+.*cut off"
    ):
        ActivationStore(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001.*found no file"):
        ActivationStore(folder)


def test_a_shard_of_another_shape_is_refused(tmp_path: Path, context: ModelContext) -> None:
    store = write_store(tmp_path / "s", live(context), "tiny")
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["locations"][SITE] = 47
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"expected .*47.*found .*48"):
        everything(ActivationStore(store.folder))
    path.write_text(json.dumps(manifest | {"dtype": "float8"}))
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: dtype: expected one of float32, .* found 'float8'"
    ):
        ActivationStore(store.folder)
    path.write_text(json.dumps(manifest | {"kind": "autoencoder"}))
    with pytest.raises(CheckpointError, match="expected kind 'activation_store'"):
        ActivationStore(store.folder)
    with pytest.raises(SourceError, match="no file"):
        ActivationStore(tmp_path)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown dtype 'float64'"):
        StoreWriter(tmp_path / "s", "tiny", dtype="float64")
    with pytest.raises(InputError, match="shard_rows must be at least 1"):
        StoreWriter(tmp_path / "s", "tiny", shard_rows=0)


def test_two_writers_do_not_meet(tmp_path: Path, context: ModelContext) -> None:
    (tmp_path / "s").mkdir()
    with (
        FileLock(tmp_path / "s" / ".lock"),
        pytest.raises(InputError, match=r"the store .* is in use"),
    ):
        write_store(tmp_path / "s", live(context), "tiny")


def test_rows_are_mapped_not_read(tmp_path: Path, context: ModelContext) -> None:
    store = write_store(tmp_path / "s", live(context), "tiny")
    store.rows(0, 1)
    if sys.platform == "linux":
        assert str(tmp_path / "s" / store.shards[0].file) in Path("/proc/self/maps").read_text()
    row = store.rows(0, 1)
    row.activations[ActivationLocation.parse(SITE)].fill_(0)  # a copy: the store is not touched
    assert not torch.equal(store.rows(0, 1).activations[store.locations[0]], torch.zeros(1, 48))
