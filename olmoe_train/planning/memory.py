"""Memory of one rank of a training run in bytes, computed from shapes: the arithmetic behind `olmoe plan`.

Nothing is allocated. layout.py counts the parameters. The rest follows from which tensors model/ and FSDP2
keep. All results are bytes on the rank that needs most.

Shapes: B batch, S sequence, T tokens (B S), D hidden size, F expert width, E experts, K top-k, R rows (T K
copies of tokens, one for each expert that a token is sent to), V vocabulary, L layers, H width of all query
heads, G width of all key heads; b bytes per element of the computation.
"""

from dataclasses import dataclass, fields, replace

from olmoe_train.config.choices import ActivationCheckpointing, Precision
from olmoe_train.config.optimizer import AdamWConfig, OptimizerConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.adapters.spec import ATTENTION, EMBEDDINGS, EXPERTS, LM_HEAD, AdapterSpec
from olmoe_train.model.cross_entropy import HEAD_CHUNK_ROWS
from olmoe_train.model.moe.expert_choice import tokens_per_expert
from olmoe_train.planning.adapter import AdapterPlan
from olmoe_train.planning.layout import FP32, ParallelLayout, Units, count_units
from olmoe_train.planning.memory_optimizer import state_bytes, update_bytes

INT64 = 8  # bytes per element
ADAMW = AdamWConfig()


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank at the peak of a step, from its second micro-batch on."""

    parameters: int
    """fp32 master weights, and frozen weights in the precision of the computation: this rank's shard."""
    gradients: int
    """fp32 gradients, summed over the micro-batches so far: this rank's shard. 0 with
    trainer.fused_backward: those of one layer are in `reduction`."""
    optimizer: int
    """The fp32 moments of the optimizer, two for AdamW and one for Muon, and the average of the weights: this
    rank's shard. Of NorMuon also one number per row."""
    gathered: int
    """Whole weights that FSDP2 holds for the current units, and for the ones it prefetches."""
    reduction: int
    """Whole gradients of the layer in backward, and of the previous one while they are reduced."""
    activations: int
    """What autograd keeps from forward to backward, and what is recomputed at a time."""
    temporaries: int
    """The largest intermediate results in the backward of one layer, in the head, or in Muon's update."""
    all_to_all: int
    """Buffers of rows sent between expert-parallel ranks, and the order in which rows arrived."""
    quantized: int = 0
    """Frozen weights in 4 bits and their scales, whole; of experts, this rank's."""

    @property
    def state(self) -> int:
        """Bytes that are held between steps, plus gradients."""
        return self.parameters + self.gradients + self.optimizer + self.quantized

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class MicroBatch:
    """The part of a batch that one rank computes at a time."""

    sequences: int
    sequence_length: int
    precision: Precision
    checkpointing: ActivationCheckpointing
    load_factor: float = 1.0
    """Rows that the rank's experts receive, as a multiple of the mean over ranks. 1 without EP."""
    exchanged: bool = False
    """Whether rows are sent to other ranks (EP). Set by rank_memory and deepspeed_memory."""

    @property
    def tokens(self) -> int:
        """Number of tokens (T)."""
        return self.sequences * self.sequence_length

    @property
    def element(self) -> int:
        """Bytes per element of the computation (b)."""
        return 2 if self.precision is Precision.bf16 else FP32


def rank_memory(
    config: OlmoeConfig,
    layout: ParallelLayout,
    batch: MicroBatch,
    adapter: AdapterPlan | None = None,
    optimizer: OptimizerConfig = ADAMW,
    averaged: bool = False,
    fused_backward: bool = False,
) -> RankMemory:
    """The memory of the fullest rank, with fsdp or ddp.

    Parameters, gradients and each moment take 4 bytes per element of the rank's shard. With an adapter,
    only trained elements have gradients and moments. The peak of a step is either in the head, which holds
    the gradient of its weight in fp32, or in the backward of the last layers, where all activations and the
    first gradients are held. `temporaries` includes the difference if the peak is in the head. With much
    recomputation the result is an upper bound, because not all parts peak at the same time: 0.99 to 1.22
    times the measured peak (benchmarks/plan_memory.py).

    Args:
        config: Architecture of the model.
        layout: How the ranks share the model.
        batch: What one rank computes at a time.
        adapter: The adapter; None: every parameter is trained.
        optimizer: The optimizer, which decides the number of moments.
        averaged: Whether an average of the trained weights is kept (trainer.ema_decay).
        fused_backward: Whether each gradient is freed when its parameter is updated, in the backward pass.

    Returns:
        Bytes of each part.
    """
    batch = replace(batch, exchanged=layout.expert_parallel_size > 1)
    units = count_units(config, layout, adapter, batch.precision)
    gathered, reduction = _gathered(units, layout, batch.element), _reduction(units, batch.element)
    exchange = all_to_all_bytes(config, batch)
    activations = saved_activations(config, batch, adapter) + recomputed_activations(config, batch)
    temporaries = temporary_bytes(config, batch, reduction + exchange, adapter)
    update = update_bytes(config, layout, optimizer)
    if fused_backward:
        temporaries += update
    else:  # when the optimizer makes its update, none of these is allocated any more
        temporaries = max(temporaries, update - (gathered + reduction + exchange + activations))
    return RankMemory(
        parameters=units.held_bytes,
        gradients=0 if fused_backward else FP32 * units.trained,
        optimizer=state_bytes(config, units.roles, optimizer) + averaged * FP32 * units.trained,
        gathered=gathered,
        reduction=reduction,
        activations=activations,
        temporaries=temporaries,
        all_to_all=exchange,
        quantized=units.quantized,
    )


def _gathered(units: Units, layout: ParallelLayout, element: int) -> int:
    """Bytes of gathered weights, b per element.

    The root is held all the time. Of the layers, the current one and the prefetched ones are held, and at
    least two: the buffer of an all-gather exists beside the weights that are copied out of it. A unit that no
    other rank shares is copied too (cast to the computation's precision), and kept from forward to backward,
    because distributed/fsdp.py reshards only sharded units.
    """
    elements = units.root.gathered
    at_once = min(max(2, 1 + layout.prefetch), units.layers)
    for unit in (units.dense, units.experts):
        freed = unit.shard_size > 1 and layout.reshard_after_forward
        elements += (at_once if freed else units.layers) * unit.gathered
    return element * elements


def _reduction(units: Units, element: int) -> int:
    """Bytes of gradients that are being reduced.

    These are one layer's whole gradients in the computation's precision, and one layer's reduce-scatter input
    in fp32, which FSDP2 frees when it reduces the next layer; and the head's gradient, which is kept until
    the root is reduced. The gradients of a unit that no other rank shares are divided into a second fp32
    buffer, then copied.
    """
    total = element * units.head.reduced
    for unit in (units.dense, units.experts):
        unshared = unit.shard_size == 1
        total += (max(element + FP32, 2 * FP32) if unshared else element + FP32) * unit.reduced
    return total


def saved_activations(config: OlmoeConfig, batch: MicroBatch, adapter: AdapterPlan | None = None) -> int:
    """Bytes that autograd keeps from forward to backward for all layers, the losses and the head.

    Besides the layers these are: the final norm; the gradients of the head's input and weight, which the
    chunked cross-entropy computes in forward; token ids, labels, cosines and sines.
    """
    tokens, element, hidden = batch.tokens, batch.element, config.hidden_size
    norm = tokens * _norms_saved(config, batch, [hidden])
    head = element * (tokens + config.vocab_size) * hidden
    if adapter is not None:
        # A frozen norm keeps no normalized value, and a frozen head no gradient of its weight.
        norm -= tokens * element * hidden
        head = element * tokens * hidden + _head_adapter_saved(config, batch, adapter.spec)
    rotary = element * 2 * batch.sequence_length * config.head_dim
    whole = batch.checkpointing is ActivationCheckpointing.none
    layer = _layer_saved(config, batch) if whole else _layer_kept(config, batch)
    if adapter is not None:
        layer += _layer_adapter_saved(config, batch, adapter.spec)
    return config.num_hidden_layers * layer + norm + head + rotary + 2 * INT64 * tokens


def _layer_adapter_saved(config: OlmoeConfig, batch: MicroBatch, spec: AdapterSpec) -> int:
    """What an adapter adds to the bytes that one layer keeps; negative where freezing saves more.

    The experts' adapter keeps nothing of the size of rows (model/adapters/experts.py). A frozen norm does not
    keep its normalized value, b per element. An attention projection keeps b R per token for the input of B.
    With dropout it also keeps A's input and the mask, b per element each (on CUDA the mask is smaller), and
    the projections do not share an input. With DoRA it keeps its result before the gain. With selective
    recomputation, the results of the products with A and B are kept instead. Norms of rows for DoRA do not
    depend on the tokens.
    """
    if batch.checkpointing is ActivationCheckpointing.full:
        return 0
    b, rank, hidden = batch.element, spec.rank, config.hidden_size
    query, key = config.query_width, config.key_value_width
    results = query + 2 * key + hidden  # of q, k, v and o
    selective = batch.checkpointing is ActivationCheckpointing.selective
    per_token, fixed = 0 if selective else -b * (2 * hidden + query + key), 0
    if ATTENTION in spec.targets and selective:
        per_token += b * (4 * rank + results)
        fixed += (b + FP32) * rank * results if spec.dora else 0
    elif ATTENTION in spec.targets:
        per_token += 4 * b * rank + (b * results if spec.dora else 0)
        per_token += b * (2 * (3 * hidden + query) - hidden) if spec.dropout else 0
    if EXPERTS in spec.targets and spec.dora:
        fixed += 2 * FP32 * config.num_experts * (2 * config.intermediate_size + hidden)
    return batch.tokens * per_token + fixed


def _head_adapter_saved(config: OlmoeConfig, batch: MicroBatch, spec: AdapterSpec) -> int:
    """Bytes that the adapters of head and embedding keep: the gradients of the head's low-rank input and of
    B, which the chunked cross-entropy computes in forward, and the inputs of A and B."""
    b, rank = batch.element, spec.rank
    kept = 0
    if LM_HEAD in spec.targets:
        kept += b * rank * (batch.tokens + config.vocab_size)
        kept += (b + 1) * batch.tokens * config.hidden_size if spec.dropout else 0
    if EMBEDDINGS in spec.targets:
        kept += b * rank * batch.tokens
    return kept


def recomputed_activations(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes that backward recomputes at a time.

    full: a whole layer. selective: for queries and keys, what their norms keep, and the rotated values, b per
    element.
    """
    match batch.checkpointing:
        case ActivationCheckpointing.none:
            return 0
        case ActivationCheckpointing.full:
            return _layer_saved(config, batch)
        case ActivationCheckpointing.selective:
            query, key = config.query_width, config.key_value_width
            norms = batch.tokens * _norms_saved(config, batch, _query_key_norms(config))
            return norms + batch.tokens * batch.element * (query + key)


def _rows(config: OlmoeConfig, batch: MicroBatch) -> tuple[int, int]:
    """Number of rows that the rank's tokens make, and number of rows that the rank's experts receive."""
    rows = batch.tokens * config.num_experts_per_tok
    if config.routing == "expert_choice":
        rows = batch.sequences * config.num_experts * tokens_per_expert(batch.sequence_length, config)
    return rows, round(batch.load_factor * rows)


def _query_key_norms(config: OlmoeConfig) -> list[int]:
    """Widths of the norms of queries and keys."""
    return [config.query_width, config.key_value_width] if config.qk_norm else []


def _norms_saved(config: OlmoeConfig, batch: MicroBatch, widths: list[int]) -> int:
    """Bytes per token that norms over these widths keep.

    rms: the fp32 input (4 bytes per element), the normalized value (b per element) and 1/rms in fp32. On CUDA
    it is less: a single kernel keeps the input in b. nonparametric: input, mean and 1/std in b.
    """
    if config.norm == "nonparametric":
        return sum(batch.element * (width + 2) for width in widths)
    return sum((FP32 + batch.element) * width + FP32 for width in widths)


def _layer_saved(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes that one decoder layer keeps without recomputation, from the autograd graph of model/. A test
    (test_memory.py) compares them with the tensors of a real model.

    Per token:
    - four norms, over D, H, G and D elements: see `_norms_saved`
    - b D for the result of the first norm, the input of q, k and v; b D for that of the second norm, the
      input of the router and the experts
    - b (2H + 2G): rotated queries and keys, values, and attention's result, the input of o
    - 4 bytes per query head: attention's logsumexp
    - router: 4 E for fp32 probabilities, and 4 for logsumexp
    - 36 bytes per chosen expert: its int64 index, three int64 of the sort by expert, and the fp32 weight
    - shared experts: 4 b times their width, for gate, its activation, up and their product
    Per row: b 2F for gate and up (model/moe/experts.py).
    """
    tokens, b, hidden = batch.tokens, batch.element, config.hidden_size
    query, key = config.query_width, config.key_value_width
    norms = tokens * _norms_saved(config, batch, [hidden, hidden, *_query_key_norms(config)])
    attention = tokens * (b * (hidden + 2 * query + 2 * key) + FP32 * config.num_attention_heads)
    if config.clip_qkv is not None:
        attention += tokens * b * (query + 2 * key)  # autograd keeps the input of clamp
    return norms + attention + _routing_saved(config, batch) + _rows_saved(config, batch)


def _rows_saved(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes of gate and up of the experts' rows; with EP also of the rows that arrived and of the results
    that came back, b D each."""
    sent, received = _rows(config, batch)
    exchanged = (sent + received) * config.hidden_size if batch.exchanged else 0
    return batch.element * (received * 2 * config.intermediate_size + exchanged)


def _routing_saved(config: OlmoeConfig, batch: MicroBatch) -> int:
    """The part of router and shared experts in `_layer_saved`, including their input, which experts share.

    With expert choice a row is a chosen pair of token and expert. Experts read copies of the tokens, b D per
    row, unless these are sent. Two int64 per row and one per token sort the pairs by token.
    """
    tokens, b, rows = batch.tokens, batch.element, _rows(config, batch)[0]
    router = tokens * (b * config.hidden_size + FP32 * (config.num_experts + 1)) + (4 * INT64 + FP32) * rows
    if config.norm_topk_prob:
        # The weights before normalization, and their sum.
        router += tokens * FP32 * (config.num_experts_per_tok + 1)
    if config.routing == "expert_choice":
        router += INT64 * (2 * rows + tokens) + (0 if batch.exchanged else b * config.hidden_size * rows)
    return router + 4 * b * tokens * config.shared_width


def _layer_kept(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes that one layer keeps until it is recomputed (distributed/activation_checkpointing.py).

    full: per token b D for the layer's input, and four int64 per chosen expert for its routing.
    selective: per token b 3D for the inputs of both norms and of attention, b (2H + 2G + D) for the results
    of q, k, v, o and attention, and attention's logsumexp; and everything that router and experts keep.
    """
    tokens, b, hidden = batch.tokens, batch.element, config.hidden_size
    if batch.checkpointing is ActivationCheckpointing.full:
        routing = 4 * INT64 * _rows(config, batch)[0]
        return tokens * b * hidden + routing
    query, key = config.query_width, config.key_value_width
    attention = tokens * (b * (4 * hidden + 2 * query + 2 * key) + FP32 * config.num_attention_heads)
    return attention + _routing_saved(config, batch) + _rows_saved(config, batch)


def temporary_bytes(
    config: OlmoeConfig, batch: MicroBatch, of_layers: int, adapter: AdapterPlan | None = None
) -> int:
    """Extra bytes at the peak: those of one layer's backward, or those of the head if they are larger.

    Args:
        config: Architecture of the model.
        batch: What one rank computes at a time.
        of_layers: Bytes of gradients that are being reduced and of all-to-all buffers. They are not allocated
            while the head runs, so they are subtracted from its part.
        adapter: The adapter; None: every parameter is trained.
    """
    layer, head = _layer_temporaries(config, batch), _head_temporaries(config, batch)
    if adapter is not None:
        head -= FP32 * config.vocab_size * config.hidden_size  # a frozen head has no gradient
        if adapter.quantized:
            # One matrix is dequantized at a time: its indices as uint8 and int32, levels and values in fp32.
            layer += (
                (5 + 2 * FP32) * max(config.hidden_size, 2 * config.intermediate_size) * config.hidden_size
            )
    return max(layer, head - of_layers)


def _layer_temporaries(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes at the peak of one layer's backward, which is in the experts.

    Per row b (D + 7F): the gradients of the experts' results and of the gated product, and the operands of
    activation and product with their gradients. Per token 2 b D: the gradients of the residual stream and of
    the block's output.
    """
    received = _rows(config, batch)[1]
    experts = received * (config.hidden_size + 7 * config.intermediate_size)
    return batch.element * (experts + 2 * batch.tokens * config.hidden_size)


def _head_temporaries(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes of the head beyond what is saved.

    These are the fp32 gradient of the head's weight, to which the chunks are added; the logits of one chunk
    in the computation's precision and in fp32, and their fp32 log-probabilities; and the residual stream
    after the last layer and its norm.
    """
    weight = config.vocab_size * config.hidden_size
    chunk = min(HEAD_CHUNK_ROWS, batch.tokens) * config.vocab_size
    stream = 2 * batch.tokens * config.hidden_size * batch.element
    return FP32 * weight + batch.element * chunk + 2 * FP32 * chunk + stream


def all_to_all_bytes(config: OlmoeConfig, batch: MicroBatch) -> int:
    """Bytes of the all-to-all between expert-parallel ranks; 0 without EP.

    The send and receive buffers of one exchange take b D per row that is sent and per row that arrives. Every
    layer keeps two int64 per row that arrived: the order of arrival and its inverse.
    """
    if not batch.exchanged:
        return 0
    sent, received = _rows(config, batch)
    order = 2 * INT64 * received * config.num_hidden_layers
    return batch.element * config.hidden_size * (sent + received) + order
