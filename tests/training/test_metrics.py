"""Metrics by hand, and what happens to them when a run goes wrong or starts again."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from olmoe_train.config.choices import Packing, WandbMode
from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import AlarmsConfig, LoggingConfig, WandbConfig
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.run.alarms import MetricAlarms, thresholds
from olmoe_train.run.loggers import MetricsLog, forget_after
from olmoe_train.run.metrics_registry import METRICS
from olmoe_train.training.batch import Totals
from olmoe_train.training.callbacks.logging import console_line
from olmoe_train.training.metrics import DataCounts, ExpertUse, StepTerms, read_step
from olmoe_train.training.objectives.base import RouterSums
from tests.support.faults import records
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_rank() -> None:
    init_distributed("cpu")


TOTALS = Totals(
    torch.tensor(8.0),
    torch.tensor(7.0),
    num_tokens_host=6,
    num_positions=8,
    sequences_without_targets=1,
    repetitive_sequences=0,
    stop_requested=False,
)


def one_step(counts: list[list[float]], grad_norm: float = 0.5, entropy: float = 0.0) -> dict[str, Any]:
    """The values of a step of one micro-batch whose losses are 1, 2, 3 and 4."""
    terms = StepTerms(CPU)
    names = ("ce_loss", "load_balancing_loss", "router_z_loss")
    terms.add(torch.tensor(1.0), {name: torch.tensor(float(n)) for n, name in enumerate(names, start=2)})
    router = RouterSums(torch.tensor(counts), torch.full((2,), entropy), torch.tensor([9.0, 16.0]))
    return read_step(terms, router, torch.tensor(grad_norm))


def test_values_by_hand() -> None:
    values = one_step([[2.0, 2.0, 2.0, 2.0], [6.0, 2.0, 0.0, 0.0]], entropy=math.log(4))
    names = ("loss", "ce_loss", "load_balancing_loss", "router_z_loss")
    assert [values[f"train/{name}"] for name in names] == [1.0, 2.0, 3.0, 4.0]
    assert values["train/grad_norm"] == 0.5
    # Mean load 2; the largest is 2 in layer 0 and 6 in layer 1.
    assert values["router/layer_00/max_violation"] == 0.0
    assert values["router/layer_01/max_violation"] == values["router/max_violation"] == 2.0
    assert values["router/layer_01/load"] == [0.75, 0.25, 0.0, 0.0]
    assert values["router/entropy"] == pytest.approx(math.log(4))
    assert (values["router/layer_00/z"], values["router/layer_01/z"]) == (9.0, 16.0)


def test_terms_are_sums_over_micro_batches_and_shown_by_their_names() -> None:
    terms = StepTerms(CPU)
    for loss, margin in ((1.0, 0.25), (2.0, 0.5)):
        hidden = {"rewards/chosen": torch.tensor(9.0), "kl": torch.tensor(0.5)}
        terms.add(torch.tensor(loss), {"margin": torch.tensor(margin)} | hidden)
    values = read_step(terms, RouterSums.zeros(2, 4, CPU), torch.tensor(1.0))
    assert (values["train/loss"], values["train/margin"]) == (3.0, 0.75)
    assert (values["rewards/chosen"], values["kl"]) == (18.0, 1.0), "names of TRL's stay as they are"
    values |= {"step": 3, "train/lr": 1e-3, "perf/tokens_per_second": 10.0, "perf/mfu": None}
    assert console_line(values, ["margin", "rewards/chosen", "kl"], 9) == (
        "step 3/9 | loss 3.0000 | margin 0.750 | kl 1.000 | grad norm 1.000 | lr 1.00e-03 | 10 tok/s"
    )


def test_data_is_counted_between_logged_steps() -> None:
    counts = DataCounts(DataConfig(dir="x", sequence_length=4, packing=Packing.best_fit))
    for steps in (3, 1):  # of 2 sequences with 8 places and 6 tokens, one of them without a target
        for _ in range(steps):
            counts.add(TOTALS)
        values = counts.read()
        assert values["data/sequences_without_targets"] == steps
        assert values["data/padding"] == 0.25
        assert "data/repetitive_sequences" not in values


def test_an_expert_dies_after_steps_without_a_token_and_wakes_with_one() -> None:
    experts = ExpertUse(2, 4, dead_after=2, last_used=None, device=CPU)
    dead = []
    loads = ([4.0, 4.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 1.0])
    for step, load in enumerate(loads, start=1):
        experts.update(step, torch.tensor([[2.0, 2.0, 2.0, 2.0], load]))
        dead.append(experts.read(step)["router/layer_01/dead_experts"])
    # Experts 2 and 3 have none in steps 1-2, expert 1 in steps 2-3; expert 3 wakes at 4.
    assert dead == [0, 2, 3, 2]
    # ... and a resumed run remembers.
    resumed = ExpertUse(2, 4, dead_after=2, last_used=experts.last_used(), device=CPU)
    assert resumed.last_used() == [[4, 4, 4, 4], [4, 1, 0, 4]]


def test_a_collapse_has_to_last_and_other_alarms_come_at_once() -> None:
    cfg = AlarmsConfig(max_violation=2.0, skipped_steps=1, collapse_steps=20)
    alarms = MetricAlarms(cfg, num_experts=8, top_k=2)
    found = []
    violations = {10: 3.0, 20: 3.0, 30: 1.0, 40: 3.0, 50: 3.0, 60: 3.0}  # interrupted at step 30
    for step, violation in violations.items():
        values = {"step": step, "router/max_violation": violation, "train/skipped_steps": step // 25}
        found += [(step, alert.name) for alert in alarms.check(values)]
    assert found == [(50, "skipped steps"), (60, "skipped steps"), (60, "router collapse: load")]


def test_the_thresholds_of_a_collapse_depend_on_the_router() -> None:
    limits = thresholds(AlarmsConfig(), num_experts=64, top_k=8)
    assert limits["max_violation"] == 5.25
    assert limits["entropy"] == pytest.approx(0.05 * math.log(64))
    dense = thresholds(AlarmsConfig(), num_experts=1, top_k=1)  # violation and entropy are 0: no alarm
    assert (dense["max_violation"], dense["entropy"]) == (0, 0)
    assert {metric.alarm.key for metric in METRICS if metric.alarm is not None} <= limits.keys()


def writer(tmp_path: Path, mode: WandbMode = WandbMode.disabled, step: int = 0) -> MetricsLog:
    return MetricsLog(tmp_path, LoggingConfig(wandb=WandbConfig(mode=mode)), {}, step)


def test_a_gradient_that_is_not_finite_is_recorded_as_null(tmp_path: Path) -> None:
    values = {"step": 1, "train/loss_by_position": [1.0, math.inf]}
    writer(tmp_path).write(values | one_step([[2.0] * 4] * 2, grad_norm=math.nan))
    (record,) = records(tmp_path)
    assert (record["train/grad_norm"], record["train/loss_by_position"]) == (None, [1.0, None])


def test_a_resumed_run_forgets_the_steps_that_come_again(tmp_path: Path) -> None:
    first = writer(tmp_path)
    for step in (0, 2, 4, 6):
        first.write({"step": step, "eval/validation/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')  # killed while writing
    writer(tmp_path, step=4)
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4]
    forget_after(tmp_path / "metrics.jsonl", 0)  # no checkpoint: everything comes again
    assert records(tmp_path) == []


@pytest.mark.slow
def test_wandb_offline_writes_a_run_and_disabled_writes_nothing(tmp_path: Path) -> None:
    writer(tmp_path).write({"step": 1})
    assert not (tmp_path / "wandb").exists()
    offline = writer(tmp_path, WandbMode.offline)
    offline.write({"step": 3, "eval/validation/loss": 1.5})
    offline.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a process that has ended meanwhile
        return b""


def log_after_wandb_died(tmp_path: Path) -> None:
    os.environ.pop("WANDB_SERVICE", None)  # not the service of the process that spawned this one
    observed = writer(tmp_path, WandbMode.offline)
    # wandb-core is started with the process id of whom it serves.
    ours = f"--pid\0{os.getpid()}\0".encode()
    services = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if ours in read_or_empty(path)]
    assert services
    for service in services:
        os.kill(int(service.name), signal.SIGKILL)
    for step in (1, 2):
        observed.write({"step": step, "eval/validation/loss": 1.5})
    observed.close()


@pytest.mark.ranks
def test_a_wandb_service_that_dies_does_not_stop_the_run(tmp_path: Path) -> None:
    run_ranks(1, log_after_wandb_died, tmp_path)  # a process of its own: wandb does not recover in this one
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_wandb_online_without_a_key_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    writer(tmp_path, WandbMode.online).close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
