"""The reference of every key and every preset as Markdown, for docs/.

`python -m olmoe_train.config.reference` prints it.
"""

import inspect
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmoe_train.config.keys import (
    Key,
    config_directory,
    documented_keys,
    help_text,
    key_sections,
    older_spellings,
    preset_groups,
)
from olmoe_train.config.verbs import VERBS

__all__ = ["config_directory", "documented_keys", "help_text", "markdown_reference"]


def markdown_reference() -> dict[str, str]:
    """Write the reference pages.

    Returns:
        Page name -> Markdown: one page per verb with every key (type or choices, default, documentation), and
        the page "presets" with every preset and the values that it sets.
    """
    pages = {verb: _verb_page(verb, schema) for verb, schema in VERBS.items()}
    return pages | {"presets": _presets_page()}


def _verb_page(verb: str, schema: type) -> str:
    lines = [f"# `olmoe {verb.replace('_', ' ')}`", "", inspect.cleandoc(schema.__doc__ or ""), ""]
    if presets := preset_groups(schema):
        choices = ", ".join(f"`{group}`" for group in presets)
        lines += [f"Groups of presets: {choices}. The [presets](presets.md) page lists them.", ""]
    section = None
    for choice, keys in key_sections(schema):
        for key in keys:
            heading = f"Keys with `{choice}`" if choice else _section_of(key)
            if heading != section:
                lines += [""] if section else []
                section = heading
                lines += [f"## {heading}", "", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
            lines.append(_row(key))
    if spellings := older_spellings(schema):
        lines += ["", "## Older spellings", "", "These keys are still accepted:", ""]
        lines += [f"- `{old}` is now `{new}`" for old, new in spellings.items()]
    return "\n".join(lines) + "\n"


def _section_of(key: Key) -> str:
    return f"`{key.name.split('.')[0]}`" if "." in key.name else "General"


def _row(key: Key) -> str:
    default = key.default if key.default == "required" else f"`{key.default}`"
    kind = ", ".join(f"`{choice}`" for choice in key.type.split("|")) if "|" in key.type else key.type
    return f"| `{key.name}` | {kind} | {default} | {_escaped(key.doc)} |"


def _escaped(text: str) -> str:
    """Text for a cell of a Markdown table: only what is in backticks is markup."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def _presets_page() -> str:
    verbs: dict[str, list[str]] = {}
    files: dict[str, list[Path]] = {}
    for verb, schema in VERBS.items():
        for group, paths in preset_groups(schema).items():
            verbs.setdefault(group, []).append(verb)
            files[group] = paths
    lines = [
        "# Presets",
        "",
        "A preset is a YAML file in `configs/`, selected with `group=preset` on the command line.",
        "It sets only the keys shown here. All other keys keep their defaults.",
    ]
    for group in sorted(files):
        users = ", ".join(f"`olmoe {verb.replace('_', ' ')}`" for verb in verbs[group])
        lines += ["", f"## {group}", "", f"Accepted by {users}."]
        for path in files[group]:
            description, body = _preset(path)
            lines += ["", f"### `{group}={path.stem}`", "", description]
            lines += ["", "```yaml", body, "```"] if body else ["", "It keeps every default."]
    return "\n".join(lines) + "\n"


def _preset(path: Path) -> tuple[str, str]:
    """The description of a preset, which is the comment at its top, and the YAML that it sets."""
    text = path.read_text()
    lines = text.splitlines()
    count = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comments = [line.lstrip("# ") for line in lines[:count] if not line.startswith("# @package")]
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    only_schema = not set(values) - {"defaults"} and all(
        entry == "_self_" or str(entry).endswith("_schema") for entry in values.get("defaults", [])
    )
    return " ".join(comments), "" if only_schema else "\n".join(lines[count:]).strip()


if __name__ == "__main__":
    for page in markdown_reference().values():
        print(page)
