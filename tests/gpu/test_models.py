"""The model on CUDA: logits, every site, hooks, cache, samples, half precision."""

import pytest
import torch
from torch import Tensor

from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer
from tests.conftest import assert_close, make_model, random_tokens

PROMPTS = ["Once upon a time there was a", "The king", "The old woman went to the forest and"]


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    """TF32 would hide what is compared here; it is torch's own default to leave it off."""
    torch.backends.cuda.matmul.allow_tf32 = False


def pair(device: torch.device) -> tuple[Transformer, Transformer]:
    """The same weights on the CPU and on the device."""
    return make_model(seed=3), make_model(seed=3).to(device)


def test_a_model_is_loaded_where_it_is_wanted(device: torch.device) -> None:
    model = Transformer.load("tiny-tales", device=device, dtype=torch.float32)
    assert model.device == device
    assert {parameter.device for parameter in model.parameters()} == {device}
    assert model.capture(PROMPTS, "1/mlp.post_act")["1/mlp.post_act"].device == device


def test_every_site_holds_what_it_holds_on_the_cpu(device: torch.device) -> None:
    here, there = pair(device)
    tokens = random_tokens(3, 9)
    pad = torch.zeros(3, 9, dtype=torch.bool)
    pad[1, 6:] = pad[2, :4] = True
    with torch.no_grad():
        expected = here.capture(tokens, list(SITES), pad)
        found = there.capture(tokens.to(device), list(SITES), pad.to(device))
    assert found.keys() == expected.keys()
    for location, value in expected.items():
        assert_close(found[location].cpu(), value, 1e-4, str(location))


@pytest.mark.parametrize("path", SITES)
def test_hooks_and_gradients_at_every_site(device: torch.device, path: str) -> None:
    """With a hook that changes nothing, values and gradients are those of the fused path."""
    seen: list[torch.device] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.device)
        return x

    hooks = TransformerHooks().append_at(path, look)
    _, model = pair(device)
    tokens = random_tokens(2, 8).to(device)
    plain, hooked = model(tokens)[0], model(tokens, hooks=hooks)[0]
    assert_close(hooked.cpu(), plain.cpu(), 1e-5, path)
    assert set(seen) == {device}
    gradients = [
        torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        for logits in (plain, hooked)
    ]
    largest = max(float(grad.abs().max()) for grad in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * largest


def test_a_cache_changes_nothing(device: torch.device) -> None:
    _, model = pair(device)
    tokens = random_tokens(2, 10).to(device)
    with torch.no_grad():
        whole, state, parts = model(tokens)[0], None, []
        for part in tokens.split([6, 1, 3], dim=1):
            logits, state = model(part, state)
            parts.append(logits)
    assert_close(torch.cat(parts, dim=1).cpu(), whole.cpu(), 1e-5)


def test_greedy_samples_are_those_of_the_cpu(device: torch.device) -> None:
    found = [
        Transformer.load("tiny-tales", device=where, dtype=torch.float32).sample(
            PROMPTS, num_tokens=20, temperature=0
        )["tokens"]
        for where in (torch.device("cpu"), device)
    ]
    assert found[0] == found[1]


def test_a_seed_gives_the_same_sample_again(device: torch.device) -> None:
    model = Transformer.load("tiny-tales", device=device, dtype=torch.float32)
    first, second = (
        model.sample(PROMPTS, num_tokens=12, top_p=0.9, seed=7)["tokens"] for _ in "ab"
    )
    assert first == second


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predicts_almost_the_same(device: torch.device, dtype: torch.dtype) -> None:
    whole = Transformer.load("tiny-tales", device=device, dtype=torch.float32)
    half = Transformer.load("tiny-tales", device=device, dtype=dtype)
    tokens = torch.tensor(
        [whole.enc.encode("Once upon a time there was a king who had three sons.")]
    )
    with torch.no_grad():
        expected = whole(tokens.to(device))[0].log_softmax(-1)
        found = half(tokens.to(device))[0]
        assert found.dtype == dtype
        divergence = (expected.exp() * (expected - found.float().log_softmax(-1))).sum(-1)
    assert float(divergence.mean()) < 2e-3
    assert float(divergence.max()) < 2e-2
