"""Keeps secrets out of config.yaml, checkpoints, logs, status.json, model cards and wandb."""

import logging
import os
import re
from typing import Any

HIDDEN = "[redacted]"
_SECRET_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|access[_-]?key(?:[_-]?id)?|token|secret|password|passwd|credentials?)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}"
    r"|AKIA[A-Z0-9]{16}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password of a URL
    r"|(?<=[?&])(?:[\w-]*(?:token|key|secret|password|signature|sig|credential))=[^&\s'\"]+)",
    re.IGNORECASE,
)
# Shorter values of environment variables are ordinary words, which would be cut out of normal text.
_MIN_SECRET_LENGTH = 8


def redact_text(text: str) -> str:
    """Replace secrets in a text by HIDDEN: known token formats, passwords and keys in URLs, and the values
    of environment variables whose names look secret (HF_TOKEN, WANDB_API_KEY, ...).
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET_LENGTH:
            text = text.replace(value, HIDDEN)
    return _SECRET_VALUE.sub(HIDDEN, text)


def redact(value: Any, name: str = "") -> Any:
    """Redact JSON values recursively.

    Args:
        value: A string, a number, a boolean, None, or a list or dictionary of these.
        name: The key under which `value` is stored. A string under a secret name (`password`, `api_key`,
            ...) is hidden entirely.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if _SECRET_NAME.search(name) else redact_text(value)
    return value


class RedactingFormatter(logging.Formatter):
    """Formats log records as usual, with secrets replaced by HIDDEN."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))
