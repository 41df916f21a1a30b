"""Typed variants: config groups whose keys depend on which variant is chosen, such as optimizer=adamw.

A variant is a frozen dataclass that extends its group's base class, and a preset
configs/<group>/<variant>.yaml that starts from the dataclass:

    defaults:
      - adamw_schema
      - _self_

Builders are dictionaries keyed by the dataclass, for example OPTIMIZERS in olmoe_train/optim/build.py. To add
a variant, write the dataclass, call `register_variant` on it, and add its preset (in configs/, or in a
directory of your own that --config-dir names) and its builder.
"""

from dataclasses import dataclass, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass(frozen=True)
class VariantConfig:
    """The base of every variant."""

    name: str = MISSING
    """Name of the variant. Do not set it: group=variant on the command line chooses the variant."""

    def errors(self) -> list[str]:
        """What is wrong with the values of this section: one message per error, each with key and value."""
        return []


VARIANTS: dict[str, dict[str, type[VariantConfig]]] = {}
"""Group -> name -> dataclass, in the order of registration."""
OLDER_NAMES: dict[str, dict[str, str]] = {}
"""Group -> older name of a variant -> today's name."""


def register_variant(
    group: str,
    schema: type[VariantConfig],
    not_given: tuple[str, ...] = (),
    older_names: tuple[str, ...] = (),
) -> type[VariantConfig]:
    """Make a variant known to Hydra (as <group>/<name>_schema), to --help and to the preflight checks.

    Args:
        group: Field of TrainConfig that the variant is for, for example "optimizer".
        schema: Frozen dataclass that extends the group's base class. The default of its field `name` is the
            name of the variant.
        not_given: Fields that have no value in the group's presets, so that what has one was given by the
            user. `config.compose.resolve` must fill them.
        older_names: Names that the variant had in earlier versions. The schema and the configs of old runs
            are found by them, too; a preset of that name must exist for the command line.

    Returns:
        The schema, unchanged.

    Raises:
        ValueError: the schema has no name, or another variant of the group has the same one.
    """
    name = schema.name
    if name == MISSING:
        raise ValueError(f"{schema.__name__} must give its field `name` a default, the name of the variant")
    if VARIANTS.get(group, {}).get(name, schema) is not schema:
        raise ValueError(f"{group}={name} is already {VARIANTS[group][name].__name__}")
    VARIANTS.setdefault(group, {})[name] = schema
    node = writable(OmegaConf.structured(schema))
    for field in not_given:
        node[field] = MISSING
    for known in (name, *older_names):
        ConfigStore.instance().store(group=group, name=f"{known}_schema", node=node)
    OLDER_NAMES.setdefault(group, {}).update(dict.fromkeys(older_names, name))
    return schema


def variant_groups(schema: type) -> list[str]:
    """The fields of a config dataclass that hold a variant."""
    return [f.name for f in fields(schema) if isinstance(f.type, type) and issubclass(f.type, VariantConfig)]


def variant_errors(cfg: Any) -> list[str]:
    """What is wrong with the variants of a config: one message per error."""
    errors = []
    for group in variant_groups(type(cfg)):
        section, known = getattr(cfg, group), VARIANTS[group]
        registered = next((name for name, schema in known.items() if schema is type(section)), None)
        expected = registered or type(section).name
        if expected == MISSING:
            errors.append(f"{group}: {type(section).__name__} is no variant; use one of {', '.join(known)}")
        elif section.name != expected:
            errors.append(
                f"{group}.name={section.name}: the keys of this section are those of {group}={expected}; "
                f"remove {group}.name, and choose the variant with {group}={section.name}"
            )
        errors += section.errors()
    return errors


def writable(node: DictConfig) -> DictConfig:
    """Lift the read-only flag that a frozen dataclass gives its nodes, so that Hydra can merge into them.

    A mapping that is empty by default takes any key (tokenizer.chat_template_kwargs).
    """
    OmegaConf.set_readonly(node, None)
    if OmegaConf.get_type(node) is dict and not node:
        OmegaConf.set_struct(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            writable(child)
    return node
