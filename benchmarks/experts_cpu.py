"""Which expert matmul is faster on a CPU: one torch.mm an expert, or torch's F.grouped_mm?

Times OlmoeExperts (forward and backward, the model's own code) with both backends on the same rows, in turns,
so that whatever else the machine does meets both alike; prints medians, and the median of the ratios of
neighbours.

    python benchmarks/experts_cpu.py [--rounds 11] [--threads 2] [--dtypes float32 bfloat16]
"""

import argparse
import statistics
import time
from typing import NamedTuple

import torch

from olmoe_train.model import OlmoeConfig
from olmoe_train.model.moe.experts import OlmoeExperts, sort_by_expert


class Shape(NamedTuple):
    hidden: int
    width: int
    experts: int
    top_k: int
    tokens: int


SHAPES = [Shape(256, 256, 16, 4, tokens=2048), Shape(256, 64, 64, 8, tokens=2048)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.rounds} interleaved rounds")
    for shape in SHAPES:
        print(", ".join(f"{name} {value}" for name, value in shape._asdict().items()))
        for dtype in (getattr(torch, name) for name in args.dtypes):
            loop, grouped = interleaved_times(shape, dtype, args.rounds)
            ratio = statistics.median(g / w for g, w in zip(grouped, loop, strict=True))
            loop_ms, grouped_ms = statistics.median(loop) * 1e3, statistics.median(grouped) * 1e3
            print(
                f"  {dtype}: loop {loop_ms:.1f} ms, grouped {grouped_ms:.1f} ms, grouped / loop {ratio:.2f}"
            )


def interleaved_times(shape: Shape, dtype: torch.dtype, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round's forward and backward, for the loop and for the grouped matmul."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    module = OlmoeExperts(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # Uneven, as routing is: each token's top-k of random scores with a per-expert bias.
    scores_TE = torch.randn(shape.tokens, shape.experts) + torch.randn(shape.experts)
    weights_TK, indices_TK = scores_TE.softmax(-1).topk(shape.top_k)
    routing = sort_by_expert(indices_TK, shape.experts)
    x_TD = torch.randn(shape.tokens, shape.hidden, dtype=dtype, requires_grad=True)
    gradient_TD = torch.randn_like(x_TD)

    def step(backend: str) -> float:
        module.backend = backend
        start = time.perf_counter()
        module(x_TD, weights_TK, routing).backward(gradient_TD)
        elapsed = time.perf_counter() - start
        module.zero_grad()
        x_TD.grad = None
        return elapsed

    step("loop"), step("grouped_mm")  # first calls choose kernels and allocate
    pairs = [(step("loop"), step("grouped_mm")) for _ in range(rounds)]
    return [loop for loop, _ in pairs], [grouped for _, grouped in pairs]


if __name__ == "__main__":
    main()
