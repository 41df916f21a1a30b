"""From a command line to a checked config: Hydra composition, help made of the config's own docs, exit
codes."""

import ast
import difflib
import inspect
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, FrozenInstanceError, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmoe_train.errors import UserError

# Hydra would make a directory of its own for each command and take over the logging: run_dir has all that.
HYDRA_OFF = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
]
OK, FAILED, BAD_INPUT, STOPPED_BY_SIGNAL = 0, 1, 2, 75


def config_directory() -> Path:
    """configs/ beside the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def run_verb(verb: str, schema: type, main: Callable[[Any], int | None]) -> int:
    """Compose configs/<verb>.yaml with the command line, call main(config), and return the process's exit
    code.

    Exit codes: 0 done, 1 failed, 2 bad configuration or input (one message, no traceback), 75 stopped by a
    signal after saving. `--help` prints the options' own documentation; Hydra's flags (`--cfg job`,
    `--config-dir`, `-m`, `--hydra-help`) work as everywhere.
    """
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        print(help_text(verb, schema))
        return OK
    exit_code = OK

    def job(composed: DictConfig) -> None:
        nonlocal exit_code
        exit_code = main(to_config(composed)) or OK

    ConfigStore.instance().store(f"{verb}_schema", node=writable(OmegaConf.structured(schema)))
    # Hydra's own handler turns every exception into exit code 1; this makes it raise, so that we can tell
    # them apart.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:1] = HYDRA_OFF
    try:
        hydra.main(config_path=str(config_directory()), config_name=verb, version_base="1.3")(job)()
    except (UserError, HydraException, OmegaConfBaseException, FrozenInstanceError) as error:
        _print_once(f"error: {explain(error, schema)}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _print_once("interrupted")
        return 130
    except Exception:
        traceback.print_exc()
        return FAILED
    return exit_code


def to_config(composed: DictConfig) -> Any:
    """The composed DictConfig as the schema's frozen dataclasses. UserError names every missing mandatory
    key."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError("\n  ".join(["these keys have no value:", *(f"{key}=..." for key in missing)]))
    return OmegaConf.to_object(composed)


def writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses make read-only nodes, which Hydra could not merge YAML into: lift that until
    to_object."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            writable(child)
    return node


def _print_once(message: str) -> None:
    """Every rank of a torchrun meets the same error; one of them says it."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def explain(error: Exception, schema: type) -> str:
    """One readable message out of the chain of exceptions that Hydra and OmegaConf raise."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    parts: list[str] = []
    for exception in chain:
        text = str(exception).split("\nConfig search path")[0]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [
            line
            for line in lines
            if not line.startswith(("reference_type", "object_type", "To append", "Set the env"))
        ]
        text = "\n  ".join(lines)
        if text and text not in parts:
            parts.append(text)
    message = "\n  ".join(parts)
    suggestion = _did_you_mean(" ".join(parts), schema)
    return f"{message}\n  {suggestion}" if suggestion else message


def _did_you_mean(message: str, schema: type) -> str:
    """For an unknown key: the known keys nearest to it."""
    if isinstance(schema, type) and "full_key" not in message and "Could not override" not in message:
        return ""
    known = [key for key, _, _ in documented_keys(schema)]
    words = message.replace("'", " ").replace("=", " ").split()
    unknown = next(
        (w.strip(".,") for w in words if "." in w.strip(".,") and w.strip(".,") not in known), None
    )
    if unknown is None:
        return ""
    near = difflib.get_close_matches(unknown, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "see --help for every key"


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
    return (
        {None: "null", "???": "required", True: "true", False: "false"}.get(value, str(value))
        if _hashable(value)
        else str(value)
    )


def _hashable(value: object) -> bool:
    return not isinstance(value, (dict, list))


def help_text(verb: str, schema: type) -> str:
    """What `olmoe VERB --help` prints: usage, the presets there are, and every key with its schema
    default."""
    lines = [
        f"usage: olmoe {verb} [key=value ...] [group=preset ...]     (or python -m olmoe_train.{verb})",
        "",
        (
            inspect.getdoc(sys.modules.get(f"olmoe_train.{verb}"))
            or inspect.getdoc(sys.modules["__main__"])
            or ""
        ).split("\n\n")[0],
        "",
        "presets (group=preset):",
    ]
    groups = {name for name, *_ in (key.split(".") for key, _, _ in documented_keys(schema))} | {"experiment"}
    for directory in sorted(p for p in config_directory().iterdir() if p.is_dir()):
        if directory.name in groups and (directory.name != "experiment" or verb == "train"):
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
