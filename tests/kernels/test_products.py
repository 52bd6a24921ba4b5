"""The fast products and the copies of weights compute what the plain ones do, and are never stale."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from neuron_explainer.kernels import products as packing
from neuron_explainer.kernels.products import WeightCopies, linear, linears, product
from neuron_explainer.models import transformer
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoders.nonlinearities import JumpReLU
from neuron_explainer.models.hooks import AtLayers, TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer
from tests.conftest import assert_close, keep_in, make_model, random_tokens

TOKENS = random_tokens(3, 9, seed=2)
PROMPTS = {1: [[3, 4]], 3: [[3, 4], [5], [6, 7, 8]]}


@pytest.fixture(autouse=True)
def _every_size_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LARGE", 0)
    monkeypatch.setattr(transformer, "STEPS_WORTH_COPIES", 2)


def layer_of(n_in: int, n_out: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out, bias=bias)


# --------------------------------------------------------------------------------- products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 5)])
@pytest.mark.parametrize("sizes", [(16, 48), (48, 16)])
@pytest.mark.parametrize("copies", [None, True, False])
@torch.no_grad()
def test_products_equal_float64(
    bias: bool, gelu: bool, shape: tuple[int, int], sizes: tuple[int, int], copies: bool | None
) -> None:
    layer, x = layer_of(*sizes, bias), torch.randn(*shape, sizes[0])
    kept = None if copies is None else WeightCopies(single=copies)
    exact = nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    exact = nn.functional.gelu(exact, approximate="tanh") if gelu else exact
    for _ in range(2):
        assert_close(linear(x, layer, kept, gelu), exact, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_product_equals_the_formula(
    dtype: torch.dtype, bias: bool, relu: bool, transposed: bool, grad: bool
) -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(2, 5, 16), torch.randn(48, 16), torch.randn(48)
    weight = weight.t().contiguous().t() if transposed else weight
    inputs = [x, weight, *([offset] if bias else [])]
    inputs = [tensor.to(dtype).requires_grad_(grad) for tensor in inputs]
    doubles = [tensor.detach().double().requires_grad_(grad) for tensor in inputs]
    found = product(inputs[0], inputs[1], inputs[2] if bias else None, relu)
    exact = doubles[0] @ doubles[1].t() + (doubles[2] if bias else 0)
    exact = exact.clamp(min=0) if relu else exact
    assert found.dtype == dtype
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-6
    assert_close(found.double(), exact, tolerance)
    if grad:
        found.sum().backward()
        exact.sum().backward()
        for tensor, double in zip(inputs, doubles, strict=True):
            assert tensor.grad is not None
            assert double.grad is not None
            assert_close(tensor.grad.double(), double.grad, 2 * tolerance)


@pytest.mark.parametrize("where", ["x", "weight", "bias", "infinities"])
@torch.no_grad()
def test_relu_of_nan_is_nan(where: str) -> None:
    """oneDNN's own is 0, which would pass for a latent that is not active."""
    x, weight, bias = torch.randn(100, 8), torch.randn(12, 8), torch.randn(12)
    if where == "infinities":
        x[3] = torch.tensor([torch.inf, -torch.inf] * 4)
    else:
        {"x": x, "weight": weight, "bias": bias}[where][5] = torch.nan
    expected = (x @ weight.t() + bias).relu()
    assert expected.isnan().any()
    assert torch.equal(product(x, weight, bias, relu=True).isnan(), expected.isnan())
    x, weight, bias = x[60:], weight[6:], bias[6:]
    assert_close(product(x, weight, bias, relu=True), expected[60:, 6:], 1e-6)


def test_sums_that_might_overflow_are_known() -> None:
    x, weight, bias = torch.full((9, 4), 2.0**60), torch.full((3, 4), -(2.0**60)), torch.zeros(3)
    assert packing._stays_finite(x, weight, bias)  # 2¹²² at most
    assert not packing._stays_finite(x, weight * 2**5, bias)
    assert not packing._stays_finite(x, weight, bias + 2.0**127)
    assert not packing._stays_finite(x * torch.inf, weight, None)


@pytest.mark.parametrize("in_memory", ["apart", "columns of one matrix", "columns, permuted"])
@pytest.mark.parametrize("copies", [None, True, False])
@torch.no_grad()
def test_products_of_several_maps(in_memory: str, copies: bool | None) -> None:
    layers = (layer_of(8, 6, seed=1), layer_of(8, 6, seed=2), layer_of(8, 6, seed=3))
    if in_memory != "apart":
        whole = torch.randn(8, 18)
        order = [1, 0, 2] if "permuted" in in_memory else [0, 1, 2]
        for layer, i in zip(layers, order, strict=True):
            layer.weight = nn.Parameter(whole[:, 6 * i : 6 * i + 6].t())
        assert (packing._joined(layers) is None) == ("permuted" in in_memory)
    kept = None if copies is None else WeightCopies(single=copies)
    for shape in ((1, 1, 8), (2, 3, 8)):
        x = torch.randn(shape)
        for found, layer in zip(linears(x, layers, kept), layers, strict=True):
            assert_close(found, layer(x), 1e-6)


def test_gradients_take_the_plain_path() -> None:
    layer, x = layer_of(8, 6), torch.randn(2, 3, 8, requires_grad=True)
    linear(x, layer, WeightCopies(single=False), gelu=True).sum().backward()
    found = [x.grad, layer.weight.grad, layer.bias.grad]
    exact = layer_of(8, 6).double()
    y = x.detach().double().requires_grad_()
    nn.functional.gelu(exact(y), approximate="tanh").sum().backward()
    for grad, expected in zip(found, [y.grad, exact.weight.grad, exact.bias.grad], strict=True):
        assert grad is not None
        assert expected is not None
        assert_close(grad, expected, 1e-6)


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")  # torch's own, in jvp
@torch.no_grad()
def test_transformations_and_module_hooks_are_respected() -> None:
    layer, x, direction = layer_of(8, 6), torch.randn(4, 8), torch.randn(4, 8)
    value, tangent = torch.func.jvp(lambda z: linear(z, layer), (x,), (direction,))[:2]
    assert_close(value, layer(x), 1e-6)
    assert_close(tangent, direction @ layer.weight.t(), 1e-6)
    assert_close(torch.vmap(lambda z: linear(z, layer))(x), layer(x), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, layer).dtype == torch.bfloat16
    layer.register_forward_hook(lambda module, args, out: out + 1)
    assert_close(linear(x, layer), x @ layer.weight.t() + layer.bias + 1, 1e-6)


# ------------------------------------------------------------------------------- autoencoders


@pytest.mark.parametrize("activation", [nn.ReLU(), TopK(5), JumpReLU(torch.full((40,), 0.1))])
@pytest.mark.parametrize("glu", [True, False])
def test_autoencoders_without_gradients_equal_with(activation: nn.Module, glu: bool) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(40, 12, activation, glu=glu)
    x = torch.randn(2, 30, 12)
    autoencoder.requires_grad_()
    pre_act, latents, recons = autoencoder(x)
    assert recons.requires_grad
    with torch.no_grad():
        assert_close(autoencoder.encode_pre_act(x), pre_act, 1e-6)
        assert_close(autoencoder.encode(x), latents, 1e-6)
        assert_close(autoencoder.encode_sparse(x).dense(), latents, 1e-6)
        assert_close(autoencoder.reconstruct(x), recons, 1e-6)


# ---------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("path", [None, *SITES])
def test_without_gradients_equals_with(path: str | None) -> None:
    model, hooks = make_model(), TransformerHooks()
    if path is not None:
        hooks.append_to_path(f"{path}.fwd", lambda x: x * 0.5)
    expected, _ = model(TOKENS, hooks=hooks)
    assert expected.requires_grad
    with torch.no_grad():
        found, _ = model(TOKENS, hooks=hooks)
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("path", SITES)
def test_what_a_hook_was_given_stays(path: str) -> None:
    """By reference, over whole generations: nothing writes to it afterwards."""
    model, given = make_model(), list[tuple[Tensor, Tensor]]()

    def keep(x: Tensor) -> Tensor:
        given.append((x, x.clone()))
        return x

    hooks = TransformerHooks().append_to_path(f"{path}.fwd", keep)
    for prompts in PROMPTS.values():
        model.sample(prompts, 5, temperature=0, hooks=hooks)
    with torch.no_grad():
        model(TOKENS, hooks=hooks)
    assert given
    assert all(torch.equal(x, as_given) for x, as_given in given)


@pytest.mark.parametrize("rows", PROMPTS)
@pytest.mark.parametrize("hooked", [False, True])
def test_generations_with_copies_equal_those_without(
    rows: int, hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = TransformerHooks()
    if hooked:
        hooks.mlp.post_act.append_fwd(AtLayers(1).append(lambda x: x * 0))
    seen: dict[str, list[Tensor]] = {"copies": [], "plain": []}
    for kind in seen:
        monkeypatch.setattr(transformer, "STEPS_WORTH_COPIES", 2 if kind == "copies" else 99)
        model = make_model()
        looking = hooks.copy()
        looking.logits.append_fwd(keep_in(seen[kind]))
        model.sample(PROMPTS[rows], 6, temperature=0, hooks=looking)
        assert (model.weight_copies_nbytes > 0) == (kind == "copies")
    assert len(seen["copies"]) == 6
    for found, expected in zip(seen["copies"], seen["plain"], strict=True):
        assert_close(found[:, -1], expected[:, -1], 2e-6)


def _set_data(model: Transformer) -> None:
    model.unembed.weight.data = model.unembed.weight.data.flip(0)


def _step(model: Transformer) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(TOKENS)[0].square().sum().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Transformer], object]] = {
    "in place": lambda m: nn.init.normal_(m.unembed.weight),
    ".data in place": lambda m: m.unembed.weight.data.mul_(-1),
    ".data, rows exchanged": lambda m: m.unembed.weight.data.copy_(m.unembed.weight.flip(0)),
    ".data replaced": _set_data,
    "numpy": lambda m: m.unembed.weight.detach().numpy().__imul__(-1),
    "one bias, by numpy": lambda m: next(m.layers).attn.k_proj.bias.detach().numpy().fill(3),
    "a new parameter": lambda m: setattr(m.unembed, "weight", nn.Parameter(-m.unembed.weight)),
    "load_state_dict": lambda m: m.load_state_dict(make_model(seed=5).state_dict()),
    "assigned": lambda m: m.load_state_dict(make_model(seed=5).state_dict(), assign=True),
    "an optimizer": _step,
    "simplify": lambda m: m.simplify(),
    "to and back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("rows", PROMPTS)
@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_never_stale(rows: int, change: str) -> None:
    model = make_model()

    def logits() -> Tensor:
        seen: list[Tensor] = []
        hooks = TransformerHooks()
        hooks.logits.append_fwd(keep_in(seen))
        model.sample(PROMPTS[rows], 2, temperature=0, hooks=hooks)
        return torch.stack([x[:, -1] for x in seen])

    logits()
    assert model.weight_copies_nbytes > 0
    CHANGES[change](model)
    found = logits()
    model.drop_weight_copies()
    assert torch.equal(found, logits())


def test_unchanged_copies_are_kept_and_leave_no_trace() -> None:
    model = make_model()
    model.sample(PROMPTS[3], 4, temperature=0)
    assert model._weight_copies is not None
    before = {id(kept) for kept in model._weight_copies._copies.values()}
    model.sample(PROMPTS[3], 4, temperature=0)
    assert {id(kept) for kept in model._weight_copies._copies.values()} == before
    assert set(model.state_dict()) == set(make_model().state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.weight_copies_nbytes == 0
        assert torch.equal(other(TOKENS)[0], model(TOKENS)[0])
    model.drop_weight_copies()
    assert model.weight_copies_nbytes == 0


def test_runs_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_model().sample(PROMPTS[3], 5, temperature=0)["tokens"]
    monkeypatch.setattr(packing, "_product", None)
    monkeypatch.setattr(packing, "_pack", None)
    assert make_model().sample(PROMPTS[3], 5, temperature=0)["tokens"] == expected
