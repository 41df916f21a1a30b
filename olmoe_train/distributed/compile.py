"""torch.compile for the parts of the model that become faster.

This module imports only the model, so that benchmarks can use the module without the trainer.
"""

import torch

from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import target_log_probs
from olmoe_train.model.decoder_layer import OlmoeDecoderLayer
from olmoe_train.model.moe.experts import gated, gated_backward


def compile_layers(model: OlmoeForCausalLM) -> None:
    """Compile the elementwise operations of each layer and of the head, in place.

    All layers share one compilation. Norms and attention are compiled as modules, and backward recomputes
    each of them as a whole. Experts and head have custom gradients; only the operations between their matrix
    products are compiled.

    The layer as a whole is not compiled, for two reasons: activation checkpointing must see the routing, and
    values that depend on the host (the sizes of the all-to-all) would break the graph.
    """
    for layer in model.decoder_layers:
        for part in compute_parts(layer):
            part.forward = torch.compile(part.forward)
        experts = layer.mlp.experts
        experts.gated, experts.gated_backward = torch.compile(gated), torch.compile(gated_backward)
    model.lm_head.log_probs = torch.compile(target_log_probs)


def compute_parts(layer: OlmoeDecoderLayer) -> list[torch.nn.Module]:
    """Modules of a layer that only compute. The rest of the layer routes tokens and communicates."""
    return [layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm]
