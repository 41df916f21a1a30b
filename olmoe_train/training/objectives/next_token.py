"""Next-token prediction: cross-entropy, plus the router's losses.

Shapes: B batch, S sequence, L layers, E experts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.balancing import AuxiliaryLossConfig, BalancingConfig
from olmoe_train.config.choices import BalanceScope
from olmoe_train.config.train import LossConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.losses import expert_counts, router_losses
from olmoe_train.model.outputs import TrainingOutput
from olmoe_train.training.batch import Batch, Totals, to_device


def count_experts(
    cfg: LossConfig,
    balancing: BalancingConfig,
    model: OlmoeForCausalLM,
    micro_batches: list[Batch],
    device: torch.device,
    logged: bool,
) -> Tensor | None:
    """Tokens per layer and expert [L, E] over the step's global batch, where they are needed before its
    backward.

    With balancing.scope=global_batch the gradient of the first micro-batch depends on the routing of the
    last one, so several micro-batches take a forward pass more; where the loss has no weight, only when its
    value is logged. None: step_losses can do with the micro-batch it is given.
    """
    needed = model.config.num_experts > 1 and (cfg.router_aux_loss_coef != 0 or logged)
    assert isinstance(balancing, AuxiliaryLossConfig)
    if balancing.scope is BalanceScope.micro_batch or len(micro_batches) == 1 or not needed:
        return None
    counts_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, device=device)
    with torch.no_grad():
        for batch in micro_batches:
            inputs = to_device(batch, device)
            del inputs["labels"]
            mask = inputs.get("attention_mask")
            output = model.training_forward(labels=None, **inputs)
            mask = None if mask is None else mask.reshape(-1).float()
            counts_LE += expert_counts(output.expert_indices, model.config.num_experts, mask)
    dist.all_reduce(counts_LE)
    return counts_LE


@dataclass(frozen=True)
class Losses:
    """This micro-batch's shares, fp32 scalars: summed over micro-batches and ranks they are the step's
    losses."""

    total: Tensor
    ce_loss: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    counts_LE: Tensor
    """Tokens of this micro-batch that each layer sent to each expert."""


def step_losses(
    cfg: LossConfig,
    balancing: BalancingConfig,
    model: OlmoeForCausalLM,
    output: TrainingOutput,
    attention_mask: Tensor | None,
    totals: Totals,
    total_counts_LE: Tensor | None,
) -> Losses:
    """total = CE + router_aux_loss_coef x LB + router_z_loss_coef x Z, each normalised by the global
    batch's counts. A dense model's (one expert) is CE alone."""
    assert isinstance(balancing, AuxiliaryLossConfig)
    experts = model.config.num_experts
    mask = None if attention_mask is None else attention_mask.reshape(-1).float()
    counts_LE = expert_counts(output.expert_indices, experts, mask)
    if experts == 1:
        total_counts_LE = totals.tokens.expand_as(counts_LE)
    elif total_counts_LE is None and balancing.scope is BalanceScope.global_batch:
        total_counts_LE = counts_LE.clone()
        dist.all_reduce(total_counts_LE)
    balance, z_loss = router_losses(
        output.router_logits,
        output.expert_indices,
        experts,
        mask,
        cfg.convention,
        totals.tokens,
        total_counts_LE,
    )
    total = ce_loss = output.ce_sum / totals.targets
    if experts > 1:  # with one, LB is constant, and Z would pull at the hidden states for nothing
        total = ce_loss + cfg.router_aux_loss_coef * balance + cfg.router_z_loss_coef * z_loss
    return Losses(total, ce_loss, balance, z_loss, counts_LE)
