"""Look into a wheel: what must be in it is, and nothing else is."""

import sys
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "neuron_explainer"
DATA = {".json", ".safetensors", ".tiktoken", ".store", ".bin", ".npz", ".jsonl"}
DATA |= {".py", ".typed", ".html", ".js", ".css", ".txt"}


def main(wheel: str) -> None:
    """Print what is in the wheel; exit with a message if anything is missing or too much."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    expected = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.suffix in DATA and path.is_file()
    }
    found = {name for name in sizes if ".dist-info/" not in name}
    if missing := sorted(expected - found):
        sys.exit(f"{wheel}: these files of the package are missing: {', '.join(missing)}")
    if extra := sorted(found - expected):
        sys.exit(f"{wheel}: these files do not belong into it: {', '.join(extra)}")
    if not any(name.endswith("LICENSE") for name in sizes):
        sys.exit(f"{wheel}: LICENSE is missing")
    assets = sum(size for name, size in sizes.items() if "/assets/" in name)
    print(
        f"{Path(wheel).name}: {Path(wheel).stat().st_size / 1e6:.1f} MB, {len(found)} files, "
        f"of which assets {assets / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main(sys.argv[1])
