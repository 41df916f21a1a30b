"""Prepare a few texts with a trained byte-level BPE, as `olmoe prepare` does."""

import json
from dataclasses import replace
from pathlib import Path

from olmoe_train.config.choices import SourceKind
from olmoe_train.data.prepare.pipeline import prepare
from tests.support.data import prepare_config

TEXTS = [
    "Grüße aus Köln, naïve café! ",
    "数学 and 物理学: E = mc². ",
    "🙂🙃 done\n",
    "def main(argument): return argument\n",
]


def prepare_texts(directory: Path, texts: list[str] = TEXTS, tokenizer: Path | None = None) -> Path:
    """Prepare `texts`, each several times longer, as training and validation documents alike.

    Args:
        directory: The directory to write.
        texts: The documents.
        tokenizer: Directory of the tokenizer; None: train one of 300 tokens at most.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for split in ("train", "validation"):
        path = directory.with_name(f"{directory.name}-{split}.jsonl")
        lines = [json.dumps({"text": text * 3, "id": f"{split}{n}"}) for n, text in enumerate(texts)]
        path.write_text("\n".join(lines), encoding="utf-8")
        paths.append(str(path))
    cfg = prepare_config(
        directory, tokenizer=tokenizer, kind=SourceKind.files, paths=paths[:1], validation_paths=paths[1:]
    )
    prepare(replace(cfg, tokenizer=replace(cfg.tokenizer, vocab_size=300)))
    return directory
