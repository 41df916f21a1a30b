"""How fast does `check_overlap` look for questions in prepared data, against a set of tuples in Python?

Prepares the standard library's source (repeated to --megabytes) with a tokenizer trained on it. Every 20th
question is a stretch of its text, the others are the same words in another order. Both ways read the same
shards for the same n-grams, in turns; the clock runs while they look through the data, not while they
tokenize the questions. Their counts must be equal.

    python -m benchmarks.overlap [--rounds 5] [--megabytes 24] [--questions 10000]
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.prepare import ours, write_corpus
from olmoe_train.data.manifest import DTYPES, TOKENIZER, read_manifest
from olmoe_train.data.tokenizer import load_for_encoding
from olmoe_train.evaluation.tasks.overlap import NGRAM, Chunk, find_overlaps
from olmoe_train.evaluation.tasks.task import Question, Task, TaskFormat, TaskMetric

Ngram = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rounds", 5), ("megabytes", 24), ("questions", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "data"
        corpus = write_corpus(Path(scratch) / "corpus.jsonl", args.megabytes * 10**6)
        ours(directory, corpus, None, 2)
        tokens = read_manifest(directory).train.tokens
        task = make_task(corpus, args.questions)
        peer_ngrams = tokenize(task, directory)
        rates: list[tuple[float, float]] = []
        for number in range(args.rounds):
            matched, seconds, whole = with_arrays(task, directory)
            expected, peer_seconds = with_tuples(peer_ngrams, directory)
            assert matched == expected, "the two ways count differently"
            rates.append((tokens / seconds, tokens / peer_seconds))
            print(
                f"round {number}: find_overlaps {rates[-1][0]:,.0f} tokens/s ({whole:.1f} s with the "
                f"questions), set of tuples {rates[-1][1]:,.0f} tokens/s, load {os.getloadavg()[0]:.1f}"
            )
    ratio = statistics.median(a / b for a, b in rates)
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    total, touched = sum(map(len, peer_ngrams)), sum(count > 0 for count in matched)
    print(
        f"{tokens:,} tokens, {args.questions:,} questions with {total:,} n-grams, {touched:,} "
        f"questions found, equal counts; median of {args.rounds} interleaved rounds:"
    )
    print(f"find_overlaps {medians[0]:,.0f}, set of tuples {medians[1]:,.0f} tokens/s, ratio {ratio:.0f}")


def make_task(corpus: Path, count: int) -> Task:
    """Stretches of 40 words of the corpus; of all but every 20th, the words are shuffled."""
    generator = random.Random(0)
    words = corpus.read_text(encoding="utf-8").replace("\\n", "\n").split()
    questions = []
    for number in range(count):
        start = generator.randrange(len(words) - 40)
        part = words[start : start + 40]
        if number % 20:
            generator.shuffle(part)
        questions.append(Question("", (" yes",), 0, " ".join(part), f"stdlib[{number}]"))
    return Task("stdlib", tuple(questions), TaskMetric.acc, TaskFormat.rc, joint=False)


def tokenize(task: Task, directory: Path) -> list[list[Ngram]]:
    """The n-grams of each question, the first one spelled as at a start and as after a space."""
    tokenizer = load_for_encoding(directory / TOKENIZER / "tokenizer.json", plain_text=True)
    found = []
    for question in task.questions:
        text = f"{question.text} yes"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        after_space = tokenizer.encode(f" {text}", add_special_tokens=False).ids
        found.append([next(ngrams(after_space)), *ngrams(ids)])
    return found


def ngrams(tokens: list[int]) -> Iterator[Ngram]:
    return zip(*(islice(tokens, k, None) for k in range(NGRAM)), strict=False)


def with_tuples(questions: list[list[Ngram]], directory: Path) -> tuple[list[int], float]:
    """(Matched n-grams of each question, seconds of looking through the data)."""
    wanted = {ngram for question in questions for ngram in question}
    manifest = read_manifest(directory)
    began = time.perf_counter()
    found: set[Ngram] = set()
    for shard in manifest.train.shards:
        tokens = np.fromfile(directory / shard.path, DTYPES[manifest.dtype]).tolist()
        found.update(ngram for ngram in ngrams(tokens) if ngram in wanted)
    seconds = time.perf_counter() - began
    first = [question[0] in found or question[1] in found for question in questions]
    rest = [sum(ngram in found for ngram in question[2:]) for question in questions]
    return [int(one) + others for one, others in zip(first, rest, strict=True)], seconds


def with_arrays(task: Task, directory: Path) -> tuple[list[int], float, float]:
    """(Matched n-grams of each question, seconds of looking through the data, seconds in all)."""
    seconds = 0.0

    def timed(chunks: list[Chunk]) -> Iterator[Chunk]:
        nonlocal seconds
        began = time.perf_counter()
        yield from chunks
        seconds = time.perf_counter() - began

    began = time.perf_counter()
    found = find_overlaps([task], directory, with_progress=timed)
    return found[task.name].matched_Q.tolist(), seconds, time.perf_counter() - began


if __name__ == "__main__":
    main()
