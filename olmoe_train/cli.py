"""From a command line to a checked config: Hydra composition, help made of the config's own docs, exit
codes."""

import ast
import difflib
import inspect
import os
import re
import sys
import textwrap
import time
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
from omegaconf import MISSING as MANDATORY
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmoe_train.errors import UserError
from olmoe_train.redaction import redact_text

SECONDS_TO_SPEAK = 3.0
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
    # The deepspeed launcher says it here, where Hydra would stumble, and in LOCAL_RANK like every other.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        print(help_text(verb, schema))
        return OK
    exit_code = OK
    failure: BaseException | None = None

    def job(composed: DictConfig) -> None:
        nonlocal exit_code, failure
        try:
            exit_code = main(to_config(composed)) or OK
        except BaseException as error:  # Hydra would print a line of its own over it
            failure = error

    ConfigStore.instance().store(f"{verb}_schema", node=writable(OmegaConf.structured(schema)))
    # Hydra's own handler turns every exception into exit code 1; this makes it raise, so that we can tell
    # them apart.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=str(config_directory()), config_name=verb, version_base="1.3")(job)()
        if failure is not None:
            raise failure
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _print_once(f"error: {explain(error, schema)}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _print_once("interrupted")
        return 130
    except Exception:
        print(redact_text(traceback.format_exc()), file=sys.stderr, end="")
        return FAILED
    return exit_code


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


def _print_once(message: str) -> None:
    """Every rank of a torchrun meets the same error; rank 0 says it. The others leave it the time: torchrun
    ends all ranks as soon as one has failed."""
    if os.environ.get("RANK", "0") == "0":
        print(redact_text(message), file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_TO_SPEAK)


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
