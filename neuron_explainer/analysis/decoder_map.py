"""A map of directions in the plane: alike directions lie near each other.

Rows are scaled to length 1. UMAP (McInnes et al. 2018; cosine metric, 15 neighbours, smallest distance
0.05) shows which directions lie near each other; distances between groups mean little. Without the
package umap-learn the map is the plane of the two largest principal components, which keeps large
distances and hides small groups. The map says which of the two it is.

Shape legend: ``l`` directions, ``n`` width.
"""

import hashlib
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.analysis.matching import Rows, Side, rows_of
from neuron_explainer.errors import InputError, MissingExtraError, optional_module
from neuron_explainer.tables import percent

Method = Literal["umap", "pca"]
N_NEIGHBOURS = 15
MIN_DISTANCE = 0.05
_FEWEST_FOR_SPECTRUM = 3  # a graph of so few points has no third eigenvector to look for


@dataclass(frozen=True, eq=False, repr=False)
class DecoderMap:
    """Coordinates of directions in the plane."""

    coordinates: npt.NDArray[np.float32]
    """``[l, 2]``; NaN for rows of zeros."""
    method: Method
    seed: int
    explained: float | None
    """The share of the variance that the plane holds; None for UMAP."""

    def __repr__(self) -> str:
        share = "" if self.explained is None else f", {percent(self.explained, 1)} of the variance"
        return f"DecoderMap({len(self.coordinates):,} directions, {self.method}{share})"


def decoder_map(
    directions: Rows,
    method: Literal["auto", "umap", "pca"] = "auto",
    *,
    side: Side = "decoder",
    seed: int = 0,
    cache: str | Path | None = None,
) -> DecoderMap:
    """Lay out the directions of a dictionary in the plane.

    Args:
        directions: an autoencoder, or rows ``[l, n]``.
        method: ``"umap"`` (needs umap-learn), ``"pca"``, or ``"auto"``: UMAP if it is installed.
        side: decoder or encoder rows.
        seed: of UMAP; the same seed gives the same map on the same machine.
        cache: a folder in which the map is kept, under a name that depends on the rows and on all
            settings, and from which it is read the next time.
    """
    if method not in ("auto", "umap", "pca"):
        raise InputError(f"method must be 'auto', 'umap' or 'pca', found {method!r}.")
    rows = rows_of(directions, side).cpu()
    alive = rows.any(dim=1)
    if int(alive.sum()) < 3:
        raise InputError(f"a map needs 3 directions or more, found {int(alive.sum())}.")
    umap = None if method == "pca" else _umap_or_none(required=method == "umap")
    chosen: Method = "pca" if umap is None else "umap"
    kept = None if cache is None else Path(cache) / f"map-{_key(rows, chosen, seed)}.npz"
    if kept is not None and (found := _read(kept, len(rows))) is not None:
        return found
    unit = F.normalize(rows[alive], dim=1).double()
    explained: float | None = None
    if umap is not None:
        places = _umap(umap, unit, seed)
    else:
        places, explained = _principal_plane(unit)
    coordinates = np.full((len(rows), 2), np.nan, dtype=np.float32)
    coordinates[alive.numpy()] = places
    found = DecoderMap(coordinates, chosen, seed, explained)
    if kept is not None:
        _write(kept, found)
    return found


def _umap_or_none(required: bool) -> Any:
    try:
        return optional_module("umap", "method='umap'", "umap-learn")
    except MissingExtraError:
        if required:
            raise
        return None


def _umap(umap: Any, unit: Tensor, seed: int) -> npt.NDArray[np.float32]:
    layout = umap.UMAP(
        n_neighbors=min(N_NEIGHBOURS, len(unit) - 1),
        min_dist=MIN_DISTANCE,
        metric="cosine",
        disconnection_distance=math.inf,  # else a direction opposite to all others has no place
        init="spectral" if len(unit) > _FEWEST_FOR_SPECTRUM else "random",
        random_state=seed,
        n_jobs=1,  # with more the seed would not decide the result
    )
    places: npt.NDArray[np.float32] = layout.fit_transform(unit.float().numpy())
    return places


def _principal_plane(unit: Tensor) -> tuple[npt.NDArray[np.float32], float]:
    """The two largest principal components of ``[l, n]``, and their share of the variance.

    The sign of each is such that its largest entry is positive.
    """
    centred = unit - unit.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.t() @ centred)
    plane = vectors[:, -2:].flip(1)
    if plane.shape[1] < 2:  # directions of width 1
        plane = F.pad(plane, (0, 2 - plane.shape[1]))
    largest = plane.gather(0, plane.abs().argmax(dim=0, keepdim=True))
    plane = plane * torch.where(largest < 0, -1.0, 1.0)
    total = float(values.sum())
    return (centred @ plane).float().numpy(), float(values[-2:].sum()) / total if total > 0 else 0.0


# ---- kept on disk ------------------------------------------------------------------------------------


def _key(rows: Tensor, method: Method, seed: int) -> str:
    """A name for the map of these rows with these settings."""
    digest = hashlib.sha256(rows.numpy().tobytes())
    settings = [list(rows.shape), method, seed, N_NEIGHBOURS, MIN_DISTANCE]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:24]


def _write(path: Path, found: DecoderMap) -> None:
    facts = {"method": found.method, "seed": found.seed, "explained": found.explained}
    # Not safetensors: it writes a file of its own first, which a killed process leaves behind.
    with files.atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, coordinates=found.coordinates, facts=np.array(json.dumps(facts)))


def _read(path: Path, n_rows: int) -> DecoderMap | None:
    """The map that was kept; None if there is none, or if the file is damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            facts, coordinates = json.loads(str(stored["facts"])), stored["coordinates"]
        if coordinates.shape != (n_rows, 2):
            return None
        method: Method = "umap" if facts["method"] == "umap" else "pca"
        return DecoderMap(coordinates, method, int(facts["seed"]), facts["explained"])
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError):
        return None
