"""Pretrain or fine-tune OLMoE.

The file to read first: `train` is the whole run. Build, then for each step: forward, backward, clip, step,
save. Losses are divided by counts over the whole global batch before backward, and gradients are summed
over ranks, so a step does not depend on how its sequences are divided into ranks and micro-batches.
"""

import sys
from collections.abc import Iterable
from functools import partial

from olmoe_train.cli.app import run_verb
from olmoe_train.cli.help import description
from olmoe_train.cli.multirun import is_multirun, multirun
from olmoe_train.cli.ranks import on_ranks
from olmoe_train.config.compose import plain_values
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.distributed.rendezvous import leave_distributed
from olmoe_train.optim.skip_step import SkipGuard
from olmoe_train.training.batch import Batch, Totals, count_tokens, to_device
from olmoe_train.training.build import (
    build_callbacks,
    build_data,
    build_engine,
    build_run,
    build_schedule,
    build_step_batches,
    count_steps,
)
from olmoe_train.training.build_objective import build_objective
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.compatibility import resume_fingerprint
from olmoe_train.training.engine.base import Engine
from olmoe_train.training.metrics import StepTerms
from olmoe_train.training.objectives.base import Objective
from olmoe_train.training.resume import resume, start_callbacks
from olmoe_train.training.state import TrainState, seed_dropout
from olmoe_train.utils.exit_codes import OK, STOPPED_BY_SIGNAL


def train(
    cfg: TrainConfig, batches: Iterable[Batch] | None = None, callbacks: tuple[Callback, ...] = ()
) -> TrainState:
    """Run the whole configuration, on one process or on all that torchrun started.

    Args:
        cfg: from olmoe_train.config.compose.
        batches: this rank's micro-batches on the CPU, in place of the prepared data. input_ids and targets
            (or labels in Transformers' form), int64 [B, S], are enough; see training/batch.py.
        callbacks: called after the run's own callbacks.

    Returns:
        The final position: step, tokens, samples, and whether a signal stopped the run.

    Raises:
        UserError: the configuration or the data is wrong; the message names the key and the fix.
    """
    device = init_distributed(cfg.trainer.device.value, cfg.trainer.rendezvous_timeout)
    with build_run(cfg) as run:
        data = build_data(cfg)
        last_step = count_steps(cfg, data)
        schedule = build_schedule(cfg, last_step)
        engine = build_engine(cfg, device)
        objective = build_objective(cfg, engine.model, data, device, run.watchdog.with_heartbeat)
        identity = resume_fingerprint(plain_values(cfg), schedule, data, engine.model.base)
        saved = resume(cfg.checkpoint, run, engine, identity)
        run.write_config(cfg)
        state = TrainState.from_saved(saved, last_step)
        guard = SkipGuard(cfg.trainer, saved and saved["guard"], device)
        steps = build_step_batches(cfg, data, state.samples, objective.columns, batches)
        hooks = build_callbacks(cfg, run, engine, objective, guard, data, steps, identity, state, callbacks)
        start_callbacks(hooks, saved, state)

        end = min(last_step, cfg.trainer.stop_at_step or last_step)
        while state.step < end and not run.stopping:
            step = state.step + 1
            run.watchdog.heartbeat(f"step {step}")
            micro_batches = next(steps)
            stop_requested = any(hook.must_stop() for hook in hooks) or run.stop_requested
            totals = count_tokens(micro_batches, stop_requested, device)
            run.stopping = totals.stop_requested
            is_last = run.stopping or step >= end
            is_logged = is_last or step % cfg.trainer.log_every == 0
            micro_batches = [to_device(batch, device) for batch in micro_batches]
            engine.set_learning_rate(schedule.multiplier(step))
            seed_dropout(cfg.seed, step)
            totals = objective.begin_step(engine.model, micro_batches, totals, is_logged)
            seed_dropout(cfg.seed, step)
            terms = forward_backward(engine, objective, micro_batches, totals)
            outcome = engine.step(partial(guard.judge, step, terms.loss))
            objective.end_step(engine.model, totals, outcome.skipped)
            state = state.advance(totals.num_tokens_host, steps.size)
            for hook in hooks:
                hook.on_step(state, StepReport(totals, terms, outcome, is_logged, is_last))
        for hook in hooks:
            hook.on_end(state)
        run.finish(last_step)
        return state.ended(run.stopping and run.saved_step < last_step)


def forward_backward(
    engine: Engine, objective: Objective, micro_batches: list[Batch], totals: Totals
) -> StepTerms:
    """Accumulate the gradients of one step's micro-batches on this rank; the sums of loss and terms."""
    terms = StepTerms(totals.num_tokens.device)
    for index, micro_batch in enumerate(micro_batches):
        loss, named = objective(engine.model, micro_batch, totals)
        engine.backward(loss, last=index == len(micro_batches) - 1)
        terms.add(loss, named)
    return terms


def main(cfg: TrainConfig) -> int:
    """`train` as a command: returns the exit code, and leaves the process group."""
    try:
        return STOPPED_BY_SIGNAL if train(cfg).stopped_by_signal else OK
    finally:
        leave_distributed(cfg.trainer.rendezvous_timeout)


def run() -> int:
    if is_multirun(sys.argv[1:]):
        return multirun(sys.argv[1:])
    train_here = partial(run_verb, "train", TrainConfig, main, description("train", __doc__))
    return on_ranks("olmoe_train.train", train_here)


if __name__ == "__main__":
    sys.exit(run())
