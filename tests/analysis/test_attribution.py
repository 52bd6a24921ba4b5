"""Integrated gradients and attribution patching against runs, and against one another."""

from typing import Any

import numpy as np
import pytest
import torch

from neuron_explainer.analysis.attribution import attribution_patching, integrated_gradients
from neuron_explainer.analysis.effects import spearman
from neuron_explainer.analysis.targets import kl, logit_difference, loss
from neuron_explainer.errors import InputError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import patch_from
from tests.conftest import make_model
from tests.models.test_interventions import wrong
from tests.models.test_language_model import make

MODEL = make_model(dtype=torch.float64, n_layers=3)
CLEAN = [3, 1, 4, 1, 5, 9]
CORRUPT = [3, 7, 4, 2, 5, 11]
TARGET = logit_difference(MODEL, 6, 8)


def value(hooks: TransformerHooks | None = None) -> float:
    with torch.no_grad():
        logits = MODEL([CLEAN], hooks=hooks)[0][0, -1]
    return float(logits[6] - logits[8])


# --- integrated gradients ---


@pytest.mark.parametrize("place", ["resid.post_emb", "1/mlp.post_act", "2/attn.v_out"])
@pytest.mark.parametrize("baseline", ["zero", "mean", "other"])
def test_attributions_sum_to_the_change_ever_more_closely(place: str, baseline: Any) -> None:
    given = MODEL.capture([CORRUPT], place) if baseline == "other" else baseline
    if (place, baseline) == ("resid.post_emb", "zero"):
        pytest.skip("a layer norm jumps at 0, as the docstring says")
    errors = []
    for steps in (4, 16, 64):
        found = integrated_gradients(MODEL, CLEAN, TARGET, place, baseline=given, steps=steps)
        errors.append(abs(found.error))
    assert errors[2] < 2e-3 * max(1.0, abs(found.difference))
    assert errors[2] < errors[0]
    x = MODEL.capture([CLEAN], place)[place]
    start = {"zero": torch.zeros_like(x), "mean": x.mean(dim=1, keepdim=True).expand_as(x)}
    other = start[baseline] if baseline in start else given[place]
    expected = value() - value(patch_from(place, other.detach()))
    assert found.difference == pytest.approx(expected, abs=1e-9)
    assert found.values.shape == tuple(x.shape[1:])
    assert "error" in repr(found)


def test_a_linear_way_needs_one_step() -> None:
    found = integrated_gradients(MODEL, CLEAN, TARGET, "logits", steps=1)
    assert abs(found.error) < 1e-9
    np.testing.assert_allclose(found.values[:-1], 0)


def test_other_targets_and_models() -> None:
    assert abs(integrated_gradients(MODEL, CLEAN, loss(), "0/mlp.post_act", steps=64).error) < 0.01
    model = make("gpt2")
    found = integrated_gradients(model, CLEAN, lambda x: x[:, 3], "1/mlp.post_act", steps=32)
    assert abs(found.error) < 0.02 * max(1.0, abs(found.difference))


# --- attribution patching ---


def brute_force(part: str, cells: list[tuple[int, int, int]]) -> Any:
    """The change of the target when one head's part is patched, for each layer, position and head."""
    other, before = MODEL.capture([CORRUPT], f"attn.{part}"), value()
    return np.array(
        [value(patch_from(f"{layer}/attn.{part}", other, h, p)) - before for layer, p, h in cells]
    )


@pytest.mark.parametrize("part", ["q", "k", "v", "v_out"])
def test_scores_order_heads_as_patching_does(part: Any) -> None:
    found = attribution_patching(MODEL, CLEAN, CORRUPT, TARGET)
    estimated = found.scores[part]
    cells = [(layer, p, h) for layer in range(3) for p in range(6) for h in range(4)]
    measured = brute_force(part, cells)
    some = np.abs(measured) > 1e-9
    correlation = spearman(np.array([estimated[cell] for cell in cells])[some], measured[some])
    assert correlation > 0.85
    # What cannot matter is exactly 0: positions where the two runs are equal so far.
    assert np.abs(estimated[:, 0]).max() < 1e-12
    assert estimated.shape == (3, 6, 4)


def test_the_softmax_is_computed_anew() -> None:
    """Pattern change times gradient, by plain patched passes of each query and key."""
    found = attribution_patching(MODEL, CLEAN, CORRUPT, TARGET)
    with torch.enable_grad():
        hooks = TransformerHooks().append_at(
            "resid.post_emb", lambda x: x.detach().requires_grad_()
        )
        run = MODEL.capture([CLEAN], ["attn.qk_probs", "logits"], hooks=hooks)
        logits = run["logits"][0, -1]
        places = [f"{layer}/attn.qk_probs" for layer in range(3)]
        gradients = torch.autograd.grad(logits[6] - logits[8], [run[p] for p in places])
    for part in ("q", "k"):
        for layer, head, position in [(0, 1, 3), (1, 3, 5), (2, 0, 1), (2, 2, 5)]:
            place = f"{layer}/attn.{part}"
            patch = patch_from(place, MODEL.capture([CORRUPT], place), head, position)
            with torch.no_grad():
                after = MODEL.capture([CLEAN], places[layer], hooks=patch)[places[layer]]
            expected = float(((after - run[places[layer]].detach()) * gradients[layer]).sum())
            assert found.scores[part][layer, position, head] == pytest.approx(expected, abs=1e-9)


def test_a_saturated_softmax_fools_the_gradient_alone() -> None:
    model = make_model(dtype=torch.float64, n_layers=1)
    with torch.no_grad():
        layer = next(iter(model.layers))
        layer.attn.q_proj.weight.mul_(12)
    target = logit_difference(model, 6, 8)
    place = "0/attn.q"

    def measured(position: int, head: int) -> float:
        other = model.capture([CORRUPT], place)
        with torch.no_grad():
            x = model([CLEAN], hooks=patch_from(place, other, head, position))[0][0, -1]
            y = model([CLEAN])[0][0, -1]
        return float(x[6] - x[8] - y[6] + y[8])

    truth = np.array([[measured(p, h) for h in range(4)] for p in range(6)])
    fixed = attribution_patching(model, CLEAN, CORRUPT, target).scores["q"][0]
    plain = attribution_patching(model, CLEAN, CORRUPT, target, qk_fix=False).scores["q"][0]
    assert np.abs(fixed - truth).sum() < 0.6 * np.abs(plain - truth).sum()


def test_grad_drop_is_the_mean_size_without_each_layer() -> None:
    found = attribution_patching(MODEL, CLEAN, CORRUPT, TARGET, grad_drop=True, qk_fix=False)
    assert not found.signed
    assert min(values.min() for values in found.scores.values()) >= 0
    place = "0/attn.v_out"
    other = MODEL.capture([CORRUPT], place)[place].detach()
    total = torch.zeros(6, 4, dtype=torch.float64)
    for dropped in range(3):
        hooks = TransformerHooks().append_at(
            "resid.post_emb", lambda x: x.detach().requires_grad_()
        )
        for path in ("resid.torso.delta_attn", "resid.torso.delta_mlp"):
            hooks.append_at(f"{dropped}/{path}", lambda x: x.detach())
        run = MODEL.capture([CLEAN], [place, "logits"], hooks=hooks)
        logits = run["logits"][0, -1]
        (gradient,) = torch.autograd.grad(logits[6] - logits[8], run[place], allow_unused=True)
        if gradient is not None:
            total += ((other - run[place].detach()) * gradient)[0].sum(dim=-1).abs() / 2
    np.testing.assert_allclose(found.scores["v_out"][0], total.numpy(), atol=1e-9)


def test_the_largest_are_named() -> None:
    found = attribution_patching(MODEL, CLEAN, CORRUPT, TARGET)
    name, score = found.top(1)[0]
    assert abs(score) == max(np.abs(values).max() for values in found.scores.values())
    assert name in repr(found)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: integrated_gradients(MODEL, CLEAN, TARGET, "mlp.post_act"), "name one"),
        (lambda: integrated_gradients(MODEL, CLEAN, TARGET, "logits", steps=0), "at least 1"),
        (
            lambda: integrated_gradients(
                MODEL, CLEAN, TARGET, "0/mlp.post_act", baseline=wrong("one")
            ),
            "'zero', 'mean' or a capture",
        ),
        (
            lambda: integrated_gradients(
                MODEL,
                CLEAN,
                TARGET,
                "0/mlp.post_act",
                baseline=MODEL.capture([[1, 2]], "0/mlp.post_act"),
            ),
            "of as many tokens",
        ),
        (lambda: attribution_patching(MODEL, CLEAN, [1, 2], TARGET), "of one length"),
        (
            lambda: integrated_gradients(MODEL, CLEAN, TARGET, "0/mlp.post_act", steps=wrong(2.5)),
            "steps must be a whole number of at least 1, found 2.5",
        ),
    ],
)
def test_bad_input(run: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run()


def test_a_key_of_a_pattern_that_is_rounded_to_one() -> None:
    from neuron_explainer.analysis.attribution import _Run
    from neuron_explainer.models.locations import ActivationLocation

    logits = torch.tensor([0.0, 60.0, 0.0, -torch.inf]).view(1, 1, 4, 1)
    found = {
        "qk_logits": logits,
        "qk_probs": logits.softmax(dim=2),  # exactly 0, 1, 0, 0 in float32 but for 1e-26
        "q": torch.ones(1, 1, 1, 1),
    }
    at = {ActivationLocation(f"attn.{name}", 0): x for name, x in found.items()}
    gradient = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)
    pattern = ActivationLocation("attn.qk_probs", 0)
    key = ActivationLocation("attn.k", 0)
    other = {key: torch.tensor([60.0, -60.0, 0.0, 5.0]).view(1, 4, 1, 1)}
    run: Any = _Run(at, dict.fromkeys(at) | {pattern: gradient}, other)  # type: ignore[arg-type]  # plain dicts will do
    assert run.key_by_softmax(0)[:, 0].tolist() == pytest.approx([-0.5, 0.5, 0, 0])


def test_masked_scores_have_no_integrated_gradients() -> None:
    with pytest.raises(InputError, match=r"use attn\.qk_probs"):
        integrated_gradients(MODEL, [1, 2, 3], lambda x: x[:, 0], "0/attn.qk_logits")


@pytest.mark.parametrize("place", ["0/attn.qk_softmax_denominator", "resid.ln_f.scale"])
def test_what_a_model_divides_by_has_no_zero_baseline(place: str) -> None:
    with pytest.raises(InputError, match="take the baseline 'mean'"):
        integrated_gradients(MODEL, CLEAN, TARGET, place)
    found = integrated_gradients(MODEL, CLEAN, TARGET, place, baseline="mean", steps=64)
    assert abs(found.error) < 1e-4


def test_a_distance_from_the_unchanged_run_has_no_gradient_there() -> None:
    with pytest.raises(InputError, match="a distance from the unchanged run"):
        integrated_gradients(MODEL, CLEAN, kl(), "0/mlp.post_act")
    with pytest.raises(InputError, match="attribution patching would hold only zeros"):
        attribution_patching(MODEL, CLEAN, CORRUPT, kl())
