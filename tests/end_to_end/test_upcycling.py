"""Dense training, upcycling and training on, as a person would type it."""

import shlex
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Quickstart
from tests.support.commands import olmoe, run, train_command
from tests.support.faults import metrics, records

DENSE = ["model.num_experts=1", "model.num_experts_per_tok=1", "model.intermediate_size=32"]


def validation_losses(run_dir: Path) -> list[float]:
    loss = "eval/validation/loss"
    return [record[loss] for record in records(run_dir, loss)]


def test_an_upcycled_model_starts_where_the_dense_one_ended(quickstart: Quickstart, tmp_path: Path) -> None:
    options = [f"data.dir={quickstart.data_dir}", "logging.wandb.mode=disabled"]
    one_rank = [*options, *DENSE, "parallel.expert_parallel_size=1", "run_dir=dense"]
    dense = run(*train_command(*one_rank, ranks=1), cwd=tmp_path)
    assert dense.returncode == 0, dense.stderr

    upcycled = olmoe(
        "upcycle", "source=dense", "out=moe", "num_experts=8", "num_experts_per_tok=4",
        "intermediate_size=16", f"data_dir={quickstart.data_dir}", cwd=tmp_path,
    )  # fmt: skip
    assert upcycled.returncode == 0, upcycled.stderr
    assert "the dense model's outputs: in fp32 logits up to" in upcycled.stdout
    printed = upcycled.stdout.split("to train it: ")[1]

    trained = run(*train_command(*options, *shlex.split(printed), "run_dir=trained"), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    losses = validation_losses(tmp_path / "trained")
    dense_losses = validation_losses(tmp_path / "dense")
    assert losses[0] == pytest.approx(dense_losses[-1], rel=1e-5)
    assert losses[-1] < losses[0] < dense_losses[0]
    assert metrics(tmp_path / "trained")[0]["router/entropy"] > 0, "eight experts, no dense model"

    written = olmoe("generate", "source=moe", "prompt=def main(", "max_new_tokens=4", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("def main(")

    again = olmoe(
        "upcycle", "source=moe", "out=more", "num_experts=16", "num_experts_per_tok=4", cwd=tmp_path
    )
    assert again.returncode == 2
    assert "not a dense model: it has 8 experts per layer" in again.stderr
    assert not (tmp_path / "more").exists()
