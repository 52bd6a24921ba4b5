"""delphi's cache of latents, written: what its explainers and scorers begin with.

The layout is that of eai-delphi 0.1.3: a folder for each place, named after delphi's hook point, with
``{first}_{last}.safetensors`` for each range of latents and ``config.json``. A file has ``locations``
``[n, 3]`` (row of ``tokens``, position, latent − first; uint16, or uint32 where that is too small),
``activations`` float16 ``[n]`` and ``tokens`` int64 ``[rows, positions]``. Entries of at most 1e-5 are left
out there, and so they are here. A store of examples cannot be written in this format: it would have to hold
every token at which a latent is active, because delphi takes all others for tokens where it is not.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.activations.harvest import Harvester
from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import LocationLike
from neuron_explainer.models.model_context import ModelContext

SMALLEST = 1e-5
"""Latents whose magnitude is not above this are left out."""


@dataclass(eq=False)
class LatentCache:
    """Latents that are not zero, collected batch by batch. It grows with them: about 10 bytes for each.

    Args:
        n_latents: the size of the dictionary.
    """

    n_latents: int
    n_rows: int = 0
    batch_size: int = 0
    _locations: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _activations: list[npt.NDArray[np.float16]] = field(default_factory=list)
    _tokens: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(self, tokens: Tensor, latents: Tensor, which: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            tokens: ids ``[b, s]``.
            latents: dense ``[n, l]``, one row after the other.
            which: bool ``[b, s]``: the ``n`` tokens that the latents belong to; None: all.
        """
        batch, length = tokens.shape
        mask = torch.ones_like(tokens, dtype=torch.bool) if which is None else which
        places = mask.nonzero()
        if latents.shape != (len(places), self.n_latents):
            raise InputError(
                f"expected latents of the shape {[len(places), self.n_latents]}, found "
                f"{list(latents.shape)}."
            )
        if self._tokens and self._tokens[0].shape[1] != length:
            raise InputError(
                f"delphi's rows are equally long: the first have {self._tokens[0].shape[1]} tokens, "
                f"these {length}. Cut windows with concat=True."
            )
        token, latent = (latents.abs() > SMALLEST).nonzero(as_tuple=True)
        found = torch.cat([places[token], latent[:, None]], 1).cpu().numpy()
        found[:, 0] += self.n_rows
        self._locations.append(found)
        self._activations.append(latents[token, latent].half().cpu().numpy())
        self._tokens.append(tokens.cpu().numpy().astype(np.int64))
        self.n_rows += batch
        self.batch_size = max(self.batch_size, batch)

    def write(
        self,
        folder: str | Path,
        hookpoint: str,
        *,
        n_splits: int = 5,
        model: str = "",
        dataset: str = "",
    ) -> Path:
        """Write ``folder/hookpoint``, whole or not at all.

        Args:
            folder: delphi's folder of latents.
            hookpoint: delphi's name of the place, such as ``"layers.2.mlp"``.
            n_splits: number of files that the latents are divided into.
            model: the name of the model in transformers, by which delphi finds the tokenizer.
            dataset: the name of the text.
        """
        if not self.n_rows:
            raise InputError("there are no tokens to write; add batches first.")
        if not 1 <= n_splits <= self.n_latents:
            raise InputError(
                f"n_splits must lie between 1 and {self.n_latents}, the number of latents; found "
                f"{n_splits}."
            )
        tokens = np.concatenate(self._tokens)
        config = {
            "dataset_repo": dataset,
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": self.batch_size,
            "cache_ctx_len": int(tokens.shape[1]),
            "n_tokens": int(tokens.size),
            "n_splits": n_splits,
            "model_name": model,
        }
        place = files.join(files.local_path(folder), hookpoint)
        with files.atomic_folder(place) as temporary:
            self._write_splits(temporary, n_splits, tokens)
            with files.plain_write(temporary / "config.json") as path:
                path.write_text(json.dumps(config, indent=4), "utf-8")
        return Path(place)

    def _write_splits(self, folder: Path, n_splits: int, tokens: npt.NDArray[np.int64]) -> None:
        from safetensors.numpy import save_file

        locations = np.concatenate(self._locations)
        activations = np.concatenate(self._activations)
        # In float32, as delphi does: the borders are rounded in the same way.
        borders = torch.linspace(0, self.n_latents, steps=n_splits + 1).long().tolist()
        for first, end in itertools.pairwise(borders):
            inside = (locations[:, 2] >= first) & (locations[:, 2] < end)
            part = locations[inside] - [0, 0, first]
            small = part.max(initial=0) < 2**16
            content: dict[str, Any] = {
                "locations": part.astype(np.uint16 if small else np.uint32),
                "activations": activations[inside],
                "tokens": tokens,
            }
            with files.plain_write(folder / f"{first}_{end - 1}.safetensors") as path:
                save_file(content, path)


def cache_latents(
    context: ModelContext,
    autoencoder: Autoencoder,
    windows: Iterable[TokenBatch],
    location: LocationLike | None = None,
) -> LatentCache:
    """The latents of an autoencoder at all tokens of windows that are no pads.

    Args:
        context: the model.
        autoencoder: its latents.
        windows: token windows of one length, ``TokenWindows(..., concat=True)``.
        location: where its inputs come from, such as ``"2/mlp.post_act"``; None: as it says itself.
    """
    location = autoencoder.location if location is None else location
    if location is None:
        raise InputError("the autoencoder does not say where its inputs come from: give location=.")
    harvester = Harvester(context, location)
    (place,) = harvester.locations
    cache = LatentCache(autoencoder.n_latents)
    for batch in windows:
        with torch.no_grad():
            latents = autoencoder.encode(harvester(batch).activations[place])
        cache.add(batch.tokens, latents, None if batch.pad is None else ~batch.pad.cpu())
    return cache
