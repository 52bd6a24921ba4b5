"""What a format of autoencoder files is: :class:`Format`, and what its reader is given and gives back.

Each format is one :class:`Format` object in a file of its own, and one line in the list
:data:`~neuron_explainer.models.checkpoints.autoencoders.FORMATS`. How a source is recognised, what a
caller may state about it, how it is read and how it is written all come from these objects.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.models.checkpoints.autoencoders.state import STATISTICS, InputNormalization
from neuron_explainer.models.checkpoints.problems import damaged
from neuron_explainer.models.checkpoints.tensor_files import (
    SafetensorsFile,
    check_inflation,
    torch_load,
)
from neuron_explainer.models.locations import ActivationLocation, LocationLike

FileKind = Literal["torch", "npz", "npy", "safetensors"]
Content = Mapping[str, Any]
"""What a file of tensors holds, by name; the one array of an ``.npy`` file has the name ``""``."""


class Stated(TypedDict, total=False):
    """What a caller says about a file. Each statement is needed only where the file does not say it."""

    input_normalization: InputNormalization | None
    """What was done to each input vector before encoding."""
    location: LocationLike | None
    """Where in the model the inputs come from, such as 8/resid.torso.delta_mlp."""
    output_location: LocationLike | None
    """What the output stands for; it makes a transcoder of a file that does not say it is one."""
    norm_factor: float
    """The factor that inputs were multiplied by in training."""
    k: int
    """How many latents are active at a time."""
    threshold: float
    """The threshold of BatchTopK, for files whose training ended before it was known."""
    dict_class: str
    """The class of a dictionary without a config.json."""
    normalize_decoder: bool
    """Move the norms of the decoder's columns into the encoder, as AutoEncoder's own loader does (the
    default); off, latents keep the scale that is stored."""
    penalty: float
    """The weight of the latents in the objective (reg in TransformerVis's programs)."""
    max_iterations: int
    """How many iterations FISTA makes at most (500 if not given, as in TransformerVis's programs)."""
    tolerance: float
    """The change at which FISTA stops."""


COMMON = frozenset({"input_normalization", "location"})
"""The statements that every format takes."""


@dataclass
class LoadedAutoencoder:
    """What a file or folder held."""

    state_dict: dict[str, Any]
    """In the layout of ``Autoencoder``; it may hold views of mapped files."""
    input_normalization: InputNormalization | None = "none"
    location: ActivationLocation | None = None
    output_location: ActivationLocation | None = None
    model_name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    lenient: bool = False
    """Whether entries that are not known may be left out, if the caller says ``strict=False``."""


@dataclass
class Exported:
    """An autoencoder as a writer sees it."""

    format: str
    state_dict: Mapping[str, Any]
    """That of ``Autoencoder.state_dict()``."""
    input_normalization: InputNormalization
    location: ActivationLocation | None
    output_location: ActivationLocation | None
    model_name: str | None

    @property
    def n_latents(self) -> int:
        """``l``"""
        return len(self.state_dict["encoder.weight"])

    @property
    def n_inputs(self) -> int:
        """``n``"""
        return len(self.state_dict["pre_bias"])

    @property
    def is_transcoder(self) -> bool:
        """Whether its output stands for something else than its input."""
        return "n_outputs" in self.state_dict

    @property
    def group_sizes(self) -> list[int] | None:
        """Those of a Matryoshka autoencoder."""
        sizes: list[int] | None = self.state_dict.get("group_sizes")
        return sizes

    @property
    def nonlinearity(self) -> str:
        """Its stored name."""
        return str(self.state_dict["activation"])

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the nonlinearity."""
        return dict(self.state_dict["activation_state_dict"])

    @property
    def decoder_weight(self) -> Tensor:
        """``[o, l]``, also where it is tied to the encoder."""
        state = self.state_dict
        weight: Tensor = state.get("decoder.weight", state["encoder.weight"].T)
        return weight

    def has(self, name: str) -> bool:
        """Whether the state dict has this tensor."""
        return name in self.state_dict

    def refuse(self, what: str) -> NoReturn:
        """Raise an error: the format has no way to say ``what``."""
        raise InputError(f"the format {self.format!r} cannot express {what}; nothing was written.")

    def refuse_parts(self, *names: str) -> None:
        """Refuse each of these optional parts that is there."""
        for name in names:
            if self.has(f"{name}.weight"):
                self.refuse("a GLU encoder" if name == "glu" else "a skip connection")

    def refuse_normalization(self) -> None:
        """Refuse any normalisation of the input."""
        if self.input_normalization != "none":
            self.refuse(f"input_normalization {self.input_normalization!r}")

    def refuse_width(self) -> None:
        """Refuse a transcoder whose output is not as wide as its input."""
        if len(self.decoder_weight) != self.n_inputs:
            self.refuse("a transcoder whose input and output differ in width")

    def refuse_groups(self) -> None:
        """Refuse Matryoshka groups."""
        if self.group_sizes is not None:
            self.refuse(f"Matryoshka groups with {self.nonlinearity}")


@dataclass(frozen=True)
class Source:
    """A folder or file to be read, local or remote."""

    path: str | Path
    """As the caller gave it; errors name it."""
    content: Content | None = None
    """What a single file holds; None for a folder."""

    def weights(self, name: str) -> tuple[str | Path, Content]:
        """The path of the tensors, which errors about them name, and the tensors.

        They are those of the single file or, in a folder, of the file ``name``.
        """
        if self.content is not None:
            return self.path, self.content
        path = files.join(self.path, name)
        return path, read_content(files.fetch(path), path)

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in the file ``name``, in the folder or beside the single file."""
        return files.read_json(files.fetch(self.beside(name)))

    def json_if_any(self, name: str) -> dict[str, Any] | None:
        """The same; None if there is no such file."""
        return self.json(name) if files.exists(self.beside(name)) else None

    def beside(self, name: str) -> str | Path:
        """The path of ``name`` in the folder, or in the folder that the single file lies in."""
        if self.content is None:
            return files.join(self.path, name)
        if files.is_remote(self.path):
            return f"{str(self.path).rpartition('/')[0]}/{name}"
        return Path(self.path).expanduser().parent / name


@dataclass(frozen=True)
class Format:
    """One format of autoencoder files."""

    name: str
    """As it is called in arguments, in errors and in ``metadata["format"]``."""
    layout: str
    """Its files and whose they are, for messages: ``"cfg.json and sae.safetensors (sparsify)"``; empty
    for a format that is only known to be refused."""
    read: Callable[[Source, Stated], LoadedAutoencoder]
    """A function without side effects. It is only called where ``states`` allows all that is stated."""
    states: frozenset[str] = frozenset()
    """What a caller may state, besides :data:`COMMON`: keys of :class:`Stated`."""
    marks: tuple[str, ...] = ()
    """Files that tell a folder of this format; ``*`` stands for any text. Of several formats with the
    same file the one whose ``configs`` fit is meant, or else the first."""
    configs: Mapping[str, Callable[[Mapping[str, Any]], bool]] = field(default_factory=dict)
    """JSON files that tell a folder of this format, each with a test of its content."""
    holds: Mapping[FileKind, Callable[[Content], bool]] = field(default_factory=dict)
    """Kinds of single files, each with a test of their content: is it of this format?"""
    write: Callable[[Exported], Mapping[str, Mapping[str, Any]]] | None = None
    """The files of a folder by name, JSON objects and tensors; None if the format is only read."""

    def fits(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether the JSON file ``name`` with this content tells this format."""
        return name in self.configs and self.configs[name](config)


# ---- a reader's result ----------------------------------------------------------------------------


def loaded(
    where: str | Path,
    stated: Stated,
    state: Mapping[str, Any],
    *,
    said_by: str = "this format",
    input_normalization: InputNormalization | None = "none",
    location: ActivationLocation | None = None,
    output_location: ActivationLocation | None = None,
    model_name: str | None = None,
    metadata: dict[str, Any],
) -> LoadedAutoencoder:
    """A reader's result: what the file says, completed by what the caller states.

    ``said_by`` is what an error about a contradiction names as the source of the normalisation.
    """
    given = stated.get("input_normalization")
    return LoadedAutoencoder(
        with_statistics(state),
        settle(where, said_by, input_normalization, given, "input_normalization"),
        settle_location(where, location, stated.get("location")),
        settle_location(where, output_location, stated.get("output_location")),
        model_name,
        metadata,
    )


def with_statistics(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict completed by the values that statistics have where nothing is known about them."""
    weight = state_dict.get("encoder.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return dict(state_dict)  # what is wrong is reported with all else that is
    unknown = {
        name: torch.full((len(weight),), value, dtype=dtype)
        for name, (value, dtype) in STATISTICS.items()
    }
    return unknown | dict(state_dict)


# ---- what the caller says ------------------------------------------------------------------------


def settle(where: str | Path, said_by: str, found: Any, given: Any, name: str) -> Any:
    """What a file says, or else the caller (either may be None); a contradiction is an error."""
    if found is not None and given is not None and found != given:
        raise CheckpointError(
            f"{where}: {said_by} says {name} {_shown(found)}, the call says {_shown(given)}."
        )
    return given if found is None else found


def _shown(value: Any) -> str:
    return repr(str(value) if isinstance(value, ActivationLocation) else value)


def settle_location(
    where: str | Path, found: ActivationLocation | None, given: LocationLike | None
) -> ActivationLocation | None:
    """The same for a location; where one of the two has no layer, it takes the other's."""
    said = None if given is None else ActivationLocation.parse(given)
    if found is not None and said is not None:
        said = said.at(found.layer) if said.layer is None else said
        found = found.at(said.layer) if found.layer is None else found
    settled: ActivationLocation | None = settle(where, "the file", found, said, "location")
    return settled


# ---- content of single files ---------------------------------------------------------------------


def read_content(path: Path, source: str | Path, kind: FileKind | None = None) -> Content:
    """The tensors in the local file ``path``; errors name ``source``."""
    kind = kind or file_kind(path, source)
    if kind == "safetensors":
        file = SafetensorsFile(path)
        return {name: file.read(name) for name in file.infos}
    if kind == "torch":
        content = torch_load(path)
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{source}: expected a state dict, found {type(content).__name__}."
            )
        return content
    import numpy as np

    try:
        arrays = np.load(path, allow_pickle=False)
        if kind == "npy":
            return {"": torch.from_numpy(arrays)}
        with arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # a damaged file fails in a dozen ways, none of them documented
        raise damaged(source, error) from error


def file_kind(path: Path, source: str | Path) -> FileKind:
    """The kind of a file, told by its first bytes and, for archives, by what is in them."""
    if str(source).lower().endswith((".pkl", ".pickle")):
        raise CheckpointError(
            f"{source}: refused: pickles can run any code. Expected a torch file of tensors (.pt), "
            "safetensors, .npz or .npy."
        )
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                check_inflation(archive, source)
                names = archive.namelist()
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise damaged(source, error) from error
        return "npz" if names and all(name.endswith(".npy") for name in names) else "torch"
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    return "torch"  # or of no kind at all: its reader says so


def has_keys(*names: str) -> Callable[[Content], bool]:
    """A test of content: has it all of these keys?"""
    return lambda content: set(names) <= set(content)


def is_always(content: Content) -> bool:
    """A test of content that any content passes: no other format has files of this kind."""
    return True


# ---- what is not read ----------------------------------------------------------------------------


def refused(reason: str) -> Callable[[Source, Stated], NoReturn]:
    """A reader for a known format that cannot be an ``Autoencoder``: it says so."""

    def read(source: Source, stated: Stated) -> NoReturn:
        raise CheckpointError(f"{source.path}: {reason}")

    return read
