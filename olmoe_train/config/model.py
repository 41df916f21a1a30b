"""The options of `model`: the architecture, and the source of the initial weights."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from olmoe_train.config.choices import ExpertsBackend, Initialization, Norm, RoutingKind, StripPrefix
from olmoe_train.model.configuration import OlmoeConfig


@dataclass(frozen=True)
class ModelConfig:
    init_from: str | None = None
    """Where the initial weights come from: an HF directory, a run directory (the weights of its newest
    checkpoint), an original OLMo checkpoint, a model's name on the Hugging Face hub, or the URL of an HF
    directory in an object store. Its configuration decides the architecture, the vocabulary, the special
    tokens and RoPE; a key that contradicts it is refused, except attention_dropout. null: random weights."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; null: main, or in a run that continues, the commit from
    which it started. A run records the commit."""
    adapter_from: str | None = None
    """Where the initial values of the adapter come from: the directory of a PEFT adapter. It decides
    adapter.rank, alpha, targets and scaling; a key that contradicts it is refused. null: a new adapter."""
    trust_pickle: bool = False
    """If init_from has no safetensors, read its weights from a pickle (pytorch_model.bin, or OLMo's model.pt)
    with torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of
    init_from's tensors."""
    vocab_size: int = 50304
    """Rows of the embedding and of the head: at least the tokenizer's vocabulary. May be padded to a larger
    size for speed."""
    hidden_size: int = 2048
    """Width of the residual stream (D)."""
    intermediate_size: int = 1024
    """Hidden width of one expert (F)."""
    num_hidden_layers: int = 16
    """Number of decoder layers (L)."""
    num_attention_heads: int = 16
    """Number of query heads. Must divide hidden_size."""
    num_key_value_heads: int | None = None
    """Number of key and value heads (grouped-query attention); null: as many as query heads."""
    num_experts: int = 64
    """Experts per layer (E). 1: a dense model, whose MLP is the one expert."""
    num_experts_per_tok: int = 8
    """Experts per token (top-k, K)."""
    norm_topk_prob: bool = False
    """Normalize the top-k probabilities so that they sum to 1. The released model does not do this."""
    hidden_act: str = "silu"
    """Activation function of the gated expert MLP, by its name in Transformers."""
    max_position_embeddings: int = 4096
    """Longest sequence that the exported model supports, in tokens."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights (initialization)."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    """Rotary position embedding, in the form of rope_parameters in Transformers."""
    attention_bias: bool = False
    """Whether the q, k, v and o projections have biases."""
    attention_dropout: float = 0.0
    """Dropout probability of the attention weights in training."""
    clip_qkv: float | None = None
    """Clamp queries, keys and values to [-clip_qkv, clip_qkv]; null: off."""
    tie_word_embeddings: bool = False
    """Share the embedding matrix with the head."""
    pad_token_id: int | None = 1
    """Padding token. Its embedding receives no gradient."""
    bos_token_id: int | None = None
    """Beginning-of-sequence token in the exported config."""
    eos_token_id: int | None = 50279
    """End-of-document token. Must be that of the prepared data."""
    num_shared_experts: int = 0
    """Experts beside the routed ones that process every token, without a routing weight, each of width
    intermediate_size. Not exportable."""
    routing: RoutingKind = RoutingKind.token_choice
    """token_choice: each token goes to its most probable experts. expert_choice (arXiv 2202.09368): each
    expert takes its most probable tokens of a sequence. Which experts a token has then depends on later
    tokens, so the model can be trained and compared, but it cannot generate. Not exportable."""
    expert_capacity: float | None = None
    """With expert_choice: mean number of experts per token; an expert takes expert_capacity x tokens of the
    sequence / num_experts. null: num_experts_per_tok."""
    qk_norm: bool = True
    """Normalize queries and keys. false is not exportable."""
    norm: Norm = Norm.rms
    """rms: RMSNorm with a weight. nonparametric: LayerNorm without weight and bias; not exportable."""
    initialization: Initialization = Initialization.truncated_normal
    """Distribution of the initial weights. truncated_normal: cut at 3 standard deviations. normal: not
    cut."""
    experts_backend: ExpertsBackend = ExpertsBackend.auto
    """How the matrix products of the experts are computed. loop: one per expert. grouped_mm: torch's grouped
    GEMM. auto: grouped_mm on CUDA; on a CPU the loop, except for decoding several sequences. sonicmoe: the
    kernels of the sonic-moe package, for Hopper and Blackwell; not tested on a GPU yet."""


# Fields of ModelConfig that are not part of the architecture: where weights come from and how to compute.
NOT_ARCHITECTURE = {
    "init_from",
    "revision",
    "adapter_from",
    "trust_pickle",
    "strip_prefix",
    "experts_backend",
}


def olmoe_config(model: ModelConfig) -> OlmoeConfig:
    """Convert the section `model` to the configuration of the architecture, as checkpoints contain it.

    Raises:
        UserError: lists the values that do not fit together.
    """
    fields = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in vars(model).items()
        if name not in NOT_ARCHITECTURE
    }
    return OlmoeConfig(**fields)
