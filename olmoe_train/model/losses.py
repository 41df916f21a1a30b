"""Load-balancing loss and router z-loss, with their normalization stated.

Shapes: T tokens, E experts, K top-k, L layers.

The two router losses come in declared conventions (`Convention` in choices.py). With c_le the number of
tokens that layer l sends to expert e, and p_le the mean softmax probability of expert e, over T unpadded
tokens:

  olmoe       LB = mean_l  E/(T K) sum_e c_le p_le  (1.0 at balance);  Z = mean over layers and tokens of
              logsumexp(logits)^2. arXiv 2409.02060, section 2 and appendix B; weights 0.01 and 0.001.
  olmoe_0924  as the released model was trained: Z also divided by K (effective weight 1.25e-4 at K = 8).
  hf          LB = E sum_e (mean_l c_le / T) (mean_l p_le): transformers' load_balancing_loss_func, which
              pools the layers: it reads K at balance, but also when each layer collapses onto experts of its
              own. Z as olmoe.
  megatron    both summed over the layers instead of averaged.
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
    """Load-balancing loss of the tokens given, an fp32 scalar, unweighted.

    router_logits: one [T, E] tensor a layer, any float dtype. attention_mask: [B, S] or [T], 0 at padding,
    which then counts for nothing. convention: see the top of this file. ValueError for an unknown convention
    or wrong shapes.
    """
    indices = [logits.float().softmax(-1).topk(top_k, dim=-1).indices for logits in router_logits]
    return router_losses(router_logits, indices, num_experts, attention_mask, convention)[0]


def router_z_loss(
    router_logits: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    convention: str | Enum = "olmoe",
    top_k: int = 1,
) -> Tensor:
    """Mean over layers and unpadded tokens of logsumexp(logits)^2, an fp32 scalar, unweighted (ST-MoE, arXiv
    2202.08906).

    `top_k` matters to the convention olmoe_0924 alone, which divides by it.
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
    """(load-balancing loss, z-loss) of these tokens, or their share of a larger batch's.

    router_logits: [T, E] a layer. expert_indices: [T, K] int64 a layer, where the tokens really went.
    total_tokens: unpadded tokens of the whole batch of which these are a part; the shares of all parts then
    sum to the batch's losses. total_counts_LE: tokens a layer sent to each expert in the whole batch (no
    gradient flows through counts); None takes these tokens' own, so that the batch's loss is the
    token-weighted mean of its parts' losses.
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

    # Tokens per expert as a share of the tokens counted: sums to K over the experts.
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
    """Tokens that each layer sends to each expert: fp32 [L, E] (exact to 2^24 tokens an expert), no gradient.

    expert_indices: [T, K] int64 a layer. mask_T: [T], 0 at padding.
    """
    counts = []
    for indices_TK in expert_indices:
        weight_TK = torch.ones(1, device=indices_TK.device) if mask_T is None else mask_T[:, None]
        # scatter_add rather than bincount: bincount reads its maximum back to the host on CUDA.
        zeros_E = torch.zeros(num_experts, device=indices_TK.device)
        counts.append(
            zeros_E.scatter_add_(0, indices_TK.reshape(-1), weight_TK.expand(indices_TK.shape).reshape(-1))
        )
    return torch.stack(counts)


def router_entropy(router_logits: Sequence[Tensor], mask_T: Tensor | None = None) -> Tensor:
    """Entropy of the routing distribution, summed over unpadded tokens: fp32 [L], in nats.

    ln(E) per token is uniform routing. router_logits: [T, E] per layer. mask_T: [T], 0 at padding.
    """
    entropies = []
    for logits_TE in router_logits:
        log_probs_TE = logits_TE.log_softmax(-1)
        entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(-1)
        entropies.append(entropy_T.sum() if mask_T is None else (entropy_T * mask_T.to(entropy_T)).sum())
    return torch.stack(entropies)
