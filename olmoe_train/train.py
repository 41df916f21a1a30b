"""Pretrain or fine-tune OLMoE.

The file to read first: `train` is the whole run. Build, then for each step: forward, backward, clip, step,
save. Losses are divided by counts over the whole global batch before backward, and gradients are summed
over ranks, so a step does not depend on how its sequences are cut into ranks and micro-batches.
"""

import itertools
import logging
import sys
from collections.abc import Iterable

import torch.distributed as dist

from olmoe_train.checkpoint.saver import Saver
from olmoe_train.cli.app import run_verb
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.collectives import on_any_rank
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.evaluation.perplexity import evaluate_data
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.clipping import clip_gradients
from olmoe_train.optim.schedule import learning_rate, set_learning_rate
from olmoe_train.optim.skip_step import StepGuard
from olmoe_train.planning.duration import total_steps, warmup_and_decay_steps
from olmoe_train.run.directory import RunDirectory, record_failure
from olmoe_train.run.stragglers import Pace
from olmoe_train.training.batch import Batch, count_tokens, to_device
from olmoe_train.training.build import build_model, train_batches
from olmoe_train.training.compatibility import description
from olmoe_train.training.engine.deepspeed import start_engine
from olmoe_train.training.metrics import MetricsWriter, StepMetrics
from olmoe_train.training.objectives.next_token import count_experts, step_losses
from olmoe_train.training.preflight.checks import validate
from olmoe_train.training.resume import resume, training_state
from olmoe_train.training.state import seed_dropout

log = logging.getLogger("olmoe")


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
        counts = count_experts(cfg.loss, cfg.balancing, model, micro_batches, device, logged)
        seed_dropout(cfg.seed, step)
        metrics.start_step()
        for index, batch in enumerate(micro_batches):
            batch = to_device(batch, device)
            output = model.training_forward(**batch)
            mask = batch.get("attention_mask")
            losses = step_losses(cfg.loss, cfg.balancing, model, output, mask, totals, counts)
            if zero is None:
                # Over shards with every micro-batch, so gradients stay sharded; over replicas once a step.
                model.set_requires_all_reduce(index == accumulation - 1)  # type: ignore[operator]
                losses.total.backward()
            else:
                zero.backward(losses.total)
            metrics.add(losses, output, mask, totals, with_entropy=logged)
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


def main(cfg: TrainConfig) -> int:
    try:
        return train(cfg)
    except BaseException as error:
        record_failure(cfg.run_dir, error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run() -> int:
    return run_verb("train", TrainConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
