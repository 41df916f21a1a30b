"""The role of each parameter, by which an optimizer chooses its rule and its weight decay."""

import re
from enum import Enum

from olmoe_train.utils.errors import UserError


class ParameterRole(Enum):
    matrix = "matrix"
    expert_matrix = "expert_matrix"
    router = "router"
    embedding = "embedding"
    head = "head"
    norm = "norm"
    bias = "bias"
    adapter = "adapter"


ROLE_NAMES = {
    ParameterRole.matrix: r"\.(self_attn\.[qkvo]|shared_experts\.(gate|up|down))_proj\.weight$",
    ParameterRole.expert_matrix: r"\.mlp\.experts\.(gate_up|down)_proj$",
    ParameterRole.router: r"\.mlp\.gate\.weight$",
    ParameterRole.embedding: r"(^|\.)embed_tokens\.weight$",
    ParameterRole.head: r"^lm_head\.weight$",
    ParameterRole.norm: r"norm\.weight$",
    ParameterRole.bias: r"\.bias$",
    ParameterRole.adapter: r"(lora_A|lora_B|magnitude)$",
}
"""Role -> regular expression for the names of its parameters. A dense model's MLP is its only expert."""


def role_of(name: str) -> ParameterRole:
    """The role of a parameter. A weight that is both embedding and head is named as the embedding.

    Args:
        name: Name of the parameter in an OlmoeForCausalLM.

    Raises:
        UserError: The name has no role, or several.
    """
    roles = [role for role, pattern in ROLE_NAMES.items() if re.search(pattern, name)]
    if len(roles) != 1:
        found = " and ".join(role.value for role in roles) or "none"
        raise UserError(
            f"parameter {name}: it must have exactly one role for the optimizer, and has {found}; make "
            "exactly one pattern of ROLE_NAMES in olmoe_train/model/roles.py match this name"
        )
    return roles[0]


def matrices_per_row(name: str) -> int:
    """The number of matrices that a parameter stacks along its second to last dimension.

    2 for gate and up, which are fused into [E, 2F, D]; 1 for any other parameter.
    """
    return 2 if name.endswith(".gate_up_proj") else 1
