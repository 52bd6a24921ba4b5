"""Reading single tensors out of safetensors files and of ``torch.save``'s files.

Both are memory-mapped and every tensor is copied out of the map on its own, so that loading takes
the memory of the result and no more, and nothing that is loaded hangs on the file afterwards: a
file that is overwritten cannot change, or kill, a model that was read from it.
"""

import pickle
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.report import TensorInfo, damaged

# Names in safetensors headers; every other dtype is an integer or boolean one.
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class TensorFile(ABC):
    """A file of named tensors whose shapes can be had without their values."""

    path: Path
    infos: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor, perhaps a view of the mapped file: copy it before you keep it."""


class SafetensorsFile(TensorFile):
    """A ``.safetensors`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos = {}
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                part = file.get_slice(name)
                dtype = part.get_dtype()
                self.infos[name] = TensorInfo(
                    tuple(part.get_shape()), _FLOATS.get(dtype, dtype), dtype in _FLOATS
                )

    def read(self, name: str) -> torch.Tensor:
        # Opened anew for each tensor, which takes 0.1 ms: what was read of the map is given back.
        with self._open() as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error


class TorchFile(TensorFile):
    """A file of ``torch.save`` that holds a dict of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = torch_load(path)
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{path}: expected a dict of tensors, found {type(content).__name__}."
            )
        wrong = sorted(
            f"{name!r} ({type(value).__name__})"
            for name, value in content.items()
            if not (isinstance(name, str) and isinstance(value, torch.Tensor))
        )
        if wrong:
            raise CheckpointError(
                f"{path}: expected a dict of names and tensors, found also: {', '.join(wrong)}."
            )
        self._tensors: dict[str, torch.Tensor] = dict(content)
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def torch_load(path: Path) -> Any:
    """``torch.load`` of tensors and plain values only: a pickle that would run code is refused."""
    try:
        # The files of torch < 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _check_sums(path)
        with warnings.catch_warnings():
            # About other pickle protocols and old storages: what matters becomes an error below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, and nothing in it was run: it is damaged, or it holds more than "
            f"tensors and plain values, which could run any code{_reason(error)}. If you trust "
            "where it comes from, save its tensors anew with torch.save or safetensors."
        ) from error
    except Exception as error:  # a damaged file fails in a dozen ways, none of them documented
        raise damaged(path, error) from error


def _check_sums(path: Path) -> None:
    """torch itself does not look at the checksums that it writes, and would load flipped bits."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise CheckpointError(
            f"{path}: the checksum of {broken} in it is not that of its content: this file is "
            "damaged (or was written with torch.serialization.set_crc32_options(False)). Copy or "
            "download it again; nothing of it was used."
        )


def _reason(error: Exception) -> str:
    """The line of torch's long message that names what was found."""
    found = re.search(r"GLOBAL (\S+)|Unsupported \w+ [^\n]{1,80}", str(error))
    return f" (found {found[1] or found[0]})" if found else ""
