"""A training step of LoRA on a CPU (forward, cross-entropy, backward, fused AdamW on the adapter): this
project's adapter against PEFT's on Transformers' OLMoE with grouped_mm. Attention and experts are adapted.

Both sides have the same base weights, the same adapter and the same batches, a step of each in turn. First,
with noise in lora_B, the loss and the adapter's gradients of both are compared. Then it prints the median of
each variant's steps and of its rounds' ratios to PEFT, and the memory that a step adds to the base model's
weights, each variant in a process of its own: adapter, gradients, moments, activations, temporaries. Memory
is that of the process (with what libraries keep), and that of tensors alone.

    python -m benchmarks.adapters [--rounds 7] [--threads 2] [--dtypes fp32 bf16]
        [--variants peft ours ours-compile] [--rank 16]
"""

import argparse
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import OlmoeConfig as TheirConfig
from transformers import OlmoeForCausalLM as TheirModel

from benchmarks.cpu_step import (
    DTYPES,
    LENGTH,
    SEQUENCES,
    VOCABULARY,
    Shape,
    batch,
    config_fields,
    resident,
    step_of,
    time_steps,
)
from olmoe_train.distributed.compile import compile_layers
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import PROJECTIONS, add_adapter
from olmoe_train.model.adapters.spec import ATTENTION, EXPERTS, AdapterSpec, is_adapter_parameter
from olmoe_train.planning.live_memory import LiveBytes, held_bytes

SHAPE = Shape(
    intermediate_size=256,
    num_experts=64,
    num_experts_per_tok=8,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
)
VARIANTS = ("peft", "ours", "ours-compile")
# Largest relative differences that are allowed of the loss, and of the gradient of a tensor (by norm).
# In bf16, rounding sends some tokens to other experts, whose gradients then differ.
TOLERANCES = {"fp32": (1e-6, 1e-4), "bf16": (1e-4, None)}


def fields() -> dict[str, Any]:
    # The router is frozen, so router losses are no part of the loss.
    return config_fields(SHAPE, VOCABULARY) | {"output_router_logits": False}


def build_theirs(dtype: torch.dtype) -> TheirModel:
    """Transformers' model with the weights of seed 0."""
    torch.manual_seed(0)
    model = TheirModel(TheirConfig(**fields()))
    nn.Module.to(model, dtype)
    model.set_experts_implementation("grouped_mm")
    return model


def build_ours(dtype: torch.dtype) -> OlmoeForCausalLM:
    """This project's model, with weights of its own."""
    return OlmoeForCausalLM(OlmoeConfig(**fields())).to(dtype)


def adapt_theirs(model: TheirModel, rank: int) -> nn.Module:
    """Put PEFT's adapter into a model, with values of seed 1 in lora_A and 0 in lora_B."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(PROJECTIONS),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted.train()


def adapt_ours(model: OlmoeForCausalLM, rank: int) -> None:
    """Put this project's adapter into a model, with 0 in all its parameters."""
    add_adapter(model, AdapterSpec(rank, 2 * rank, (ATTENTION, EXPERTS)))
    with torch.no_grad():
        for parameter in adapter_of(model):
            parameter.zero_()
    model.train()


def adapter_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def in_our_layout(theirs: nn.Module, gradients: bool = False) -> Iterator[tuple[str, Tensor]]:
    """PEFT's adapter by this project's names and in its shapes; gradients: that of each tensor.

    For experts, PEFT's lora_A is [experts x rank, in] with all of an expert's rows together, and its lora_B
    is [out, rank x experts] with all of a rank's columns together.
    """
    experts = SHAPE.num_experts
    for name, module in theirs.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        a, b = (a.grad, b.grad) if gradients else (a.detach(), b.detach())
        if isinstance(module, ParamWrapper):
            path = f"{path}.{module.parameter_name.removesuffix('_proj')}_"
            a = a.unflatten(0, (experts, -1))
            b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
        else:
            path += "."
        yield f"{path}lora_A", a
        yield f"{path}lora_B", b


def copy_adapter(theirs: nn.Module, ours: OlmoeForCausalLM) -> None:
    values = dict(in_our_layout(theirs))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if is_adapter_parameter(name):
                parameter.copy_(values.pop(name))
    assert not values, sorted(values)


def their_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids_BS: model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss


def our_loss(model: OlmoeForCausalLM) -> Callable[[Tensor], Tensor]:
    targets = SEQUENCES * (LENGTH - 1)
    return lambda ids_BS: model.training_forward(ids_BS, ids_BS).ce_sum / targets


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(adapter_of(model), lr=2e-4, weight_decay=0.0, fused=True)


def check_same(dtype: str, rank: int) -> None:
    """Compare the loss and the adapter's gradients of one batch, with noise in lora_B.

    Raises:
        SystemExit: They differ by more than TOLERANCES.
    """
    base, ours = build_theirs(DTYPES[dtype]), build_ours(DTYPES[dtype])
    ours.load_state_dict(base.state_dict())
    theirs = adapt_theirs(base, rank)
    adapt_ours(ours, rank)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    copy_adapter(theirs, ours)
    losses = []
    for loss_of in (their_loss(theirs), our_loss(ours)):
        loss = loss_of(batch(0))
        loss.backward()
        losses.append(loss.item())
    of_loss = abs(losses[1] - losses[0]) / losses[0]
    own = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad and p.grad is not None}
    of_gradient = max(
        ((own[name] - grad).norm() / grad.norm()).item()
        for name, grad in in_our_layout(theirs, gradients=True)
    )
    print(
        f"{dtype}: loss {losses[0]:.6f} in PEFT; relative differences: loss {of_loss:.1e}, "
        f"gradient of a tensor {of_gradient:.1e} at most",
        flush=True,
    )
    of_loss_allowed, of_gradient_allowed = TOLERANCES[dtype]
    if of_loss > of_loss_allowed or (of_gradient_allowed and of_gradient > of_gradient_allowed):
        raise SystemExit(f"the two sides do not compute the same: {TOLERANCES[dtype]} is allowed")


def compare(dtype: str, variants: list[str], rank: int, rounds: int) -> None:
    steps: dict[str, Callable[[Tensor], float]] = {}
    base = build_theirs(DTYPES[dtype])
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    theirs = adapt_theirs(base, rank)
    for variant in variants:
        if variant == "peft":
            steps[variant] = step_of(their_loss(theirs), optimizer_of(theirs))
            continue
        ours = build_ours(DTYPES[dtype])
        ours.load_state_dict(weights)
        adapt_ours(ours, rank)
        copy_adapter(theirs, ours)
        if variant == "ours-compile":
            compile_layers(ours)
        steps[variant] = step_of(our_loss(ours), optimizer_of(ours))
    seconds = time_steps(steps, rounds)
    print(f"{dtype}, step: median of {rounds}")
    for variant, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(seconds[variants[0]], times, strict=True))
        print(
            f"  {variant:12s} {1e3 * median:8.1f} ms {SEQUENCES * LENGTH / median:8.0f} tokens/s"
            f"   {ratio:.2f} x {variants[0]}",
            flush=True,
        )


def added_memory(variant: str, dtype: str, rank: int) -> tuple[float, float]:
    """MiB that a step adds at its highest moment to the base model.

    Returns:
        (what this process holds beyond what it held with the base model alone, in a second step; bytes of
        tensors beyond the base model's, in a third step; 0 for compiled layers, whose tensors are not seen).
    """
    model: nn.Module
    if variant == "peft":
        base = build_theirs(DTYPES[dtype])
        of_base, before = held_bytes(base.parameters()), resident("VmRSS")
        model = adapt_theirs(base, rank)
        loss_of = their_loss(model)
    else:
        model = ours = build_ours(DTYPES[dtype])
        of_base, before = held_bytes(ours.parameters()), resident("VmRSS")
        adapt_ours(ours, rank)
        if variant == "ours-compile":
            compile_layers(ours)
        loss_of = our_loss(ours)
    optimizer = optimizer_of(model)
    step = step_of(loss_of, optimizer)
    step(batch(0))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    step(batch(1))
    of_process = resident("VmHWM") - before
    if variant == "ours-compile":
        return of_process, 0.0
    moments = [moment for moments in optimizer.state.values() for moment in moments.values()]
    with LiveBytes([*model.parameters(), *moments]) as live:
        step(batch(2))
    return of_process, (live.peak - of_base) / 2**20


def compare_memory(dtype: str, variants: list[str], rank: int, threads: int) -> None:
    """Each variant in a process of its own."""
    # Freed blocks above 256 KiB go back to the system (mallopt(3)). By default glibc raises this limit while
    # a program runs, and keeps freed memory: up to 380 MiB here, another amount in every run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    found = {}
    for variant in variants:
        command = [*("--memory-of", variant, "--dtypes", dtype), *("--rank", str(rank))]
        command += ["--threads", str(threads)]
        command = [sys.executable, "-m", "benchmarks.adapters", *command]
        output = subprocess.check_output(command, env=environment)
        found[variant] = [float(word) for word in output.split()[-2:]]
    print(f"{dtype}, MiB that a step adds to the base model")
    for variant, (of_process, of_tensors) in found.items():
        first = found[variants[0]]
        print(f"  {variant:12s} process {of_process:5.0f} ({of_process / first[0]:.2f} x)", end="")
        print(
            f", tensors {of_tensors:5.0f} ({of_tensors / first[1]:.2f} x)" if of_tensors else "", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory-of", help="memory of one variant, in this process")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(*added_memory(args.memory_of, args.dtypes[0], args.rank))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"{args.threads} threads; hidden {SHAPE.hidden_size}, {SHAPE}, {SHAPE.num_hidden_layers} layers, "
        f"{SEQUENCES} x {LENGTH} tokens, rank {args.rank}"
    )
    for dtype in args.dtypes:
        check_same(dtype, args.rank)
        compare(dtype, args.variants, args.rank, args.rounds)
        compare_memory(dtype, args.variants, args.rank, args.threads)


if __name__ == "__main__":
    main()
