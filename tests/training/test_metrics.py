"""Metrics by hand, and what happens to them when a run goes wrong or starts again."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from olmoe_train.config.choices import Packing, WandbMode
from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import LoggingConfig, TrainConfig, TrainerConfig, WandbConfig
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.evaluation.perplexity import Evaluation
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.outputs import TrainingOutput
from olmoe_train.run.loggers import forget_after, start_wandb
from olmoe_train.training.batch import Totals
from olmoe_train.training.metrics import MetricsWriter, StepMetrics, router_entropy
from olmoe_train.training.objectives.next_token import Losses
from olmoe_train.training.state import Progress
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
CONFIG = OlmoeConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=4,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=1,
    eos_token_id=0,
)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    init_distributed("cpu")
    yield
    dist.destroy_process_group()


def config(mode: WandbMode = WandbMode.disabled, dead_after: int = 2) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(dir="x", sequence_length=4),
        trainer=TrainerConfig(max_steps=9, log_every=1),
        logging=LoggingConfig(dead_expert_steps=dead_after, wandb=WandbConfig(mode=mode)),
    )


def add_step(metrics: StepMetrics, counts: list[list[float]], logits: torch.Tensor | None = None) -> Progress:
    """One step of one micro-batch of 8 tokens whose losses are 1, 2, 3 and 4."""
    logits = torch.zeros(8, 4) if logits is None else logits
    losses = Losses(*(torch.tensor(float(n)) for n in (1, 2, 3, 4)), torch.tensor(counts))
    output = TrainingOutput(torch.zeros(()), (logits, logits), ())
    totals = Totals(
        torch.tensor(8.0),
        torch.tensor(7.0),
        tokens_int=6,
        sequences_without_targets=1,
        repetitive_sequences=0,
        stop_requested=False,
    )
    metrics.start_step()
    metrics.add(losses, output, None, totals, with_entropy=True)
    return metrics.end_step(totals, samples=2)


def test_values_by_hand() -> None:
    metrics = StepMetrics(CONFIG, config(), Progress(step=10, tokens=80, samples=20), CPU)
    progress = add_step(metrics, [[2.0, 2.0, 2.0, 2.0], [6.0, 2.0, 0.0, 0.0]])
    assert (progress.step, progress.tokens, progress.samples) == (11, 86, 22)
    values = metrics.read(torch.tensor(0.5))
    assert [
        values[f"train/{name}"] for name in ("loss", "ce_loss", "load_balancing_loss", "router_z_loss")
    ] == [
        1.0,
        2.0,
        3.0,
        4.0,
    ]
    assert values["train/grad_norm"] == 0.5
    # Mean load 2; the largest is 2 in layer 0 and 6 in layer 1.
    assert values["router/layer_00/max_violation"] == 0.0
    assert values["router/layer_01/max_violation"] == values["router/max_violation"] == 2.0
    assert values["router/layer_01/load"] == [0.75, 0.25, 0.0, 0.0]
    assert values["router/entropy"] == pytest.approx(math.log(4))


def test_data_is_counted_between_logged_steps() -> None:
    cfg = replace(config(), data=DataConfig(dir="x", sequence_length=4, packing=Packing.best_fit))
    metrics = StepMetrics(CONFIG, cfg, Progress(), CPU)
    for steps in (3, 1):  # of 2 sequences with 8 places and 6 tokens, one of them without a target
        for _ in range(steps):
            add_step(metrics, [[2.0] * 4] * 2)
        values = metrics.read(torch.tensor(1.0))
        assert values["data/sequences_without_targets"] == steps
        assert values["data/padding"] == 0.25
        assert "data/repetitive_sequences" not in values


def test_an_expert_dies_after_steps_without_a_token_and_wakes_with_one() -> None:
    metrics = StepMetrics(CONFIG, config(dead_after=2), Progress(), CPU)
    dead = []
    for last in ([4.0, 4.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 1.0]):
        add_step(metrics, [[2.0, 2.0, 2.0, 2.0], last])
        dead.append(metrics.read(torch.tensor(1.0))["router/layer_01/dead_experts"])
    # Experts 2 and 3 have none in steps 1-2, expert 1 in steps 2-3; expert 3 wakes at 4.
    assert dead == [0, 2, 3, 2]
    # ... and a resumed run remembers.
    resumed = StepMetrics(CONFIG, config(), Progress(step=4, expert_last_used=metrics.last_used()), CPU)
    assert resumed.last_used() == [[4, 4, 4, 4], [4, 1, 0, 4]]


def test_entropy_by_hand_and_without_padding() -> None:
    # (3/4, 1/4): ln 4 - 3/4 ln 3 = 0.562335.
    logits = torch.tensor([[math.log(3.0), 0.0], [50.0, -50.0]])
    assert router_entropy((logits,), torch.tensor([1, 0])).item() == pytest.approx(0.5623351446)


def writer(tmp_path: Path, cfg: TrainConfig, step: int = 0) -> MetricsWriter:
    return MetricsWriter(cfg, tmp_path, CONFIG, Progress(step=step), CPU)


def records(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_gradient_that_is_not_finite_is_recorded_as_null(tmp_path: Path) -> None:
    metrics = StepMetrics(CONFIG, config(), Progress(), CPU)
    progress = add_step(metrics, [[2.0] * 4] * 2)
    writer(tmp_path, config()).log_step(progress, metrics.read(torch.tensor(math.nan)), 1e-3, 9)
    assert records(tmp_path)[0]["train/grad_norm"] is None


def test_a_resumed_run_forgets_the_steps_that_come_again(tmp_path: Path) -> None:
    first = writer(tmp_path, config())
    for step in (0, 2, 4, 6):
        first.log_evaluation(Progress(step=step), {"validation": Evaluation(loss=1.0, tokens=3)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')  # killed while writing
    writer(tmp_path, config(), step=4)
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4]
    forget_after(tmp_path / "metrics.jsonl", 0)  # no checkpoint: everything comes again
    assert records(tmp_path) == []


def test_wandb_offline_writes_a_run_and_disabled_writes_nothing(tmp_path: Path) -> None:
    assert start_wandb(WandbConfig(mode=WandbMode.disabled), tmp_path, {}) is None
    assert not (tmp_path / "wandb").exists()
    offline = writer(tmp_path, config(WandbMode.offline))
    offline.log_evaluation(Progress(step=3), {"validation": Evaluation(loss=1.5, tokens=3)})
    offline.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a process that has ended meanwhile
        return b""


def log_after_wandb_died(tmp_path: Path) -> None:
    os.environ.pop("WANDB_SERVICE", None)  # not the service of the process that spawned this one
    observed = writer(tmp_path, config(WandbMode.offline))
    # wandb-core is started with the process id of whom it serves.
    ours = f"--pid\0{os.getpid()}\0".encode()
    services = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if ours in read_or_empty(path)]
    assert services
    for service in services:
        os.kill(int(service.name), signal.SIGKILL)
    for step in (1, 2):
        observed.log_evaluation(Progress(step=step), {"validation": Evaluation(loss=1.5, tokens=3)})
    observed.close()


@pytest.mark.ranks
def test_a_wandb_service_that_dies_does_not_stop_the_run(tmp_path: Path) -> None:
    run_ranks(1, log_after_wandb_died, tmp_path)  # a process of its own: wandb does not recover in this one
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_wandb_online_without_a_key_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run = start_wandb(WandbConfig(mode=WandbMode.online), tmp_path, {})
    assert run is not None
    run.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
