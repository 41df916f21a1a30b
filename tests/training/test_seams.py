"""Each seam has a second implementation here, added without a change to train.py: an objective that is not
next-token prediction, SGD, and a callback with a state. And what `train` leaves behind where it raises."""

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from olmoe_train import train as train_module
from olmoe_train.checkpoint.convert.stored_model import open_stored_model
from olmoe_train.config.objective import ObjectiveConfig
from olmoe_train.config.optimizer import OptimizerConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.block import OlmoeTopKRouter
from olmoe_train.optim import build as optim_build
from olmoe_train.run.lock import RunLock
from olmoe_train.train import train
from olmoe_train.training import build
from olmoe_train.training.batch import Batch, Totals
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.engine.base import Engine
from olmoe_train.training.objectives.base import RouterSums
from olmoe_train.training.state import TrainState
from tests.support.faults import (
    BeforeStep,
    change_engine,
    config,
    metrics,
    same,
    saved_steps,
    saved_tensors,
    spoil_activations,
    status,
    write_data,
)
from tests.support.ranks import run_ranks

ONE_RANK = {"parallel": ParallelConfig(), "trainer": {"max_steps": 4}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# --- an objective -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyConfig(ObjectiveConfig):
    name: str = "copy"


class Copy:
    """Predicts the token that it reads. Names one term, and watches no router."""

    columns: tuple[str, ...] = ("input_ids",)

    def __init__(self, config: OlmoeConfig, device: torch.device) -> None:
        self.router = RouterSums.zeros(config.num_hidden_layers, config.num_experts, device)
        self.calls: list[str] = []

    def begin_step(
        self, model: OlmoeForCausalLM, micro_batches: list[Batch], totals: Totals, logged: bool
    ) -> None:
        self.calls.append("begin")

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ids_BS = micro_batch["input_ids"]
        output = model.training_forward(ids_BS, F.pad(ids_BS[:, :-1], (1, 0), value=-100))
        loss = output.ce_sum / totals.num_targets
        self.calls.append("call")
        return loss, {"copy_loss": loss.detach()}

    def end_step(self, model: OlmoeForCausalLM, totals: Totals) -> None:
        self.calls.append("end")


def test_an_objective_that_is_not_next_token(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Copy] = []

    def build_copy(cfg: TrainConfig, model: OlmoeConfig, device: torch.device) -> Copy:
        made.append(Copy(model, device))
        return made[0]

    monkeypatch.setitem(build.OBJECTIVES, CopyConfig, build_copy)
    changes = ONE_RANK | {"objective": CopyConfig(), "trainer": {"max_steps": 40}, "checkpoint": {"every": 0}}
    state = train(config(data, tmp_path, **changes))
    assert (state.step, state.last_step, state.stopped_by_signal) == (40, 40, False)
    assert made[0].calls[:4] == ["begin", "call", "call", "end"]
    losses = [record["train/copy_loss"] for record in metrics(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]  # copying is easier than predicting
    assert all("train/ce_loss" not in record for record in metrics(tmp_path))
    assert "| copy_loss " in capsys.readouterr().out


# --- an optimizer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    name: str = "sgd"
    momentum: float = 0.9


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> SGDConfig:
    def build_sgd(parameters: Any, cfg: SGDConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=cfg.lr, momentum=cfg.momentum)

    monkeypatch.setitem(optim_build.OPTIMIZERS, SGDConfig, build_sgd)
    return SGDConfig(lr=0.05)


def test_sgd_trains_and_resumes_exactly(data: Path, tmp_path: Path, sgd: SGDConfig) -> None:
    changes = ONE_RANK | {"optimizer": sgd}
    train(config(data, tmp_path / "whole", **changes))
    for end in (2, 4):
        train(
            config(data, tmp_path / "parts", **changes | {"trainer": {"max_steps": 4, "stop_at_step": end}})
        )
    whole, parts = (saved_tensors(tmp_path / name, 4) for name in ("whole", "parts"))
    assert any("momentum_buffer" in name for name in whole)
    assert same(whole, parts)
    assert not same(whole, saved_tensors(tmp_path / "whole", 3))


def test_sgd_skips_a_step_that_is_not_finite(
    data: Path, tmp_path: Path, sgd: SGDConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "build_engine", train_module.build_engine)  # restored afterwards
    fault = spoil_activations(0, range(2, 3), math.nan)
    train(config(data, tmp_path, optimizer=sgd, **ONE_RANK), callbacks=(fault,))
    states = {step: saved_tensors(tmp_path, step) for step in saved_steps(tmp_path)}
    assert same(states[1], states[2])
    assert not same(states[2], states[3])
    assert all(tensor.isfinite().all() for tensor in states[4].values())
    assert metrics(tmp_path)[-1]["train/skipped_steps"] == 1


# --- a callback ---------------------------------------------------------------------------------------------


class Collector(Callback):
    name = "collector"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.saved: list[str] = []
        self.events: list[str] = []

    def on_start(self, state: TrainState) -> None:
        self.events.append(f"start {state.step}")

    def on_step(self, state: TrainState, report: StepReport) -> None:
        self.steps.append(state.step)
        assert report.outcome.grad_norm > 0
        assert report.is_last is (state.step in (2, 4))

    def on_save(self, checkpoint: Path) -> None:
        self.saved.append(checkpoint.name)

    def on_end(self, state: TrainState) -> None:
        self.events.append(f"end {state.step}")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])


def test_a_callback_and_its_state(data: Path, tmp_path: Path) -> None:
    first, second = Collector(), Collector()
    trainer = {"max_steps": 4, "stop_at_step": 2}
    state = train(config(data, tmp_path, **ONE_RANK | {"trainer": trainer}), callbacks=(first,))
    assert (state.step, state.last_step) == (2, 4)
    train(config(data, tmp_path, **ONE_RANK), callbacks=(second,))
    assert (first.events, second.events) == (["start 0", "end 2"], ["start 2", "end 4"])
    # A checkpoint is written before callbacks that were handed in hear of its step.
    assert second.steps == [1, 3, 4]
    assert first.saved == ["step-00000001", "step-00000002"]


# --- a buffer -----------------------------------------------------------------------------------------------


def add_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers with a bias that each step changes, as loss-free balancing will have it."""
    original = OlmoeTopKRouter.__init__

    def with_buffer(router: OlmoeTopKRouter, config: OlmoeConfig) -> None:
        original(router, config)
        router.register_buffer("bias_E", torch.empty(config.num_experts))

    def reset_buffers(router: OlmoeTopKRouter) -> None:
        router.get_buffer("bias_E").fill_(0.5)

    monkeypatch.setattr(OlmoeTopKRouter, "__init__", with_buffer)
    monkeypatch.setattr(OlmoeTopKRouter, "reset_buffers", reset_buffers, raising=False)


def bump(engines: list[Engine]) -> Callback:
    """Adds 1 to every bias before every step."""

    def act(step: int) -> None:
        for _, buffer in engines[-1].model.named_buffers():
            buffer += 1

    return BeforeStep(act)


def train_with_a_buffer(cfgs: list[TrainConfig]) -> list[list[float]]:
    """On a rank: after each run, the first value of every layer's buffer."""
    add_a_buffer(pytest.MonkeyPatch())
    engines: list[Engine] = []
    change_engine(engines.append)
    found = []
    for cfg in cfgs:
        train(cfg, callbacks=(bump(engines),))
        found.append([buffer[0].item() for _, buffer in engines[-1].model.named_buffers()])
    return found


@pytest.mark.ranks
def test_buffers_are_initialized_saved_resumed_and_refused_by_exports(data: Path, tmp_path: Path) -> None:
    trainers = [{"max_steps": 4, "stop_at_step": end} for end in (2, 4)]
    cfgs = [config(data, tmp_path, trainer=trainer) for trainer in trainers]
    # A save comes before the callback of its step: the checkpoint has what was added before steps 1 and 2.
    assert run_ranks(2, train_with_a_buffer, cfgs) == [[[3.5] * 2, [5.5] * 2]] * 2
    with pytest.raises(ValueError, match=r"step-00000004 .*model\.layers\.0\.mlp\.gate\.bias_E"):
        open_stored_model(tmp_path)


# --- what a run leaves behind where it raises ---------------------------------------------------------------


class PlannedError(Exception):
    pass


def fail_at(step: int) -> Callback:
    def act(number: int) -> None:
        if number == step:
            raise PlannedError

    return BeforeStep(act)


def test_a_run_that_raises_leaves_the_process_as_it_was(data: Path, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    cfg = config(data, tmp_path, **ONE_RANK)
    with pytest.raises(PlannedError):
        train(cfg, callbacks=(fail_at(3),))
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert not {"watchdog", "signals"} & {thread.name for thread in threading.enumerate()}
    assert (status(tmp_path)["state"], "PlannedError" in status(tmp_path)["reason"]) == ("failed", True)
    RunLock(tmp_path).close()  # nobody holds it
    assert train(cfg).step == 4  # continues from step 2 in the same process


NOTEBOOK = """
import sys, time
from olmoe_train.config import compose
from olmoe_train.train import train
from tests.support.runs import TINY
from tests.support.sizes import overrides

values = TINY | {"data.dir": sys.argv[1], "trainer.max_steps": 4, "trainer.timeout": 1.0}
values |= {"trainer.global_batch_size": 2, "trainer.micro_batch_size": 2, "run_dir": sys.argv[2]}
cfg = compose(*overrides(values))

def batches():
    import torch
    ids = torch.randint(2, 200, (2, 32))
    yield {"input_ids": ids, "labels": ids}
    raise RuntimeError("the notebook's own error")

try:
    train(cfg, batches())
except RuntimeError as error:
    assert "the notebook's own error" in str(error)
time.sleep(5)  # five times trainer.timeout
print("alive", train(cfg, iter(lambda: next(batches()), None)).step)
"""


@pytest.mark.slow
def test_a_notebook_outlives_a_run_that_raises(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    command = [sys.executable, "-c", NOTEBOOK, str(data), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "alive 4"


def test_batches_that_end_too_early_are_named(data: Path, tmp_path: Path) -> None:
    ids = torch.randint(2, 60, (2, 16))
    with pytest.raises(ValueError, match="batches ended before the run did"):
        train(config(data, tmp_path, **ONE_RANK), [{"input_ids": ids, "labels": ids}] * 3)
