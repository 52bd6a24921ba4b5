"""Folders that this package writes, for the peers' own loaders to read.

    python -m benchmarks.peers.write_ours DIR
    peer/bin/python benchmarks/peers/make_fixtures.py sae-lens --check-ours DIR     # and the others

Every fixture is written in every format that can express it: ``DIR/<peer>/<name>/saved/`` with
``expected.safetensors``, inputs and what *this package* makes of them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.convert import save_as
from neuron_explainer.models.checkpoints.autoencoders import WRITTEN_FORMATS

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "peers"
PEER_OF = {
    "saelens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "sparsify",
}


def fixtures() -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Name, folder, and arguments for loading, of every fixture."""
    for path in sorted(FIXTURES.glob("*/*/expected.json")):
        folder = path.parent
        told = json.loads(path.read_text())["load_args"]
        yield f"{folder.parent.name}-{folder.name}", folder, told


def source_in(folder: Path) -> Path:
    """What to load of a fixture: its folder, or the one file in it of a format without folders."""
    saved = folder / "saved"
    return next(saved.glob("samples_*.pt"), saved)


@torch.no_grad()
def write_all(target: Path) -> list[str]:
    """Write everything under ``target``; the names of what was written."""
    written = []
    for name, folder, told in fixtures():
        autoencoder = Autoencoder.load(source_in(folder), **told)
        x = load_file(folder / "expected.safetensors")["x"]
        for format in WRITTEN_FORMATS:
            case = target / PEER_OF[format] / name
            try:
                save_as(autoencoder, case / "saved", format, overwrite=True)
            except InputError:
                continue  # the format cannot express it
            out = autoencoder(x)
            tensors = {"x": x, "latents": out.latents, "recons": out.recons}
            save_file(tensors, case / "expected.safetensors")
            written.append(f"{format}: {name}")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write folders for the peers' loaders.")
    parser.add_argument("target", type=Path)
    print("\n".join(write_all(parser.parse_args().target)))
