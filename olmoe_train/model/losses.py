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
"""

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

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
    """Both router losses of T tokens, or the share of these tokens in the losses of a larger batch.

    Args:
        router_logits: One [T, E] tensor per layer, any float dtype.
        expert_indices: One [T, K] int64 tensor per layer, the experts that processed the tokens.
        num_experts: E.
        attention_mask: [B, S] or [T], 0 at padding.
        convention: See the module docstring.
        total_tokens: Unpadded tokens of the whole batch, a scalar; None if the T tokens are the whole batch.
            The shares of all parts sum to the losses of the batch.
        total_counts_LE: Tokens per layer and expert in the whole batch; no gradient flows through counts.
            None uses the counts of the T tokens; the load-balancing loss of the batch is then the
            token-weighted mean of the losses of its parts.

    Returns:
        (load-balancing loss, z-loss), fp32 scalars without their weights (fp64 for fp64 logits).

    Raises:
        ValueError: Unknown convention, or a mask that does not have T entries.
    """
    name = convention.value if isinstance(convention, Enum) else convention
    if name not in CONVENTIONS:
        raise ValueError(f"convention={name!r}: must be one of {', '.join(CONVENTIONS)}")
    layers, top_k = len(router_logits), expert_indices[0].shape[-1]
    mask_T = (
        None
        if attention_mask is None
        else attention_mask.reshape(-1).to(router_logits[0].device, torch.float32)
    )
    if mask_T is not None and mask_T.numel() != router_logits[0].shape[0]:
        raise ValueError(
            f"attention_mask has {mask_T.numel()} tokens, router_logits {router_logits[0].shape[0]}"
        )
    own_tokens = (
        mask_T.sum() if mask_T is not None else router_logits[0].new_tensor(router_logits[0].shape[0])
    )
    own_tokens = own_tokens.float().clamp(min=1)
    tokens = own_tokens if total_tokens is None else total_tokens.float()

    probability_sums, squared_lse = [], []
    for logits in router_logits:
        logits_TE = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probs_TE, lse_T = logits_TE.softmax(-1), logits_TE.logsumexp(-1)
        probability_sums.append(probs_TE.sum(0) if mask_T is None else mask_T @ probs_TE)
        squared_lse.append(lse_T.square().sum() if mask_T is None else (mask_T * lse_T.square()).sum())
    probs_LE = torch.stack(probability_sums) / tokens
    z_loss = torch.stack(squared_lse).sum() / (layers * tokens)

    # Fraction of the counted tokens that each expert receives. The fractions sum to K over the experts.
    if total_counts_LE is None:
        load_LE = expert_counts(expert_indices, num_experts, mask_T) / own_tokens
    else:
        load_LE = total_counts_LE / tokens

    if name == "hf":
        return num_experts * (load_LE.mean(0) * probs_LE).sum() / layers, z_loss
    balance = num_experts / top_k * (load_LE * probs_LE).sum() / layers
    if name == "megatron":
        return balance * layers, z_loss * layers
    return balance, z_loss / top_k if name == "olmoe_0924" else z_loss


def expert_counts(expert_indices: Sequence[Tensor], num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Count the tokens per layer and expert.

    Args:
        expert_indices: One [T, K] int64 tensor per layer.
        num_experts: E.
        mask_T: 0 at padding; None counts every token.

    Returns:
        fp32 [L, E] without gradient, exact up to 2^24 tokens per expert.
    """
    counts = []
    for indices_TK in expert_indices:
        weight_TK = torch.ones(1, device=indices_TK.device) if mask_T is None else mask_T[:, None]
        # scatter_add, not bincount: on CUDA, bincount copies the maximum index to the host.
        zeros_E = torch.zeros(num_experts, device=indices_TK.device)
        counts.append(
            zeros_E.scatter_add_(0, indices_TK.reshape(-1), weight_TK.expand(indices_TK.shape).reshape(-1))
        )
    return torch.stack(counts)


def router_entropy(router_logits: Sequence[Tensor], mask_T: Tensor | None = None) -> Tensor:
    """Entropy of the routing distribution, summed over unpadded tokens.

    Args:
        router_logits: One [T, E] tensor per layer.
        mask_T: 0 at padding; None counts every token.

    Returns:
        [L] in nats, in the dtype of the logits (fp32 in this model). Uniform routing gives ln(E) per token.
    """
    entropies = []
    for logits_TE in router_logits:
        log_probs_TE = logits_TE.log_softmax(-1)
        entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(-1)
        entropies.append(entropy_T.sum() if mask_T is None else (entropy_T * mask_T.to(entropy_T)).sum())
    return torch.stack(entropies)
