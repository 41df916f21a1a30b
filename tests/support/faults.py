"""Tiny real runs of `train` on several ranks, with faults injected on some of the ranks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from olmoe_train import train as train_module
from olmoe_train.checkpoint.directory import checkpoint_path, complete_checkpoints, latest_checkpoint
from olmoe_train.checkpoint.sharded import model_tensor_names, open_model_tensors
from olmoe_train.config.choices import Device, Precision, Schedule, WandbMode, Weights
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.train import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
    SchedulerConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
)
from olmoe_train.run.loggers import read_records
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.engine.base import Engine
from olmoe_train.training.state import TrainState
from olmoe_train.utils.exit_codes import OK, STOPPED_BY_SIGNAL
from tests.support.data import write_prepared
from tests.support.sizes import SIZES

LENGTH = 16
Fault = Callable[[], Callback | None]


def write_data(directory: Path, first: int = 2) -> Path:
    """Write prepared tokens with a pattern that a model can learn. first: the first token of the data."""
    documents = [[2 + (start * 7 + i * i) % 60 for i in range(200)] for start in range(40)]
    documents[0][0] = first
    return write_prepared(directory, documents, documents[:2], vocab_size=64)


def config(data: Path, run_dir: Path, /, **changes: Any) -> TrainConfig:
    """Return the configuration of a run of six steps that saves after every step.

    changes: by section name, a dict of the section's fields; or by field name, a value of `TrainConfig`.
    """
    sections = {
        # The vocabulary of write_data(). Two layers, because a test makes several runs.
        "model": ModelConfig(
            **SIZES | {"vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
        ),
        "data": DataConfig(dir=str(data), sequence_length=LENGTH),
        "trainer": TrainerConfig(
            max_steps=6,
            global_batch_size=4,
            micro_batch_size=2,
            precision=Precision.fp32,
            device=Device.cpu,
            log_every=1,
        ),
        "parallel": ParallelConfig(expert_parallel_size=2),
        "optimizer": AdamWConfig(lr=1e-2),
        "scheduler": SchedulerConfig(kind=Schedule.constant),
        "checkpoint": CheckpointConfig(every=1, keep=0),
        "logging": LoggingConfig(wandb=WandbConfig(mode=WandbMode.disabled)),
        "evaluation": EvaluationConfig(at_start=False, max_sequences=8),
    }
    cfg = TrainConfig(run_dir=str(run_dir), **sections)  # type: ignore[arg-type]
    fields = {
        name: replace(getattr(cfg, name), **change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return replace(cfg, **fields)


def run(cfg: TrainConfig, *faults: Fault) -> int:
    """On one rank: inject the faults, train with the callbacks that they return, and return the exit code."""
    callbacks = tuple(callback for callback in [fault() for fault in faults] if callback is not None)
    state = train_module.train(cfg, callbacks=callbacks)
    return STOPPED_BY_SIGNAL if state.stopped_by_signal else OK


# --- faults: partials of these functions run on every rank --------------------------------------------------


class BeforeStep(Callback):
    """Calls `act` before every step, with the number of that step."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act

    def on_start(self, state: TrainState) -> None:
        self.act(state.step + 1)

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if not report.is_last:
            self.act(state.step + 1)


def at_step(rank: int, step: int, act: Callable[[], None]) -> Callback:
    """Return a callback that calls `act` on `rank` before `step`."""

    def acting(number: int) -> None:
        if number == step and dist.get_rank() == rank:
            act()

    return BeforeStep(acting)


def change_engine(change: Callable[[Engine], object]) -> None:
    """Make `train` call `change` with the engine that it builds."""
    original = train_module.build_engine

    def building(*arguments: Any) -> Engine:
        engine = original(*arguments)
        change(engine)
        return engine

    train_module.build_engine = building


def spoil_activations(rank: int, steps: range, factor: float, gradients: bool = False) -> Callback:
    """Multiply the output of the final norm by `factor` in these steps on one rank.

    gradients: multiply only the gradient of the output instead.
    """
    now = [0]

    def spoil(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
        if now[0] not in steps or dist.get_rank() != rank:
            return None
        if not gradients:
            return output * factor
        if output.requires_grad:  # a spike is explained by a forward pass alone
            output.register_hook(lambda gradient: gradient * factor)
        return None

    def note(step: int) -> None:
        now[0] = step

    change_engine(lambda engine: engine.model.model.norm.register_forward_hook(spoil))
    return BeforeStep(note)


# --- files that a run writes --------------------------------------------------------------------------------


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def records(run_dir: str | Path, metric: str = "") -> list[dict[str, Any]]:
    """The records of metrics.jsonl, which must exist. metric: only the records that have this metric."""
    path = Path(run_dir) / "metrics.jsonl"
    assert path.is_file(), f"{path}: no such file"
    return [record for record in read_records(path) if not metric or metric in record]


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of the training steps."""
    return records(run_dir, "train/loss")


def alerts(run_dir: Path) -> list[str]:
    """Return the names of the alerts that a run had."""
    path = run_dir / "alerts.json"
    return [alert["name"] for alert in json.loads(path.read_text())] if path.exists() else []


def without_timing(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what depends on when, how fast and in how many starts its step was made."""
    timing = ("time", "resumes", "alerts")
    return {k: v for k, v in record.items() if k not in timing and not k.startswith("perf/")}


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in complete_checkpoints(run_dir))


def saved_tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Return every shard of parameters and moments in the checkpoint of `step`, and AdamW's step counts."""
    directory = checkpoint_path(run_dir, step)
    steps = json.loads((directory / "state.json").read_text())["adam_steps"]
    tensors = {f"step/{name}": torch.tensor(count) for name, count in steps.items()}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {f"{path.name}/{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def saved_weights(
    run_dir: str | Path, step: int | None = None, which: Weights = Weights.weights
) -> dict[str, Tensor]:
    """Return every weight of the checkpoint of `step`, or its average, whole, by name. Default: of the newest
    checkpoint."""
    directory = latest_checkpoint(Path(run_dir)) if step is None else checkpoint_path(Path(run_dir), step)
    assert directory is not None, f"{run_dir}: no checkpoint"
    read = open_model_tensors(directory, which)
    return {name: read(name) for name in model_tensor_names(directory, which)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return whether both have the same names and bit-identical values."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_same_end(run_dir: Path, twin: Path) -> None:
    """Assert that both runs ended at the same step with the same tensors and logged the same values.

    The logged values include losses, norms, and the router's health statistics with their running state. Only
    the values that `without_timing` leaves out may differ.
    """
    last = saved_steps(twin)[-1]
    assert saved_steps(run_dir)[-1] == last
    assert same(saved_tensors(run_dir, last), saved_tensors(twin, last))
    mine, others = (
        [without_timing(record) for record in metrics(directory)] for directory in (run_dir, twin)
    )
    assert mine == others
