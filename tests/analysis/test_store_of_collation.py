"""What a collation found, through a store and back; a store knows its model and its autoencoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_explainer.analysis import CollateConfig, collect
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import write_store
from neuron_explainer.analysis.token_store import TokenStore
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.model_context import ModelContext
from tests.activations.helpers import random_corpus, save_context
from tests.analysis.test_collate import windows_of
from tests.analysis.test_store import same

CONFIG = CollateConfig(
    top=3, intervals=3, per_interval=2, inactive=2, window=5, head_window=4, coactivation_tokens=40
)
PLACE = "1/resid.torso.post_mlp"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    return save_context(tmp_path_factory.mktemp("model") / "tiny")


def test_every_kind_of_unit(context: ModelContext, tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(24, 16, TopK(3), location=PLACE).requires_grad_(False)
    windows = windows_of(random_corpus([14, 3, 25, 9, 9, 1, 12]))
    what: Any = [{"dictionary": autoencoder}, "0/mlp.post_act", PLACE, "1/attn.write_norm"]
    vocabulary = [b" t%d" % i for i in range(context.n_vocab)]
    tokens = TokenStore.write(tmp_path / "tokens", windows.corpus, vocabulary)
    for name, collected in collect(context, what, windows, CONFIG).items():
        path = tmp_path / f"{collected.kind}.store"
        write_store(path, collected, tokens)
        with ExampleStore.open(path) as store:
            assert store.name == name
            assert store.meta["hashed_keys"], "keys need no room"
            same(store.collected(), collected)
            for unit in store.sort("max", limit=3).tolist():
                record = store[unit]
                assert record.intervals == 3
                assert record.top[0].value == record.statistics.max
                if collected.kind != "head":
                    assert record.top[0].strings[record.top[0].peak] in repr(record)
            store.check_model(context)
            other = save_context(tmp_path / collected.kind, seed=3)
            with pytest.raises(InputError, match="collected with another model"):
                store.check_model(other)
            if collected.kind == "latent":
                store.check_autoencoder(autoencoder)
                assert store.subject == store.provenance["autoencoder_sha256"]
            with pytest.raises(InputError, match="collected with another autoencoder"):
                store.check_autoencoder(Autoencoder(24, 16, TopK(3)))


def test_the_vocabulary_of_a_model(text_folder: Path, tmp_path: Path) -> None:
    context = ModelContext.from_model_type(text_folder, device="cpu")
    from neuron_explainer.activations.corpus import tokenize

    corpus = tokenize(["Ein ☃.", "b"], context)
    tokens = TokenStore.of_context(tmp_path / "tokens", corpus, context)
    ids, documents = tokens.windows(np.array([0, corpus.n_tokens - 1]), np.array([4, 1]))
    assert documents.tolist() == [0, 1]
    assert b"".join(tokens.pieces(ids[0])) == b"Ein "
    assert tokens.pieces(corpus.tokens.tolist()) == [bytes([b]) for b in "Ein ☃.b".encode()]


@pytest.fixture
def text_folder(text_model, tmp_path: Path) -> Path:
    text_model.save(tmp_path / "model")
    return tmp_path / "model"
