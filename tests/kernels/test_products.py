"""The fast products and the copies of weights compute what the plain ones do, and are never stale."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from neuron_explainer.kernels import products
from neuron_explainer.kernels.products import LARGE, linear, linears, product, weight_copies
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoders.nonlinearities import JumpReLU
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer
from tests.conftest import assert_close, make_model, random_tokens

PROMPTS = [[3, 4], [5], [6, 7, 8]]
STEPS = products.STEPS_WORTH_COPIES


def make_long() -> Transformer:
    """A tiny model with a context that a long generation fits in."""
    return make_model(ctx_window=STEPS + 8)


def layer_of(n_in: int, n_out: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out, bias=bias)


# --------------------------------------------------------------------------------- products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 5)])
@pytest.mark.parametrize("sizes", [(16, 48), (48, 16)])
@pytest.mark.parametrize("copies", [True, False])
@torch.no_grad()
def test_products_equal_float64(
    bias: bool, gelu: bool, shape: tuple[int, int], sizes: tuple[int, int], copies: bool
) -> None:
    layer, x = layer_of(*sizes, bias), torch.randn(*shape, sizes[0])
    exact = nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    exact = nn.functional.gelu(exact, approximate="tanh") if gelu else exact
    with weight_copies(4, STEPS) if copies else nullcontext():
        for _ in range(2):
            assert_close(linear(x, layer, gelu), exact, 1e-6)


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
    found = product(inputs[0], inputs[1], inputs[2] if bias else None, relu, large=0)
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
    assert torch.equal(product(x, weight, bias, relu=True, large=0).isnan(), expected.isnan())
    x, weight, bias = x[60:], weight[6:], bias[6:]
    assert_close(product(x, weight, bias, relu=True, large=0), expected[60:, 6:], 1e-6)


def test_sums_that_might_overflow_are_known() -> None:
    x, weight, bias = torch.full((9, 4), 2.0**60), torch.full((3, 4), -(2.0**60)), torch.zeros(3)
    assert products._stays_finite(x, weight, bias)  # 2¹²² at most
    assert not products._stays_finite(x, weight * 2**5, bias)
    assert not products._stays_finite(x, weight, bias + 2.0**127)
    assert not products._stays_finite(x * torch.inf, weight, None)


@pytest.mark.parametrize("in_memory", ["apart", "columns of one matrix", "columns, permuted"])
@pytest.mark.parametrize("copies", [True, False])
@torch.no_grad()
def test_products_of_several_maps(in_memory: str, copies: bool) -> None:
    layers = (layer_of(8, 6, seed=1), layer_of(8, 6, seed=2), layer_of(8, 6, seed=3))
    if in_memory != "apart":
        whole = torch.randn(8, 18)
        order = [1, 0, 2] if "permuted" in in_memory else [0, 1, 2]
        for layer, i in zip(layers, order, strict=True):
            layer.weight = nn.Parameter(whole[:, 6 * i : 6 * i + 6].t())
        assert (products._joined(layers) is None) == ("permuted" in in_memory)
    with weight_copies(4, STEPS) if copies else nullcontext():
        for shape in ((1, 1, 8), (2, 3, 8)):
            x = torch.randn(shape)
            for found, layer in zip(linears(x, layers), layers, strict=True):
                assert_close(found, layer(x), 1e-6)


def test_gradients_take_the_plain_path() -> None:
    layer, x = layer_of(8, 6), torch.randn(2, 3, 8, requires_grad=True)
    with weight_copies(4, STEPS):
        linear(x, layer, gelu=True).sum().backward()
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
    model, hooks = make_model(d_model=64, ctx_window=32), TransformerHooks()
    tokens = random_tokens(16, 32, seed=2)
    assert tokens.numel() * 64 * 64 >= LARGE  # so that each product of a layer goes to oneDNN
    if path is not None:
        hooks.append_to_path(f"{path}.fwd", lambda x: x * 0.5)
    expected, _ = model(tokens, hooks=hooks)
    assert expected.requires_grad
    with torch.no_grad():
        found, _ = model(tokens, hooks=hooks)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("path", SITES)
def test_what_a_hook_was_given_stays(path: str) -> None:
    """By reference, over whole generations: nothing writes to it afterwards."""
    model, given = make_model(), list[tuple[Tensor, Tensor]]()

    def keep(x: Tensor) -> Tensor:
        given.append((x, x.clone()))
        return x

    hooks = TransformerHooks().append_to_path(f"{path}.fwd", keep)
    for prompts in (PROMPTS[:1], PROMPTS):
        model.sample(prompts, 5, temperature=0, hooks=hooks)
    with torch.no_grad():
        model(random_tokens(3, 9), hooks=hooks)
    assert given
    assert all(torch.equal(x, as_given) for x, as_given in given)


@torch.no_grad()
def test_a_pass_with_copies_equals_one_without() -> None:
    model, tokens = make_model(), random_tokens(3, 9)
    expected, _ = model(tokens)
    with weight_copies(3, STEPS):
        found, _ = model(tokens)
        assert not torch.equal(found, expected)  # they round otherwise: the copies are used
        assert_close(found, expected, 2e-6)
    assert torch.equal(model(tokens)[0], expected)


def test_long_and_short_generations_agree() -> None:
    """Long ones of several rows multiply with copies."""
    model = make_long()
    rows = model.sample(PROMPTS, STEPS, temperature=0)["tokens"]
    assert model.sample(PROMPTS, STEPS - 1, temperature=0)["tokens"] == [row[:-1] for row in rows]
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert model.sample(prompt, STEPS, temperature=0)["tokens"] == [row]


def _set_data(model: Transformer) -> None:
    model.unembed.weight.data = model.unembed.weight.data.flip(0)


CHANGES: dict[str, Callable[[Transformer], object]] = {
    "in place": lambda m: nn.init.eye_(m.unembed.weight),
    ".data in place": lambda m: m.unembed.weight.data.mul_(-1),
    ".data, rows exchanged": lambda m: m.unembed.weight.data.copy_(m.unembed.weight.flip(0)),
    ".data replaced": _set_data,
    "numpy": lambda m: m.unembed.weight.detach().numpy().__imul__(-1),
    "one bias, by numpy": lambda m: next(m.layers).attn.k_proj.bias.detach().numpy().fill(3),
    "a new parameter": lambda m: setattr(m.unembed, "weight", nn.Parameter(-m.unembed.weight)),
    "load_state_dict": lambda m: m.load_state_dict(make_long().state_dict()),
    "simplify": lambda m: m.simplify(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_counts_in_the_next_generation(change: str) -> None:
    model = make_long()
    model.sample(PROMPTS, STEPS, temperature=0)
    CHANGES[change](model)
    fresh = make_long()
    fresh.load_state_dict(model.state_dict())
    expected = fresh.sample(PROMPTS, STEPS, temperature=0)["tokens"]
    assert model.sample(PROMPTS, STEPS, temperature=0)["tokens"] == expected


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("by", ["a hook of the tree", "a hook of a module"])
def test_a_change_of_weights_counts_in_the_same_generation(change: str, by: str) -> None:
    """A hook may do it at any step; so with hooks no copies are used."""
    model, calls = make_long(), list[int]()

    def count(*arguments: object) -> None:
        calls.append(0)
        if len(calls) == 10:
            CHANGES[change](model)

    def count_in_tree(x: Tensor) -> Tensor:
        count()
        return x

    hooks = TransformerHooks()
    if by == "a hook of the tree":
        hooks.resid.post_emb.append_fwd(count_in_tree)
    else:
        model.tok_embed.register_forward_hook(count)
    found = model.sample(PROMPTS[:1] * 3, STEPS, temperature=0, hooks=hooks)["tokens"]
    assert len(calls) >= STEPS

    plain, tokens, H = make_long(), torch.tensor(PROMPTS[:1] * 3), None
    expected: list[Tensor] = []
    for step in range(STEPS):
        with torch.no_grad():
            if step == 9 and by == "a hook of a module":
                CHANGES[change](plain)
            X, H, _, _ = plain.run_embed(tokens, H)
            if step == 9 and by == "a hook of the tree":
                CHANGES[change](plain)
            X, H = plain.run_ln_f(*plain.run_torso(X, H))
            tokens = plain.unembed(X[:, -1:]).argmax(-1)
        expected.append(tokens)
    assert found == torch.cat(expected, dim=1).tolist()


def test_nothing_is_left_on_the_model_after_a_generation() -> None:
    model = make_long()
    attributes, tensors = set(vars(model)), set(model.state_dict())
    model.sample(PROMPTS, STEPS, temperature=0)
    assert set(vars(model)) == attributes
    assert set(model.state_dict()) == tensors
    assert products._copies.get() is None
    with pytest.raises(RuntimeError, match="on purpose"), weight_copies(3, STEPS):
        raise RuntimeError("on purpose")
    assert products._copies.get() is None


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, when flags are set
def test_runs_without_onednn() -> None:
    expected = make_long().sample(PROMPTS, STEPS, temperature=0)["tokens"]
    x, layer = torch.randn(4, 16), layer_of(16, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert make_long().sample(PROMPTS, STEPS, temperature=0)["tokens"] == expected
        with torch.no_grad():
            assert torch.equal(product(x, layer.weight, layer.bias, large=0), layer(x))
