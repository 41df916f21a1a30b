"""Every key and its documentation, from the schemas' own source: for --help, error messages and docs/."""

import ast
import inspect
import textwrap
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING as MANDATORY

from olmoe_train.config.aliases import ALIASES
from olmoe_train.config.variants import VARIANTS, VariantConfig, variant_groups


def config_directory() -> Path:
    """configs/ beside the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def documented_keys(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, documentation) of every option of a config dataclass, in order.

    A group of typed variants lists the keys of each variant; keys that several share come once.
    """
    rows = [row for _, section in key_sections(schema, prefix) for row in section]
    return list(dict.fromkeys(rows))


def key_sections(schema: type, prefix: str = "") -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The rows of `documented_keys` in sections: ("", rows) for plain keys, and for each variant of a group
    (its choice, such as "optimizer=adamw", the rows of all its keys)."""
    docs = _field_docs(schema)
    sections: list[tuple[str, list[tuple[str, str, str]]]] = [("", [])]
    for item in fields(schema):
        if not is_dataclass(item.type):
            sections[-1][1].append((prefix + item.name, _default_text(item), docs.get(item.name, "")))
            continue
        assert isinstance(item.type, type)
        if issubclass(item.type, VariantConfig):
            for name, variant in VARIANTS[item.name].items():
                sections.append((f"{item.name}={name}", documented_keys(variant, f"{prefix}{item.name}.")))
        else:
            sections += key_sections(item.type, f"{prefix}{item.name}.")
        sections.append(("", []))
    return [section for section in sections if section[1]]


def _field_docs(schema: type) -> dict[str, str]:
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


def _default_text(item: Field[Any]) -> str:
    value = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
    if isinstance(value, Enum):
        return "|".join([value.name, *(other.name for other in type(value) if other is not value)])
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "required" if value == MANDATORY else str(value)


def help_text(verb: str, schema: type, description: str | None = None) -> str:
    """What `olmoe VERB --help` prints: usage, the presets there are, and every key with its schema
    default."""
    lines = [
        f"usage: olmoe {verb} [key=value ...] [group=preset ...]     (or python -m olmoe_train {verb})",
        "",
        inspect.cleandoc(description or "").split("\n\n")[0],
        "",
        "presets (group=preset):",
    ]
    groups = {key.split(".")[0] for key, _, _ in documented_keys(schema) if "." in key} | {"experiment"}
    for directory in sorted(p for p in config_directory().iterdir() if p.is_dir()):
        if directory.name in groups and (directory.name != "experiment" or verb in ("train", "plan")):
            lines.append(f"  {directory.name}={'|'.join(sorted(p.stem for p in directory.glob('*.yaml')))}")
    lines += ["", "keys, with the schema's default (presets change many: --cfg job prints what you get):"]
    for choice, rows in key_sections(schema):
        lines += [f"  with {choice}:"] if choice else []
        for key, default, doc in rows:
            lines.append(f"  {key} = {default}")
            lines += textwrap.wrap(doc, 106, initial_indent="      ", subsequent_indent="      ")
    if set(variant_groups(schema)) & {new.split(".")[0] for new in ALIASES.values()}:
        spellings = ", ".join(f"{old} (now {new})" for old, new in ALIASES.items())
        lines += ["", f"older spellings, still accepted: {spellings}"]
    lines += [
        "",
        "flags: --cfg job (print the resolved config), --config-dir DIR (your own presets), --hydra-help",
        "exit codes: 0 done, 1 failed, 2 bad configuration or input, 75 stopped by a signal after saving",
    ]
    return "\n".join(lines)
