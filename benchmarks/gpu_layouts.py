"""Parts of benchmarks/on_gpu.py: the trainer's engines in their layouts, adapters, Muon and saves.

On a GPU the process group is NCCL, on a CPU gloo. Every part holds loss and gradients against fp32 without a
layout (gpu_yardstick.py), and makes an update.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from benchmarks.bare import is_missing
from benchmarks.gpu_models import build, fields, free_memory, off, our_loss, random_ids
from benchmarks.gpu_rows import Report, Row, Skip, Status
from benchmarks.gpu_yardstick import (
    GRADIENT_BF16,
    LOSS_BF16,
    LOSS_FP32,
    Yardstick,
    build_engine,
    check_engine,
    check_update,
    engine_gradients,
    fill,
    layers_to_check,
    loss_of_engine,
    whole,
)
from olmoe_train.config.adapter import DoraConfig, LoraConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    AdapterTarget,
    Offload,
    Precision,
    QuantizeBase,
    Strategy,
)
from olmoe_train.config.optimizer import AdamWConfig, MuonConfig
from olmoe_train.config.train import CheckpointConfig, ParallelConfig, TrainerConfig
from olmoe_train.distributed.materialize import reset_buffers
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.distributed.parallelize import parallelize
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import quantized_weights
from olmoe_train.model.adapters.merge import merged
from olmoe_train.model.adapters.nf4 import round_trip_nf4
from olmoe_train.optim.muon import orthogonalize
from olmoe_train.planning.adapter import meta_model

GIB = 2**30
ORTHOGONAL = {"cuda": 0.05, "cpu": 1e-3}
"""Relative error of Muon's update against fp64: its iterations are in bf16 on a GPU, in fp32 on a CPU."""


def fsdp(args: argparse.Namespace, report: Report) -> None:
    """FSDP2 on one rank, in both precisions."""
    yardstick = Yardstick(args)
    for precision in Precision:
        engine = build_engine(args, yardstick.weights, TrainerConfig(precision=precision))
        check_engine(report, f"{precision.value}", engine, yardstick, precision)
        del engine
        free_memory(args)


def expert_parallel(args: argparse.Namespace, report: Report) -> None:
    """The all-to-all of one rank with itself."""
    _expert_parallel(args, report)


def _expert_parallel(args: argparse.Namespace, report: Report) -> None:
    yardstick = Yardstick(args)
    for precision in Precision:
        engine = build_engine(
            args, yardstick.weights, TrainerConfig(precision=precision), expert_parallel=True
        )
        check_engine(report, precision.value, engine, yardstick, precision)
        del engine
        free_memory(args)


def expert_parallel_2(args: argparse.Namespace, report: Report) -> None:
    """The experts on two GPUs; on a CPU, of two processes."""
    if args.device != "cpu" and torch.cuda.device_count() < 2:
        raise Skip("one GPU; this part needs two")
    with tempfile.TemporaryDirectory() as directory:
        # Forked before CUDA is used, and without a port: the ranks meet in a file.
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=_on_rank, args=(args, rank, Path(directory))) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode != 0 for process in ranks):
            raise RuntimeError(f"exit codes of the ranks: {[process.exitcode for process in ranks]}")
        for row in json.loads((Path(directory) / "rows.json").read_text()):
            report.rows.append(Row(**row | {"status": Status(row["status"])}))


def _on_rank(args: argparse.Namespace, rank: int, directory: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
    if args.device != "cpu":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(directory / "store"), 2)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=2)
    report = Report()
    _expert_parallel(args, report)
    if rank == 0:
        rows = [asdict(row) | {"status": row.status.value} for row in report.rows]
        (directory / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def compiler_of(args: argparse.Namespace) -> Iterator[str]:
    """torch.compile as trainer.compile calls it; on a CPU without inductor, which takes a minute there."""
    name = "inductor" if args.device != "cpu" else "aot_eager"
    with patch.object(torch, "compile", partial(torch.compile, backend=name)):
        yield name


def compile_(args: argparse.Namespace, report: Report) -> None:
    """trainer.compile."""
    if not args.compile:
        raise Skip("--no-compile")
    yardstick = Yardstick(args)
    with compiler_of(args) as name:
        trainer = TrainerConfig(precision=Precision.bf16, compile=True)
        engine = build_engine(args, yardstick.weights, trainer)
        start = time.perf_counter()
        check_engine(report, f"bf16, {name}", engine, yardstick, Precision.bf16)
        report.measure("first step with compilation", time.perf_counter() - start, "s")


def checkpointing(args: argparse.Namespace, report: Report) -> None:
    """trainer.activation_checkpointing: nothing changes but the memory."""
    yardstick = Yardstick(args)
    for mode in ActivationCheckpointing:
        trainer = TrainerConfig(precision=Precision.bf16, activation_checkpointing=mode)
        engine = build_engine(args, yardstick.weights, trainer)
        if args.device == "cpu":
            report.skip(f"{mode.value}: activations", "CUDA's allocator counts them")
        else:
            before = torch.cuda.memory_allocated()
            loss = loss_of_engine(engine, yardstick.ids_BS)
            report.measure(
                f"{mode.value}: held after forward", (torch.cuda.memory_allocated() - before) / GIB, "GiB"
            )
            del loss
        check_engine(report, f"bf16, {mode.value}", engine, yardstick, Precision.bf16)
        del engine
        free_memory(args)


def muon(args: argparse.Namespace, report: Report) -> None:
    """Muon's update against Newton-Schulz iterations in fp64 of the gradient."""
    yardstick = Yardstick(args)
    cfg = MuonConfig(weight_decay=0.0)
    engine = build_engine(args, yardstick.weights, TrainerConfig(precision=Precision.bf16), cfg)
    loss, gradients = engine_gradients(engine, yardstick.ids_BS)
    check_update(report, "muon", engine, yardstick.ids_BS, loss)
    after = dict(engine.model.named_parameters())
    for name in ("self_attn.q_proj.weight", "mlp.experts.down_proj"):
        key = f"model.layers.0.{name}"
        # The first momentum is the gradient, and the direction does not depend on its length.
        update = (yardstick.weights[key] - whole(after[key])).double()
        update, gradient = (
            value[:1] if value.ndim == 3 else value[None] for value in (update, gradients[key])
        )
        exact = orthogonalize(gradient.double(), cfg.ns_steps)
        scaled = exact * (update.norm() / exact.norm())
        report.check(f"direction of {name} against fp64", off(update, scaled), ORTHOGONAL[engine.device.type])


# --- adapters ---------------------------------------------------------------------------------------------


def adapters(args: argparse.Namespace, report: Report) -> None:
    """LoRA, DoRA and LoRA on NF4 against the plain model with the merged weights, and bf16 against fp32."""
    weights = {name: p.detach().float() for name, p in build(args, layers_to_check(args)).named_parameters()}
    targets = [AdapterTarget.attention, AdapterTarget.experts]
    kinds = {
        "lora": LoraConfig(rank=4, alpha=8.0, targets=targets),
        "dora": DoraConfig(rank=4, alpha=8.0, targets=targets),
        "nf4": LoraConfig(rank=4, alpha=8.0, targets=targets, quantize_base=QuantizeBase.nf4),
    }
    ids_BS = random_ids(args, 1)
    for kind, cfg in kinds.items():
        engine = build_engine(args, weights, TrainerConfig(precision=Precision.fp32), adapter=cfg)
        loss, reference = engine_gradients(engine, ids_BS)
        exact = _merged_loss(args, engine.model, weights, ids_BS)
        report.check(f"{kind}, fp32: loss against merged weights", abs(loss - exact) / exact, LOSS_FP32)
        del engine
        free_memory(args)
        engine = build_engine(args, weights, TrainerConfig(precision=Precision.bf16), adapter=cfg)
        loss, gradients = engine_gradients(engine, ids_BS)
        report.check(f"{kind}, bf16: loss", abs(loss - exact) / exact, LOSS_BF16)
        errors = {name: off(gradients[name], value) for name, value in reference.items()}
        worst = max(errors, key=lambda name: errors[name])
        # Of 32 tokens, one whose routing differs in bf16 changes the gradients of an expert's adapter by a
        # quarter. The worst is therefore reported, and the median judged.
        report.measure(f"{kind}, bf16: worst gradient, {worst}", errors[worst])
        report.check(f"{kind}, bf16: median gradient", statistics.median(errors.values()), GRADIENT_BF16)
        check_update(report, f"{kind}, bf16", engine, ids_BS, loss)
        del engine
        free_memory(args)


@torch.no_grad()
def _merged_loss(
    args: argparse.Namespace, model: OlmoeForCausalLM, weights: dict[str, Any], ids_BS: torch.Tensor
) -> float:
    """The loss of a plain fp32 model whose weights have the adapter of `model` in them."""
    assert model.adapter is not None
    parameters, quantized = dict(model.named_parameters()), quantized_weights(model)
    plain = build(args, layers_to_check(args), torch.float32)
    for name, parameter in plain.named_parameters():
        base = round_trip_nf4(weights[name]) if name in quantized else weights[name]
        parameter.copy_(merged(name, base, parameters, lambda key: whole(parameters[key]), model.adapter))
    return our_loss(plain, "loop")(ids_BS).item()


# --- saves ------------------------------------------------------------------------------------------------


def saves(args: argparse.Namespace, report: Report) -> None:
    """checkpoint.async_save while training goes on: what is read again is what was there at the save."""
    if is_missing("xxhash"):
        raise Skip("no xxhash, with which checkpoints are verified")
    from olmoe_train.checkpoint.saver import Saver

    ids_BS = random_ids(args, 1)
    weights = dict(build(args, layers_to_check(args), torch.float32).named_parameters())
    engine = build_engine(args, weights, TrainerConfig(precision=Precision.bf16))
    _, gradients = engine_gradients(engine, ids_BS)
    engine.step(lambda norm: ~torch.isfinite(norm))
    del gradients
    kept = {name: whole(p).cpu() for name, p in engine.model.named_parameters()}
    with tempfile.TemporaryDirectory() as directory:
        found: list[Path] = []
        saver = Saver(CheckpointConfig(async_save=True), Path(directory), engine.state, 0, found.append)
        for step in (1, 2):  # the second save has its host memory already
            start = time.perf_counter()
            saver.save(step, {"step": step})
            stalled = time.perf_counter() - start
            if step == 1:
                engine_gradients(engine, ids_BS)
                engine.step(lambda norm: ~torch.isfinite(norm))
                report.measure("saving was still going on after a step", str(saver.busy))
            saver.wait()
            report.measure(f"save {step}: training waits", stalled, "s")
            report.measure(f"save {step}: on disk after", time.perf_counter() - start, "s")
        saver.finish()
        size = sum(file.stat().st_size for file in found[0].rglob("*") if file.is_file())
        report.measure("a checkpoint", size / GIB, "GiB")
        again = build_engine(args, weights, TrainerConfig(precision=Precision.bf16))
        again.load(found[0])
    for name, parameter in again.model.named_parameters():
        kept[name] -= whole(parameter).cpu()
    worst = max(value.abs().max().item() for value in kept.values())
    report.check("largest difference of a weight that was read again", worst, 0.0)


# --- DeepSpeed --------------------------------------------------------------------------------------------


def deepspeed(args: argparse.Namespace, report: Report) -> None:
    """ZeRO 1 to 3, with and without offloading, against FSDP2: loss, gradient norm and the loss after it."""
    if is_missing("deepspeed"):
        raise Skip("no deepspeed")
    weights = dict(build(args, layers_to_check(args), torch.bfloat16).named_parameters())
    ids_BS = random_ids(args, 1)
    trainer = TrainerConfig(precision=Precision.bf16, micro_batch_size=1, global_batch_size=1, max_steps=1)
    fsdp_engine = build_engine(args, weights, trainer)
    expected = _step_of(fsdp_engine, ids_BS)
    del fsdp_engine
    free_memory(args)
    for stage, offload in (
        (1, Offload.none),
        (2, Offload.none),
        (3, Offload.none),
        (1, Offload.optimizer),
        (2, Offload.optimizer),
        (3, Offload.parameters),
    ):
        what = f"zero {stage}" + ("" if offload is Offload.none else f", {offload.value} on the CPU")
        if args.device == "cpu" and offload is not Offload.none:
            report.skip(what, "pinned memory exists beside a GPU only")
            continue
        parallel = ParallelConfig(strategy=Strategy.deepspeed, zero_stage=stage, offload=offload)
        engine = _zero_engine(args, weights, trainer, parallel)
        found = _step_of(engine, ids_BS)
        for name, value in found.items():
            report.check(f"{what}: {name}", abs(value - expected[name]) / expected[name], 1e-2)
        del engine
        free_memory(args)


def _zero_engine(
    args: argparse.Namespace, weights: dict[str, Any], trainer: TrainerConfig, parallel: ParallelConfig
) -> Any:
    from olmoe_train.training.engine.deepspeed import ZeroEngine

    device = init_distributed(args.device)
    mesh = build_mesh(parallel, device)
    config = OlmoeConfig(**fields(args, layers_to_check(args)))
    initial = parallelize(meta_model(config, None, trainer.precision), trainer, parallel, mesh)
    initial.to_empty(device=mesh.device)
    reset_buffers(initial)
    fill(initial, weights)
    with tempfile.TemporaryDirectory() as directory:
        return ZeroEngine(initial, device, Path(directory), trainer, parallel, AdamWConfig())


def _step_of(engine: Any, ids_BS: torch.Tensor) -> dict[str, float]:
    loss = loss_of_engine(engine, ids_BS)
    engine.backward(loss, last=True)
    outcome = engine.step(lambda norm: ~torch.isfinite(norm))
    with torch.no_grad():
        after = loss_of_engine(engine, ids_BS)
    return {
        "loss": loss.item(),
        "gradient norm": outcome.grad_norm.item(),
        "loss after an update": after.item(),
    }
