"""An optimizer step of preference tuning (DPO, sigmoid, beta 0.1) on a CPU: this project's packed pairs
against TRL's DPOTrainer on Transformers' OLMoE.

Both sides have the same weights, the same pairs, the same micro-batches of pairs, clipping at 1 and fused
AdamW, no activation checkpointing and no router loss; a step of each in turn. TRL pads every completion to
the longest of its micro-batch, which is its only layout (its `padding_free` is switched off). The reference
is cached (`precompute_ref_log_probs` in TRL) or live (a second model, run in every step).

First, with noise on the policy's weights, so that policy and reference differ, the loss and the gradients of
both sides are compared. Then it prints the median of each side's steps, the median of the rounds' ratios to
TRL, pairs/s and tokens/s (tokens that are not padding), and the memory of a step, each side in a process of
its own.

The side trl-compact is TRL with the positions that TRL selects on a GPU: it projects only targets to the
vocabulary there, but all positions on a CPU.

    python -m benchmarks.preference [--rounds 5] [--threads 1] [--dtypes fp32 bf16]
        [--references cached live] [--sides trl trl-compact ours] [--pairs 2] [--micro-batch 2]
        [--experts grouped_mm] [--hidden 256] [--profile]
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import trl
from datasets import disable_progress_bars
from torch import nn

from benchmarks.cpu_step import DTYPES, resident, time_rounds
from benchmarks.preference_sides import SIDES, Setting, Side, build_side, make_pairs

WARM_UP = 1
# Largest relative differences that are allowed of the loss, and of all gradients together (by norm).
# fp32 rounds a summed log-probability of some thousands to 2e-4 or 5e-4, and beta times that is what the loss
# sees. In bf16, rounding sends some tokens to other experts, whose gradients then differ.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (5e-2, None)}


def add_noise(model: nn.Module) -> None:
    """The same noise on both sides: the names and shapes of their parameters are equal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((1e-3 * noise).to(parameter.dtype))


def check_same(setting: Setting, names: list[str]) -> None:
    """Compare loss and gradients of a step, with noise on the policy's weights.

    Raises:
        SystemExit: They differ by more than TOLERANCES.
    """
    losses, gradients = {}, {}
    for name in names:
        side = build_side(name, setting)
        add_noise(side.model)
        losses[name] = side.backward()
        gradients[name] = {
            key: p.grad.float() for key, p in side.model.named_parameters() if p.grad is not None
        }
    first = names[0]
    of_loss_allowed, of_gradient_allowed = TOLERANCES[setting.dtype]
    size = sum(grad.square().sum() for grad in gradients[first].values())
    print(f"{setting.dtype}, {setting.reference}: loss {losses[first]:.6f} in {first}", flush=True)
    for name in names[1:]:
        of_loss = abs(losses[name] - losses[first]) / losses[first]
        pairs = ((gradients[name][key], grad) for key, grad in gradients[first].items())
        apart = sum((ours - theirs).square().sum() for ours, theirs in pairs)
        of_gradient = float((apart / size) ** 0.5)
        print(
            f"  {losses[name]:.6f} in {name}; relative differences: loss {of_loss:.1e}, "
            f"gradients {of_gradient:.1e}",
            flush=True,
        )
        if of_loss > of_loss_allowed or (of_gradient_allowed and of_gradient > of_gradient_allowed):
            raise SystemExit(f"the sides do not compute the same: {TOLERANCES[setting.dtype]} is allowed")


def step_of_round(side: Side) -> Callable[[int], float]:
    """A step on the side's pairs, whatever the round."""
    return lambda _index: side.step()


def compare(setting: Setting, names: list[str], rounds: int, profile: bool) -> None:
    sides = {name: build_side(name, setting) for name in names}
    seconds = time_rounds({name: step_of_round(side) for name, side in sides.items()}, rounds, WARM_UP)
    pairs = make_pairs(setting.pairs)
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    print(f"{setting.dtype}, {setting.reference}, step: median of {rounds}")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(seconds[names[0]], times, strict=True))
        print(
            f"  {name:12s} {1e3 * median:8.0f} ms {setting.pairs / median:6.2f} pairs/s "
            f"{tokens / median:7.0f} tokens/s   {ratio:.2f} x {names[0]}",
            flush=True,
        )
        if profile:
            with torch.profiler.profile() as profiler:
                sides[name].step()
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def memory_of(name: str, setting: Setting) -> tuple[float, float]:
    """MiB of a second step at its highest moment.

    Returns:
        (Beyond what the process held before it had a model: weights, reference, moments, gradients,
        activations, temporaries; beyond what it held just before the step: the last three.)
    """
    before = resident("VmRSS")
    side = build_side(name, setting)
    side.step()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    loaded = resident("VmRSS")
    side.step()
    peak = resident("VmHWM")
    return peak - before, peak - loaded


def compare_memory(setting: Setting, names: list[str], threads: int) -> None:
    """Each side in a process of its own."""
    # Freed blocks above 256 KiB go back to the system, see benchmarks/adapters.py.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    print(f"{setting.dtype}, {setting.reference}, MiB at the peak of a step")
    first: list[float] = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.preference", "--memory-of", name]
        command += ["--dtypes", setting.dtype, "--references", setting.reference]
        command += ["--pairs", str(setting.pairs), "--micro-batch", str(setting.micro_batch)]
        command += ["--experts", setting.experts, "--hidden", str(setting.hidden), "--threads", str(threads)]
        output = subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL)
        whole, added = (float(word) for word in output.split()[-2:])
        first = first or [whole, added]
        print(
            f"  {name:12s} with weights and moments {whole:5.0f} ({whole / first[0]:.2f} x), "
            f"added by the step {added:5.0f} ({added / first[1]:.2f} x)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--references", nargs="+", default=["cached", "live"], choices=["cached", "live"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=2, help="pairs; a divisor of --pairs")
    parser.add_argument("--experts", default="grouped_mm", help="Transformers' experts_implementation")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="print where each side's time goes")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-of", help="memory of one side, in this process")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    settings = [
        Setting(dtype, reference, args.pairs, args.micro_batch, args.experts, args.hidden)
        for dtype in args.dtypes
        for reference in args.references
    ]
    if args.memory_of:
        print(*memory_of(args.memory_of, settings[0]))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__} ({args.experts}), "
        f"trl {trl.__version__}, {args.threads} threads; hidden {args.hidden}, {args.pairs} pairs in "
        f"micro-batches of {args.micro_batch}"
    )
    for setting in settings:
        check_same(setting, args.sides)
        compare(setting, args.sides, args.rounds, args.profile)
        if not args.no_memory:
            compare_memory(setting, args.sides, args.threads)


if __name__ == "__main__":
    main()
