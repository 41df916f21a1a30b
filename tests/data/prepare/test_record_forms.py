"""The forms of conversations in records, and the form that a refused record names."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import LearnedTurns, Records, Turns
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.utils.errors import UserError
from tests.support.chat_templates import (
    LLAMA,
    QWEN_3,
    TULU_3,
    turn,
    write_tokenizer,
)
from tests.support.chats import (
    TALK,
    WEATHER,
    call,
    chat_config,
    write_lines,
)
from tests.support.data import contents, read_texts

NO_LIST = "its 'conversations' is a JSON string, not a list"
BAD: list[tuple[Records, dict[str, Any], str]] = [
    (
        Records.messages,
        {
            "messages": [
                turn("user", [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "x"}])
            ]
        },
        "part 2 of the 'content' of message 1 has the type 'image_url', but only parts of the type 'text'",
    ),
    (
        Records.messages,
        {"messages": [turn("user", ["x"])]},
        "part 1 of the 'content' of message 1 is a JSON st",
    ),
    (
        Records.messages,
        {"messages": [turn("user", [{"type": "text"}])]},
        "the 'text' of part 1 of the 'content' of message 1 is a JSON null, not a string",
    ),
    (
        Records.messages,
        {"messages": [turn("assistant", None, tool_calls={"name": "x"})]},
        "the 'tool_calls' of message 1 is a JSON object, not a list",
    ),
    (Records.messages, {"messages": TALK, "tools": "weather"}, "its 'tools' is a string that is not JSON"),
    (Records.messages, {"messages": TALK, "tools": {}}, "its 'tools' is a JSON object, not a JSON list"),
    (
        Records.messages,
        {"messages": TALK, "tools": ["x"]},
        "tool 1 of its 'tools' is a JSON string, not an obj",
    ),
    (Records.sharegpt, {"conversations": "x"}, NO_LIST),
    (
        Records.sharegpt,
        {"conversations": [{"from": "bot", "value": "x"}]},
        "message 1 is from 'bot'; known are system, human, user, gpt,",
    ),
    (Records.sharegpt, {"conversations": [{"from": "gpt"}]}, "message 1 has no 'value'"),
    (
        Records.sharegpt,
        {"conversations": [{"from": "function_call", "value": "weather"}]},
        "the 'value' of message 1 is not a function call:",
    ),
    (Records.alpaca, {"instruction": 1, "output": ""}, "its 'instruction' is a JSON number, not a string"),
    (
        Records.alpaca,
        {"instruction": "x", "output": "y", "history": [["x"]]},
        "entry 1 of its 'history' is not a list of a question and an answer",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_record_of_the_right_form_with_a_wrong_value(tmp_path: Path, number: int) -> None:
    records, record, reason = BAD[number]
    tokenizer = write_tokenizer(tmp_path / "hf", QWEN_3)
    corpus = write_lines(tmp_path / "a.jsonl", record)
    with pytest.raises(UserError) as caught:
        prepare(chat_config(tmp_path / "data", corpus, tokenizer, records=records))
    assert str(caught.value).startswith(f"{corpus}:1: {reason}")
    assert "it fits" not in str(caught.value)


SHAREGPT = {
    "system": "Be terse.",
    "conversations": [
        {"from": "human", "value": "Hello"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"at": "Bern"}}'},
        {"from": "observation", "value": "8"},
        {"from": "gpt", "value": "It is 8.", "weight": 0},
    ],
    "tools": json.dumps([WEATHER]),
}
ALPACA = {
    "system": "Be terse.",
    "history": [["Hello", "Yes"]],
    "instruction": "what is it?",
    "input": "of",
    "output": "It is.",
}
AS_MESSAGES: dict[Records, tuple[dict[str, Any], dict[str, Any]]] = {
    Records.sharegpt: (
        SHAREGPT,
        {
            "messages": [
                turn("system", "Be terse."),
                turn("user", "Hello"),
                turn("assistant", None, tool_calls=[call(at="Bern")]),
                turn("tool", "8"),
                turn("assistant", "It is 8.", weight=0),
            ],
            "tools": [WEATHER],
        },
    ),
    Records.alpaca: (
        ALPACA,
        {
            "messages": [
                turn("system", "Be terse."),
                turn("user", "Hello"),
                turn("assistant", "Yes"),
                turn("user", "what is it?\n\nof"),
                turn("assistant", "It is."),
            ]
        },
    ),
}


@pytest.mark.parametrize("records", list(AS_MESSAGES))
def test_other_forms_are_the_same_as_messages(tmp_path: Path, records: Records) -> None:
    """From lines and from a table; with marks."""
    tokenizer = write_tokenizer(tmp_path / "hf", QWEN_3, LLAMA)
    record, messages = AS_MESSAGES[records]
    options: dict[str, Any] = {"learn": LearnedTurns.marked, "turns": Turns.expand}
    corpus = write_lines(tmp_path / "messages.jsonl", messages)
    prepare(chat_config(tmp_path / "messages", corpus, tokenizer, **options))
    corpus = write_lines(tmp_path / "a.jsonl", record)
    prepare(chat_config(tmp_path / "lines", corpus, tokenizer, records=records, **options))
    pq.write_table(pa.Table.from_pylist([record, record]).slice(0, 1), str(tmp_path / "a.parquet"))
    prepare(chat_config(tmp_path / "table", tmp_path / "a.parquet", tokenizer, records=records, **options))
    expected = contents(tmp_path / "messages/train")
    assert contents(tmp_path / "lines/train") == contents(tmp_path / "table/train") == expected


def test_alpaca_without_input(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    records = [
        {"instruction": "Hello", "output": "Yes", **extra} for extra in ({}, {"input": ""}, {"input": None})
    ]
    corpus = write_lines(tmp_path / "a.jsonl", *records)
    prepare(chat_config(tmp_path / "data", corpus, tokenizer, records=Records.alpaca))
    assert set(read_texts(tmp_path / "data", "train")) == {"<s><|user|>\nHello\n<|assistant|>\nYes"}


FITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"records": Records.messages}, SHAREGPT, "data.source.records=sharegpt"),
    (
        {"records": Records.messages},
        {"messages": SHAREGPT["conversations"]},
        "data.source.records=sharegpt data.source.conversations_field=messages",
    ),
    ({"records": Records.messages}, ALPACA, "data.source.records=alpaca"),
    (
        {"records": Records.messages},
        {"prompt": "x", "completion": "y"},
        "data.source.records=prompt_completion",
    ),
    ({"records": Records.messages}, {"text": "x"}, "data.source.records=text"),
    (
        {"records": Records.messages},
        {"chat": TALK},
        "data.source.records=messages data.source.messages_field=chat",
    ),
    ({"records": Records.sharegpt}, {"messages": TALK}, "data.source.records=messages"),
    (
        {"records": Records.sharegpt},
        {"conversations": TALK},
        "data.source.records=messages data.source.messages_field=conversations",
    ),
    ({"records": Records.alpaca}, SHAREGPT, "data.source.records=sharegpt"),
    ({"records": Records.prompt_completion}, {"messages": TALK}, "data.source.records=messages"),
    ({"records": Records.text}, {"messages": TALK}, "data.source.records=messages"),
]


@pytest.mark.parametrize("number", range(len(FITS)))
def test_a_refused_record_names_the_form_that_fits(tmp_path: Path, number: int) -> None:
    options, record, settings = FITS[number]
    tokenizer = write_tokenizer(tmp_path / "hf", QWEN_3)
    corpus = write_lines(tmp_path / "a.jsonl", record)
    with pytest.raises(UserError, match=r"a\.jsonl:1: ") as caught:
        prepare(chat_config(tmp_path / "data", corpus, tokenizer, **options))
    assert f"; it fits {settings}.\n" in str(caught.value)


def test_a_refused_table_names_the_form_that_fits(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", QWEN_3)
    pq.write_table(pa.Table.from_pylist([ALPACA]), str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"no column 'messages'(.|\n)*, or data\.source\.records=alpaca"):
        prepare(chat_config(tmp_path / "data", tmp_path / "a.parquet", tokenizer))


@pytest.mark.parametrize(
    "override", ["tokenizer.chat_template_kwargs={a: 1}", "tokenizer.chat_template_kwargs.a=1"]
)
def test_variables_of_a_template_on_the_command_line(
    tmp_path: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PrepareConfig] = []
    monkeypatch.setattr("sys.argv", ["olmoe", override, f"data.dir={tmp_path}/data"])
    assert run_verb("prepare", PrepareConfig, lambda cfg: seen.append(cfg)) == 0
    assert seen[0].tokenizer.chat_template_kwargs == {"a": 1}


def test_keys_for_conversations_without_conversations(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "a.jsonl", {"text": "x"})
    options: dict[str, Any] = {"records": Records.text, "learn": LearnedTurns.last, "turns": Turns.expand}
    with pytest.raises(UserError) as caught:
        prepare(chat_config(tmp_path / "d", corpus, None, template_kwargs={"a": 1}, **options))
    for key in ("data.source.learn=last", "data.source.turns=expand", "tokenizer.chat_template_kwargs"):
        assert f"{key}: has no effect" in str(caught.value)
