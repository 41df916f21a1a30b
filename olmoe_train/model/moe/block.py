"""The mixture-of-experts block: router, dispatch, experts, combine.

Shapes: B batch, S sequence, T tokens (B x S), D hidden, E experts, K top-k, N inputs of this rank's experts,
J experts per input.

Routing is dropless token choice (arXiv 2409.02060, section 2): the router takes a softmax over all experts,
and the K largest probabilities weight the outputs of their experts. Tokens are sorted by expert once; each
expert then multiplies one contiguous block of rows (experts.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from olmoe_train.model.activations import ACTIVATIONS
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.experts import OlmoeExperts, Routing, sort_by_expert
from olmoe_train.model.moe.router_stats import RouterStats, router_stats

Dispatch = Callable[..., tuple[Tensor, Tensor | None, Routing]]
Combine = Callable[[Tensor, Tensor, Routing], Tensor]
Scores = Callable[[Tensor], Tensor]
Choose = Callable[[Tensor, int], Tensor]


def dispatch_local(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_indices_TK: Tensor,
    num_experts: int,
    routing: Routing | None = None,
) -> tuple[Tensor, Tensor | None, Routing]:
    """Dispatch without communication, for a rank that holds all experts: the inputs are the tokens (N = T).

    Args:
        x_TD: Tokens.
        weights_TK: Routing weights.
        expert_indices_TK: int64, the experts of each token.
        num_experts: E.
        routing: Routing of an earlier pass over the same tokens, to be reused; None computes the routing.

    Returns:
        (inputs of this rank's experts [N, D], their weights [N, J], routing).
    """
    return x_TD, weights_TK, routing or sort_by_expert(expert_indices_TK, num_experts)


def combine_local(out_TD: Tensor, weights_TK: Tensor, routing: Routing) -> Tensor:
    """Combine without communication: return `out_TD`, which the experts have already weighted and summed."""
    return out_TD


def probabilities(probs_TE: Tensor) -> Tensor:
    """Score the experts of each token by their probability."""
    return probs_TE


def choose_top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k` experts with the highest scores per token.

    Returns:
        expert_indices_TK, int64, in descending order of score.
    """
    return scores_TE.topk(top_k, dim=-1).indices


class _RouterLogits(torch.autograd.Function):
    """x @ weight.T in fp32.

    The function saves x in its original dtype, a tensor that the experts save in any case. Without a custom
    function, autograd would save an fp32 copy of x: 4 D bytes per token.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_logits_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors  # type: ignore[attr-defined]
        d_x_TD = (d_logits_TE @ weight_ED.float()).to(x_TD.dtype)
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]  # the router is frozen
            return d_x_TD, None
        return d_x_TD, (d_logits_TE.t() @ x_TD.float()).to(weight_ED.dtype)


class OlmoeTopKRouter(nn.Module):
    """Token-choice router, computed in fp32.

    `scores` is an attribute so that a balancer can replace what top-k sees (balancing.py); the weights stay
    the probabilities. `select_experts` is an attribute so that activation checkpointing can replace the
    function and replay the choice of the first pass. `temperature` divides the logits. `jitter` is the
    largest relative change of the router's input by noise, in training mode only (Switch Transformer, arXiv
    2101.03961): every feature is multiplied by a number from [1 - jitter, 1 + jitter].
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scores: Scores = probabilities
        self.select_experts: Choose = choose_top_k
        self.temperature, self.jitter = 1.0, 0.0
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def probabilities(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits_TE and their softmax over the experts, both fp32."""
        logits_TE = _RouterLogits.apply(self._with_noise(x_TD), self.weight)
        if self.temperature != 1.0:
            logits_TE = logits_TE / self.temperature
        return logits_TE, logits_TE.softmax(-1)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route T tokens.

        Args:
            x_TD: Tokens, any float dtype.

        Returns:
            (logits_TE fp32, probs_TE fp32, weights_TK fp32, expert_indices_TK int64).
        """
        logits_TE, probs_TE = self.probabilities(x_TD)
        indices_TK = self.select_experts(self.scores(probs_TE.detach()), self.top_k)
        weights_TK = probs_TE.gather(1, indices_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, probs_TE, weights_TK, indices_TK

    def _with_noise(self, x_TD: Tensor) -> Tensor:
        """The router's input of a training pass. The noise is fp32: bf16 has steps of 0.8% at 1."""
        if not (self.training and self.jitter):
            return x_TD
        noise_TD = torch.empty_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        return x_TD * noise_TD.uniform_(1 - self.jitter, 1 + self.jitter)


class SharedExperts(nn.Module):
    """Experts that process every token, without a routing weight: down(act(gate(x)) * up(x)).

    The sum of several gated MLPs is one whose width is the sum of theirs, so they are one MLP.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.shared_width
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_TD: Tensor) -> Tensor:
        """x_TD of any floating-point dtype; the result has the same shape."""
        out_TD: Tensor = self.down_proj(self.activation(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return out_TD


class OlmoeSparseMoeBlock(nn.Module):
    """Router and experts, and shared experts if `num_shared_experts` asks for them.

    `dispatch` and `combine` are attributes so that distributed/expert_parallel.py can replace them by the
    functions that exchange tokens between ranks. `per_sequence`: whether the router's sums have those of each
    sequence, which a balancer asks for.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = OlmoeTopKRouter(config)
        self.experts = OlmoeExperts(config)
        self.shared_experts = SharedExperts(config) if config.num_shared_experts else None
        self.dispatch: Dispatch = dispatch_local
        self.combine: Combine = combine_local
        self.per_sequence = False

    def forward(
        self,
        x_BSD: Tensor,
        token_mask_T: Tensor | None = None,
        output_router_stats: bool = False,
        output_router_logits: bool = False,
    ) -> tuple[Tensor, RouterStats | None, Tensor | None]:
        """Route the tokens, run the experts and combine their outputs.

        Args:
            x_BSD: Output of the norm before the block.
            token_mask_T: fp32, 0 at padding, which the router's sums leave out; None counts every token.
            output_router_stats: Whether to return the router's sums.
            output_router_logits: Whether to return the router logits.

        Returns:
            (output [B, S, D], sums or None, router logits_TE fp32 or None).
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        logits_TE, probs_TE, weights_TK, indices_TK = self.gate(x_TD)
        stats = None
        if output_router_stats:
            sequences = len(x_BSD) if self.per_sequence else None
            stats = router_stats(logits_TE, probs_TE, indices_TK, token_mask_T, sequences)
        x_ND, weights_NJ, routing = self.dispatch(x_TD, weights_TK, indices_TK, self.num_experts)
        out_ND = self.experts(x_ND, weights_NJ, routing)
        out_TD = self.combine(out_ND, weights_TK, routing)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.view_as(x_BSD), stats, logits_TE if output_router_logits else None
