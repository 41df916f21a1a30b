"""The options of `optimizer`: one dataclass per optimizer."""

from dataclasses import dataclass, field

from olmoe_train.config.choices import MuonScale, Precision
from olmoe_train.config.variants import VariantConfig, register_variant
from olmoe_train.model.roles import ParameterRole

MATRICES = (ParameterRole.matrix, ParameterRole.expert_matrix)
"""Roles of the parameters whose updates Muon and NorMuon orthogonalize."""
ADAMW_STATE = ("exp_avg", "exp_avg_sq")
"""Moments of AdamW by torch's names, which checkpoints have, too."""
UPDATE_ELEMENTS = 2**24
"""Elements of a rank's shard that optimizer.moments_dtype=bf16 updates at a time, which bounds the memory."""
GREATEST_BF16_BETA = 0.99
"""Greatest decay rate of a moment in bf16 (optim/adamw_bf16.py)."""
MOMENTUM = "momentum_buffer"
ROW_MOMENT = "row_second_moment"
"""One number per row of a weight: its shape is that of the parameter without the last dimension."""
MUON_ELEMENTS = 2**25
"""Most elements that Muon orthogonalizes at once, unless a single expert has more. It bounds the
memory of the update: 16 matrices of OLMoE-1B-7B's experts."""


@dataclass(frozen=True)
class OptimizerConfig(VariantConfig):
    """What every optimizer has."""

    lr: float = 4e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to every parameter, norms and embeddings included (as released), except
    for the roles in optimizer.no_decay."""
    no_decay: list[ParameterRole] = field(default_factory=list)
    """Roles of parameters that have no weight decay, for example [norm,embedding]. matrix: the projections of
    attention. expert_matrix: gate, up and down of every expert. adapter: every weight of an adapter. An
    embedding that is also the head is an embedding."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm if theirs is larger; 0: no clipping."""

    def state_of(self, role: ParameterRole) -> tuple[str, ...] | None:
        """Names of the tensors in the optimizer's state of a parameter of a role. All but ROW_MOMENT have the
        shape of the parameter. None: not said. A run then takes what a checkpoint has, and `olmoe plan`
        counts as much as for AdamW."""
        return None

    @property
    def state_dtype(self) -> Precision:
        """Data type of these tensors."""
        return Precision.fp32

    def rule_of(self, role: ParameterRole) -> str:
        """The name of the rule that updates the parameters of a role."""
        return self.name

    def lr_of(self, role: ParameterRole) -> float:
        """Peak learning rate of the parameters of a role."""
        return self.lr

    def weight_decay_of(self, role: ParameterRole) -> float:
        """Weight decay of the parameters of a role."""
        return 0.0 if role in self.no_decay else self.weight_decay

    def errors(self) -> list[str]:
        errors = [] if self.lr > 0 else [f"optimizer.lr={self.lr}: must be positive"]
        for key in ("weight_decay", "max_grad_norm"):
            if getattr(self, key) < 0:
                errors.append(f"optimizer.{key}={getattr(self, key)}: must not be negative")
        return errors


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    moments_dtype: Precision = Precision.fp32
    """Data type in which the moments are kept. bf16: half the memory, 4 bytes per trained parameter less;
    betas of up to 0.99. Weights and arithmetic are fp32 in any case."""

    def state_of(self, role: ParameterRole) -> tuple[str, ...]:
        return ADAMW_STATE

    @property
    def state_dtype(self) -> Precision:
        return self.moments_dtype

    def errors(self) -> list[str]:
        errors = super().errors()
        if any(not 0 <= beta < 1 for beta in self.betas):
            errors.append(f"optimizer.betas={list(self.betas)}: each must be in [0, 1)")
        elif self.moments_dtype is Precision.bf16 and max(self.betas) > GREATEST_BF16_BETA:
            errors.append(
                f"optimizer.betas={list(self.betas)}: with optimizer.moments_dtype=bf16 each must be at most "
                f"{GREATEST_BF16_BETA}, because bf16 loses changes of a moment by less than 1/256 of it; "
                "lower it, or set optimizer.moments_dtype=fp32"
            )
        return errors


@dataclass(frozen=True)
class RMSpropConfig(OptimizerConfig):
    name: str = "rmsprop"
    weight_decay: float = 0.0
    """L2 penalty, not decoupled: weight_decay times the parameter is added to the gradient, after the
    clipping and before the division by its root mean square. It applies to every parameter."""
    alpha: float = 0.99
    """Decay rate of the running mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    momentum: float = 0.0
    """Decay rate of the sum of updates; 0: no momentum, and one tensor less in the optimizer's state."""

    def state_of(self, role: ParameterRole) -> tuple[str, ...]:
        return ("square_avg", MOMENTUM) if self.momentum > 0 else ("square_avg",)

    def errors(self) -> list[str]:
        errors = super().errors()
        for key in ("alpha", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                errors.append(f"optimizer.{key}={getattr(self, key)}: must be in [0, 1)")
        if self.eps < 0:
            errors.append(f"optimizer.eps={self.eps}: must not be negative")
        return errors


@dataclass(frozen=True)
class OrthogonalizingConfig(OptimizerConfig):
    """What Muon and NorMuon have: momentum that is orthogonalized, and AdamW for all other parameters."""

    momentum: float = 0.95
    """Decay rate of the sum of gradients that is orthogonalized."""
    nesterov: bool = True
    """Whether to orthogonalize the gradient plus `momentum` times that sum, in place of the sum."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    adamw_lr: float | None = None
    """Peak learning rate of the parameters that AdamW updates; null: optimizer.lr."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the running means of the gradient and of its square."""
    adamw_eps: float = 1e-8
    """Added to the denominator of AdamW's update."""

    def state_of(self, role: ParameterRole) -> tuple[str, ...]:
        return (MOMENTUM,) if role in MATRICES else ADAMW_STATE

    def rule_of(self, role: ParameterRole) -> str:
        return self.name if role in MATRICES else AdamWConfig.name

    def lr_of(self, role: ParameterRole) -> float:
        return self.lr if role in MATRICES or self.adamw_lr is None else self.adamw_lr

    def errors(self) -> list[str]:
        errors = super().errors()
        if not 0 <= self.momentum < 1:
            errors.append(f"optimizer.momentum={self.momentum}: must be in [0, 1)")
        if self.ns_steps < 1:
            errors.append(f"optimizer.ns_steps={self.ns_steps}: must be positive")
        if self.adamw_lr is not None and not self.adamw_lr > 0:
            errors.append(f"optimizer.adamw_lr={self.adamw_lr}: must be positive")
        if any(not 0 <= beta < 1 for beta in self.adamw_betas):
            errors.append(f"optimizer.adamw_betas={list(self.adamw_betas)}: each must be in [0, 1)")
        if self.adamw_eps < 0:
            errors.append(f"optimizer.adamw_eps={self.adamw_eps}: must not be negative")
        return errors


@dataclass(frozen=True)
class MuonConfig(OrthogonalizingConfig):
    """Muon for the matrices of attention and experts, AdamW for all other parameters."""

    name: str = "muon"
    scale: MuonScale = MuonScale.match_rms
    """Factor of the orthogonalized update of a matrix with m rows (outputs) and n columns (inputs).
    match_rms: 0.2 sqrt(max(m, n)), so that learning rate and weight decay of AdamW fit (arXiv 2502.16982).
    spectral: sqrt(m / n), so that activations change by as much in every layer (arXiv 2310.17813)."""


@dataclass(frozen=True)
class NorMuonConfig(OrthogonalizingConfig):
    """Muon whose updates are divided, row by row, by a running root mean square (arXiv 2510.05491)."""

    name: str = "normuon"
    beta2: float = 0.95
    """Decay rate of the running mean, for each row of a matrix, of the squared entries of its orthogonalized
    updates."""
    eps: float = 1e-8
    """Added to the root of that mean, by which the row is divided."""

    def state_of(self, role: ParameterRole) -> tuple[str, ...]:
        return (MOMENTUM, ROW_MOMENT) if role in MATRICES else ADAMW_STATE

    def errors(self) -> list[str]:
        errors = super().errors()
        if not 0 <= self.beta2 < 1:
            errors.append(f"optimizer.beta2={self.beta2}: must be in [0, 1)")
        if not self.eps > 0:
            errors.append(f"optimizer.eps={self.eps}: must be positive")
        return errors


register_variant("optimizer", AdamWConfig)
register_variant("optimizer", MuonConfig)
register_variant("optimizer", NorMuonConfig)
register_variant("optimizer", RMSpropConfig)
