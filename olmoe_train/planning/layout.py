"""How the ranks of a run share the parameters of a model: layouts, and the elements of each unit on one rank.

Nothing is allocated: parameters are counted on a meta model.
"""

from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

from torch import Tensor

from olmoe_train.config.choices import Offload, Precision, Strategy
from olmoe_train.distributed.fsdp import inside_experts, shards_within_experts
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import quantized_weights
from olmoe_train.model.roles import ParameterRole, role_of
from olmoe_train.planning.adapter import AdapterPlan, meta_model

FP32 = 4  # bytes per element


@dataclass(frozen=True)
class ParallelLayout:
    """How the ranks share a model. An expert-parallel (EP) group is a part of the ranks that share a copy."""

    strategy: Strategy
    gpus: int
    """Number of ranks, one GPU each."""
    expert_parallel_size: int = 1
    replicate_size: int = 1
    """Copies of the model with fsdp (HSDP). With ddp there is one copy per rank, or per EP group."""
    zero_stage: int = 2
    """With deepspeed: which tensors are sharded (memory_deepspeed.py)."""
    offload: Offload = Offload.none
    """With deepspeed: which tensors are in CPU memory."""
    reshard_after_forward: bool = True
    """With fsdp: whether gathered layers are freed between forward and backward."""
    prefetch: int = 1
    """With fsdp: number of layers that are gathered ahead of the current one."""

    @property
    def shard_size(self) -> int:
        """Number of ranks that share one copy of the parameters outside the experts."""
        return 1 if self.strategy is Strategy.ddp else self.gpus // self.replicate_size

    @property
    def expert_shard_size(self) -> int:
        """Number of ranks that share one copy of the experts of one EP rank."""
        return 1 if self.strategy is Strategy.ddp else self.shard_size // self.expert_parallel_size


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together: numbers of elements on one rank."""

    sharded: int
    """Elements of the rank's shard, held all the time."""
    gathered: int
    """Elements held while the unit computes: the whole parameters, padded to shard_size equal parts."""
    shard_size: int
    """Number of ranks that share one copy."""
    roles: Mapping[ParameterRole, int]
    """Of `sharded`, the elements that have a gradient and moments, by role: all without an adapter."""
    held_bytes: int
    """Bytes of `sharded` in the dtypes that fsdp and ddp hold them in."""

    @property
    def trained(self) -> int:
        """Of `sharded`, the elements that have a gradient and moments."""
        return sum(self.roles.values())

    @property
    def reduced(self) -> int:
        """Elements of the whole gradients, padded as `gathered`."""
        return self.trained * self.shard_size


@dataclass(frozen=True)
class Units:
    """The FSDP2 units of a model."""

    root: Unit
    """Embedding, final norm and head, gathered from the start of forward to the end of backward."""
    head: Unit
    """The head, a part of `root`."""
    dense: Unit
    """One layer without its experts."""
    experts: Unit
    """The experts of one layer that one EP rank has."""
    layers: int
    """Number of layers."""
    quantized: int
    """Bytes of all NF4 weights and their scales on one rank. They are buffers, and never sharded."""

    @property
    def sharded(self) -> int:
        """Number of elements of all parameters in the rank's shard."""
        return self.root.sharded + self.layers * (self.dense.sharded + self.experts.sharded)

    @property
    def trained(self) -> int:
        """Of `sharded`, the elements that have a gradient and moments."""
        return self.root.trained + self.layers * (self.dense.trained + self.experts.trained)

    @property
    def roles(self) -> Mapping[ParameterRole, int]:
        """`trained` by role."""
        counts: Counter[ParameterRole] = Counter(self.root.roles)
        for unit in (self.dense, self.experts):
            counts.update({role: self.layers * count for role, count in unit.roles.items()})
        return counts

    @property
    def held_bytes(self) -> int:
        """Bytes of `sharded`."""
        return self.root.held_bytes + self.layers * (self.dense.held_bytes + self.experts.held_bytes)


def count_units(
    config: OlmoeConfig,
    layout: ParallelLayout,
    adapter: AdapterPlan | None = None,
    precision: Precision = Precision.fp32,
) -> Units:
    """Count the elements of each FSDP2 unit on rank 0.

    FSDP2 divides a parameter into shard_size parts of ceil(size / shard_size) along dimension 0. The last
    parts may be shorter or empty; gathering pads them. Experts are divided along dimension 1, inside each
    expert, if they are expert-parallel or if their number is not a multiple of the ranks
    (distributed/fsdp.py, shards_within_experts).

    Args:
        config: Architecture of the model.
        layout: How the ranks share the model.
        adapter: The adapter; None: every parameter is trained.
        precision: Of the computation. It decides in which dtype frozen weights are held.
    """
    one_layer = copy(config)
    one_layer.num_hidden_layers = 1
    model = meta_model(one_layer, adapter, precision)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    layer = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.")}
    experts = {name: tensor for name, tensor in layer.items() if ".mlp.experts." in name}
    dense = {name: tensor for name, tensor in layer.items() if name not in experts}
    root = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    head = {name: tensor for name, tensor in root.items() if name.startswith("lm_head.")}
    parallel = layout.expert_parallel_size
    local = {name: tensor[: len(tensor) // parallel] for name, tensor in experts.items()}
    return Units(
        root=_unit(root, layout.shard_size),
        head=_unit(head, layout.shard_size),
        dense=_unit(dense, layout.shard_size),
        experts=_unit(local, layout.expert_shard_size, inside=parallel > 1),
        layers=config.num_hidden_layers,
        quantized=config.num_hidden_layers * _quantized_bytes(model, parallel),
    )


def _quantized_bytes(one_layer: OlmoeForCausalLM, expert_parallel_size: int) -> int:
    """Bytes of the NF4 weights of one layer on one rank, which holds its own experts only."""
    total = 0
    for name, weight in quantized_weights(one_layer).items():
        size = sum(buffer.nbytes for buffer in weight.buffers())
        total += size // expert_parallel_size if ".mlp.experts." in name else size
    return total


def _unit(parameters: Mapping[str, Tensor], shard_size: int, inside: bool = False) -> Unit:
    """A unit of these parameters; inside: expert-parallel experts, which are divided inside each expert."""
    sharded = held = 0
    roles: Counter[ParameterRole] = Counter()
    for name, parameter in parameters.items():
        shape = parameter.shape
        if inside:
            cut = inside_experts(shard_size, shape).dim
        else:
            cut = 1 if shards_within_experts(shape, shard_size) else 0
        part = -(-shape[cut] // shard_size) * shape.numel() // shape[cut]
        sharded += part
        if parameter.requires_grad:
            roles[role_of(name)] += part
        held += part * parameter.itemsize
    # Where a rank has a whole copy, frozen parameters are not copied (distributed/fsdp.py).
    gathered = roles.total() if shard_size == 1 else sharded * shard_size
    return Unit(sharded, gathered, shard_size, roles, held)
