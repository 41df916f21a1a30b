"""The options of `model`: the architecture, and where its first weights come from."""

from dataclasses import dataclass, field
from typing import Any

from olmoe_train.config.choices import (
    ExpertsBackend,
)
from olmoe_train.model.configuration import OlmoeConfig


@dataclass(frozen=True)
class ModelConfig:
    init_from: str | None = None
    """What the run starts from: an HF directory, a run directory (its newest checkpoint's weights) or an
    original OLMo checkpoint; its configuration must agree with the fields below. null: random init."""
    trust_pickle: bool = False
    """Read init_from's weights from a pickle (pytorch_model.bin, OLMo's model.pt) where there are no
    safetensors: torch.load(weights_only=True)."""
    vocab_size: int = 50304
    """Rows of the embedding and the head. At least the tokenizer's vocabulary; may be padded up for speed."""
    hidden_size: int = 2048
    """Width of the residual stream (D)."""
    intermediate_size: int = 1024
    """Width of one expert (F)."""
    num_hidden_layers: int = 16
    """Decoder layers (L)."""
    num_attention_heads: int = 16
    """Query heads; divides hidden_size."""
    num_key_value_heads: int | None = None
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    num_experts: int = 64
    """Experts a layer (E). 1: a dense model, the one expert being its MLP."""
    num_experts_per_tok: int = 8
    """Experts a token is sent to (top-k, K)."""
    norm_topk_prob: bool = False
    """Renormalise the top-k probabilities to sum to 1. The released model does not."""
    hidden_act: str = "silu"
    """Activation of the gated expert MLP, by Transformers' name."""
    max_position_embeddings: int = 4096
    """Longest sequence the exported model declares, in tokens."""
    initializer_range: float = 0.02
    """Standard deviation of the truncated-normal init (cut at 3 standard deviations)."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    """Rotary position embedding, as Transformers' rope_parameters."""
    attention_bias: bool = False
    """Biases in the q, k, v and o projections."""
    attention_dropout: float = 0.0
    """Dropout probability of attention weights while training."""
    clip_qkv: float | None = None
    """Clamp queries, keys and values to [-clip_qkv, clip_qkv]; null: off."""
    tie_word_embeddings: bool = False
    """Share the embedding matrix with the head."""
    pad_token_id: int | None = 1
    """Padding token; its embedding gets no gradient."""
    bos_token_id: int | None = None
    """Beginning-of-sequence token, for the exported config."""
    eos_token_id: int | None = 50279
    """End-of-document token; must be the prepared data's."""
    experts_backend: ExpertsBackend = ExpertsBackend.auto
    """Expert matmuls: loop (one per expert), grouped_mm (torch's grouped GEMM), auto (grouped_mm on CUDA;
    on CPU the loop, but for decoding several sequences), sonicmoe (the sonic-moe package's kernels,
    for Hopper and Blackwell; never run by us)."""


# Fields of ModelConfig that say how to compute, not what the model is.
_NOT_ARCHITECTURE = {"init_from", "trust_pickle", "experts_backend"}


def olmoe_config(model: ModelConfig) -> OlmoeConfig:
    """The architecture that `model` describes, as the configuration that checkpoints carry."""
    fields = {name: value for name, value in vars(model).items() if name not in _NOT_ARCHITECTURE}
    return OlmoeConfig(**fields)
