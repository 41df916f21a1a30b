"""OLMoE-1B-7B's training step on one GPU: is it right, and how fast is it, against Transformers' grouped_mm?

Needs torch, numpy, safetensors and the olmoe_train beside it: no Hydra, no installation, no data. With
transformers it compares; without, it says so and times what there is. In one command, on random tokens:

1. parity: loss and gradients in bf16, of each backend and of Transformers, against Transformers in fp32;
2. no host sync in forward and backward (torch.cuda.set_sync_debug_mode);
3. the expert layer alone, forward and backward;
4. the whole step: forward, losses with the router's, backward, clipping, fused AdamW. 16 layers where memory
   allows; with fewer, those of 16 are computed from what a layer, and what is no layer, was measured to take.

Every variant computes with the same parameters, in turn; medians. Weights, gradients and both moments are
bf16, 8 bytes per parameter (52 GiB), so that all layers fit 80 GB: the fp32 masters and moments would
make 16 bytes, 103 GiB. Their update takes about twice as long (30 bytes read and written, not 14).

    python benchmarks/gpu_step.py [--micro-batch 1] [--rounds 7] [--profile]
    python benchmarks/gpu_step.py --device cpu --layers 2 --hidden 64 ...    # try it out
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.gpu_models import (
    RELEASED_LAYERS,
    Loss,
    build,
    build_compiled,
    check_parity,
    fields,
    fitting_layers,
    free_memory,
    layers_of,
    our_loss,
    random_ids,
    their_loss,
    transformers_twin,
)
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.moe.sonicmoe import why_not_here
from olmoe_train.planning.flops import peak_flops, train_flops_per_token

BACKENDS = ("grouped_mm", "loop", "sonicmoe")
UPDATE_EVERY = 131_072  # tokens; the update of 6.9G parameters is dear
WARM_UP = 2  # rounds that are not counted
GIB = 2**30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", action="store_true", help="a table of kernels for every variant")
    add_shape(parser)
    return parser.parse_args()


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options of gpu_step.py and on_gpu.py: OLMoE-1B-7B unless they say otherwise."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="default: as many of 16 as fit")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences a forward pass")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=4, help="of a timed step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    for name, value in (("hidden", 2048), ("width", 1024), ("experts", 64), ("top-k", 8), ("heads", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=50304)


def check_host_syncs(args: argparse.Namespace, model: OlmoeForCausalLM) -> None:
    if args.device == "cpu":
        print("host syncs: not checked, no CUDA")
        return
    loss, ids_BS = our_loss(model, "grouped_mm"), random_ids(args, args.micro_batch)
    loss(ids_BS).backward()  # first calls look things up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(ids_BS).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.zero_grad()
    print("host syncs: none in forward, losses and backward of grouped_mm")


# --- how fast is it? --------------------------------------------------------------------------------------


def now(args: argparse.Namespace) -> float:
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    args: argparse.Namespace, steps: dict[str, Callable[[], tuple[float, ...]]]
) -> dict[str, list[tuple[float, ...]]]:
    """What each step returns, in turns; a variant that fails is named and left out."""
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for round_number in range(args.rounds + WARM_UP):
        for name in list(results):
            found = None
            try:
                found = steps[name]()
            except RuntimeError as error:  # torch.OutOfMemoryError and NotImplementedError are such
                print(f"{name}: left out: {type(error).__name__}: {str(error).splitlines()[0]}")
                del results[name]
            if found is None:
                free_memory(args)  # here, where the error does not hold it any more
            elif round_number >= WARM_UP:
                results[name].append(found)
    return results


def time_expert_layer(
    args: argparse.Namespace, model: OlmoeForCausalLM, theirs: Any | None
) -> dict[str, float]:
    """Router and experts of the first layer, forward and backward, on as many tokens as a micro-batch has.

    Returns:
        Median seconds of every variant.
    """
    x_BSD = torch.randn(args.micro_batch, args.sequence, args.hidden, device=args.device).bfloat16()
    x_BSD.requires_grad_()
    gradient_BSD = torch.randn_like(x_BSD)

    def step(block: Any, backend: str | None) -> Callable[[], tuple[float, ...]]:
        def run() -> tuple[float, ...]:
            if backend is not None:
                model.set_experts_backend(backend)
            start = now(args)
            result = block(x_BSD)
            (result[0] if isinstance(result, tuple) else result).backward(gradient_BSD)
            return (now(args) - start,)

        return run

    steps = {f"ours, {name}": step(model.model.layers[0].mlp, name) for name in args.backends}
    if theirs is not None:
        steps["transformers"] = step(theirs.model.layers[0].mlp, None)
    results = interleaved(args, steps)
    model.zero_grad()
    flops = expert_layer_flops(args)
    print()
    print_row("expert layer", "ms", *RATE, "x transformers")
    print_row(*["---"] * 5)
    speeds = {name: 1 / statistics.median(found[0] for found in times) for name, times in results.items()}
    for name, speed in speeds.items():
        print_row(
            name,
            f"{1e3 / speed:.2f}",
            *rate(args, flops * speed),
            ratio(speed, speeds.get("transformers")),
        )
    return {name: 1 / speed for name, speed in speeds.items()}


def expert_layer_flops(args: argparse.Namespace) -> int:
    """3 matrices, 3 products of each, 2 a multiply-add."""
    tokens = args.micro_batch * args.sequence
    return int(18 * tokens * args.top_k * args.hidden * args.width)


Timed = dict[str, tuple[float, float]]  # seconds of a micro-batch's forward and backward, and of an update


def time_steps(args: argparse.Namespace, losses: dict[str, Loss], optimizer: torch.optim.Optimizer) -> Timed:
    """Medians over the rounds; each step takes new tokens."""
    parameters = optimizer.param_groups[0]["params"]

    def step(loss: Loss) -> tuple[float, ...]:
        batches = [random_ids(args, args.micro_batch) for _ in range(args.micro_batches)]
        start = now(args)
        for ids_BS in batches:
            (loss(ids_BS) / len(batches)).backward()
        middle = now(args)
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return (middle - start) / len(batches), now(args) - middle

    results = interleaved(args, {name: partial(step, loss) for name, loss in losses.items()})
    return {
        name: (statistics.median(a for a, _ in found), statistics.median(b for _, b in found))
        for name, found in results.items()
        if found
    }


def compare_steps(
    args: argparse.Namespace, models: list[Any], losses: dict[str, Loss]
) -> tuple[dict[int, Timed], dict[str, float | None]]:
    """Every variant's whole step; with fewer than 16 layers a second time with half of them, so that a layer
    and what is not layers are told apart. models: upon the same parameters.

    Returns:
        Times by number of layers, those of 16 layers computed where fewer were measured; and peak memory.
    """
    model = models[0]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    layers, half = model.config.num_hidden_layers, model.config.num_hidden_layers // 2
    whole, part = time_steps(args, losses, optimizer), {}
    if half and layers < RELEASED_LAYERS:
        with ExitStack() as cut:
            for each in models:
                cut.enter_context(layers_of(each, half))
            part = time_steps(args, {name: losses[name] for name in whole}, optimizer)
    peaks = {name: peak_memory(args, losses[name]) for name in whole}
    print_steps(args, f"{layers} layers", layers, whole, peaks)
    found = {layers: whole}
    if part:
        names = [name for name in whole if name in part]
        at_16 = {name: extrapolate(whole[name], part[name], layers, half) for name in names}
        print_steps(args, f"{RELEASED_LAYERS} layers, computed", RELEASED_LAYERS, at_16, {})
        found[RELEASED_LAYERS] = at_16
    if args.profile:
        for name in whole:
            profile(args, name, losses[name])
    return found, peaks


def extrapolate(
    whole: tuple[float, float], part: tuple[float, float], layers: int, half: int
) -> tuple[float, float]:
    """Of the released model's layers, from what a layer takes and what is left without any."""
    found = []
    for of_all, of_half in zip(whole, part, strict=True):
        a_layer = (of_all - of_half) / (layers - half)
        found.append(of_all + (RELEASED_LAYERS - layers) * a_layer)
    return found[0], found[1]


def peak_memory(args: argparse.Namespace, loss: Loss) -> float | None:
    """GiB at the highest moment of a forward and backward pass, state included."""
    if args.device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    loss(random_ids(args, args.micro_batch)).backward()
    return torch.cuda.max_memory_allocated() / GIB


def profile(args: argparse.Namespace, name: str, loss: Loss) -> None:
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] if args.device == "cpu" else [activity.CPU, activity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        loss(random_ids(args, args.micro_batch)).backward()
        now(args)
    key = "self_cpu_time_total" if args.device == "cpu" else "self_cuda_time_total"
    print(f"\n{name}\n{profiler.key_averages().table(sort_by=key, row_limit=30)}")


# --- what is printed --------------------------------------------------------------------------------------


def print_steps(
    args: argparse.Namespace, title: str, layers: int, times: Timed, peaks: dict[str, float | None]
) -> None:
    """tokens/s: of forward and backward, and with an update every UPDATE_EVERY tokens."""
    flops, speeds = flops_per_token(args, layers), tokens_per_second(args, times)
    print(f"\n{title}: {flops / 1e9:.3f} GFLOP per token")
    print_row("step", "pass, ms", "update, ms", "tokens/s", *RATE, "pass, peak GiB", "x transformers")
    print_row(*["---"] * 8)
    for name, (one, update) in times.items():
        peak = peaks.get(name)
        print_row(
            name,
            f"{1e3 * one:.1f}",
            f"{1e3 * update:.1f}",
            f"{speeds[name]:,.0f}",
            *rate(args, flops * speeds[name]),
            "-" if peak is None else f"{peak:.1f}",
            ratio(speeds[name], speeds.get("transformers")),
        )


def flops_per_token(args: argparse.Namespace, layers: int) -> float:
    return train_flops_per_token(OlmoeConfig(**fields(args, layers)), args.sequence).total


def tokens_per_second(args: argparse.Namespace, times: Timed) -> dict[str, float]:
    """With an update every UPDATE_EVERY tokens."""
    tokens = args.micro_batch * args.sequence
    passes = max(1, UPDATE_EVERY // tokens)
    return {name: passes * tokens / (passes * one + update) for name, (one, update) in times.items()}


RATE = ("TFLOP/s", "of peak")


def rate(args: argparse.Namespace, flops_a_second: float) -> tuple[str, str]:
    peak = peak_of(args)
    return f"{flops_a_second / 1e12:.4g}", "-" if peak is None else f"{flops_a_second / peak:.1%}"


def peak_of(args: argparse.Namespace) -> float | None:
    """FLOP/s of the device in bf16 by its data sheet; None where it is not known."""
    return None if args.device == "cpu" else peak_flops(torch.cuda.get_device_name(), torch.bfloat16)


def ratio(speed: float, of_transformers: float | None) -> str:
    return "-" if of_transformers is None else f"{speed / of_transformers:.2f}"


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    args = parse()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA here; --device cpu and a small shape try this out", file=sys.stderr)
        return 2
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {args.micro_batch} x {args.sequence} tokens a pass")
    reason = why_not_here(args.device != "cpu") if "sonicmoe" in args.backends else None
    if reason is not None:
        print(f"sonicmoe: left out: {reason}")
        args.backends.remove("sonicmoe")
    right = check_parity(args)
    layers = fitting_layers(args)
    model = build(args, layers)
    twin, models, losses = variants(args, model)
    check_host_syncs(args, model)
    time_expert_layer(args, model, twin)
    compare_steps(args, models, losses)
    return 0 if right else 1


def variants(
    args: argparse.Namespace, model: OlmoeForCausalLM
) -> tuple[Any | None, list[Any], dict[str, Loss]]:
    """Transformers' model, all models, and the loss of every variant, all upon the parameters of `model`."""
    twin = transformers_twin(model, args)
    compiled = build_compiled(args, model) if args.compile else None
    losses = {f"ours, {name}": our_loss(model, name) for name in args.backends}
    if compiled is not None:
        losses[f"ours, {args.backends[0]}, compiled"] = our_loss(compiled, args.backends[0])
    if twin is not None:
        losses["transformers"] = their_loss(twin)
    return twin, [each for each in (model, compiled, twin) if each is not None], losses


if __name__ == "__main__":
    sys.exit(main())
