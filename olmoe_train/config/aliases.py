"""Older spellings of keys, which keep working on the command line, in YAML and in the configs of old runs."""

import copy
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from olmoe_train.config.adapter import NoAdapterConfig
from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.variants import OLDER_NAMES, VARIANTS, VariantConfig
from olmoe_train.utils.errors import UserError

ALIASES = {
    "loss.balance_scope": "balancing.scope",
}
"""Older spelling -> today's key."""
EMPTY_GROUPS = ("experiment", "ablation")
"""Groups of presets that have no default."""

FIRST_VARIANTS: dict[str, type[VariantConfig]] = {
    "optimizer": AdamWConfig,
    "objective": NextTokenConfig,
    "balancing": AuxiliaryLossConfig,
    "adapter": NoAdapterConfig,
}
"""What a run did whose config names no variant, because it was made before there were variants."""

LATER_MODEL_KEYS = ("num_shared_experts", "routing", "expert_capacity", "qk_norm", "norm", "initialization")
"""Keys of `model` that older runs do not have. These runs did what the defaults do."""


def current_key(key: str) -> str:
    """Today's spelling of a key."""
    return ALIASES.get(key, key)


def current_overrides(overrides: list[str]) -> list[str]:
    """Command-line overrides with older spellings replaced, and those of EMPTY_GROUPS in the form that Hydra
    accepts: GROUP=NAME for +GROUP=NAME, which Hydra calls a second value, and nothing for GROUP=null.

    An override of either spelling also clears the older one, since it takes precedence over YAML files that
    still use that.

    Raises:
        UserError: both spellings of a key are given, with different values.
    """
    given: dict[str, str] = {}
    result, cleared = [], []
    for override in overrides:
        written, equals, value = override.partition("=")
        key = written.lstrip("+")
        if key in EMPTY_GROUPS:
            result += [f"{key}{equals}{value}"] if value != "null" else []
            continue
        new = current_key(key)
        if not equals or new not in ALIASES.values():
            result.append(override)
            continue
        for other in given:
            if other != key and current_key(other) == new and given[other] != value:
                raise _conflict(other, given[other], key, value)
        given[key] = value
        result.append(written.removesuffix(key) + f"{new}={value}")
        cleared += [f"{old}=null" for old in ALIASES if ALIASES[old] == new]
    return result + list(dict.fromkeys(cleared))


def accept_aliases(schema: DictConfig, defaults: DictConfig) -> None:
    """Add the older spellings to a schema, so that YAML files may use them. Their value is null: not given.

    Args:
        schema: What Hydra merges presets into; changed in place.
        defaults: The same schema with its default variants, from which the older keys take their types.
    """
    for old, new in ALIASES.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if section not in defaults or new_section not in defaults:
            continue
        node = copy.deepcopy(defaults[new_section]._get_node(new_name))
        node._metadata.optional = True
        node._set_value(None)
        with open_dict(schema[section]):
            schema[section]._set_item_impl(name, node)


def move_aliases(composed: DictConfig) -> None:
    """Move the value of each older spelling to today's key and remove the older one, in place.

    Raises:
        UserError: both are given and differ, or the chosen variant has no such key.
    """
    for old, new in ALIASES.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if section not in composed or name not in composed[section]:
            continue
        with open_dict(composed[section]):
            value = composed[section].pop(name)
        if value is None:
            continue
        target = composed[new_section]
        if new_name not in target:
            raise UserError(
                f"{old}={_text(value)}: the older spelling of {new}, a key that {new_section}={target.name} "
                f"does not have; remove {old}"
            )
        default = OmegaConf.structured(OmegaConf.get_type(target))[new_name]
        if target[new_name] not in (default, value):
            raise _conflict(old, _text(value), new, _text(target[new_name]))
        target[new_name] = value


def current_saved_config(saved: dict[str, Any]) -> dict[str, Any]:
    """The config of an older run in today's spelling.

    Args:
        saved: The config as nested dictionaries, as a checkpoint or config.yaml has it.

    Returns:
        A copy with today's keys, in which every group of variants has its `name` and every key of its
        variant. A key that came later has its default, which is what the run did.
    """
    config = copy.deepcopy(saved)
    for group, variant in FIRST_VARIANTS.items():
        section = config.get(group, {})
        if (name := section.get("name")) in OLDER_NAMES.get(group, {}):
            section["name"] = OLDER_NAMES[group][name]
        schema = VARIANTS[group].get(section["name"]) if "name" in section else variant
        if schema is not None:
            defaults = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
            assert isinstance(defaults, dict)
            config[group] = defaults | section
    if "model" in config:
        defaults = OmegaConf.to_container(OmegaConf.structured(ModelConfig), enum_to_str=True)
        assert isinstance(defaults, dict)
        config["model"] = {key: defaults[key] for key in LATER_MODEL_KEYS} | config["model"]
    for old, new in ALIASES.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if name in config.get(section, {}):
            config[new_section][new_name] = config[section].pop(name)
    return config


def _text(value: Any) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def _conflict(first: str, value: str, second: str, other: str) -> UserError:
    new = current_key(first)
    return UserError(
        f"{first}={value} and {second}={other}: two spellings of the same key with different values; "
        f"keep {new} and remove the other"
    )
