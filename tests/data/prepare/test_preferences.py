"""Preferences become documents: prompt with completion, labels, and a loss mask on what is compared."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmoe_train.config.choices import LearnedTurns, OnBadRecord, Records, Truncate, Turns
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import Preferences
from olmoe_train.data.prepare.compare import EncodedSide, compare_sides
from olmoe_train.data.prepare.limits import Limits
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.data.tokens import open_split, verify_hashes
from olmoe_train.utils.errors import UserError
from tests.support.chat_templates import MISTRAL, TEMPLATES, turn, write_tokenizer
from tests.support.chats import chat_config, chats, learnt, write_lines
from tests.support.data import contents, read_documents

ASK, GOOD, BAD = turn("user", "Hello there"), turn("assistant", "It is."), turn("assistant", "Yes")
HISTORY = [turn("user", "what?"), turn("assistant", "Yes"), ASK]
PAIR = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}


def config(
    directory: Path, corpus: Path, tokenizer: Path | None, length: int = 100, **source: Any
) -> PrepareConfig:
    source = {"records": Records.preference, "learn": LearnedTurns.completion} | source
    template = None if tokenizer is None else tokenizer / "chat_template.jinja"
    if template is not None and not template.is_file():
        template = None
    cfg = chat_config(directory, corpus, tokenizer, template, **source)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sequence_length=length))


@pytest.fixture
def zephyr(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "hf", TEMPLATES["zephyr"])


FORMS: list[tuple[dict[str, Any], list[list[str]]]] = [
    (PAIR, [["It is.</s>"], ["Yes</s>"]]),
    ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, [["It is.</s>"], ["Yes</s>"]]),
    ({"prompt": [ASK]} | PAIR, [["It is.</s>"], ["Yes</s>"]]),
    ({"prompt": "Hello there"} | PAIR, [["It is.</s>"], ["Yes</s>"]]),
    (
        {"chosen": [*HISTORY, GOOD], "rejected": [*HISTORY, BAD, turn("user", "of"), GOOD]},
        [["It is.</s>"], ["Yes</s>", "It is.</s>"]],
    ),
    ({"prompt": "Hello", "chosen": " there", "rejected": " what?"}, [[" there</s>"], [" what?</s>"]]),
    ({"chosen": "Hello there what?", "rejected": "Hello there where"}, [[" what?</s>"], [" where</s>"]]),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms_of_pairs(tmp_path: Path, zephyr: Path, number: int) -> None:
    record, expected = FORMS[number]
    corpus = write_lines(tmp_path / "a.jsonl", record)
    manifest = prepare(config(tmp_path / "data", corpus, zephyr))
    assert learnt(tmp_path / "data") == expected
    split = open_split(tmp_path / "data", "train")
    assert split.labels(0, 2).tolist() == [1, 0]
    longest = max(stop - start for start, stop in (split.document(0), split.document(1)))
    assert manifest.preferences == Preferences(paired=True, records=1, longest=longest, desirable=1)
    starts = [int(np.argmax(split.read_mask(*split.document(number)))) for number in (0, 1)]
    chosen, rejected = read_documents(tmp_path / "data", "train")
    assert chosen[: starts[0]] == rejected[: starts[1]], "both sides have one prompt"


def test_a_side_is_what_the_conversation_is(tmp_path: Path, zephyr: Path) -> None:
    """The tokens and the mask of a side are those of its conversation prepared as records=messages."""
    sides = [[*HISTORY, GOOD], [*HISTORY, BAD]]
    for learn in (LearnedTurns.last, LearnedTurns.all):
        pair_file = write_lines(tmp_path / f"{learn.value}.jsonl", {"chosen": sides[0], "rejected": sides[1]})
        chat_file = chats(tmp_path / f"{learn.value}-chats.jsonl", *sides)
        as_pair, as_chats = (tmp_path / f"{learn.value}-{kind}" for kind in ("pair", "chats"))
        prepare(config(as_pair, pair_file, zephyr, learn=learn))
        prepare(chat_config(as_chats, chat_file, zephyr, zephyr / "chat_template.jinja", learn=learn))
        assert list(read_documents(as_pair, "train")) == list(read_documents(as_chats, "train"))
        assert learnt(as_pair) == learnt(as_chats)


def test_completions_with_labels(tmp_path: Path, zephyr: Path) -> None:
    records = [
        {"prompt": [ASK], "completion": [GOOD], "label": True},
        {"prompt": [ASK], "completion": [BAD], "label": False},
        {"prompt": "Hello", "completion": " there", "label": 1},
    ]
    corpus = write_lines(tmp_path / "a.jsonl", *records)
    manifest = prepare(config(tmp_path / "data", corpus, zephyr, records=Records.unpaired_preference))
    assert learnt(tmp_path / "data") == [["It is.</s>"], ["Yes</s>"], [" there</s>"]]
    assert open_split(tmp_path / "data", "train").labels(0, 3).tolist() == [1, 0, 1]
    assert manifest.preferences is not None
    assert not manifest.preferences.paired
    assert (manifest.preferences.records, manifest.preferences.desirable) == (3, 2)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"chosen": [ASK, GOOD]}, "no field 'rejected' (data.source.rejected_field); it has 'chosen'"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "its 'chosen' and 'rejected' are equal"),
    (
        {"chosen": "Hello there", "rejected": [ASK]},
        "its 'chosen' is a JSON string and its 'rejected' is a JSON list",
    ),
    (
        {"chosen": 1, "rejected": 2},
        "its 'chosen' is a JSON number and its 'rejected' is a JSON number; both must",
    ),
    (
        {"chosen": [ASK, GOOD], "rejected": [turn("user", "what?"), BAD]},
        "its 'chosen' and 'rejected' have no common prompt: their first messages differ",
    ),
    (
        {"chosen": "Hello there", "rejected": "what? of"},
        "its 'chosen' and 'rejected' have no common beginning",
    ),
    (
        {"prompt": "what?"} | PAIR,
        "its 'prompt' is not the first message of the user in both of its conversations",
    ),
    ({"prompt": 7} | PAIR, "its 'prompt' is a JSON number, not a string"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "the completion in its 'rejected' is empty"),
    (
        {"chosen": [ASK, GOOD], "rejected": [ASK, turn("assistant", " ")]},
        "the completion in its 'rejected' is empty",
    ),
    ({"prompt": "Hello", "chosen": " there", "rejected": " "}, "the completion in its 'rejected' is empty"),
    ({"prompt": " ", "chosen": "there", "rejected": "what?"}, "its 'prompt' is empty"),
    (
        {"chosen": [ASK, GOOD], "rejected": [ASK, turn("user", "what?"), BAD]},
        "the completion in its 'rejected' starts with a message of 'user', not of the assistant",
    ),
    (
        {"chosen": [ASK, {"role": "assistant"}], "rejected": [ASK, BAD]},
        "the completion in its 'chosen' is empty",
    ),
    ({"chosen": [{"content": "x"}], "rejected": [ASK, BAD]}, "message 1 has no 'role' (in its 'chosen')"),
    ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "its 'prompt' has no message"),
    (
        {"chosen": [ASK, BAD | {"score": 1}], "rejected": [ASK, BAD | {"score": 2}]},
        "its 'chosen' and 'rejected' are equal once they are rendered",
    ),
    (
        {"prompt": "Hello there", "chosen": [GOOD], "rejected": [BAD]},
        "its 'prompt' is a JSON string, and its 'chosen' is a list of messages without it",
    ),
    ({"prompt": [ASK], "chosen": "It is.", "rejected": "Yes"}, "its 'prompt' is a JSON list, not a string"),
    ({"prompt": "what?", "messages": [ASK, GOOD]} | PAIR, "its 'prompt' is not the first message"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_strict_names_path_and_line(tmp_path: Path, zephyr: Path, number: int) -> None:
    record, reason = REFUSED[number]
    corpus = write_lines(tmp_path / "a.jsonl", PAIR, record)
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "data", corpus, zephyr))
    assert str(caught.value).startswith(f"{corpus}:2: {reason}")
    if not reason.startswith("no field"):
        assert "it fits" not in str(caught.value), "read as conversations, the sides are no preference"


def test_a_silent_last_turn_is_a_bad_record(tmp_path: Path, zephyr: Path) -> None:
    silent = {"chosen": [ASK, GOOD, turn("user", "what?"), turn("assistant", "")], "rejected": [ASK, BAD]}
    corpus = write_lines(tmp_path / "a.jsonl", silent)
    assert prepare(config(tmp_path / "all", corpus, zephyr)).train.documents == 2
    with pytest.raises(UserError, match=r":1: the assistant says nothing in the turns of its 'chosen' that"):
        prepare(config(tmp_path / "data", corpus, zephyr, learn=LearnedTurns.last))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"prompt": "Hello", "completion": " there", "label": "yes"},
            "its 'label' is 'yes', not true or false",
        ),
        (
            {"prompt": "Hello", "completion": " there", "label": None},
            "its 'label' is None, not true or false",
        ),
        (
            {"prompt": "Hello", "completion": [GOOD], "label": True},
            "its 'prompt' is a JSON string and its 'com",
        ),
        (
            {"prompt": [ASK], "completion": [ASK], "label": True},
            "the completion in its 'completion' starts with",
        ),
        ({"prompt": "Hello", "completion": " there"}, "no field 'label' (data.source.label_field)"),
    ],
)
def test_bad_completions_with_labels(
    tmp_path: Path, zephyr: Path, record: dict[str, Any], reason: str
) -> None:
    corpus = write_lines(tmp_path / "a.jsonl", record)
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "data", corpus, zephyr, records=Records.unpaired_preference))
    assert str(caught.value).startswith(f"{corpus}:1: {reason}")


def test_quarantine_keeps_bad_pairs(tmp_path: Path, zephyr: Path) -> None:
    corpus = write_lines(tmp_path / "a.jsonl", PAIR, *(record for record, _ in REFUSED))
    options: dict[str, Any] = {"on_bad_record": OnBadRecord.quarantine, "max_bad_fraction": 1.0}
    manifest = prepare(config(tmp_path / "data", corpus, zephyr, **options))
    assert (manifest.train.documents, manifest.quarantined_records) == (2, len(REFUSED))
    lines = (tmp_path / "data/quarantine.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert all(found.startswith(reason) for found, (_, reason) in zip(reasons, REFUSED, strict=True))


def side(prompt: list[int], completion: list[int]) -> EncodedSide:
    targets = np.array([0] * len(prompt) + [1] * len(completion), np.uint8)
    return EncodedSide([*prompt, *completion], targets, len(prompt))


PROMPT = [1, 2, 3]


@pytest.mark.parametrize(
    ("truncate", "sides", "expected", "reason"),
    [
        (Truncate.drop, ([7, 8], [9, 9, 9]), [], "too_long"),
        (Truncate.drop, ([7, 8], [9]), [[1, 2, 3, 7, 8], [1, 2, 3, 9]], None),
        # Both prompts lose the one token that the longer side has too many.
        (Truncate.prompt_start, ([7, 8], [9, 9, 9]), [[2, 3, 7, 8], [2, 3, 9, 9, 9]], "cut"),
        (Truncate.prompt_start, ([7], [9] * 5), [], "too_long"),  # no token of the prompt would be left
        (Truncate.completion_end, ([7, 8], [9, 8, 7]), [[1, 2, 3, 7, 8], [1, 2, 3, 9, 8]], "cut"),
        (Truncate.completion_end, ([7, 8, 5], [7, 8, 6]), [], "equal_when_cut"),
    ],
)
def test_what_is_too_long_is_cut(
    truncate: Truncate, sides: tuple[list[int], list[int]], expected: list[list[int]], reason: str | None
) -> None:
    found, why = compare_sides([side(PROMPT, one) for one in sides], truncate, 5)
    assert ([one.ids for one in found], why) == (expected, reason)
    for one in found:
        assert one.prompt_tokens == len(one.ids) - one.targets.sum()


def test_a_prompt_without_room_for_a_completion_is_left_out() -> None:
    assert compare_sides([side([1] * 5, [7]), side([1] * 5, [8])], Truncate.completion_end, 5) == (
        [],
        "too_long",
    )
    assert compare_sides([side(PROMPT, [7]), None], Truncate.drop, 5) == ([], "unaligned")


def test_a_prompt_that_differs_between_the_sides_is_left_out() -> None:
    assert compare_sides([side(PROMPT, [7]), side([1, 2, 4], [8])], Truncate.drop, 5) == ([], "unaligned")
    assert compare_sides([side(PROMPT, [7]), side([1, 2], [8])], Truncate.drop, 5) == ([], "unaligned")


def test_the_first_token_is_no_target() -> None:
    """With learn=all a prompt may begin with a target once its first tokens are cut."""
    learned = EncodedSide([1, 2, 3, 7], np.array([0, 1, 0, 1], np.uint8), 3)
    found, _ = compare_sides([learned], Truncate.prompt_start, 3)
    assert (found[0].ids, found[0].targets.tolist(), found[0].prompt_tokens) == ([2, 3, 7], [0, 0, 1], 2)


def test_counts_are_shown_and_lengths_are_settings(
    tmp_path: Path, zephyr: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"chosen": [ASK, GOOD], "rejected": [ASK, turn("assistant", "Yes what? " * 20)]}
    corpus = write_lines(tmp_path / "a.jsonl", PAIR, long, PAIR)
    manifest = prepare(config(tmp_path / "data", corpus, zephyr, length=40))
    assert manifest.preferences is not None
    assert (manifest.preferences.records, manifest.preferences.too_long) == (2, 1)
    shown = capsys.readouterr().out
    assert "preferences 2 pairs; the longest has " in shown
    assert "train       2 pairs, " in shown
    assert "1 are too long" in shown
    with pytest.raises(UserError, match=r"data\.sequence_length: 40 there, 100 requested"):
        prepare(config(tmp_path / "data", corpus, zephyr))
    with pytest.raises(UserError, match=r"no preference is left: 3 are too long"):
        prepare(config(tmp_path / "none", corpus, zephyr, length=4))
    cut = prepare(config(tmp_path / "cut", corpus, zephyr, length=40, truncate=Truncate.completion_end))
    assert cut.preferences is not None
    assert (cut.preferences.records, cut.preferences.cut, cut.preferences.longest) == (3, 1, 40)
    assert "1 were cut" in capsys.readouterr().out


def test_both_sides_lose_the_same_start_of_the_prompt(tmp_path: Path, zephyr: Path) -> None:
    """Whole, the sides have 20 and 19 tokens, so each one loses 20 - 14 = 6 of its prompt."""
    corpus = write_lines(tmp_path / "a.jsonl", PAIR)
    prepare(config(tmp_path / "whole", corpus, zephyr))
    whole = list(read_documents(tmp_path / "whole", "train"))
    assert [len(one) for one in whole] == [20, 19]
    cut = prepare(config(tmp_path / "cut", corpus, zephyr, length=14, truncate=Truncate.prompt_start))
    assert list(read_documents(tmp_path / "cut", "train")) == [one[6:] for one in whole]
    assert learnt(tmp_path / "cut") == learnt(tmp_path / "whole") == [["It is.</s>"], ["Yes</s>"]]
    assert cut.preferences == Preferences(paired=True, records=1, longest=14, desirable=1, cut=1)


def test_a_prompt_inside_a_token_is_left_out_and_counted(tmp_path: Path, zephyr: Path) -> None:
    """ "](" is one token: the prompt does not end where a token ends."""
    inside = {"prompt": "Hello]", "chosen": "(there", "rejected": " what?"}
    text = {"prompt": "Hello", "chosen": " there", "rejected": " what?"}
    corpus = write_lines(tmp_path / "a.jsonl", text, inside)
    tokenizer = write_tokenizer(tmp_path / "merged", MISTRAL)
    manifest = prepare(config(tmp_path / "data", corpus, tokenizer))
    assert manifest.preferences is not None
    assert (manifest.preferences.records, manifest.preferences.unaligned) == (1, 1)


def test_keys_that_do_not_fit_are_refused(tmp_path: Path, zephyr: Path) -> None:
    corpus = write_lines(tmp_path / "a.jsonl", PAIR)
    refused: dict[str, dict[str, Any]] = {
        "data.source.learn=marked: data.source.records=preference": {"learn": LearnedTurns.marked},
        "data.source.turns=expand: has no effect": {"turns": Turns.expand},
        "data.source.learn=completion: is for preferences": {"records": Records.messages},
        "data.source.learn=all: data.source.records=unpaired": {
            "records": Records.unpaired_preference,
            "learn": LearnedTurns.all,
        },
        "data.source.truncate=prompt_start: has no effect": {
            "records": Records.messages,
            "learn": LearnedTurns.all,
            "truncate": Truncate.prompt_start,
        },
        "data.source.label_field=wanted: has no effect with data.source.records=preference": {
            "label_field": "wanted"
        },
        "data.source.chosen_field=good: has no effect with data.source.records=messages": {
            "records": Records.messages,
            "learn": LearnedTurns.all,
            "chosen_field": "good",
        },
    }
    for message, changes in refused.items():
        with pytest.raises(UserError) as caught:
            prepare(config(tmp_path / "data", corpus, zephyr, **changes))
        assert message in str(caught.value)
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: no field 'messages'.*fits data\.source\.records=preference"
    ):
        prepare(chat_config(tmp_path / "data", corpus, zephyr, zephyr / "chat_template.jinja"))
    bare = write_tokenizer(tmp_path / "bare", "")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(
        UserError, match=r"the tokenizer has no chat template; name one, as in tokenizer\.chat_t"
    ):
        prepare(config(tmp_path / "data", corpus, bare))


def test_tables_shards_and_processes_change_nothing(tmp_path: Path, zephyr: Path) -> None:
    records = [
        {"id": n, "prompt": [ASK], "chosen": [GOOD] * (1 + n % 3), "rejected": [BAD]} for n in range(12)
    ]
    corpus = write_lines(tmp_path / "a.jsonl", *records)
    pq.write_table(pa.Table.from_pylist(records), str(tmp_path / "a.parquet"))
    options: dict[str, Any] = {"validation_fraction": 0.3, "shard_tokens": 60}
    lines = prepare(config(tmp_path / "lines", corpus, zephyr, **options))
    table = prepare(config(tmp_path / "table", tmp_path / "a.parquet", zephyr, **options))
    assert (lines.train, lines.validation) == (table.train, table.validation)
    assert lines.preferences is not None
    assert lines.preferences.records == 12
    assert all(shard.documents % 2 == 0 for shard in (*lines.train.shards, *lines.validation.shards))
    assert len(lines.train.shards) > 1
    three = config(tmp_path / "three", corpus, zephyr, **options, processes=3)
    prepare(three, Limits(batch_bytes=200))
    names = [name for name in contents(tmp_path / "lines") if name != "manifest.json"]
    assert {name: contents(tmp_path / "three")[name] for name in names} == {
        name: contents(tmp_path / "lines")[name] for name in names
    }
    labels = next((tmp_path / "lines").glob("train/*.labels.u8"))
    labels.write_bytes(bytes(reversed(labels.read_bytes())))
    with pytest.raises(UserError, match=r"labels\.u8: its contents changed"):
        verify_hashes(tmp_path / "lines")


def test_interrupted_preparation_keeps_labels(
    tmp_path: Path, zephyr: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt continues in the middle of a shard."""
    records = [{"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD] * (1 + n % 2)} for n in range(20)]
    corpus = write_lines(tmp_path / "a.jsonl", *records)
    limits = Limits(batch_bytes=300, batches_per_process=1, save_seconds=0.0)
    prepare(config(tmp_path / "whole", corpus, zephyr))
    cfg = config(tmp_path / "parts", corpus, zephyr)
    corpus_text = corpus.read_text()
    lines = corpus_text.splitlines(keepends=True)
    # A bad record ends the first attempt; the corpus keeps its size and its time.
    spoiled = "".join([*lines[:15], "x" * (len(lines[15]) - 1) + "\n", *lines[16:]])
    stat = corpus.stat()
    corpus.write_text(spoiled)
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r":16: malformed JSON"):
        prepare(cfg, limits)
    corpus.write_text(corpus_text)
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (tmp_path / ".parts.partial/progress.json").is_file()
    prepare(cfg, limits)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert parts == whole
