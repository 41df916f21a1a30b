"""Chat templates render as Transformers' apply_chat_template renders them, to the same tokens."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from olmoe_train.config.data import TokenizerConfig
from olmoe_train.data.chat_template import ChatTemplate, TemplateError
from olmoe_train.data.prepare.loss_mask import align_spans, mark_targets
from olmoe_train.data.tokenizer import chat_template_from_config, load_for_encoding, tokenizer_from_config
from tests.support.chat_templates import EOS, LLAMA, TEMPLATES, turn, write_tokenizer

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [turn("user", "What is it?"), turn("assistant", "It is nothing.")],
    [turn("system", "Be terse."), turn("user", "größer & <b>"), turn("assistant", "漢字 'ok' \"ok\"")],
    [
        turn("user", "  Hello\n\nthere  ", extra={"ü": [1, None, "<&>"], "a": True}),
        turn("assistant", "\tYes:\n  no ", thinking="Hm."),
        turn("user", "what?", extra=None),
        turn("assistant", "(note)", reasoning=None, tool_calls=None),
    ],
    [turn("user", "Only a question")],
    [turn("user", "one"), turn("user", "two")],
    [turn("tool", "{}"), turn("assistant", "")],
]


def theirs(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their tokenizer, on the day that ours is told."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Day":
            return cls(2024, 7, 4, 15, 30)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)
    return AutoTokenizer.from_pretrained(directory)


def ours(directory: Path) -> tuple[ChatTemplate, Tokenizer]:
    cfg = TokenizerConfig(path=str(directory), template_date="2024-07-04")
    template = chat_template_from_config(cfg, tokenizer_from_config(cfg))
    return template, load_for_encoding(directory / "tokenizer.json", plain_text=False)


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, in_config: bool
) -> None:
    directory = write_tokenizer(tmp_path / "hf", TEMPLATES[name], in_config=in_config)
    (template, tokenizer), reference = ours(directory), theirs(directory, monkeypatch)
    rendered = 0
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            try:
                expected = reference.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            except Exception:  # as the template says, in jinja2's words
                with pytest.raises(TemplateError):
                    template.render(messages, prompt)
                continue
            rendered += 1
            text = template.render(messages, prompt)
            assert text == expected
            ids = reference.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert rendered >= 6


def test_same_targets_as_a_template_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_tokenizer(tmp_path / "hf", TEMPLATES["modern"], LLAMA)
    (template, tokenizer), reference = ours(directory), theirs(directory, monkeypatch)
    for messages in (CONVERSATIONS[0], CONVERSATIONS[2]):
        found = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        text, spans = template.render_conversation(messages)
        assert spans is not None

        def encode(part: str) -> list[int]:
            return tokenizer.encode(part, add_special_tokens=False).ids

        ids = encode(text)
        ended, targets = mark_targets(ids, align_spans(text, spans, ids, encode), EOS, eos_is_target=False)
        assert ids == found["input_ids"]
        assert ended == [*ids, EOS]
        assert targets.tolist() == [*found["assistant_masks"], 0]
        assert sum(targets) > 3


def test_named_templates(tmp_path: Path) -> None:
    """Several in tokenizer_config.json: the default one, as Transformers chooses."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}!"}]
    directory = write_tokenizer(tmp_path / "hf", named, in_config=True)  # type: ignore[arg-type]
    reference = AutoTokenizer.from_pretrained(directory)
    expected = reference.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert ours(directory)[0].render(CONVERSATIONS[0]) == expected == "</s>!"
