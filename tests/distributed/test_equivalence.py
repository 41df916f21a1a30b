"""One model under every layout: the real train(), six optimizer steps, the same losses, norms and weights.

The reference is one rank with one micro-batch. Each world size is spawned once and trains all of its layouts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.directory import latest_checkpoint
from olmoe_train.checkpoint.sharded import open_model_tensors
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.train import train
from olmoe_train.training.build import build_model
from tests.support.data import PAD, write_prepared
from tests.support.ranks import run_ranks
from tests.support.runs import (
    LENGTH,
    SEQUENCES,
    STEPS,
    TINY,
    Layout,
    compose,
    real_tokens,
    write_lines,
)
from tests.support.tiny import whole

LOSSES = ("train/loss", "train/ce_loss", "train/load_balancing_loss", "train/router_z_loss")
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
PLAIN |= {
    # Of two ranks with two micro-batches a step, of four with one.
    f"zero-{stage} {ranks}, experts {experts}": Layout(ranks, 4, "deepspeed", experts, zero_stage=stage)
    for ranks in (2, 4)
    for stage in range(4)
    for experts in (1, 2)
}
HARDEST = ("fsdp 4, experts 2", "fsdp 4, experts 4", "hsdp 2x2, experts 2")
LAYOUTS = (
    PLAIN
    | {f"{name}, full": replace(PLAIN[name], checkpointing="full") for name in HARDEST}
    | {f"{name}, selective": replace(PLAIN[name], checkpointing="selective") for name in HARDEST[:1]}
    | {f"{name}, padded": replace(PLAIN[name], padded=True) for name in (*list(PLAIN)[:3], *HARDEST)}
    | {f"{name}, bf16": replace(PLAIN[name], precision="bf16") for name in ("1 rank", "fsdp 2", *HARDEST)}
)
LAYOUTS |= {
    "fsdp 2, prefetch 0": replace(PLAIN["fsdp 2"], prefetch=0),
    "fsdp 4, experts 2, full, kept, prefetch 2": Layout(
        4, 4, experts=2, checkpointing="full", kept=True, prefetch=2
    ),
}
ZERO = {stage: PLAIN[f"zero-{stage} 2, experts 2"] for stage in range(4)}
LAYOUTS |= {f"zero-{stage} 2, experts 2, bf16": replace(ZERO[stage], precision="bf16") for stage in (1, 2, 3)}
LAYOUTS |= {
    "zero-3 4, experts 4": replace(PLAIN["zero-3 4, experts 2"], experts=4),
    "zero-3 2, experts 2, full": replace(ZERO[3], checkpointing="full"),
    "zero-2 2, experts 2, selective": replace(ZERO[2], checkpointing="selective"),
    "zero-3 2, experts 2, padded": replace(ZERO[3], padded=True),
    "zero-2 2, experts 2, optimizer offloaded": replace(ZERO[2], offload="optimizer"),
    "zero-3 2, experts 2, parameters offloaded": replace(ZERO[3], offload="parameters"),
}
LAYOUTS |= {f"{name}, documents": replace(PLAIN[name], documents=True) for name in ("1 rank", *HARDEST)}
LAYOUTS |= {
    f"{HARDEST[0]}, documents, full": replace(PLAIN[HARDEST[0]], documents=True, checkpointing="full"),
    f"{HARDEST[0]}, documents, selective": replace(
        PLAIN[HARDEST[0]], documents=True, checkpointing="selective"
    ),
    "zero-3 2, experts 2, documents": replace(ZERO[3], documents=True),
}
LAYOUTS |= {f"{HARDEST[-1]}, padded, full": replace(PLAIN[HARDEST[-1]], padded=True, checkpointing="full")}


@dataclass(frozen=True)
class Result:
    metrics: list[dict[str, Any]]
    """One entry a step, as in metrics.jsonl."""
    initial: dict[str, Tensor]
    final: dict[str, Tensor]


# --- running one layout -----------------------------------------------------------------------------------


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
    write_lines(directory / "lines", "a*.py")
    write_lines(directory / "others", "b*.py")
    tiny = compose(TINY | {"data.dir": directory / "data"})
    found = {}
    for ranks in (1, 2, 4):
        layouts = {name: layout for name, layout in LAYOUTS.items() if layout.ranks == ranks}
        found |= run_ranks(ranks, train_layouts, tiny, layouts, directory, timeout=600)[0]
    return found


# --- the comparisons --------------------------------------------------------------------------------------


def reference_of(name: str) -> str:
    if LAYOUTS[name].documents:
        return "1 rank, documents"
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


def test_documents_were_packed_and_mixed(results: dict[str, Result]) -> None:
    last = results["1 rank, documents"].metrics[-1]
    assert 0 < last["data/padding"] < 0.2
    assert last["data/lines/share"] == pytest.approx(last["data/lines/requested_share"], abs=0.02)


def test_the_layouts_trained_something(results: dict[str, Result]) -> None:
    first, *_, last = (step["train/ce_loss"] for step in results["1 rank"].metrics)
    assert last < first - 0.1
