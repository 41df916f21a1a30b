"""Load-balancing loss and router z-loss, in four conventions of normalization.

Shapes: T tokens, E experts, K top-k, L layers.

`Convention` in config/choices.py names the conventions. Over T unpadded tokens, let c_le be the number of
tokens that layer l sends to expert e, and p_le the mean softmax probability of expert e in layer l. LB is the
load-balancing loss and Z the z-loss:

  olmoe       LB = mean_l  E/(T K) sum_e c_le p_le  (1.0 at balance);  Z = mean over layers and tokens of
              logsumexp(logits)^2. arXiv 2409.02060, section 2 and appendix B; weights 0.01 and 0.001.
  olmoe_0924  the convention of the released model's training: Z is also divided by K (effective weight
              1.25e-4 at K = 8).
  hf          LB = E sum_e (mean_l c_le / T) (mean_l p_le): transformers' load_balancing_loss_func. The
              function pools the layers. LB is K at balance, but LB is also K if every layer collapses onto
              a different set of experts. Z as in olmoe.
  megatron    LB and Z as in olmoe, but summed over the layers instead of averaged.

The sequence-wise loss (arXiv 2412.19437, section 2.1.2, equations 17 to 20) is LB of each sequence by itself,
averaged over the sequences with their tokens as weights. The layers are averaged or summed as for LB; hf
pools them, and has no such loss.
"""

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from olmoe_train.model.moe.router_stats import RouterStats, expert_counts, router_stats, stack_layers

__all__ = [
    "CONVENTIONS",
    "expert_counts",
    "load_balancing_loss",
    "router_losses",
    "router_losses_from_stats",
    "router_z_loss",
    "sequence_balancing_loss",
]

CONVENTIONS = ("olmoe", "olmoe_0924", "hf", "megatron")


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
    convention: str | Enum = "olmoe",
) -> Tensor:
    """Load-balancing loss of one batch, without its weight.

    Args:
        router_logits: One [T, E] tensor per layer, any float dtype.
        num_experts: E.
        top_k: K, experts per token.
        attention_mask: [B, S] or [T], 0 at padding; padding does not contribute to the loss.
        convention: See the module docstring.

    Returns:
        An fp32 scalar.

    Raises:
        ValueError: Unknown convention, or a mask that does not have T entries.
    """
    indices = [logits.float().softmax(-1).topk(top_k, dim=-1).indices for logits in router_logits]
    return router_losses(router_logits, indices, num_experts, attention_mask, convention)[0]


def router_z_loss(
    router_logits: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    convention: str | Enum = "olmoe",
    top_k: int = 1,
) -> Tensor:
    """Mean over layers and unpadded tokens of logsumexp(logits)^2, without its weight.

    Source: ST-MoE, arXiv 2202.08906.

    Args:
        router_logits: One [T, E] tensor per layer, any float dtype.
        attention_mask: [B, S] or [T], 0 at padding.
        convention: See the module docstring.
        top_k: K, experts per token; only the convention olmoe_0924 uses it, as a divisor.

    Returns:
        An fp32 scalar.

    Raises:
        ValueError: Unknown convention, or a mask that does not have T entries.
    """
    num_experts = router_logits[0].shape[-1]
    indices = [logits.new_zeros((logits.shape[0], top_k), dtype=torch.long) for logits in router_logits]
    return router_losses(router_logits, indices, num_experts, attention_mask, convention)[1]


def router_losses(
    router_logits: Sequence[Tensor],
    expert_indices: Sequence[Tensor],
    num_experts: int,
    attention_mask: Tensor | None = None,
    convention: str | Enum = "olmoe",
    total_tokens: Tensor | None = None,
    total_counts_LE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both router losses from the logits of T tokens. Training starts from RouterStats instead.

    Args:
        router_logits: One [T, E] tensor per layer, any float dtype.
        expert_indices: One [T, K] int64 tensor per layer, the experts that processed the tokens.
        num_experts: E.
        attention_mask: [B, S] or [T], 0 at padding.
        convention: See the module docstring.
        total_tokens: See router_losses_from_stats.
        total_counts_LE: See router_losses_from_stats.

    Returns:
        (load-balancing loss, z-loss), fp32 scalars without their weights (fp64 for fp64 logits).

    Raises:
        ValueError: Unknown convention, or a mask that does not have T entries.
    """
    mask_T = None
    if attention_mask is not None:
        mask_T = attention_mask.reshape(-1).to(router_logits[0].device, torch.float32)
        if mask_T.numel() != router_logits[0].shape[0]:
            raise ValueError(
                f"attention_mask has {mask_T.numel()} tokens, router_logits {router_logits[0].shape[0]}"
            )
    layers = []
    for logits, indices_TK in zip(router_logits, expert_indices, strict=True):
        assert logits.shape[-1] == num_experts
        logits_TE = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mask = None if mask_T is None else mask_T.to(logits_TE.dtype)
        layers.append(router_stats(logits_TE, logits_TE.softmax(-1), indices_TK, mask))
    top_k = expert_indices[0].shape[-1]
    return router_losses_from_stats(stack_layers(layers), top_k, convention, total_tokens, total_counts_LE)


def router_losses_from_stats(
    stats: RouterStats,
    top_k: float,
    convention: str | Enum = "olmoe",
    total_tokens: Tensor | None = None,
    total_counts_LE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both router losses of T tokens, or the share of these tokens in the losses of a larger batch.

    Args:
        stats: Sums over the T tokens, of every layer.
        top_k: K, experts per token.
        convention: See the module docstring.
        total_tokens: Unpadded tokens of the whole batch, a scalar; None if the T tokens are the whole batch.
            The shares of all parts sum to the losses of the batch.
        total_counts_LE: Tokens per layer and expert among the tokens whose load counts, for example those of
            the whole batch; no gradient flows through counts. None uses the counts of the T tokens; the
            load-balancing loss of the batch is then the token-weighted mean of the losses of its parts.

    Returns:
        (load-balancing loss, z-loss), fp32 scalars without their weights (fp64 for fp64 logits).

    Raises:
        ValueError: Unknown convention.
    """
    name = _name_of(convention)
    layers, num_experts = stats.counts_LE.shape
    tokens = counted_tokens(stats.counts_LE, top_k) if total_tokens is None else total_tokens.float()
    probs_LE = stats.probabilities_LE / tokens
    z_loss = stats.squared_logsumexp_L.sum() / (layers * tokens)

    # Fraction of the counted tokens that each expert receives. The fractions sum to K over the experts.
    counts_LE = stats.counts_LE if total_counts_LE is None else total_counts_LE
    load_LE = counts_LE / counted_tokens(counts_LE, top_k)

    if name == "hf":
        return num_experts * (load_LE.mean(0) * probs_LE).sum() / layers, z_loss
    balance = num_experts / top_k * (load_LE * probs_LE).sum() / layers
    if name == "megatron":
        return balance * layers, z_loss * layers
    return balance, z_loss / top_k if name == "olmoe_0924" else z_loss


def sequence_balancing_loss(
    stats: RouterStats, top_k: float, convention: str | Enum = "olmoe", total_tokens: Tensor | None = None
) -> Tensor:
    """Sequence-wise load-balancing loss of T tokens, or their share in the loss of a larger batch.

    Args:
        stats: Sums over the T tokens, of every layer, with `sequence_products_L`.
        top_k: K, experts per token.
        convention: See the module docstring.
        total_tokens: Unpadded tokens of the whole batch, a scalar; None if the T tokens are the whole batch.

    Returns:
        An fp32 scalar without its weight (fp64 for fp64 logits); 1.0 if every sequence is balanced.

    Raises:
        ValueError: Unknown convention, or hf.
    """
    name = _name_of(convention)
    if name == "hf":
        raise ValueError("convention='hf' pools the layers, and the sequence-wise loss is one per layer")
    assert stats.sequence_products_L is not None, "the routers were not asked for it"
    layers, num_experts = stats.counts_LE.shape
    tokens = counted_tokens(stats.counts_LE, top_k) if total_tokens is None else total_tokens.float()
    loss = num_experts / (top_k * tokens) * stats.sequence_products_L.sum()
    return loss if name == "megatron" else loss / layers


def counted_tokens(counts_LE: Tensor, top_k: float) -> Tensor:
    """Tokens behind the counts of a layer, at least 1: every token is counted once per chosen expert."""
    return (counts_LE[0].sum() / top_k).clamp(min=1)


def _name_of(convention: str | Enum) -> str:
    name = convention.value if isinstance(convention, Enum) else convention
    if name not in CONVENTIONS:
        raise ValueError(f"convention={name!r}: must be one of {', '.join(CONVENTIONS)}")
    return str(name)
