"""Models by their name on the Hugging Face hub: in the cache of `huggingface_hub`, downloaded if needed."""

import re
from pathlib import Path

from olmoe_train.model.hf.special_tokens import TOKENIZER_FILES
from olmoe_train.utils.errors import UserError

# The files of a model that `model.init_from` reads, apart from its weights.
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
PICKLE_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_name(source: str) -> bool:
    """Whether `source` can only be a name on the hub, ORGANIZATION/NAME: whatever exists here is a path."""
    return _NAME.fullmatch(source) is not None and not Path(source).exists()


def hub_snapshot(
    name: str,
    revision: str | None,
    files: tuple[str, ...],
    download: bool = True,
    key: str = "model.init_from",
) -> Path:
    """The directory of one commit of a model in the cache. The directory is named like the commit.

    Args:
        name: ORGANIZATION/NAME.
        revision: Branch, tag or commit; None: main.
        files: Patterns of the files that are needed.
        download: Whether files that are not in the cache are downloaded.
        key: The configuration key that names the model, for messages.

    Raises:
        UserError: The model is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download  # takes half a second to import, and is rarely needed

    try:
        directory = snapshot_download(
            name, revision=revision, allow_patterns=list(files), local_files_only=not download
        )
    except (OSError, ValueError) as error:  # whatever the hub's client raises: no network, no such name, ...
        raise _not_there(key, name, revision, str(error).strip().splitlines()[0]) from error
    # Without a network the client returns what it has, which may be the tokenizer alone.
    if not (Path(directory) / "config.json").is_file():
        raise _not_there(key, name, revision, f"{directory} has no config.json")
    return Path(directory)


def _not_there(key: str, name: str, revision: str | None, reason: str) -> UserError:
    version = f" --revision {revision}" if revision else ""
    return UserError(
        f"{key}={name}: no such directory here, and the Hugging Face hub did not provide it "
        f"(revision {revision or 'main'}): {reason}\n  Give an existing directory, or a model's name on the "
        "hub. Without a network, a name works only if the model has been downloaded before: on a machine "
        f"with a network, run `hf download {name}{version}`, and copy its cache (HF_HOME)"
    )
