"""torch.compile where it pays. Imports the model alone, so that benchmarks can do without the trainer."""

import torch

from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import target_log_probs
from olmoe_train.model.moe.experts import gated, gated_backward
from olmoe_train.model.transformer import OlmoeDecoderLayer


def compile_layers(model: OlmoeForCausalLM) -> None:
    """torch.compile what is elementwise in each layer and in the head, in place; one compilation serves all
    layers.

    Not the layer as a whole: routing stays visible to activation checkpointing, and what depends on the host
    (the all-to-all's sizes) does not break a graph. Norms and attention are compiled as modules and
    recomputed whole in backward; of experts and head, which have gradients of their own, what is between the
    matrix products.
    """
    for layer in model.model.layers:
        assert isinstance(layer, OlmoeDecoderLayer)
        for part in compute_parts(layer):
            part.forward = torch.compile(part.forward)
        experts = layer.mlp.experts
        experts.gated, experts.gated_backward = torch.compile(gated), torch.compile(gated_backward)
    model.lm_head.log_probs = torch.compile(target_log_probs)


def compute_parts(layer: OlmoeDecoderLayer) -> list[torch.nn.Module]:
    """The modules of a layer that compute; what is between them decides about routing and communicates."""
    return [layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm]
