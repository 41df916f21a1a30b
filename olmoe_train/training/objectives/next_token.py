"""Next-token prediction: cross-entropy, plus the router's losses.

Shapes: B batch, S sequence, T tokens (B x S), L layers, E experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.balancing import AuxiliaryLossConfig, BalancingConfig
from olmoe_train.config.choices import BalanceScope
from olmoe_train.config.train import LossConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.losses import expert_counts, router_entropy, router_losses
from olmoe_train.training.batch import Batch, Totals
from olmoe_train.training.objectives.base import RouterSums


class NextToken:
    """loss = CE + router_aux_loss_coef x LB + router_z_loss_coef x Z, divided by the global batch's counts.

    The loss of a dense model (one expert) is CE only.
    """

    columns: tuple[str, ...] = ("input_ids", "labels")

    def __init__(
        self, loss: LossConfig, balancing: BalancingConfig, config: OlmoeConfig, device: torch.device
    ) -> None:
        assert isinstance(balancing, AuxiliaryLossConfig)
        self.cfg, self.scope, self.device = loss, balancing.scope, device
        self.layers, self.experts = config.num_hidden_layers, config.num_experts
        self.router = RouterSums.zeros(self.layers, self.experts, device)
        self._with_entropy = False
        self._global_counts_LE: Tensor | None = None

    def begin_step(
        self, model: OlmoeForCausalLM, micro_batches: list[Batch], totals: Totals, logged: bool
    ) -> None:
        self.router = RouterSums.zeros(self.layers, self.experts, self.device)
        self._with_entropy = logged
        self._global_counts_LE = None
        # Without a weight the load-balancing loss is only shown, and only on steps that are logged.
        shown = self.experts > 1 and (self.cfg.router_aux_loss_coef != 0 or logged)
        if self.scope is BalanceScope.global_batch and len(micro_batches) > 1 and shown:
            self._global_counts_LE = self._count_global_expert_load(model, micro_batches)

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = model.training_forward(**micro_batch)
        mask_T = _mask(micro_batch)
        counts_LE = expert_counts(output.expert_indices, self.experts, mask_T)
        balance, z_loss = router_losses(
            output.router_logits,
            output.expert_indices,
            self.experts,
            mask_T,
            self.cfg.convention,
            totals.num_tokens,
            self._counts_of_scope(counts_LE, totals),
        )
        loss = ce_loss = output.ce_sum / totals.num_targets
        if self.experts > 1:  # with one expert LB is constant, and Z would pull at the hidden states
            loss = ce_loss + self.cfg.router_aux_loss_coef * balance + self.cfg.router_z_loss_coef * z_loss
        with torch.no_grad():
            self.router.counts_LE += counts_LE
            if self._with_entropy:
                entropy_L = router_entropy(output.router_logits, mask_T)
                self.router.entropy_L += entropy_L / totals.num_tokens
        return loss, {"ce_loss": ce_loss, "load_balancing_loss": balance, "router_z_loss": z_loss}

    def end_step(self, model: OlmoeForCausalLM, totals: Totals) -> None:
        """Nothing: auxiliary losses keep no state."""

    def _counts_of_scope(self, counts_LE: Tensor, totals: Totals) -> Tensor | None:
        """Tokens per layer and expert of the batch that the load-balancing loss is about; None: of the
        micro-batch."""
        if self.experts == 1:
            return totals.num_tokens.expand_as(counts_LE)
        if self._global_counts_LE is None and self.scope is BalanceScope.global_batch:
            total_LE = counts_LE.clone()
            dist.all_reduce(total_LE)
            return total_LE
        return self._global_counts_LE

    def _count_global_expert_load(self, model: OlmoeForCausalLM, micro_batches: list[Batch]) -> Tensor:
        """Tokens of the whole step that each layer sends to each expert, [L, E]; collective.

        With balancing.scope=global_batch the gradient of the first micro-batch depends on where the last one
        is routed, so a step of several micro-batches needs one more forward pass per micro-batch.
        """
        counts_LE = torch.zeros(self.layers, self.experts, device=self.device)
        with torch.no_grad():
            for batch in micro_batches:
                inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
                output = model.training_forward(labels=None, **inputs)
                counts_LE += expert_counts(output.expert_indices, self.experts, _mask(batch))
        dist.all_reduce(counts_LE)
        return counts_LE


def _mask(batch: Batch) -> Tensor | None:
    """fp32 [T], 0 at padding; None where the batch has none."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.reshape(-1).float()
