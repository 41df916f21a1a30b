"""The adapter of a run: that of model.adapter_from, if there is one, with which the given keys must agree."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from olmoe_train.config.adapter import FROM_FILE, DoraConfig, LoraConfig
from olmoe_train.config.choices import AdapterScaling, AdapterTarget, RouterTraining
from olmoe_train.config.initial_model import as_yaml
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.model.adapters.spec import AdapterSpec
from olmoe_train.utils.errors import UserError


def resolve_adapter(composed: DictConfig) -> None:
    """Complete the section `adapter` of a composed configuration, in place.

    Each key that was not given takes the value that the adapter in model.adapter_from has. Without
    adapter_from, the value is that of the schema.

    Args:
        composed: What Hydra composed, with a resolved section `model`; it may have no section `adapter`.

    Raises:
        UserError: A given key contradicts adapter_from; the message names every such key with both values.
            Or there is no adapter in adapter_from.
    """
    if "adapter" not in composed:
        return
    adapter, source = composed.adapter, composed.model.adapter_from
    kind = OmegaConf.get_type(adapter)
    assert kind is not None
    if not issubclass(kind, LoraConfig):
        if source is not None:
            raise UserError(f"model.adapter_from={source}: nothing trains it; set adapter=lora (or dora)")
        return
    values: dict[str, Any] = {name: getattr(LoraConfig(), name) for name in FROM_FILE}
    # Without init_from, which the preflight checks require, the adapter's model is not known.
    has_model = not OmegaConf.is_missing(composed.model, "init_from") and composed.model.init_from is not None
    if source is not None and has_model:
        model = OmegaConf.to_object(composed.model)
        assert isinstance(model, ModelConfig)
        # Imported here: it imports torch, and most runs have no adapter_from.
        from olmoe_train.model.adapters.peft_read import read_peft

        try:
            spec, _ = read_peft(Path(source).expanduser(), olmoe_config(model), headers_only=True)
        except UserError as error:
            raise UserError(f"model.adapter_from={source}: {error}") from None
        values = _values_of(spec)
        _refuse_contradictions(adapter, kind, values, spec, source)
    for name, value in values.items():
        if OmegaConf.is_missing(adapter, name):
            adapter[name] = value


def _values_of(spec: AdapterSpec) -> dict[str, Any]:
    return {
        "rank": spec.rank,
        "alpha": spec.alpha,
        "targets": [AdapterTarget(name) for name in spec.targets],
        "scaling": AdapterScaling.rslora if spec.rslora else AdapterScaling.standard,
    }


def _refuse_contradictions(
    adapter: DictConfig, kind: type[LoraConfig], values: dict[str, Any], spec: AdapterSpec, source: str
) -> None:
    contradictions = []
    if issubclass(kind, DoraConfig) != spec.dora:
        contradictions.append(f"adapter={kind.name}, and {'dora' if spec.dora else 'lora'} there")
    for name, theirs in values.items():
        if OmegaConf.is_missing(adapter, name):
            continue
        given = list(adapter[name]) if name == "targets" else adapter[name]
        if set(given) != set(theirs) if name == "targets" else given != theirs:
            contradictions.append(f"adapter.{name}={as_yaml(given)}, and {as_yaml(theirs)} there")
    if spec.trains_router and adapter.router is RouterTraining.frozen:
        contradictions.append("adapter.router=frozen, and trained routers there: set adapter.router=full")
    if contradictions:
        what = f"model.adapter_from={source}: the adapter there is another one:"
        fix = "remove these keys: a key that is not given has the value of model.adapter_from"
        raise UserError("\n  ".join([what, *contradictions, fix]))
