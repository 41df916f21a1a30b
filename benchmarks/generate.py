"""Greedy decoding: against Transformers' generate on the same weights, with the cache against recomputation,
and many uneven prompts with continuous batching (--only prompts).

Whatever is compared takes turns, so that other work on the machine meets all alike; medians, and the median
of the ratios of neighbours. In float32 the tokens must be the same ones.

What the cache should win: N new tokens after a prompt of P compute P + N - 1 positions with it, and
N P + N (N - 1) / 2 without. A position of a long pass costs less than one of a step that decodes one token,
so the factor to expect is the time of N bare passes of recomputation's mean length over that of one bare pass
of the prompt and N - 1 of a single token behind a cache.

Uneven prompts: 8 to 128 tokens each, and one token in 50 ends a completion, after 128 tokens at most. The
peer decodes them with `generate`, in batches of prompts sorted by length and padded on the left. Only tokens
up to the end of a completion count.

    python -m benchmarks.generate [--rounds 7] [--threads 2] [--prompt 128] [--new 64] [--only prompts]
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.kv_cache import KVCache

SHAPES = {
    "16 experts x 256, top-4": {"num_experts": 16, "intermediate_size": 256, "num_experts_per_tok": 4},
    "64 experts x 64, top-8": {"num_experts": 64, "intermediate_size": 64, "num_experts_per_tok": 8},
}
VOCABULARY = 4096


def models(
    shape: dict[str, int], dtype: torch.dtype
) -> tuple[OlmoeForCausalLM, transformers.OlmoeForCausalLM]:
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "eos_token_id": None,  # every row goes on to the end
        "pad_token_id": None,
        **shape,
    }
    torch.manual_seed(0)
    ours = OlmoeForCausalLM(OlmoeConfig(**config)).to(dtype).eval()
    theirs: Any = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**config))
    theirs = theirs.to(dtype).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def in_turns(ways: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of every round, for each way; one round more goes first, which is not counted."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, found in zip(ways, times, strict=True):
            began = time.perf_counter()
            way()
            found.append(time.perf_counter() - began)
    return [found[1:] for found in times]


def ratio(times: list[float], of: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


def against_transformers(options: argparse.Namespace) -> None:
    print("| model | batch | dtype | ours, tokens/s | Transformers, tokens/s | ours / theirs | same tokens |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = models(shape, dtype)
            for batch in (1, 8):
                ids = torch.randint(VOCABULARY, (batch, options.prompt))

                def mine(ids: Tensor = ids, model: OlmoeForCausalLM = ours) -> Tensor:
                    return model.generate(ids, max_new_tokens=options.new)

                def other(ids: Tensor = ids, model: Any = theirs) -> Tensor:
                    return model.generate(ids, max_new_tokens=options.new, do_sample=False)

                same = (mine()[:, options.prompt :] == other()[:, options.prompt :]).float().mean().item()
                if dtype is torch.float32 and same < 1:
                    raise SystemExit(f"{name}, batch {batch}: other tokens than Transformers'")
                our_s, their_s = in_turns([mine, other], options.rounds)
                rates = [batch * options.new / statistics.median(times) for times in (our_s, their_s)]
                print(
                    f"| {name} | {batch} | {str(dtype)[6:]} | {rates[0]:,.0f} | {rates[1]:,.0f} "
                    f"| {ratio(their_s, our_s):.2f} | {same:.0%} |",
                    flush=True,
                )


@torch.no_grad()
def against_recomputation(options: argparse.Namespace) -> None:
    prompt = options.prompt
    ours, _ = models(SHAPES["64 experts x 64, top-8"], torch.float32)
    ids = torch.randint(VOCABULARY, (1, prompt))
    print("\n| new tokens | positions, without / with | factor to expect | factor measured |")
    print("|---|---|---|---|")
    for new in (options.new // 4, options.new // 2, options.new):
        longer_ids = torch.randint(VOCABULARY, (1, prompt + new // 2))

        def with_cache(new: int = new) -> Tensor:
            return ours.generate(ids, max_new_tokens=new)

        def without(new: int = new) -> Tensor:
            row = ids
            for _ in range(new):
                logits = ours(row, use_cache=False, logits_to_keep=1).logits
                row = torch.cat((row, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
            return row

        def passes(new: int = new, ids: Tensor = longer_ids) -> None:
            for _ in range(new):
                ours(ids, use_cache=False, logits_to_keep=1)

        def prompt_and_steps(new: int = new) -> None:
            cache = KVCache()
            ours(ids, past_key_values=cache, logits_to_keep=1)
            for _ in range(new - 1):
                ours(ids[:, -1:], past_key_values=cache, logits_to_keep=1)

        if not torch.equal(with_cache(), without()):
            raise SystemExit("other tokens with the cache than without")
        cached, recomputed, long, steps = in_turns(
            [with_cache, without, passes, prompt_and_steps], options.rounds
        )
        positions = (new * prompt + new * (new - 1) / 2) / (prompt + new - 1)
        print(
            f"| {new} | {positions:.1f} | {ratio(long, steps):.1f} | {ratio(recomputed, cached):.1f} |",
            flush=True,
        )


def uneven_prompts(options: argparse.Namespace) -> None:
    """Time both ways to continue the same prompts."""
    draw = random.Random(0)
    stops = draw.sample(range(2, VOCABULARY), VOCABULARY // 50)
    prompts = [
        [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(8, 128))] for _ in range(options.prompts)
    ]
    print("| model | dtype | rows | ours, tokens/s | Transformers, tokens/s | ours / theirs |")
    print("|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = models(shape, dtype)
            limits: dict[str, Any] = {"max_new_tokens": 128, "eos_token_id": stops}

            def mine(model: OlmoeForCausalLM = ours, limits: Any = limits) -> list[list[int]]:
                return model.generate_batch(prompts, batch_size=options.rows, **limits)

            def padded(model: Any = theirs, limits: Any = limits) -> list[list[int]]:
                return in_sorted_batches(model, prompts, options.rows, limits)

            ways = [mine, padded]
            expected, found = mine(), padded()
            if dtype is torch.float32 and expected != found:
                raise SystemExit(f"{name}: other tokens than Transformers'")
            times = in_turns(ways, options.rounds)
            tokens = [sum(map(len, way())) for way in ways]
            rates = [count / statistics.median(found) for count, found in zip(tokens, times, strict=True)]
            # In bf16 the completions differ in length, so the rates are compared and not the times.
            share = ratio(times[1], times[0]) * tokens[0] / tokens[1]
            print(
                f"| {name} | {str(dtype)[6:]} | {options.rows} | {rates[0]:,.0f} | {rates[1]:,.0f} "
                f"| {share:.2f} |",
                flush=True,
            )


def in_sorted_batches(model: Any, prompts: list[list[int]], rows: int, limits: Any) -> list[list[int]]:
    """Transformers' generate, with left padding. Prompts of like lengths share a batch."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        longest = max(len(prompts[index]) for index in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        out = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
        for index, tokens in zip(batch, out[:, longest:].tolist(), strict=True):
            end = next(
                (at + 1 for at, token in enumerate(tokens) if token in limits["eos_token_id"]), len(tokens)
            )
            found[index] = tokens[:end]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("rounds", 7),
        ("threads", 2),
        ("prompt", 128),
        ("new", 64),
        ("prompts", 48),
        ("rows", 16),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=["same", "cache", "prompts"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, "
        f"prompt {options.prompt}, {options.new} new tokens, {options.rounds} rounds, "
        f"load average {os.getloadavg()[0]:.1f}\n"
    )
    parts = {"same": against_transformers, "cache": against_recomputation, "prompts": uneven_prompts}
    for name, part in parts.items():
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    main()
