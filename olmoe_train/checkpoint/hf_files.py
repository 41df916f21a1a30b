"""The files of a Hugging Face model directory: safetensors, their index, and how they appear at once.

Nothing here knows what the tensors are for, and nothing unpickles.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olmoe_train.errors import UserError
from olmoe_train.files import sync

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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
    """Every tensor of an HF directory by its name on disk; nothing is read before `read` asks for it.

    One file is open at a time: the pages of a mapped file count as this process's memory while it is.
    UserError for missing, unsafe or damaged files, and for tensors that are not floating point.
    """

    def __init__(self, directory: Path) -> None:
        self._path = Path()
        self._file: Any = None
        self.tensors: dict[str, StoredTensor] = {}
        listed = _read_index(directory / INDEX) if (directory / INDEX).is_file() else {}
        if (directory / WEIGHTS).is_file():
            listed = {}  # where a directory has both, Transformers too reads the single file
        elif not listed:
            raise _no_weights(directory)
        for name in sorted(set(listed.values())) or [WEIGHTS]:
            self._read_header(directory / name)
        if lost := [f"{key} in {name}" for key, name in listed.items() if key not in self.tensors]:
            raise UserError(f"{directory / INDEX} lists tensors that are not there: {some(lost)}")

    def read(self, name: str) -> Tensor:
        """A view of the file: copy what you keep."""
        return self._open(self.tensors[name].path).get_tensor(name)

    def _read_header(self, path: Path) -> None:
        file = self._open(path)
        for name in file.keys():  # noqa: SIM118  not a dict
            header = file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{path}: {name} is stored as {header.get_dtype()}; quantised weights cannot be read"
                )
            self.tensors[name] = StoredTensor(path, tuple(header.get_shape()), _DTYPES[header.get_dtype()])

    def _open(self, path: Path) -> Any:
        if path != self._path:
            self._file = None  # before the next one is mapped
            try:
                self._path, self._file = path, safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read: {error}") from None
        return self._file


def _no_weights(directory: Path) -> UserError:
    if pickles := sorted(path.name for path in directory.glob("pytorch_model*.bin")):
        return UserError(
            f"{directory} has its weights in {pickles[0]} only, a pickle, which may run code when read: "
            "convert it to safetensors (Transformers: save_pretrained) where you trust it"
        )
    return UserError(f"{directory}: no weights there ({WEIGHTS} or {INDEX})")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, all files being in the index's own directory."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map).items()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a safetensors index (a JSON object with a weight_map)") from None
    for key, name in items:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path}: {key} points to {name!r}, which is no .safetensors file beside the index"
            )
    return dict(items)


def byte_count(size: str | int) -> int:
    """Bytes in "5GB", "200MB" (powers of 1000), "1GiB" (of 1024) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", str(size).strip().upper())
    if match is None or (match[2] or "B") not in _UNITS or float(match[1]) == 0:
        raise UserError(f"max_shard_size={size}: write a size such as 5GB, 200MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish(temporary: Path, directory: Path) -> None:
    """Move complete, synced files to where readers look; config.json last, without which it is no model."""
    names = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == "config.json")
    mode = (temporary / "config.json").stat().st_mode
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


def some(names: list[str]) -> str:
    """The first few and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
