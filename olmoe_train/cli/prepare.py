"""Turn a corpus into tokens on disk (data.dir): tokenizer, training and validation shards, manifest.json.

Run again with the same settings, it verifies what is there. data/README.md describes the format.
"""

import sys

from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import DataFormat
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.olmo_files import index_olmo_files
from olmoe_train.data.prepare.pipeline import prepare


def main(cfg: PrepareConfig) -> None:
    if cfg.data.format is DataFormat.olmo:
        index_olmo_files(cfg)
    else:
        prepare(cfg)


def run() -> int:
    return run_verb("prepare", PrepareConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
