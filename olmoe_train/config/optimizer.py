"""The options of `optimizer`: one dataclass per optimizer."""

from dataclasses import dataclass

from olmoe_train.config.variants import VariantConfig, register_variant


@dataclass(frozen=True)
class OptimizerConfig(VariantConfig):
    """What every optimizer has."""

    lr: float = 4e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to every parameter, norms and embeddings included (as released)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm if theirs is larger; 0: no clipping."""

    @property
    def moments(self) -> int:
        """Tensors of a trained parameter's shape in the optimizer's state."""
        return 2

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

    def errors(self) -> list[str]:
        errors = super().errors()
        if any(not 0 <= beta < 1 for beta in self.betas):
            errors.append(f"optimizer.betas={list(self.betas)}: each must be in [0, 1)")
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

    @property
    def moments(self) -> int:
        return 2 if self.momentum > 0 else 1

    def errors(self) -> list[str]:
        errors = super().errors()
        for key in ("alpha", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                errors.append(f"optimizer.{key}={getattr(self, key)}: must be in [0, 1)")
        if self.eps < 0:
            errors.append(f"optimizer.eps={self.eps}: must not be negative")
        return errors


register_variant("optimizer", AdamWConfig)
register_variant("optimizer", RMSpropConfig)
