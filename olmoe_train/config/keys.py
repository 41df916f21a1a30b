"""Every key with its type, default and documentation, read from the source code of the schemas.

--help, error messages and the reference pages of docs/ all use this.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from omegaconf import MISSING as MANDATORY

from olmoe_train.config.aliases import ALIASES
from olmoe_train.config.variants import VARIANTS, VariantConfig, variant_groups


@dataclass(frozen=True)
class Key:
    """One option of a config dataclass."""

    name: str
    """Dotted path, for example "trainer.max_steps". Keys of a list's elements contain "[]"."""
    type: str
    """Type in words, or the choices separated by "|"."""
    default: str
    """Default in YAML, or "required"."""
    doc: str
    """Documentation."""

    @property
    def default_or_choices(self) -> str:
        """The default, followed by the other choices if there are choices."""
        if "|" not in self.type:
            return self.default
        others = [choice for choice in self.type.split("|") if choice != self.default]
        return "|".join([self.default, *others])


def config_directory() -> Path:
    """configs/: next to the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def preset_groups(schema: type) -> dict[str, list[Path]]:
    """The presets that a verb accepts: group -> YAML files."""
    groups = {item.name for item in fields(schema) if is_dataclass(item.type)}
    if "trainer" in groups:
        groups |= {"experiment", "ablation"}
    directories = sorted(path for path in config_directory().iterdir() if path.name in groups)
    return {directory.name: sorted(directory.glob("*.yaml")) for directory in directories}


def documented_keys(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """List the keys of a config dataclass.

    Args:
        schema: A config dataclass.
        prefix: Put before each key, for example "data.".

    Returns:
        (dotted key, default with other choices, documentation) of each key, in order. A group of typed
        variants lists the keys of each variant; keys that several variants share come once.
    """
    rows = [
        (key.name, key.default_or_choices, key.doc)
        for _, section in key_sections(schema, prefix)
        for key in section
    ]
    return list(dict.fromkeys(rows))


def key_sections(schema: type, prefix: str = "") -> list[tuple[str, list[Key]]]:
    """List the keys of a config dataclass, with those of variants apart.

    Returns:
        Sections, in order: plain keys as ("", keys), and the keys of each variant of a group with the choice
        that selects it, as ("optimizer=adamw", keys).
    """
    docs = _field_docs(schema)
    sections: list[tuple[str, list[Key]]] = [("", [])]
    for item in fields(schema):
        name = prefix + item.name
        if not is_dataclass(item.type):
            key = Key(name, _type_text(item.type), _default_text(item), docs.get(item.name, ""))
            sections[-1][1].append(key)
            element = get_args(item.type)[0] if get_origin(item.type) is list else None
            if is_dataclass(element):
                assert isinstance(element, type)
                sections[-1][1].extend(_plain_keys(element, f"{name}[]."))
            continue
        assert isinstance(item.type, type)
        if issubclass(item.type, VariantConfig):
            for variant_name, variant in VARIANTS[item.name].items():
                sections.append((f"{item.name}={variant_name}", _plain_keys(variant, f"{name}.")))
        else:
            sections += key_sections(item.type, f"{name}.")
        sections.append(("", []))
    return [section for section in sections if section[1]]


def _plain_keys(schema: type, prefix: str) -> list[Key]:
    return [key for _, section in key_sections(schema, prefix) for key in section]


@cache  # reading and parsing the sources of all schemas takes 50 ms
def _field_docs(schema: type) -> Mapping[str, str]:
    """The string literal under each field, own or inherited; Python keeps it in the source only."""
    docs = {}
    for ancestor in reversed([cls for cls in schema.__mro__ if is_dataclass(cls)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def _type_text(kind: Any) -> str:
    """A type in the words of YAML; the choices of an enum, separated by "|"."""
    if isinstance(kind, UnionType):
        *others, last = [_type_text(part) for part in get_args(kind)]
        return f"{', '.join(others)} or {last}" if "|" not in others[0] else f"{'|'.join(others)}|{last}"
    arguments = get_args(kind)
    if get_origin(kind) is list:
        element = "mapping" if is_dataclass(arguments[0]) else _type_text(arguments[0])
        return f"list of {element}"
    if get_origin(kind) is tuple:
        return f"[{', '.join(_type_text(argument) for argument in arguments)}]"
    if get_origin(kind) is dict:
        return "mapping"
    if issubclass(kind, Enum):
        return "|".join(member.name for member in kind)
    names = {str: "string", bool: "true or false", int: "integer", float: "number", NoneType: "null"}
    return names.get(kind, "any")


def _default_text(item: Field[Any]) -> str:
    if item.default is NO_DEFAULT and item.default_factory is NO_DEFAULT:
        return "required"
    value = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {entry}" for key, entry in value.items()) + "}"
    if isinstance(value, tuple):
        return str(list(value))
    return "required" if value == MANDATORY else str(value)


def help_text(verb: str, schema: type, description: str | None = None) -> str:
    """What `olmoe VERB --help` prints.

    Args:
        verb: Name of the verb; launch_slurm for `olmoe launch slurm`.
        schema: Its config dataclass.
        description: What the verb does; only the first paragraph is printed.

    Returns:
        Usage, every preset, and every key with its default and documentation.
    """
    verb = verb.replace("_", " ")
    lines = [
        f"usage: olmoe {verb} [key=value ...] [group=preset ...]     (or python -m olmoe_train {verb})",
        "",
        inspect.cleandoc(description or "").split("\n\n")[0],
    ]
    if presets := preset_groups(schema):
        lines += ["", "presets (group=preset):"]
        lines += [f"  {group}={'|'.join(path.stem for path in files)}" for group, files in presets.items()]
    lines += ["", "keys with their defaults (presets change some; --cfg job prints the values in use):"]
    for choice, keys in key_sections(schema):
        lines += [f"  with {choice}:"] if choice else []
        for key in keys:
            lines.append(f"  {key.name} = {key.default_or_choices}")
            lines += textwrap.wrap(key.doc, 106, initial_indent="      ", subsequent_indent="      ")
    if spellings := older_spellings(schema):
        lines += ["", "older spellings that are still accepted:"]
        lines += [f"  {old} (now {new})" for old, new in spellings.items()]
    lines += [
        "",
        "flags: --cfg job (print the resolved config), --config-dir DIR (your own presets), --hydra-help",
        "exit codes: 0 done, 1 failed, 2 bad configuration or input, 75 stopped by a signal after saving",
    ]
    return "\n".join(lines)


def older_spellings(schema: type) -> dict[str, str]:
    """The older spellings of keys that a verb accepts: older spelling -> today's key."""
    groups = variant_groups(schema)
    return {old: new for old, new in ALIASES.items() if new.split(".")[0] in groups}
