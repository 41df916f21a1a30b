"""One model under every layout: the real train(), six optimizer steps, the same losses, norms and weights.

The reference is one rank with one micro-batch. Each world size is spawned once and trains all of its layouts.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.checkpoint.directory import latest_checkpoint
from olmoe_train.checkpoint.training import open_model_tensors
from olmoe_train.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.cli import config_directory, to_config, writable
from olmoe_train.config import ParallelConfig, TrainConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.train import build_model, train
from tests.distributed.tiny import whole
from tests.prepared_data import PAD, write_prepared
from tests.spawn import run_ranks

STEPS, SEQUENCES, LENGTH = 6, 16, 32
LOSSES = ("train/loss", "train/ce_loss", "train/load_balancing_loss", "train/router_z_loss")
TINY = {
    "model.vocab_size": 320,
    "model.hidden_size": 32,
    "model.intermediate_size": 16,
    "model.num_hidden_layers": 3,
    "model.num_attention_heads": 4,
    "model.num_experts": 8,
    "model.num_experts_per_tok": 2,
    "model.max_position_embeddings": LENGTH,
    "model.eos_token_id": 0,
    "data.sequence_length": LENGTH,
    "trainer.max_steps": STEPS,
    "trainer.global_batch_size": SEQUENCES,
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.log_every": 1,
    "optimizer.lr": 1e-3,
    # Far below the norms that occur: every step is clipped, and a wrong norm is a wrong step.
    "optimizer.max_grad_norm": 0.1,
    "scheduler": "constant",
    "checkpoint.every": 0,
    "evaluation.at_start": False,
    "logging.wandb.mode": "disabled",
}


@dataclass(frozen=True)
class Layout:
    ranks: int
    micro_batch: int
    strategy: str = "fsdp"
    experts: int = 1
    copies: int = 1
    checkpointing: str = "none"
    padded: bool = False
    precision: str = "fp32"

    def config(self, tiny: TrainConfig, run_dir: Path) -> TrainConfig:
        trainer = replace(
            tiny.trainer,
            micro_batch_size=self.micro_batch,
            activation_checkpointing=ActivationCheckpointing(self.checkpointing),
            precision=Precision(self.precision),
        )
        parallel = ParallelConfig(
            strategy=Strategy(self.strategy),
            expert_parallel_size=self.experts,
            replicate_size=self.copies,
        )
        return replace(tiny, run_dir=str(run_dir), trainer=trainer, parallel=parallel)


PLAIN = {
    "1 rank": Layout(1, 16),
    "1 rank, 2 micro-batches": Layout(1, 8),
    "1 rank, 4 micro-batches": Layout(1, 4),
    "1 rank, 16 micro-batches": Layout(1, 1),
    "ddp 2": Layout(2, 8, "ddp"),
    "fsdp 2": Layout(2, 8),
    "fsdp 2, experts 2": Layout(2, 4, experts=2),
    "ddp 2, experts 2": Layout(2, 8, "ddp", experts=2),
    "fsdp 4": Layout(4, 4),
    "fsdp 4, experts 2": Layout(4, 4, experts=2),
    "fsdp 4, experts 4": Layout(4, 4, experts=4),
    "hsdp 2x2, experts 2": Layout(4, 2, experts=2, copies=2),
    "ddp 4, experts 2": Layout(4, 2, "ddp", experts=2),
}
HARDEST = ("fsdp 4, experts 2", "fsdp 4, experts 4", "hsdp 2x2, experts 2")
LAYOUTS = (
    PLAIN
    | {f"{name}, full": replace(PLAIN[name], checkpointing="full") for name in HARDEST}
    | {f"{name}, selective": replace(PLAIN[name], checkpointing="selective") for name in HARDEST[:1]}
    | {f"{name}, padded": replace(PLAIN[name], padded=True) for name in (*list(PLAIN)[:3], *HARDEST)}
    | {f"{name}, bf16": replace(PLAIN[name], precision="bf16") for name in ("1 rank", "fsdp 2", *HARDEST)}
)
LAYOUTS |= {f"{HARDEST[-1]}, padded, full": replace(PLAIN[HARDEST[-1]], padded=True, checkpointing="full")}


@dataclass(frozen=True)
class Result:
    metrics: list[dict[str, Any]]
    """One entry a step, as in metrics.jsonl."""
    initial: dict[str, Tensor]
    final: dict[str, Tensor]


# --- running one layout -----------------------------------------------------------------------------------


def compose(overrides: dict[str, Any]) -> TrainConfig:
    ConfigStore.instance().store("train_schema", node=writable(OmegaConf.structured(TrainConfig)))
    arguments = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        return to_config(hydra.compose("train", arguments))


def real_tokens() -> list[list[int]]:
    """The standard library's source, a file a document, a byte a token; 0 and 1 stay eos and padding."""
    files = sorted(Path(os.__file__).parent.glob("a*.py"))
    return [[2 + byte for byte in path.read_bytes()[:4000]] for path in files]


def padded_batches(layout: Layout) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of one global stream of sequences of any length, padded in front.

    Each is as long as its longest sequence: of four ranks the first one's are whole, the last one's have two
    tokens and no padding, and with one rank nearly half of everything is padding.
    """
    stream = torch.tensor([token for document in real_tokens() for token in document])
    rank, per_rank = dist.get_rank(), SEQUENCES // dist.get_world_size()
    for step in range(STEPS):
        ids_BS = stream[step * SEQUENCES * LENGTH :][: SEQUENCES * LENGTH].view(SEQUENCES, LENGTH).clone()
        lengths_B = torch.tensor([LENGTH, 25 + step, 11, 2]).repeat_interleave(SEQUENCES // 4)
        mask_BS = torch.arange(LENGTH) >= LENGTH - lengths_B[:, None]
        ids_BS[~mask_BS] = PAD
        # Nor is the first token a target: padding would have to predict it.
        labels_BS = ids_BS.masked_fill(torch.arange(LENGTH) <= LENGTH - lengths_B[:, None], -100)
        batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS.long()}
        for start in range(rank * per_rank, (rank + 1) * per_rank, layout.micro_batch):
            rows = slice(start, start + layout.micro_batch)
            yield {name: tensor[rows, -lengths_B[rows].max() :] for name, tensor in batch.items()}


def train_layouts(tiny: TrainConfig, layouts: dict[str, Layout], directory: Path) -> dict[str, Result]:
    results = {}
    for name, layout in layouts.items():
        run_dir = directory / name.replace(", ", "-").replace(" ", "-")
        cfg = layout.config(tiny, run_dir)
        initial = initial_weights(cfg)
        train(cfg, padded_batches(layout) if layout.padded else None)
        if dist.get_rank() == 0:
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()
            metrics = [line for line in map(json.loads, lines) if "train/loss" in line]
            read = open_model_tensors(latest_checkpoint(run_dir))
            results[name] = Result(metrics, initial, {parameter: read(parameter) for parameter in initial})
        dist.barrier()
    return results


def initial_weights(cfg: TrainConfig) -> dict[str, Tensor]:
    model = build_model(cfg, build_mesh(cfg.parallel, init_distributed("cpu")))
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    directory = tmp_path_factory.mktemp("equivalence")
    write_prepared(directory / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    tiny = compose(TINY | {"data.dir": directory / "data"})
    found = {}
    for ranks in (1, 2, 4):
        layouts = {name: layout for name, layout in LAYOUTS.items() if layout.ranks == ranks}
        found |= run_ranks(ranks, train_layouts, tiny, layouts, directory, timeout=600)[0]
    return found


# --- the comparisons --------------------------------------------------------------------------------------


def reference_of(name: str) -> str:
    return "1 rank, padded" if LAYOUTS[name].padded else "1 rank"


def relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)


IN_FP32 = [
    name for name, layout in LAYOUTS.items() if layout.precision == "fp32" and name != reference_of(name)
]
IN_BF16 = [name for name, layout in LAYOUTS.items() if layout.precision == "bf16"]


@pytest.mark.parametrize("name", IN_FP32)
def test_losses_and_gradient_norms_are_the_same(results: dict[str, Result], name: str) -> None:
    found, reference = results[name].metrics, results[reference_of(name)].metrics
    assert len(found) == len(reference) == STEPS
    for step, expected in zip(found, reference, strict=True):
        assert step["tokens"] == expected["tokens"]
        for loss in LOSSES:
            assert relative(step[loss], expected[loss]) < 2e-5, (step["step"], loss)
        assert relative(step["train/grad_norm"], expected["train/grad_norm"]) < 1e-4, step["step"]
        assert expected["train/grad_norm"] > 2 * TINY["optimizer.max_grad_norm"]  # clipping is at work


@pytest.mark.parametrize("name", IN_FP32)
def test_final_weights_are_the_same(results: dict[str, Result], name: str) -> None:
    found, reference = results[name].final, results[reference_of(name)].final
    assert found.keys() == reference.keys()
    for parameter, expected in reference.items():
        moved = (expected - results[name].initial[parameter]).norm()
        assert moved > 1e-3 * expected.norm(), f"{parameter} was not trained"
        error = (found[parameter] - expected).norm() / expected.norm()
        assert error < 1e-5, (parameter, error.item())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "1 rank"])
def test_every_layout_starts_from_the_same_weights(results: dict[str, Result], name: str) -> None:
    for parameter, expected in results["1 rank"].initial.items():
        assert torch.equal(results[name].initial[parameter], expected), parameter


@pytest.mark.parametrize("name", IN_FP32)
def test_router_load_is_of_the_global_batch(results: dict[str, Result], name: str) -> None:
    last, expected = results[name].metrics[-1], results[reference_of(name)].metrics[-1]
    for layer in range(3):
        key = f"router/layer_{layer:02d}/load"
        assert last[key] == pytest.approx(expected[key], abs=1e-6)


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_does_not_drift(results: dict[str, Result], name: str) -> None:
    for step, expected in zip(results[name].metrics, results["1 rank"].metrics, strict=True):
        for loss in LOSSES:
            assert relative(step[loss], expected[loss]) < 0.01, (step["step"], loss)


def test_the_layouts_trained_something(results: dict[str, Result]) -> None:
    first, *_, last = (step["train/ce_loss"] for step in results["1 rank"].metrics)
    assert last < first - 0.1
