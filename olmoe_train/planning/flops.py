"""How much arithmetic a training step is, and how much the device could do: the two halves of `perf/mfu`.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) divides the floating-point operations that the
model itself needs by what the hardware could have done in the same time. Recomputation (activation
checkpointing, the chunked head) is the trainer's choice and not the model's need, so it is never counted.
"""

from dataclasses import dataclass

import torch

from olmoe_train.model.configuration import OlmoeConfig


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of one token's forward and backward pass; a multiply-add is two."""

    experts: float
    attention_projections: float
    head: float
    router: float
    causal_attention: float

    @property
    def total(self) -> float:
        return self.experts + self.attention_projections + self.head + self.router + self.causal_attention


def train_flops_per_token(config: OlmoeConfig, sequence_length: int) -> FlopsPerToken:
    """Exact matmul FLOPs of one token's forward and backward pass in a sequence of `sequence_length` tokens.

    A matmul of x (1, n) with W (n, m) is n*m multiply-adds: 2*n*m FLOPs forward, and backward as much again
    for each of x's and W's gradient. So a weight costs 6 FLOPs for each token that meets it:

    - experts                6 * L * K * 3*D*F: gate, up and down of the K experts chosen
    - attention projections  6 * L * (2*D*H + 2*D*G): q and o of width H = heads * head_dim, k and v of width
                             G = kv_heads * head_dim
    - head                   6 * D*V, tied or not; the embedding is a look-up and costs nothing
    - router                 6 * L * D*E
    - causal attention       token i (from 1) meets i keys, (S + 1) / 2 on average. Scores and weighted values
                             are two matmuls of H multiply-adds a key, each with two operands that need
                             gradients: 3 * 2 * 2 * L * H * (S + 1) / 2 = 6 * L * H * (S + 1)

    With data.mask_documents a token meets its own document's keys alone, and the last part is an upper bound,
    as is perf/mfu then.

    Norms, activations, RoPE, softmax, the weighted sum of expert outputs and the optimizer are left out:
    memory bounds them, not arithmetic. OLMoE-1B-7B at 4096 tokens, in GFLOP: experts 4.832, attention
    projections 1.611, head 0.618, router 0.013, causal attention 0.806; 7.879 in all.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    query_width, key_value_width = _attention_widths(config)
    projections = 2 * hidden * query_width + 2 * hidden * key_value_width
    return FlopsPerToken(
        experts=6 * layers * config.num_experts_per_tok * 3 * hidden * config.intermediate_size,
        attention_projections=6 * layers * projections,
        head=6 * hidden * config.vocab_size,
        router=6 * layers * hidden * config.num_experts,
        causal_attention=6 * layers * query_width * (sequence_length + 1),
    )


@dataclass(frozen=True)
class ParameterCounts:
    total: int
    active: int
    """Parameters that act on a token: all but those of the experts it is not sent to."""


def parameter_counts(config: OlmoeConfig) -> ParameterCounts:
    """Parameters in all and acting on one token. OLMoE-1B-7B: 6,919,161,856 and 1,282,017,280."""
    hidden = config.hidden_size
    query_width, key_value_width = _attention_widths(config)
    expert = 3 * hidden * config.intermediate_size
    attention = 2 * hidden * query_width + 2 * hidden * key_value_width
    if config.attention_bias:
        attention += query_width + 2 * key_value_width + hidden
    norms = 2 * hidden + query_width + key_value_width  # before attention, before the experts, q_norm, k_norm
    layer = attention + norms + hidden * config.num_experts + config.num_experts * expert
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    total = embeddings + config.num_hidden_layers * layer + hidden
    unused_experts = config.num_experts - config.num_experts_per_tok
    return ParameterCounts(total, total - config.num_hidden_layers * unused_experts * expert)


def _attention_widths(config: OlmoeConfig) -> tuple[int, int]:
    """Widths of the query (and output) and of the key (and value) projections."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


# Dense peak of one device in TFLOP/s, by a part of the name that the driver reports: (part, bf16 on tensor
# cores, fp32 on vector units, since torch leaves TF32 off). From the vendors' data sheets; figures that they
# give "with sparsity" are halved. The first part found in the name counts, so the special comes before the
# general.
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
    """FLOP/s that one device reaches at best in matmuls of `dtype`, or None where that is not known.

    None for a CPU: its data sheet has no such number (it follows from instruction set, clock under load and
    the share of cores that the container was given), so `perf/mfu` is null there and not a guess. None too
    for a GPU that is not in the table above, and for a dtype other than bfloat16 and float32.
    """
    for part, bf16, fp32 in _PEAK_TFLOPS:
        if part in device_name:
            return {torch.bfloat16: bf16 * 1e12, torch.float32: fp32 * 1e12}.get(dtype)
    return None
