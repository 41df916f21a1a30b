"""Chat templates render as Transformers' apply_chat_template renders them, to the same tokens."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from olmoe_train.config.data import TokenizerConfig
from olmoe_train.data.chat_template import ChatTemplate, Conversation, TemplateError
from olmoe_train.data.prepare.loss_mask import align_spans, mark_targets
from olmoe_train.data.tokenizer import chat_template_from_config, load_for_encoding, tokenizer_from_config
from tests.support.chat_templates import EOS, LLAMA, QWEN_3, TEMPLATES, turn, write_tokenizer

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

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "1", "function": {"name": name, "arguments": arguments}}


WITH_TOOLS: list[list[dict[str, Any]]] = [
    [
        turn("user", "How warm is it in Zürich & Bern?"),
        turn("assistant", None, tool_calls=[call("weather", {"at": "Zürich"}), call("weather", '{"at": 1}')]),
        turn("tool", "8", tool_call_id="1"),
        turn("tool", "7", name="weather"),
        turn("assistant", "8 and 7.", reasoning="Hm."),
    ],
    [
        turn("system", "Be terse."),
        turn("user", "Hello"),
        turn("assistant", "Wait.", tool_calls=[call("weather", {"at": None})]),
        turn("tool", ""),
        turn("assistant", "", tool_calls=[]),
    ],
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


@pytest.mark.parametrize("tools", [None, [], [WEATHER]])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_same_text_with_tools_and_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Any, kwargs: dict[str, Any]
) -> None:
    directory = write_tokenizer(tmp_path / "hf", QWEN_3)
    (template, _), reference = ours(directory), theirs(directory, monkeypatch)
    for messages in WITH_TOOLS:
        for length in range(1, len(messages) + 1):
            for prompt in (False, True):
                expected = reference.apply_chat_template(
                    messages[:length], tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs
                )
                assert template.render(messages[:length], prompt, tools, kwargs) == expected
    assert '"name": "weather"' in template.render(WITH_TOOLS[0], tools=[WEATHER])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("llama 2", "mistral")])
def test_content_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The list itself where the template takes it, else its parts joined as Transformers' server does."""
    directory = write_tokenizer(tmp_path / "hf", TEMPLATES[name])
    (template, _), reference = ours(directory), theirs(directory, monkeypatch)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two's"}]
    messages = [turn("user", parts), turn("assistant", [{"type": "text", "text": "<think>Hm.</think>Yes"}])]
    joined = [turn("user", "one two's"), turn("assistant", "<think>Hm.</think>Yes")]
    expected = reference.apply_chat_template(messages if name == "parts" else joined, tokenize=False)
    resolved = template.with_text_content(Conversation(messages))
    assert template.render(resolved.messages) == expected
    assert ("[one][two's]" in expected) == (name == "parts")


def test_same_targets_as_a_template_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_tokenizer(tmp_path / "hf", TEMPLATES["modern"], LLAMA)
    (template, tokenizer), reference = ours(directory), theirs(directory, monkeypatch)
    for messages in (CONVERSATIONS[0], CONVERSATIONS[2]):
        found = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        rendered = template.render_conversation(Conversation(messages))
        text, spans = rendered.text, rendered.spans
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
    """Of several, the one that Transformers chooses: tool_use if the conversation has tools, else default."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}!"}]
    listed = write_tokenizer(tmp_path / "listed", named)
    in_files = write_tokenizer(tmp_path / "in_files", "{{ eos_token }}!")
    (in_files / "additional_chat_templates").mkdir()
    (in_files / "additional_chat_templates/tool_use.jinja").write_text("tools")
    for directory in (listed, in_files):
        reference, (template, _) = AutoTokenizer.from_pretrained(directory), ours(directory)
        for tools, text in ((None, "</s>!"), ([WEATHER], "tools"), ([], "tools")):
            expected = reference.apply_chat_template(CONVERSATIONS[0], tools=tools, tokenize=False)
            assert template.render(CONVERSATIONS[0], tools=tools) == expected == text
