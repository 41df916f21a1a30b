"""The optimizer's state that a checkpoint fills: as much of it as the optimizer of the run can use."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olmoe_train.config.optimizer import ROW_MOMENT
from olmoe_train.optim.average import AVERAGE
from olmoe_train.optim.muon import zeros_of_rows

log = logging.getLogger(__name__)


def make_optimizer_state(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: dict[str, float],
    stored: Iterable[str],
) -> None:
    """Allocate the optimizer's state in the layout of the parameters, for a checkpoint to fill.

    The optimizer itself would allocate the state only at its first step. A parameter gets no state where the
    checkpoint has the state of another rule, as after optimizer=muon became adamw: the optimizer then begins
    anew for it, and a warning says so.

    Args:
        directory: The checkpoint, for messages.
        model: The model that is loaded.
        optimizer: The optimizer that is loaded. Groups that do not say their `state` (optim/roles.py) take
            what is stored.
        steps: Step count by parameter name.
        stored: Names of the tensors in the checkpoint.
    """
    found = _stored_state(stored)
    names = {parameter: name for name, parameter in model.named_parameters()}
    averaged = [set[bool](), set[bool]()]  # whether parameters have an average, in the run and there
    for group in optimizer.param_groups:
        others: set[str] = set()
        for parameter in group["params"]:
            name = names[parameter]
            there = found.get(name, set())
            averaged[0].add(bool(group.get("average")))
            averaged[1].add(AVERAGE in there)
            kept = there - {AVERAGE}
            needed = group.get("state")
            if needed is not None and kept != set(needed):
                others, kept = others | kept, set()
            state: dict[str, Any] = {}
            if kept and name in steps:
                state["step"] = torch.tensor(steps[name], dtype=torch.float32, device=parameter.device)
            if group.get("average"):
                kept |= there & {AVERAGE}
            state |= {key: _zeros(parameter, key, group.get("state_dtype")) for key in sorted(kept)}
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = state
        if others:
            log.warning(
                "WARNING: %s has %s of the parameters with the role %s, and their rule is now %s, which "
                "needs %s: their optimizer state begins anew",
                *(directory, " and ".join(sorted(others)), group["role"], group["rule"]),
                " and ".join(group["state"]),
            )
    if averaged == [{True}, {False}]:
        log.warning("WARNING: %s has no average of the weights: it begins with its weights", directory)
    if averaged == [{False}, {True}]:
        log.warning("WARNING: %s has an average of the weights, which this run does not continue", directory)


def _zeros(parameter: nn.Parameter, key: str, dtype: torch.dtype | None) -> torch.Tensor:
    """Zeros for one tensor of the state. dtype: of moments; None: that of the parameter."""
    if key == ROW_MOMENT:
        return zeros_of_rows(parameter)
    return torch.zeros_like(parameter, dtype=None if key == AVERAGE else dtype, requires_grad=False)


def _stored_state(stored: Iterable[str]) -> dict[str, set[str]]:
    """The names of the tensors in the optimizer's state of each parameter."""
    found: dict[str, set[str]] = {}
    for tensor_name in stored:
        kind, _, rest = tensor_name.partition(".")
        if kind == "optim":
            key, _, name = rest.partition(".")
            found.setdefault(name, set()).add(key)
    return found
