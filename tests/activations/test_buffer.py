"""The buffer: each row once, refills at half, one order with or without a thread, exact resumption."""

import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_explainer.activations import (
    ActivationBatch,
    ActivationSource,
    Harvester,
    LiveSource,
    Prefetcher,
    ShuffleBuffer,
    StoreSource,
    TokenWindows,
    harvest_to_store,
)
from neuron_explainer.errors import CheckpointError, InputError, LocationError
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from tests.activations.helpers import SITE, ListSource, as_rows, harvest_all, random_corpus

PLACE = ActivationLocation.parse(SITE)
OTHER = ActivationLocation.parse("0/resid.torso.post_mlp")
LENGTHS = [5, 12, 30, 2, 17, 26]


def numbered(sizes: list[int]) -> ListSource:
    """Chunks of these sizes, whose rows are 0, 1, 2, …, at two locations (the other one negative)."""
    ends = list(itertools.accumulate(sizes))
    batches = []
    for size, end in zip(sizes, ends, strict=True):
        rows = torch.arange(end - size, end)
        x = rows[:, None].float()
        batches.append(ActivationBatch({PLACE: x, OTHER: -x}, rows, rows, rows))
    return ListSource(batches)


def buffer_of(sizes: list[int], capacity: int, batch_size: int, **options: Any) -> ShuffleBuffer:
    options = dict[str, Any](pair=(PLACE, OTHER), prefetch=False) | options
    return ShuffleBuffer(numbered(sizes), capacity, batch_size, **options)


def values(batches: Any) -> list[list[int]]:
    return [x[:, 0].int().tolist() for x, _ in batches]


shapes = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(sum),
    st.integers(2, 50),
    st.integers(1, 9),
).filter(lambda shape: shape[1] >= 2 * shape[2])


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 3))
def test_each_row_comes_out_once_in_whole_batches(
    shape: tuple[list[int], int, int], seed: int
) -> None:
    sizes, capacity, batch_size = shape
    found = values(buffer_of(sizes, capacity, batch_size, seed=seed))
    assert sorted(itertools.chain(*found)) == list(range(sum(sizes)))
    assert {len(batch) for batch in found[:-1]} <= {batch_size}
    assert 0 < len(found[-1]) <= batch_size


@settings(max_examples=40, deadline=None)
@given(shape=shapes, stop=st.integers(0, 30), prefetch=st.booleans())
def test_resuming_anywhere_equals_going_on(
    shape: tuple[list[int], int, int], stop: int, prefetch: bool
) -> None:
    sizes, capacity, batch_size = shape
    whole = values(buffer_of(sizes, capacity, batch_size))
    first = buffer_of(sizes, capacity, batch_size, prefetch=prefetch)
    taken = values(itertools.islice(first, stop))
    state = first.state_dict()
    unread = state.pop("unread")
    state = json.loads(json.dumps(state)) | {"unread": unread}
    going_on = values(first)
    second = buffer_of(sizes, capacity, batch_size, prefetch=prefetch)
    next(second, None)  # whatever it has done before
    second.load_state_dict(state)
    assert taken + going_on == whole
    assert values(second) == going_on


@pytest.mark.parametrize(
    ("capacity", "batch_size"), [(40, 4), (40, 3), (41, 5), (42, 21), (100, 7)]
)
def test_refills_exactly_at_half(capacity: int, batch_size: int) -> None:
    buffer = buffer_of([9] * 100, capacity, batch_size)
    next(buffer)
    assert (buffer.refills, buffer.unread) == (1, capacity - batch_size)
    for _ in range(500 // batch_size):
        before, refills = buffer.unread, buffer.refills
        next(buffer)
        if before < capacity / 2:
            assert (buffer.refills, buffer.unread) == (refills + 1, capacity - batch_size)
        else:
            assert (buffer.refills, buffer.unread) == (refills, before - batch_size)


@pytest.mark.parametrize(("capacity", "batch_size"), [(40, 4), (41, 5), (43, 21)])
def test_no_row_stays_for_more_than_three_refills(capacity: int, batch_size: int) -> None:
    buffer = buffer_of([9] * 400, capacity, batch_size)
    stays: Counter[int] = Counter()
    came: dict[int, int] = {}
    for _ in range(150):
        (numbers,) = values([next(buffer)])
        state = buffer.state_dict()
        for row in state["unread"].tolist():
            came.setdefault(row[1] * 9 + row[2], row[3])
        for value in numbers:
            stays[buffer.refills - 1 - came.get(value, buffer.refills - 1)] += 1
        assert state["unread"][:, 3].min() >= buffer.refills - 3
    assert set(stays) == {0, 1, 2}


def test_the_order_is_mixed_and_the_seeds_are_apart() -> None:
    first, again, other = (
        list(itertools.chain(*values(buffer_of([50] * 40, 400, 20, seed=seed))))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    steps = torch.tensor(first).diff()
    assert (steps == 1).float().mean() < 0.02  # neighbours no longer stand together
    # A batch has rows of many chunks: 20 draws from at least 400 rows, that is, 8 chunks.
    n_chunks = [len({row // 50 for row in first[i : i + 20]}) for i in range(0, 2000, 20)]
    assert sum(n_chunks) / len(n_chunks) > 5


def test_old_rows_and_new_are_mixed_in_every_batch() -> None:
    buffer = buffer_of([50] * 60, 400, 20)
    while buffer.refills < 6:
        next(buffer)
    came = buffer.state_dict()["unread"][:, 3]  # at which refill, in the order of reading
    for begin in range(0, 160, 40):
        assert set(came[begin : begin + 40].tolist()) == {3, 4, 5}


@settings(max_examples=20, deadline=None)
@given(shape=shapes)
def test_a_thread_changes_nothing(shape: tuple[list[int], int, int]) -> None:
    sizes, capacity, batch_size = shape
    with buffer_of(sizes, capacity, batch_size, prefetch=True) as buffer:
        assert values(buffer) == values(buffer_of(sizes, capacity, batch_size))


def test_num_tokens_in_all(caplog: pytest.LogCaptureFixture) -> None:
    found = values(buffer_of([7] * 40, 20, 4, num_tokens=50))
    assert sorted(itertools.chain(*found)) == list(range(50))
    assert not caplog.records
    found = values(buffer_of([7] * 4, 20, 4, num_tokens=50))
    assert len(list(itertools.chain(*found))) == 28
    assert "ended after 28 activations, fewer than num_tokens = 50" in caplog.text


def test_settings_that_cannot_be() -> None:
    with pytest.raises(
        InputError, match=r"num_tokens is 3, less than one batch of 4: there would be no"
    ):
        buffer_of([9], 20, 4, num_tokens=3)
    with pytest.raises(InputError, match=r"at least two batches .* found 7 with batch_size 4"):
        buffer_of([9], 7, 4)
    with pytest.raises(InputError, match="gave no activations"):
        next(buffer_of([0, 0], 20, 4))
    missing = ActivationLocation("mlp.pre_act", 0)
    with pytest.raises(LocationError, match=r"pair names 0/mlp\.pre_act; the source has 1/mlp"):
        next(buffer_of([9], 20, 4, pair=(PLACE, missing)))


def test_the_state_of_another_buffer_is_refused() -> None:
    state = buffer_of([9] * 9, 20, 4).state_dict()
    with pytest.raises(CheckpointError, match="buffer_seed was 0, is 1; capacity was 20, is 22"):
        buffer_of([9] * 9, 22, 4, seed=1).load_state_dict(state)


def test_a_source_that_has_changed_is_refused() -> None:
    buffer = buffer_of([9] * 9, 20, 4)
    next(buffer)
    for sizes in ([9], [8] * 9):
        with pytest.raises(CheckpointError, match="no longer gives all rows of chunk"):
            buffer_of(sizes, 20, 4).load_state_dict(buffer.state_dict())


# --- from a model, from a store ---


def live(context: ModelContext, *places: str, **options: Any) -> LiveSource:
    windows = TokenWindows(random_corpus(LENGTHS), 8, 3, **({"bos": 0} | options))
    return LiveSource(Harvester(context, places or SITE, keep_bos=False), windows)


def tensors(batches: Any) -> list[Tensor]:
    found = list(batches)
    assert all(x.dtype == torch.float32 for x in found)
    return found


@pytest.mark.parametrize("epochs", [1, 3])
def test_each_activation_once_an_epoch(context: ModelContext, epochs: int) -> None:
    source = live(context, epochs=epochs)
    once = harvest_all(context, live(context).windows, keep_bos=False).activations[PLACE]
    assert len(once) == sum(LENGTHS)  # no pad, no start token
    with ShuffleBuffer(source, 30, 4) as buffer:
        found = torch.cat(tensors(buffer))
    whole = ActivationBatch.cat([source.harvester(batch) for batch in source.windows])
    assert Counter(as_rows(found)) == Counter(as_rows(whole.activations[PLACE]))
    assert len(found) == epochs * len(once)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 6, 20])
def test_a_live_harvest_resumes_to_the_bit(
    context: ModelContext, stop: int, prefetch: bool
) -> None:
    def buffer() -> ShuffleBuffer:
        source = live(context, epochs=None)
        return ShuffleBuffer(source, 30, 4, num_tokens=200, prefetch=prefetch)

    with buffer() as uninterrupted, buffer() as first, buffer() as second:
        whole = tensors(uninterrupted)
        for _ in range(stop):
            next(first)
        second.load_state_dict(first.state_dict())
        rest = tensors(second)
    assert len(rest) == len(whole) - stop
    assert all(map(torch.equal, rest, whole[stop:]))
    assert sum(map(len, whole)) == 200


def test_several_locations_of_the_same_tokens(context: ModelContext) -> None:
    source = live(context, SITE, str(OTHER))
    whole = ActivationBatch.cat([source.harvester(batch) for batch in source.windows])
    both = torch.cat([whole.activations[PLACE], whole.activations[OTHER]], dim=1)
    with ShuffleBuffer(source, 30, 4) as buffer:
        found: Any = list(buffer)
    assert all(list(batch) == [PLACE, OTHER] for batch in found)
    joined = torch.cat([torch.cat([batch[PLACE], batch[OTHER]], dim=1) for batch in found])
    assert Counter(as_rows(joined)) == Counter(as_rows(both))
    with ShuffleBuffer(source, 30, 4, pair=(str(OTHER), SITE)) as buffer:
        pair: Any = next(buffer)
    assert torch.equal(pair[0], found[0][OTHER])
    assert torch.equal(pair[1], found[0][PLACE])


def test_a_store_is_read_once_an_epoch_in_another_order(
    tmp_path: Any, context: ModelContext
) -> None:
    source = live(context)
    store = harvest_to_store(
        tmp_path / "s", source.harvester, source.windows, dtype="bf16", shard_rows=20
    )
    rows = Counter(as_rows(store.rows(0, len(store)).activations[PLACE].float()))

    def read(**options: Any) -> list[Tensor]:
        with ShuffleBuffer(StoreSource(store, 8, **options), 30, 4) as buffer:
            return tensors(buffer)

    assert Counter(as_rows(torch.cat(read()))) == rows
    two = torch.cat(read(epochs=2))
    assert Counter(as_rows(two)) == rows + rows
    assert torch.equal(torch.cat(read()), torch.cat(read()))
    assert not torch.equal(torch.cat(read(seed=1)), torch.cat(read()))
    in_order = StoreSource(store, 8, seed=None)
    chunks = [in_order.chunk(number) for number in range(3)]
    assert torch.equal(
        torch.cat([chunk.tokens for chunk in chunks if chunk]), store.rows(0, 24).tokens
    )
    orders = StoreSource(store, 8, epochs=None)
    n_runs = -(-len(store) // 8)
    epochs: list[list[Any]] = [
        [orders.chunk(epoch * n_runs + i) for i in range(n_runs)] for epoch in (0, 1)
    ]
    assert [c.tokens.tolist() for c in epochs[0]] != [c.tokens.tolist() for c in epochs[1]]
    shared = [StoreSource(store, 8, rank=rank, world=3) for rank in range(3)]
    for number in range(n_runs):
        part = shared[number % 3].chunk(number // 3)
        assert part is not None
        assert torch.equal(part.tokens, epochs[0][number].tokens)
    assert all(source.chunk(n_runs) is None for source in shared)
    with ShuffleBuffer(orders, 30, 4) as first, ShuffleBuffer(orders, 30, 4) as second:
        for _ in range(25):
            next(first)
        second.load_state_dict(first.state_dict())
        for _ in range(25):
            assert torch.equal(next(first), next(second))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chunk_rows 0"):
        StoreSource(store, 0)


# --- the thread ---


class Failing:
    """Fails at a chunk, once or for ever."""

    forward_s = 0.0

    def __init__(self, source: ActivationSource, at: int, times: int) -> None:
        self.source, self.at, self.left = source, at, times

    def chunk(self, number: int) -> ActivationBatch | None:
        if number == self.at and self.left:
            self.left -= 1
            raise OSError("the disk went away")
        return self.source.chunk(number)

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_error_of_the_source_arrives_and_nothing_is_lost(prefetch: bool) -> None:
    expected = values(buffer_of([5] * 20, 20, 4))
    source = Failing(numbered([5] * 20), at=9, times=1)
    found: list[Any] = []
    with ShuffleBuffer(source, 20, 4, pair=(PLACE, OTHER), prefetch=prefetch) as buffer:
        with pytest.raises(OSError, match="went away"):
            drain(buffer, found)
        buffer.close()  # and on again, after the disk is back
        found += list(buffer)
    assert values(found) == expected


def drain(buffer: ShuffleBuffer, into: list[Any]) -> None:
    for batch in buffer:
        into.append(batch)  # kept also if an error comes after


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "activations"]


def test_stopping_early_ends_the_thread() -> None:
    with buffer_of([5] * 50, 20, 4, prefetch=True) as buffer:
        next(buffer)
        assert threads()
    assert not threads()
    abandoned = buffer_of([5] * 50, 20, 4, prefetch=True)
    next(abandoned)
    assert threads()
    del abandoned
    gc.collect()
    assert not threads()


def test_an_interpreter_that_ends_in_the_middle_does_not_hang() -> None:
    script = """
import itertools, time
from neuron_explainer.activations import Prefetcher
p = Prefetcher(lambda n: time.sleep(0.01) or [n], 0, 3)
print([p.get() for _ in range(3)])
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == "[[0], [1], [2]]"
    assert not run.stderr


def test_the_thread_stays_within_its_rows_and_its_wait_is_measured() -> None:
    gate, ahead, asked_for = threading.Event(), threading.Event(), 0

    def fetch(number: int) -> list[int] | None:
        gate.wait(10)
        if number == 5:
            ahead.set()
        # Three chunks of four rows may lie ready when it begins another one: 8 < 10 <= 12.
        assert number - 2 - asked_for < 3
        return None if number == 9 else [number] * 4

    began = time.perf_counter()
    prefetcher = Prefetcher(fetch, 2, ahead=10)
    asked_for = 1
    gate.set()
    assert prefetcher.get() == [2] * 4
    assert 0 < prefetcher.waited_s <= time.perf_counter() - began
    assert ahead.wait(10), "it fetches while nobody asks"
    for number in range(3, 9):
        asked_for += 1
        assert prefetcher.get() == [number] * 4
    assert prefetcher.get() is None
    assert prefetcher.get() is None
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.get()


def test_who_waits_for_a_thread_is_counted(context: ModelContext) -> None:
    for prefetch in (True, False):
        with ShuffleBuffer(live(context), 30, 4, prefetch=prefetch) as buffer:
            list(buffer)
        assert (buffer.waited_s > 0) == prefetch
        assert buffer.forward_s > 0
