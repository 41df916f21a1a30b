"""YAML files that people write."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmoe_train.utils.errors import UserError


def read_yaml_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds keys and values. ${...} in it stays as it is.

    Args:
        path: The file.
        what: What such a file has, for the message: "a task file has keys, such as format: rc".

    Raises:
        UserError: There is no such file, it is no YAML, or it is a list.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file in {Path.cwd()}") from None
    except Exception as error:  # YAML and OmegaConf raise a dozen exception types
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: {what}; this one is a list")
    return {str(key): value for key, value in values.items()}
