"""From overrides to dataclasses: Hydra composes YAML onto the schemas, OmegaConf makes the objects."""

import difflib
import re
from dataclasses import FrozenInstanceError
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmoe_train.config.reference import config_directory, documented_keys
from olmoe_train.config.train import TrainConfig
from olmoe_train.utils.errors import UserError


def compose(*overrides: str) -> TrainConfig:
    """The configuration of `olmoe train` with these overrides, as from the command line.

    Args:
        overrides: Hydra overrides, for example "experiment=quickstart", "data.dir=prepared/python_stdlib".

    Returns:
        Frozen dataclasses, to be passed to olmoe_train.train.train.

    Raises:
        UserError: an override names no key or preset, a value has the wrong type, or a key has no value.
    """
    register_schema("train", TrainConfig)
    try:
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            return to_config(hydra.compose("train", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, TrainConfig)) from error


def register_schema(verb: str, schema: type) -> None:
    """Make the schema of a verb known to Hydra; configs/<verb>.yaml starts from `<verb>_schema`."""
    ConfigStore.instance().store(f"{verb}_schema", node=writable(OmegaConf.structured(schema)))


def to_config(composed: DictConfig) -> Any:
    """The composed DictConfig as the schema's frozen dataclasses. UserError names every missing mandatory
    key."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError("\n  ".join(["these keys have no value:", *(f"{key}=..." for key in missing)]))
    try:
        return OmegaConf.to_object(composed)
    except FrozenInstanceError as error:  # added with +key=...
        key = str(error).split("'")[1]
        raise UserError(f"there is no key {key!r}: + adds none here; --help lists every key") from error


def writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses make read-only nodes, which Hydra could not merge YAML into: lift that until
    to_object."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            writable(child)
    return node


def explain(error: BaseException, schema: type) -> str:
    """One readable message out of the chain of exceptions that Hydra and OmegaConf raise."""
    if isinstance(error, UserError):
        return str(error)
    lines: list[str] = []
    link: BaseException | None = error
    while link is not None:
        text = str(link).split("\nConfig search path")[0]
        lines += [line.strip() for line in text.splitlines() if line.strip()]
        link = link.__cause__ or link.__context__
    noise = ("reference_type", "object_type", "full_key", "To append", "Set the env", "could not convert")
    kept = [line for line in dict.fromkeys(lines) if not line.startswith(noise) and "$VALUE" not in line]
    suggestion = _did_you_mean(" ".join(lines), schema) if any("not in '" in line for line in kept) else ""
    return "\n  ".join([*kept, suggestion] if suggestion else kept)


def _did_you_mean(message: str, schema: type) -> str:
    """For an unknown key: the known keys nearest to it."""
    known = [key for key, _, _ in documented_keys(schema)]
    match = re.search(r"Could not override '([^']+)'|full_key: (\S+)", message)
    unknown = (match[1] or match[2]) if match else ""
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "--help lists every key"
