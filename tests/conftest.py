"""Small models with random weights, and the comparisons that the tests share."""

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Everything here is small: a second thread costs more than it saves, and with one the results do not
# depend on the machine. Set before torch is imported, for the processes that tests start as well.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.models.locations import SITES
from neuron_explainer.models.tokenizer_files import GPT2_PATTERN, TokenizerSpec
from neuron_explainer.models.tokenizers import write_tiktoken
from neuron_explainer.models.transformer import Transformer, TransformerConfig
from tests.reference import gpt2_numpy

PER_LAYER = [path for path, site in SITES.items() if site.per_layer]
ONCE = [path for path, site in SITES.items() if not site.per_layer]

torch.set_num_threads(1)

TINY = TransformerConfig(
    enc="none", ctx_window=12, d_model=16, n_layers=2, n_heads=4, m_mlp=3, n_vocab=29
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs on all cores; chosen files run in one process, which starts faster.

    ``-n 0`` runs the whole suite in one process, ``-n 4`` anything in four.
    """
    whole = config.args == config.getini("testpaths")
    return min(os.cpu_count() or 1, 8) if whole else 0


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes go by the name of their argument: those of gzip hold the time, and each process has its own."""
    return argname if isinstance(val, bytes) else None


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Transformer:
    """A tiny model whose every parameter matters: no bias is 0 and no gain 1, attention is uneven."""
    config = TransformerConfig(**{**TINY.to_dict(), **sizes})
    model = Transformer(config, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.25
            if "embed" in name or "q_proj" in name or "k_proj" in name:
                scale = 0.7  # so that the next token depends on the tokens before
            elif name == "final_ln.bias":
                scale = 0.05  # and not on this
            parameter.add_((scale * noise).to(dtype))
    return model


def random_tokens(*shape: int, seed: int = 0, n_vocab: int = TINY.n_vocab) -> Tensor:
    """Token ids of a shape."""
    return torch.randint(0, n_vocab, shape, generator=torch.Generator().manual_seed(seed))


def reference_sites(
    model: Transformer, tokens: Tensor, pad: Tensor | None = None
) -> gpt2_numpy.Sites:
    """What the numpy implementation says each site holds."""
    parameters = {k: v.double().numpy() for k, v in model.state_dict().items()}
    return gpt2_numpy.forward(
        parameters,
        tokens.numpy(),
        model.cfg.n_heads,
        None if pad is None else pad.numpy(),
        model.cfg.activation,
        model.cfg.norm_eps,
    )


def assert_close(found: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Equal within ``tolerance`` of the largest value; infinities must stand at the same places."""
    found, expected = (
        x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)
        for x in (found, expected)
    )
    assert found.shape == expected.shape, what
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite], err_msg=what)
    largest = np.abs(expected[finite]).max(initial=0.0)
    difference = np.abs(found[finite] - expected[finite]).max(initial=0.0)
    assert difference <= tolerance * largest, (
        f"{what}: off by {difference:.3g}, the largest value being {largest:.3g}"
    )


def keep_in(store: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that remembers what it is given."""

    def hook(x: Tensor) -> Tensor:
        store.append(x)
        return x

    return hook


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, on its own tensors; zeros where the loss does not reach."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for name, parameter, grad in zip(names, parameters, found, strict=True)
    }


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Each parameter's gradient, within ``tolerance`` of the largest one of the whole model."""
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        difference = float((found[name] - grad).abs().max())
        assert difference <= tolerance * largest, (
            f"{name}: off by {difference:.3g} of {largest:.3g}"
        )


@pytest.fixture(autouse=True)
def _private_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test reads or fills the user's own cache of downloads."""
    if "NEURON_EXPLAINER_CACHE" not in os.environ:
        folder = tmp_path_factory.getbasetemp() / "neuron-explainer-cache"
        monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(folder))


@pytest.fixture(scope="session")
def tiny_model() -> Transformer:
    """Two layers, four heads, width 16, 29 tokens, context of 12. Not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def tiny_model64() -> Transformer:
    """The same in float64. Not to be changed."""
    return make_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSpec:
    """A tokenizer without a download: each byte a token, ``<|endoftext|>`` is 256."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    source = folder / "source.tiktoken"
    source.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    spec = TokenizerSpec("bytes", GPT2_PATTERN, (("<|endoftext|>", 256),), (str(source),))
    return write_tiktoken(spec, folder / "tokenizer.tiktoken")


@pytest.fixture(scope="session")
def text_model(byte_tokenizer: TokenizerSpec) -> Transformer:
    """A tiny model that reads and writes text, a byte at a time."""
    model = make_model(seed=5, n_vocab=257, ctx_window=40)
    model.tokenizer = byte_tokenizer
    return model
