"""From conversations and an HF directory to a fine-tuned HF directory that keeps the chat template."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.chat_templates import TULU_3, turn, write_tokenizer
from tests.support.commands import olmoe
from tests.support.data import read_documents
from tests.support.faults import records
from tests.support.sizes import SIZES

# The special tokens of write_tokenizer().
MODEL = SIZES | {"vocab_size": 320, "eos_token_id": 1, "pad_token_id": 2}
TALKS = [
    [
        turn("user", f"what is {i}?"),
        turn("assistant", "It is nothing."),
        turn("user", "Yes"),
        turn("assistant", "of"),
    ]
    for i in range(40)
]


def test_fine_tuning_keeps_the_chat_template(tmp_path: Path) -> None:
    base = write_tokenizer(tmp_path / "base", "no template of its own")
    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**MODEL)).save_pretrained(base)
    lines = [json.dumps({"messages": talk}) + "\n" for talk in TALKS]
    (tmp_path / "chats.jsonl").write_text("".join(lines))

    prepare = [
        *("data=chat", "data.source.paths=[chats.jsonl]", "data.source.validation_fraction=0.2"),
        *("tokenizer.path=base", "tokenizer.chat_template=tulu", "data.dir=chats"),
    ]
    assert (result := olmoe("prepare", *prepare, cwd=tmp_path)).returncode == 0, result.stderr
    train = [
        *("experiment=olmoe_sft", "model.init_from=base", "data.dir=chats", "run_dir=run"),
        *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "trainer.precision=fp32"),
        *(
            "data.sequence_length=128",
            "trainer.log_every=1",
            "logging.wandb.mode=disabled",
            "optimizer.lr=0.003",
        ),
    ]
    assert (result := olmoe("train", *train, cwd=tmp_path)).returncode == 0, result.stderr
    loss = "eval/validation/loss"
    evaluations = records(tmp_path / "run", loss)
    assert evaluations[-1][loss] < evaluations[0][loss] - 0.2
    export = ["source=run", "step=latest", "out=tuned"]
    assert (result := olmoe("export", *export, cwd=tmp_path)).returncode == 0, result.stderr

    talk = ["generate", "chat=true", "max_new_tokens=8"]
    said = [
        olmoe(*talk, f"source={source}", cwd=tmp_path, stdin="what is 1?\nYes\n")
        for source in ("run", "tuned")
    ]
    assert [result.returncode for result in said] == [0, 0], said
    assert said[0].stdout == said[1].stdout
    assert len(said[0].stdout.strip()) > 2

    AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    rendered = [tokenizer.apply_chat_template(talk)["input_ids"] for talk in TALKS]
    found = [
        document for name in ("train", "validation") for document in read_documents(tmp_path / "chats", name)
    ]
    assert sorted(found) == sorted(rendered)
    bos: Any = AutoTokenizer.from_pretrained(base)
    bos.chat_template = TULU_3
    assert bos.apply_chat_template(TALKS[0])["input_ids"] == rendered[0]
