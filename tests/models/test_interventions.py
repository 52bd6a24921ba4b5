"""Interventions against plain edits of tensors, one experiment at a time."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.autoencoders.pruned import get_decoder_weight
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import (
    ablate,
    align,
    clamp,
    freeze,
    mean_ablate,
    patch_from,
    positions_where,
    project_out,
    resample_ablate,
    scale,
    set_to,
    steer,
)
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer
from tests.conftest import make_model, random_tokens
from tests.models.test_language_model import make

TOKENS = random_tokens(3, 8, seed=5)
STREAM = "1/resid.torso.post_attn"
VECTOR_SITES = [path for path, site in SITES.items() if "k" not in site.shape[2:]]
MODEL = make_model().double()


def seen(
    hooks: TransformerHooks, location: str, model: Any = MODEL, tokens: Tensor = TOKENS
) -> Tensor:
    """The activation at a location, after hooks."""
    found: Tensor = model.capture(tokens, location, hooks=hooks)[location]
    return found


def logits(
    hooks: TransformerHooks | None, model: Any = MODEL, tokens: Any = TOKENS, **more: Any
) -> Tensor:
    found: Tensor = model(tokens, hooks=hooks, **more)[0]
    return found


def plain(location: str, edit: Any) -> Tensor:
    """Logits with a hand-written hook."""
    return logits(TransformerHooks().append_at(location, edit))


@pytest.mark.parametrize("path", SITES)
@pytest.mark.parametrize("positions", [None, 2, [1, 4], slice(3, None, 2), "last"], ids=str)
def test_set_to_sets_the_units_at_the_positions_and_nothing_else(path: str, positions: Any) -> None:
    site = SITES[path]
    location = f"1/{path}" if site.per_layer else path
    before = seen(TransformerHooks(), location)
    after = seen(set_to(location, 0.5, units=0, positions=positions), location)
    expected = before.clone()
    rows: Any = (
        {None: slice(None), "last": -1}.get(positions, positions)
        if isinstance(positions, str | None)
        else positions
    )
    if site.shape[-1] == "d_head":
        expected[:, rows, 0, :] = 0.5
    else:
        expected[:, rows, ..., 0] = 0.5
    assert torch.equal(after, expected)


def test_each_value_edit_is_its_formula() -> None:
    x = seen(TransformerHooks(), STREAM)
    for hooks, expected in [
        (ablate(STREAM), torch.zeros_like(x)),
        (scale(STREAM, -2.0), -2 * x),
        (clamp(STREAM, -0.1, 0.2), x.clamp(-0.1, 0.2)),
        (clamp(STREAM, minimum=0.0), x.clamp(min=0)),
        (set_to(STREAM, torch.arange(16.0)), torch.arange(16.0).double().expand_as(x)),
    ]:
        assert torch.equal(seen(hooks, STREAM), expected)


def test_numbers_keep_all_their_bits() -> None:
    x = seen(TransformerHooks(), STREAM)
    assert torch.equal(seen(scale(STREAM, 1 + 1e-12), STREAM), x * (1 + 1e-12))
    assert torch.equal(seen(set_to(STREAM, 0.1), STREAM), torch.full_like(x, 0.1))


def test_units_are_neurons_heads_and_channels_of_heads() -> None:
    place, value = "0/attn.v_out", seen(TransformerHooks(), "0/attn.v_out")
    heads, channels = value.clone(), value.clone()
    heads[:, :, [1, 3]] = 0
    channels[..., 3, 1] = channels[..., 0, 2] = 0
    assert torch.equal(seen(ablate(place, [3, 1]), place), heads)
    assert torch.equal(seen(ablate(place, ["3.1", "0.2"]), place), channels)
    assert torch.equal(seen(set_to(place, 0.0, ["3.1", "0.2"]), place), channels)
    assert torch.equal(seen(set_to(place, torch.zeros(1, 1, 2), ["3.1", "0.2"]), place), channels)
    for hooks in (
        scale(place, 1.0, "3.1"),
        mean_ablate(place, value, "3.1"),
        resample_ablate(place, value, "3.1"),
        patch_from(place, value, "3.1"),
    ):
        found = seen(hooks, place)
        found[..., 3, 1] = value[..., 3, 1]
        assert torch.equal(found, value)
    with pytest.raises(InputError, match="either heads or channels"):
        ablate(place, [1, "3.1"])


def test_steering_units() -> None:
    x, direction = seen(TransformerHooks(), STREAM), torch.randn(16, dtype=torch.float64)
    unit = direction / direction.norm()
    for hooks, expected in [
        (steer(STREAM, direction, 3.0), x + 3 * direction),
        (steer(STREAM, direction, 0.5, unit="norm"), x + 0.5 * x.norm(dim=-1, keepdim=True) * unit),
        (steer(STREAM, direction, 2.0, unit="max", maximum=7.0), x + 14 * direction),
    ]:
        torch.testing.assert_close(seen(hooks, STREAM), expected)
    with pytest.raises(InputError, match="not all zero"):
        steer(STREAM, torch.zeros(16), 1.0)
    with pytest.raises(InputError, match="finite"):
        steer(STREAM, torch.full((16,), torch.nan), 1.0)
    with pytest.raises(InputError, match="belong together"):
        steer(STREAM, direction, 1.0, unit="max")
    with pytest.raises(HookError, match=r"values are \[5\] for each token, expected \[16\]"):
        logits(steer(STREAM, torch.ones(5), 1.0))


def test_project_out_leaves_nothing_in_the_span() -> None:
    directions = [torch.randn(16, dtype=torch.float64) for _ in range(2)]
    hooks = project_out(STREAM, [*directions, directions[0] + directions[1]])
    after = seen(hooks, STREAM)
    assert (after @ torch.stack(directions).T).abs().max() < 1e-12
    again = seen(hooks + project_out(STREAM, directions[0]), STREAM)
    torch.testing.assert_close(again, after)


# --- other runs ---


@pytest.mark.parametrize("path", [path for path in SITES if path != "attn.qk_softmax_denominator"])
def test_patching_a_run_with_itself_changes_no_bit_and_with_everything_gives_the_other_run(
    path: str,
) -> None:
    location = f"0/{path}" if SITES[path].per_layer else path
    other = random_tokens(3, 8, seed=9)
    here, there = MODEL.capture(TOKENS, location), MODEL.capture(other, location)
    assert torch.equal(seen(patch_from(location, here), location), here[location])
    assert torch.equal(seen(patch_from(location, there), location), there[location])


def test_patching_the_whole_stream_gives_the_other_runs_logits() -> None:
    other = random_tokens(3, 8, seed=9)
    values = MODEL.capture(other, STREAM)
    # Of one layer; earlier positions do not matter to what comes after it.
    torch.testing.assert_close(logits(patch_from(STREAM, values)), logits(None, tokens=other))


def test_patching_with_an_index_map_and_rows_of_other_lengths() -> None:
    source = MODEL.capture([[3, 4, 5], [6, 7, 8, 9]], STREAM)
    index_map = torch.tensor([2, -1, 0, 3, -1, -1, -1, -1])
    two = TOKENS[:2]
    after = seen(patch_from(STREAM, source, index_map=index_map), STREAM, tokens=two)
    expected = seen(TransformerHooks(), STREAM, tokens=two).clone()
    expected[:, 0], expected[:, 2] = source[STREAM][:, 2], source[STREAM][:, 0]
    expected[1, 3] = source[STREAM][1, 3]  # the first row has no position 3
    assert torch.equal(after, expected)
    with pytest.raises(HookError, match="2 rows, the batch 3"):
        logits(patch_from(STREAM, source))


def test_left_padded_values_are_taken_by_position() -> None:
    pad = torch.tensor([[True, True, False, False, False]])
    tokens = torch.tensor([[0, 0, 7, 8, 9]])
    padded = MODEL.capture(tokens, STREAM, pad=pad)
    solo = MODEL.capture([[7, 8, 9]], STREAM)
    a, b = (seen(patch_from(STREAM, x), STREAM, tokens=TOKENS[:1]) for x in (padded, solo))
    torch.testing.assert_close(a, b)


def test_align() -> None:
    assert align([1, 2, 3, 4], [9, 1, 2, 4]).tolist() == [1, 2, -1, 3]
    assert align([1, 2, 3], [1, 5, 3]).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="no token in common"):
        align([1, 2], [3, 4, 5])


def test_mean_ablation() -> None:
    reference = MODEL.capture([[1, 2, 3, 4], [5, 6], [7, 8, 9]], STREAM)
    rows = [reference[STREAM][i, :n] for i, n in enumerate([4, 2, 3])]
    after = seen(mean_ablate(STREAM, reference, units=[2, 5]), STREAM)
    expected = seen(TransformerHooks(), STREAM).clone()
    expected[..., [2, 5]] = torch.cat(rows).mean(dim=0)[[2, 5]]
    torch.testing.assert_close(after, expected)
    four = TOKENS[:, :4]
    by_place = seen(mean_ablate(STREAM, reference, per_position=True), STREAM, tokens=four)
    for place in range(4):
        mean = torch.stack([row[place] for row in rows if len(row) > place]).mean(dim=0)
        torch.testing.assert_close(by_place[:, place], mean.expand(3, -1))
    with pytest.raises(HookError, match="so long"):
        logits(mean_ablate(STREAM, reference, per_position=True))


def test_resampling_takes_tokens_of_the_reference_by_seed() -> None:
    reference = MODEL.capture([[1, 2, 3, 4], [5, 6]], STREAM)
    tokens = torch.cat([reference[STREAM][0], reference[STREAM][1, :2]])
    after = seen(resample_ablate(STREAM, reference, seed=3), STREAM)
    drawn = (after[0][:, None] == tokens[None]).all(dim=-1)
    assert drawn.any(dim=1).all()
    assert torch.equal(after[0], after[2])
    assert torch.equal(after, seen(resample_ablate(STREAM, reference, seed=3), STREAM))
    assert not torch.equal(after, seen(resample_ablate(STREAM, reference, seed=4), STREAM))
    short = seen(resample_ablate(STREAM, reference, seed=3), STREAM, tokens=TOKENS[:, :3])
    assert torch.equal(short, after[:, :3])


def test_frozen_patterns_and_scales_make_a_run_linear_in_the_stream() -> None:
    frozen = MODEL.capture(TOKENS, ["attn.qk_probs", "resid.torso.ln_attn.scale"])
    hooks = freeze("attn.qk_probs", frozen) + freeze("resid.torso.ln_attn.scale", frozen)
    delta = torch.randn(16, dtype=torch.float64)

    def out(strength: float) -> Tensor:
        return seen(steer("resid.post_emb", delta, strength) + hooks, "0/resid.torso.delta_attn")

    torch.testing.assert_close(out(2.0) - out(1.0), out(1.0) - out(0.0))
    with pytest.raises(HookError, match="padded batch"):
        logits(freeze("0/attn.qk_probs", frozen["0/attn.qk_probs"][:1]), tokens=[[1, 2, 3], [4, 5]])


# --- composition ---


def test_sums_run_left_before_right() -> None:
    x = seen(TransformerHooks(), STREAM)
    one, two = scale(STREAM, 2.0), steer(STREAM, torch.ones(16), 1.0)
    assert torch.equal(seen(one + two, STREAM), 2 * x + 1)
    assert torch.equal(seen(two + one, STREAM), 2 * (x + 1))
    assert not len(list(one.resid.torso.post_attn.fwd._hooks)) > 1  # neither operand changes


def test_sums_keep_the_order_of_kinds_and_gradients() -> None:
    double = TransformerHooks()
    double.resid.torso.post_mlp.append_bwd(lambda grad: 2 * grad)

    def gradient(hooks: TransformerHooks) -> Tensor:
        x = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        hooks = TransformerHooks().append_at("resid.post_emb", lambda _: x) + hooks
        logits(hooks, tokens=TOKENS[:1, :3]).square().sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(double + double), 16 * gradient(TransformerHooks()))


def test_sums_keep_the_keywords_that_are_bound_to_each_side() -> None:
    def times(x: Tensor, factor: float) -> Tensor:
        return x * factor

    def bound(factor: float) -> TransformerHooks:
        hooks = TransformerHooks()
        hooks.resid.torso.post_attn.fwd.bind(factor=factor).append(times)
        return hooks

    x = seen(TransformerHooks(), STREAM)
    # Of two layers; the second sees what the first left.
    hooks = TransformerHooks().append_at("0/resid.torso.post_attn", lambda x: x)
    before = seen(bound(2.0), "0/resid.torso.post_attn")
    both = bound(2.0) + bound(-3.0)
    assert torch.equal(seen(both, "0/resid.torso.post_attn"), before * -3.0)
    assert torch.equal(seen(hooks + bound(2.0), "0/resid.torso.post_attn"), before)
    assert torch.equal(seen(bound(2.0) + hooks, "0/resid.torso.post_attn"), before)
    assert torch.equal(seen(bound(1.0) + TransformerHooks(), STREAM), x)
    with pytest.raises(HookError, match="0 to 15, found 99"):
        logits(bound(2.0) + ablate(STREAM, 99))


def test_a_hook_that_a_later_one_replaces_is_refused() -> None:
    edit = scale("0/mlp.post_act", 2.0, units=1)
    for later in [
        ablate("0/mlp.post_act"),
        ablate("0/resid.torso.delta_mlp"),
        set_to("0/resid.torso.post_mlp", 1.0),
    ]:
        with pytest.raises(HookError, match="would have no effect"):
            logits(edit + later)
    fine = [
        ablate("1/mlp.post_act"),
        ablate("0/resid.torso.delta_attn"),
        ablate("0/mlp.post_act", 1),
    ]
    for later in fine:
        logits(edit + later)
    logits(ablate("0/mlp.post_act") + edit)


# --- autoencoders ---


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderContext:
    folder: Path = tmp_path_factory.mktemp("autoencoders")
    for layer in range(2):
        autoencoder = _topk(layer)
        autoencoder.save(folder / str(layer))
    config = AutoencoderConfig(
        "resid.torso.delta_mlp", {layer: folder / str(layer) for layer in range(2)}
    )
    return AutoencoderContext(config, "cpu", dtype=torch.float64)


def _topk(seed: int) -> Autoencoder:
    torch.manual_seed(seed)
    autoencoder = Autoencoder(24, 16, activation=TopK(4))
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return autoencoder


@pytest.mark.parametrize("positions", [None, 3, [1, 4]], ids=str)
@pytest.mark.parametrize("units", [None, [7, 2]], ids=str)
def test_latents_take_their_values_from_other_runs(
    autoencoders: AutoencoderContext, units: Any, positions: Any
) -> None:
    """By the formula: what the autoencoder does not capture stays, and the chosen latents are others."""
    place, autoencoder = "1/resid.torso.delta_mlp", autoencoders.get_autoencoder(1)
    other = MODEL.capture(random_tokens(3, 8, seed=9), place)
    x = seen(TransformerHooks(), place)
    here, there = autoencoder.code(x), autoencoder.code(other[place]).latents
    mean = there.mean(dim=(0, 1)).expand_as(there)
    drawn = torch.randint(24, (8,), generator=torch.Generator().manual_seed(3))
    at: Any = slice(None) if positions is None else positions
    for build, values in (
        (patch_from, there),
        (mean_ablate, mean),
        (partial(resample_ablate, seed=3), there.flatten(0, 1)[drawn].expand_as(there)),
    ):
        latents, chosen = here.latents.clone(), slice(None) if units is None else units
        some = latents[:, at].clone()
        some[..., chosen] = values[:, at][..., chosen]
        latents[:, at] = some
        expected = x + here.decode(latents) - here.decode(here.latents)
        hooks = build(place, other, units, positions, autoencoders=autoencoders)
        torch.testing.assert_close(seen(hooks, place), expected)
    if positions is None:
        frozen = freeze(place, other, units, autoencoders=autoencoders)
        moved = patch_from(place, other, units, autoencoders=autoencoders)
        assert torch.equal(seen(frozen, place), seen(moved, place))
    with pytest.raises(HookError, match="0 to 23, found 24"):
        patch_from(place, other, 24, autoencoders=autoencoders)


@pytest.mark.parametrize("graph", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("positions", [3, [1, 4], "last", "mask", "tensor"])
def test_only_edited_positions_are_encoded(
    autoencoders: AutoencoderContext, monkeypatch: pytest.MonkeyPatch, positions: Any, graph: bool
) -> None:
    place = "1/resid.torso.delta_mlp"
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = True
    chosen = {"last": [7], "mask": [2, 5], "tensor": [3]}.get(str(positions), positions)
    if positions != "mask":
        mask[0, 2] = mask[1, 5] = False
        mask[:, chosen] = True
    value: Any = torch.arange(8.0)[:, None] if positions == "tensor" else 2.5
    given: dict[str, Any] = {"mask": mask, "tensor": 3}
    at = given.get(str(positions), positions)
    encoded: list[int] = []
    normalize = Autoencoder.normalize

    def noted(self: Autoencoder, x: Tensor) -> Any:
        encoded.append(x.shape[1])
        return normalize(self, x)

    monkeypatch.setattr(Autoencoder, "normalize", noted)

    def formula(latents: Tensor) -> Tensor:
        new = torch.as_tensor(value, dtype=latents.dtype).expand(*latents.shape[:2], 1)
        edited = torch.cat([latents[..., :7], new, latents[..., 8:]], dim=-1)
        return torch.where(mask[..., None], edited, latents)

    def run(edit: TransformerHooks) -> list[Tensor]:
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.detach().requires_grad_(graph))
            return leaves[-1]

        found = logits(TransformerHooks().append_at("0/resid.torso.post_mlp", leaf) + edit)
        if not graph:
            return [found]
        return [found, *torch.autograd.grad(found.pow(2).sum(), leaves)]

    with torch.set_grad_enabled(graph):
        found = run(set_to(place, value, 7, at, autoencoders=autoencoders))
        width = 8 if positions == "tensor" else len([chosen] if chosen == 3 else chosen)
        assert set(encoded) == {width}
        expected = run(autoencoders.hooks(formula, layers=[1]))
    torch.testing.assert_close(found, expected)


def test_an_edit_of_a_latent_moves_the_activation_by_its_decoder_row(
    autoencoders: AutoencoderContext,
) -> None:
    place = "1/resid.torso.delta_mlp"
    x = seen(TransformerHooks(), place)
    autoencoder = autoencoders.get_autoencoder(1)
    latent = int(autoencoder.encode(x).sum(dim=(0, 1)).argmax())
    value, row = autoencoder.encode(x)[..., latent, None], get_decoder_weight(autoencoder)[latent]
    after = seen(ablate(place, latent, autoencoders=autoencoders), place)
    torch.testing.assert_close(after, x - value * row)
    at_three = seen(set_to(place, 2.5, latent, 3, autoencoders=autoencoders), place)
    torch.testing.assert_close(at_three[:, 3], (x + (2.5 - value) * row)[:, 3])
    torch.testing.assert_close(at_three[:, :3], x[:, :3])
    kept = seen(scale(place, 1.0, latent, autoencoders=autoencoders), place)
    torch.testing.assert_close(kept, x, atol=1e-12, rtol=0)
    steered = seen(steer(place, (autoencoder, latent), 3.0), place)
    torch.testing.assert_close(steered, x + 3 * row)


def test_edits_of_one_autoencoder_share_one_splice(autoencoders: AutoencoderContext) -> None:
    place = "0/resid.torso.delta_mlp"
    x = seen(TransformerHooks(), place)
    autoencoder = autoencoders.get_autoencoder(0)
    a, b = autoencoder.encode(x).sum(dim=(0, 1)).topk(2).indices.tolist()
    hooks = ablate(place, a, autoencoders=autoencoders) + ablate(
        place, b, autoencoders=autoencoders
    )
    latents = autoencoder.encode(x)
    rows = get_decoder_weight(autoencoder)
    expected = x - latents[..., a, None] * rows[a] - latents[..., b, None] * rows[b]
    torch.testing.assert_close(seen(hooks, place), expected)
    assert str(hooks).count("AutoencoderHooks") == 1
    apart = ablate(place, a, autoencoders=autoencoders) + scale(place, 2.0)
    assert str(apart + ablate(place, b, autoencoders=autoencoders)).count("AutoencoderHooks") == 2


def test_latents_of_every_layer_and_bad_latents(autoencoders: AutoencoderContext) -> None:
    assert str(ablate("resid.torso.delta_mlp", 3, autoencoders=autoencoders)).count("AtLayers") == 2
    with pytest.raises(HookError, match="0 to 23, found 24"):
        ablate("0/resid.torso.delta_mlp", 24, autoencoders=autoencoders)
    with pytest.raises(InputError, match="autoencoders are of"):
        ablate("0/mlp.post_act", 1, autoencoders=autoencoders)


# --- batches, caches, other models ---


def test_rows_of_a_ragged_batch_get_their_solo_results() -> None:
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    hooks = (
        ablate("0/attn.v_out", 1, "last")
        + scale("1/mlp.post_act", 3.0, [0, 5], 1)
        + steer("resid.torso.post_mlp", torch.ones(16), 0.3, slice(1, 3))
    )
    together = logits(hooks, tokens=prompts)
    for row, prompt in enumerate(prompts):
        solo = logits(hooks, tokens=[prompt])
        torch.testing.assert_close(together[row, : len(prompt)], solo[0])


@pytest.mark.parametrize("kind", ["native", "gpt2", "mistral"])
def test_sampling_with_a_cache_equals_reading_the_whole_text(kind: str) -> None:
    model = make(kind)
    reference = model.capture([[4, 5, 6, 7, 8, 9, 10, 11]], "0/resid.torso.delta_mlp")
    hooks = (
        scale("0/resid.torso.delta_mlp", -3.0, positions=[1, 5])
        + resample_ablate("0/resid.torso.delta_mlp", reference, units=2, positions=slice(2, 7))
        + ablate("1/attn.v_out", 1, positions=slice(3, None))
    )
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    sampled = model.sample(prompts, 4, temperature=0.0, hooks=hooks)["tokens"]
    for prompt, new in zip(prompts, sampled, strict=True):
        text = list(prompt)
        for token in new:
            bound = hooks if len(text) > 5 else _within(model, len(text), reference)
            last = model([text], hooks=bound)[0][0, -1]
            assert int(last.argmax()) == token
            text.append(token)


def _within(model: Any, end: int, reference: Any) -> TransformerHooks:
    """The same hooks for a text of ``end`` tokens, without the positions that it lacks."""
    places = [p for p in (1, 5) if p < end]
    hooks = scale("0/resid.torso.delta_mlp", -3.0, positions=places)
    if end > 2:
        hooks = hooks + resample_ablate(
            "0/resid.torso.delta_mlp", reference, units=2, positions=slice(2, 7)
        )
    return hooks + (
        ablate("1/attn.v_out", 1, positions=slice(3, None)) if end > 3 else TransformerHooks()
    )


def test_hooks_on_keys_know_the_positions_of_all_keys() -> None:
    model = make_model()
    hooks = ablate("0/attn.v", 0, 1) + ablate("1/attn.k", 2, [0, 2])
    prompts = [[1, 2, 3, 4], [5, 6, 7]]
    sampled = model.sample(prompts, 4, temperature=0.0, hooks=hooks)["tokens"]
    for prompt, new in zip(prompts, sampled, strict=True):
        full = logits(hooks, model, [[*prompt, *new[:-1]]])[0, len(prompt) - 1 :]
        assert full.argmax(dim=-1).tolist() == new


def test_what_a_model_or_a_text_lacks_is_refused_before_the_pass() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the pass ran")

    watch = TransformerHooks().append_at("resid.post_emb", never)
    for hooks, message in [
        (ablate("0/mlp.post_act", 48), "0 to 47, found 48"),
        (ablate("0/attn.v_out", 4), "0 to 3, found 4"),
        (ablate("0/attn.v_out", "1.4"), "0 to 3, found 4"),
        (ablate("0/attn.qk_probs", 4), "0 to 3, found 4"),
        (ablate("5/mlp.post_act", 1), "layer 5, which the model lacks"),
        (ablate("0/mlp.post_act", 1, 8), "position 8 is outside"),
        (ablate("0/mlp.post_act", 1, slice(9, 12)), "position 9 is outside"),
    ]:
        with pytest.raises(HookError, match=message):
            logits(hooks + watch)
    with pytest.raises(HookError, match="position 11 is outside"):
        MODEL.sample([[1, 2, 3]], 4, hooks=ablate("0/mlp.post_act", 1, 11))
    MODEL.sample([[1, 2, 3]], 4, hooks=ablate("0/mlp.post_act", 1, 5))


def wrong(value: Any) -> Any:
    """A value that a type checker would refuse."""
    return value


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ablate("0/mlp.post_act", -1), "whole number from 0"),
        (lambda: ablate("0/mlp.post_act", wrong(1.5)), "whole number from 0"),
        (lambda: ablate("0/mlp.post_act", []), "some numbers"),
        (lambda: ablate("0/mlp.post_act", 1, -1), "The last token is 'last'"),
        (lambda: ablate("0/mlp.post_act", 1, "first"), "positions must be"),
        (lambda: ablate("0/mlp.post_act", 1, wrong(0.5)), "positions must be"),
        (lambda: ablate("0/mlp.post_act", 1, wrong(iter([True]))), "positions must be"),
        (lambda: set_to("0/mlp.post_act", torch.nan), "finite"),
        (lambda: set_to("0/mlp.post_act", wrong("x")), "number or a tensor"),
        (lambda: clamp("0/mlp.post_act"), "needs minimum"),
        (lambda: clamp("0/mlp.post_act", 2, 1), "above maximum"),
        (lambda: patch_from("0/mlp.post_act", torch.zeros(3)), "must be a tensor"),
        (lambda: resample_ablate(STREAM, torch.ones(1, 2, 16), seed=wrong("x")), "seed must be"),
        (lambda: patch_from("mlp.post_act", torch.zeros(1, 2, 3)), "of one layer"),
        (lambda: mean_ablate("mlp.post_act", torch.zeros(1, 2, 3)), "name one"),
        (lambda: project_out(STREAM, []), "at least one"),
        (lambda: scale(STREAM, wrong(torch.ones(3))), "one number"),
        (lambda: scale(STREAM, wrong("x")), "number or a tensor"),
        (lambda: steer(STREAM, torch.ones(16), wrong([1, 2])), "one number"),
        (lambda: clamp(STREAM, torch.nan), "finite"),
        (lambda: clamp(STREAM, wrong("a")), "number or a tensor"),
        (lambda: mean_ablate(STREAM, torch.zeros(0, 2, 16)), "holds no values"),
        (lambda: resample_ablate(STREAM, torch.zeros(0, 2, 16)), "holds no values"),
        (
            lambda: patch_from(STREAM, torch.zeros(1, 2, 16), index_map=wrong([0, 1])),
            "index_map must be",
        ),
        (
            lambda: patch_from(STREAM, torch.zeros(1, 2, 16), index_map=torch.tensor([0.5])),
            "index_map must be",
        ),
    ],
)
def test_bad_input(build: Any, message: str) -> None:
    with pytest.raises((InputError, LocationError), match=message):
        build()


def test_masks_and_predicates() -> None:
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2] = mask[2, 5] = True
    after = seen(ablate(STREAM, positions=mask), STREAM)
    expected = seen(TransformerHooks(), STREAM).masked_fill(mask[..., None], 0.0)
    assert torch.equal(after, expected)
    with pytest.raises(HookError, match="a mask of 3 rows, for a batch of 2"):
        logits(ablate(STREAM, positions=mask), tokens=TOKENS[:2])


def test_positions_where_reads_tokens_as_text() -> None:
    model = Transformer.load("tiny-tales")
    prompts = ["The cat saw the dog.", "A cat"]
    mask = positions_where(model, prompts, lambda token: "cat" in token, bos=True)
    ids = model.prompt_ids(prompts, bos=True)
    for row, tokens in enumerate(ids):
        for place, token in enumerate(tokens):
            assert bool(mask[row, place]) == ("cat" in model._decode([token]))
    assert mask.any(dim=1).all()


def test_printed_they_say_what_they_do() -> None:
    hooks = ablate("1/attn.v_out", [0, 2], "last") + steer(
        STREAM, torch.ones(16), 2, slice(1, 4), unit="norm"
    )
    assert "zero ablation of heads 0, 2 at the last position" in str(hooks)
    assert "steering by 2 times the norm of all units at positions 1 to 3" in str(hooks)


def test_they_can_be_copied_and_nothing_is_left_on_the_model() -> None:
    hooks = ablate(STREAM, 1) + scale("0/mlp.post_act", 2.0, 3)
    before = logits(None)
    edited = logits(hooks)
    assert torch.equal(logits(hooks.copy()), edited)
    assert torch.equal(logits(None), before)


def test_ablating_all_latents_replaces_nothing_but_them(autoencoders: AutoencoderContext) -> None:
    place = "0/resid.torso.delta_mlp"
    hooks = scale("0/mlp.post_act", 2.0, 3) + ablate(place, autoencoders=autoencoders)
    assert (logits(hooks) - logits(ablate(place, autoencoders=autoencoders))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (slice(3, 3), "holds no position"),
        (slice(5, 2), "holds no position"),
        (slice(0, 0), "holds no position"),
        (slice(-3, None), "The last token is 'last'"),
        (slice(wrong("a"), None), "bounds of a slice must be whole numbers"),
        (slice(None, None, 0), "positions count from 0"),
        (torch.zeros(3, 8, dtype=torch.bool), "False everywhere"),
    ],
    ids=str,
)
def test_positions_that_would_change_nothing_are_refused(positions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ablate(STREAM, positions=positions)


def test_a_mask_for_tokens_that_the_text_lacks_is_refused() -> None:
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 1] = True
    logits(ablate(STREAM, positions=mask))
    mask[1, 8] = True
    with pytest.raises(HookError, match="position 8 is outside"):
        logits(ablate(STREAM, positions=mask))
    MODEL.sample([[1, 2, 3]] * 3, 7, hooks=ablate(STREAM, positions=mask))


def test_patterns_cannot_be_moved_by_an_index_map() -> None:
    run = MODEL.capture(TOKENS, "0/attn.qk_probs")
    with pytest.raises(InputError, match="leave index_map out"):
        patch_from("0/attn.qk_probs", run, index_map=torch.arange(8))


@pytest.mark.parametrize("positions", [True, [True, False, True]], ids=str)
def test_a_list_of_bools_is_no_list_of_positions(positions: Any) -> None:
    with pytest.raises(InputError, match="bool tensor"):
        ablate("0/mlp.post_act", 1, positions)


# --- joined heads, and one autoencoder for all layers ---


def _saved(folder: Path, n_inputs: int, **settings: Any) -> Path:
    torch.manual_seed(7)
    autoencoder = Autoencoder(24, n_inputs, activation=TopK(4), dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    autoencoder.save(folder)
    return folder


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_latents_of_joined_heads(tmp_path: Path, normalization: Any) -> None:
    path = _saved(tmp_path / "a", 16, input_normalization=normalization)
    config = AutoencoderConfig("attn.v_out", {0: path})
    context = AutoencoderContext(config, "cpu", dtype=torch.float64)
    context.check_model(MODEL)
    place, autoencoder = "0/attn.v_out", context.get_autoencoder(0)
    x = seen(TransformerHooks(), place)
    code = autoencoder.code(x.flatten(2))
    latent = int(code.latents.sum(dim=(0, 1)).argmax())
    without = code.latents.clone()
    without[:, 2, latent] = 0
    expected = x + (code.decode(without) - code.decode(code.latents)).view_as(x)
    found = seen(ablate(place, latent, 2, autoencoders=context), place)
    torch.testing.assert_close(found, expected)
    spliced = seen(context.hooks(add_error=False), place)
    torch.testing.assert_close(spliced, autoencoder.reconstruct(x.flatten(2)).view_as(x))
    by_hand = context.hooks(lambda latents: latents * 0, add_error=False)
    nothing = code.decode(torch.zeros_like(code.latents)).view_as(x)
    torch.testing.assert_close(seen(by_hand, place), nothing)


def test_an_autoencoder_of_each_head_and_one_of_another_width(tmp_path: Path) -> None:
    each, other = (
        AutoencoderContext(
            AutoencoderConfig("attn.v_out", {0: _saved(tmp_path / str(width), width)}),
            "cpu",
            dtype=torch.float64,
        )
        for width in (4, 8)
    )
    each.check_model(MODEL)
    x = seen(TransformerHooks(), "0/attn.v_out")
    found = seen(each.hooks(add_error=False), "0/attn.v_out")
    torch.testing.assert_close(found, each.get_autoencoder(0).reconstruct(x))
    with pytest.raises(InputError, match="width 4 there, 16 with its heads joined"):
        other.check_model(MODEL)


def test_one_autoencoder_serves_all_layers(tmp_path: Path) -> None:
    path = _saved(tmp_path / "a", 16)
    one, several = (
        AutoencoderContext(
            AutoencoderConfig("resid.torso.delta_mlp", dict.fromkeys(layers, path)),
            "cpu",
            dtype=torch.float64,
        )
        for layers in ((None,), (0, 1))
    )
    assert one.get_autoencoder(1) is one.get_autoencoder(None)
    for location in ("resid.torso.delta_mlp", "1/resid.torso.delta_mlp"):
        hooks, expected = (ablate(location, 3, autoencoders=each) for each in (one, several))
        assert torch.equal(logits(hooks), logits(expected))
    chosen, expected = (each.hooks(add_error=False, layers=[1]) for each in (one, several))
    assert torch.equal(logits(chosen), logits(expected))
    with pytest.raises(HookError, match="layer 2, which the model lacks"):
        logits(one.hooks(layers=[2]))
    with pytest.raises(InputError, match="in layer True"):
        one.get_autoencoder(wrong(True))


# --- pickling, and values of another shape ---

_RUN = MODEL.capture(TOKENS, [STREAM, "0/attn.v_out", "1/attn.qk_probs"])
_MASK = torch.tensor([[True, False, True]])


@pytest.mark.parametrize(
    "hooks",
    [
        ablate("0/attn.v_out", [1, 3], "last"),
        set_to(STREAM, torch.arange(16.0), positions=slice(1, 5, 2)),
        scale(STREAM, 1.5, [2, 3], _MASK),
        clamp(STREAM, -0.1, 0.1),
        steer(STREAM, torch.arange(16.0), 0.3, [0, 4], unit="norm"),
        project_out(STREAM, [torch.arange(16.0), torch.ones(16)]),
        patch_from("0/attn.v_out", _RUN, "1.2", index_map=torch.arange(8).flip(0)),
        freeze("1/attn.qk_probs", _RUN),
        mean_ablate(STREAM, _RUN, [1], per_position=True),
        resample_ablate(STREAM, _RUN, [1], seed=3),
    ],
    ids=str,
)
def test_they_can_be_pickled(hooks: TransformerHooks) -> None:
    again = pickle.loads(pickle.dumps(hooks))
    assert str(again) == str(hooks)
    assert torch.equal(logits(again), logits(hooks))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: set_to(STREAM, torch.ones(15)), r"the values are \[15\] for each token, expected"),
        (lambda: set_to(STREAM, torch.ones(3), [1, 2]), r"\[3\] for each token, expected \[2\]"),
        (lambda: set_to("0/attn.v_out", torch.ones(2, 1, 3), 1), r"\[any, 3\] .* \[1, 4\]"),
        (lambda: set_to("0/attn.v_out", torch.ones(2), ["1.3", "0.2", "0.1"]), r"expected \[3\]"),
        (lambda: set_to("0/attn.qk_probs", torch.ones(5)), r"\[any, 5\] .* \[any, 4\]"),
        (lambda: steer(STREAM, torch.ones(5), 1.0), r"\[5\] for each token, expected \[16\]"),
        (lambda: project_out("0/attn.v_out", torch.ones(16)), r"expected \[4, 4\]"),
        (lambda: patch_from(STREAM, torch.ones(3, 8, 15)), r"\[15\] .* \[16\]"),
        (lambda: mean_ablate(STREAM, torch.ones(3, 8, 1)), r"\[1\] .* \[16\]"),
        (lambda: resample_ablate(STREAM, torch.ones(3, 8, 17)), r"\[17\] .* \[16\]"),
        (lambda: freeze("0/attn.qk_probs", torch.ones(3, 8, 8, 5)), r"\[any, 5\] .* \[any, 4\]"),
        (lambda: patch_from(STREAM, torch.ones(3, 8, 9), 12), "0 to 8, found 12"),
        (lambda: mean_ablate("0/attn.v_out", torch.ones(3, 8, 2, 4), 3), "0 to 1, found 3"),
        (lambda: resample_ablate("0/attn.v_out", torch.ones(3, 8, 4, 2), "3.3"), "0 to 1, found 3"),
    ],
)
def test_values_of_another_shape_are_refused_before_the_pass(build: Any, message: str) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the pass ran")

    with pytest.raises(HookError, match=message):
        logits(build() + TransformerHooks().append_at("resid.post_emb", never))


def test_values_of_other_rows_and_of_latents(autoencoders: AutoencoderContext) -> None:
    with pytest.raises(InputError, match="at most the 3 axes"):
        set_to(STREAM, torch.ones(1, 1, 1, 16))
    with pytest.raises(HookError, match=r"shape \[2, 1, 16\] does not broadcast to \[3, 8, 16\]"):
        logits(set_to(STREAM, torch.ones(2, 1, 16)))
    place = "0/resid.torso.delta_mlp"
    with pytest.raises(HookError, match=r"\[3\] for each token, expected \[2\]"):
        set_to(place, torch.ones(3), [4, 5], autoencoders=autoencoders)
    both = set_to(place, torch.tensor([1.0, 2.0]), [4, 5], autoencoders=autoencoders)
    apart = set_to(place, 1.0, 4, autoencoders=autoencoders)
    apart += set_to(place, 2.0, 5, autoencoders=autoencoders)
    torch.testing.assert_close(logits(both), logits(apart))
