"""Stores of examples for the embedded model, over text that the model itself wrote.

No book is part of the package, so the examples of its units are sampled text: a start token, and what
the model continues it with.
"""

from collections.abc import Iterator
from pathlib import Path

from neuron_explainer.activations import TokenCorpus, TokenWindows, start_token
from neuron_explainer.analysis.collation.collate import collate
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.units import What
from neuron_explainer.analysis.store_names import file_name
from neuron_explainer.errors import InputError
from neuron_explainer.experiments.tiny_tales.evaluation import load_autoencoders
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.model_registry import (
    list_autoencoder_names,
    make_autoencoder_context,
)
from neuron_explainer.progress import progress_bar

MODEL_NAME = "tiny-tales"
TEMPERATURE = 0.9
"""A little below 1: the text of so small a model is easier to read."""
BATCH = 256
LATENTS = CollateConfig(top=5, intervals=0, uniform=3, weighted=0, window=32)
"""Eight examples: the strongest, and some at random, which show what a latent does most of the time."""
NEURONS = CollateConfig(top=8, intervals=0, uniform=0, weighted=0, window=32)
"""A neuron is active nearly everywhere: its random examples would be any text."""


def written_corpus(
    context: ModelContext,
    n_documents: int,
    length: int,
    seed: int,
    *,
    batch_size: int = BATCH,
    progress: bool = False,
) -> TokenCorpus:
    """Text that the model writes after its start token.

    Args:
        context: the model.
        n_documents: how many texts.
        length: tokens of each, without the start token.
        seed: batch ``i`` is drawn with seed ``seed + i``.
        batch_size: texts that are written at once; it decides the result, as the seed does.
        progress: show a bar.
    """
    if n_documents < 1:
        raise InputError(f"documents must be at least 1, found {n_documents}.")
    name = f"text written by {context.short_name} (temperature {TEMPERATURE}, seed {seed})"

    def documents() -> Iterator[list[int]]:
        model, start = context.get_or_create_model(), start_token(context)
        with progress_bar(total=n_documents, desc="writing", disable=not progress) as bar:
            for number, begin in enumerate(range(0, n_documents, batch_size)):
                rows = [[start]] * min(batch_size, n_documents - begin)
                yield from model.sample(rows, length, TEMPERATURE, seed=seed + number)["tokens"]
                bar.update(len(rows))

    return TokenCorpus.of(documents(), name)


def make_stores(
    context: ModelContext,
    folder: Path,
    corpus: TokenCorpus,
    out: Path,
    *,
    progress: bool = False,
) -> dict[str, Path]:
    """Collate the autoencoders in ``folder``, and the neurons of every layer; the same call continues.

    Returns:
        the file of each store, by name, such as ``ae-resid-delta-mlp/2`` or ``2/mlp.post_act.neurons``.
    """
    model = context.get_or_create_model()
    known = _names()
    autoencoders = {
        f"{known[place.path]}/{place.layer}": found.to(model.device, model.dtype).eval()
        for place, (_, found) in load_autoencoders(folder).items()
    }
    start, length = start_token(context), 1 + int(corpus.lengths.max())
    windows = TokenWindows(corpus, length, 32, concat=False, bos=start, seed=None)
    neurons = [f"{layer}/mlp.post_act.neurons" for layer in range(context.n_layers)]
    origins = {name: {"autoencoder": name} for name in autoencoders} | {"": {"model": MODEL_NAME}}
    todo: list[tuple[What, list[str], CollateConfig]] = [
        (autoencoders, list(autoencoders), LATENTS),
        ("mlp.post_act", neurons, NEURONS),
    ]
    found: dict[str, Path] = {}
    for what, names, config in todo:
        files = {name: out / file_name(name) for name in names}
        if not all(path.exists() for path in files.values()):
            collate(context, what, windows, out, config, origins=origins, progress=progress)
        found |= files
    return found


def _names() -> dict[str, str]:
    """The names of the embedded autoencoders, by path."""
    return {
        make_autoencoder_context(MODEL_NAME, name, "cpu").location.path: name
        for name in list_autoencoder_names(MODEL_NAME)
    }
