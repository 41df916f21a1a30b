"""What each technique of the training step gains on a CPU: all of them, against all but one at a time.

The model, weights, batches and variant `ours-compile` of cpu_step.py, a step of each in turn. Where a
technique is missing, what stands in its place is written here, as simply as it goes.

    python -m benchmarks.techniques [--rounds 9] [--threads 2] [--shapes A B] [--dtypes fp32 bf16]
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_step import DTYPES, SHAPES, SMALL, Shape, build_step, time_steps
from olmoe_train.model import transformer
from olmoe_train.model.moe import block as moe
from olmoe_train.model.moe import experts
from olmoe_train.model.moe.experts import OlmoeExperts, Routing


def gather_then_sum(rows_RD: Tensor, routing: Routing, weights_NJ: Tensor | None = None) -> Tensor:
    """The sum with [N, J, D] in memory."""
    rows_NJD = rows_RD.index_select(0, routing.row_NJ.view(-1)).view(*routing.row_NJ.shape, -1)
    if weights_NJ is None:
        return rows_NJD.sum(1)
    return torch.bmm(weights_NJ.to(rows_RD.dtype).unsqueeze(1), rows_NJD).squeeze(1)


def experts_by_autograd(
    module: OlmoeExperts, x_ND: Tensor, weights_NJ: Tensor | None, routing: Routing
) -> Tensor:
    """Autograd's own graph: it keeps rows, activations, products and results."""
    assert weights_NJ is not None
    counts = routing.counts_E.tolist()
    rows = x_ND.index_select(0, routing.token_R).split(counts)
    halves = torch.cat([F.linear(r, w) for r, w in zip(rows, module.gate_up_proj.unbind(0), strict=True)])
    gate, up = halves.chunk(2, dim=-1)
    gated = (module.activation(gate) * up).split(counts)
    out_RD = torch.cat([F.linear(r, w) for r, w in zip(gated, module.down_proj.unbind(0), strict=True)])
    return gather_then_sum(out_RD, routing, weights_NJ)


def whole_logits(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, log_probs: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), labels_T, reduction="sum")


def router_by_autograd(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return F.linear(x_TD.float(), weight_ED.float())


@contextmanager
def unfused_adamw() -> Iterator[None]:
    real = torch.optim.AdamW
    with mock.patch.object(
        torch.optim, "AdamW", lambda *args, **options: real(*args, **options | {"fused": False})
    ):
        yield


# Name -> what takes its place for the time of a step.
WITHOUT: dict[str, Callable[[], Any]] = {
    "rows in multiples of 32": lambda: mock.patch.object(experts, "padding_pays", return_value=False),
    "gather and sum at once": lambda: mock.patch.object(experts, "sum_rows", gather_then_sum),
    "own backward of the experts": lambda: mock.patch.object(OlmoeExperts, "forward", experts_by_autograd),
    "loss in chunks": lambda: mock.patch.object(transformer, "cross_entropy_sum", whole_logits),
    "router keeps x as it came": lambda: mock.patch.object(moe._RouterLogits, "apply", router_by_autograd),
}


def compare(shape: Shape, dtype: str, rounds: int) -> None:
    steps = {"all": build_step("ours-compile", shape, DTYPES[dtype])}
    steps |= {
        name: _patched(build_step("ours-compile", shape, DTYPES[dtype]), WITHOUT[name]) for name in WITHOUT
    }
    steps["compiled elementwise parts"] = build_step("ours", shape, DTYPES[dtype])
    with unfused_adamw():
        steps["fused AdamW"] = build_step("ours-compile", shape, DTYPES[dtype])
    seconds = time_steps(steps, rounds)
    print(f"{shape}, {dtype}: all of them {1e3 * statistics.median(seconds['all']):.1f} ms; without")
    for name in list(steps)[1:]:
        pairs = zip(seconds[name], seconds["all"], strict=True)
        print(
            f"  {name:28s} {statistics.median(without / every for without, every in pairs):.2f} x", flush=True
        )


def _patched(step: Callable[[Tensor], float], patch: Callable[[], Any]) -> Callable[[Tensor], float]:
    def run(ids_BS: Tensor) -> float:
        with patch():
            return step(ids_BS)

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=SMALL, choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} threads, median ratio of {args.rounds} interleaved rounds"
    )
    for shape in args.shapes:
        for dtype in args.dtypes:
            compare(SHAPES[shape], dtype, args.rounds)


if __name__ == "__main__":
    main()
