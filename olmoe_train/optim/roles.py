"""Parameter groups: every trained parameter in the group of its role, exactly once, and their table."""

from typing import Any

from torch import nn

from olmoe_train.config.optimizer import OptimizerConfig
from olmoe_train.model.roles import ParameterRole, matrices_per_row, role_of
from olmoe_train.utils.tables import aligned


def parameter_groups(model: nn.Module, cfg: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameter groups of a model for a torch optimizer, one per role that is trained.

    A group has `params`, `lr` and `weight_decay`, and besides: `role` and `rule` (text); `state`, the names
    of the tensors in the optimizer's state of each parameter or None (OptimizerConfig.state_of), and
    `state_dtype`, theirs; and `matrices_per_row`, the number of matrices that each parameter stacks along
    its second to last dimension.

    Args:
        model: The model. Frozen parameters are left out, and a parameter with two names counts by its first.
        cfg: The optimizer's options.

    Raises:
        UserError: A trained parameter has no role, or several.
    """
    of_role: dict[ParameterRole, dict[str, nn.Parameter]] = {role: {} for role in ParameterRole}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_role[role_of(name)][name] = parameter
    return [
        {
            "params": list(parameters.values()),
            "lr": cfg.lr_of(role),
            "weight_decay": cfg.weight_decay_of(role),
            "role": role.value,
            "rule": cfg.rule_of(role),
            "state": cfg.state_of(role),
            "state_dtype": cfg.state_dtype.dtype,
            "matrices_per_row": [matrices_per_row(name) for name in parameters],
        }
        for role, parameters in of_role.items()
        if parameters
    ]


def groups_table(groups: list[dict[str, Any]]) -> list[str]:
    """Lines with the role, number of parameters and tensors, rule, peak learning rate and weight decay of
    each group."""
    rows = [("role", "parameters", "tensors", "rule", "lr", "weight decay")]
    for group in groups:
        elements = sum(parameter.numel() for parameter in group["params"])
        counts = (f"{elements:,}", f"{len(group['params']):,}")
        rates = (f"{group['lr']:g}", f"{group['weight_decay']:g}")
        rows.append((group["role"], *counts, group["rule"], *rates))
    return aligned(rows, left=(0, 3, 4, 5))
