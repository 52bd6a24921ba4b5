"""A tiny model that reads bytes, to be collated to stores, which show text."""

import base64
from pathlib import Path

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from neuron_explainer.models.tokenizer_files import GPT2_PATTERN, TokenizerSpec
from neuron_explainer.models.tokenizers import write_tiktoken
from tests.activations.helpers import random_corpus
from tests.conftest import make_model

BOS = 256
LENGTHS = [14, 3, 25, 9, 9, 1, 12, 30, 30, 20]


def save_byte_context(folder: Path) -> ModelContext:
    """Two layers, width 16; tokens are bytes, and 256 is ``<|endoftext|>``."""
    source = folder / "source.tiktoken"
    source.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    spec = TokenizerSpec("bytes", GPT2_PATTERN, (("<|endoftext|>", BOS),), (str(source),))
    model = make_model(seed=5, n_vocab=257, ctx_window=12)
    model.tokenizer = write_tiktoken(spec, folder / "tokenizer.tiktoken")
    model.save(folder / "model")
    return StandardModelContext(str(folder / "model"), "cpu")


def byte_corpus(seed: int = 0) -> TokenCorpus:
    """Documents of a few small bytes, so that contexts repeat."""
    return random_corpus(LENGTHS, seed)
