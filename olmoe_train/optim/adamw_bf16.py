"""AdamW whose moments are kept in bf16: optimizer.moments_dtype=bf16. Weights and arithmetic are fp32.

A step widens the moments, updates them, updates the weight with them, and keeps them rounded to the nearest
bf16 value. bf16 has 8 significant bits, so a change of a moment m by less than 2^-8 m may be lost. A step
moves m by (1 - beta) times its distance to the new value, so m follows until it is within 2^-8 / (1 - beta)
of it: 4% for beta = 0.9, and 8% for 0.95, whose root is 4%. Betas near 1 are refused (config/optimizer.py).

Stochastic rounding would have no such limit. It is not used, because its random numbers would have to be the
same for an element in every layout, and rounding to nearest needs none.
"""

from typing import Any

import torch
from torch import Tensor

from olmoe_train.config.optimizer import UPDATE_ELEMENTS, AdamWConfig
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.optim.skip_step import store_unless


class AdamWBf16(torch.optim.Optimizer):
    """AdamW with moments in bf16. It has the state of torch.optim.AdamW, in another dtype."""

    _step_supports_amp_scaling = True
    """As torch's fused optimizers, `step` reads `found_inf` on the device: where it is not 0, nothing changes
    (skip_step.py)."""

    def __init__(self, parameters: Any, cfg: AdamWConfig) -> None:
        self.cfg = cfg
        super().__init__(parameters, {"lr": cfg.lr, "weight_decay": cfg.weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, a bounded number of elements at a time."""
        found: Tensor | None = getattr(self, "found_inf", None)
        skip = None if found is None else found.bool()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16, requires_grad=False)
                step = state["step"] + 1
                tensors = (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                parts = (local_tensor(tensor).view(-1).split(UPDATE_ELEMENTS) for tensor in tensors)
                for weight, gradient, mean, square in zip(*parts, strict=True):
                    self._update(weight, gradient, mean, square, step, group, skip)
                store_unless(state["step"], step, skip)

    def _update(
        self,
        weight: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        step: Tensor,
        group: dict[str, Any],
        skip: Tensor | None,
    ) -> None:
        """Update elements of a parameter: fp32 weight and gradient, bf16 mean and square, each [N]."""
        beta1, beta2 = self.cfg.betas
        new_mean = mean.float().lerp_(gradient, 1 - beta1)
        new_square = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (new_square / (1 - beta2**step)).sqrt_().add_(self.cfg.eps)
        direction = (new_mean / (1 - beta1**step)).div_(root)
        shrunk = weight * (1 - group["lr"] * group["weight_decay"])
        store_unless(weight, shrunk.sub_(direction, alpha=group["lr"]), skip)
        store_unless(mean, new_mean, skip)
        store_unless(square, new_square, skip)
