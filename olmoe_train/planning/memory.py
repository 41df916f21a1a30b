"""How many bytes one rank of a training run holds, from shapes alone: the arithmetic behind `olmoe plan`.

Nothing is allocated: parameters are counted on a meta model, the rest follows from what model/ and FSDP2
keep. All results are bytes on the fullest rank. Shapes: B batch, S sequence, T tokens (B x S), D hidden,
F expert width, E experts, K top-k, R rows (T x K token copies), V vocabulary, L layers.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields, replace

import torch

from olmoe_train.config.choices import ActivationCheckpointing, Offload, Precision, Strategy
from olmoe_train.distributed.fsdp import cut_inside
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.cross_entropy import HEAD_CHUNK_ROWS

FP32, INT64 = 4, 8  # bytes an element


@dataclass(frozen=True)
class Layout:
    """How ranks share a model. The expert-parallel ranks are taken out of those that share one copy."""

    strategy: Strategy
    gpus: int
    expert_parallel_size: int = 1
    replicate_size: int = 1
    """Copies of the model under fsdp (HSDP); ddp has one on every rank, or on every EP group."""
    zero_stage: int = 2
    """Under deepspeed: what is sharded (memory_zero.py)."""
    offload: Offload = Offload.none
    """Under deepspeed: what is in CPU memory."""
    reshard_after_forward: bool = True
    """Under fsdp: whether gathered layers are freed between forward and backward."""
    prefetch: int = 1
    """Under fsdp: layers gathered ahead of the one at work."""

    @property
    def shard_size(self) -> int:
        """Ranks that share one copy of what is not an expert."""
        return 1 if self.strategy is Strategy.ddp else self.gpus // self.replicate_size

    @property
    def expert_shard_size(self) -> int:
        """Ranks that share one copy of one EP rank's experts."""
        return 1 if self.strategy is Strategy.ddp else self.shard_size // self.expert_parallel_size


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together, in elements on one rank."""

    sharded: int
    """Held all the time."""
    gathered: int
    """Held while the unit computes: padded to shard_size equal parts."""
    shard_size: int

    def __add__(self, other: "Unit") -> "Unit":
        assert self.shard_size == other.shard_size
        return replace(self, sharded=self.sharded + other.sharded, gathered=self.gathered + other.gathered)


@dataclass(frozen=True)
class Units:
    root: Unit
    """Embedding, final norm and head: gathered from the first forward layer to the end of backward."""
    head: Unit
    """The part of `root` that is the head."""
    dense: Unit
    """One layer without its experts."""
    experts: Unit
    """One layer's experts on one EP rank."""
    layers: int

    @property
    def sharded(self) -> int:
        """Parameters that the rank holds, in elements."""
        return self.root.sharded + self.layers * (self.dense.sharded + self.experts.sharded)


def _one_layer_shapes(config: OlmoeConfig) -> dict[str, torch.Size]:
    """Shapes of all parameters of the model with its first layer only, by name."""
    one_layer = copy(config)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in OlmoeForCausalLM(one_layer).named_parameters()}


def count_units(config: OlmoeConfig, layout: Layout) -> Units:
    """What rank 0 holds of each unit.

    FSDP2 cuts a parameter into shard_size parts of ceil(size / shard_size), of which the last may be short or
    empty, and gathers them padded. It cuts dimension 0; of parallel experts, and of those that ranks do not
    divide, dimension 1, inside each expert (parallelize.py: cut_inside).
    """
    shapes = _one_layer_shapes(config)
    layer = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")}
    experts = {name: shape for name, shape in layer.items() if ".mlp.experts." in name}
    dense = {name: shape for name, shape in layer.items() if name not in experts}
    root = {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.")}
    head = {name: shape for name, shape in root.items() if name == "lm_head.weight"}
    parallel = layout.expert_parallel_size
    own = {name: torch.Size((shape[0] // parallel, *shape[1:])) for name, shape in experts.items()}
    return Units(
        root=_unit(root, layout.shard_size),
        head=_unit(head, layout.shard_size),
        dense=_unit(dense, layout.shard_size),
        experts=_unit(own, layout.expert_shard_size, inside=parallel > 1),
        layers=config.num_hidden_layers,
    )


def _unit(shapes: Mapping[str, torch.Size], shard_size: int, inside: bool = False) -> Unit:
    """inside: parallel experts."""
    sharded = 0
    for shape in shapes.values():
        cut = 1 if inside or cut_inside(shape, shard_size) else 0
        sharded += -(-shape[cut] // shard_size) * shape.numel() // shape[cut]
    return Unit(sharded, sharded * shard_size, shard_size)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank at the highest moment of a step, from its second micro-batch on."""

    parameters: int
    """fp32 master weights, this rank's shard."""
    gradients: int
    """fp32, summed over the micro-batches so far."""
    optimizer: int
    """AdamW's two fp32 moments."""
    gathered: int
    """Whole weights that FSDP2 holds for the units at work, and the next one's as they arrive."""
    reduction: int
    """Whole gradients of the layer in backward, and the one before on its way to the other ranks."""
    activations: int
    """What autograd keeps from forward for backward, and what is recomputed at a time."""
    temporaries: int
    """The largest results that live inside one layer's backward, or inside the head."""
    all_to_all: int
    """Rows on their way between expert-parallel ranks, and the order they arrived in."""

    @property
    def state(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at a time."""

    sequences: int
    sequence_length: int
    precision: Precision
    checkpointing: ActivationCheckpointing
    load_factor: float = 1.0
    """Rows that the rank's experts receive, as a multiple of the mean over ranks. 1 without EP."""
    exchanged: bool = False
    """Whether rows go to other ranks (EP); set by rank_memory and zero_memory."""

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def element(self) -> int:
        """Bytes an element of what is computed."""
        return 2 if self.precision is Precision.bf16 else FP32


def rank_memory(config: OlmoeConfig, layout: Layout, batch: MicroBatch) -> RankMemory:
    """Bytes of everything on the fullest rank.

    Parameters, gradients and moments: 4, 4 and 8 bytes an element of the rank's shard. The step is highest
    either in the head, which has the gradient of its weight in fp32, or in the backward of the last layers,
    where all activations meet the gradients. `temporaries` makes up the difference where the head is higher.
    An estimate from above where much is recomputed, since not everything is highest at once: 0.99 to 1.22
    times the peak of real ranks (benchmarks/plan_memory.py).
    """
    batch = replace(batch, exchanged=layout.expert_parallel_size > 1)
    units = count_units(config, layout)
    gathered, reduction = _gathered(units, layout, batch.element), _reduction(units, batch.element)
    exchange = all_to_all_bytes(config, batch)
    return RankMemory(
        parameters=FP32 * units.sharded,
        gradients=FP32 * units.sharded,
        optimizer=2 * FP32 * units.sharded,
        gathered=gathered,
        reduction=reduction,
        activations=saved_activations(config, batch) + recomputed_activations(config, batch),
        temporaries=temporary_bytes(config, batch, reduction + exchange),
        all_to_all=exchange,
    )


def _gathered(units: Units, layout: Layout, element: int) -> int:
    """The root all the time; of the layers the one at work and those ahead of it, or an all-gather's buffer
    beside what is copied out of it.

    Gathered weights are in the computation's precision. A unit that no other rank shares is copied (cast)
    too, and kept from forward to backward: parallelize.py reshards after forward only what is sharded.
    """
    elements = units.root.gathered
    at_once = min(max(2, 1 + layout.prefetch), units.layers)
    for unit in (units.dense, units.experts):
        freed = unit.shard_size > 1 and layout.reshard_after_forward
        elements += (at_once if freed else units.layers) * unit.gathered
    return element * elements


def _reduction(units: Units, element: int) -> int:
    """Whole gradients of one layer in the computation's precision, and one layer's reduce-scatter input in
    fp32 (FSDP2 lets go of it when the next one is due); the head's gradient, which waits for the root's turn.

    A unit that no other rank shares is divided into a second fp32 buffer, then copied.
    """
    total = element * units.head.gathered
    for unit in (units.dense, units.experts):
        alone = unit.shard_size == 1
        total += (max(element + FP32, 2 * FP32) if alone else element + FP32) * unit.gathered
    return total


def saved_activations(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes that autograd keeps from forward to backward, over all layers, losses and the head.

    After the layers: the final norm (fp32 input, 1/rms, normalised), the head's gradients of its input and of
    its weight (the chunked cross-entropy makes them in forward), token ids, labels, cosines and sines.
    """
    tokens, element, hidden = batch.tokens, batch.element, config.hidden_size
    norm = tokens * ((FP32 + element) * hidden + FP32)
    head = element * (tokens + config.vocab_size) * hidden
    rotary = element * 2 * batch.sequence_length * config.head_dim
    whole = batch.checkpointing is ActivationCheckpointing.none
    layer = _layer_saved(config, batch) if whole else _layer_kept(config, batch)
    return config.num_hidden_layers * layer + norm + head + rotary + 2 * INT64 * tokens


def recomputed_activations(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes that backward makes anew at a time.

    full: a whole layer. selective: of attention, for q and k each, the norm's fp32 input and value (b), and
    the rotated one (b).
    """
    match batch.checkpointing:
        case ActivationCheckpointing.none:
            return 0
        case ActivationCheckpointing.full:
            return _layer_saved(config, batch)
        case ActivationCheckpointing.selective:
            query, key = _widths(config)
            return batch.tokens * (FP32 + 2 * batch.element) * (query + key)


def _widths(config: OlmoeConfig) -> tuple[int, int]:
    """Width of all query heads, and of all key (or value) heads."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _rows(config: OlmoeConfig, batch: MicroBatch) -> tuple[int, int]:
    """(token copies that the rank sends out, and those that its experts get)."""
    rows = batch.tokens * config.num_experts_per_tok
    return rows, round(batch.load_factor * rows)


def _layer_saved(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes that one decoder layer keeps without recomputation, counted from the autograd graph of
    model/ (tests/unit/test_plan.py counts the real tensors).

    b bytes an element, H and G the widths of all query and of all key heads. Per token:
    - four norms, over D, H, G and D: fp32 input 4, normalised value b an element, and 1/rms in fp32 (on CUDA
      one kernel that keeps the input in b: less)
    - b D each: the first norm's result, input of q, k and v; the second one's, of the router and the experts
    - b (2H + 2G): rotated q and k, v, and attention's result, input of o; 4 a head: its logsumexp
    - router: fp32 probabilities 4 E, and what the losses keep; a choice: three int64 of the sort, 4 of weight
    Per row: b 2F, gate and up (model/moe/experts.py).
    """
    tokens, b, hidden = batch.tokens, batch.element, config.hidden_size
    query, key = _widths(config)
    norms = tokens * ((FP32 + b) * (2 * hidden + query + key) + 4 * FP32)
    attention = tokens * (b * (hidden + 2 * query + 2 * key) + FP32 * config.num_attention_heads)
    if config.clip_qkv is not None:
        attention += tokens * b * (query + 2 * key)  # clamp keeps its input
    return norms + attention + _routing_saved(config, batch) + _rows_saved(config, batch)


def _rows_saved(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Gate and up of the experts' rows; with EP also the rows that arrived, b D each, and the results that
    came back."""
    sent, received = _rows(config, batch)
    travelled = (sent + received) * config.hidden_size if batch.exchanged else 0
    return batch.element * (received * 2 * config.intermediate_size + travelled)


def _routing_saved(config: OlmoeConfig, batch: MicroBatch) -> int:
    """The router's part of `_layer_saved`, with its input, which is also the experts', and what the losses
    keep."""
    tokens, b, top_k = batch.tokens, batch.element, config.num_experts_per_tok
    router = tokens * (b * config.hidden_size + FP32 * config.num_experts + (3 * INT64 + FP32) * top_k)
    if config.norm_topk_prob:
        router += tokens * FP32 * (top_k + 1)  # the weights before, and their sum
    return router + _loss_saved(config, tokens)


def _loss_saved(config: OlmoeConfig, tokens: int) -> int:
    """What the losses keep of a layer's router: fp32 logits and probabilities, logsumexp, and the int64
    choice."""
    return tokens * (2 * FP32 * config.num_experts + FP32 + INT64 * config.num_experts_per_tok)


def _layer_kept(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes that one layer keeps until it is recomputed (distributed/activation_checkpointing.py).

    full: the layer's input, b D a token, and its routing: three int64 a choice, and what the losses keep.
    selective: per token the inputs of both norms and of attention, b 3D; the results of q, k, v, o and
    attention, b (2H + 2G + D), with its logsumexp; all of the router and the experts.
    """
    tokens, b, hidden = batch.tokens, batch.element, config.hidden_size
    if batch.checkpointing is ActivationCheckpointing.full:
        routing = 3 * INT64 * tokens * config.num_experts_per_tok
        return tokens * b * hidden + routing + _loss_saved(config, tokens)
    query, key = _widths(config)
    attention = tokens * (b * (4 * hidden + 2 * query + 2 * key) + FP32 * config.num_attention_heads)
    return attention + _routing_saved(config, batch) + _rows_saved(config, batch)


def temporary_bytes(config: OlmoeConfig, batch: MicroBatch, of_layers: int) -> int:
    """What one layer's backward has besides, or the head where that is more; the head's turn comes when
    `of_layers`, the gradients on their way and the exchange of rows, is not there."""
    return max(_layer_temporaries(config, batch), _head_temporaries(config, batch) - of_layers)


def _layer_temporaries(config: OlmoeConfig, batch: MicroBatch) -> int:
    """The experts' backward at its highest, b (D + 7F) a row: the gradients of their results and of the gated
    product, and what activation, product and their gradients are made of; beside them the gradients of the
    residual stream and of the block's output."""
    received = _rows(config, batch)[1]
    experts = received * (config.hidden_size + 7 * config.intermediate_size)
    return batch.element * (experts + 2 * batch.tokens * config.hidden_size)


def _head_temporaries(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Beyond what is saved: the head's weight gradient in fp32 as chunks are added into it; the logits of a
    chunk (b, fp32, log-probabilities in fp32); and without recomputation, which keeps them anyway, the inputs
    of all layers, which the model hands out until its forward returns."""
    weight = config.vocab_size * config.hidden_size
    chunk = min(HEAD_CHUNK_ROWS, batch.tokens) * config.vocab_size
    inputs = config.num_hidden_layers if batch.checkpointing is ActivationCheckpointing.none else 0
    stream = (inputs + 2) * batch.tokens * config.hidden_size * batch.element
    return FP32 * weight + batch.element * chunk + 2 * FP32 * chunk + stream


def all_to_all_bytes(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Send and receive buffers of one exchange: b D a row that leaves, and b D a row that arrives. And two
    int64 a row that arrives, in every layer: the order of arrival and its inverse. Nothing without EP."""
    if not batch.exchanged:
        return 0
    sent, received = _rows(config, batch)
    order = 2 * INT64 * received * config.num_hidden_layers
    return batch.element * config.hidden_size * (sent + received) + order
