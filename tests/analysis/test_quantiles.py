"""Quantiles of equal count against numpy."""

import numpy as np
import pytest

from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis import CollateConfig, collect, exact_quantiles
from neuron_explainer.analysis.records import ExampleTable
from neuron_explainer.errors import InputError
from neuron_explainer.models.model_context import ModelContext
from tests.activations.helpers import random_corpus, save_context
from tests.analysis.collated import u_of

EVERYTHING = CollateConfig(top=1000, window=5, head_window=4)
NEURONS, HEADS = "0/mlp.post_act.neurons", "1/attn.qk_probs.heads"
WHAT = ["0/mlp.post_act", "1/attn.qk_probs"]
UNITS = {NEURONS: [7, 2, 11], HEADS: [1]}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    return save_context(tmp_path_factory.mktemp("model") / "tiny")


def windows_of(batch: int = 3, seed: int | None = 0) -> TokenWindows:
    return TokenWindows(random_corpus([14, 3, 25, 9, 9, 1, 12] * 3), 6, batch, bos=0, seed=seed)


def query(table: ExampleTable, pairs: bool) -> np.ndarray:
    peak = table.peak.astype(int)
    row = (np.sqrt(8 * peak + 1).astype(int) - 1) // 2 if pairs else peak
    found: np.ndarray = table.start + row
    return found


@pytest.mark.parametrize("n", [1, 4, 100])
def test_quantiles_are_slices_of_the_sorted_contexts(context: ModelContext, n: int) -> None:
    whole = collect(context, WHAT, windows_of(), EVERYTHING)
    found = exact_quantiles(context, WHAT, windows_of(), UNITS, n, 2, EVERYTHING)
    assert list(found) == [NEURONS, HEADS]
    for name, quantiles in found.items():
        assert quantiles.unit.tolist() == sorted(UNITS[name])
        pairs, seed = name == HEADS, whole[name].settings["key_seed"]
        for row, unit in enumerate(quantiles.unit.tolist()):
            table = whole[name].examples.of_unit(unit, "top")  # every context, by value
            assert len(table) > 5
            for i, part in enumerate(np.array_split(np.arange(len(table)), n)):
                values = table.value[part]
                assert quantiles.count[row, i] == len(part)
                assert quantiles.largest[row, i] == (values[0] if len(part) else 0)
                assert quantiles.smallest[row, i] == (values[-1] if len(part) else 0)
                own = quantiles.examples.of_unit(unit)
                own = own.rows(own.interval == i)
                at = query(table, pairs)
                u = [np.float32(u_of(seed, unit, int(at[k]))) for k in part]
                drawn = part[np.argsort(u, kind="stable")[:2]]
                assert own.start.tolist() == table.start[drawn].tolist()
                assert own.value.tolist() == table.value[drawn].tolist()
                assert np.array_equal(own.activations, table.activations[drawn])
                assert own.rank.tolist() == list(range(len(drawn)))


def test_batches_change_nothing(context: ModelContext) -> None:
    one, other = (
        exact_quantiles(context, WHAT[0], windows_of(*how), {NEURONS: [2]}, 4)[NEURONS]
        for how in ((3, 0), (100, None))
    )
    assert np.array_equal(one.count, other.count)
    np.testing.assert_allclose(one.largest, other.largest, rtol=1e-5)
    assert one.examples.start.tolist() == other.examples.start.tolist()


def test_what_cannot_be_chosen(context: ModelContext) -> None:
    for units, match in (
        ({"other": [0]}, "is not looked at"),
        ({NEURONS: [10_000]}, "found 10000"),
        ({NEURONS: []}, "no units"),
    ):
        with pytest.raises(InputError, match=match):
            exact_quantiles(context, WHAT[0], windows_of(), units)
    with pytest.raises(InputError, match="n must be"):
        exact_quantiles(context, WHAT[0], windows_of(), {NEURONS: [0]}, 0)
