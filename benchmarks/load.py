"""From files on disk (in the page cache) to the first logits, each time in a new process."""

from dataclasses import replace
from pathlib import Path

from benchmarks.contestants import FLOOR, MODELS, OURS, SDPA
from benchmarks.harness import Entry, Race
from benchmarks.workloads import Setup


def races(setup: Setup) -> list[Race]:
    """Imports are not timed; extra peak memory is over what was resident after them."""
    from neuron_explainer.models.transformer import Transformer

    model = Transformer.load(setup.folder, device="cpu")
    model.cfg = replace(model.cfg, enc="gpt2")  # pieces must name a tokenizer, which is not read
    native, pieces = setup.scratch / "native", setup.scratch / "pieces"
    model.save(native)
    model.save_checkpoint(pieces)
    del model
    tokens = setup.tokens(1, 16)

    def entry(folder: Path | str, label: str) -> Entry:
        settings = {"folder": str(folder), "tokens": tokens}
        return Entry(OURS, "load_and_run", settings, f"{OURS.name}, {label}", fresh=True)

    others = [c for c in MODELS if c not in (OURS, FLOOR)]
    settings = {"folder": setup.folder, "tokens": tokens}
    size = (Path(setup.folder) / "model.safetensors").stat().st_size
    return [
        Race(
            f"load {size / 1e6:.0f} MB and run 16 tokens",
            [
                entry(setup.folder, "Hugging Face's folder"),
                entry(native, "its own"),
                entry(pieces, "the original's pieces"),
                *(Entry(c, "load_and_run", settings, fresh=True) for c in others),
                Entry(FLOOR, "load_and_run", settings, "read the file, GEMM floor", fresh=True),
            ],
            SDPA.name,
            rounds=3,
            remark="A file that is mapped counts as memory when its pages are touched, though the page "
            "cache holds them anyway.",
        )
    ]
