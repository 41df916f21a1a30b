"""An elastic launch is checked for every number of ranks that it may start."""

from pathlib import Path
from typing import Any

import pytest

from olmoe_train.cli.torchrun import main as launch
from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import BalanceScope
from olmoe_train.distributed.rendezvous import ELASTIC_RANKS
from olmoe_train.training.preflight.elastic import elastic_errors
from tests.support.faults import config


def errors(monkeypatch: pytest.MonkeyPatch, ranks: str, now: int = 2, **changes: Any) -> str:
    """What is wrong with a launch of `ranks`, with micro-batches of 2 sequences."""
    monkeypatch.setenv(ELASTIC_RANKS, ranks)
    changes = {"parallel": {"expert_parallel_size": 1}, "trainer": {"global_batch_size": 24}} | changes
    return "\n".join(elastic_errors(config(Path("data"), Path("run"), **changes), now))


def test_sizes_that_fit_all_numbers_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors(monkeypatch, "") == errors(monkeypatch, "1,2,3,4") == ""


def test_a_number_of_ranks_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = errors(monkeypatch, "1,2,3,4", trainer={"global_batch_size": 16})
    assert text.startswith(
        "3 ranks, which torchrun's --nnodes allows: trainer.global_batch_size=16: must be a"
    )
    assert "the configuration fits 1, 2, 4 of 1, 2, 3, 4 ranks" in text
    # A pass of 1, 2, 3 or 4 ranks has 2, 4, 6 or 8 sequences; their least common multiple is 24.
    assert text.endswith("for all of them trainer.global_batch_size must be a multiple of 24, such as 24")
    text = errors(monkeypatch, "1,2", parallel={"expert_parallel_size": 2})
    assert text.startswith("1 rank, which torchrun's --nnodes allows: parallel.expert_parallel_size=2: must")
    assert text.endswith("the configuration fits 2 of 1, 2 ranks")


def test_a_loss_that_depends_on_the_number_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    balancing = AuxiliaryLossConfig(scope=BalanceScope.all_ranks)
    assert "set balancing.scope=global_batch" in errors(monkeypatch, "1,2", balancing=balancing)
    accepted = {"allow_changes": ["balancing"]}
    assert errors(monkeypatch, "1,2", balancing=balancing, checkpoint=accepted) == ""


def test_the_launcher_hands_on_the_numbers_of_ranks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ELASTIC_RANKS, "")  # what the launcher sets must not outlive the test
    program = ["--no-python", "bash", "-c", f"echo ranks ${ELASTIC_RANKS}"]
    here = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc-per-node=2"]
    assert launch([*here, "--nnodes=1:3", "--rdzv-conf=last_call_timeout=1", *program]) == 0
    assert "ranks 2,4,6" in capfd.readouterr().out
