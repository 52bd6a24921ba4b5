"""Sweeps against one full forward pass an intervention."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_explainer.analysis import sweeps
from neuron_explainer.analysis.attribution import attribution_patching
from neuron_explainer.analysis.circuits import CircuitRunner
from neuron_explainer.analysis.edges import edge_attribution
from neuron_explainer.analysis.effects import nodes
from neuron_explainer.analysis.sweeps import (
    Grid,
    active_latents,
    heads,
    neurons,
    pairs,
    patching,
    sweep,
)
from neuron_explainer.analysis.targets import (
    Reading,
    Target,
    kl,
    logit_difference,
    loss,
    probability,
    token_id,
)
from neuron_explainer.errors import HookError, InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import ablate, freeze, mean_ablate, scale, set_to, steer
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer
from tests.conftest import make_model
from tests.models.test_interventions import wrong
from tests.models.test_language_model import make

MODEL = make_model(n_layers=3)
WIDE = make_model(n_layers=3, dtype=torch.float64)
RAGGED = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
POST = "resid.torso.post_mlp"
EVEN = [[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]
STREAM = "resid.torso.post_mlp"


def last_logits(model: Any, prompts: Any, hooks: TransformerHooks | None) -> Tensor:
    """``[p, v]``, each prompt run alone."""
    return torch.stack([model([prompt], hooks=hooks)[0][0, -1] for prompt in prompts])


def reference(model: Any, prompts: Any, grid: Any, function: Any) -> np.ndarray[Any, Any]:
    """The metric of each cell by one full padded pass a cell."""
    lengths = [len(prompt) for prompt in prompts]
    found = []
    for hooks in grid:
        logits = model(prompts, hooks=hooks)[0]
        last = logits[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
        found.append(function(last).double().numpy())
    return np.stack(found)


def third(logits: Tensor) -> Tensor:
    return logits[:, 3]


def assert_equal(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(
        found.reshape(expected.shape), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("path", SITES)
@pytest.mark.parametrize("position", [None, 2, "last"], ids=str)
@torch.no_grad()
def test_every_site_at_every_layer(path: str, position: Any) -> None:
    layers = [f"{layer}/{path}" for layer in range(3)] if SITES[path].per_layer else [path]
    unit = 3 if path == "logits" else 0
    cells = [scale(place, 0.3, units=unit, positions=position) for place in layers]
    found = sweep(MODEL, RAGGED, cells, third)
    assert_equal(found.values, reference(MODEL, RAGGED, cells, third))
    assert np.abs(found.effect).max() > 1e-4


@torch.no_grad()
def test_patching_layers_and_positions() -> None:
    source = MODEL.capture([row[::-1] for row in RAGGED], STREAM)
    grid = patching(STREAM, source, positions=range(8))
    found = sweep(MODEL, RAGGED, grid, third, batch_tokens=64)
    assert found.values.shape == (3, 8, 3)
    assert_equal(found.values, reference(MODEL, RAGGED, grid, third))
    # Positions that the second row (of three tokens) does not have change nothing, exactly.
    assert (found.effect[:, 3:, 1] == 0).all()
    whole = sweep(
        MODEL, EVEN, patching(STREAM, MODEL.capture(EVEN, STREAM), positions=[0, 7]), third
    )
    assert np.abs(whole.effect).max() < 1e-6 * np.abs(whole.baseline).max()


@torch.no_grad()
def test_heads_neurons_pairs_and_batches_of_any_size() -> None:
    reference_run = MODEL.capture(EVEN, "1/mlp.post_act")
    grids: list[Grid] = [
        heads(MODEL),
        heads(MODEL, layers=[1], positions=[0, 3]),
        neurons("1/mlp.post_act", [0, [1, 2], 5]),
        neurons("1/mlp.post_act", [4], lambda at, **which: mean_ablate(at, reference_run, **which)),
        pairs(neurons("2/mlp.post_act", [0, 7, 9])),
        pairs(neurons("0/mlp.pre_act", [1, 3])),
    ]
    for grid in grids:
        expected = reference(MODEL, EVEN, grid, third)
        for batch_tokens in (16, 40, 4096):
            assert_equal(
                sweep(MODEL, EVEN, grid, third, batch_tokens=batch_tokens).values, expected
            )


def _draw(rng: np.random.Generator) -> TransformerHooks:
    """A random intervention of one to three edits."""
    total = TransformerHooks()
    for _ in range(int(rng.integers(1, 4))):
        path = str(rng.choice(list(SITES)))
        place = f"{rng.integers(3)}/{path}" if SITES[path].per_layer else path
        position: Any = [None, "last", slice(2, 6, 2), [1, 4], int(rng.integers(8))][
            rng.integers(5)
        ]
        unit = 0 if rng.random() < 0.7 else None
        total = total + scale(place, float(rng.uniform(0.1, 2.0)), units=unit, positions=position)
    return total


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_random_grids(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = [_draw(rng) for _ in range(12)]
    prompts = RAGGED if seed % 2 else EVEN
    found = sweep(MODEL, prompts, cells, third, batch_tokens=int(rng.integers(24, 200)))
    assert_equal(found.values, reference(MODEL, prompts, cells, third))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    batch_tokens=st.integers(24, 200),
    every=st.sampled_from(["loss", "kl", "own"]),
)
@torch.no_grad()
def test_random_grids_with_metrics_of_every_position(
    lengths: list[int], seed: int, batch_tokens: int, every: str
) -> None:
    """Each cell and prompt against a pass of its own, without pads."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 29, length).tolist() for length in [*lengths, 8]]
    cells = [_draw(rng) for _ in range(4)]

    def own(reading: Reading) -> Tensor:
        probs = reading.logits.softmax(dim=-1)[..., 3].masked_fill(reading.pad, 0.0)
        return probs.cumsum(dim=1).sum(dim=1)

    def alone(x: Tensor, y: Tensor, prompt: list[int]) -> float:
        if every == "loss":
            return float(torch.nn.functional.cross_entropy(x[:-1], torch.tensor(prompt[1:])))
        if every == "kl":
            p, q = y.log_softmax(-1), x.log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())
        # The pads of the batch repeat the last sum.
        sums = x.softmax(-1)[:, 3].cumsum(0)
        return float(sums.sum() + (8 - len(prompt)) * sums[-1])

    target = {
        "loss": loss(),
        "kl": kl(every_position=True),
        "own": Target("own", own, every_position=True),
    }[every]
    found = sweep(WIDE, prompts, cells, target, batch_tokens=max(batch_tokens, 8 * len(prompts)))
    for row, prompt in enumerate(prompts):
        clean = WIDE([prompt])[0][0]
        for cell, hooks in enumerate(cells):
            expected = alone(_changed(hooks, prompt), clean, prompt)
            assert found.values[cell, row] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def _changed(hooks: TransformerHooks, prompt: list[int]) -> Tensor:
    """``[s, v]``: the logits of one prompt in a batch with a longer one, which has all positions."""
    pad = torch.tensor([[False] * len(prompt) + [True] * (9 - len(prompt)), [False] * 9])
    tokens = torch.tensor([prompt + [0] * (9 - len(prompt)), [1] * 9])
    found: Tensor = WIDE(tokens, pad=pad, hooks=hooks)[0][0, : len(prompt)]
    return found


@torch.no_grad()
def test_plain_hooks_and_patterns_run_from_their_layer_on() -> None:
    def negate(x: Tensor, layer: int) -> Tensor:
        return -x

    cells = [
        TransformerHooks().append_at("2/resid.torso.post_attn", negate),
        TransformerHooks().append_at("attn.v", negate),
        freeze("1/attn.qk_probs", MODEL.capture(EVEN[::-1], "1/attn.qk_probs")),
        ablate("2/attn.k", 1, [0, 2]),
        set_to("0/attn.qk_probs", 0.25, units=2),
    ]
    assert_equal(sweep(MODEL, EVEN, cells, third).values, reference(MODEL, EVEN, cells, third))


def test_only_what_follows_is_computed() -> None:
    """The layers see no position before the first changed one, and no layer below; the last MLP sees the
    last token only, unless an intervention acts in it."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    handles = [
        layer.mlp.register_forward_hook(
            lambda module, args, out, n=n: seen.append((n, tuple(out.shape[:2])))
        )
        for n, layer in enumerate(MODEL.layers)
    ]
    try:
        run = sweep(
            MODEL, EVEN[:1], [steer("1/resid.torso.post_mlp", torch.ones(16), 1.0, 5)], third
        )
        sweep(
            MODEL,
            EVEN[:1],
            [ablate("2/mlp.post_act", units=1, positions=5), TransformerHooks()],
            third,
        )
    finally:
        for handle in handles:
            handle.remove()
    clean = [(0, (1, 8)), (1, (1, 8)), (2, (1, 8))]
    assert seen == [*clean, (2, (1, 1)), *clean, (2, (1, 3))]
    assert run.values.shape == (1, 1)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderContext:
    folder: Path = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(3)
    autoencoder = Autoencoder(40, 16, activation=TopK(4), input_normalization="layer_norm")
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    autoencoder.save(folder / "1")
    config = AutoencoderConfig("resid.torso.delta_mlp", {1: folder / "1"})
    return AutoencoderContext(config, "cpu")


@torch.no_grad()
def test_active_latents_equal_splicing_each(autoencoders: AutoencoderContext) -> None:
    grid = active_latents(MODEL, RAGGED, autoencoders, 1)
    found = sweep(MODEL, RAGGED, grid, third)
    latents = list(grid.dims["latent"])
    spliced = [
        ablate("1/resid.torso.delta_mlp", latent, autoencoders=autoencoders) for latent in latents
    ]
    assert len(latents) > 5
    assert_equal(found.values, reference(MODEL, RAGGED, spliced, third))
    assert_equal(
        sweep(MODEL, RAGGED, spliced, third).values, reference(MODEL, RAGGED, spliced, third)
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_models_of_hugging_face(kind: str) -> None:
    model = make(kind)
    cells = [ablate("0/attn.v_out", head) for head in range(4)] + [
        scale("1/mlp.post_act", 2.0, 3, "last")
    ]
    for prompts in (EVEN, RAGGED):
        found = sweep(model, prompts, cells, third, batch_tokens=64)
        assert_equal(found.values, reference(model, prompts, cells, third))


# --- metrics ---


def test_metrics_are_their_formulas() -> None:
    cells = [scale("1/mlp.post_act", 3.0), ablate("0/attn.v_out", 1, 2)]
    with torch.no_grad():
        clean, changed = MODEL(RAGGED)[0], [MODEL(RAGGED, hooks=hooks)[0] for hooks in cells]
    for target, expected in [
        (logit_difference(MODEL, [3, 4], 5), lambda x, _: x[-1, [3, 4]].mean() - x[-1, 5]),
        (logit_difference(MODEL, 7), lambda x, _: x[-1, 7]),
        (probability(MODEL, [1, 2]), lambda x, _: x[-1].softmax(-1)[[1, 2]].sum()),
        (
            kl(),
            lambda x, y: (
                y[-1].softmax(-1) * (y[-1].log_softmax(-1) - x[-1].log_softmax(-1))
            ).sum(),
        ),
        (
            kl(every_position=True),
            lambda x, y: (y.softmax(-1) * (y.log_softmax(-1) - x.log_softmax(-1))).sum(-1).mean(),
        ),
    ]:
        found = sweep(MODEL, RAGGED, cells, target)
        for cell in range(2):
            for row, prompt in enumerate(RAGGED):
                x, y = (
                    changed[cell][row, : len(prompt)].double(),
                    clean[row, : len(prompt)].double(),
                )
                assert found.values[cell, row] == pytest.approx(float(expected(x, y)), abs=1e-5)
    found = sweep(MODEL, RAGGED, cells, loss())
    for cell in range(2):
        for row, prompt in enumerate(RAGGED):
            x = changed[cell][row, : len(prompt) - 1]
            plain = torch.nn.functional.cross_entropy(x, torch.tensor(prompt[1:]))
            assert found.values[cell, row] == pytest.approx(float(plain), abs=1e-5)


@torch.no_grad()
def test_targets_of_each_prompt() -> None:
    found = sweep(
        MODEL, EVEN, [scale("0/mlp.post_act", 2.0)], logit_difference(MODEL, [[1], [2]], [[3], [4]])
    )
    logits = last_logits(MODEL, EVEN, None)
    assert found.baseline.tolist() == pytest.approx(
        [float(logits[0, 1] - logits[0, 3]), float(logits[1, 2] - logits[1, 4])], abs=1e-5
    )
    cells = [scale("0/mlp.post_act", 2.0)]
    with pytest.raises(InputError, match="2 sets of tokens, for 3 prompts"):
        sweep(MODEL, RAGGED, cells, logit_difference(MODEL, [[1], [2]]))


def test_targets_must_be_single_tokens() -> None:
    model = Transformer.load("tiny-tales")
    assert token_id(model, " the") == model.prompt_ids(" the")[0][0]
    with pytest.raises(InputError, match=r"must be one token.* is [0-9]+: "):
        token_id(model, " extraordinarily unlikely")
    with pytest.raises(InputError, match="is 0: none"):
        token_id(model, "")
    with pytest.raises(InputError, match="0 to 28, found 29"):
        token_id(MODEL, 29)
    assert token_id(MODEL, wrong(np.int64(3))) == token_id(MODEL, wrong(torch.tensor(3))) == 3
    for nothing in (None, 1.5, True, torch.tensor(0.5)):
        with pytest.raises(InputError, match="a text or an id of 0 to 28, found"):
            logit_difference(MODEL, wrong(nothing))
    with pytest.raises(InputError, match="2 sets of tokens, against 3"):
        logit_difference(MODEL, [[1], [2]], [[3], [4], [5]])


def test_tokens_may_be_of_any_kind_and_count_once() -> None:
    def measured(target: Target) -> Any:
        return sweep(MODEL, EVEN, [ablate("0/mlp.post_act")], target).values

    expected = measured(logit_difference(MODEL, [6, 8], 12))
    for tokens in (np.array([6, 8]), torch.tensor([6, 8]), (6, np.int64(8))):
        found = measured(logit_difference(MODEL, wrong(tokens), wrong(np.int64(12))))
        assert np.array_equal(found, expected)
    assert np.array_equal(measured(probability(MODEL, [3, 3])), measured(probability(MODEL, 3)))


# --- results ---


def test_the_result_names_what_it_holds() -> None:
    found = sweep(MODEL, EVEN, heads(MODEL), third)
    (layer, head), effect = found.top(1)[0]
    assert found.mean[int(str(layer)), int(str(head))] == pytest.approx(effect)
    assert abs(effect) == pytest.approx(np.abs(found.mean).max())
    assert f"layer {layer}, head {head}: {effect:+.4g}" in str(found)
    other = found.baseline + 2.0
    np.testing.assert_allclose(found.normalised(other), found.effect / 2.0)
    with pytest.raises(InputError, match="same metric"):
        found.normalised(found.baseline)
    with pytest.raises(InputError, match=r"each of 2 prompts, found \[3\]"):
        found.normalised([1.0, 2.0, 3.0])


def test_the_result_counts_in_words() -> None:
    groups = neurons("0/mlp.post_act", [1, [2, 3]])
    assert str(sweep(MODEL, EVEN, groups, third)).startswith("Sweep(2 units, 2 prompts;")
    both = sweep(MODEL, EVEN[:1], pairs(groups), third)
    assert str(both).startswith("Sweep(1 units pair, 1 prompt;")


def test_tables_and_plots() -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("matplotlib").use("agg")
    found = sweep(MODEL, EVEN, heads(MODEL), third)
    table = found.to_dataframe()
    assert isinstance(table, pandas.DataFrame)
    row = table[(table["layer"] == 1) & (table["head"] == 2) & (table["prompt"] == 1)]
    assert float(row["value"].iloc[0]) == found.values[1, 2, 1]
    assert found.plot().axes[0].get_xlabel() == "head"
    with pytest.raises(InputError, match=r"found 2 for a grid of \[3, 4\]"):
        found.plot(labels=["a", "b"])
    assert sweep(MODEL, EVEN, neurons("0/mlp.post_act", [1, 2]), third).plot().axes


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda: sweep(MODEL, EVEN, heads(MODEL), third, batch_tokens=8),
            InputError,
            "hold 16 tokens",
        ),
        (lambda: sweep(MODEL, EVEN, heads(MODEL), lambda x: x), InputError, "one number a row"),
        (lambda: sweep(MODEL, EVEN, [ablate("0/mlp.post_act", 1, 9)], third), HookError, "outside"),
        (
            lambda: sweep(MODEL, EVEN, wrong(ablate("0/mlp.post_act")), third),
            InputError,
            "in a list",
        ),
        (lambda: sweep(MODEL, EVEN, [], third), InputError, "at least one label"),
        (lambda: pairs(heads(MODEL)), InputError, "one dimension"),
        (
            lambda: sweep(MODEL, EVEN, heads(MODEL), wrong("third")),
            InputError,
            r"a metric is a Target, such as logit_difference\(model, 'third'\)",
        ),
        (
            lambda: sweep(MODEL, EVEN, heads(MODEL), third, batch_tokens=wrong(64.5)),
            InputError,
            "batch_tokens must be a whole number",
        ),
        (
            lambda: patching(POST, wrong(torch.zeros(1, 2, 16)), positions=[0]),
            InputError,
            "source is what model.capture",
        ),
        (
            lambda: patching("mlp.post_act", MODEL.capture(EVEN, POST), positions=[0]),
            InputError,
            r"holds mlp.post_act in layers \[\]",
        ),
        (
            lambda: patching(POST, MODEL.capture([[1, 2], [3]], POST), positions=[1, 2]),
            InputError,
            r"position 2 has no counterpart .* longest prompt has 2 tokens",
        ),
        (
            lambda: patching(
                POST, MODEL.capture(EVEN, POST), positions=[0, 1], index_map=torch.tensor([0, -1])
            ),
            InputError,
            "position 1 has no counterpart in the source: index_map has none",
        ),
    ],
)
def test_bad_input(run: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        run()


def test_targets_are_values() -> None:
    target = Target("mine", lambda reading: reading.logits[:, 0])
    assert repr(target) == "Target('mine')"
    assert sweeps.Grid({"a": [1]}, lambda a: ablate("0/mlp.post_act", a)).shape == (1,)


def test_half_precision_and_losses_of_single_tokens() -> None:
    model = make_model(dtype=torch.bfloat16)
    found = sweep(model, [[1, 2, 3]], heads(model, layers=[0]), third)
    assert np.abs(found.effect).max() > 0
    with pytest.raises(InputError, match="at least two tokens"):
        sweep(MODEL, [[1, 2, 3], [4]], heads(MODEL, layers=[0]), loss())


@torch.no_grad()
@pytest.mark.parametrize(
    ("location", "layers"), [("attn.v_out", (1,)), ("resid.torso.delta_mlp", (None,))], ids=str
)
def test_active_latents_of_joined_heads_and_of_one_autoencoder_for_all_layers(
    location: str, layers: Any, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    autoencoder = Autoencoder(40, 16, activation=TopK(4), input_normalization="layer_norm")
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    autoencoder.save(tmp_path / "a")
    config = AutoencoderConfig(location, dict.fromkeys(layers, tmp_path / "a"))
    context = AutoencoderContext(config, "cpu")
    grid = active_latents(MODEL, RAGGED, context, 1)
    latents = list(grid.dims["latent"])
    spliced = [ablate(f"1/{location}", latent, autoencoders=context) for latent in latents]
    found = sweep(MODEL, RAGGED, grid, third)
    assert np.abs(found.effect).max() > 1e-3
    assert_equal(found.values, reference(MODEL, RAGGED, spliced, third))
    assert_equal(sweep(MODEL, RAGGED, spliced, third).values, found.values)


def test_a_target_that_is_nan_on_the_unchanged_run_is_refused() -> None:
    model = make_model()
    with torch.no_grad():
        next(iter(model.layers)).attn.v_proj.bias[0] = torch.nan
    target = logit_difference(model, 6, 12)
    for run in (
        lambda: sweep(model, EVEN, heads(model), target),
        lambda: nodes(model, EVEN[0], target),
        lambda: attribution_patching(model, EVEN[0], EVEN[1], target),
        lambda: edge_attribution(model, EVEN[:1], EVEN[1:2], target),
        lambda: CircuitRunner(model, EVEN[:1], EVEN[1:2], target),
    ):
        with pytest.raises(InputError, match="NaN on the unchanged run of prompt 0"):
            run()
