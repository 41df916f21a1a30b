"""Each seam has a second implementation here, added without a change to train.py: an objective that is not
next-token prediction, SGD, a callback with a state, and a balancer with a buffer. And what `train` leaves
behind where it raises."""

import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olmoe_train import train as train_module
from olmoe_train.checkpoint.convert.stored_model import open_stored_model
from olmoe_train.config.balancing import BalancingConfig
from olmoe_train.config.objective import ObjectiveConfig
from olmoe_train.config.optimizer import OptimizerConfig
from olmoe_train.config.train import EvaluationConfig, ParallelConfig, TrainConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.balancing import AFTER_STEP
from olmoe_train.model.moe.router_stats import RouterStats
from olmoe_train.optim import build as optim_build
from olmoe_train.run.lock import RunLock
from olmoe_train.train import train
from olmoe_train.training import build_balancer, build_objective
from olmoe_train.training.batch import Batch, Totals
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.objectives.base import Heartbeat, RouterSums, Validation
from olmoe_train.training.state import TrainState
from tests.support.faults import (
    BeforeStep,
    config,
    metrics,
    records,
    same,
    saved_steps,
    saved_tensors,
    spoil_activations,
    status,
    write_data,
)

ONE_RANK = {"parallel": ParallelConfig(), "trainer": {"max_steps": 4}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "prepared")


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
    ) -> Totals:
        self.calls.append("begin")
        return totals

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ids_BS = micro_batch["input_ids"]
        output = model.training_forward(ids_BS, targets=ids_BS)
        loss = output.ce_sum / totals.num_targets
        self.calls.append("call")
        return loss, {"copy_loss": loss.detach()}

    def end_step(self, model: OlmoeForCausalLM, totals: Totals, skipped: Tensor) -> None:
        self.calls.append("end")

    def validate(
        self, model: OlmoeForCausalLM, data: TrainingData, cfg: EvaluationConfig, with_heartbeat: Heartbeat
    ) -> dict[str, Validation]:
        return {"validation": Validation({"loss": 0.25, "copied": 0.5}, "1 token")}


def test_an_objective_that_is_not_next_token(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Copy] = []

    def build_copy(
        cfg: TrainConfig,
        model: OlmoeForCausalLM,
        data: TrainingData,
        device: torch.device,
        with_heartbeat: Heartbeat,
    ) -> Copy:
        made.append(Copy(model.config, device))
        return made[0]

    monkeypatch.setitem(build_objective.OBJECTIVES, CopyConfig, build_copy)
    changes = ONE_RANK | {"objective": CopyConfig(), "trainer": {"max_steps": 40}, "checkpoint": {"every": 0}}
    state = train(config(data, tmp_path, **changes))
    assert (state.step, state.last_step, state.stopped_by_signal) == (40, 40, False)
    assert made[0].calls[:4] == ["begin", "call", "call", "end"]
    losses = [record["train/copy_loss"] for record in metrics(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]  # copying is easier than predicting
    assert all("train/ce_loss" not in record for record in metrics(tmp_path))
    assert records(tmp_path, "eval/validation/copied")
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


# --- a balancer with a buffer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BiasConfig(BalancingConfig):
    name: str = "bias"
    rate: float = 0.01


class Bias(nn.Module):
    """Adds a bias to the scores of each expert and, after each step, moves the bias towards even load."""

    scope, per_sequence, has_state = AFTER_STEP, False, True

    def __init__(self, config: OlmoeConfig, rate: float) -> None:
        super().__init__()
        self.rate, self.top_k = rate, config.num_experts_per_tok
        self.register_buffer("offset_LE", torch.empty(config.num_hidden_layers, config.num_experts))

    def reset_buffers(self) -> None:
        self.get_buffer("offset_LE").zero_()

    def scores(self, layer: int, probs_TE: Tensor) -> Tensor:
        return probs_TE + self.get_buffer("offset_LE")[layer]

    def loss(
        self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros(()), {}

    def measure(self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor) -> dict[str, Tensor]:
        return {"busiest": stats.counts_LE.max() / total_tokens}

    def update(self, counts_LE: Tensor) -> None:
        mean_L1 = counts_LE.mean(-1, keepdim=True)
        self.get_buffer("offset_LE").add_(self.rate * (mean_L1 - counts_LE).sign())


def use_bias(patch: pytest.MonkeyPatch) -> BiasConfig:
    def build_bias(cfg: TrainConfig, config: OlmoeConfig) -> Bias:
        assert isinstance(cfg.balancing, BiasConfig)
        return Bias(config, cfg.balancing.rate)

    patch.setitem(build_balancer.BALANCERS, BiasConfig, build_bias)
    return BiasConfig()


def saved_bias(run_dir: Path, step: int) -> Tensor:
    tensors = saved_tensors(run_dir, step)
    return next(tensors[name] for name in tensors if name.endswith("balancer.offset_LE"))


def test_a_bias_decides_where_tokens_go(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias exceeds any probability: in step 2 no token goes to experts that had too many in step 1."""
    use_bias(monkeypatch)
    train(config(data, tmp_path, balancing=BiasConfig(rate=10.0), **ONE_RANK))
    first, second = (
        [record[f"router/layer_{n:02d}/load"] for n in (0, 1)] for record in metrics(tmp_path)[:2]
    )
    first_LE, second_LE = torch.tensor(first), torch.tensor(second)
    even = 1 / first_LE.shape[1]
    assert torch.equal(saved_bias(tmp_path, 1), 10 * (even - first_LE).sign())
    assert (first_LE < even).sum(1).min() >= 2, "a token needs two experts"
    assert (second_LE[first_LE > even] == 0).all()
    last = metrics(tmp_path)[-1]
    assert last["train/loss"] == pytest.approx(last["train/ce_loss"])
    loads = [last[f"router/layer_{n:02d}/load"] for n in (0, 1)]
    assert last["train/busiest"] == pytest.approx(2 * torch.tensor(loads).max().item())
    with pytest.raises(ValueError, match=r"step-00000004 .*balancer\.offset_LE"):
        open_stored_model(tmp_path)


def test_a_skipped_step_does_not_move_the_bias(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "build_engine", train_module.build_engine)  # restored afterwards
    fault = spoil_activations(0, range(2, 3), math.nan)
    train(config(data, tmp_path, balancing=use_bias(monkeypatch), **ONE_RANK), callbacks=(fault,))
    bias = [saved_bias(tmp_path, step) for step in (1, 2, 3)]
    assert torch.equal(bias[0], bias[1])
    assert not torch.equal(bias[1], bias[2])


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


def test_a_run_in_a_thread_leaves_the_signals_to_the_program(data: Path, tmp_path: Path) -> None:
    """As Ray Train's workers do it: Python gives signals to the main thread alone."""
    handler = signal.getsignal(signal.SIGTERM)
    cfg = config(data, tmp_path, **ONE_RANK)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, cfg).result().step == 4
    assert signal.getsignal(signal.SIGTERM) == handler


NOTEBOOK = """
import sys, time
from olmoe_train.config import compose
from olmoe_train.train import train
from tests.support.runs import TINY
from tests.support.sizes import overrides

values = TINY | {"data.dir": sys.argv[1], "trainer.max_steps": 4, "trainer.timeout": 6.0}
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
time.sleep(8)  # longer than trainer.timeout, which the imports of the first step must not exceed
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
