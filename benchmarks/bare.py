"""Lets the package be imported where packages are missing that a benchmark on a bare machine does not use.

The modules of the model, of its layouts and of its engines mention Hydra, OmegaConf and others at their top:
as types, as defaults of keys, to register schemas. Nothing of that is needed to compute. A missing package is
replaced by a module whose names do nothing; a part that really needs the package has to say so.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

PACKAGES = ("hydra", "omegaconf", "tokenizers", "xxhash", "zstandard")
"""Packages of pyproject.toml that the modules imported here mention, and that parts do without."""


class _StandIn(ModuleType):
    """A module in which every name exists."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # `except` and `raise` need classes of exceptions; everything else may be anything.
        value = (
            type(name, (Exception,), {}) if name.endswith(("Error", "Exception")) else MagicMock(name=name)
        )
        setattr(self, name, value)
        return value


class _Finder:
    """Finds the missing packages and their submodules."""

    def __init__(self, missing: Sequence[str]) -> None:
        self.missing = missing

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in self.missing:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def is_missing(package: str) -> bool:
    """Whether the package cannot be imported."""
    try:
        return isinstance(sys.modules.get(package), _StandIn) or importlib.util.find_spec(package) is None
    except ValueError:  # sys.modules holds None, which forbids the import
        return True


def replace_missing() -> list[str]:
    """Put stand-ins in place of the missing PACKAGES, and return their names. Call before the package is
    imported."""
    missing = [name for name in PACKAGES if is_missing(name)]
    for name in missing:
        sys.modules.pop(name, None)
    if missing:
        sys.meta_path.insert(0, _Finder(missing))
    return missing
