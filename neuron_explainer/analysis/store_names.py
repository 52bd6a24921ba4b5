"""What a store is called: a path, or the name of one that comes with the package.

out/2.resid.torso.delta_mlp.store     a file
out/2.resid.torso.delta_mlp           the same file
out                                   a folder of stores
tiny-tales/ae-resid-delta-mlp/2       a store of the embedded model
tiny-tales                            the folder of these
"""

import re
from pathlib import Path

from neuron_explainer import files
from neuron_explainer.errors import SourceError, did_you_mean

ASSETS = Path(__file__).parents[1] / "assets"
SUFFIX, STORES_FOLDER = ".store", "stores"


def file_name(name: str) -> str:
    """The name of a store's file: of ``2/mlp.post_act``, ``2.mlp.post_act.store``."""
    return (re.sub(r"[^\w.+-]", "_", name.replace("/", ".")).lstrip(".") or "_") + SUFFIX


def find_stores(name: str | Path) -> Path:
    """The file or folder that a name stands for; an error with the nearest names if there is none.

    A path comes first, so that a folder called ``tiny-tales`` hides the embedded one.
    """
    if files.is_remote(str(name)):
        return files.fetch(str(name))
    path = files.local_path(name)
    if path.exists():
        return path
    if path.name and (file := path.with_name(f"{path.name}{SUFFIX}")).exists():
        return file
    model, _, rest = str(name).partition("/")
    folder = ASSETS / model / STORES_FOLDER
    if model.startswith(".") or not folder.is_dir():
        near = [*(str(each) for each in path.parent.glob(f"*{SUFFIX}")), *built_in_models()]
        raise SourceError(
            f"there is no store of examples {name}.{did_you_mean(str(name), near)} collate makes one; "
            f"{', '.join(built_in_models())} comes with the package."
        )
    known = {each.name: each for each in sorted(folder.glob(f"*{SUFFIX}"))}
    if not rest:
        return folder
    if (found := known.get(file_name(rest))) is None:
        listed = [f"{model}/{_spelt(each)}" for each in known]
        raise SourceError(
            f"{model} has no store {rest}.{did_you_mean(str(name), listed)} neuron-explainer inspect "
            f"{model} lists all {len(known)}."
        )
    return found


def built_in_models() -> list[str]:
    """The models whose stores come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{STORES_FOLDER}"))


def is_built_in(folder: Path) -> bool:
    """Whether a folder belongs to the package, which an update replaces."""
    return folder.absolute().is_relative_to(ASSETS)


def _spelt(file: str) -> str:
    """The name in the form that is easier to read: ``ae-resid-delta-mlp/2``, ``2/mlp.post_act.neurons``."""
    first, _, rest = file.removesuffix(SUFFIX).partition(".")
    return f"{first}/{rest}"
