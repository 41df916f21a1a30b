"""Activation checkpointing: what backward recomputes instead of keeping it.

full        each decoder layer, from its input and its routing.
selective   norms and attention, each from its input and the results of its matrix products, most of its
            arithmetic. Experts keep little in any case (model/moe/experts.py); routing is not run again.

Recomputation has to send every token where the first pass sent it. It would not do so by itself: a kernel
that sums in another order breaks a near-tie of two experts the other way.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from olmoe_train.config.choices import ActivationCheckpointing
from olmoe_train.distributed.compile import compute_parts
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.moe.experts import Routing
from olmoe_train.model.transformer import OlmoeDecoderLayer

_aten = torch.ops.aten
_MATRIX_PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    }
)


def checkpoint_activations(model: OlmoeForCausalLM, mode: ActivationCheckpointing) -> None:
    """Replace forward methods by recomputing ones, in place.

    The instances' methods, without wrapper modules: names stay as they are, and a module's FSDP hooks stay
    outside of its recomputation.
    """
    # Random numbers are drawn by attention dropout alone.
    recompute = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=model.config.attention_dropout > 0
    )
    for layer in model.model.layers:
        assert isinstance(layer, OlmoeDecoderLayer)
        if mode is ActivationCheckpointing.full:
            layer.forward = partial(  # type: ignore[method-assign]
                recompute, layer.forward, context_fn=partial(_contexts, layer.mlp)
            )
        elif mode is ActivationCheckpointing.selective:
            for part in compute_parts(layer):
                part.forward = partial(recompute, part.forward, context_fn=_keep_matrix_products)


def _keep_matrix_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in _MATRIX_PRODUCTS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _contexts(
    block: OlmoeSparseMoeBlock,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for one forward pass of a layer and for its recomputation, which routes as the first did."""
    first: list[tuple[Tensor, Routing]] = []
    return _record(block, first), _replay(block, first)


@contextmanager
def _record(block: OlmoeSparseMoeBlock, first: list[tuple[Tensor, Routing]]) -> Iterator[None]:
    dispatch = block.dispatch

    def recorded(
        x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Routing]:
        x_ND, weights_NJ, routing = dispatch(x_TD, weights_TK, indices_TK, num_experts)
        first.append((indices_TK, routing))
        return x_ND, weights_NJ, routing

    block.dispatch = recorded
    try:
        yield
    finally:
        block.dispatch = dispatch


@contextmanager
def _replay(block: OlmoeSparseMoeBlock, first: list[tuple[Tensor, Routing]]) -> Iterator[None]:
    dispatch, choose = block.dispatch, block.gate.choose
    ((indices_TK, routing),) = first
    block.gate.choose = lambda probs_TE, top_k: indices_TK
    block.dispatch = partial(dispatch, routing=routing)
    try:
        yield
    finally:
        block.dispatch, block.gate.choose = dispatch, choose
