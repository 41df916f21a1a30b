"""The options of `balancing`, which keeps the load of the experts even: one dataclass per method.

The weights of the router losses and their convention are in `loss`.
"""

from dataclasses import dataclass

from olmoe_train.config.choices import BalanceScope
from olmoe_train.config.variants import VariantConfig, register_variant


@dataclass(frozen=True)
class BalancingConfig(VariantConfig):
    """What every balancing method has: options of the routers themselves."""

    router_jitter: float = 0.0
    """Noise on the input of the routers in training: each feature is multiplied by a number drawn from [1 -
    router_jitter, 1 + router_jitter]. 0: off. The draws depend on the seed, the step and the rank, as those
    of dropout do. Takes 8 bytes per token, feature and layer."""
    router_temperature: float = 1.0
    """Divisor of the routers' logits before the softmax, in training and evaluation. Above 1, routing is more
    even. Exports have it in the weights of the routers, rounded once; a power of 2 is exact."""

    def errors(self) -> list[str]:
        wrong = []
        if not 0 <= self.router_jitter < 1:
            wrong.append(f"balancing.router_jitter={self.router_jitter}: must be at least 0 and below 1")
        if not 0 < self.router_temperature < float("inf"):
            wrong.append(f"balancing.router_temperature={self.router_temperature}: must be positive")
        return super().errors() + wrong


@dataclass(frozen=True)
class AuxiliaryLossConfig(BalancingConfig):
    """The load-balancing loss, with weight loss.router_aux_loss_coef."""

    name: str = "aux"
    scope: BalanceScope = BalanceScope.global_batch
    """Tokens whose expert counts enter the load-balancing loss. micro_batch: those of one forward pass of one
    rank (as in the paper's run). all_ranks: those of one forward pass of all ranks. running: those of the
    step's forward passes so far, of all ranks. global_batch: those of the whole step, so that the loss does
    not depend on how the step is divided; a step of several micro-batches then needs one more forward pass
    per micro-batch."""


@dataclass(frozen=True)
class LossFreeConfig(BalancingConfig):
    """A bias per expert in the choice of experts, moved after each step, in place of a balancing loss."""

    name: str = "loss_free"
    bias_update_rate: float = 0.001
    """Change of an expert's bias per step, in units of probability: up if the expert had fewer tokens than
    the mean, down if it had more."""
    sequence_coef: float = 0.0
    """Weight of a sequence-wise balancing loss beside the bias, as in DeepSeek-V3; see balancing=sequence. 0:
    none."""

    def errors(self) -> list[str]:
        values = {"bias_update_rate": self.bias_update_rate, "sequence_coef": self.sequence_coef}
        wrong = [
            f"balancing.{key}={value}: must not be negative" for key, value in values.items() if value < 0
        ]
        return super().errors() + wrong


@dataclass(frozen=True)
class SequenceLossConfig(BalancingConfig):
    """The sequence-wise load-balancing loss, with weight loss.router_aux_loss_coef: the load of each sequence
    by itself is kept even."""

    name: str = "sequence"


@dataclass(frozen=True)
class NoBalancingConfig(BalancingConfig):
    """No balancing. The router z-loss keeps its weight, loss.router_z_loss_coef."""

    name: str = "none"


register_variant("balancing", AuxiliaryLossConfig, older_names=("auxiliary_loss",))
register_variant("balancing", LossFreeConfig)
register_variant("balancing", SequenceLossConfig)
register_variant("balancing", NoBalancingConfig)
