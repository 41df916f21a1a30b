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


def config_directory() -> Path:
    """configs/ beside the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def documented_keys(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, documentation) of every option of a config dataclass, in order."""
    docs = _field_docs(schema)
    rows: list[tuple[str, str, str]] = []
    for item in fields(schema):
        if is_dataclass(item.type):
            assert isinstance(item.type, type)
            rows += documented_keys(item.type, f"{prefix}{item.name}.")
        else:
            rows.append((prefix + item.name, _default_text(item), docs.get(item.name, "")))
    return rows


def _field_docs(schema: type) -> dict[str, str]:
    """The string literal under each field; Python keeps it in the source only."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
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
    for key, default, doc in documented_keys(schema):
        lines.append(f"  {key} = {default}")
        lines += textwrap.wrap(doc, 106, initial_indent="      ", subsequent_indent="      ")
    lines += [
        "",
        "flags: --cfg job (print the resolved config), --config-dir DIR (your own presets), --hydra-help",
        "exit codes: 0 done, 1 failed, 2 bad configuration or input, 75 stopped by a signal after saving",
    ]
    return "\n".join(lines)
