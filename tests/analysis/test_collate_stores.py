"""``collate`` with files: the folder, what is refused, and stores that are merged."""

import errno
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from neuron_explainer import files
from neuron_explainer.activations.windows import TokenBatch, TokenWindows
from neuron_explainer.analysis import (
    CollateConfig,
    ExampleStore,
    collate,
    collect,
    merge_stores,
    open_stores,
)
from neuron_explainer.analysis.collation.merging import merge
from neuron_explainer.analysis.records import Collected, ExampleTable
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.model_context import ModelContext
from tests.analysis import collated
from tests.analysis.byte_models import BOS, byte_corpus, save_byte_context
from tests.analysis.test_collation import same_examples

CONFIG = CollateConfig(
    top=3,
    intervals=3,
    per_interval=2,
    uniform=3,
    weighted=3,
    inactive=2,
    window=6,
    head_window=3,
    parts=5,
    coactivation_tokens=40,
    partners=4,
)
WHAT = ["0/mlp.post_act", "1/attn.qk_probs"]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    return save_byte_context(tmp_path_factory.mktemp("model"))


class Stopping(TokenWindows):
    """Raises after some batches."""

    error: BaseException
    after = 10**9

    def batch(self, number: int) -> TokenBatch:
        if number >= self.after:
            raise self.error
        return super().batch(number)


def windows_of(seed: int = 0, **how: Any) -> Stopping:
    return Stopping(byte_corpus(seed), 10, 3, **{"bos": BOS, **how})


def latents() -> dict[str, Autoencoder]:
    torch.manual_seed(0)
    return {"2/mine": Autoencoder(24, 16, TopK(3), location="1/resid.torso.post_mlp")}


def same(a: Collected, b: Collected) -> None:
    same_examples(a.examples, b.examples)
    np.testing.assert_array_equal(a.stratum_limits, b.stratum_limits)
    for name in ("n_tokens", "max", "min", "last_active", "histogram"):
        assert np.array_equal(getattr(a.statistics, name), getattr(b.statistics, name)), name
    np.testing.assert_allclose(a.statistics.all.m4, b.statistics.all.m4, rtol=1e-12)
    assert (a.coactivation is None) == (b.coactivation is None)
    if a.coactivation is not None and b.coactivation is not None:
        for field in fields(a.coactivation):
            pair = (getattr(each.coactivation, field.name) for each in (a, b))
            assert np.array_equal(*pair), field.name


def test_stores_hold_what_was_found(context: ModelContext, tmp_path: Path) -> None:
    what: list[Any] = [latents(), *WHAT]
    paths = collate(context, what, windows_of(), tmp_path / "out", CONFIG, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0.mlp.post_act.neurons.store",
        "1.attn.qk_probs.heads.store",
        "2.mine.store",
        "tokens",
    ]
    expected = collect(context, what, windows_of(), CONFIG)
    assert list(paths) == list(expected)
    for name, path in paths.items():
        with ExampleStore.open(path) as store:
            found = store.collected()
            assert (found.kind, found.location, found.name) == (
                expected[name].kind,
                expected[name].location,
                name,
            )
            same(found, expected[name])
            store.verify()
    with ExampleStore.open(paths["2/mine"]) as store:
        alive = int(store.alive[0])
        example = store[alive].top[0]
        assert example.value == store[alive].statistics.max


def test_other_units_of_the_same_text_go_to_the_same_folder(
    context: ModelContext, tmp_path: Path
) -> None:
    for place in WHAT:
        collate(context, place, windows_of(), tmp_path, CONFIG, progress=False)
    assert len(open_stores(tmp_path)) == 2
    before = {path: path.read_bytes() for path in tmp_path.glob("*.store")}
    # Given again, it is there; with other settings, or more to do, it is refused.
    assert set(before) == set(
        collate(context, WHAT, windows_of(), tmp_path, CONFIG, progress=False).values()
    )
    for what, config in ((WHAT[0], replace(CONFIG, top=4)), ([WHAT[0], "1/mlp.post_act"], CONFIG)):
        with pytest.raises(InputError, match="this has been collated already"):
            collate(context, what, windows_of(), tmp_path, config, progress=False)
    with pytest.raises((InputError, CheckpointError), match=r"token|text|corpus"):
        collate(context, "1/mlp.post_act", windows_of(1), tmp_path, CONFIG, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.store")}


def test_folders_that_are_refused(context: ModelContext, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        collate(context, WHAT, windows_of(), tmp_path / "file", CONFIG, progress=False)
    with pytest.raises(InputError, match="'file', which is not of a collation"):
        collate(context, WHAT, windows_of(), tmp_path, CONFIG, progress=False)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_interrupted_run_goes_on_and_other_settings_are_refused(
    context: ModelContext, tmp_path: Path, error: BaseException
) -> None:
    windows = windows_of()
    windows.error, windows.after = error, 4
    with pytest.raises(type(error)):
        collate(context, WHAT, windows, tmp_path / "out", CONFIG, progress=False, save_every_s=0)
    assert not list((tmp_path / "out").glob("*.store"))
    for other in ({"config": replace(CONFIG, top=4)}, {"windows": windows_of(seed=1)}):
        arguments: dict[str, Any] = {"windows": windows_of(), "config": CONFIG, **other}
        with pytest.raises(CheckpointError, match=r"top was 3, is 4|seed was 0, is 1|fingerprint"):
            collate(context, WHAT, out=tmp_path / "out", progress=False, **arguments)
    with pytest.raises(CheckpointError, match="settings"):
        collate(context, WHAT[:1], windows_of(), tmp_path / "out", CONFIG, progress=False)
    with (
        FileLock(tmp_path / "out" / "partial" / ".lock"),
        pytest.raises(InputError, match="another process writes to it"),
    ):
        collate(context, WHAT, windows_of(), tmp_path / "out", CONFIG, progress=False)
    collate(context, WHAT, windows_of(), tmp_path / "out", CONFIG, progress=False)
    collate(context, WHAT, windows_of(), tmp_path / "whole", CONFIG, progress=False)
    for path in (tmp_path / "whole").glob("*.store"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("number", [5, 40, 90])
def test_a_full_disk_leaves_what_was_there(
    context: ModelContext, tmp_path: Path, number: int
) -> None:
    count = [0]

    def full(kind: str, path: Path) -> None:
        count[0] += kind == "write"
        if kind == "write" and count[0] == number:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with files.watch_steps(full), pytest.raises(SourceError, match="no room"):
        collate(
            context, WHAT, windows_of(), tmp_path / "out", CONFIG, progress=False, save_every_s=0
        )
    collate(context, WHAT, windows_of(), tmp_path / "out", CONFIG, progress=False)
    collate(context, WHAT, windows_of(), tmp_path / "whole", CONFIG, progress=False)
    for path in (tmp_path / "whole").glob("*.store"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_no_process_group_where_several_processes_were_promised(
    context: ModelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="init_process_group"):
        collate(context, WHAT, windows_of(), tmp_path, CONFIG, progress=False)


# ---- two texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2/mine", "0/mlp.post_act.neurons", "1/attn.qk_probs.heads"])
def test_merged_collations_are_of_both_texts(context: ModelContext, name: str) -> None:
    what: list[Any] = [latents(), *WHAT]
    everything = replace(CONFIG, top=100, uniform=100, weighted=100, inactive=100, per_interval=100)
    a, b = (collect(context, what, windows_of(seed), CONFIG)[name] for seed in (0, 1))
    all_a, all_b = (collect(context, what, windows_of(seed), everything)[name] for seed in (0, 1))
    offset = len(windows_of().corpus.tokens)
    found = merge(a, b, offset)
    assert found.coactivation is None
    assert found.settings.get("left_out") == (None if a.kind == "head" else ["coactivation"])
    last = np.where(
        b.statistics.last_active < 0, a.statistics.last_active, b.statistics.last_active + offset
    )
    assert np.array_equal(found.statistics.last_active, last)
    assert found.statistics.n_tokens == a.statistics.n_tokens + b.statistics.n_tokens
    total = a.statistics.histogram + b.statistics.histogram
    assert np.array_equal(found.statistics.histogram, total)
    counts = {"top": 3, "uniform": 3, "weighted": 3, "inactive": 2}
    for unit in range(a.n_units):
        for group, count in counts.items():
            rows = []
            for each, first in ((all_a, 0), (all_b, offset)):
                table = each.examples.of_unit(unit, group)
                sign = -1 if group in ("top", "weighted") else 1
                rows += [
                    (sign * key, start + first, float(value))
                    for key, start, value in zip(table.key, table.start, table.value, strict=True)
                ]
            own = found.examples.of_unit(unit, group)
            assert own.rank.tolist() == list(range(len(own)))
            got = list(zip(own.start.tolist(), own.value.tolist(), strict=True))
            assert got == [row[1:] for row in sorted(rows)[:count]], group
        check_strata(found, unit, [(all_a, 0), (all_b, offset)])


def check_strata(found: Collected, unit: int, parts: list[tuple[Collected, int]]) -> None:
    """An interval has the first few of all contexts whose key is at most its limit."""
    rows = []
    for each, first in parts:
        table = each.examples.of_unit(unit, "uniform")  # every context with a positive value
        rows += list(
            zip(
                table.key.tolist(),
                (table.start + first).tolist(),
                table.value.tolist(),
                strict=True,
            )
        )
    largest = max((value for _, _, value in rows), default=0.0)
    assert found.stratum_limits is not None
    strata = found.examples.of_unit(unit, "stratum")
    for i in range(CONFIG.intervals):
        inside = sorted(
            (key, start)
            for key, start, value in rows
            if min(math.floor((1 - value / largest) * CONFIG.intervals), CONFIG.intervals - 1) == i
            and key <= found.stratum_limits[unit, i]
        )
        own = strata.rows(strata.interval == i)
        got = list(zip(own.key.tolist(), own.start.tolist(), strict=True))
        assert len(inside) <= CONFIG.per_interval
        assert got[: len(inside)] == inside
        filled = got[len(inside) :]
        assert all(key > found.stratum_limits[unit, i] for key, _ in filled)
        assert {start for _, start in filled} <= {start for _, start, _ in rows}
        # As many as are wanted, if so many are known.
        known = {
            start
            for group in ("top", "uniform", "weighted")
            for start, value in _places(found.examples.of_unit(unit, group))
            if min(math.floor((1 - value / largest) * CONFIG.intervals), CONFIG.intervals - 1) == i
        }
        assert len({start for _, start in got}) == len(got)
        assert CONFIG.per_interval >= len(got) >= min(len(known), CONFIG.per_interval)
    assert largest == 0 or 0 in strata.interval


def _places(table: ExampleTable) -> list[tuple[int, float]]:
    return list(zip(table.start.tolist(), table.value.tolist(), strict=True))


@pytest.mark.parametrize("factor", [1.005, 0.995, 1.0, 3.0])
def test_intervals_of_slightly_different_length_are_merged(factor: float) -> None:
    """What lies in an interval of one text and in its neighbour of both texts is drawn with a limit, too."""
    everything = replace(CONFIG, uniform=1000, per_interval=1000, coactivation_tokens=0, inactive=0)
    some = replace(everything, uniform=3, per_interval=2)
    corpus = collated.corpus_of([4] * 200)
    windows = TokenWindows(corpus, 4, 50, concat=False, seed=None)
    rng = np.random.default_rng(0)
    parts = []
    for number, scale in enumerate((1.0, factor)):
        values = (scale * rng.uniform(0.55, 1, size=(800, 12))).astype(np.float32)
        values[0] = scale
        for config in (some, everything):
            found = collated.collate(windows, values, config)
            examples, limits = found.examples.result()
            settings = {"config": asdict(config), "key_seed": number}
            statistics = found.totals.result()
            parts.append(
                Collected(
                    "latent", "0", "0", False, statistics, examples, None, settings, {}, limits
                )
            )
    merged = merge(parts[0], parts[2], 800)
    for unit in range(12):
        check_strata(merged, unit, [(parts[1], 0), (parts[3], 800)])


def test_stores_are_merged_with_their_texts(context: ModelContext, tmp_path: Path) -> None:
    for seed in (0, 1):
        out = tmp_path / str(seed)
        collate(context, latents(), windows_of(seed), out, CONFIG, progress=False)
    path = merge_stores(tmp_path / "0/2.mine.store", tmp_path / "1/2.mine.store", tmp_path / "both")
    with (
        ExampleStore.open(path) as merged,
        ExampleStore.open(tmp_path / "0/2.mine.store") as first,
        ExampleStore.open(tmp_path / "1/2.mine.store") as second,
    ):
        texts = [e.tokens for s in (first, second) for e in s[int(s.alive[0])].top]
        assert texts
        seen = {
            (example.value, tuple(example.tokens.tolist()))
            for store in (first, second)
            for record in store
            for example in record.examples("top")
        }
        shown = [
            (example.value, tuple(example.tokens.tolist()))
            for record in merged
            for example in record.examples("top")
        ]
        assert set(shown) <= seen
        assert any(pair in seen for pair in shown)


def test_collations_that_cannot_be_merged(context: ModelContext) -> None:
    a, b = (collect(context, WHAT, windows_of(seed), CONFIG) for seed in (0, 1))
    neurons, heads = a[f"{WHAT[0]}.neurons"], a[f"{WHAT[1]}.heads"]
    other = b[f"{WHAT[0]}.neurons"]
    with pytest.raises(InputError, match="kind is 'neuron' of one and 'head'"):
        merge(neurons, heads, 0)
    with pytest.raises(InputError, match="same text"):
        merge(neurons, neurons, 0)
    settings = {**other.settings, "config": {**other.settings["config"], "top": 9}}
    with pytest.raises(InputError, match="different settings"):
        merge(neurons, replace(other, settings=settings), 0)
    provenance = {**other.provenance, "model_sha256": "0"}
    with pytest.raises(InputError, match="model_sha256 differs"):
        merge(neurons, replace(other, provenance=provenance), 0)
    with pytest.raises(InputError, match="no limits"):
        merge(neurons, replace(other, stratum_limits=None), 0)
    with pytest.raises(InputError, match="same text"):
        merge(merge(neurons, other, 0), other, 0)
