"""Fields of OlmoeConfig that Transformers' OLMoE does not have: design choices that the paper compared with
those of the released model (arXiv 2409.02060, section 4). Their defaults are the released model.
"""

import math
from collections.abc import Mapping
from typing import Any

from olmoe_train.utils.errors import UserError

ABLATIONS = ("num_shared_experts", "routing", "expert_capacity", "qk_norm", "norm")
"""The fields of the architecture. `initialization` is none of them: only initial weights depend on it."""
_CHOICES = {
    "routing": ("token_choice", "expert_choice"),
    "norm": ("rms", "nonparametric"),
    "initialization": ("truncated_normal", "normal"),
}


def ablation_problems(values: Mapping[str, Any]) -> list[str]:
    """One message for each of these fields whose value is invalid by itself. values: every field by name."""
    problems = [
        f"{name}={values[name]!r} is unknown; choose from {', '.join(choices)}"
        for name, choices in _CHOICES.items()
        if values[name] not in choices
    ]
    shared, capacity = values["num_shared_experts"], values["expert_capacity"]
    if type(shared) is not int or shared < 0:
        problems.append(f"num_shared_experts={shared!r} must be an integer of at least 0")
    if capacity is not None and (type(capacity) not in (int, float) or not 0 < capacity < math.inf):
        problems.append(f"expert_capacity={capacity!r} must be a number above 0, or null")
    return problems


def routing_problems(values: Mapping[str, Any]) -> list[str]:
    """One message for each contradiction of another field with `routing`. values: every field by name."""
    capacity, experts = values["expert_capacity"], values["num_experts"]
    if values["routing"] == "token_choice":
        if capacity is None:
            return []
        return [f"expert_capacity={capacity} has no meaning with routing=token_choice; remove it"]
    problems = []
    if experts == 1:
        problems.append("routing=expert_choice needs experts to choose, and num_experts=1 is a dense model")
    elif capacity is not None and capacity > experts:
        problems.append(
            f"expert_capacity={capacity} is more than num_experts={experts}, with which every expert takes "
            "every token; lower it"
        )
    if values["norm_topk_prob"]:
        problems.append(
            "norm_topk_prob=true has no meaning with routing=expert_choice, where a token may have no "
            "expert; set it to false"
        )
    return problems


def refuse_export(ablations: Mapping[str, Any]) -> None:
    """Refuse to write a model in the formats of other programs.

    Args:
        ablations: The fields in which the model is not as released, with their values.

    Raises:
        UserError: There are such fields; the message names all of them.
    """
    if ablations:
        found = ", ".join(f"model.{name}={_in_yaml(value)}" for name, value in ablations.items())
        raise UserError(
            f"{found}: neither Transformers' OLMoE nor OLMo can represent such a model, so it cannot be "
            "written in their formats; use its run directory (olmoe evaluate source=RUN, model.init_from=RUN)"
        )


def _in_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
