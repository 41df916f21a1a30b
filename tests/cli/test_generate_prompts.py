"""`olmoe generate prompts=FILE`: the records that come out, a run that continues one, and bad lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from olmoe_train.cli.generate import main
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, OK
from tests.support.chat_templates import CHATML, EOS
from tests.support.commands import olmoe
from tests.support.talkers import write_babbler, write_reciter

ANSWER = "Ja: é漢"
RECORDS: list[dict[str, Any]] = [
    {"prompt": "Hello there, what is it?", "id": "a"},
    {"prompt": "Yes", "max_new_tokens": 3, "label": [1, None]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    {"prompt": "of the"},
]


def write_prompts(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_are_continued_in_their_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = str(write_babbler(tmp_path / "hf"))
    prompts = str(write_prompts(tmp_path / "prompts.jsonl", RECORDS))
    out = tmp_path / "new" / "out.jsonl"
    command = GenerateConfig(source, max_new_tokens=9, prompts=prompts, out=str(out), batch_size=2)
    main(command)
    whole = out.read_bytes()
    for record, given in zip(read(out), RECORDS, strict=True):
        assert {key: record[key] for key in given} == given
        limit = given.get("max_new_tokens", 9)
        assert (record["tokens"], record["finish_reason"]) == (limit, "length")
        assert sorted(record.keys() - given.keys()) == ["completion", "finish_reason", "tokens"]
    assert "4 prompts continued, 30 tokens in" in capfd.readouterr().err
    # A text is continued as `prompt` is.
    main(GenerateConfig(source, RECORDS[0]["prompt"], max_new_tokens=9))
    assert capfd.readouterr().out == RECORDS[0]["prompt"] + read(out)[0]["completion"] + "\n"
    assert caplog.messages == []

    # Killed in the middle of the third record.
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:-20])
    main(command)
    assert out.read_bytes() == whole
    assert "2 prompts continued after 2 that were there" in capfd.readouterr().err
    main(command)
    assert out.read_bytes() == whole
    for content in (b'{"prompt": "another file"', b"notes", lines[1], whole + lines[0]):
        out.write_bytes(content)
        with pytest.raises(UserError, match=r"out.jsonl:\d: is not the result of record \d of the prompts"):
            main(command)
        assert out.read_bytes() == content


def test_conversations_through_the_command(tmp_path: Path) -> None:
    """With chat=true a prompt is a message of the user, which the template surrounds."""
    directory = write_reciter(tmp_path / "hf", CHATML, ANSWER)
    write_prompts(tmp_path / "prompts.jsonl", RECORDS)
    result = olmoe("generate", "source=hf", "prompts=prompts.jsonl", "chat=true", cwd=tmp_path)
    assert result.returncode == OK, result.stderr
    tokens = len(Tokenizer.from_file(str(directory / "tokenizer.json")).encode(ANSWER).ids)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["completion"], one["finish_reason"]) for one in found] == [
        (ANSWER, "stop"),
        ("Ja:", "length"),
        (ANSWER, "stop"),
        (ANSWER, "stop"),
    ]
    assert found[0]["tokens"] == tokens + 1  # with the one that ends it
    assert "4 prompts continued, " in result.stderr


BAD = {
    "not json": "not JSON: Expecting value at column 1; each line is one JSON object",
    "[1]": "is a JSON list; each line is one JSON object",
    "{}": "has neither prompt nor messages; give a text as prompt, or a conversation as messages",
    '{"prompt": "a", "messages": []}': "has both prompt and messages",
    '{"prompt": 3}': "prompt is number; give a string",
    '{"prompt": " "}': "prompt is empty; give some text to continue",
    '{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens is 0; give a number of at least 1",
    '{"prompt": "a", "tokens": 3}': "has a field 'tokens', which the result of the record gets; rename it",
    '{"messages": []}': "its 'messages' has no message",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "the last message is the assistant's, which is",
    '{"messages": [{"role": "user"}]}': "message 1 has no 'content'",
}


def test_every_bad_line_is_named_before_the_model_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    for line, expected in BAD.items():
        path.write_text(f'{{"prompt": "good"}}\n\n{line}\n')
        with pytest.raises(UserError) as caught:
            main(GenerateConfig("nowhere", prompts=str(path)))
        assert str(caught.value).startswith(f"{path}:3: {expected}"), caught.value
    path.write_text("\n".join(BAD) + "\n")
    with pytest.raises(UserError) as caught:
        main(GenerateConfig("nowhere", prompts=str(path)))
    *named, more = str(caught.value).splitlines()
    assert [line.strip().split(" ")[0] for line in named] == [f"{path}:{number}:" for number in range(1, 11)]
    assert more == "  and 1 more"
    path.write_text("\n")
    for prompts, expected in ((path, "is empty; give it"), (tmp_path / "none", "cannot be read: No such")):
        with pytest.raises(UserError, match=expected):
            main(GenerateConfig("nowhere", prompts=str(prompts)))
    with pytest.raises(UserError, match="prompt and prompts are both given"):
        main(GenerateConfig("nowhere", "x", prompts=str(path)))


def test_lines_that_the_model_cannot_continue(tmp_path: Path) -> None:
    write_babbler(tmp_path / "hf")
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "a b c d e f g h", "id": EOS}])
    given = ("source=hf", "prompts=prompts.jsonl", "max_new_tokens=4", "max_batch_tokens=8")
    result = olmoe("generate", *given, cwd=tmp_path)
    assert result.returncode == BAD_INPUT
    assert result.stdout == ""
    assert result.stderr.startswith("error: prompts.jsonl:3: ")
    assert "positions, but max_batch_tokens=8; raise the latter, or shorten the former" in result.stderr
