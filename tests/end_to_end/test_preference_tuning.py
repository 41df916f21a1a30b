"""From pairs and a chat model to a preference-tuned HF directory, as in docs/guides/preferences.md."""

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.chat_templates import TULU_3, turn, write_tokenizer
from tests.support.commands import olmoe
from tests.support.faults import metrics, records
from tests.support.sizes import SIZES

# The special tokens of write_tokenizer().
MODEL = SIZES | {"vocab_size": 320, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 64}
LAYOUT = ("--nproc", "2", "parallel.expert_parallel_size=2", "trainer.precision=fp32")
BATCH = ("trainer.global_batch_size=8", "trainer.micro_batch_size=2")


def write_inputs(directory: Path) -> None:
    base = write_tokenizer(directory / "HF_DIR", TULU_3)
    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**MODEL)).save_pretrained(base)
    pairs = []
    for number in range(64):
        ask, answers = turn("user", f"what is {number}?"), ("It is nothing.", f"Yes, of {number} there")
        chosen, rejected = ([ask, turn("assistant", answer)] for answer in answers)
        pairs.append({"chosen": chosen, "rejected": rejected})
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_a_chat_model_is_tuned_on_pairs(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    prepare = ("data=preference", "data.source.paths=[pairs.jsonl]", "tokenizer.path=HF_DIR")
    result = olmoe("prepare", *prepare, "data.dir=pairs", "data.sequence_length=64", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "preferences 64 pairs" in result.stdout

    recipe = ("experiment=olmoe_dpo", "model.init_from=HF_DIR", "data.dir=pairs", *LAYOUT, *BATCH)
    stored = ("objective.logprobs_dir=stored",)
    result = olmoe("logprobs", *recipe, *stored, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "log-probabilities of 124 completions for training and 4 for validation: stored" in result.stdout
    train = ("optimizer.lr=0.001", "trainer.log_every=1", "logging.wandb.mode=disabled", "run_dir=run")
    result = olmoe("train", *recipe, *stored, *train, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "log-probabilities of the reference: read from stored" in result.stdout + result.stderr
    steps = metrics(tmp_path / "run")
    assert abs(steps[0]["train/loss"] - math.log(2)) < 1e-6  # also with the file of another command
    assert steps[-1]["rewards/accuracies"] == 1
    assert records(tmp_path / "run")[-1]["eval/validation/rewards/accuracies"] == 1

    assert (result := olmoe("export", "source=run", "out=tuned", cwd=tmp_path)).returncode == 0, result.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    talk = ("source=tuned", "chat=true", "max_new_tokens=8")
    result = olmoe("generate", *talk, cwd=tmp_path, stdin="what is 7?\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "It is nothing."


def test_wrong_commands_say_what_to_do(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    result = olmoe("logprobs", "data.dir=pairs", "trainer.max_steps=1", cwd=tmp_path)
    assert result.returncode == 2
    assert "objective=next_token: has no reference; set objective=preference" in result.stderr
    result = olmoe(
        *("logprobs", "objective=preference", "objective.reference=live"),
        *("data.dir=pairs", "trainer.max_steps=1"),
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert (
        "objective.reference=live: log-probabilities are stored for objective.reference=cached"
        in result.stderr
    )
