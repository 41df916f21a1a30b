"""The mixture-of-experts block: router, dispatch, experts, combine.

Shapes: B batch, S sequence, T tokens (B x S), D hidden, E experts, K top-k, N inputs of this rank's experts.

Dropless token-choice routing (arXiv 2409.02060, section 2): softmax over all experts, the K largest
probabilities weigh their experts' outputs. Tokens are sorted by expert once; each expert then multiplies one
contiguous block of rows (experts.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.experts import OlmoeExperts, Routing, sort_by_expert

Dispatch = Callable[..., tuple[Tensor, Tensor | None, Routing]]
Combine = Callable[[Tensor, Tensor, Routing], Tensor]
Choose = Callable[[Tensor, int], Tensor]


def dispatch_local(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_indices_TK: Tensor,
    num_experts: int,
    routing: Routing | None = None,
) -> tuple[Tensor, Tensor | None, Routing]:
    """(inputs of this rank's experts, their weights, routing): all experts being here, the tokens themselves.

    routing: of an earlier pass of the same tokens, to go the same way again.
    """
    return x_TD, weights_TK, routing or sort_by_expert(expert_indices_TK, num_experts)


def combine_local(out_TD: Tensor, weights_TK: Tensor, routing: Routing) -> Tensor:
    """out_TD: the experts have weighed and summed what is here."""
    return out_TD


def choose_top_k(probs_TE: Tensor, top_k: int) -> Tensor:
    """expert_indices_TK int64: each token's most probable experts, the first one first."""
    return probs_TE.topk(top_k, dim=-1).indices


class _RouterLogits(torch.autograd.Function):
    """x @ weight.T in fp32. Keeps x as it came, which the experts keep anyway; autograd's own would keep an
    fp32 copy, 4 D bytes a token."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors  # type: ignore[attr-defined]
        d_x_TD = (d_logits_TE @ weight_ED.float()).to(x_TD.dtype)
        return d_x_TD, (d_logits_TE.t() @ x_TD.float()).to(weight_ED.dtype)


class OlmoeTopKRouter(nn.Module):
    """Token-choice router; all of it in fp32. `choose` is a plain function; activation checkpointing replays
    what it returned."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.choose: Choose = choose_top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits_TE fp32, weights_TK fp32, expert_indices_TK int64)."""
        logits_TE = _RouterLogits.apply(x_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        indices_TK = self.choose(probs_TE.detach(), self.top_k)
        weights_TK = probs_TE.gather(1, indices_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, indices_TK


class OlmoeSparseMoeBlock(nn.Module):
    """Router and experts. `dispatch` and `combine` are plain functions; distributed/parallelize.py hands in
    the expert-parallel pair."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = OlmoeTopKRouter(config)
        self.experts = OlmoeExperts(config)
        self.dispatch: Dispatch = dispatch_local
        self.combine: Combine = combine_local

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output [B, S, D], router logits_TE fp32, expert_indices_TK int64)."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        logits_TE, weights_TK, indices_TK = self.gate(x_TD)
        x_ND, weights_NJ, routing = self.dispatch(x_TD, weights_TK, indices_TK, self.num_experts)
        out_ND = self.experts(x_ND, weights_NJ, routing)
        out_TD = self.combine(out_ND, weights_TK, routing)
        return out_TD.view_as(x_BSD), logits_TE, indices_TK
