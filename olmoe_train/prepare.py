"""Turn a corpus into tokens on disk (data.dir): tokenizer, training and validation shards, manifest.json.

Run again with the same settings, it verifies what is there. data/README.md describes the format.
"""

import sys

from olmoe_train.cli import run_verb
from olmoe_train.config import PrepareConfig
from olmoe_train.data.prepare import prepare


def main(cfg: PrepareConfig) -> None:
    prepare(cfg)


def run() -> int:
    return run_verb("prepare", PrepareConfig, main)


if __name__ == "__main__":
    sys.exit(run())
