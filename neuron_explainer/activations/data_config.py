"""One frozen dataclass of settings, from text to activations, and functions that open what it describes.

windows = open_windows(context, "books/", DataConfig(context_length=256), epochs=None)
batches = open_buffer(context, "books/", "3/mlp.post_act", DataConfig(), batch_size=4096)
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neuron_explainer import files
from neuron_explainer.activations.buffer import ShuffleBuffer
from neuron_explainer.activations.chunks import ActivationBatch, ActivationSource
from neuron_explainer.activations.corpus import TokenCorpus, start_token, tokenize
from neuron_explainer.activations.documents import (
    check_pattern,
    huggingface_documents,
    read_documents,
)
from neuron_explainer.activations.harvest import Harvester, LiveSource
from neuron_explainer.activations.store import ActivationStore, StoreSource
from neuron_explainer.activations.token_files import open_token_file
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.errors import InputError, LocationError, SourceError, did_you_mean
from neuron_explainer.files import origins
from neuron_explainer.models.locations import ActivationLocation, LocationLike, parse_locations
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.settings.fields import check_types

logger = logging.getLogger(__name__)

Part = Literal["training", "held_out", "all"]
_SHORTEST_PIECE, _LONGEST_PIECE = 64, 8192  # tokens; where a document is cut, a sentence may be too


@dataclass(frozen=True)
class DataConfig:
    """How text becomes vectors."""

    column: str = "text"
    """The field that holds the text, in CSV, TSV, JSONL and Parquet files."""
    split: str | None = None
    """A regular expression; .txt files are cut into documents at its matches. If not given, a file is
    one document."""
    corpus_tokens: int | None = None
    """Read documents until there are this many tokens, for text that is larger than memory; all if not
    given."""
    hold_out: float = 0.05
    """Share of the tokens that is set apart to measure on; 0 for none. Whole documents are set apart, or
    pieces of them if the text has too few documents."""
    context_length: int = 128
    """Number of tokens in a window, including the start token."""
    windows_per_forward: int = 32
    """Number of windows that go through the model at once."""
    pack: bool = True
    """Pack documents one after the other; if not, each document is one window, cut and padded."""
    bos: bool = True
    """Begin each window and each document with the model's start token."""
    keep_bos: bool = False
    """Keep the activations of start tokens, including those that stand in the text."""
    max_norm_multiple: float | None = None
    """Leave out tokens whose norm is more than this many times the median norm; none if not given."""
    buffer_tokens: int = 262_144
    """Number of activations in memory, from which batches are drawn at random."""
    model_autocast: bool = False
    """Let the model compute in bfloat16 where it can."""
    data_seed: int = 0
    """Seed of the hold-out, of the order of windows, and of batches."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("corpus_tokens", "windows_per_forward", "buffer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, found {value}.")
        if self.context_length < (least := 2 if self.bos else 1):
            raise InputError(
                f"context_length must be at least {least}, found {self.context_length}: a window holds "
                f"{'the start token and ' if self.bos else ''}some text."
            )
        if not 0 <= self.hold_out < 1:
            raise InputError(f"hold_out must be at least 0 and below 1, found {self.hold_out}.")
        if self.max_norm_multiple is not None and self.max_norm_multiple <= 0:
            raise InputError(f"max_norm_multiple must be above 0, found {self.max_norm_multiple}.")
        if not 0 <= self.data_seed < 2**64:
            raise InputError(f"data_seed must be in 0 to 2**64 - 1, found {self.data_seed}.")
        if self.split is not None:
            check_pattern(self.split)


def open_corpus(context: ModelContext, text: str | Path, config: DataConfig) -> TokenCorpus:
    """The documents of a text as tokens, ``config.corpus_tokens`` of them at most.

    ``text`` is a file, a folder of files, the folder of a token file (always used whole), or a data set
    of Hugging Face (``hf:OWNER/NAME``). How much was read is logged.
    """
    corpus = _open_corpus(context, text, config)
    n_empty = int(np.count_nonzero(corpus.lengths == 0))
    empty = f" ({n_empty:,} of them without text)" if n_empty else ""
    documents = "1 document" if len(corpus) == 1 else f"{len(corpus):,} documents"
    logger.info("%s: %s%s, %s tokens", text, documents, empty, f"{corpus.n_tokens:,}")
    return corpus


def _open_corpus(context: ModelContext, text: str | Path, config: DataConfig) -> TokenCorpus:
    if str(text).startswith("hf:"):
        if str(text).count("/") > 1:
            raise SourceError(
                f"{text}: in the place of a text, hf:OWNER/NAME names a data set of the Hugging Face hub; "
                "give a single file by its https:// address."
            )
        documents = huggingface_documents(str(text).removeprefix("hf:"), config.column)
        return tokenize(documents, context, max_tokens=config.corpus_tokens)
    if not (files.is_remote(str(text)) or Path(text).exists()):
        parent = Path(text).parent
        near = [str(parent / path.name) for path in parent.glob("*")]
        raise SourceError(f"there is no file or folder {text}.{did_you_mean(str(text), near)}")
    if _manifest_kind(text) == "token_file":
        return open_token_file(text, context)
    documents = read_documents(text, config.column, split=config.split)
    return tokenize(documents, context, max_tokens=config.corpus_tokens)


def open_windows(
    context: ModelContext,
    text: str | Path,
    config: DataConfig,
    *,
    part: Part = "training",
    epochs: int | None = 1,
) -> TokenWindows:
    """Windows of one part of the text, in seeded order.

    Args:
        context: the model that will read the windows.
        text: as for :func:`open_corpus`.
        config: how the text is read and cut.
        part: ``"held_out"`` is the part that ``config.hold_out`` sets apart, ``"training"`` the rest.
        epochs: how often the text is read; None: without end.
    """
    corpus = open_corpus(context, text, config)
    if part != "all" and config.hold_out:
        training, held_out = _set_apart(corpus, config)
        corpus = held_out if part == "held_out" else training
    elif part == "held_out":
        raise InputError(
            "hold_out is 0, so no document is held out: measure on another text, or train with hold_out "
            "above 0."
        )
    return TokenWindows(
        corpus,
        config.context_length,
        config.windows_per_forward,
        concat=config.pack,
        bos=start_token(context) if config.bos else None,
        seed=config.data_seed,
        epochs=epochs,
    )


def _record(
    context: ModelContext, source: str | Path, config: DataConfig, described: Mapping[str, Any]
) -> dict[str, Any]:
    """Model, text and settings: what it takes to find again which documents were held out."""
    record = {
        "model": origins.full_path(context.reference),
        "source": origins.full_path(str(source)),
        "source_fingerprint": described.get("source_fingerprint"),
        "data": asdict(config),
    }
    harvested = ActivationStore(source).record if is_store(source) else {}
    return {**record, "harvest": harvested} if harvested else record


def _set_apart(corpus: TokenCorpus, config: DataConfig) -> tuple[TokenCorpus, TokenCorpus]:
    """(Training, held out); a text of too few documents is cut into pieces before that."""
    parts, wanted = None, config.hold_out
    if np.count_nonzero(corpus.lengths) > 1:
        parts = corpus.split(wanted, config.data_seed)
    if parts is None or not wanted / 2 <= parts[1].n_tokens / corpus.n_tokens <= 2 * wanted:
        # Four pieces or more are held out then. The length depends on nothing that evaluating changes.
        longest = min(int(wanted * corpus.n_tokens / 4), _LONGEST_PIECE)
        length = max(_SHORTEST_PIECE, longest)
        if corpus.n_tokens >= 2 * length:
            logger.info(
                "%s: whole documents do not make a share of %g, so the text is cut into pieces of %d "
                "tokens; --split, or split= in Python, cuts it where you want",
                *(corpus.name, wanted, length),
            )
            parts = corpus.cut(length).split(wanted, config.data_seed)
    if parts is None:
        raise InputError(
            f"{corpus.name} is a single document of {corpus.n_tokens} tokens, too short to set some of "
            "it apart: set hold_out to 0 and measure on another text."
        )
    n_tokens = parts[1].n_tokens
    logger.info(
        "%s: %d of %d documents are held out to measure on, %s of %s tokens (%.1f %%)",
        *(corpus.name, len(parts[1]), len(parts[0]) + len(parts[1])),
        *(f"{n_tokens:,}", f"{corpus.n_tokens:,}", 100 * n_tokens / corpus.n_tokens),
    )
    return parts


def open_harvester(
    context: ModelContext, locations: LocationLike | Iterable[LocationLike], config: DataConfig
) -> Harvester:
    """The :class:`Harvester` that a config describes."""
    return Harvester(
        context,
        locations,
        keep_bos=config.keep_bos,
        max_norm_multiple=config.max_norm_multiple,
        autocast_bf16=config.model_autocast,
    )


def open_buffer(
    context: ModelContext,
    source: str | Path,
    locations: LocationLike | Iterable[LocationLike],
    config: DataConfig,
    batch_size: int,
    *,
    pair: tuple[LocationLike, LocationLike] | None = None,
    epochs: int | None = None,
    num_tokens: int | None = None,
    share: Callable[[ActivationSource], ActivationSource] | None = None,
    prefetch: bool | None = None,
) -> ShuffleBuffer:
    """Shuffled batches of activations, live or from an activation store.

    Args:
        context: the model; for a store, the model that it was made with.
        source: a text, as for :func:`open_corpus`, or the folder of a store.
        locations: which activations; a store must hold them.
        config: how text becomes activations; for a store, only the settings of the buffer matter.
        batch_size: rows of a batch.
        pair: as for :class:`ShuffleBuffer`.
        epochs: how often the source is read; None: without end.
        num_tokens: total number of activations; the buffer is not filled with more.
        share: wraps a live source into one whose chunks several processes compute in turn. The thread
            that reads the buffer then fetches them itself.
        prefetch: fetch ahead in a thread. Default: only if the model is not on the CPU, where fetching
            and reading would compete for the same cores and taking turns is as fast
            (``benchmarks/README.md``, end_to_end).
    """
    opened: ActivationSource
    on_cpu = context.device.type == "cpu" and not is_store(source)
    ahead = not on_cpu if prefetch is None else prefetch
    if is_store(source):
        store = ActivationStore(source)
        wanted = _stored_places(store, context, locations)
        _tell_passes(num_tokens, len(store), str(source))
        opened = _SelectedLocations(
            StoreSource(store, seed=config.data_seed, epochs=epochs), wanted
        )
    else:
        windows = open_windows(context, source, config, epochs=epochs)
        _tell_passes(num_tokens, windows.corpus.n_tokens, str(source))
        opened = LiveSource(open_harvester(context, locations, config), windows)
        if share is not None:
            opened, ahead = share(opened), False
    capacity = max(config.buffer_tokens, 2 * batch_size)
    buffer = ShuffleBuffer(
        opened,
        capacity,
        batch_size,
        seed=config.data_seed,
        num_tokens=num_tokens,
        pair=pair,
        prefetch=ahead,
    )
    buffer.record = _record(context, source, config, opened.describe())
    return buffer


def _tell_passes(num_tokens: int | None, in_one: int, name: str) -> None:
    """Log a warning if more activations are wanted than one pass gives."""
    if num_tokens is not None and num_tokens > in_one:
        logger.warning(
            "%s has about %s activations; %s are wanted, so it is read %.1f times",
            *(name, f"{in_one:,}", f"{num_tokens:,}", num_tokens / in_one),
        )


def is_store(path: str | Path) -> bool:
    """Whether a path is the folder of an activation store."""
    return _manifest_kind(path) == "activation_store"


def _manifest_kind(path: str | Path) -> object:
    if files.is_remote(str(path)) or not (manifest := Path(path) / "manifest.json").exists():
        return None
    return files.read_json(manifest).get("kind")


class _SelectedLocations:
    """A store's activations at some of its locations."""

    forward_s = 0.0

    def __init__(self, source: StoreSource, places: list[ActivationLocation]) -> None:
        self.source, self.places = source, places

    def chunk(self, number: int) -> ActivationBatch | None:
        """The rows of a chunk, without the other locations."""
        batch = self.source.chunk(number)
        if batch is None:
            return None
        return replace(batch, activations={p: batch.activations[p] for p in self.places})

    def describe(self) -> dict[str, Any]:
        """The store's settings, and the locations."""
        return {**self.source.describe(), "places": [str(place) for place in self.places]}


def _stored_places(
    store: ActivationStore,
    context: ModelContext,
    locations: LocationLike | Iterable[LocationLike],
) -> list[ActivationLocation]:
    """The wanted locations with their layers; an error if the store lacks one or has another model."""
    if store.header.model not in (context.short_name, context.model_name):
        raise InputError(
            f"{store.folder} holds activations of {store.header.model}, not of {context.short_name}."
        )
    wanted = [
        place
        for location in parse_locations(locations)
        for place in location.expand(context.n_layers)
    ]
    if missing := [str(place) for place in wanted if place not in store.locations]:
        raise LocationError(
            f"{store.folder} has no {', '.join(missing)}; it has "
            f"{', '.join(map(str, store.locations))}."
        )
    return wanted
