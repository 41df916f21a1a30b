"""Turn a corpus into tokens on disk (data.dir): tokenizer, training and validation shards, and manifest.json.
If data.dir already holds data of the same settings, the data is verified.

docs/reference/data-format.md describes the file format.
"""

import sys

from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import DataFormat
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.olmo_files import index_olmo_files
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import is_remote
from olmoe_train.utils.redaction import redact_text


def main(cfg: PrepareConfig) -> None:
    """Prepare the corpus, or index token files of OLMo (data.format=olmo)."""
    if is_remote(cfg.data.dir):
        raise UserError(
            f"data.dir={redact_text(cfg.data.dir)}: `olmoe prepare` writes to this machine. Give a "
            "directory, copy it to the store, such as by `aws s3 cp --recursive`, and train with its URL"
        )
    if cfg.data.format is DataFormat.olmo:
        index_olmo_files(cfg)
    else:
        prepare(cfg)


def run() -> int:
    """Run `olmoe prepare` with the command line; returns the exit code."""
    return run_verb("prepare", PrepareConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
