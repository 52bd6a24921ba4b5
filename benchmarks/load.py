"""Time from files on disk (in the page cache) to the first logits, each time in a new process."""

from dataclasses import replace
from pathlib import Path

from benchmarks.contestants import MODELS, OURS, SDPA
from benchmarks.harness import Contestant, Entry, Race
from benchmarks.workloads import Setup


def races(setup: Setup) -> list[Race]:
    """This library from three formats, the others from Hugging Face's."""
    formats = write_formats(setup.folder, setup.scratch / "formats")
    tiny = Setup(setup.scratch / "tiny", quick=True)
    tiny_formats = write_formats(tiny.folder, tiny.scratch / "formats")
    tokens = tiny.tokens(1, 16)

    def entry(contestant: Contestant, format_: str = "Hugging Face's folder") -> Entry:
        settings = {
            "folder": formats[format_],
            "first_folder": tiny_formats[format_],
            "tokens": tokens,
        }
        label = f"{contestant.name}, {format_}" if contestant is OURS else contestant.name
        return Entry(contestant, "load_and_run", settings, label, fresh=True)

    size = (Path(setup.folder) / "model.safetensors").stat().st_size
    return [
        Race(
            f"load {size / 1e6:.0f} MB and run 16 tokens",
            [
                *(entry(OURS, format_) for format_ in formats),
                *(entry(c) for c in MODELS if c is not OURS),
            ],
            SDPA.name,
            rounds=3,
            remark="Each run is in a new process that has already loaded a tiny model, so that "
            "imports do not count. Pages of a mapped file count as memory when they are touched. The "
            "floor reads the bytes of the file once and computes the products.",
        )
    ]


def write_formats(folder: str, scratch: Path) -> dict[str, str]:
    """The folder, and the same model in this library's other formats."""
    from neuron_explainer.models.transformer import Transformer

    model = Transformer.load(folder, device="cpu")
    model.cfg = replace(model.cfg, enc="gpt2")  # pieces must name a tokenizer, which is not read
    model.save(scratch / "native")
    model.save_checkpoint(scratch / "pieces")
    return {
        "Hugging Face's folder": folder,
        "its own format": str(scratch / "native"),
        "the original's pieces": str(scratch / "pieces"),
    }
