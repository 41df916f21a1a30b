"""Contamination: planted questions, and n-grams counted again as Python tuples."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from olmoe_train.config.choices import DataFormat, SourceKind
from olmoe_train.config.data import DataConfig, SourceConfig, TokenizerConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import TOKENIZER, read_manifest, write_manifest
from olmoe_train.data.prepare.olmo_files import index_olmo_files
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.data.tokenizer import EOS as EOS_TEXT
from olmoe_train.evaluation.tasks import overlap
from olmoe_train.evaluation.tasks.overlap import find_overlaps
from olmoe_train.evaluation.tasks.task import Question, Task, TaskFormat, TaskMetric
from olmoe_train.utils.errors import UserError
from tests.support.data import EOS, UNLIMITED, prepare_config, write_prepared

Tokens = Sequence[int]


def task_of(
    texts: Sequence[str], answer: str = "", name: str = "a", form: TaskFormat = TaskFormat.rc
) -> Task:
    """A task whose questions have two choices, of which the second is right."""
    choices = (" 9 9 9 9 9 9 9 9 9 9 9 9 9 9", answer)
    questions = (Question(f"prompt {text}", choices, 1, text, f"a[{i}]") for i, text in enumerate(texts))
    return Task(name, tuple(questions), TaskMetric.acc, form, joint=False)


def spell(tokens: Tokens) -> str:
    return " ".join(map(str, tokens))


def number_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a tokenizer.json with one token per number: "7" is token 7."""
    vocab = {EOS_TEXT: EOS} | {str(number): number for number in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.write_text(tokenizer.to_str(), encoding="utf-8")


def number_data(
    directory: Path,
    train: Sequence[Tokens],
    validation: Sequence[Tokens] = (),
    vocab_size: int = 100,
    dtype: str = "uint16",
    shard_tokens: int = UNLIMITED,
) -> Path:
    write_prepared(
        directory, train, validation, vocab_size=vocab_size, dtype=dtype, shard_tokens=shard_tokens
    )
    manifest, path = read_manifest(directory), directory / TOKENIZER / "tokenizer.json"
    number_tokenizer(path, vocab_size)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    write_manifest(directory, replace(manifest, tokenizer_sha256=sha256))
    return directory


def tuples(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[k:] for k in range(n)), strict=False))


def test_questions_planted_in_text_are_found_whole_wherever_they_stand(tmp_path: Path) -> None:
    held_out = "How does the moon pull the water of two oceans at the same time?"
    planted = {
        "start": "When is the harvest of the oldest apple trees in the northern valley?",
        "middle": "Which metal is a liquid at the temperature of an ordinary room?",
        "newline": "Whose law says how the pressure of a gas changes with its volume?",
    }
    documents = [
        f"{planted['start']} In autumn.",
        f"He asked: {planted['middle']} Mercury is.",
        f"Physics\n{planted['newline']}\nBoyle's.",
        "Which harvest? When is a law a law? Whose metal is it?",  # so that these words are tokens
    ]
    paths = []
    for split, texts in (("train", documents), ("validation", [held_out])):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        paths.append(str(path))
    data = tmp_path / "data"
    prepare(prepare_config(data, kind=SourceKind.files, paths=paths[:1], validation_paths=paths[1:]))

    # The middle one differs in its first token from a text of its own, which has no space before it.
    tokenizer = Tokenizer.from_file(str(data / TOKENIZER / "tokenizer.json"))
    middle = planted["middle"]
    assert tokenizer.encode(middle).ids[0] not in tokenizer.encode(f" {middle}").ids[:1]
    found = find_overlaps([task_of([*planted.values(), held_out])], data)["a"]
    assert found.touched.tolist() == [True, True, True, False]
    assert found.matched_Q[:3].tolist() == found.ngrams_Q[:3].tolist()
    assert found.ngrams_Q.tolist() == [
        len(tokenizer.encode(text).ids) - 12 for text in [*planted.values(), held_out]
    ]


def test_counts_of_altered_short_and_answered_questions(tmp_path: Path) -> None:
    leaked = list(range(10, 24))  # 14 tokens: 2 n-grams of 13
    altered = [*leaked[:6], 99, *leaked[7:]]  # the 7th token is in both
    data = number_data(tmp_path / "data", [[5, *leaked, 6], leaked[:12]], validation=[range(30, 50)])
    texts = [spell(tokens) for tokens in (leaked, altered, leaked[:12], range(30, 50), [*leaked[1:], 99])]
    found = find_overlaps([task_of(texts)], data)["a"]
    assert found.ngrams_Q.tolist() == [2, 2, 0, 8, 2]
    assert found.matched_Q.tolist() == [2, 0, 0, 0, 1]
    assert found.touched.tolist() == [True, False, False, False, True]
    assert found.too_short == 1

    question, answer = [spell(leaked[:10])], f" {spell(leaked[10:])}"
    tasks = [task_of(question, answer), task_of(question, answer, "letters", TaskFormat.mc)]
    with_answer = find_overlaps(tasks, data)
    assert with_answer["a"].matched_Q.tolist() == [2]
    assert with_answer["letters"].too_short == 1


@pytest.mark.parametrize(
    ("multiplier", "dtype", "first", "block", "chunk"),
    [
        pytest.param(overlap._MULTIPLIER, "uint16", 2, 1 << 16, 1 << 22, id="as it is"),
        pytest.param(overlap._MULTIPLIER, "uint16", 2, 3, 10, id="matches across blocks and chunks"),
        pytest.param(overlap._MULTIPLIER, "uint32", 70_000, 1 << 16, 1 << 22, id="uint32"),
        pytest.param(1, "uint16", 2, 1 << 16, 1 << 22, id="hash is the sum"),
        pytest.param(0, "uint16", 2, 7, 1 << 22, id="hash is the last token"),
    ],
)
def test_counts_are_those_of_a_set_of_tuples(
    multiplier: int,
    dtype: str,
    first: int,
    block: int,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n, generator = 4, np.random.default_rng(0)

    def draw(count: int) -> list[list[int]]:
        lengths = generator.integers(1, 13, count)
        return [generator.integers(first, first + 5, length).tolist() for length in lengths]

    documents, questions, others = draw(40), draw(60), draw(5)
    data = number_data(tmp_path / "data", documents, vocab_size=first + 5, dtype=dtype, shard_tokens=50)
    monkeypatch.setattr(overlap, "_MULTIPLIER", multiplier)
    monkeypatch.setattr(overlap, "_BLOCK", block)
    monkeypatch.setattr(overlap, "_CHUNK", chunk)
    tasks = [task_of(list(map(spell, questions))), task_of(list(map(spell, others)), name="b")]
    found = find_overlaps(tasks, data, n)

    known = {ngram for document in documents for ngram in tuples(document, n)}
    for name, asked in (("a", questions), ("b", others)):
        ngrams = [tuples(question, n) for question in asked]
        assert found[name].ngrams_Q.tolist() == [len(part) for part in ngrams]
        assert found[name].matched_Q.tolist() == [sum(one in known for one in part) for part in ngrams]
    assert 0 < found["a"].matched_Q.sum() < found["a"].ngrams_Q.sum()


def test_token_files_of_olmo_are_read_where_they_are(tmp_path: Path) -> None:
    number_tokenizer(tmp_path / "tokenizer.json", 100)
    files = tmp_path / "olmo"
    files.mkdir()
    # Neither file ends with eos. 20 ... 34 are half in one and half in the other; 50 ... 62 end the second.
    parts = ([*range(2, 16), EOS, *range(20, 27)], [*range(27, 35), EOS, *range(50, 63)])
    for number, tokens in enumerate(parts):
        np.array(tokens, "<u2").tofile(files / f"part-{number}.npy")
    source = SourceConfig(paths=[str(files)], processes=1)
    data = DataConfig(dir=str(tmp_path / "data"), format=DataFormat.olmo, source=source)
    index_olmo_files(PrepareConfig(data=data, tokenizer=TokenizerConfig(str(tmp_path / "tokenizer.json"))))
    texts = [spell(tokens) for tokens in (range(2, 16), range(20, 35), range(50, 63))]
    assert find_overlaps([task_of(texts)], tmp_path / "data")["a"].matched_Q.tolist() == [2, 0, 1]


def test_data_that_cannot_be_compared(tmp_path: Path) -> None:
    tasks = [task_of(["2 3 4"])]
    with pytest.raises(UserError, match=r"check_overlap=.*no prepared data there"):
        find_overlaps(tasks, tmp_path)
    data = number_data(tmp_path / "code", [[2, 3]])
    number_data(tmp_path / "web", [[2, 3]])
    with pytest.raises(UserError, match=r"source in it \(code, web\)(.|\n)*check_overlap=.*/code$"):
        find_overlaps(tasks, tmp_path)
    assert find_overlaps(tasks, data)["a"].too_short == 1  # no n-gram at all
    write_manifest(data, replace(read_manifest(data), tokenizer_sha256=None))
    with pytest.raises(UserError, match=r"no tokenizer(.|\n)*tokenizer.path"):
        find_overlaps(tasks, data)
