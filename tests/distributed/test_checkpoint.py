"""Saving on some ranks and going on with others: same weights and moments, same next step."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.directory import CheckpointError, checkpoint_path, latest_checkpoint
from olmoe_train.checkpoint.planned_files import planned_files
from olmoe_train.checkpoint.sharded import load_checkpoint, save_checkpoint, training_tensors
from olmoe_train.config.choices import Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.support.ranks import run_ranks
from tests.support.tiny import build, train_step, whole, whole_state

# 6 over 4 ranks is 2, 2, 2 and nothing; 97 over 4 is 25, 25, 25, 22.
UNEVEN: dict[str, Any] = {"hidden_size": 6, "num_attention_heads": 1, "vocab_size": 97}
FSDP, HSDP = ParallelConfig(), ParallelConfig(replicate_size=2)
# Ranks and layout of each run, which goes on from what the one before has saved.
CHAIN = [
    (4, FSDP),
    (4, ParallelConfig(expert_parallel_size=4)),
    (2, ParallelConfig(strategy=Strategy.ddp)),
    (4, ParallelConfig(expert_parallel_size=2)),
    (1, FSDP),
    (4, HSDP),
    (2, ParallelConfig(strategy=Strategy.ddp, expert_parallel_size=2)),
    (4, ParallelConfig(replicate_size=2, expert_parallel_size=2)),
    (2, FSDP),
    (4, FSDP),
]


def train_and_save(
    run_dir: Path, parallel: ParallelConfig, sizes: dict[str, Any] = UNEVEN
) -> tuple[dict[str, Tensor], float]:
    """The state saved after two steps, and the loss of the third, which was not."""
    model, optimizer = build(parallel, **sizes)
    for step in range(2):
        train_step(model, optimizer, step)
    with torch.no_grad():  # as an evaluation does; it leaves the root's parameters gathered
        model.training_forward(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    save_checkpoint(run_dir, 2, model, optimizer, {"samples": 16})
    compare_with_plan(run_dir, model, optimizer)
    state = whole_state(model, optimizer)
    return state, train_step(model, optimizer, 2)


def compare_with_plan(run_dir: Path, model: OlmoeForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """The files of a checkpoint, and the bytes of their tensors, are those that each rank plans for all."""
    found = {}
    for path in checkpoint_path(run_dir, 2).glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        found[path.name] = path.stat().st_size - 8 - header
    tensors, _ = training_tensors(model, optimizer)
    planned = planned_files(tensors, dist.get_world_size())
    assert found == {name: size for of_rank in planned for name, size in of_rank.items()}


def resume(
    run_dir: Path, parallel: ParallelConfig, save_to: Path, sizes: dict[str, Any] = UNEVEN
) -> tuple[Any, dict[str, Tensor], float]:
    model, optimizer = build(parallel, seed=999, **sizes)
    train_step(model, optimizer, 5)  # whatever was there before is gone after loading
    state = load_checkpoint(checkpoint_path(run_dir, 2), model, optimizer)
    tensors = whole_state(model, optimizer)
    save_checkpoint(save_to, 2, model, optimizer, state)
    compare_with_plan(save_to, model, optimizer)
    return state, tensors, train_step(model, optimizer, 2)


# Two experts are cut inside over four ranks, and one on each of two.
FEW: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1}
FEW_CHAIN = [(4, FSDP), (2, FSDP), (4, FSDP)]


@pytest.mark.parametrize(("chain", "sizes"), [(CHAIN, UNEVEN), (FEW_CHAIN, FEW)], ids=["uneven", "few"])
def test_a_checkpoint_goes_on_in_any_layout(
    tmp_path: Path, chain: list[tuple[int, ParallelConfig]], sizes: dict[str, Any]
) -> None:
    (ranks, layout), *others = chain
    saved, loss = run_ranks(ranks, train_and_save, tmp_path / "0", layout, sizes)[0]
    assert saved["lm_head.weight/step"] == 2
    for link, (ranks, layout) in enumerate(others):
        at, to = tmp_path / f"{link}", tmp_path / f"{link + 1}"
        state, loaded, loss_after = run_ranks(ranks, resume, at, layout, to, sizes)[0]
        assert state == {"samples": 16}
        assert saved.keys() == loaded.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor, loaded[name]), (ranks, layout, name)
        assert loss_after == pytest.approx(loss, rel=1e-6)
    assert loss_after == loss  # four shards again: bit for bit what the run that did not stop got


def load_damaged(run_dir: Path) -> None:
    model, optimizer = build()
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    before = {name: whole(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"shard-00002-.* is damaged"):
        load_checkpoint(latest, model, optimizer)
    assert all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
    assert not optimizer.state


def test_every_rank_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, tmp_path, FSDP)
    shard = next(checkpoint_path(tmp_path, 2).glob("shard-00002-*"))
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 128]))
    run_ranks(2, load_damaged, tmp_path)


def load_other_model(run_dir: Path) -> None:
    model, optimizer = build(**UNEVEN | {"num_experts": 4})
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    with pytest.raises(UserError, match="another model's") as caught:
        load_checkpoint(latest, model, optimizer)
    assert not isinstance(caught.value, CheckpointError)  # the one before it would not fit either
    assert "mlp.experts.gate_up_proj is [8, 32, 6] there, [4, 32, 6] here" in str(caught.value)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    run_ranks(1, train_and_save, tmp_path, FSDP)
    run_ranks(1, load_other_model, tmp_path)
