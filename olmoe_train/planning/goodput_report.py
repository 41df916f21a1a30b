"""What `olmoe plan` prints about failures: how often to save, and which part of the time is lost."""

from olmoe_train.config.choices import Strategy
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.adapter import adapter_plan
from olmoe_train.planning.goodput import Failures, Save, best_every, goodput
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory import rank_memory
from olmoe_train.planning.report import GB, plan_layout, plan_micro_batch, plan_speed
from olmoe_train.utils.tables import aligned

GPU_COUNTS = (64, 128, 256, 512, 1024)
HOUR, WEEK_HOURS, YEAR = 3600.0, 168, 365.25 * 86_400


def checkpoint_bytes(cfg: PlanConfig) -> int:
    """Bytes of a checkpoint: trained weights in fp32, as large as gradients, and the optimizer's state."""
    whole, averaged = ParallelLayout(Strategy.fsdp, 1), cfg.trainer.ema_decay is not None
    batch, adapter = plan_micro_batch(cfg), adapter_plan(cfg.adapter)
    memory = rank_memory(olmoe_config(cfg.model), whole, batch, adapter, cfg.optimizer, averaged)
    return memory.gradients + memory.optimizer


def plan_failures(cfg: PlanConfig, gpus: int) -> Failures:
    """Failures of a run on this many GPUs."""
    reading = checkpoint_bytes(cfg) / (cfg.failures.disk_gb_per_second * GB)
    mean_between = YEAR / (cfg.failures.per_gpu_year * gpus)
    return Failures(mean_between, cfg.failures.restart_seconds + reading)


def plan_save(cfg: PlanConfig, gpus: int, in_background: bool) -> Save:
    """A save of a run on this many GPUs, synchronous or with checkpoint.async_save.

    In the background, training waits only for the copy of each rank's part into the memory of its host, and
    is slowed down while it is written.
    """
    size, failures = checkpoint_bytes(cfg), cfg.failures
    seconds = failures.save_seconds
    if seconds is None:
        seconds = 2 * size / (failures.disk_gb_per_second * GB)  # written, and read back to verify it
    if not in_background:
        return Save(seconds)
    layout = plan_layout(cfg)
    shards = 1 if layout.strategy is Strategy.ddp else max(1, gpus // layout.replicate_size)
    copied = size / shards / (failures.host_gb_per_second * GB)
    return Save(copied + failures.background_slowdown * seconds, seconds)


def goodput_lines(cfg: PlanConfig) -> list[str]:
    """Lines with the best checkpoint.every and the goodput, for gpus and for 64 to 1,024 GPUs."""
    failures, size = cfg.failures, checkpoint_bytes(cfg)
    save = plan_save(cfg, cfg.gpus, in_background=False).blocked
    columns = ["every", "minutes", "goodput", "lost"]
    rows = [["GPUs", "MTBF, h", *columns, *columns]]
    rows += [_row(cfg, gpus) for gpus in sorted({cfg.gpus, *GPU_COUNTS})]
    in_background = cfg.checkpoint.async_save
    every, best = _best(cfg, cfg.gpus, in_background)
    mode = f"checkpoint.async_save={str(in_background).lower()}"
    restart = f"{failures.restart_seconds:g} s and the reading of a checkpoint"
    lines = [
        f"failures: {failures.per_gpu_year:g} per GPU and year; a restart takes {restart}",
        f"a checkpoint has {size / GB:,.4g} GB, and a synchronous save takes {save:,.3g} s",
        "(MTBF: mean time between failures of the run; every: checkpoint.every in steps, by Daly's interval;",
        "minutes: of steps between saves; goodput: part of the time that is spent on steps that count;",
        "lost: GPU hours per week; first for synchronous saves, then for checkpoint.async_save=true;",
        "with twice the GPUs, a step is taken to need half the time)",
        *(f"  {line}" for line in aligned(rows, left=())),
        f"best for {cfg.gpus:,} GPUs with {mode}: checkpoint.every={every}, goodput {best:.2%}",
    ]
    if cfg.checkpoint.every > 0:
        now = _goodput(cfg, cfg.gpus, in_background, cfg.checkpoint.every)
        lines.append(f"  with checkpoint.every={cfg.checkpoint.every} it is {now:.2%}")
    else:
        lines.append("  checkpoint.every=0 saves only at the end: a failure loses the whole run")
    return lines


def _row(cfg: PlanConfig, gpus: int) -> list[str]:
    hours = plan_failures(cfg, gpus).mean_between / HOUR
    cells = [f"{gpus:,}", f"{hours:,.1f}"]
    for in_background in (False, True):
        every, part = _best(cfg, gpus, in_background)
        lost = (1 - part) * gpus * WEEK_HOURS
        minutes = every * _step_seconds(cfg, gpus) / 60
        cells += [f"{every:,}", f"{minutes:,.1f}", f"{part:.2%}", f"{lost:,.1f}"]
    return cells


def _step_seconds(cfg: PlanConfig, gpus: int) -> float:
    """Seconds of a step, as if its speed grew with the number of GPUs."""
    return plan_speed(cfg).seconds_per_step * cfg.gpus / gpus


def _best(cfg: PlanConfig, gpus: int, in_background: bool) -> tuple[int, float]:
    """The best checkpoint.every, and its goodput."""
    save, failures = plan_save(cfg, gpus, in_background), plan_failures(cfg, gpus)
    every = best_every(_step_seconds(cfg, gpus), save, failures)
    return every, _goodput(cfg, gpus, in_background, every)


def _goodput(cfg: PlanConfig, gpus: int, in_background: bool, every: int) -> float:
    save, failures = plan_save(cfg, gpus, in_background), plan_failures(cfg, gpus)
    return goodput(every * _step_seconds(cfg, gpus), save, failures)
