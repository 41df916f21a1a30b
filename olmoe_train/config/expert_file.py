"""The file with which `olmoe experts` names experts, and which trainer.train_only reads.

    layers:
      0: [5, 12]       # layer -> its experts
      3: [1]
    also: [router]     # optional: roles of further parameters to train

A file that `olmoe experts` writes has further keys, for people: where the choice comes from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmoe_train.model.roles import ParameterRole
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.yaml_files import read_yaml_mapping

LAYERS, ALSO = "layers", "also"
ALSO_ROLES = tuple(
    role for role in ParameterRole if role not in (ParameterRole.expert_matrix, ParameterRole.adapter)
)
"""Roles that `also` may name: all but those of the experts and of adapters."""
FOR_PEOPLE = ("source", "sample", "select", "p", "num_experts", "relevance")
"""Further keys of a file that `olmoe experts` writes. Nothing reads them."""


@dataclass(frozen=True)
class NamedExperts:
    """Experts of a model, by layer."""

    layers: dict[int, tuple[int, ...]]
    """Layer -> its experts, at least one. Layers without experts are left out."""
    also: tuple[ParameterRole, ...] = ()
    """Roles of further parameters to train."""

    def plain_values(self) -> dict[str, Any]:
        """What decides about the training, as JSON values. The order of the experts does not."""
        layers = {str(layer): sorted(experts) for layer, experts in sorted(self.layers.items())}
        return {LAYERS: layers, ALSO: sorted(role.value for role in self.also)}


def read_experts(path: Path, num_layers: int, num_experts: int) -> NamedExperts:
    """Read a file of experts.

    Args:
        path: YAML or JSON.
        num_layers: Layers of the model.
        num_experts: Experts per layer of the model.

    Raises:
        UserError: The file cannot be read, or does not fit the model. The message names file and key, and
            lists everything that is wrong.
    """
    values = read_yaml_mapping(path, f"a file of experts has keys, such as {LAYERS}")
    errors = [
        f"{path}: {key}: there is no such key; a file of experts has {LAYERS} and {ALSO}"
        for key in values
        if key not in (LAYERS, ALSO, *FOR_PEOPLE)
    ]
    layers = values.get(LAYERS)
    if not isinstance(layers, dict) or not layers:
        errors.append(
            f"{path}: {LAYERS}: must have the experts of each layer, such as {{0: [5, 12], 3: [1]}}"
        )
        layers = {}
    also = values.get(ALSO) or []
    roles = [role.value for role in ALSO_ROLES]
    if not isinstance(also, list) or any(name not in roles for name in also):
        errors.append(f"{path}: {ALSO}={also}: must be a list of {', '.join(roles)}")
    for layer, experts in layers.items():
        errors += _layer_errors(f"{path}: {LAYERS}.{layer}", layer, experts, num_layers, num_experts)
    if errors:
        raise UserError("\n  ".join(errors))
    return NamedExperts(
        {int(layer): tuple(experts) for layer, experts in layers.items()},
        tuple(ParameterRole(name) for name in also),
    )


def _layer_errors(where: str, layer: Any, experts: Any, num_layers: int, num_experts: int) -> list[str]:
    if not str(layer).isdecimal() or int(layer) >= num_layers:
        return [f"{where}: the model has the layers 0 to {num_layers - 1}"]
    if not isinstance(experts, list) or not experts:
        return [f"{where}={experts}: must be a list of experts; leave out a layer that has none"]
    wrong = [one for one in experts if type(one) is not int or not 0 <= one < num_experts]
    if wrong:
        return [f"{where}: {wrong[0]}: the model has the experts 0 to {num_experts - 1}"]
    if len(set(experts)) < len(experts):
        return [f"{where}={experts}: names an expert twice"]
    return []


def experts_text(
    facts: Mapping[str, Any], layers: dict[int, list[Any]], **by_layer: dict[int, list[Any]]
) -> str:
    """A file of experts, one line per layer.

    Args:
        facts: Keys and values that come first.
        layers: Layer -> its experts.
        by_layer: Further keys, such as relevance; one list per layer each.
    """
    lines = [OmegaConf.to_yaml(OmegaConf.create(dict(facts))).rstrip()]
    for key, lists in ({LAYERS: layers} | by_layer).items():
        lines.append(f"{key}:")
        lines += [f"  {layer}: [{', '.join(map(str, values))}]" for layer, values in lists.items()]
    return "\n".join(lines) + "\n"
