"""Of equal pre-activations the lowest index wins: in every path, in every dtype, grad or not.

Low precision makes ties common. Two paths with two tie rules would give one autoencoder two answers.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.objectives.batch_topk import batch_top_k
from neuron_explainer.dictionaries.objectives.topk import largest
from neuron_explainer.kernels.top_k import largest_entries, top_k
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.nonlinearities import GroupMax
from neuron_explainer.models.autoencoders.pruned import PrunedAutoencoder, omit_least_active_latents
from neuron_explainer.models.hooks import AutoencoderHooks

B, N, L, K = 12, 8, 1024, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``[b, n]``, encoder ``[l, n]`` and bias ``[l]`` whose pre-activations are often equal."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, N, generator=generator) for rows in (B, L))
    bias = torch.randn(L, generator=generator)
    if kind == "random, low precision":  # bfloat16 numbers, whatever the dtype is
        x, weight, bias = (tensor.bfloat16().float() for tensor in (x, weight, bias))
    if kind == "quantised":  # whole numbers: every sum is exact, in whatever order it is added
        x, weight, bias = x.round(), weight.round(), bias.round()
    if kind == "all equal":
        weight, bias = weight[:1].repeat(L, 1).round(), torch.full((L,), 2.0)
        x = x.round()
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


KINDS = ["random, low precision", "quantised", "all equal"]


def make(kind: str, dtype: torch.dtype, nonlinearity: nn.Module) -> tuple[Autoencoder, Tensor]:
    x, weight, bias = draw(kind, dtype)
    ae = Autoencoder(L, N, nonlinearity, dtype=dtype)
    with torch.no_grad():
        ae.encoder.weight.copy_(weight)
        ae.decoder.weight.copy_(weight.t())
        ae.latent_bias.copy_(bias)
        ae.latents_activation_frequency[::3] = 0.5
    return ae, x


def first_of_each_row(pre_act: Tensor, k: int) -> np.ndarray:
    """``[b, k]``: numpy's stable sort of the same values in float64."""
    values = pre_act.detach().double().numpy()
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]


def top_k_oracle(pre_act: Tensor, k: int) -> Tensor:
    indices = torch.from_numpy(first_of_each_row(pre_act, k))
    return torch.zeros_like(pre_act).scatter(-1, indices, pre_act.gather(-1, indices).relu())


def group_max_oracle(pre_act: Tensor, k: int) -> Tensor:
    groups = pre_act.detach().relu().view(len(pre_act), k, -1)
    first = torch.from_numpy(groups.double().numpy().argmax(-1))[..., None]
    return torch.zeros_like(groups).scatter(-1, first, groups.gather(-1, first)).flatten(1)


def latents_in_hooks(ae: Autoencoder, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hooks = AutoencoderHooks.from_autoencoder(ae)

    def look(latents: Tensor, **_: object) -> Tensor:
        seen.append(latents.clone())
        return latents

    hooks.latents.append_fwd(look)
    hooks(x)
    return seen[0]


WAYS: dict[str, Callable[[Autoencoder, Tensor], Tensor]] = {
    "forward": lambda ae, x: ae(x).latents,
    "encode": lambda ae, x: ae.encode(x),
    "encode_sparse": lambda ae, x: ae.encode_sparse(x).dense(),
    "hooks": latents_in_hooks,
    "one row": lambda ae, x: torch.stack([ae.encode(row) for row in x]),
}


def all_ways(ae: Autoencoder, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name, way in WAYS.items():
        for graph in (True, False):
            with torch.set_grad_enabled(graph):
                yield f"{name}, {'with' if graph else 'without'} gradients", way(ae, x).detach()


def assert_all_agree(ae: Autoencoder, x: Tensor, expected: Tensor) -> None:
    assert ((expected != 0).sum(1) > 0).any()
    for name, latents in all_ways(ae, x):
        differing = ((latents != 0) != (expected != 0)).any(1)
        assert not differing.any(), f"{name}: other latents on {int(differing.sum())} of {B} rows"
    recons = ae.decode(expected)
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            torch.testing.assert_close(ae.reconstruct(x), recons, rtol=2e-2, atol=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_path_of_top_k_takes_the_first(kind, dtype):
    ae, x = make(kind, dtype, TopK(K))
    pre_act = ae.encode_pre_act(x).detach()
    expected = top_k_oracle(pre_act, K)
    at_the_end = pre_act.sort(1, descending=True).values[:, K - 1 : K + 1].diff(dim=1) == 0
    assert at_the_end.any() or (kind == KINDS[0] and dtype != torch.bfloat16)  # there are ties
    assert_all_agree(ae, x, expected)
    with torch.no_grad():
        assert (ae.encode_sparse(x).indices.numpy() == first_of_each_row(pre_act, K)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_certified_search_takes_the_first(kind, monkeypatch):
    monkeypatch.setenv("NEURON_EXPLAINER_CERTIFIED", "1")
    ae, x = make(kind, torch.float32, TopK(K))
    assert_all_agree(ae, x, top_k_oracle(ae.encode_pre_act(x).detach(), K))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_latents_left_out_the_first_of_the_others_is_taken(kind, dtype):
    ae, x = make(kind, dtype, TopK(K))
    pruned = omit_least_active_latents(ae, L // 2)
    assert isinstance(pruned, PrunedAutoencoder)
    left_out = torch.ones(L, dtype=torch.bool).index_fill(0, pruned.kept, False)
    pre_act = ae.encode_pre_act(x).detach().masked_fill(left_out, -torch.inf)
    expected = top_k_oracle(pre_act, K)
    for name, latents in all_ways(pruned, x):
        assert torch.equal(latents != 0, expected != 0), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_group_max_takes_the_first(kind, dtype):
    ae, x = make(kind, dtype, GroupMax(16))
    assert_all_agree(ae, x, group_max_oracle(ae.encode_pre_act(x).detach(), 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_the_first(kind, dtype):
    x, weight, bias = draw(kind, dtype)
    dictionary = LearnedDictionary(L, N, None, dtype=dtype)
    with torch.no_grad():
        dictionary.encoder.copy_(weight)
        dictionary.latent_bias.copy_(bias)
    pre_act = dictionary.pre_act(x)
    found = largest(dictionary, x, K).indices
    assert (found.numpy() == first_of_each_row(pre_act, K)).all()
    some = torch.arange(3, L, 7)  # as AuxK looks among the dead ones
    found = largest(dictionary, x, K, some).indices
    assert (found.numpy() == some.numpy()[first_of_each_row(pre_act[:, some], K)]).all()
    active = batch_top_k(pre_act, K)
    assert active.starts is not None
    tokens = torch.repeat_interleave(
        torch.arange(B), torch.tensor([*active.starts, len(active.indices)]).diff()
    )
    expected = np.sort(first_of_each_row(pre_act.flatten(), K * B))
    assert ((tokens * L + active.indices).numpy() == expected).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_search_itself(dtype):
    rows = torch.randint(-3, 4, (50, 4096), generator=torch.Generator().manual_seed(1)).to(dtype)
    for k in (1, 30, 4096):
        assert (top_k(rows, k)[1].numpy() == first_of_each_row(rows, k)).all()
    for k in (1, 5000, rows.numel()):
        expected = np.sort(first_of_each_row(rows.flatten(), k))
        assert (largest_entries(rows.flatten(), k).numpy() == expected).all()


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_nan_counts_as_the_largest(k):
    x = torch.tensor([1.0, torch.nan, 2.0, torch.nan, torch.nan, 2.0, -torch.inf, 2.0, 0.0])
    expected = x.sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(largest_entries(x, k), expected)


def test_sparse_latents_of_equal_values_keep_their_order():
    ae, x = make("all equal", torch.float32, TopK(K))
    found = ae.encode_sparse(x)
    assert isinstance(found, Latents)
    assert torch.equal(found.indices, torch.arange(K).expand(B, K))
