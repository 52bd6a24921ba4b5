"""Reading single tensors from safetensors files and from ``torch.save``'s files.

Both are memory-mapped privately. Tensors that are loaded to the CPU as they are stored are views of the
map: loading takes no time and no memory, pages are read when they are first used, and a change of a
tensor goes to a copy of its pages, never to the file or to another tensor. Tensors that are cast, or
moved to a device, are copied one by one, and the map is released.

A model that was loaded this way depends on its file as long as it lives. If the file is replaced or
deleted, as every writer of this library does, the model keeps the old content. If another program
rewrites or truncates it in place, the model changes or crashes. ``copy.deepcopy(model)`` has its own
memory.
"""

import functools
import mmap
import os
import pickle
import re
import threading
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, SourceError, shown
from neuron_explainer.models.checkpoints.problems import TensorInfo, damaged, own_copy

# Names in safetensors headers; every other dtype is integer or boolean.
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class TensorFile(ABC):
    """A file of named tensors whose shapes can be read without their values."""

    path: Path
    infos: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor: a view of its own map, or of the map of all tensors."""

    @abstractmethod
    def read_apart(self, name: str) -> torch.Tensor:
        """One tensor that shares no memory with other tensors that were read."""


class SafetensorsFile(TensorFile):
    """A ``.safetensors`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos = {}
        self._map: Any = None
        with self._open() as file:
            names: list[str] = file.keys()  # a method of safetensors, which is not a mapping
            for name in names:
                part = file.get_slice(name)
                dtype = part.get_dtype()
                self.infos[name] = TensorInfo(
                    tuple(part.get_shape()), _FLOATS.get(dtype, dtype), dtype in _FLOATS
                )

    def read(self, name: str) -> torch.Tensor:
        # One map for all tensors, because opening the file takes 0.1 ms.
        self._map = self._map or self._open()
        tensor: torch.Tensor = self._map.get_tensor(name)
        return tensor

    def read_apart(self, name: str) -> torch.Tensor:
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
    """A file of ``torch.save`` that contains a dict of tensors."""

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

    def read_apart(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()


def take(
    file: TensorFile,
    name: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    view: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
    *,
    again: bool = False,
) -> torch.Tensor:
    """A part of one tensor of a file, cast and moved if asked.

    Args:
        view: takes the part.
        again: whether another name has the same part; each then has its own memory.
    """
    info = file.infos[name]
    stored = dtype is None or str(dtype) == f"torch.{info.dtype}"
    if stored and torch.device(device).type == "cpu":
        return view(file.read_apart(name) if again else file.read(name))
    return own_copy(view(file.read_apart(name)), dtype, device)


def torch_load_all(paths: Iterable[Path]) -> Iterator[Callable[[], Any]]:
    """:func:`torch_load` of each file, once it is called; checksums of several are computed at a time."""
    # In threads: zlib lets go of the interpreter. torch.load would not gain, and sets global state.
    with ThreadPoolExecutor() as pool:
        for path, sums in [(path, pool.submit(_check_sums, path)) for path in paths]:
            yield functools.partial(torch_load, path, sums.result)


def torch_load(path: Path, check_sums: Callable[[], bool] | None = None) -> Any:
    """``torch.load`` of tensors and plain values only; a pickle that would run code is refused."""
    try:
        mapped = check_sums() if check_sums else _check_sums(path)
        with warnings.catch_warnings():
            # Warnings about other pickle protocols and old storages: what matters becomes an error below.
            warnings.simplefilter("ignore")
            content = _load(path, mapped)
        check_claims(content, path)
        return content
    except (CheckpointError, SourceError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, and nothing in it was run: it is damaged, or it holds more than "
            f"tensors and plain values, which could run any code{_reason(error)}. If you trust "
            "where it comes from, save its tensors anew with torch.save or safetensors."
        ) from error
    except Exception as error:  # a damaged file raises any of a dozen undocumented errors
        raise damaged(path, error) from error


class PickledConfig:
    """The fields of a pickled config. Its class is neither imported nor run."""


# Classes of configs in published files: dataclasses with plain fields.
_CONFIGS = tuple(
    f"{module}.LanguageModelSAERunnerConfig"
    for module in ("sae_training.config", "sae_lens.training.config")
)
_CONFIGS_LOCK = threading.Lock()  # torch's list of allowed classes is global


def _load(path: Path, mapped: bool) -> Any:
    """The content of a torch file; a :class:`PickledConfig` stands for each of the known configs."""

    def load() -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        return load()
    except pickle.UnpicklingError as error:
        if not any(name in str(error) for name in _CONFIGS):
            raise
        with (
            _CONFIGS_LOCK,
            torch.serialization.safe_globals([(PickledConfig, name) for name in _CONFIGS]),
        ):
            return load()


def _check_sums(path: Path) -> bool:
    """Compare checksums; returns whether there are any (files of torch < 1.6 are not zip archives).

    torch itself does not check the sums that it writes, and would load flipped bits.
    """
    files.check_regular(path)
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        check_inflation(archive, path)
        for entry in archive.infolist():
            # zipfile itself takes several times as long to read large entries.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < 2**16:
                _read_entry(archive, entry)  # checks it
            elif _stored_sum(file, archive, entry) != entry.CRC:
                raise _broken(path, entry.filename)
    return True


def check_inflation(
    archive: zipfile.ZipFile, path: str | Path, inflated_bytes: int = 256 << 20
) -> None:
    """Refuse an archive that inflates beyond ``inflated_bytes`` and 100 times its own size.

    Weights hardly compress: published archives are at most twice as large inside.
    """
    size = os.path.getsize(str(archive.filename))
    inside = sum(entry.file_size for entry in archive.infolist())
    if inside > max(inflated_bytes, 100 * size):
        raise CheckpointError(
            f"{path}: refused: {size:,} bytes that inflate to {inside:,}; expected at most "
            f"{max(inflated_bytes, 100 * size):,}. If you trust it, save its arrays uncompressed."
        )


def check_claims(content: Any, path: Path, claimed_bytes: int = 256 << 20) -> None:
    """Refuse tensors that claim more than ``claimed_bytes`` and four times what the file stores.

    A tensor with strides of 0 repeats few stored numbers, so two kilobytes can claim gigabytes, which
    the first copy would take. Names that share one tensor, as tied weights do, claim it once each.
    """
    claims: list[tuple[int, str]] = []
    stored, seen = {}, set()
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            claims.append((value.numel() * value.element_size(), name))
            if value.layout == torch.strided and value.device.type == "cpu":
                storage = value.untyped_storage()
                stored[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))  # a pickle may hold a list that contains itself
            named = value.items() if isinstance(value, Mapping) else ((name, v) for v in value)
            waiting += [(str(key), item) for key, item in named]
    claimed, limit = sum(size for size, _ in claims), max(claimed_bytes, 4 * sum(stored.values()))
    if claimed > limit:
        largest = shown(max(claims)[1])
        raise CheckpointError(
            f"{path}: refused: its tensors would take {claimed:,} bytes (the largest is {largest}), of which "
            f"the file stores {sum(stored.values()):,}; expected at most {limit:,}. If you trust it, save "
            "its tensors anew, each with .clone()."
        )


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    try:
        archive.read(entry)
    except zipfile.BadZipFile as error:
        raise _broken(Path(str(archive.filename)), entry.filename) from error


def _stored_sum(file: IO[bytes], archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """The checksum of an uncompressed entry's content."""
    assert archive.fp is not None  # an open archive has one
    with archive.open(entry):  # this reads the entry's own header; the data begin at its end
        start = archive.fp.tell()
    with (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
        view[start : start + entry.file_size] as stored,
    ):
        return zlib.crc32(stored)


def _broken(path: Path, entry: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the checksum of {entry} in it is not that of its content: this file is "
        "damaged (or was written with torch.serialization.set_crc32_options(False)). Copy or "
        "download it again; nothing of it was used."
    )


def _reason(error: Exception) -> str:
    """The line of torch's long message that says what was found."""
    found = re.search(r"GLOBAL (\S+)|Unsupported \w+ [^\n]{1,80}", str(error))
    return f" (found {found[1] or found[0]})" if found else ""
