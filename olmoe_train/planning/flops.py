"""FLOPs of a training step, and peak FLOP/s of a device: the two quantities of `perf/mfu`.

Model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B) divides the floating-point operations that the
model needs by those that the hardware could have done in the same time. Recomputation (activation
checkpointing, the chunked head) is a choice of the trainer and not a need of the model. It is never counted.

Shapes: D hidden size, F expert width, E experts, K top-k, L layers, S sequence, V vocabulary, H width of all
query heads, G width of all key heads.
"""

from dataclasses import dataclass

import torch

from olmoe_train.model.adapters.spec import ATTENTION, EMBEDDINGS, EXPERTS, LM_HEAD, AdapterSpec
from olmoe_train.model.configuration import OlmoeConfig


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of forward and backward per token. A multiply-add counts as two."""

    experts: float
    """Routed and shared."""
    attention_projections: float
    head: float
    router: float
    causal_attention: float
    adapter: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        base = self.experts + self.attention_projections + self.head + self.router + self.causal_attention
        return base + self.adapter


def train_flops_per_token(
    config: OlmoeConfig, sequence_length: int, adapter: AdapterSpec | None = None
) -> FlopsPerToken:
    """Exact FLOPs of all matmuls in forward and backward, per token.

    A matmul of x [1, n] with W [n, m] has n*m multiply-adds: 2*n*m FLOPs in forward, and the same in backward
    for each of the gradients of x and W. So a weight costs 6 FLOPs per token that it is applied to:

    - experts                6 * L * K * 3*D*F: gate, up and down of the K chosen experts, and of the shared
                             ones. With expert choice K is the capacity, a mean.
    - attention projections  6 * L * (2*D*H + 2*D*G): q and o, k and v
    - head                   6 * D*V, tied or not. The embedding is a look-up and costs nothing.
    - router                 6 * L * D*E
    - causal attention       token i (from 1) attends to i keys, (S + 1) / 2 on average. Scores and weighted
                             values are two matmuls of H multiply-adds per key, each with two operands that
                             need gradients: 3 * 2 * 2 * L * H * (S + 1) / 2 = 6 * L * H * (S + 1)

    With an adapter, a frozen weight has no gradient and costs 4 FLOPs. A weight [n, m] that is adapted costs
    6 R (n + m) for A and B. DoRA's norms are left out.

    With data.mask_documents a token attends only to keys of its own document. The last part, and with it
    perf/mfu, is then an upper bound. So is the sum with trainer.train_only, where frozen weights have no
    gradient.

    Norms, activations, RoPE, softmax, the weighted sum of expert outputs and the optimizer are left out,
    because they are limited by memory bandwidth, not by arithmetic. OLMoE-1B-7B with 4096 tokens, in GFLOP:
    experts 4.832, attention projections 1.611, head 0.618, router 0.013, causal attention 0.806; in all
    7.879.

    Args:
        config: Architecture of the model.
        sequence_length: Tokens per sequence (S).
        adapter: The adapter. None: every parameter is trained.
    """
    frozen = 6 if adapter is None else 4
    layers, hidden = config.num_hidden_layers, config.hidden_size
    query_width, key_value_width = config.query_width, config.key_value_width
    projections = 2 * hidden * query_width + 2 * hidden * key_value_width
    active_experts = config.experts_per_token + config.num_shared_experts
    return FlopsPerToken(
        experts=frozen * layers * active_experts * 3 * hidden * config.intermediate_size,
        attention_projections=frozen * layers * projections,
        head=frozen * hidden * config.vocab_size,
        router=(6 if adapter is None or adapter.trains_router else 4) * layers * hidden * config.num_experts,
        causal_attention=6 * layers * query_width * (sequence_length + 1),
        adapter=0.0 if adapter is None else _adapter_flops(config, adapter),
    )


def _adapter_flops(config: OlmoeConfig, adapter: AdapterSpec) -> float:
    """FLOPs of the products with A and B per token."""
    hidden, query, key = config.hidden_size, config.query_width, config.key_value_width
    of_expert = (hidden + 2 * config.intermediate_size) + (config.intermediate_size + hidden)
    widths = {
        ATTENTION: config.num_hidden_layers * (2 * (hidden + query) + 2 * (hidden + key)),
        EXPERTS: config.num_hidden_layers * config.num_experts_per_tok * of_expert,
        LM_HEAD: hidden + config.vocab_size,
        EMBEDDINGS: hidden,  # the product with A is a look-up
    }
    return 6 * adapter.rank * sum(widths[target] for target in adapter.targets)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model."""

    total: int
    active: int
    """Parameters that act on a token: all except those of the experts that the token is not sent to. With
    expert choice a mean, rounded down."""


def parameter_counts(config: OlmoeConfig) -> ParameterCounts:
    """Count parameters from the configuration. OLMoE-1B-7B: 6,919,161,856 in all, 1,282,017,280 active."""
    hidden = config.hidden_size
    query_width, key_value_width = config.query_width, config.key_value_width
    expert = 3 * hidden * config.intermediate_size
    attention = 2 * hidden * query_width + 2 * hidden * key_value_width
    if config.attention_bias:
        attention += query_width + 2 * key_value_width + hidden
    norms, final_norm = 2 * hidden, hidden  # before attention and before the experts; before the head
    if config.qk_norm:
        norms += query_width + key_value_width
    if config.norm == "nonparametric":
        norms = final_norm = 0
    shared = config.num_shared_experts * expert
    layer = attention + norms + hidden * config.num_experts + config.num_experts * expert + shared
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    total = embeddings + config.num_hidden_layers * layer + final_norm
    unused_experts = config.num_experts - config.experts_per_token
    return ParameterCounts(total, int(total - config.num_hidden_layers * unused_experts * expert))


# Dense peak of one device in TFLOP/s, by a part of the name that the driver reports: (part of the name, bf16
# on tensor cores, fp32 on vector units, because torch leaves TF32 off). Source: the vendors' data sheets;
# figures that they give "with sparsity" are halved. The first entry that matches counts, so specific names
# come before general ones.
_PEAK_TFLOPS = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),  # HGX
    ("GH200", 989.5, 67.0),
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.5, 67.0),  # SXM
    ("H100 PCIe", 756.5, 51.0),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.5, 67.0),  # SXM: "NVIDIA H100 80GB HBM3"
    ("A100", 312.0, 19.5),  # PCIe and SXM, 40 and 80 GB
    ("L40S", 362.0, 91.6),
    ("MI300X", 1307.4, 163.4),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device in matmuls.

    Args:
        device_name: Name of the device, as the driver reports it.
        dtype: Data type of the matmuls.

    Returns:
        FLOP/s. None: unknown, so that `perf/mfu` is null and not a guess. This is the case for GPUs that are
        not in the table above, for other dtypes than bfloat16 and float32, and for CPUs, whose data sheets
        have no such number: it depends on the instruction set, the clock under load and the cores that the
        container may use.
    """
    for part, bf16, fp32 in _PEAK_TFLOPS:
        if part in device_name:
            return {torch.bfloat16: bf16 * 1e12, torch.float32: fp32 * 1e12}.get(dtype)
    return None
