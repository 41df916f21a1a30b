"""Conversations with thoughts, tools and parts, and which turns of them are learnt."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from olmoe_train.config.choices import LearnedTurns, SourceKind, Turns
from olmoe_train.data.manifest import Manifest, Targets
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.utils.errors import UserError
from tests.support.chat_templates import (
    LLAMA,
    MARKED_THINKER,
    OLMO_THINKER,
    QWEN_3,
    TEMPLATES,
    TULU_3,
    TULU_THINKER,
    turn,
    write_tokenizer,
)
from tests.support.chats import (
    ANSWER,
    CALLS,
    QUESTION,
    TALK,
    THOUGHTS,
    WEATHER,
    call,
    chat_config,
    chats,
    learnt,
    write_lines,
)
from tests.support.data import contents, read_documents, read_texts


def targets(manifest: Manifest) -> Targets:
    assert manifest.targets is not None
    return manifest.targets


# Thoughts.


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (QWEN_3, ["<think>\nHm.\n</think>\n\nIt is.<|im_end|>", "<think>\nWell.\n</think>\n\nYes<|im_end|>"]),
        (OLMO_THINKER, ["\nHm.\n</think>\n\nIt is.</s>", "\nWell.\n</think>\n\nYes</s>"]),
        (TULU_THINKER, ["\nHm.\n</think>\n\nIt is.</s>", "\nWell.\n</think>\n\nYes</s>"]),
    ],
)
def test_turns_that_are_rendered_otherwise_as_last_ones_can_be_expanded(
    tmp_path: Path, template: str, answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each document is a prompt of Transformers', masked, and what follows it in Transformers' rendering."""
    tokenizer = write_tokenizer(tmp_path / "hf", template, LLAMA)
    corpus = chats(tmp_path / "a.jsonl", THOUGHTS, THOUGHTS[:2])
    together = prepare(chat_config(tmp_path / "together", corpus, tokenizer))
    assert learnt(tmp_path / "together") == [[], answers[:1]]
    found = targets(together)
    assert (found.conversations, found.unaligned, found.gain_by_expanding) == (2, 1, 1)
    assert "1 conversations without targets would have some with data.source.turns=expand" in (
        capsys.readouterr().out
    )

    expanded = prepare(chat_config(tmp_path / "data", corpus, tokenizer, turns=Turns.expand))
    assert learnt(tmp_path / "data") == [answers[:1], answers[1:], answers[:1]]
    assert expanded.train.documents == 3
    found = targets(expanded)
    assert (found.conversations, found.unaligned, found.gain_by_expanding) == (2, 0, 0)
    reference: Any = AutoTokenizer.from_pretrained(tokenizer)
    documents = read_documents(tmp_path / "data", "train")
    masks = np.fromfile(tmp_path / "data/train/shard-00000.mask.u8", np.uint8)
    start = 0
    for document, length in zip(documents, (2, 4, 2), strict=True):
        prompt = reference.apply_chat_template(THOUGHTS[: length - 1], add_generation_prompt=True)[
            "input_ids"
        ]
        whole = reference.apply_chat_template(THOUGHTS[:length])["input_ids"]
        assert document[: len(whole)] == whole
        assert not masks[start : start + len(prompt)].any()
        assert masks[start + len(prompt)] == 1
        start += len(document)


def test_a_corpus_that_only_expanding_gives_targets_says_so(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", QWEN_3, LLAMA)
    corpus = chats(tmp_path / "a.jsonl", THOUGHTS)
    with pytest.raises(
        UserError, match=r"With data\.source\.turns=expand, 1 conversations would have targets"
    ):
        prepare(chat_config(tmp_path / "data", corpus, tokenizer))


def test_the_documents_of_a_conversation_stay_in_one_split(tmp_path: Path) -> None:
    """A single conversation is not divided; of two, one is held out."""
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    options: dict[str, Any] = {"turns": Turns.expand, "validation_fraction": 0.5}
    one = chats(tmp_path / "one.jsonl", TALK)
    manifest = prepare(chat_config(tmp_path / "one", one, tokenizer, **options))
    assert (manifest.train.documents, manifest.validation.documents) == (2, 0)
    two = chats(tmp_path / "two.jsonl", TALK, TALK)
    manifest = prepare(chat_config(tmp_path / "two", two, tokenizer, **options))
    assert (manifest.train.documents, manifest.validation.documents) == (2, 2)


@pytest.mark.parametrize(
    ("template", "inserted"), [(QWEN_3, "<think>\n\n</think>\n\n"), (MARKED_THINKER, "<think></think>")]
)
def test_an_inserted_thought_is_learnt_only_if_the_prompt_lacks_it(
    tmp_path: Path, template: str, inserted: str
) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", template, LLAMA)
    record = {"messages": [QUESTION, ANSWER]}
    without = {**record, "chat_template_kwargs": {"enable_thinking": False}}
    corpus = write_lines(tmp_path / "a.jsonl", record, without)
    prepare(chat_config(tmp_path / "default", corpus, tokenizer))
    assert learnt(tmp_path / "default") == [[f"{inserted}It is.<|im_end|>"], ["It is.<|im_end|>"]]
    prepare(chat_config(tmp_path / "off", corpus, tokenizer, template_kwargs={"enable_thinking": False}))
    assert learnt(tmp_path / "off") == [["It is.<|im_end|>"], ["It is.<|im_end|>"]]
    [first, second] = read_texts(tmp_path / "default", "train")
    assert first == second
    assert f"{inserted}It is." in first
    with pytest.raises(UserError, match=r"chat_template_kwargs\.thinking: .* does not read this variable"):
        prepare(chat_config(tmp_path / "no", corpus, tokenizer, template_kwargs={"thinking": True}))
    write_lines(corpus, {**record, "chat_template_kwargs": {"messages": []}})
    with pytest.raises(UserError, match=r"a\.jsonl:1: its 'chat_template_kwargs' has 'messages', which is"):
        prepare(chat_config(tmp_path / "no", corpus, tokenizer))


# Which turns.


@pytest.mark.parametrize("template", ["tulu 3", "modern"])
def test_the_turns_that_are_learnt(tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a template that marks its turns ("modern"), too."""
    end = "</s>" if template == "tulu 3" else "<|im_end|>"
    tokenizer = write_tokenizer(tmp_path / "hf", TEMPLATES[template])
    marked = [
        QUESTION,
        turn("assistant", "of", weight=0),
        turn("user", "what?", train=False),
        turn("assistant", "Yes", weight=1),
        turn("user", "what?"),
        turn("assistant", "It is.", train=False),
    ]
    corpus = chats(tmp_path / "a.jsonl", marked, TALK)
    expected = {
        LearnedTurns.all: [["of", "Yes", "It is."], ["It is.", "Yes"]],
        LearnedTurns.last: [["It is."], ["Yes"]],
        LearnedTurns.marked: [["Yes"], ["It is.", "Yes"]],
    }
    for learn, answers in expected.items():
        cfg = chat_config(
            tmp_path / learn.name, corpus, tokenizer, tokenizer / "chat_template.jinja", learn=learn
        )
        manifest = prepare(cfg)
        assert learnt(tmp_path / learn.name) == [[text + end for text in one] for one in answers]
        assert targets(manifest).excluded_turns == 2
        said = "are not learnt" if learn is LearnedTurns.marked else "are learnt; data.source.learn=marked"
        assert f'2 turns with "weight": 0 or "train": false {said}' in capsys.readouterr().out
    again = chat_config(tmp_path / "last", corpus, tokenizer, tokenizer / "chat_template.jinja")
    with pytest.raises(UserError, match=r"data\.source\.learn: last there, null requested"):
        prepare(again)


def test_last_turns_need_no_proof_of_earlier_ones(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", QWEN_3, LLAMA)
    corpus = chats(tmp_path / "a.jsonl", THOUGHTS)
    prepare(chat_config(tmp_path / "data", corpus, tokenizer, learn=LearnedTurns.last))
    assert learnt(tmp_path / "data") == [["<think>\nWell.\n</think>\n\nYes<|im_end|>"]]


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"weight": 0.5}, "the 'weight' of message 2 is 0.5, not 0 or 1"),
        ({"train": "false"}, "the 'train' of message 2 is 'false', not true or false"),
    ],
)
def test_other_marks_are_refused(tmp_path: Path, mark: dict[str, Any], reason: str) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    corpus = chats(tmp_path / "a.jsonl", [QUESTION, turn("assistant", "Yes", **mark)])
    with pytest.raises(UserError) as caught:
        prepare(chat_config(tmp_path / "data", corpus, tokenizer, learn=LearnedTurns.marked))
    assert str(caught.value).startswith(f"{corpus}:1: {reason}")


@pytest.mark.parametrize("template", ["tulu 3", "modern", "qwen 3", "marked thinker"])
def test_what_is_counted_and_never_learnt(
    tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", TEMPLATES[template], LLAMA)
    talks = [
        TALK[:2],
        [QUESTION, turn("assistant", "")],
        [QUESTION, turn("assistant", " \n")],
        [turn("system", "Be terse."), QUESTION],
        [turn("system", "Be terse.")],
        [*TALK[:2], turn("user", "of")],
    ]
    corpus = chats(tmp_path / "a.jsonl", *talks)
    manifest = prepare(chat_config(tmp_path / "data", corpus, tokenizer, tokenizer / "chat_template.jinja"))
    answered = [bool(runs) for runs in learnt(tmp_path / "data")]
    # A template that renders the same turn otherwise once it is not the last one: masked, not guessed.
    last = template != "qwen 3"
    assert answered == [True, False, False, False, False, last]
    found = targets(manifest)
    assert (found.empty_turns, found.system_only, found.ends_with_user) == (2, 1, 2)
    out = capsys.readouterr().out
    assert "2 empty turns of the assistant are not learnt" in out
    assert "1 conversations have a system message only" in out
    assert "2 conversations end with the user" in out
    stored = json.loads((tmp_path / "data/manifest.json").read_text())["targets"]
    assert (stored["empty_turns"], stored["system_only"], stored["ends_with_user"]) == (2, 1, 2)
    for one in learnt(tmp_path / "data"):
        assert all("It is." in run for run in one)


def test_other_turns_than_an_empty_one_are_learnt(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    talk = [QUESTION, turn("assistant", ""), turn("user", "what?"), turn("assistant", "Yes")]
    prepare(chat_config(tmp_path / "data", chats(tmp_path / "a.jsonl", talk), tokenizer))
    assert learnt(tmp_path / "data") == [["Yes</s>"]]


def test_calls_that_the_template_leaves_out_are_an_empty_turn(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", OLMO_THINKER)
    corpus = chats(tmp_path / "a.jsonl", CALLS[:2], [QUESTION, turn("assistant", "<think>Hm.</think>Yes")])
    manifest = prepare(chat_config(tmp_path / "data", corpus, tokenizer))
    assert learnt(tmp_path / "data") == [[], ["Hm.</think>Yes</s>"]]
    assert targets(manifest).empty_turns == 1


# Tools and parts.


def test_tools_from_lines_tables_and_datasets(tmp_path: Path) -> None:
    """In a table every object has every field; those that are null must not reach the template."""
    tokenizer = write_tokenizer(tmp_path / "hf", QWEN_3, LLAMA)
    other = [turn("user", "Hello"), turn("assistant", None, tool_calls=[call(day="Monday")])]
    records: list[dict[str, Any]] = [
        {"messages": CALLS, "tools": [WEATHER]},
        {"messages": other, "tools": [{"type": "function", "function": {"name": "day", "strict": True}}]},
        {"messages": [QUESTION, ANSWER]},
    ]
    lines = write_lines(tmp_path / "a.jsonl", *records)
    as_text = write_lines(
        tmp_path / "b.jsonl", *({**one, "tools": json.dumps(one["tools"])} for one in records[:2]), records[2]
    )
    table = pa.Table.from_pylist(records)
    assert table["messages"][0][1]["tool_calls"][0]["function"]["arguments"]["day"].as_py() is None
    (tmp_path / "hub").mkdir()
    for name in ("a.parquet", "hub/train-0.parquet"):
        pq.write_table(table, str(tmp_path / name))
    kwargs: dict[str, Any] = {"turns": Turns.expand, "id_field": None}
    for name, corpus in (("lines", lines), ("text", as_text), ("table", tmp_path / "a.parquet")):
        prepare(chat_config(tmp_path / name, corpus, tokenizer, **kwargs))
    streamed: dict[str, Any] = {"kind": SourceKind.datasets, "name": str(tmp_path / "hub"), "paths": []}
    cfg = chat_config(tmp_path / "hub_data", lines, tokenizer, **kwargs)
    source = dataclasses.replace(cfg.data.source, **streamed)
    prepare(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=source)))
    shards = {name: contents(tmp_path / name / "train") for name in ("lines", "text", "table", "hub_data")}
    assert all(files == shards["lines"] for files in shards.values())

    calls = [json.dumps({"name": "weather", "arguments": {"at": place}}) for place in ("Bern", "Zug")]
    written = "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in calls)
    thought = "<think>\n\n</think>\n\n"
    assert learnt(tmp_path / "lines")[:2] == [
        [f"{thought}{written}<|im_end|>"],
        [f"{thought}8 and 7.<|im_end|>"],
    ]
    reference = AutoTokenizer.from_pretrained(tokenizer)
    expected = reference.apply_chat_template(CALLS, tools=[WEATHER], tokenize=False)
    assert read_texts(tmp_path / "lines", "train")[1] == expected
    prepare(chat_config(tmp_path / "without", lines, tokenizer, tools_field=None, **kwargs))
    assert not any("<tools>" in text for text in read_texts(tmp_path / "without", "train"))


def test_parts_reach_a_template_that_takes_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    corpus = chats(tmp_path / "a.jsonl", [turn("user", parts), turn("assistant", parts[1:])])
    for name, (asked, answer) in {
        "parts": ("[Hello][there]", "[there]<|eot_id|>"),
        "tulu 3": ("Hello there", "there</s>"),
    }.items():
        tokenizer = write_tokenizer(tmp_path / name, TEMPLATES[name])
        prepare(chat_config(tmp_path / f"{name} data", corpus, tokenizer))
        assert learnt(tmp_path / f"{name} data") == [[answer]]
        assert asked in read_texts(tmp_path / f"{name} data", "train")[0]
