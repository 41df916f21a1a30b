"""Activation checkpointing: backward recomputes activations instead of keeping them in memory.

full        recomputes each decoder layer from the layer's input and routing.
selective   recomputes norms and attention. Each is recomputed from its input and the saved results of its
            matrix products, which are most of its arithmetic. Experts are not recomputed, because they save
            little in any case (model/moe/experts.py). Routing is not recomputed either.

Recomputation must send every token to the same experts as the first pass. Recomputing the routing would not
guarantee the same experts: a kernel that sums in a different order can flip a near-tie between two experts.
The routing of the first pass is therefore recorded and replayed.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from olmoe_train.config.choices import ActivationCheckpointing
from olmoe_train.distributed.compile import compute_parts
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.moe.experts import Routing

# Operators whose results selective checkpointing saves, by name: the last one exists only after an import
# that takes a second (model/attention.py).
_MATRIX_PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)


def checkpoint_activations(model: OlmoeForCausalLM, mode: ActivationCheckpointing) -> None:
    """Replace the forward methods of the model's modules by methods that recompute activations, in place.

    The replacement is a method of each instance, not a wrapper module. Parameter names therefore stay the
    same, and the FSDP hooks of a module run outside the recomputation.

    Args:
        model: The model, before FSDP2 is applied.
        mode: none, selective or full; see the module docstring.
    """
    # Random numbers are drawn by dropout, of attention and of an adapter's inputs, and by a router's jitter.
    noise = model.config.attention_dropout + (model.adapter.dropout if model.adapter is not None else 0.0)
    noise += model.decoder_layers[0].mlp.gate.jitter
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=noise > 0)
    for layer in model.decoder_layers:
        if mode is ActivationCheckpointing.full:
            layer.forward = partial(  # type: ignore[method-assign]
                recompute, layer.forward, context_fn=partial(_contexts, layer.mlp)
            )
        elif mode is ActivationCheckpointing.selective:
            for part in compute_parts(layer):
                part.forward = partial(recompute, part.forward, context_fn=_keep_matrix_products)


def _keep_matrix_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator.name() in _MATRIX_PRODUCTS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _contexts(
    block: OlmoeSparseMoeBlock,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of one forward pass and of its recomputation.

    The first context records the routing, and the second context replays the recorded routing.
    """
    first: list[tuple[Tensor, Routing]] = []
    return _record(block, first), _replay(block, first)


@contextmanager
def _record(block: OlmoeSparseMoeBlock, first: list[tuple[Tensor, Routing]]) -> Iterator[None]:
    dispatch, choose = block.dispatch, block.gate.select_experts
    choices: list[Tensor] = []

    def recorded_choice(scores: Tensor, number: int) -> Tensor:
        choices.append(choose(scores, number))
        return choices[-1]

    def recorded(
        x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Routing]:
        x_ND, weights_NJ, routing = dispatch(x_TD, weights_TK, indices_TK, num_experts)
        first.append((choices.pop(), routing))
        return x_ND, weights_NJ, routing

    block.dispatch, block.gate.select_experts = recorded, recorded_choice
    try:
        yield
    finally:
        block.dispatch, block.gate.select_experts = dispatch, choose


@contextmanager
def _replay(block: OlmoeSparseMoeBlock, first: list[tuple[Tensor, Routing]]) -> Iterator[None]:
    dispatch, choose = block.dispatch, block.gate.select_experts
    ((choice, routing),) = first
    block.gate.select_experts = lambda scores, number: choice
    block.dispatch = partial(dispatch, routing=routing)
    try:
        yield
    finally:
        block.dispatch, block.gate.select_experts = dispatch, choose
