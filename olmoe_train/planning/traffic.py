"""Bytes that a training step sends between ranks, and the least time the links need for them: on paper.

Over n ranks, each sends (n-1)/n of what an all-gather or reduce-scatter holds in all, twice that for an
all-reduce, and (n-1)/n of its own rows in an all-to-all. Latency, protocol and congestion are left out, so
times are lower bounds. Shapes as in memory.py.
"""

from dataclasses import dataclass

from olmoe_train.config.choices import ActivationCheckpointing, Strategy
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.memory import FP32, Layout, MicroBatch, Unit, count_units


@dataclass(frozen=True)
class Links:
    """Speeds of one GPU in one direction, bytes a second. Default: a DGX H100."""

    gpus_per_node: int = 8
    nvlink: float = 450e9
    """18 NVLink 4 links of 25 GB/s a direction, "900 GB/s" in NVIDIA's H100 data sheet, which counts both."""
    network: float = 50e9
    """One 400 Gb/s ConnectX-7 a GPU (DGX H100 user guide). A step's all-gather uses all of a node's, an
    all-to-all each GPU its own; 48 to 49 GB/s arrive (NVIDIA/nccl-tests#267)."""


@dataclass(frozen=True)
class Group:
    """Ranks that take part in a collective: equally many, `on_node`, on each of size / on_node nodes."""

    size: int
    on_node: int


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over one step, on one rank."""

    bytes_sent: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes_sent + other.bytes_sent, self.seconds + other.seconds)

    def times(self, count: int) -> "Traffic":
        return Traffic(self.bytes_sent * count, self.seconds * count)


@dataclass(frozen=True)
class StepTraffic:
    all_gather: Traffic
    """Weights, in the computation's precision."""
    reduce_scatter: Traffic
    """Gradients, in fp32."""
    all_reduce: Traffic
    """Gradient shards over model copies, in fp32, once a step."""
    all_to_all: Traffic
    """Token rows, there and back, in the computation's precision."""

    @property
    def weights_seconds(self) -> float:
        """What can run beside computation: FSDP2 fetches weights ahead, and sums gradients behind."""
        return self.all_gather.seconds + self.reduce_scatter.seconds + self.all_reduce.seconds

    def step_seconds(self, compute: float) -> float:
        """Computation, or weights where they take longer; and the tokens' exchange: a layer waits for it."""
        return max(compute, self.weights_seconds) + self.all_to_all.seconds


def group(first_stride: int, size: int, links: Links) -> Group:
    """`size` ranks, each `first_stride` after the one before; nodes hold consecutive ranks."""
    return Group(size, min(size, max(1, links.gpus_per_node // first_stride)))


def ring(whole: int, members: Group, links: Links) -> Traffic:
    """All-gather or reduce-scatter of `whole` bytes (of the gathered side).

    Each rank takes in whole x (n-1)/n over NVLink. Each of m nodes takes in the others': whole x (m-1)/m,
    through the network cards of its `on_node` ranks. The slower of the two sets the time.
    """
    nodes = members.size // members.on_node
    sent = whole * (members.size - 1) // members.size
    inside = sent / links.nvlink if members.on_node > 1 else 0.0
    between = whole * (nodes - 1) / nodes / (members.on_node * links.network)
    return Traffic(sent, max(inside, between))


def exchange(rows: int, members: Group, links: Links) -> Traffic:
    """All-to-all of `rows` bytes a rank, evenly routed: 1/n stays; what goes to ranks on the node takes
    NVLink, the rest the rank's own network card, both at once."""
    inside = rows * (members.on_node - 1) / members.size / links.nvlink
    between = rows * (members.size - members.on_node) / members.size / links.network
    return Traffic(rows * (members.size - 1) // members.size, max(inside, between))


def step_traffic(
    config: OlmoeConfig, layout: Layout, batch: MicroBatch, micro_batches: int, links: Links
) -> StepTraffic:
    """What one rank sends in a step of `micro_batches`, and the time it takes at least.

    Per micro-batch and layer: weights are gathered twice (forward and backward; the root's once, and without
    reshard_after_forward the layers', too), b bytes an element; gradients are reduced once, 4 bytes an
    element; tokens make four all-to-alls of T x K rows of b x D bytes (dispatch and combine, each forward and
    backward), six with full recomputation. Copies add up gradients once a step: an all-reduce of the rank's
    shards, which is a reduce-scatter and an all-gather.
    Ranks lie as (copy, shard, expert parallel), the last one fastest: EP groups are neighbours.
    """
    units = count_units(config, layout)
    ep, shard = layout.expert_parallel_size, layout.shard_size
    stride = ep if layout.strategy is Strategy.ddp else shard  # between copies of the same experts
    dense_copies = group(shard, layout.gpus // shard, links)
    expert_copies = group(stride, layout.gpus // (ep * layout.expert_shard_size), links)
    dense_group, expert_group = group(1, shard, links), group(ep, layout.expert_shard_size, links)

    def over_layers(root: int, dense: int, experts: int) -> Traffic:
        layers = ring(dense, dense_group, links) + ring(experts, expert_group, links)
        return ring(root, dense_group, links) + layers.times(units.layers)

    def gathered(unit: Unit, element: int) -> int:
        return element * unit.gathered

    b, passes = batch.element, 2 if layout.reshard_after_forward else 1
    weights = over_layers(
        gathered(units.root, b), passes * gathered(units.dense, b), passes * gathered(units.experts, b)
    )
    gradients = over_layers(
        gathered(units.root, FP32), gathered(units.dense, FP32), gathered(units.experts, FP32)
    )
    dense_shard = units.root.sharded + units.layers * units.dense.sharded
    copies = ring(FP32 * dense_shard, dense_copies, links)
    copies += ring(FP32 * units.layers * units.experts.sharded, expert_copies, links)
    rows = batch.tokens * config.num_experts_per_tok * config.hidden_size * b
    exchanges = 6 if batch.checkpointing is ActivationCheckpointing.full else 4
    tokens = exchange(rows, group(1, ep, links), links).times(exchanges * units.layers)
    return StepTraffic(
        weights.times(micro_batches),
        gradients.times(micro_batches),
        copies.times(2),
        tokens.times(micro_batches),
    )
