"""What data.mask_documents costs or saves: one attention layer, forward and backward, by how it is confined.

Documents as in benchmarks/loader.py (median 400 tokens), laid end to end in sequences of 4,096 tokens. On a
GPU in bf16 torch's varlen attention is there too, and its difference from the mask is printed.

    python benchmarks/document_masks.py [--rounds 7] [--sequences 4] [--length 4096] [--hidden 2048]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from olmoe_train.model import OlmoeConfig
from olmoe_train.model.attention import (
    OlmoeAttention,
    document_mask,
    documents_and_positions,
    has_document_kernel,
)
from olmoe_train.model.rope import rotary_cos_sin


def document_offsets(sequences: int, length: int) -> Tensor:
    """Where documents start in the sequences laid end to end; each sequence starts one."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.2, sequences * length).astype(np.int64) + 1
    ends = lengths.cumsum()
    starts = {*range(0, sequences * length, length), *ends[ends < sequences * length].tolist()}
    return torch.tensor([*sorted(starts), sequences * length], dtype=torch.int32)


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    began = time.perf_counter()
    run().sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rounds", 7), ("sequences", 4), ("length", 4096), ("hidden", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = OlmoeConfig(hidden_size=options.hidden, num_attention_heads=max(1, options.hidden // 128))
    layer = OlmoeAttention(config, 0).to(device, dtype)
    torch.nn.init.ones_(layer.q_norm.get_parameter("weight"))
    torch.nn.init.ones_(layer.k_norm.get_parameter("weight"))
    x_BSD = torch.randn(options.sequences, options.length, options.hidden, device=device, dtype=dtype)
    offsets = document_offsets(options.sequences, options.length).to(device)
    documents_BS, positions_BS = documents_and_positions(offsets, options.sequences, options.length)
    rotary, mask = rotary_cos_sin(config, positions_BS, dtype), document_mask(documents_BS)
    ways: dict[str, Callable[[], Tensor]] = {
        "causal, documents see each other": lambda: layer(x_BSD, rotary, None)[0],
        "block mask": lambda: layer(x_BSD, rotary, mask)[0],
    }
    if has_document_kernel(x_BSD, 0.0):
        ways["varlen attention"] = lambda: layer(x_BSD, rotary, None, document_offsets=offsets)[0]
        with torch.no_grad():
            difference = (ways["varlen attention"]() - ways["block mask"]()).abs().max().item()
            print(f"largest difference of varlen attention from the mask: {difference:.2e}")
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):  # the first is a warm-up
        for name, run in ways.items():
            found[name].append(seconds(run, device))
    tokens = f"{options.sequences} x {options.length:,} tokens"
    print(f"{len(offsets) - 1} documents in {tokens}, {device}, {dtype}\n")
    print("| attention | ms | of causal |\n|---|---|---|")
    causal = statistics.median(found["causal, documents see each other"][1:])
    for name, times in found.items():
        median = statistics.median(times[1:])
        print(f"| {name} | {1000 * median:.1f} | {median / causal:.2f} |")


if __name__ == "__main__":
    main()
