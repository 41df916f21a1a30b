"""Conversations, and prompts with completions, become documents with a loss mask on what is to be learnt."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from olmoe_train.config.choices import OnBadRecord, Records, SourceKind
from olmoe_train.config.reference import config_directory
from olmoe_train.data.chat_template import Conversation, open_template, read_template
from olmoe_train.data.manifest import Manifest, Targets
from olmoe_train.data.prepare.limits import Limits
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.utils.errors import UserError
from tests.support.chat_templates import (
    EOS,
    GPT_2,
    LLAMA,
    LLAMA_3,
    MISTRAL,
    TEMPLATES,
    TULU_3,
    turn,
    write_tokenizer,
)
from tests.support.chats import chat_config as config
from tests.support.chats import chats, learnt, write_lines
from tests.support.data import contents, read_documents

CONVERSATION = [
    turn("user", "Hello there"),
    turn("assistant", "It is."),
    turn("user", "what?"),
    turn("assistant", "Yes"),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["It is.<|im_end|>", "Yes<|im_end|>"]),
        ("llama 2", [" It is. </s>", " Yes </s>"]),
        ("llama 3", ["It is.<|eot_id|>", "Yes<|eot_id|>"]),
        ("zephyr", ["It is.</s>", "Yes</s>"]),
        ("tulu 3", ["It is.</s>", "Yes</s>"]),
        ("mistral", ["It is.</s>", "Yes</s>"]),
        ("modern", ["It is.<|im_end|>", "Yes<|im_end|>"]),
    ],
)
def test_the_assistants_turns_are_learnt_and_nothing_else(
    tmp_path: Path, name: str, expected: list[str]
) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", TEMPLATES[name], LLAMA if name == "llama 3" else GPT_2)
    corpus = chats(tmp_path / "a.jsonl", CONVERSATION, CONVERSATION[:2])
    template = tokenizer / "chat_template.jinja"
    manifest = prepare(config(tmp_path / "data", corpus, tokenizer, template))
    assert learnt(tmp_path / "data") == [expected, expected[:1]]
    assert manifest.targets is not None
    assert (manifest.targets.unaligned, manifest.targets.without_target) == (0, 0)
    for document in read_documents(tmp_path / "data", "train"):
        assert document[-1] == EOS
        assert document[-2] != EOS, "eos of the template's own is the document's"


def test_a_conversation_that_cannot_be_aligned_is_masked_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt ends with "]" and the second answer begins with "(": for this tokenizer one token, "]("."""
    tokenizer = write_tokenizer(tmp_path / "hf", MISTRAL)
    pair = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode("](")
    assert len(pair.ids) == 1
    straddled = [*CONVERSATION[:3], turn("assistant", "(note) of it")]
    corpus = chats(tmp_path / "a.jsonl", CONVERSATION[:2], straddled, CONVERSATION[:1])
    manifest = prepare(config(tmp_path / "data", corpus, tokenizer))
    assert learnt(tmp_path / "data") == [["It is.</s>"], [], []]
    tokens = len(Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode("It is.</s>").ids)
    assert manifest.targets == Targets(
        conversations=3,
        unaligned=1,
        without_target=2,
        tokens=tokens,
        ends_with_user=1,
        gain_by_expanding=1,  # its first turn would be found
    )
    line = f"targets     {tokens} tokens of 3 documents; 2 documents have none (in 1 the target text was not"
    assert line in capsys.readouterr().out


NOT_PREFIXES = {
    # As reasoning models' templates drop what was thought in earlier turns.
    "changes earlier turns": (
        "{% for m in messages %}{{ m.role }}:{% if loop.last %}<think>{% endif %}{{ m.content }}</s>"
        "{% endfor %}"
    ),
    "prompt is not how a turn begins": (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    ),
    "refuses the prompt": (
        "{% if messages|length == 3 %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    ),
    "marks within a macro": (
        "{% macro say(m) %}{{ m.role }}:{% generation %}{{ m.content }}</s>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", NOT_PREFIXES)
def test_a_template_that_does_not_let_turns_be_told(tmp_path: Path, name: str) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", NOT_PREFIXES[name])
    template = open_template(NOT_PREFIXES[name], {}, None, "here")
    rendered = template.render_conversation(Conversation(CONVERSATION))
    assert "what?" in rendered.text
    assert rendered.spans is None
    corpus = chats(tmp_path / "a.jsonl", CONVERSATION, CONVERSATION)
    with pytest.raises(
        UserError, match=r"no training target in 2 documents; in 2 of them the target text was not"
    ):
        prepare(config(tmp_path / "data", corpus, tokenizer))


def test_a_prompt_whose_last_token_depends_on_what_follows(tmp_path: Path) -> None:
    r"""GPT-2's splitting has "\n\n" as one token at the end of a prompt, and as two before a word: no offset
    shows it, but the model would be trained on other tokens than it is prompted with."""
    tokenizer = write_tokenizer(tmp_path / "hf", LLAMA_3, GPT_2)
    corpus = chats(tmp_path / "a.jsonl", CONVERSATION)
    with pytest.raises(UserError, match="no training target in 1 documents; in 1 of them"):
        prepare(config(tmp_path / "data", corpus, tokenizer))


def test_prompts_and_completions(tmp_path: Path) -> None:
    """The completion is learnt, and that it ends."""
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    records = [
        {"question": "what is it?", "answer": " It is\n"},
        {"question": "[INST] of [/INST]", "answer": "(note)"},  # straddled, as above
        {"question": "", "answer": "Yes</s>"},
        {"question": "Hello", "answer": ""},
    ]
    fields: dict[str, Any] = {
        "prompt_field": "question",
        "completion_field": "answer",
        "records": Records.prompt_completion,
    }
    corpus = write_lines(tmp_path / "a.jsonl", *records)
    manifest = prepare(config(tmp_path / "data", corpus, tokenizer, **fields))
    assert learnt(tmp_path / "data") == [[" It is\n</s>"], [], ["Yes</s>"], ["</s>"]]
    assert manifest.targets is not None
    assert (manifest.targets.unaligned, manifest.targets.without_target) == (1, 1)
    write_lines(corpus, *records, {"question": "x", "answer": None})
    with pytest.raises(UserError, match=r"a\.jsonl:5: its 'answer' is a JSON null, not a string"):
        prepare(config(tmp_path / "other", corpus, tokenizer, **fields))
    write_lines(corpus, *records, {"prompt": "x", "answer": "y"})
    with pytest.raises(UserError, match=r"a\.jsonl:5: no field 'question' \(data\.source\.prompt_field\)"):
        prepare(config(tmp_path / "other", corpus, tokenizer, **fields))


BAD: list[tuple[Any, str]] = [
    ({"text": "x"}, "no field 'messages' (data.source.messages_field); it has 'text'"),
    ({"messages": "hello"}, "its 'messages' is a JSON string, not a list"),
    ({"messages": []}, "its 'messages' has no message"),
    ({"messages": ["hello"]}, "message 1 is a JSON string, not an object"),
    ({"messages": [turn("user", "x"), {"content": "y"}]}, "message 2 has no 'role'"),
    ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
    ({"messages": [{"role": "user", "content": None}]}, "the 'content' of message 1 is a JSON null, not a"),
    ({"messages": [{"role": 1, "content": "x"}]}, "the 'role' of message 1 is a JSON number, not a string"),
    ({"messages": [turn("system", "x")]}, "the chat template refuses it: Conversation roles must alternate"),
    ({"messages": [turn("user", "\ud83d")]}, "its 'messages' has half a surrogate pair, \\ud83d, at 10"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_strict_names_path_and_line(tmp_path: Path, number: int) -> None:
    record, reason = BAD[number]
    tokenizer = write_tokenizer(tmp_path / "hf", MISTRAL)
    corpus = write_lines(tmp_path / "a.jsonl", {"messages": CONVERSATION}, record)
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "data", corpus, tokenizer))
    assert str(caught.value).startswith(f"{corpus}:2: {reason}")


def test_quarantine_keeps_bad_conversations(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", MISTRAL)
    records = [{"messages": CONVERSATION}, *(record for record, _ in BAD)]
    corpus = write_lines(tmp_path / "a.jsonl", *records)
    options: dict[str, Any] = {"on_bad_record": OnBadRecord.quarantine, "max_bad_fraction": 1.0}
    manifest = prepare(config(tmp_path / "data", corpus, tokenizer, **options))
    assert (manifest.train.documents, manifest.quarantined_records) == (1, len(BAD))
    lines = (tmp_path / "data/quarantine.jsonl").read_text().splitlines()
    for line, (record, reason) in zip(map(json.loads, lines), BAD, strict=True):
        assert line["reason"].startswith(reason)
        assert json.loads(line["record"]) == record


def test_tables_are_read_like_lines(tmp_path: Path) -> None:
    """A column of conversations, in which every message has every field, null where it has none."""
    tokenizer = write_tokenizer(tmp_path / "hf", TEMPLATES["modern"])
    thinking = [
        turn("user", "Hello"),
        turn("assistant", "Yes", thinking="what?"),
        turn("user", "of", extra=1),
    ]
    conversations = [CONVERSATION, thinking, CONVERSATION[:2]]
    corpus = chats(tmp_path / "a.jsonl", *conversations)
    rows = [{"id": i, "messages": one, "other": i} for i, one in enumerate(conversations)]
    pq.write_table(pa.Table.from_pylist(rows), str(tmp_path / "a.parquet"))
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), str(tmp_path / "hub/train-0.parquet"))
    template = tokenizer / "chat_template.jinja"
    lines = prepare(config(tmp_path / "lines", corpus, tokenizer, template))
    table = prepare(config(tmp_path / "table", tmp_path / "a.parquet", tokenizer, template))
    cfg = config(tmp_path / "streamed", corpus, tokenizer, template)
    source = dataclasses.replace(
        cfg.data.source, kind=SourceKind.datasets, name=str(tmp_path / "hub"), paths=[]
    )
    streamed = prepare(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=source)))
    assert lines.train == table.train == streamed.train
    assert lines.targets == table.targets == streamed.targets
    assert "<think>what?</think>Yes<|im_end|>" in learnt(tmp_path / "lines")[1]
    with pytest.raises(UserError, match=r"no column 'chat'; it has id, messages, other(.|\n)*messages_field"):
        prepare(config(tmp_path / "no", tmp_path / "a.parquet", tokenizer, template, messages_field="chat"))


def test_special_tokens_are_the_templates_to_write(tmp_path: Path) -> None:
    """Rendered, "</s>" is the token; in plain text it is four characters."""
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    corpus = write_lines(tmp_path / "a.jsonl", {"messages": CONVERSATION, "text": "It is</s> of"})
    prepare(config(tmp_path / "chat", corpus, tokenizer))
    prepare(config(tmp_path / "text", corpus, tokenizer, records=Records.text))
    [chat], [text] = (list(read_documents(tmp_path / name, "train")) for name in ("chat", "text"))
    assert (chat.count(EOS), text.count(EOS)) == (2, 1)
    assert not list((tmp_path / "text").rglob("*.mask.u8"))
    assert "mask_path" not in (tmp_path / "text/manifest.json").read_text()


def test_given_template_replaces_the_tokenizers_and_travels(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", MISTRAL, in_config=True)
    (tmp_path / "mine.jinja").write_text(TULU_3)
    corpus = chats(tmp_path / "a.jsonl", CONVERSATION)
    prepare(config(tmp_path / "data", corpus, tokenizer, tmp_path / "mine.jinja"))
    files = contents(tmp_path / "data/tokenizer")
    assert files["chat_template.jinja"] == TULU_3.encode()
    assert files["tokenizer_config.json"] == (tokenizer / "tokenizer_config.json").read_bytes()
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "data/tokenizer")
    [document] = read_documents(tmp_path / "data", "train")
    assert theirs.apply_chat_template(CONVERSATION)["input_ids"] == document
    with pytest.raises(UserError, match=r"other settings:\n    chat template: sha256:"):
        prepare(config(tmp_path / "data", corpus, tokenizer))
    # A tokenizer that is trained here has the template that it is given.
    prepare(config(tmp_path / "trained", corpus, None, tmp_path / "mine.jinja"))
    assert learnt(tmp_path / "trained") == [["It is.<|endoftext|>", "Yes<|endoftext|>"]]
    assert (tmp_path / "trained/tokenizer/chat_template.jinja").read_text() == TULU_3


def test_the_shipped_tulu_template_is_tulus(tmp_path: Path) -> None:
    shipped = read_template("tulu")
    assert shipped == read_template(str(config_directory() / "chat_templates/tulu.jinja"))
    talk = [turn("system", "Be terse."), *CONVERSATION]
    for special in ({"bos_token": "<s>", "eos_token": "</s>"}, {"eos_token": "</s>"}):
        ours = open_template(shipped, special, None, "tulu")
        theirs = open_template(TULU_3, {"bos_token": "</s>", **special}, None, "TULU_3")
        for messages, prompt in ((talk, False), (talk[:2], True), (talk[1:4], True)):
            assert ours.render(messages, prompt) == theirs.render(messages, prompt)


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    corpus = chats(tmp_path / "a.jsonl", CONVERSATION)
    bare = write_tokenizer(tmp_path / "bare", MISTRAL)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template(.|\n)*tokenizer\.chat_template=FILE\.jinja"):
        prepare(config(tmp_path / "data", corpus, bare))
    with pytest.raises(
        UserError, match=r"chat_template=tulip: no such file, and .*\n  Give .* one of: tulu\."
    ):
        prepare(config(tmp_path / "data", corpus, bare, Path("tulip")))
    with pytest.raises(UserError, match=r"tokenizer\.chat_template=.*nowhere\.jinja: .*No such file"):
        prepare(config(tmp_path / "data", corpus, bare, tmp_path / "nowhere.jinja"))
    (tmp_path / "broken.jinja").write_text("{{ bos_token }}\n{% if %}")
    with pytest.raises(UserError, match=r"broken\.jinja:2: not a chat template: Expected an expression"):
        prepare(config(tmp_path / "data", corpus, bare, tmp_path / "broken.jinja"))
    dated = write_tokenizer(tmp_path / "dated", TEMPLATES["modern"])
    with pytest.raises(UserError, match=r"depends on the day(.|\n)*tokenizer\.template_date=YYYY-MM-DD"):
        prepare(config(tmp_path / "data", corpus, dated))
    with pytest.raises(UserError, match=r"tokenizer\.template_date=4\.7\.: .*write it as YYYY-MM-DD"):
        open_template("{{ strftime_now('%d') }}", {}, "4.7.", "here")
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "escape.jinja").write_text(escape)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the chat template refuses it: .*is unsafe"):
        prepare(config(tmp_path / "data", corpus, bare, tmp_path / "escape.jinja"))
    (tmp_path / "change.jinja").write_text("{{ messages.append(1) }}")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the chat template refuses it: .*'append' .* is unsafe"):
        prepare(config(tmp_path / "data", corpus, bare, tmp_path / "change.jinja"))


def test_same_masks_from_one_process_and_from_three(tmp_path: Path) -> None:
    limits = Limits(batch_bytes=300)
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    conversations = [
        [turn("user", f"{i} Hello"), turn("assistant", "It is " * (i % 5) + str(i))] for i in range(60)
    ]
    corpus = chats(tmp_path / "a.jsonl", *conversations)
    options: dict[str, Any] = {"validation_fraction": 0.2, "shard_tokens": 200}
    one: Manifest = prepare(config(tmp_path / "one", corpus, tokenizer, **options, processes=1), limits)
    prepare(config(tmp_path / "three", corpus, tokenizer, **options, processes=3), limits)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(one.train.shards) > 3
    expected = {f"{'It is ' * (i % 5)}{i}</s>" for i in range(60)}
    found = [run for split in ("train", "validation") for [run] in learnt(tmp_path / "one", split)]
    assert len(found) == 60
    assert set(found) == expected


def test_entropy_is_that_of_the_targets(tmp_path: Path) -> None:
    """Add-one smoothed frequencies of the 5 + 5 training targets; three validation targets, by hand."""
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    train = {"prompt": "Hello there", "completion": "aaab"}
    corpus = write_lines(tmp_path / "a.jsonl", train, train)
    held = write_lines(tmp_path / "b.jsonl", {"prompt": "what is it?", "completion": "bb"})
    options: dict[str, Any] = {"records": Records.prompt_completion, "validation_paths": [str(held)]}
    manifest = prepare(config(tmp_path / "data", corpus, tokenizer, **options))
    total = 10 + manifest.vocab_size
    # b is 2 of the 10, eos 2 of the 10.
    nats = -(2 * np.log(3 / total) + np.log(3 / total)) / 3
    assert manifest.unigram_entropy == pytest.approx(nats)
    assert manifest.targets is not None
    assert manifest.targets.tokens == 13
