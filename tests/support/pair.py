"""One small random model in two implementations: this package and Transformers, the reference."""

import random
from typing import Any

import torch
import transformers
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.sizes import SIZES

# The head dimension is 8, so RoPE has 4 frequency pairs. With width 24 no matrix of an expert is square, and
# experts can be cut into halves and thirds. The scaled RoPE forms extend 64 positions or fewer.
TINY: dict[str, Any] = SIZES | {
    "vocab_size": 80,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_experts": 6,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 8,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


def random_config(seed: int) -> dict[str, Any]:
    """Return a random combination of the options that change the computation."""
    draw = random.Random(seed)
    heads, head_dim = draw.choice([(4, 8), (2, 8), (8, 8)])
    experts = draw.choice([4, 7, 12])
    top_k = draw.choice([1, 2, experts])
    return {
        **TINY,
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([heads, heads // 2, 1]),
        "intermediate_size": draw.choice([8, 24, 40]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        # Not with top-1: the weight is p / p, and its gradient to the router is only rounding error.
        "norm_topk_prob": top_k > 1 and draw.random() < 0.5,
        "clip_qkv": draw.choice([None, 0.5, 2.0]),
        "attention_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.3,
        "hidden_act": draw.choice(["silu", "gelu", "relu2", "quick_gelu"]),
        "rms_norm_eps": draw.choice([1e-5, 1e-2]),
        "rope_parameters": draw.choice(ROPES),
        "pad_token_id": draw.choice([None, 1]),
    }


def make_pair(
    config: dict[str, Any], seed: int = 0, attention: str = "sdpa"
) -> tuple[OlmoeForCausalLM, transformers.OlmoeForCausalLM]:
    """Return both models in eval mode with the same weights.

    The weights are large enough for every detail of the computation to affect the logits.
    """
    ours = OlmoeForCausalLM(OlmoeConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    options = config | {"attn_implementation": attention}
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**options))
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def make_batch(seed: int, padding: str, batch: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Return input_ids and labels, int64 [batch, length], where some labels are -100.

    padding: "none", "left" or "right". With padding there is also an attention_mask, int64 [batch, length],
    and the rows have different lengths.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    input_ids = torch.randint(3, TINY["vocab_size"], (batch, length), generator=generator)
    labels = input_ids.masked_fill(torch.rand(input_ids.shape, generator=generator) < 0.2, -100)
    if padding == "none":
        return {"input_ids": input_ids, "labels": labels}
    kept = torch.tensor([length, length - 4, length - 7][:batch])[:, None]
    place = torch.arange(length)[None]
    mask = place < kept if padding == "right" else place >= length - kept
    return {
        "input_ids": input_ids.masked_fill(~mask, 1),
        "labels": labels.masked_fill(~mask, -100),
        "attention_mask": mask.long(),
    }
