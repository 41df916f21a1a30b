"""The options of `balancing`, which keeps the load of the experts even: one dataclass per method.

The weights of the router losses and their convention are in `loss`.
"""

from dataclasses import dataclass

from olmoe_train.config.choices import BalanceScope
from olmoe_train.config.variants import VariantConfig, register_variant


@dataclass(frozen=True)
class BalancingConfig(VariantConfig):
    """What every balancing method has."""


@dataclass(frozen=True)
class AuxiliaryLossConfig(BalancingConfig):
    """The load-balancing loss, with weight loss.router_aux_loss_coef."""

    name: str = "auxiliary_loss"
    scope: BalanceScope = BalanceScope.global_batch
    """Tokens whose expert counts enter the load-balancing loss. micro_batch: those of one forward pass of one
    rank (as in the paper's run). global_batch: those of the whole step, so that the loss does not depend on
    how the step is divided; a step of several micro-batches then needs one more forward pass per
    micro-batch."""


register_variant("balancing", AuxiliaryLossConfig)
