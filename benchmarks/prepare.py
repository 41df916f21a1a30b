"""How fast does `olmoe prepare` tokenise, against `datasets.map(batched=True)` with the same tokenizer?

Writes the standard library's source as JSON lines (repeated to --megabytes), then turns it into tokens both
ways, in turns, with the same number of processes; prints medians, and the median of the ratios of neighbours.
Theirs is the time of `map` alone: the file is loaded into arrow before the clock starts, and its result stays
an arrow cache. Ours is the command's whole work after its imports: reading and parsing JSON, starting the
processes, hashing, splitting, shards on disk.

    python benchmarks/prepare.py [--rounds 5] [--processes 2] [--megabytes 24]
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from olmoe_train.config.choices import SourceKind
from olmoe_train.config.data import DataConfig, SourceConfig, TokenizerConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.corpus import python_stdlib_files
from olmoe_train.data.prepare.pipeline import prepare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=24)
    args = parser.parse_args()
    import datasets  # not above: our workers import this file

    datasets.disable_progress_bars()
    # Each library has its processes as its parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        corpus = write_corpus(root / "corpus.jsonl", args.megabytes * 10**6)
        ours(root / "first", corpus, None, args.processes)  # makes the tokenizer, and starts the fork server
        tokenizer = root / "first/tokenizer"
        loaded = datasets.load_dataset(
            "json", data_files=str(corpus), split="train", cache_dir=str(root / "cache")
        )
        rates: list[tuple[float, float]] = []
        for number in range(args.rounds):
            mine = ours(root / f"ours-{number}", corpus, tokenizer, args.processes)
            other = theirs(root / f"theirs-{number}.arrow", loaded, tokenizer, args.processes)
            assert mine[0] == other[0], f"{mine[0]} tokens, but theirs are {other[0]}"
            rates.append((mine[0] / mine[1], other[0] / other[1]))
            load = os.getloadavg()[0]
            print(
                f"round {number}: ours {rates[-1][0]:,.0f}, map {rates[-1][1]:,.0f} tokens/s, load {load:.1f}"
            )
    ratio = statistics.median(a / b for a, b in rates)
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    print(
        f"datasets {datasets.__version__}, {args.processes} processes, {corpus.name} of {args.megabytes} MB, "
        f"median of {args.rounds} interleaved rounds:"
    )
    print(f"olmoe prepare {medians[0]:,.0f}, datasets.map {medians[1]:,.0f} tokens/s, ratio {ratio:.2f}")


def write_corpus(path: Path, size: int) -> Path:
    texts = [
        Path(part.path).read_text() for part in python_stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    ]
    texts = [text for text in texts if text.strip()]
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            file.write(json.dumps({"id": str(number), "text": texts[number % len(texts)]}) + "\n")
            number += 1
    return path


def ours(out: Path, corpus: Path, tokenizer: Path | None, processes: int) -> tuple[int, float]:
    """(tokens, seconds)"""
    source = SourceConfig(kind=SourceKind.files, paths=[str(corpus)], processes=processes)
    given = TokenizerConfig(path=str(tokenizer) if tokenizer else None)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        manifest = prepare(PrepareConfig(data=DataConfig(dir=str(out), source=source), tokenizer=given))
    return manifest.train.tokens + manifest.validation.tokens, time.perf_counter() - start


def theirs(out: Path, loaded: Any, directory: Path, processes: int) -> tuple[int, float]:
    """(tokens, seconds), with an eos a document as ours; counted after the clock."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, 0] for encoding in found]}

    start = time.perf_counter()
    mapped = loaded.map(
        encode,
        batched=True,
        num_proc=processes,
        remove_columns=loaded.column_names,
        load_from_cache_file=False,
    )
    seconds = time.perf_counter() - start
    return sum(len(ids) for batch in mapped.iter(100) for ids in batch["input_ids"]), seconds


if __name__ == "__main__":
    main()
