"""How the ranks of a run share the parameters of a model: layouts, and the elements of each unit on one rank.

Nothing is allocated: parameters are counted on a meta model.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch

from olmoe_train.config.choices import Offload, Strategy
from olmoe_train.distributed.fsdp import shards_within_experts
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM


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

    def __add__(self, other: "Unit") -> "Unit":
        assert self.shard_size == other.shard_size
        return replace(self, sharded=self.sharded + other.sharded, gathered=self.gathered + other.gathered)


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

    @property
    def sharded(self) -> int:
        """Number of elements of all parameters in the rank's shard."""
        return self.root.sharded + self.layers * (self.dense.sharded + self.experts.sharded)


def _one_layer_shapes(config: OlmoeConfig) -> dict[str, torch.Size]:
    """Shapes of all parameters, by name, of the model cut down to its first layer."""
    one_layer = copy(config)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in OlmoeForCausalLM(one_layer).named_parameters()}


def count_units(config: OlmoeConfig, layout: ParallelLayout) -> Units:
    """Count the elements of each FSDP2 unit on rank 0.

    FSDP2 divides a parameter into shard_size parts of ceil(size / shard_size) along dimension 0. The last
    parts may be shorter or empty; gathering pads them. Experts are divided along dimension 1, inside each
    expert, if they are expert-parallel or if their number is not a multiple of the ranks
    (distributed/fsdp.py, shards_within_experts).
    """
    shapes = _one_layer_shapes(config)
    layer = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")}
    experts = {name: shape for name, shape in layer.items() if ".mlp.experts." in name}
    dense = {name: shape for name, shape in layer.items() if name not in experts}
    root = {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.")}
    head = {name: shape for name, shape in root.items() if name == "lm_head.weight"}
    parallel = layout.expert_parallel_size
    local = {name: torch.Size((shape[0] // parallel, *shape[1:])) for name, shape in experts.items()}
    return Units(
        root=_unit(root, layout.shard_size),
        head=_unit(head, layout.shard_size),
        dense=_unit(dense, layout.shard_size),
        experts=_unit(local, layout.expert_shard_size, inside=parallel > 1),
        layers=config.num_hidden_layers,
    )


def _unit(shapes: Mapping[str, torch.Size], shard_size: int, inside: bool = False) -> Unit:
    """A unit of parameters of these shapes; inside: divide along dimension 1 (expert-parallel experts)."""
    sharded = 0
    for shape in shapes.values():
        cut = 1 if inside or shards_within_experts(shape, shard_size) else 0
        sharded += -(-shape[cut] // shard_size) * shape.numel() // shape[cut]
    return Unit(sharded, sharded * shard_size, shard_size)
