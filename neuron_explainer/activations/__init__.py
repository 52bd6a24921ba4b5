"""From text to streams of activations: documents, token windows, harvesting, stores on disk, shuffling.

The usual way from text to the batches that a dictionary is trained on::

    context = ModelContext.from_model_type("tiny-tales")
    corpus = tokenize(read_documents("books/"), context)  # write_token_file: for more than memory
    training, held_out = corpus.split(0.05)
    windows = TokenWindows(training, 128, 32, bos=start_token(context), epochs=None)
    source = LiveSource(Harvester(context, "2/mlp.post_act", keep_bos=False), windows)
    with ShuffleBuffer(source, capacity=500_000, batch_size=4096, num_tokens=100_000_000) as batches:
        for x in batches:  # [4096, n]
            ...

The names below are imported when they are first used: token files can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_explainer.activations.buffer import ShuffleBuffer
    from neuron_explainer.activations.chunks import ActivationBatch, ActivationSource
    from neuron_explainer.activations.corpus import TokenCorpus, start_token, tokenize
    from neuron_explainer.activations.data_config import (
        DataConfig,
        is_store,
        open_buffer,
        open_corpus,
        open_harvester,
        open_windows,
    )
    from neuron_explainer.activations.documents import (
        Documents,
        huggingface_documents,
        read_documents,
        row_documents,
    )
    from neuron_explainer.activations.harvest import Harvester, LiveSource
    from neuron_explainer.activations.prefetch import Prefetcher
    from neuron_explainer.activations.store import (
        SOURCE_FILE,
        ActivationStore,
        StoreSource,
        StoreWriter,
        check_store_folder,
        harvest_to_store,
    )
    from neuron_explainer.activations.token_files import open_token_file, write_token_file
    from neuron_explainer.activations.windows import TokenBatch, TokenIterator, TokenWindows

__all__ = [
    "SOURCE_FILE",
    "ActivationBatch",
    "ActivationSource",
    "ActivationStore",
    "DataConfig",
    "Documents",
    "Harvester",
    "LiveSource",
    "Prefetcher",
    "ShuffleBuffer",
    "StoreSource",
    "StoreWriter",
    "TokenBatch",
    "TokenCorpus",
    "TokenIterator",
    "TokenWindows",
    "check_store_folder",
    "harvest_to_store",
    "huggingface_documents",
    "is_store",
    "open_buffer",
    "open_corpus",
    "open_harvester",
    "open_token_file",
    "open_windows",
    "read_documents",
    "row_documents",
    "start_token",
    "tokenize",
    "write_token_file",
]

_MODULES = (
    *("corpus", "token_files", "documents"),  # without torch
    *("windows", "harvest", "chunks", "store", "prefetch", "buffer", "data_config"),
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
