"""What is no dense tensor with values, no name, seed, layer or dtype, where one is asked for: an error of
ours that says so."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.activations import read_documents
from neuron_explainer.dictionaries import TopKConfig, TrainConfig, finetune_decoder, prune, train
from neuron_explainer.errors import InputError, NeuronExplainerError
from neuron_explainer.evaluation import metrics
from neuron_explainer.evaluation.evaluate import measure
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoders.fista import fista
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.pruned import omit_least_active_latents
from neuron_explainer.models.checks import check_seed
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer
from tests.conftest import TINY, make_model

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
ODD: dict[str, Any] = {
    "array": X.numpy(),
    "list": X.tolist(),
    "sparse": X.to_sparse(),
    "meta": X.to("meta"),
    "None": None,
    "text": "x",
}
IDS: dict[str, Any] = {
    "array": torch.ones(1, 3, dtype=torch.long).numpy(),
    "sparse": torch.ones(1, 3, dtype=torch.long).to_sparse(),
    "meta": torch.ones(1, 3, dtype=torch.long, device="meta"),
    "too large for 64 bits": [2**70],
    "too small for 64 bits": [[1, 2], [-(2**70)]],
}


def autoencoder(kind: str) -> Autoencoder:
    ae = Autoencoder(16, 8, TopK(2) if kind == "topk" else None)
    return omit_least_active_latents(ae, 10) if kind == "pruned" else ae


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["relu", "topk", "pruned"])
def test_autoencoders(kind: str, odd: str) -> None:
    ae = autoencoder(kind)
    ways = ("encode", "encode_sparse", "reconstruct", "code", "code_sparse", "normalize", "decode")
    for way in (*ways, "encode_pre_act", "__call__"):
        with pytest.raises(InputError, match=r"(tensor|values|device|'meta')"):
            getattr(ae, way)(ODD[odd])


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "measure": lambda x: measure(autoencoder("relu"), [x]),
    "finetune": lambda x: finetune_decoder(autoencoder("relu"), [x]),
    "prune": lambda x: prune(autoencoder("relu"), [x]),
    "fista": lambda x: fista(x, torch.randn(8, 16), 0.1),
    "fista's dictionary": lambda x: fista(X, x, 0.1),
    "Latents.of": Latents.of,
    "state dict": lambda x: Autoencoder.from_state_dict(
        autoencoder("relu").state_dict() | {"encoder.weight": x}
    ),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, odd: str) -> None:
    with pytest.raises(NeuronExplainerError):
        FUNCTIONS[name](ODD[odd])


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", metrics.__all__)
def test_metrics(name: str, odd: str) -> None:
    if not inspect.isfunction(function := getattr(metrics, name)):
        return
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    with pytest.raises(InputError):
        function(*[ODD[odd]] * len(needed))


@pytest.mark.parametrize("odd", ["array", "list", "sparse", "meta", "None", "text"])
def test_batches_of_a_training(odd: str, tmp_path: Path) -> None:
    config = TrainConfig(TopKConfig(k=2), n_latents=16, steps=2, batch_size=6)
    with pytest.raises(InputError):
        train(config, [ODD[odd]] * 2, tmp_path / "run")


@pytest.mark.parametrize("odd", IDS)
def test_tokens(odd: str) -> None:
    model = make_model()
    for run in (model, lambda ids: model.capture(ids, "logits"), lambda ids: model.sample(ids, 1)):
        with pytest.raises(InputError):
            run(IDS[odd])
    tokens = torch.ones(1, 3, dtype=torch.long)
    for pad in (torch.zeros(1, 3, dtype=torch.bool, device="meta"), [[False] * 3]):
        with pytest.raises(InputError, match="pad must"):
            model(tokens, pad=pad)


def repr_or_long(seed: Any) -> str:
    return "5,000 digits" if isinstance(seed, int) and seed > 10**4000 else repr(seed)


@pytest.mark.parametrize("seed", [2**70, -(2**70), 1.5, True, "3", [1], 10**5000], ids=repr_or_long)
def test_seeds(seed: Any) -> None:
    model = make_model()
    for take in (
        check_seed,
        lambda seed: model.sample([[1]], 1, seed=seed),
        lambda seed: Transformer(TINY, seed=seed),
        lambda seed: WeightGeometry.of(autoencoder("relu"), seed=seed),
        lambda seed: TrainConfig(TopKConfig(k=2), n_latents=4, steps=1, batch_size=2, seed=seed),
    ):
        with pytest.raises(InputError) as caught:
            take(seed)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("layer", [1.5, True, "3", [1], -1, 2.0])
def test_layers(layer: Any) -> None:
    with pytest.raises(NeuronExplainerError, match="whole number of at least 0"):
        ActivationLocation("mlp.post_act", layer)


def test_whole_numbers_of_other_libraries_are_layers() -> None:
    layer: Any = torch.tensor(3).numpy()[()]
    place = ActivationLocation("mlp.post_act", layer)
    assert type(place.layer) is int
    assert place == ActivationLocation("mlp.post_act", 3)


def test_the_way_out_is_told() -> None:
    ae = autoencoder("relu")
    for odd, told in (
        ("array", "found ndarray; torch.as_tensor"),
        ("sparse", r"layout sparse_coo; x.to_dense\(\)"),
        ("meta", "found a tensor on 'meta', which has none"),
    ):
        with pytest.raises(InputError, match=told):
            ae.encode(ODD[odd])


WRONG: list[Any] = [None, 1, [1], {}, object()]
NAMED: dict[str, Callable[[Any], Any]] = {
    "append_at": lambda it: TransformerHooks().append_at(it, torch.relu),
    "append_to_path": lambda it: TransformerHooks().append_to_path(it, torch.relu),
    "location": lambda it: ActivationLocation(it),
    "capture": lambda it: make_model().capture([[1, 2]], it or [None]),
    "found": lambda it: make_model().capture([[1, 2]], "logits")[it],
    "model": Transformer.load,
    "context": ModelContext.from_model_type,
    "autoencoder by name": lambda it: make_autoencoder_context("tiny-tales", it),
    "model of an autoencoder": lambda it: make_autoencoder_context(it, "ae-resid-delta-mlp"),
    "text": lambda it: list(read_documents(it)),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("name", NAMED)
def test_names_that_are_no_text(name: str, wrong: Any) -> None:
    with pytest.raises(NeuronExplainerError):
        NAMED[name](wrong)


@pytest.mark.parametrize(
    "wrong", ["float32", 1, torch.int64, object()], ids=["a name", "a number", "int64", "an object"]
)
def test_dtypes_that_are_none(wrong: Any, tmp_path: Path) -> None:
    autoencoder("relu").save(tmp_path / "ae")
    for take in (
        lambda dtype: Transformer.load("tiny-tales", dtype=dtype),
        lambda dtype: ModelContext.from_model_type("tiny-tales", dtype=dtype),
        lambda dtype: Autoencoder.load(tmp_path / "ae", dtype=dtype),
    ):
        with pytest.raises(InputError, match=r"such as torch.float32, found"):
            take(wrong)


@pytest.mark.parametrize(
    "wrong", [[1], {}, object(), "no such device"], ids=lambda it: type(it).__name__
)
def test_devices_that_are_none(wrong: Any) -> None:
    with pytest.raises(InputError, match="no device"):
        Transformer.load("tiny-tales", device=wrong)
