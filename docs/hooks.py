"""mkdocs hooks: pages generated from the code, and pages whose text lies in the repository's root."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from olmoe_train.config.reference import markdown_reference

ROOT = Path(__file__).parents[1]
CONFIG_DIRECTORY = "reference/config"
ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing/index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the generated pages of configuration keys to the section that holds their index."""
    _section_of(config.nav, f"{CONFIG_DIRECTORY}/index.md").extend(
        {name: f"{CONFIG_DIRECTORY}/{name}.md"} for name in markdown_reference()
    )
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages: one per verb with its keys and presets, and one per document in the root."""
    for name, text in markdown_reference().items():
        files.append(File.generated(config, f"{CONFIG_DIRECTORY}/{name}.md", content=text))
    for source, page in ROOT_PAGES.items():
        text = _relative_to_page((ROOT / source).read_text(encoding="utf-8"), page)
        files.append(File.generated(config, page, content=text))
    return files


def _section_of(nav: Any, page: str) -> list[Any]:
    """The list of the navigation that has `page` as an item."""
    for item in nav:
        for section in item.values() if isinstance(item, dict) else ():
            if isinstance(section, list):
                if page in section:
                    return section
                try:
                    return _section_of(section, page)
                except ValueError:
                    continue
    raise ValueError(f"mkdocs.yml: nav has no section with {page}")


def _relative_to_page(markdown: str, page: str) -> str:
    """Links of a document in the root, rewritten for its page in the site.

    Links to docs/ become relative to the page, and links to other documents of the root lead to their pages.
    """
    up = "../" * page.count("/")
    for source, other in ROOT_PAGES.items():
        markdown = markdown.replace(f"]({source}", f"]({up}{other}")
    return re.sub(r"\]\(docs/", f"]({up}", markdown)
