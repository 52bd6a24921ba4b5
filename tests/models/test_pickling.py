"""Contexts and models can be pickled and copied, so that processes started with ``spawn`` can have them."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.models.autoencoder_context import MultiAutoencoderContext
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext
from neuron_explainer.models.huggingface.families import FAMILIES, Architecture, Tap
from neuron_explainer.models.locks import Lock
from neuron_explainer.models.model_context import ModelContext, StubModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.models.weight_names import Dimension

TOKENS = torch.tensor([[5, 6, 7, 8]])
AGAIN = pytest.mark.parametrize(
    "again", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
Again = Callable[[Any], Any]


@AGAIN
@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_context(again: Again, loaded: bool) -> None:
    context = ModelContext.from_model_type("tiny-tales", device="cpu")
    if loaded:
        model = context.get_or_create_model()
        assert isinstance(model, Transformer)
        with torch.no_grad():
            model.unembed.weight.mul_(2)  # an edit goes with it
    other = again(context)
    expected = context.get_weight("unembedding")
    assert torch.equal(other.get_weight("unembedding"), expected)
    assert other.get_or_create_model() is not context.get_or_create_model()
    with torch.no_grad():
        ours, theirs = (each.get_or_create_model()(TOKENS)[0] for each in (context, other))
    assert torch.equal(ours, theirs)
    assert other.encode("The wolf") == context.encode("The wolf")


@AGAIN
def test_a_context_that_knows_sizes_only(again: Again) -> None:
    assert again(StubModelContext({Dimension.LAYERS: 3})).n_layers == 3


@AGAIN
def test_contexts_of_autoencoders(again: Again) -> None:
    context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", "cpu", True)
    x = torch.randn(3, context.get_autoencoder(1).n_inputs)
    other = again(context)
    assert torch.equal(other.get_autoencoder(1).encode(x), context.get_autoencoder(1).encode(x))
    assert torch.equal(other.get_autoencoder(2).encode(x), context.get_autoencoder(2).encode(x))
    both = again(MultiAutoencoderContext.from_autoencoder_context_list([context]))
    assert torch.equal(both.get_autoencoder(1).encode(x), context.get_autoencoder(1).encode(x))


@AGAIN
@pytest.mark.parametrize("given", [False, True])
def test_a_model_of_transformers(again: Again, given: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=24)
    sites = {"resid.torso.delta_mlp": Tap("out", "mlp")}
    architecture = Architecture("transformer.h", sites) if given else None
    model = transformers.AutoModelForCausalLM.from_config(config)
    context = HuggingFaceModelContext.from_model(model, architecture=architecture)
    other = again(context)
    ours, theirs = (each.get_or_create_model() for each in (context, other))
    assert ours.paths == theirs.paths
    assert theirs.architecture.sites.keys() == (sites if given else FAMILIES["gpt2"].sites).keys()
    place = "1/resid.torso.delta_mlp"
    assert torch.equal(ours.capture(TOKENS, place)[place], theirs.capture(TOKENS, place)[place])


def test_locks_are_not_shared() -> None:
    lock = Lock()
    with lock, copy.deepcopy(lock), pickle.loads(pickle.dumps(lock)), lock:
        pass


@torch.no_grad()
def measure(context: ModelContext, place: str, found: Any) -> None:
    """In another process: the sum of what is at a place."""
    found.put(float(context.get_or_create_model().capture(TOKENS, place)[place].sum()))


@torch.no_grad()
def test_a_process_started_with_spawn() -> None:
    context = ModelContext.from_model_type("tiny-tales", device="cpu")
    start = multiprocessing.get_context("spawn")
    found = start.Queue()
    process = start.Process(target=measure, args=(context, "2/mlp.post_act", found))
    process.start()
    value = found.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    expected = context.get_or_create_model().capture(TOKENS, "2/mlp.post_act")["2/mlp.post_act"]
    assert value == pytest.approx(float(expected.sum()), rel=1e-4)


def test_a_folder_is_opened_in_the_other_process(tmp_path: Path) -> None:
    """A context that has loaded nothing carries its name, not the weights."""
    context = ModelContext.from_model_type("tiny-tales", device="cpu")
    assert len(pickle.dumps(context)) < 2000
