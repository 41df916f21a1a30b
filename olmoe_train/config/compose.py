"""From overrides to dataclasses: Hydra composes YAML onto the schemas, OmegaConf creates the objects."""

import copy
import difflib
import functools
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass
from enum import Enum
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmoe_train.config.aliases import accept_aliases, current_overrides, move_aliases
from olmoe_train.config.initial_adapter import resolve_adapter
from olmoe_train.config.initial_model import mark_as_not_given, resolve_model
from olmoe_train.config.keys import config_directory, documented_keys
from olmoe_train.config.train import TrainConfig
from olmoe_train.config.variants import VARIANTS, variant_groups, writable
from olmoe_train.utils.errors import UserError


def compose(*overrides: str) -> TrainConfig:
    """Make the configuration of `olmoe train` from overrides, in the same way as the command line.

    Args:
        overrides: Hydra overrides, for example "experiment=quickstart", "data.dir=prepared/python_stdlib".

    Returns:
        Frozen dataclasses. Pass them to olmoe_train.train.train.

    Raises:
        UserError: an override names a key or preset that does not exist, a value has the wrong type, or a
            mandatory key has no value.
    """
    register_schema("train", TrainConfig)
    try:
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            return to_config(hydra.compose("train", current_overrides(list(overrides))))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, TrainConfig)) from error


def plain_values(cfg: Any) -> dict[str, Any]:
    """Return a configuration, an instance of a config dataclass, as plain values, with enums by name."""
    return {field.name: _plain(getattr(cfg, field.name)) for field in fields(cfg)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return plain_values(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


@functools.cache  # a fifth of the time of composing
def register_schema(verb: str, schema: type) -> None:
    """Make the schema of a verb known to Hydra; configs/<verb>.yaml starts from `<verb>_schema`.

    Groups of typed variants have no value in it: the preset that is chosen brings the keys of its variant.
    """
    defaults = writable(OmegaConf.structured(schema))
    node = copy.deepcopy(defaults)
    for group in variant_groups(schema):
        node[group] = MISSING
    accept_aliases(node, defaults)
    mark_as_not_given(node)
    ConfigStore.instance().store(f"{verb}_schema", node=node)


def to_config(composed: DictConfig) -> Any:
    """Convert what Hydra composed into the frozen dataclasses of its schema.

    Args:
        composed: A DictConfig whose type is a config dataclass; older spellings of keys are moved in place.

    Returns:
        An instance of that dataclass.

    Raises:
        UserError: names every mandatory key that has no value, or the key that does not exist; or a key
            contradicts the configuration of model.init_from.
    """
    resolve(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError("\n  ".join(["these keys have no value:", *(f"{key}=..." for key in missing)]))
    try:
        return OmegaConf.to_object(composed)
    except FrozenInstanceError as error:  # added with +key=...
        key = str(error).split("'")[1]
        raise UserError(f"there is no key {key!r}, and + cannot add one; --help lists every key") from error


def resolve(composed: DictConfig) -> None:
    """Complete what Hydra composed, in place: default variants, today's spelling of keys, the architecture of
    model.init_from and the adapter of model.adapter_from. Mandatory keys without a value stay as they are.

    Raises:
        UserError: Keys contradict each other, the configuration of model.init_from, or the adapter in
            model.adapter_from.
    """
    _fill_variants(composed)
    move_aliases(composed)
    resolve_model(composed)
    resolve_adapter(composed)


def _fill_variants(composed: DictConfig) -> None:
    """Give each group of variants for which no variant was chosen its default, for example under a primary
    config or a preset that was written before there were variants."""
    schema = OmegaConf.get_type(composed)
    if not is_dataclass(schema):
        return
    for group in variant_groups(schema):
        base = next(f.type for f in fields(schema) if f.name == group)
        unset = OmegaConf.is_missing(composed, group)
        if unset or OmegaConf.get_type(composed, group) is base:
            given = {} if unset else _values(composed[group])
            default = OmegaConf.structured(getattr(schema(), group))
            composed[group] = OmegaConf.merge(writable(default), given)


def _values(section: DictConfig) -> dict[str, Any]:
    return {str(key): section[key] for key in section if not OmegaConf.is_missing(section, key)}


def explain(error: BaseException, schema: type) -> str:
    """Make one readable message from the chain of exceptions that Hydra and OmegaConf raise.

    Args:
        error: The exception that was caught.
        schema: The config dataclass, to suggest keys from.

    Returns:
        The message: what is wrong, and for an unknown key the nearest key.
    """
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
    kept = [line for line in kept if not line.endswith("_schema")]  # of the options of a group of variants
    suggestion = _did_you_mean(" ".join(lines), schema) if any("not in '" in line for line in kept) else ""
    return "\n  ".join([*kept, suggestion] if suggestion else kept)


def _did_you_mean(message: str, schema: type) -> str:
    """The fix for an unknown key: the nearest key, or the form of a preset of a group of variants."""
    known = [key for key, _, _ in documented_keys(schema)]
    match = re.search(r"Could not override '([^']+)'|full_key: (\S+)", message)
    unknown = (match[1] or match[2]) if match else ""
    for group in variant_groups(schema):
        base = next(f.type for f in fields(schema) if f.name == group)
        if isinstance(base, type) and f"not in '{base.__name__}'" in message:
            return (
                f"a preset of `{group}` must start with its variant: defaults: [NAME_schema, _self_], where "
                f"NAME is one of {', '.join(VARIANTS[group])}"
            )
    section, _, key = unknown.partition(".")
    if unknown in known and section in variant_groups(schema):
        return f"{section}.{key} is a key of another variant of {section}: choose that one, or remove the key"
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "--help lists every key"
