"""From a command line to a checked config: Hydra composition, help made of the config's own docs, exit
codes."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from olmoe_train.config.aliases import current_overrides
from olmoe_train.config.compose import explain, register_schema, to_config
from olmoe_train.config.reference import config_directory, help_text
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, FAILED, OK
from olmoe_train.utils.redaction import redact_text

SECONDS_TO_SPEAK = 3.0


def run_verb(
    verb: str, schema: type, main: Callable[[Any], int | None], description: str | None = None
) -> int:
    """Compose configs/<verb>.yaml with the command line, call main(config), and return the process's exit
    code.

    Exit codes: 0 done, 1 failed, 2 bad configuration or input (one message, no traceback), 75 stopped by a
    signal after saving. `--help` prints the options' own documentation; Hydra's flags (`--cfg job`,
    `--config-dir`, `-m`, `--hydra-help`) work as everywhere.
    """
    # The deepspeed launcher says it here, where Hydra would stumble, and in LOCAL_RANK like every other.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        print(help_text(verb, schema, description))
        return OK
    exit_code = OK
    failure: BaseException | None = None

    def job(composed: DictConfig) -> None:
        nonlocal exit_code, failure
        try:
            exit_code = main(to_config(composed)) or OK
        except BaseException as error:  # Hydra would print a line of its own over it
            failure = error

    register_schema(verb, schema)
    try:
        sys.argv[1:] = current_overrides(sys.argv[1:])
    except UserError as error:
        _print_once(f"error: {error}")
        return BAD_INPUT
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


def _print_once(message: str) -> None:
    """Every rank of a torchrun meets the same error; rank 0 says it. The others leave it the time: torchrun
    ends all ranks as soon as one has failed."""
    if os.environ.get("RANK", "0") == "0":
        print(redact_text(message), file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_TO_SPEAK)
