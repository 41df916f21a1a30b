"""The files of a model directory: safetensors, their index, and how they appear at once.

Nothing here knows what the tensors are for. A pickle is opened only where the user says so, and then for its
tensors alone.
"""

import json
import math
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import sync

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY_WEIGHTS = "pytorch_model.bin"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


# Names that safetensors headers give to the dtypes a model can have.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredWeights:
    """Every tensor of a model directory by its name on disk; nothing is read before `read` asks for it.

    One file is open at a time: the pages of a mapped file count as this process's memory while it is.
    trust_pickle: take `pickled`, or the files that its index lists, where there is no safetensors file.
    UserError for missing, unsafe or damaged files, and for tensors that are not floating point.
    """

    def __init__(self, directory: Path, trust_pickle: bool = False, pickled: str = LEGACY_WEIGHTS) -> None:
        self._path = Path()
        self._file: Any = None
        self.tensors: dict[str, StoredTensor] = {}
        single = WEIGHTS
        if not (directory / WEIGHTS).is_file() and not (directory / INDEX).is_file():
            _refuse_pickles(directory, trust_pickle, pickled)
            single = pickled
        index = directory / f"{single}.index.json"
        # Where a directory has both, Transformers too reads the single file.
        listed = {} if (directory / single).is_file() else _read_index(index, Path(single).suffix)
        for name in sorted(set(listed.values())) or [single]:
            self._read_header(directory / name)
        if lost := [f"{key} in {name}" for key, name in listed.items() if key not in self.tensors]:
            raise UserError(f"{index} lists tensors that are not there: {some(lost)}")

    def read(self, name: str) -> Tensor:
        """A view of the file: copy what you keep."""
        file = self._open(self.tensors[name].path)
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def _read_header(self, path: Path) -> None:
        file = self._open(path)
        if isinstance(file, dict):
            for name, tensor in file.items():
                self._add(name, path, tuple(tensor.shape), tensor.dtype, str(tensor.dtype))
            return
        for name in file.keys():  # noqa: SIM118  not a dict
            header = file.get_slice(name)
            self._add(
                name, path, tuple(header.get_shape()), _DTYPES.get(header.get_dtype()), header.get_dtype()
            )

    def _add(
        self, name: str, path: Path, shape: tuple[int, ...], dtype: torch.dtype | None, stored_as: str
    ) -> None:
        if dtype not in _DTYPES.values():
            raise UserError(f"{path}: {name} is stored as {stored_as}; quantised weights cannot be read")
        assert dtype is not None
        self.tensors[name] = StoredTensor(path, shape, dtype)

    def _open(self, path: Path) -> Any:
        if path != self._path:
            self._file = None  # before the next one is mapped
            self._path = path
            self._file = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        return self._file


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, mapped from the disk; nothing but tensors is ever built from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: asks for more than tensors, which is not run: {_first_line(error)}"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path}: not a state dict, tensors by name")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _refuse_pickles(directory: Path, trust_pickle: bool, pickled: str) -> None:
    """Where a directory has no safetensors: UserError, unless it has a pickle and the user trusts it."""
    there = [name for name in (pickled, f"{pickled}.index.json") if (directory / name).is_file()]
    if not there:
        raise UserError(f"{directory}: no weights there ({WEIGHTS} or {INDEX})")
    if not trust_pickle:
        raise UserError(
            f"{directory} has its weights in {there[0]} only, a pickle, which may run code when read: where "
            "you trust its origin, set trust_pickle=true (model.trust_pickle=true in training). It is then "
            "read by torch.load(weights_only=True); `olmoe export` with it makes safetensors of it"
        )


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name, all files being in the index's own directory and of this kind."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map).items()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a {suffix[1:]} index (a JSON object with a weight_map)") from None
    for key, name in items:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise UserError(f"{path}: {key} points to {name!r}, which is no {suffix} file beside the index")
    return dict(items)


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """One file of any size, of which one tensor at a time is in memory; `read` gives each when it is its
    turn, already of its shape and dtype.

    Layout: uint64 length of the header, the header (JSON), the tensors' bytes in its order; little-endian.
    """
    stored_as = {value: key for key, value in _DTYPES.items()}[dtype]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored_as, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers expect the tensors to be aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name).contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
            tensor.view(-1).view(torch.uint8).numpy().tofile(file)


def byte_count(size: str | int) -> int:
    """Bytes in "5GB", "200MB" (powers of 1000), "1GiB" (of 1024) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", str(size).strip().upper())
    if match is None or (match[2] or "B") not in _UNITS or float(match[1]) == 0:
        raise UserError(f"max_shard_size={size}: write a size such as 5GB, 200MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def appears_at_once(directory: Path, last: str) -> Iterator[Path]:
    """A temporary directory beside `directory`, whose files move there, synced, when the block ends well.

    last: the file without which it is no model, and which so moves last.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left_over in directory.parent.glob(f".{directory.name}.*.partial"):  # of one that was killed here
        shutil.rmtree(left_over)
    temporary = Path(tempfile.mkdtemp(".partial", f".{directory.name}.", directory.parent))
    try:
        yield temporary
        _publish(temporary, directory, last)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, directory: Path, last: str) -> None:
    names = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == last)
    mode = (temporary / last).stat().st_mode
    for name in names:
        (temporary / name).chmod(mode)  # safetensors leaves its files readable by their owner alone
        sync(temporary / name)
    if not directory.exists():
        temporary.chmod(mode | (mode & 0o444) >> 2)  # mkdtemp's is private; to enter for all who may read
        temporary.rename(directory)
    else:
        for name in names:
            (temporary / name).replace(directory / name)
    sync(directory)
    sync(directory.parent)


def refuse_misfits(
    where: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """UserError that names every tensor that is missing, unexpected or mis-shaped. where: its first line."""
    complaints = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} is {list(found[name])}, by the configuration {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if any(complaints.values()):
        lines = [f"tensors {what}: {some(names)}" for what, names in complaints.items() if names]
        raise UserError("\n  ".join([where, *lines]))


def some(names: list[str]) -> str:
    """The first few and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
