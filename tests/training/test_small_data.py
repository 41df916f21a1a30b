"""A recipe for large data on data that is smaller than one of its steps."""

import math
from pathlib import Path

import pytest

from olmoe_train.config import compose
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.train import train
from tests.support.chat_templates import TULU_3, turn, write_tokenizer
from tests.support.chats import chat_config, chats
from tests.support.faults import records
from tests.support.sizes import SIZES, overrides, section

# The special tokens of write_tokenizer(). experiment=olmoe_sft has the released number of key-value heads.
MODEL = SIZES | {"vocab_size": 320, "num_key_value_heads": 4, "eos_token_id": 1, "pad_token_id": 2}
MODEL |= {"max_position_embeddings": 128, "num_hidden_layers": 1}  # 128 sequences make a step
TALKS = [[turn("user", f"what is {i}?"), turn("assistant", "It is nothing.")] for i in range(60)]


@pytest.mark.parametrize("count", [60, 1])
def test_few_conversations_are_trained_with_no_key_but_the_paths(tmp_path: Path, count: int) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TULU_3)
    corpus = chats(tmp_path / "chats.jsonl", *TALKS[:count])
    manifest = prepare(chat_config(tmp_path / "data", corpus, tokenizer, validation_fraction=1e-6))
    assert manifest.split_note
    assert manifest.validation.documents == (1 if count > 1 else 0)

    paths = ["model.init_from=null", f"data.dir={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}"]
    cfg = compose("experiment=olmoe_sft", *paths, *overrides(section("model", MODEL)))
    assert cfg.data.sequence_length == 128
    assert train(cfg).step == 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "trainer.global_batch_size=128 sequences is more than an epoch, which has " in log
    assert "The run has 1 step, and its learning rate is 0: the weights do not change. For" in log
    loss = "eval/validation/loss"
    losses = [record[loss] for record in records(tmp_path / "run", loss)]
    assert len(losses) == (2 if count > 1 else 0)
    assert all(map(math.isfinite, losses))
    assert ("no validation split" in log) == (count == 1)
