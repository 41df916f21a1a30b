"""Expert choice (arXiv 2202.09368): every expert takes the tokens of a sequence for which it has the highest
probability, and not every token its experts. The load is even by construction.

An expert takes capacity x n / E tokens of a sequence of n unpadded ones, rounded down and at least one. It
chooses within each sequence, so the result does not depend on how a batch is cut into micro-batches and
ranks. A token may have many experts or none, and which ones it has depends on the tokens after it. The model
can therefore be trained and compared (arXiv 2409.02060, section 4.1.4), but it cannot generate text.

The pairs of token and expert that are chosen go through dispatch, experts and combine as inputs with one
expert each. So every layout and every kernel treats them as it treats token choice.

Shapes: B batch, S sequence, T tokens (B x S), D hidden, E experts, C tokens that an expert takes of a
sequence, N chosen pairs (B x C x E).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock, OlmoeTopKRouter
from olmoe_train.model.moe.experts import exclusive_sum
from olmoe_train.model.moe.router_stats import RouterStats, router_stats

EARLIER_FIRST = 0.01
"""Of two tokens whose scores differ by less than this fraction, an expert may take the earlier one. In a
sequence of 4096 tokens, neighbors then differ by 2.4e-6 or more, which is above the rounding of fp32."""


def choose_tokens(scores_BSE: Tensor, tokens: int) -> Tensor:
    """Choose the `tokens` positions of each sequence that score highest for an expert.

    Returns:
        positions_BCE, int64, in descending order of score.
    """
    return scores_BSE.topk(tokens, dim=1).indices


def earlier_first(scores_BSE: Tensor, mask_BS: Tensor) -> Tensor:
    """Lower the scores by up to EARLIER_FIRST, the later a token stands in its sequence; at padding to -inf.

    Equal tokens at the beginning of a sequence have equal hidden states, because attention averages equal
    values. Their scores differ by rounding only, and without a rule rounding would choose, in each layout
    differently.

    Args:
        scores_BSE: Not negative.
        mask_BS: 1 at tokens and 0 at padding, fp32.
    """
    share_BS = (mask_BS.cumsum(1) - 1) / mask_BS.sum(1, keepdim=True).clamp(min=1)
    lowered_BSE = scores_BSE * (1 - EARLIER_FIRST * share_BS[:, :, None])
    return lowered_BSE.masked_fill(mask_BS[:, :, None] == 0, -torch.inf)


def tokens_per_expert(length: int, config: OlmoeConfig) -> int:
    """C: how many tokens of a sequence of `length` an expert takes."""
    return max(1, int(length * config.experts_per_token / config.num_experts))


class ExpertChoiceRouter(OlmoeTopKRouter):
    """Expert-choice router, computed in fp32. `select_experts` chooses tokens here (`choose_tokens`)."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.config = config
        self.select_experts = choose_tokens

    def forward(
        self, x_TD: Tensor, sequences: int = 1, token_mask_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route the tokens of B sequences.

        Args:
            x_TD: Tokens, any float dtype.
            sequences: B.
            token_mask_T: 0 at padding; None: there is no padding.

        Returns:
            (logits_TE fp32, probs_TE fp32, weights_BCE fp32, positions_BCE int64). A weight of 0 stands for
            no choice: an expert takes fewer tokens of a sequence that is padded.
        """
        logits_TE, probs_TE = self.probabilities(x_TD)
        probs_BSE = probs_TE.view(sequences, -1, probs_TE.shape[-1])
        scores_BSE = self.scores(probs_TE.detach()).view_as(probs_BSE)
        length = probs_BSE.shape[1]
        mask_BS = torch.ones_like(scores_BSE[:, :, 0])
        if token_mask_T is not None:
            mask_BS = token_mask_T.view(sequences, length)
        scores_BSE = earlier_first(scores_BSE, mask_BS)
        positions_BCE = self.select_experts(scores_BSE, tokens_per_expert(length, self.config))
        weights_BCE = probs_BSE.gather(1, positions_BCE)
        if token_mask_T is not None:
            weights_BCE = weights_BCE * self._is_within_capacity(mask_BS, positions_BCE.shape[1])
        return logits_TE, probs_TE, weights_BCE, positions_BCE

    def _is_within_capacity(self, mask_BS: Tensor, most: int) -> Tensor:
        """Which of the C = `most` choices of each expert a sequence of its unpadded length has, [B, C, 1]."""
        tokens_B = (mask_BS > 0).sum(1)
        capacity_B = (tokens_B.double() * self.config.experts_per_token / self.config.num_experts).long()
        chosen_B = capacity_B.clamp(min=1).minimum(tokens_B)
        return (torch.arange(most, device=mask_BS.device) < chosen_B[:, None])[:, :, None]


@dataclass(frozen=True)
class ChosenPairs:
    """The N pairs of token and expert."""

    token_N: Tensor
    """int64: the token of each pair."""
    order_N: Tensor
    """int64: the pairs sorted by token."""
    start_T: Tensor
    """int64: where the pairs of each token start in `order_N`."""


def chosen_pairs(positions_BCE: Tensor, length: int) -> ChosenPairs:
    """Sort what the experts chose by token, without a host sync. length: S."""
    sequence_B = torch.arange(len(positions_BCE), device=positions_BCE.device)
    token_N = (positions_BCE + length * sequence_B[:, None, None]).flatten()
    counts_T = torch.zeros(len(positions_BCE) * length, dtype=torch.long, device=token_N.device)
    counts_T.scatter_add_(0, token_N, torch.ones_like(token_N))
    return ChosenPairs(token_N, token_N.argsort(stable=True), exclusive_sum(counts_T))


class ExpertChoiceBlock(OlmoeSparseMoeBlock):
    """Router and experts, where the experts choose."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.gate = ExpertChoiceRouter(config)

    def forward(
        self,
        x_BSD: Tensor,
        token_mask_T: Tensor | None = None,
        output_router_stats: bool = False,
        output_router_logits: bool = False,
    ) -> tuple[Tensor, RouterStats | None, Tensor | None]:
        """As OlmoeSparseMoeBlock.forward; padding is not chosen while there are other tokens."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        logits_TE, probs_TE, weights_BCE, positions_BCE = self.gate(x_TD, len(x_BSD), token_mask_T)
        stats = None
        if output_router_stats:
            none_T0 = positions_BCE.new_empty(len(x_TD), 0)
            stats = router_stats(logits_TE, probs_TE, none_T0, token_mask_T)
            stats = stats._replace(counts_LE=_counts(weights_BCE))
        pairs = chosen_pairs(positions_BCE, x_BSD.shape[1])
        weights_N1 = weights_BCE.reshape(-1, 1)
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        expert_N1 = expert_E.expand_as(positions_BCE).reshape(-1, 1)
        x_ND = _CopyTokens.apply(x_TD, pairs)
        received, weights, routing = self.dispatch(x_ND, weights_N1, expert_N1, self.num_experts)
        out_ND = self.combine(self.experts(received, weights, routing), weights_N1, routing)
        out_TD = _SumByToken.apply(out_ND, pairs)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.view_as(x_BSD), stats, logits_TE if output_router_logits else None


def _counts(weights_BCE: Tensor) -> Tensor:
    """Tokens that each expert takes, fp32 [1, E] without gradient."""
    return torch.stack([(weights_BCE.detach() > 0).sum((0, 1)).float()])


def sum_by_token(rows_ND: Tensor, order_N: Tensor, start_T: Tensor) -> Tensor:
    """rows_ND summed for each token, [T, D]; 0 for a token that no expert chose."""
    return F.embedding_bag(order_N, rows_ND, start_T, mode="sum")


class _CopyTokens(torch.autograd.Function):
    """x_ND: the token of each pair.

    Backward gathers and sums. Autograd would scatter instead, on CUDA with atomics, whose order of summation
    changes from run to run.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, pairs: ChosenPairs) -> Tensor:
        ctx.save_for_backward(pairs.order_N, pairs.start_T)
        return x_TD.index_select(0, pairs.token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_x_ND: Tensor) -> tuple[Tensor, None]:
        return sum_by_token(d_x_ND, *ctx.saved_tensors), None  # type: ignore[attr-defined]


class _SumByToken(torch.autograd.Function):
    """out_TD: the sum of the pairs' outputs for each token."""

    @staticmethod
    def forward(ctx: FunctionCtx, out_ND: Tensor, pairs: ChosenPairs) -> Tensor:
        ctx.save_for_backward(pairs.token_N)
        return sum_by_token(out_ND, pairs.order_N, pairs.start_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out_TD: Tensor) -> tuple[Tensor, None]:
        (token_N,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return d_out_TD.index_select(0, token_N), None
