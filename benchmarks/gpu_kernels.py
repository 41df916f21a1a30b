"""Parts of benchmarks/on_gpu.py: kernels of one GPU, without a process group, against fp32 or fp64."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_models import Loss, fields, loss_and_gradients, off, our_loss, parity
from benchmarks.gpu_rows import Report, Skip
from benchmarks.gpu_yardstick import Yardstick
from olmoe_train.config.choices import Precision
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.cross_entropy import IGNORE_INDEX, cross_entropy_sum, shift_labels
from olmoe_train.model.moe.experts import OlmoeExperts, sort_by_expert, sum_rows
from olmoe_train.planning.flops import peak_flops

ROUNDING_BF16 = 1e-2
"""Relative error of a single kernel whose operands and result are bf16: rounding is 2^-9 each."""
PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "sonic-moe", "deepspeed")


def now(args: argparse.Namespace) -> float:
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(args: argparse.Namespace, call: Callable[[], object], rounds: int = 20) -> float:
    """Of a call, after two that are not counted; on a CPU of 3 calls."""
    times = []
    for number in range(2 + (3 if args.device == "cpu" else rounds)):
        start = now(args)
        call()
        if number >= 2:
            times.append(now(args) - start)
    return statistics.median(times)


def machine(args: argparse.Namespace, report: Report) -> None:
    """Device, packages, and the two rates by which times can be judged: matrix products and copies."""
    report.measure("Python", platform.python_version())
    for name in PACKAGES:
        try:
            report.measure(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            report.skip(name, "not installed")
    size = 512 if args.device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=args.device).bfloat16() for _ in range(2))
    rate = 2 * size**3 / median_seconds(args, lambda: left @ right)
    report.measure(f"bf16 product of {size} x {size}", rate / 1e12, "TFLOP/s")
    if args.device == "cpu":
        report.skip("GPU and its memory", "no GPU")
        return
    device = torch.cuda.get_device_properties(0)
    report.measure("GPU", device.name)
    report.measure("compute capability", f"{device.major}.{device.minor}")
    report.measure("memory", device.total_memory / 2**30, "GiB")
    report.measure("CUDA", str(torch.version.cuda))
    if (peak := peak_flops(device.name, torch.bfloat16)) is not None:
        report.measure("product, share of the data sheet's peak", rate / peak)
    source = torch.randn(2**29, device=args.device)  # 2 GiB: larger than any cache
    target = torch.empty_like(source)
    seconds = median_seconds(args, lambda: target.copy_(source))
    report.measure("copy, read and written", 2 * source.nbytes / seconds / 1e12, "TB/s")


def parity_(args: argparse.Namespace, report: Report) -> None:
    """Every backend in bf16, and Transformers in bf16, against Transformers in fp32."""
    found = parity(args)
    if found is None:
        raise Skip("no transformers; the part `backends` compares with the project's own code in fp32")
    for each in found:
        report.check(f"{each.name}: loss", each.loss, 1e-3)
        worst = max(each.gradients, key=lambda name: each.gradients[name] / each.tolerances[name])
        report.check(
            f"{each.name}: gradients", each.gradients[worst], each.tolerances[worst], f"worst is {worst}"
        )


def backends(args: argparse.Namespace, report: Report) -> None:
    """Every backend of the experts in bf16 against the loop in fp32, with the routers' losses."""
    yardstick = Yardstick(args)
    model = _bf16_model(yardstick)
    for backend in args.backends:
        loss, gradients = loss_and_gradients(model, our_loss(model, backend), yardstick.ids_BS)
        yardstick.check(report, backend, loss, gradients, Precision.bf16)
    report.measure("plain bf16 against fp32, worst gradient", max(yardstick.bf16_errors.values()))
    for name, reason in args.left_out.items():
        report.skip(name, reason)


def _bf16_model(yardstick: Yardstick) -> OlmoeForCausalLM:
    with torch.device("meta"):
        model = OlmoeForCausalLM(yardstick.config)
    model.load_state_dict({name: value.bfloat16() for name, value in yardstick.weights.items()}, assign=True)
    return model.requires_grad_().train()


def uneven_experts(args: argparse.Namespace, report: Report) -> None:
    """One layer's experts where half of the experts have no row, one has a single row, and one has most."""
    config = OlmoeConfig(**fields(args, 1))
    tokens, top_k = args.micro_batch * args.sequence, args.top_k
    weights_NJ = torch.rand(tokens, top_k, device=args.device)
    indices_NJ = torch.rand(tokens, args.experts // 2, device=args.device).topk(top_k).indices
    indices_NJ[:, 0] = 0  # most
    indices_NJ[:, 1:] = indices_NJ[:, 1:] % (args.experts // 2 - 2) + 1
    indices_NJ[0, -1] = args.experts // 2 - 1  # its only row
    routing = sort_by_expert(indices_NJ, args.experts)
    x_ND = torch.randn(tokens, args.hidden, device=args.device).bfloat16()
    d_ND = torch.randn_like(x_ND)
    with torch.device(args.device):
        experts = OlmoeExperts(config).bfloat16()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.02)

    def results(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        experts.to(dtype).backend = backend
        x, weights = (value.to(dtype).requires_grad_() for value in (x_ND, weights_NJ))
        out = experts(x, weights, routing)
        gate_up, down = experts.gate_up_proj, experts.down_proj
        gradients = torch.autograd.grad(out, (x, weights, gate_up, down), d_ND.to(dtype))
        names = ("output", "input", "weights", "gate_up_proj", "down_proj")
        return {name: value.detach().float() for name, value in zip(names, (out, *gradients), strict=True)}

    found = {backend: results(backend, torch.bfloat16) for backend in args.backends}
    exact = results("loop", torch.float32)
    for backend, values in found.items():
        for name, value in values.items():
            report.check(f"{backend}: {name}", off(value, exact[name]), 2 * ROUNDING_BF16)


def gather(args: argparse.Namespace, report: Report) -> None:
    """The weighted sum of the experts' rows for each token (sum_rows), and the copy of tokens to rows."""
    tokens, top_k = args.micro_batch * args.sequence, args.top_k
    indices_NJ = torch.rand(tokens, args.experts, device=args.device).topk(top_k).indices
    routing = sort_by_expert(indices_NJ, args.experts)
    rows_RD = torch.randn(tokens * top_k, args.hidden, device=args.device).bfloat16()
    weights_NJ = torch.rand(tokens, top_k, device=args.device).bfloat16()
    for what, weights in (("weighted", weights_NJ), ("not weighted", None)):
        factor = 1.0 if weights is None else weights.double()[..., None]
        exact = (rows_RD.double()[routing.row_NJ] * factor).sum(1)
        found = sum_rows(rows_RD, routing, weights)
        report.check(f"sum of rows, {what}: error", off(found.double(), exact), ROUNDING_BF16)
        del exact, found
        seconds = median_seconds(args, lambda chosen=weights: sum_rows(rows_RD, routing, chosen))  # type: ignore[misc]
        moved = rows_RD.nbytes * (1 + 1 / top_k)
        report.measure(f"sum of rows, {what}", seconds * 1e3, "ms")
        report.measure(f"sum of rows, {what}: least traffic", moved / seconds / 1e12, "TB/s")
    x_ND = rows_RD[:tokens]
    seconds = median_seconds(args, lambda: x_ND.index_select(0, routing.token_R))
    report.measure("copy of tokens to rows", seconds * 1e3, "ms")
    seconds = median_seconds(args, lambda: sort_by_expert(indices_NJ, args.experts))
    report.measure("sort by expert", seconds * 1e3, "ms")


def head(args: argparse.Namespace, report: Report) -> None:
    """The chunked cross-entropy against all logits at once in fp32."""
    tokens = args.micro_batch * args.sequence
    hidden_TD = torch.randn(tokens, args.hidden, device=args.device).bfloat16()
    weight_VD = torch.empty(args.vocabulary, args.hidden, device=args.device).normal_(0.0, 0.02).bfloat16()
    labels_T = torch.randint(args.vocabulary, (tokens,), device=args.device)
    labels_T[::7] = IGNORE_INDEX

    def run(chunked: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
        hidden, weight = (value.to(dtype).requires_grad_() for value in (hidden_TD, weight_VD))
        if chunked:
            loss = cross_entropy_sum(hidden, weight, labels_T)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), labels_T, reduction="sum")
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    for precision, limit in ((torch.bfloat16, ROUNDING_BF16), (torch.float32, 1e-4)):
        found, exact = run(True, precision), run(False, torch.float32)
        for name, value, reference in zip(("loss", "input", "weight"), found, exact, strict=True):
            report.check(f"{str(precision)[6:]}: {name}", off(value.float(), reference), limit)
        del found, exact
    for what, chunked in (("chunked", True), ("all logits", False)):
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        start = 0 if args.device == "cpu" else torch.cuda.memory_allocated()
        seconds = median_seconds(args, lambda way=chunked: run(way, torch.bfloat16), 5)  # type: ignore[misc]
        report.measure(f"{what}, forward and backward", seconds * 1e3, "ms")
        if args.device == "cpu":
            report.skip(f"{what}: peak memory", "CUDA's allocator counts it")
        else:
            peak = torch.cuda.max_memory_allocated() - start
            report.measure(f"{what}: peak memory", peak / 2**30, "GiB")


def documents(args: argparse.Namespace, report: Report) -> None:
    """data.mask_documents: packed documents against each document alone. On a GPU this is varlen_attn, on a
    CPU a mask."""
    length = args.sequence
    ends = [0, length // 4, length // 2 - 3, length // 2 + 1, length]
    bounds = list(pairwise(ends))

    def targets_of(ids_BS: Tensor) -> Tensor:
        return torch.cat([shift_labels(ids_BS[:, start:end]) for start, end in bounds], dim=1)

    def apart(model: OlmoeForCausalLM) -> Loss:
        """Each document in a forward pass of its own, without the routers' losses."""

        def loss(ids_BS: Tensor) -> Tensor:
            model.set_experts_backend("loop")
            parts = [ids_BS[:, start:end] for start, end in bounds]
            sums = [model.training_forward(part, part).ce_sum for part in parts]
            return torch.stack(sums).sum() / (length - len(bounds))

        return loss

    def packed(ids_BS: Tensor) -> Tensor:
        offsets = torch.tensor(ends, dtype=torch.int32, device=ids_BS.device)
        output = model.training_forward(ids_BS, targets=targets_of(ids_BS), document_offsets=offsets)
        return output.ce_sum / (length - len(bounds))

    yardstick = Yardstick(args, apart)
    model = _bf16_model(yardstick)
    loss, gradients = loss_and_gradients(model, packed, yardstick.ids_BS)
    yardstick.check(report, f"{len(bounds)} documents", loss, gradients, Precision.bf16)
    ids_BS = yardstick.ids_BS
    for what, call in (("documents", packed), ("no documents", our_loss(model, "auto", router=False))):
        seconds = median_seconds(args, lambda way=call: way(ids_BS).backward(), 5)  # type: ignore[misc]
        report.measure(f"{what}: forward and backward", seconds * 1e3, "ms")
