"""Pretrain or fine-tune OLMoE.

The file to read first: `train` is the whole run. Build, then for each step: forward, backward, clip, step,
save. Losses are divided by counts over the whole global batch before backward, and gradients are summed
over ranks, so a step does not depend on how its sequences are cut into ranks and micro-batches.
"""

import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmoe_train.checkpoint.changes import check_changes, description
from olmoe_train.checkpoint.directory import CheckpointError
from olmoe_train.checkpoint.ranks import on_any_rank
from olmoe_train.checkpoint.saver import Saver
from olmoe_train.checkpoint.source import load_into
from olmoe_train.checkpoint.training import load_checkpoint, saved_state
from olmoe_train.choices import BalanceScope
from olmoe_train.cli import run_verb
from olmoe_train.config import LossConfig, TrainConfig, olmoe_config
from olmoe_train.data.loader import build_train_loader
from olmoe_train.distributed.deepspeed import start_engine
from olmoe_train.distributed.mesh import Mesh, build_mesh, init_distributed
from olmoe_train.distributed.parallelize import initialise, parallelize
from olmoe_train.evaluate import evaluate_data
from olmoe_train.guard import StepGuard
from olmoe_train.metrics import MetricsWriter, StepMetrics
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.losses import IGNORE_INDEX, expert_counts, router_losses
from olmoe_train.model.outputs import TrainingOutput
from olmoe_train.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    total_steps,
    warmup_and_decay_steps,
)
from olmoe_train.pace import Pace
from olmoe_train.run_directory import Progress, RunDirectory, record_failure
from olmoe_train.validation import validate

log = logging.getLogger("olmoe")
Batch = dict[str, Tensor]


def train(cfg: TrainConfig, batches: Iterable[Batch] | None = None) -> int:
    """Run the whole configuration; returns the exit code.

    batches: this rank's micro-batches in place of the prepared data, on the CPU (columns as
    data/loader.py's collate; input_ids and labels [B, S] will do).
    """
    device = init_distributed(cfg.trainer.device.value)
    run = RunDirectory(cfg, warnings=validate(cfg, dist.get_world_size()))
    mesh = build_mesh(cfg.parallel, device)
    model = build_model(cfg, mesh)
    optimizer = build_optimizer(model.parameters(), cfg.optimizer)
    progress = resume(cfg, run, model, optimizer)
    run.write_config(cfg)
    zero = start_engine(cfg, model, optimizer, device)
    if zero is not None:
        model, optimizer = zero.model, zero.optimizer
    metrics = StepMetrics(model.config, cfg, progress, device)
    guard = StepGuard(cfg.trainer, progress.guard, device)
    pace = Pace(run.watchdog.peers, model.lm_head, device)
    writer = MetricsWriter(cfg, run.path, model.config, progress, device)
    stored = zero.stored if zero is not None else lambda: (model, optimizer)
    saver = Saver(cfg.checkpoint, run.path, stored, progress.step)
    described = description(cfg)
    last_step, (warmup, decay) = total_steps(cfg), warmup_and_decay_steps(cfg)
    max_norm, watched = cfg.optimizer.max_grad_norm, run.watchdog.beating
    end = min(last_step, cfg.trainer.stop_at_step or last_step)
    accumulation = cfg.trainer.global_batch_size // (cfg.trainer.micro_batch_size * dist.get_world_size())
    loader = iter(batches if batches is not None else train_batches(cfg, progress))
    if progress.step == 0 and cfg.evaluation.at_start:
        writer.log_evaluation(progress, evaluate_data(model, cfg.data, cfg.evaluation, device, watched))

    signalled = False
    while progress.step < end and not signalled:
        step = progress.step + 1
        run.watchdog.beat(f"step {step}")
        set_learning_rate(optimizer, learning_rate(step, cfg.optimizer.lr, cfg.scheduler, warmup, decay))
        with pace.waiting():
            micro_batches = list(itertools.islice(loader, accumulation))
        totals = count_tokens(micro_batches, saver.must_end() or run.signals.stop_requested, device)
        signalled = totals.stop_requested
        stop = signalled or step >= end
        logged = stop or step % cfg.trainer.log_every == 0
        seed_dropout(cfg.seed, step)
        counts = count_experts(cfg.loss, model, micro_batches, device, logged)
        seed_dropout(cfg.seed, step)
        metrics.start_step()
        for index, batch in enumerate(micro_batches):
            batch = to_device(batch, device)
            output = model.training_forward(**batch)
            losses = step_losses(cfg.loss, model, output, batch.get("attention_mask"), totals, counts)
            if zero is None:
                # Over shards with every micro-batch, so gradients stay sharded; over replicas once a step.
                model.set_requires_all_reduce(index == accumulation - 1)  # type: ignore[operator]
                losses.total.backward()
            else:
                zero.backward(losses.total)
            metrics.add(losses, output, batch.get("attention_mask"), totals, with_entropy=logged)
        grad_norm = clip_gradients(model.parameters(), max_norm) if zero is None else zero.step()
        guard.decide(optimizer, step, metrics.losses[0], grad_norm)
        if zero is None:
            optimizer.step()
            optimizer.zero_grad()
        progress = metrics.end_step(totals, cfg.trainer.global_batch_size)

        if logged:
            values = metrics.read(grad_norm) | {"train/skipped_steps": int(guard.skipped)}
            writer.log_step(progress, values, optimizer.param_groups[0]["lr"], last_step)
            guard.check(step)
            pace.name_slow_ranks()
            run.write_status("running", "training", step, last_step)
        if step == last_step or (cfg.evaluation.every and step % cfg.evaluation.every == 0):
            writer.log_evaluation(progress, evaluate_data(model, cfg.data, cfg.evaluation, device, watched))
        if stop or saver.due(step):
            guard.check(step)
            saver.save(step, training_state(described, progress, metrics, guard), signalled)
            signalled = on_any_rank(signalled or run.signals.stop_requested)
            writer.restart_clock(progress.tokens)
    saver.finish()
    writer.close()
    return run.finish(saver.saved_step, last_step, signalled)


def build_model(cfg: TrainConfig, mesh: Mesh) -> OlmoeForCausalLM:
    """The model in its layout on this rank, with its initial weights. Nothing is allocated before it is
    sharded."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(olmoe_config(cfg.model))
    model.set_experts_backend(cfg.model.experts_backend.value)
    model = parallelize(model, cfg, mesh)
    initialise(model, mesh.device, cfg.seed)
    if cfg.model.init_from is not None:
        load_into(model, cfg.model.init_from, cfg.model.trust_pickle)
    return model


def resume(
    cfg: TrainConfig, run: RunDirectory, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Load the checkpoint that checkpoint.resume asks for, if there is one; where the run stands.

    A damaged one is named and set aside, and the one before it is used.
    """
    for checkpoint in run.checkpoints_to_resume(cfg.checkpoint.resume):
        try:
            check_changes(saved_state(checkpoint), cfg, checkpoint)
            state = load_checkpoint(checkpoint, model, optimizer)
        except CheckpointError as error:
            run.set_aside(checkpoint, error)
            continue
        log.info("resumed from %s", checkpoint)
        return Progress.from_json(state)
    return Progress()


def training_state(
    described: dict[str, Any], progress: Progress, metrics: StepMetrics, guard: StepGuard
) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, as JSON: `described`, of the run, and where it stands;
    collective. No generator's state: seed_dropout."""
    state = replace(progress, expert_last_used=metrics.last_used(), guard=guard.state())
    return asdict(state) | described


def train_batches(cfg: TrainConfig, progress: Progress) -> Iterator[Batch]:
    return iter(
        build_train_loader(
            cfg.data,
            cfg.seed,
            start_sample=progress.samples,
            global_batch_size=cfg.trainer.global_batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            micro_batch_size=cfg.trainer.micro_batch_size,
        )
    )


@dataclass(frozen=True)
class Totals:
    """Counts over the step's global batch; scalars on the device unless they say otherwise."""

    tokens: Tensor
    """Tokens that are not padding."""
    targets: Tensor
    """Tokens that have a label to predict."""
    tokens_int: int
    """`tokens` on the host."""
    sequences_without_targets: int
    repetitive_sequences: int
    """Left out of the loss by data.repetition_filter."""
    stop_requested: bool
    """Whether any rank has had a signal to stop; every rank reads the same."""


def count_tokens(micro_batches: list[Batch], stop_requested: bool, device: torch.device) -> Totals:
    """One all-reduce of five numbers on the CPU, where the batches are: the GPU is not waited for.

    Takes the column `repetitive` out of the batches; the model gets the others.
    """
    counts = torch.zeros(5, dtype=torch.int64)
    for batch in micro_batches:
        mask = batch.get("attention_mask")
        counts[0] += batch["input_ids"].numel() if mask is None else mask.sum()
        is_target = batch["labels"][:, 1:] != IGNORE_INDEX
        counts[1] += is_target.sum()
        counts[2] += (~is_target.any(dim=1)).sum()
        if (repetitive := batch.pop("repetitive", None)) is not None:
            counts[3] += repetitive.sum()
    counts[4] = int(stop_requested)
    dist.all_reduce(counts)
    tokens, targets = counts[:2].clamp(min=1).to(device, torch.float32, non_blocking=True)
    on_host, _, empty, repetitive_count, stop = counts.tolist()
    return Totals(tokens, targets, on_host, empty, repetitive_count, bool(stop))


def seed_dropout(seed: int, step: int) -> None:
    """Dropout is a function of (seed, step, rank): the same in count_experts and after it, and after a
    resume."""
    number = seed + step * 1_000_003 + dist.get_rank()
    # Not torch.manual_seed: without CUDA it formats a stack trace for later, 0.8 ms a call (torch 2.13).
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def count_experts(
    cfg: LossConfig, model: OlmoeForCausalLM, micro_batches: list[Batch], device: torch.device, logged: bool
) -> Tensor | None:
    """Tokens per layer and expert [L, E] over the step's global batch, where they are needed before its
    backward.

    With balance_scope=global_batch the gradient of the first micro-batch depends on the routing of the
    last one, so several micro-batches take a forward pass more; where the loss has no weight, only when its
    value is logged. None: step_losses can do with the micro-batch it is given.
    """
    needed = model.config.num_experts > 1 and (cfg.router_aux_loss_coef != 0 or logged)
    if cfg.balance_scope is BalanceScope.micro_batch or len(micro_batches) == 1 or not needed:
        return None
    counts_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, device=device)
    with torch.no_grad():
        for batch in micro_batches:
            inputs = to_device(batch, device)
            del inputs["labels"]
            mask = inputs.get("attention_mask")
            output = model.training_forward(labels=None, **inputs)
            mask = None if mask is None else mask.reshape(-1).float()
            counts_LE += expert_counts(output.expert_indices, model.config.num_experts, mask)
    dist.all_reduce(counts_LE)
    return counts_LE


@dataclass(frozen=True)
class Losses:
    """This micro-batch's shares, fp32 scalars: summed over micro-batches and ranks they are the step's
    losses."""

    total: Tensor
    ce_loss: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    counts_LE: Tensor
    """Tokens of this micro-batch that each layer sent to each expert."""


def step_losses(
    cfg: LossConfig,
    model: OlmoeForCausalLM,
    output: TrainingOutput,
    attention_mask: Tensor | None,
    totals: Totals,
    total_counts_LE: Tensor | None,
) -> Losses:
    """total = CE + router_aux_loss_coef x LB + router_z_loss_coef x Z, each normalised by the global
    batch's counts. A dense model's (one expert) is CE alone."""
    experts = model.config.num_experts
    mask = None if attention_mask is None else attention_mask.reshape(-1).float()
    counts_LE = expert_counts(output.expert_indices, experts, mask)
    if experts == 1:
        total_counts_LE = totals.tokens.expand_as(counts_LE)
    elif total_counts_LE is None and cfg.balance_scope is BalanceScope.global_batch:
        total_counts_LE = counts_LE.clone()
        dist.all_reduce(total_counts_LE)
    balance, z_loss = router_losses(
        output.router_logits,
        output.expert_indices,
        experts,
        mask,
        cfg.convention,
        totals.tokens,
        total_counts_LE,
    )
    total = ce_loss = output.ce_sum / totals.targets
    if experts > 1:  # with one, LB is constant, and Z would pull at the hidden states for nothing
        total = ce_loss + cfg.router_aux_loss_coef * balance + cfg.router_z_loss_coef * z_loss
    return Losses(total, ce_loss, balance, z_loss, counts_LE)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def main(cfg: TrainConfig) -> int:
    try:
        return train(cfg)
    except BaseException as error:
        record_failure(cfg.run_dir, error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_verb("train", TrainConfig, main))
