"""The commands of docs/guides/fine-tune.md for an adapter, on a toy model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.chat_templates import TEMPLATES, turn, write_tokenizer
from tests.support.chats import chats
from tests.support.commands import olmoe
from tests.support.faults import records
from tests.support.sizes import SIZES

# The special tokens of write_tokenizer(). The sequence length of the recipe is that of the model.
MODEL = SIZES | {"vocab_size": 400, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 128}


def command(line: str, cwd: Path, stdin: str = "") -> str:
    result = olmoe(*line.split(), cwd=cwd, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model in HF_DIR, and prepared conversations."""
    tmp_path = tmp_path_factory.mktemp("home")
    base = write_tokenizer(tmp_path / "HF_DIR", TEMPLATES["chatml"])
    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**MODEL)).save_pretrained(base)
    talks = [[turn("user", f"what is {i}?"), turn("assistant", "It is nothing.")] for i in range(60)]
    chats(tmp_path / "chats.jsonl", *talks)
    prepare = (
        "prepare data=chat data.source.paths=[chats.jsonl] tokenizer.path=HF_DIR data.dir=prepared/chats"
    )
    command(prepare, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_guide(home: Path) -> None:
    base = (home / "HF_DIR/model.safetensors").read_bytes()
    # The recipe's learning rate hardly changes random weights. fp32: logits are compared to 1e-5.
    toy = "optimizer.lr=0.01 trainer.precision=fp32"
    command(f"train experiment=olmoe_lora model.init_from=HF_DIR data.dir=prepared/chats {toy}", home)
    question = "what is 7?"
    talk = "chat=true temperature=0 max_new_tokens=16"
    answer = command(f"generate source=runs/olmoe_lora {talk}", home, question + "\n")
    command("export source=runs/olmoe_lora out=tuned", home)
    command("export source=runs/olmoe_lora out=adapter format=peft", home)
    assert (home / "HF_DIR/model.safetensors").read_bytes() == base
    assert command(f"generate source=tuned {talk}", home, question + "\n") == answer
    assert command(f"generate source=HF_DIR {talk}", home, question + "\n") != answer

    merged = AutoModelForCausalLM.from_pretrained(home / "tuned", dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(home / "HF_DIR", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(home / "tuned")
    ids = tokenizer.apply_chat_template(
        [turn("user", question)], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]

    def logits(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(ids).logits
        return found

    of_base, of_merged = logits(frozen), logits(merged)
    of_peft = logits(PeftModel.from_pretrained(frozen, str(home / "adapter")))
    assert (of_merged - of_base).abs().max() > 0.1
    assert (of_merged - of_peft).abs().max() < 1e-5
    expected = tokenizer.decode(of_merged[0, -1].argmax())
    assert answer.startswith(expected)


@pytest.mark.slow
def test_a_run_in_4_bits_starts_from_an_adapter(home: Path) -> None:
    recipe = "model.init_from=HF_DIR data.dir=prepared/chats trainer.precision=fp32 trainer.stop_at_step=2"
    command(f"train experiment=olmoe_qlora {recipe}", home)
    assert "64.7% of the model is held in 4 bits" in (home / "runs/olmoe_qlora/log.txt").read_text()
    command("export source=runs/olmoe_qlora out=quantized format=peft", home)
    continued = "model.adapter_from=quantized run_dir=runs/continued"
    command(f"train experiment=olmoe_qlora {recipe} {continued}", home)
    first, second = (
        records(home / "runs" / name, "eval/validation/loss")[0] for name in ("olmoe_qlora", "continued")
    )
    assert second["eval/validation/loss"] < first["eval/validation/loss"]
