"""What every verb does with its command line: compose the config, print the help, choose the exit code."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmoe_train.config.aliases import current_overrides
from olmoe_train.config.compose import explain, register_schema, resolve, to_config
from olmoe_train.config.keys import config_directory, help_text
from olmoe_train.utils.console import discard_closed_output, quietly
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, CLOSED_OUTPUT, FAILED, OK
from olmoe_train.utils.redaction import redact_text

SECONDS_FOR_RANK_0 = 3.0  # to print its message before the other ranks exit


def run_verb(
    verb: str, schema: type, main: Callable[[Any], int | None], description: str | None = None
) -> int:
    """Compose configs/<verb>.yaml with the command line, and call main(config).

    `--help` prints the documentation of every key. Hydra's own flags (`--cfg job`, `--config-dir`, `-m`,
    `--hydra-help`) work, too.

    Args:
        verb: Name of the verb.
        schema: Its config dataclass.
        main: What the verb does; returns an exit code, or None for 0.
        description: First paragraph of the help.

    Returns:
        The exit code of the process: 0 done, 1 failed, 2 bad configuration or input (one message, no
        traceback), 75 stopped by a signal after saving, 130 interrupted from the keyboard, 141 nobody reads
        its output.
    """
    return quietly(lambda: _run_verb(verb, schema, main, description))


def _run_verb(verb: str, schema: type, main: Callable[[Any], int | None], description: str | None) -> int:
    # The deepspeed launcher passes --local_rank, which Hydra would reject. LOCAL_RANK has the same value.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        print(help_text(verb, schema, description))
        return OK
    exit_code = OK
    failure: BaseException | None = None

    def job(composed: DictConfig) -> None:
        nonlocal exit_code, failure
        try:
            if is_shown:
                resolve(composed)
                print(OmegaConf.to_yaml(composed, resolve=True), end="")
            else:
                exit_code = main(to_config(composed)) or OK
        except BaseException as error:  # raised again below: Hydra would print an extra line for it
            failure = error

    register_schema(verb, schema)
    # Without this, Hydra turns every exception into exit code 1. With it, Hydra raises the exception.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        arguments = _without_cfg_job(sys.argv[1:])
        is_shown = arguments != sys.argv[1:]
        sys.argv[1:] = current_overrides(arguments)
        hydra.main(config_path=str(config_directory()), config_name=verb, version_base="1.3")(job)()
        if failure is not None:
            raise failure
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _print_error(explain(error, schema))
        return BAD_INPUT
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and discard_closed_output():
            return CLOSED_OUTPUT
        print(redact_text(traceback.format_exc()), file=sys.stderr, end="")
        return FAILED
    return exit_code


def _without_cfg_job(arguments: list[str]) -> list[str]:
    """The command line without `--cfg job`, which is answered here: Hydra would print a configuration that is
    not resolved yet. Hydra answers its other forms (`--cfg hydra`, `--package`)."""
    if any(argument.startswith("--package") or argument == "-p" for argument in arguments):
        return arguments
    for index, argument in enumerate(arguments):
        if argument == "--cfg=job":
            return arguments[:index] + arguments[index + 1 :]
        if argument in ("--cfg", "-c") and arguments[index + 1 : index + 2] == ["job"]:
            return arguments[:index] + arguments[index + 2 :]
    return arguments


def _print_error(message: str) -> None:
    """Print an error on rank 0, or on the rank that has it alone.

    Most errors meet every rank. The ranks other than 0 wait: torchrun ends them as soon as rank 0 has failed.
    A rank that is still there has an error that rank 0 does not have, such as a directory that only its host
    lacks.
    """
    rank, place = int(os.environ.get("RANK", "0")), ""
    if rank != 0:
        time.sleep(SECONDS_FOR_RANK_0)
        from olmoe_train.distributed.rendezvous import place_of  # here: it imports torch

        place = f"{place_of(rank)}: "
    print(redact_text(f"error: {place}{message}"), file=sys.stderr, flush=True)
