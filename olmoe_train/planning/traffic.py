"""Bytes that a training step sends between ranks, and the least time that the links need for them.

With n ranks, an all-gather or reduce-scatter sends (n-1)/n of the gathered size from each rank, an all-reduce
twice that, and an all-to-all (n-1)/n of the rank's rows. Latency, protocol overhead and congestion are left
out, so the times are lower bounds. tests/distributed/test_communication.py compares the bytes with the
collectives of real steps. Shapes as in memory.py.
"""

import math
from dataclasses import dataclass

from olmoe_train.config.choices import ActivationCheckpointing, Strategy
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.adapter import AdapterPlan
from olmoe_train.planning.layout import FP32, ParallelLayout, count_units
from olmoe_train.planning.memory import MicroBatch


@dataclass(frozen=True)
class Links:
    """Bandwidth of one GPU in one direction, in bytes per second. Default: a DGX H100."""

    gpus_per_node: int = 8
    nvlink: float = 450e9
    """18 NVLink 4 links of 25 GB/s per direction; the "900 GB/s" in NVIDIA's H100 data sheet counts both."""
    network: float = 50e9
    """One 400 Gb/s ConnectX-7 per GPU (DGX H100 user guide). An all-gather uses all network cards of a node,
    an all-to-all uses each GPU's card for that GPU. 48 to 49 GB/s are reached (NVIDIA/nccl-tests#267)."""


@dataclass(frozen=True)
class RankGroup:
    """The ranks that take part in a collective, equally many on each node."""

    size: int
    """Number of ranks."""
    on_node: int
    """Number of these ranks per node, a divisor of `size`."""


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one step, on one rank."""

    bytes_sent: int = 0
    """Bytes that the rank sends to other ranks."""
    node_bytes: float = 0.0
    """Bytes over the rank's link inside the node (NVLink)."""
    network_bytes: float = 0.0
    """Bytes over the rank's link to other nodes (its network card)."""
    seconds: float = 0.0
    """Least time."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.bytes_sent + other.bytes_sent,
            self.node_bytes + other.node_bytes,
            self.network_bytes + other.network_bytes,
            self.seconds + other.seconds,
        )

    def times(self, count: int) -> "Traffic":
        """The traffic of `count` repetitions."""
        return Traffic(
            self.bytes_sent * count,
            self.node_bytes * count,
            self.network_bytes * count,
            self.seconds * count,
        )


@dataclass(frozen=True)
class StepTraffic:
    """The collectives of one step, on one rank."""

    all_gather: Traffic
    """Weights, in the computation's precision."""
    reduce_scatter: Traffic
    """Gradients, in fp32."""
    all_reduce: Traffic
    """Gradient shards, in fp32, summed over the copies of the model once per step."""
    all_to_all: Traffic
    """Rows sent to the experts and back, in the computation's precision."""

    @property
    def weights_seconds(self) -> float:
        """Least time of weights and gradients. FSDP2 prefetches weights and reduces gradients in the
        background, so this can overlap with computation."""
        return self.all_gather.seconds + self.reduce_scatter.seconds + self.all_reduce.seconds

    def step_seconds(self, compute: float) -> float:
        """Least time of a step whose computation takes `compute` seconds.

        Weights and gradients overlap with computation. The all-to-all does not, because a layer waits for it.
        """
        return max(compute, self.weights_seconds) + self.all_to_all.seconds


def rank_group(stride: int, size: int, links: Links) -> RankGroup:
    """The group of `size` ranks, each `stride` after the previous one; nodes hold consecutive ranks.

    If the ranks do not fill the nodes evenly, as many ranks per node are assumed as divide both. The bytes
    between nodes are then an upper bound.
    """
    return RankGroup(size, math.gcd(size, max(1, links.gpus_per_node // stride)))


def ring(whole: int, members: RankGroup, links: Links) -> Traffic:
    """An all-gather or reduce-scatter.

    Each rank receives whole (n-1)/n bytes over NVLink. Each of m nodes receives the parts of the other nodes,
    whole (m-1)/m bytes, over the network cards of its ranks in the group. The slower of the two determines
    the time.

    Args:
        whole: Bytes of the gathered tensor.
        members: The ranks that take part.
        links: Bandwidths.
    """
    nodes = members.size // members.on_node
    sent = whole * (members.size - 1) // members.size
    node_bytes = float(sent) if members.on_node > 1 else 0.0
    network_bytes = whole * (nodes - 1) / nodes / members.on_node
    return Traffic(
        sent, node_bytes, network_bytes, max(node_bytes / links.nvlink, network_bytes / links.network)
    )


def exchange(rows: int, members: RankGroup, links: Links) -> Traffic:
    """An all-to-all with even routing.

    Of each rank's rows, 1/n stay. Rows for ranks on the same node take NVLink, and all others the rank's own
    network card, both at the same time.

    Args:
        rows: Bytes of one rank's rows.
        members: The ranks that take part.
        links: Bandwidths.
    """
    node_bytes = rows * (members.on_node - 1) / members.size
    network_bytes = rows * (members.size - members.on_node) / members.size
    return Traffic(
        rows * (members.size - 1) // members.size,
        node_bytes,
        network_bytes,
        max(node_bytes / links.nvlink, network_bytes / links.network),
    )


def step_traffic(
    config: OlmoeConfig,
    layout: ParallelLayout,
    batch: MicroBatch,
    micro_batches: int,
    links: Links,
    adapter: AdapterPlan | None = None,
) -> StepTraffic:
    """What one rank sends in a step, with fsdp or ddp.

    Per micro-batch and layer:
    - Weights are gathered in forward and in backward, b bytes per element. The root is gathered once, and
      without reshard_after_forward the layers are, too.
    - Gradients of trained parameters are reduced once, 4 bytes per element.
    - Rows of b D bytes, T K of them, are exchanged four times (dispatch and combine, each in forward and in
      backward), with full recomputation six times.
    Once per step, the gradient shards are summed over the copies of the model.

    Ranks are ordered as (copy, shard, expert parallel), the last index fastest, so an EP group is made of
    neighbors.

    Args:
        config: Architecture of the model.
        layout: How the ranks share the model.
        batch: What one rank computes at a time.
        micro_batches: Micro-batches per step and rank.
        links: Bandwidths.
        adapter: The adapter; None: every parameter is trained.
    """
    units = count_units(config, layout, adapter)
    ep, shard = layout.expert_parallel_size, layout.shard_size
    stride = ep if layout.strategy is Strategy.ddp else shard  # between ranks with copies of the same experts
    dense_copies = rank_group(shard, layout.gpus // shard, links)
    expert_copies = rank_group(stride, layout.gpus // (ep * layout.expert_shard_size), links)
    dense_group = rank_group(1, shard, links)
    expert_group = rank_group(ep, layout.expert_shard_size, links)

    def over_layers(root: int, dense: int, experts: int) -> Traffic:
        layers = ring(dense, dense_group, links) + ring(experts, expert_group, links)
        return ring(root, dense_group, links) + layers.times(units.layers)

    b, passes = batch.element, 2 if layout.reshard_after_forward else 1
    weights = over_layers(
        b * units.root.gathered, passes * b * units.dense.gathered, passes * b * units.experts.gathered
    )
    gradients = over_layers(
        FP32 * units.root.reduced, FP32 * units.dense.reduced, FP32 * units.experts.reduced
    )
    dense_shard = units.root.trained + units.layers * units.dense.trained
    copies = ring(FP32 * dense_shard, dense_copies, links)
    copies += ring(FP32 * units.layers * units.experts.trained, expert_copies, links)
    rows = round(batch.tokens * config.experts_per_token) * config.hidden_size * b
    exchanges = 6 if batch.checkpointing is ActivationCheckpointing.full else 4
    tokens = exchange(rows, rank_group(1, ep, links), links).times(exchanges * units.layers)
    return StepTraffic(
        weights.times(micro_batches),
        gradients.times(micro_batches),
        copies.times(2),  # an all-reduce is a reduce-scatter and an all-gather
        tokens.times(micro_batches),
    )
