"""Reads and writes the weight files of a model directory: safetensors, their index, pickled tensors.

This module knows names, shapes and dtypes, not what the tensors mean. A pickle is opened only if the user
allows it, and only tensors are built from it.
"""

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olmoe_train.utils.errors import UserError
from olmoe_train.utils.finite import first_not_finite

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY_WEIGHTS = "pytorch_model.bin"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

# The dtypes that a model's weights can have, under the names that safetensors headers use.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

# Wrappers keep the wrapped module under these names, so that the names of its tensors contain them: at the
# start (a wrapped model) or inside (a wrapped layer). No tensor of an OLMo or OLMoE has such a part.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored, with its shape and dtype from the file's header."""

    path: Path
    key: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredWeights:
    """The tensors of a model directory by name. Only headers are read before `read`.

    At most one file is mapped at a time, because the pages of a mapped file count as memory of this process.

    Attributes:
        tensors: Name -> file, shape and dtype of each tensor.
    """

    def __init__(
        self,
        directory: Path,
        trust_pickle: bool = False,
        strip_prefix: bool = False,
        pickled: str = LEGACY_WEIGHTS,
        decode: Callable[[str], str] = str,
    ) -> None:
        """Read the headers of all weight files.

        Args:
            directory: Holds model.safetensors, or model.safetensors.index.json and the files that it lists.
            trust_pickle: If there is no safetensors file, read `pickled` or the files that its index lists.
            strip_prefix: Leave the wrappers' parts (`_orig_mod.`, `module.`) out of the names.
            pickled: Name of the pickle file.
            decode: Makes the name of a tensor of its name in the file.

        Raises:
            UserError: A file is missing, unsafe or damaged, a tensor is not floating point, or two tensors
                have the same name without the wrappers' parts.
        """
        self._path = Path()
        self._file: Any = None
        self.tensors: dict[str, StoredTensor] = {}
        single = WEIGHTS
        if not (directory / WEIGHTS).is_file() and not (directory / INDEX).is_file():
            _refuse_pickles(directory, trust_pickle, pickled)
            single = pickled
        index = directory / f"{single}.index.json"
        # Transformers, too, reads the single file if a directory has both.
        listed = {} if (directory / single).is_file() else _read_index(index, Path(single).suffix)
        for name in sorted(set(listed.values())) or [single]:
            self._read_header(directory / name)
        if lost := [f"{key} in {name}" for key, name in listed.items() if key not in self.tensors]:
            raise UserError(f"{index} lists tensors that the files do not hold: {first_few(lost)}")
        self._rename(lambda key: _without_wrappers(decode(key)) if strip_prefix else decode(key), directory)

    def read(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file. Copy what has to outlive the next `read`."""
        stored = self.tensors[name]
        file = self._open(stored.path)
        return file[stored.key] if isinstance(file, dict) else file.get_tensor(stored.key)

    def read_finite(self, name: str) -> Tensor:
        """Return a tensor as `read` does.

        Raises:
            UserError: A value is NaN or infinite; the message names the file, the tensor and the first index.
        """
        tensor = self.read(name)
        if found := first_not_finite(tensor):
            raise UserError(
                f"{self.tensors[name].path}: {name}{found}; nothing can be computed with weights that are "
                "not finite: take an earlier checkpoint, or the files from their origin"
            )
        return tensor

    def _rename(self, rename: Callable[[str], str], directory: Path) -> None:
        renamed: dict[str, StoredTensor] = {}
        for key, stored in self.tensors.items():
            name = rename(key)
            if name in renamed:
                raise UserError(
                    f"{directory}: {renamed[name].key} and {key} are both {name} without their prefixes; "
                    "store only one of them"
                )
            renamed[name] = stored
        self.tensors = renamed

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
            raise UserError(f"{path}: {name} is stored as {stored_as}; quantized weights cannot be read")
        assert dtype is not None
        self.tensors[name] = StoredTensor(path, name, shape, dtype)

    def _open(self, path: Path) -> Any:
        if path != self._path:
            self._file = None  # unmap this file before the next one is mapped
            self._path = path
            self._file = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        return self._file


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _open_pickle(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a torch.save file. weights_only=True refuses to build anything else from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: contains objects other than tensors, which are not loaded: {_first_line(error)}"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path}: not a state dict (a dictionary of tensors by name)")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _refuse_pickles(directory: Path, trust_pickle: bool, pickled: str) -> None:
    """For a directory without safetensors: raise UserError unless it has a pickle that the user trusts."""
    there = [name for name in (pickled, f"{pickled}.index.json") if (directory / name).is_file()]
    if not there:
        raise UserError(f"{directory}: no weights found; expected {WEIGHTS} or {INDEX}")
    if not trust_pickle:
        raise UserError(
            f"{directory} has its weights only in {there[0]}, a pickle, which may run code when it is read.\n"
            "  If you trust its origin, set trust_pickle=true (model.trust_pickle=true in training): it is "
            "then read with torch.load(weights_only=True). `olmoe export` converts it to safetensors."
        )


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    """Read an index: tensor name -> file name. Every file must end in `suffix` and lie beside the index."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map).items()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a {suffix[1:]} index (a JSON object with a weight_map)") from None
    for key, name in items:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise UserError(
                f"{path}: {key} points to {name!r}, which is not a {suffix} file beside the index"
            )
    return dict(items)


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file of any size with one tensor in memory at a time.

    Layout, little-endian: the header's length as uint64, the header as JSON, then the tensors' bytes in its
    order.

    Args:
        path: The file to write.
        shapes: Name -> shape of each tensor, in the order in which they are written.
        dtype: Data type of all tensors.
        read: Returns a tensor by its name, on the CPU, with its shape and dtype. It is called once per
            tensor.
    """
    stored_as = {value: key for key, value in _DTYPES.items()}[dtype]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored_as, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers expect the tensors to start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name).contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
            tensor.view(-1).view(torch.uint8).numpy().tofile(file)


def byte_count(size: str | int) -> int:
    """Parse a size in bytes: "5GB", "200MB" (powers of 1000), "1GiB" (powers of 1024) or a plain number.

    Raises:
        UserError: It is not a positive size. The message names max_shard_size, the only key that is parsed
            here.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", str(size).strip().upper())
    if match is None or (match[2] or "B") not in _UNITS or float(match[1]) == 0:
        raise UserError(f"max_shard_size={size}: write a size such as 5GB, 200MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def check_tensor_shapes(
    where: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """Compare stored tensors with those that a configuration implies.

    Args:
        where: First line of the error message.
        expected: Name -> shape by the configuration.
        found: Name -> shape in the files.

    Raises:
        UserError: A tensor is missing, unexpected or of the wrong shape. The message lists the tensors of
            each kind. If names carry the prefix of a wrapper, the message names the prefix instead.
    """
    if wrapped := [name for name in found if _without_wrappers(name) != name]:
        parts = sorted({part for name in wrapped for part in name.split(".") if part in _WRAPPERS})
        prefixes = " and ".join(f"{part}. (of {_WRAPPERS[part]})" for part in parts)
        raise UserError(
            f"{where} {len(wrapped)} of {len(found)} names of tensors carry the prefix {prefixes}, such as "
            f"{wrapped[0]}; strip_prefix=auto takes it off (model.strip_prefix=auto in training)"
        )
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "with a wrong shape": [
            f"{name} is {list(found[name])}, the configuration says {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if any(problems.values()):
        lines = [f"tensors {kind}: {first_few(names)}" for kind, names in problems.items() if names]
        raise UserError("\n  ".join([where, *lines]))


def _without_wrappers(name: str) -> str:
    """The name that a tensor has in the module that wrappers hold."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def first_few(names: list[str]) -> str:
    """Join the first five names, and say how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
