"""What real steps on gloo ranks send, against traffic.py: bytes, their order, and waits of the host."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.outputs import TrainingOutput
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory import MicroBatch
from olmoe_train.planning.traffic import Links, step_traffic
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES
from tests.support.tiny import LENGTH, SEQUENCES, build, global_batch

LAYERS, EXPERTS, TOP_K, HIDDEN = (
    int(SIZES[name]) for name in ("num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size")
)
KEPT: dict[str, Any] = {"reshard_after_forward": False}
DDP = Strategy.ddp
# Layout, activation checkpointing, precision. 97 tokens, 8 experts: over 4 ranks, padding is gathered, too.
STEPS = {
    2: [
        (ParallelConfig(), "none", "fp32"),
        (ParallelConfig(expert_parallel_size=2), "none", "bf16"),
        (ParallelConfig(strategy=DDP, expert_parallel_size=2), "full", "fp32"),
        (ParallelConfig(**KEPT, expert_parallel_size=2), "selective", "fp32"),
    ],
    4: [
        (ParallelConfig(), "full", "bf16"),
        (ParallelConfig(**KEPT, prefetch=2), "none", "fp32"),
        (ParallelConfig(expert_parallel_size=2, prefetch=0), "none", "bf16"),
        (ParallelConfig(expert_parallel_size=4), "full", "fp32"),
        (ParallelConfig(replicate_size=2, expert_parallel_size=2), "selective", "fp32"),
        (ParallelConfig(strategy=DDP), "none", "bf16"),
    ],
}


class Trace(TorchDispatchMode):
    """The collectives and attentions of this rank, in order: (name, bytes that it sends to other ranks)."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.__name__.split(".")[0]
        if operator.namespace == "c10d":
            self.events.append(sent_to_others(name, args))
        elif name.startswith("_scaled_dot_product"):
            self.events.append(("attention", 0))
        return operator(*args, **kwargs or {})

    def bytes_sent(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for name, count in self.events:
            total[name] += count
        return total

    def gathers_before(self, event: str) -> list[int]:
        """All-gathers that were asked for before each such event."""
        names = [name for name, _ in self.events]
        return [names[:place].count("all_gather") for place, name in enumerate(names) if name == event]


def sent_to_others(name: str, args: Any) -> tuple[str, int]:
    """A ring's bytes, for the collectives of weights; the rows of an all-to-all, its own left out."""
    if name == "alltoall_base_":
        rows, group, _, splits = args[1:5]
        own = dist.ProcessGroup.unbox(group).rank()
        away = sum(count for rank, count in enumerate(splits) if rank != own)
        return ("counts", 0) if rows.dtype == torch.int64 else ("all_to_all", away * rows[0].nbytes)
    if name == "_allgather_base_":
        return "all_gather", args[0].nbytes - args[1].nbytes
    if name == "_reduce_scatter_base_":
        return "reduce_scatter", args[1].nbytes - args[0].nbytes
    assert name == "allreduce_", name
    ranks = dist.ProcessGroup.unbox(args[1]).size()
    return "all_reduce", 2 * sum(tensor.nbytes for tensor in args[0]) * (ranks - 1) // ranks


def step(model: OlmoeForCausalLM) -> TrainingOutput:
    """Forward and backward of this rank's share, without the losses' own communication."""
    ids_BS = global_batch(0).chunk(dist.get_world_size())[dist.get_rank()]
    output = model.training_forward(ids_BS, ids_BS)
    (output.ce_sum + output.router.squared_logsumexp_L.sum()).backward()
    return output


def route_evenly(model: OlmoeForCausalLM) -> None:
    """Every expert gets as many rows, from every rank."""
    for index in range(len(model.model.layers)):
        model.decoder_layers[index].mlp.gate.select_experts = lambda probs_TE, top_k: (
            torch.arange(len(probs_TE) * top_k).view(-1, top_k) % EXPERTS
        )


def traced(
    parallel: ParallelConfig, checkpointing: str, precision: str, even: bool
) -> tuple[Counter[str], list[int]]:
    """Bytes that a step sends; rows that its routing sends to each rank of the group, over all layers."""
    model, _ = build(parallel, checkpointing, precision)
    if even:
        route_evenly(model)
    with Trace() as trace:
        output = step(model)
    size = parallel.expert_parallel_size
    rows = output.router.counts_LE.sum(0).view(size, EXPERTS // size).sum(1)
    return trace.bytes_sent(), [round(count) for count in rows.tolist()]


def all_traced(ranks: int) -> list[list[tuple[Counter[str], list[int]]]]:
    return [[traced(*each, even) for even in (False, True)] for each in STEPS[ranks]]


def rows_of_others(rows: list[list[int]], rank: int) -> int:
    """Rows that leave a rank for others and that come from them, of its group of neighbours."""
    size = len(rows[rank])
    first, own = rank - rank % size, rank % size
    return sum(rows[rank][other] + rows[first + other][own] for other in range(size) if other != own)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_sends_what_the_formulas_say(ranks: int) -> None:
    of_ranks = run_ranks(ranks, all_traced, ranks)
    for number, (parallel, checkpointing, precision) in enumerate(STEPS[ranks]):
        message = (parallel, checkpointing, precision)
        layout = ParallelLayout(
            parallel.strategy,
            ranks,
            parallel.expert_parallel_size,
            parallel.replicate_size,
            reshard_after_forward=parallel.reshard_after_forward,
        )
        mode = ActivationCheckpointing(checkpointing)
        batch = MicroBatch(SEQUENCES // ranks, LENGTH, Precision(precision), mode)
        planned = step_traffic(OlmoeConfig(**SIZES), layout, batch, 1, Links())
        # Dispatch and combine, forward and backward, each way as often; recomputed, once more.
        each_way = 3 if mode is ActivationCheckpointing.full else 2
        for even in (False, True):
            rows = [found[number][even][1] for found in of_ranks]
            for rank, found in enumerate(of_ranks):
                sent = found[number][even][0]
                assert sent["all_gather"] == planned.all_gather.bytes_sent, message
                assert sent["reduce_scatter"] == planned.reduce_scatter.bytes_sent, message
                assert sent["all_reduce"] == planned.all_reduce.bytes_sent, message
                moved = each_way * rows_of_others(rows, rank)
                assert sent["all_to_all"] == moved * HIDDEN * batch.element, message
                assert not even or sent["all_to_all"] == planned.all_to_all.bytes_sent, message


def orders() -> list[tuple[list[int], list[int]]]:
    """All-gathers asked for before each layer's attention, in forward and in backward, by `prefetch`."""
    found = []
    for ahead in range(3):
        model, _ = build(ParallelConfig(expert_parallel_size=2, prefetch=ahead))
        with Trace() as trace:
            step(model)
        before = trace.gathers_before("attention")
        forward = 1 + 2 * LAYERS  # the root's, and of each layer its own and its experts'
        found.append((before[:LAYERS], [count - forward for count in before[LAYERS:]]))
    return found


def test_weights_are_asked_for_ahead_of_attention() -> None:
    """A layer's experts, which dispatch would make wait, and `prefetch` layers more."""
    for ahead, (forward, backward) in enumerate(run_ranks(4, orders)[0]):
        asked_for = [2 * min(layer + 1 + ahead, LAYERS) for layer in range(LAYERS)]
        assert forward == [1 + count for count in asked_for]
        assert backward == asked_for


class HostWaits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, in backward too: values read, one (item, bool) or all
    of a tensor (tolist), and sizes that depend on values."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")
    WHOLE = ("tolist", "numpy", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator.__name__.split(".")[0] in self.OPERATORS
        return operator(*args, **kwargs or {})

    def __enter__(self) -> "HostWaits":
        self.methods = {name: getattr(Tensor, name) for name in self.WHOLE}
        for name, method in self.methods.items():
            setattr(Tensor, name, self.counting(method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self.methods.items():
            setattr(Tensor, name, method)

    def counting(self, method: Any) -> Any:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(tensor, *args, **kwargs)

        return counted


def waits(experts: int) -> list[int]:
    found = []
    for checkpointing in ("none", "selective", "full"):
        model, _ = build(ParallelConfig(expert_parallel_size=experts), checkpointing)
        model.set_experts_backend("grouped_mm")
        step(model)  # FSDP sets itself up
        with HostWaits() as host:
            step(model)
        found.append(host.count)
    return found


@pytest.mark.parametrize(("experts", "a_layer"), [(1, 0), (2, 1)])
def test_the_host_waits_once_a_layer_with_expert_parallelism_else_never(experts: int, a_layer: int) -> None:
    """Recomputation waits no more often: it goes where the first pass went."""
    assert run_ranks(2, waits, experts) == [[a_layer * LAYERS] * 3] * 2
