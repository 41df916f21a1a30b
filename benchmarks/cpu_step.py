"""A whole training step on a CPU (forward, losses, backward, fused AdamW): this project's model against
Transformers' OLMoE, from the same weights, on the same batches, a step of each in turn.

Prints for both shapes and precisions the median of each variant's steps and of its rounds' ratios to
Transformers with grouped_mm. With --memory instead, at the vocabulary of OLMoE-1B-7B, the most memory that a
step adds to the process; with --router, what routers and their losses take of a step.

    python -m benchmarks.cpu_step [--rounds 11] [--threads 2] [--shapes A B released] [--dtypes fp32 bf16]
        [--variants transformers transformers-compile ours ours-compile] [--memory] [--router] [--profile]
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig as TheirConfig
from transformers import OlmoeForCausalLM as TheirModel

from olmoe_train.distributed.compile import compile_layers
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.losses import router_losses_from_stats
from olmoe_train.model.moe.block import OlmoeTopKRouter
from olmoe_train.model.moe.experts import sort_by_expert
from olmoe_train.model.moe.router_stats import router_stats, stack_layers
from olmoe_train.planning.flops import train_flops_per_token

SEQUENCES, LENGTH, VOCABULARY, RELEASED_VOCABULARY = 4, 512, 4096, 50304
WARM_UP = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = ("transformers", "transformers-compile", "ours", "ours-compile")


@dataclass(frozen=True)
class Shape:
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4

    def __str__(self) -> str:
        return f"{self.num_experts} experts x {self.intermediate_size}, top-{self.num_experts_per_tok}"


SHAPES = {
    "A": Shape(256, 16, 4),
    "B": Shape(64, 64, 8),
    "released": Shape(1024, 64, 8, 2048, 1, 16, 16),  # one layer of OLMoE-1B-7B: 6.5 GB with its moments
}
SMALL = ["A", "B"]


def config_fields(shape: Shape, vocabulary: int) -> dict[str, Any]:
    return vars(shape) | {
        "vocab_size": vocabulary,
        "max_position_embeddings": LENGTH,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "output_router_logits": True,
        "use_cache": False,
    }


def build_step(
    variant: str, shape: Shape, dtype: torch.dtype, vocabulary: int = VOCABULARY
) -> Callable[[Tensor], float]:
    """One training step of a fresh model with the weights of seed 0: ids [B, S] -> loss."""
    name, _, option = variant.partition("-")
    fields = config_fields(shape, vocabulary)
    torch.manual_seed(0)
    theirs = TheirModel(TheirConfig(**fields))
    torch.nn.Module.to(theirs, dtype)
    if name == "transformers":
        model: torch.nn.Module = theirs
        theirs.set_experts_implementation("grouped_mm")
        run = torch.compile(theirs, dynamic=False) if option == "compile" else theirs

        def loss_of(ids_BS: Tensor) -> Tensor:
            return run(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
    else:
        ours = OlmoeForCausalLM(OlmoeConfig(**fields)).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        model = ours
        if option == "compile":
            compile_layers(ours)
        targets = SEQUENCES * (LENGTH - 1)

        def loss_of(ids_BS: Tensor) -> Tensor:
            output = ours.training_forward(ids_BS, ids_BS)
            balance, z_loss = router_losses_from_stats(output.router, shape.num_experts_per_tok)
            return output.ce_sum / targets + 0.01 * balance + 0.001 * z_loss

    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    return step_of(loss_of, optimizer)


def step_of(
    loss_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[Tensor], float]:
    """One training step: ids [B, S] -> loss."""

    def step(ids_BS: Tensor) -> float:
        loss = loss_of(ids_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def batch(index: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(2, vocabulary, (SEQUENCES, LENGTH), generator=generator)


def time_steps(steps: dict[str, Callable[[Tensor], float]], rounds: int) -> dict[str, list[float]]:
    """`time_rounds` of steps that all see a new batch each round, and the same one."""

    def of_round(step: Callable[[Tensor], float]) -> Callable[[int], float]:
        return lambda index: step(batch(index))

    return time_rounds({name: of_round(step) for name, step in steps.items()}, rounds)


def time_rounds(
    steps: dict[str, Callable[[int], float]], rounds: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Seconds of every round of each step, which gets the number of the round. warm_up: rounds before the
    first that counts."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warm_up + rounds):
        # In another order every time: a step pays for the memory that the one before it gave back.
        for name, step in random.sample(list(steps.items()), len(steps)):
            start = time.perf_counter()
            step(index)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[warm_up:] for name, times in seconds.items()}


def compare(shape: Shape, dtype: str, variants: list[str], rounds: int, profile: bool) -> None:
    steps = {variant: build_step(variant, shape, DTYPES[dtype]) for variant in variants}
    seconds = time_steps(steps, rounds)
    tokens = SEQUENCES * LENGTH
    flops = train_flops_per_token(OlmoeConfig(**config_fields(shape, VOCABULARY)), LENGTH).total
    print(f"{shape}, {dtype}: median of {rounds}")
    for variant, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(seconds[variants[0]], times, strict=True))
        print(
            f"  {variant:22s} {1e3 * median:8.1f} ms {tokens / median:8.0f} tokens/s"
            f" {flops * tokens / median / 1e9:6.1f} GFLOP/s   {ratio:.2f} x {variants[0]}",
            flush=True,
        )
        if profile:
            with torch.profiler.profile() as profiler:
                steps[variant](batch(0))
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def router_share(shape: Shape, dtype: str, variant: str, rounds: int) -> None:
    """Routers, sorting and both router losses, forward and backward, as a share of the whole step."""
    config = OlmoeConfig(**config_fields(shape, VOCABULARY))
    layers = range(config.num_hidden_layers)
    gates = [OlmoeTopKRouter(config).to(DTYPES[dtype]) for _ in layers]
    for gate in gates:
        torch.nn.init.normal_(gate.weight, std=0.02)
    size = (SEQUENCES * LENGTH, config.hidden_size)
    inputs = [torch.randn(size).to(DTYPES[dtype]).requires_grad_() for _ in layers]

    def route() -> None:
        routed = [gate(x_TD) for gate, x_TD in zip(gates, inputs, strict=True)]
        stats = []
        for logits_TE, probs_TE, _, indices_TK in routed:
            sort_by_expert(indices_TK, shape.num_experts)
            stats.append(router_stats(logits_TE, probs_TE, indices_TK))
        losses = router_losses_from_stats(stack_layers(stats), shape.num_experts_per_tok)
        (sum(losses) + sum(weights_TK.sum() for _, _, weights_TK, _ in routed)).backward()

    step = build_step(variant, shape, DTYPES[dtype])
    shares = []
    for index in range(WARM_UP + rounds):
        times = [time.perf_counter()]
        route()
        times.append(time.perf_counter())
        step(batch(index))
        times.append(time.perf_counter())
        shares.append((times[1] - times[0]) / (times[2] - times[1]))
    share = statistics.median(shares[WARM_UP:])
    print(f"{shape}, {dtype}: routers and their losses {share:.1%} of {variant}")


def added_memory(variant: str, shape: Shape, dtype: str) -> float:
    """MiB that this process holds at the highest moment of a second step, beyond what it held before it had a
    model: weights, gradients, moments, activations, temporaries."""
    before = resident("VmRSS")
    step = build_step(variant, shape, DTYPES[dtype], RELEASED_VOCABULARY)
    step(batch(0, RELEASED_VOCABULARY))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    step(batch(1, RELEASED_VOCABULARY))
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of a field of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def compare_memory(shapes: list[str], dtypes: list[str], variants: list[str], threads: int) -> None:
    """Each variant in a process of its own."""
    print(f"MiB that a step adds, vocabulary {RELEASED_VOCABULARY}")
    for shape in shapes:
        for dtype in dtypes:
            found = {}
            for variant in variants:
                command = ["--memory-of", variant, "--shapes", shape, "--dtypes", dtype]
                command += ["--threads", str(threads)]
                output = subprocess.check_output([sys.executable, "-m", "benchmarks.cpu_step", *command])
                found[variant] = float(output.split()[-1])
            told = ", ".join(
                f"{name} {mib:.0f} ({mib / found[variants[0]]:.2f} x)" for name, mib in found.items()
            )
            print(f"  {SHAPES[shape]}, {dtype}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=SMALL, choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--profile", action="store_true", help="print where each variant's time goes")
    parser.add_argument("--memory", action="store_true", help="memory in place of time")
    parser.add_argument("--router", action="store_true", help="share of routers in the last variant's step")
    parser.add_argument("--memory-of", help="of one variant, in this process")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.router:
        for shape in args.shapes:
            for dtype in args.dtypes:
                router_share(SHAPES[shape], dtype, args.variants[-1], args.rounds)
        return
    if args.memory_of:
        print(added_memory(args.memory_of, SHAPES[args.shapes[0]], args.dtypes[0]))
        return
    print(f"torch {torch.__version__}, {args.threads} threads")
    if args.memory:
        compare_memory(args.shapes, args.dtypes, args.variants, args.threads)
        return
    for shape in args.shapes:
        for dtype in args.dtypes:
            compare(SHAPES[shape], dtype, args.variants, args.rounds, args.profile)


if __name__ == "__main__":
    main()
