"""The options of `adapter`, which decides what is trained: one dataclass per kind of adapter."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from olmoe_train.config.choices import AdapterScaling, AdapterTarget, QuantizeBase, RouterTraining
from olmoe_train.config.variants import VARIANTS, VariantConfig, register_variant, writable
from olmoe_train.model.adapters.spec import TARGETS, AdapterSpec

FROM_FILE = ("rank", "alpha", "targets", "scaling")
"""Keys that model.adapter_from decides, if it is given."""


@dataclass(frozen=True)
class AdapterConfig(VariantConfig):
    """What every adapter has."""


@dataclass(frozen=True)
class NoAdapterConfig(AdapterConfig):
    """No adapter: every parameter of the model is trained."""

    name: str = "none"


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685): the model of model.init_from is frozen, and low-rank updates of its weights
    are trained. Each expert has its own."""

    name: str = "lora"
    rank: int = 16
    """Rank of each update (R)."""
    alpha: float = 32.0
    """Numerator of the scale by which each update is multiplied; see adapter.scaling."""
    dropout: float = 0.0
    """Dropout probability of the adapter's inputs in training. Does not apply to the embedding."""
    targets: list[AdapterTarget] = field(
        default_factory=lambda: [AdapterTarget.attention, AdapterTarget.experts]
    )
    """The weights that get an update. attention: q_proj, k_proj, v_proj and o_proj. experts: gate_proj,
    up_proj and down_proj of every expert. lm_head: the head. embeddings: the token embedding."""
    router: RouterTraining = RouterTraining.frozen
    """full: train the routers' own weights, too, with the router losses. frozen: the router losses are
    reported, and not part of the loss."""
    scaling: AdapterScaling = AdapterScaling.standard
    """standard: the scale is alpha / rank. rslora: alpha / sqrt(rank) (arXiv 2312.03732)."""
    quantize_base: QuantizeBase = QuantizeBase.none
    """nf4: keep the frozen weights that have an update in 4 bits (QLoRA, arXiv 2305.14314). Every rank then
    holds these weights whole, with expert parallelism those of its own experts."""

    def errors(self) -> list[str]:
        errors = []
        if self.rank < 1:
            errors.append(f"adapter.rank={self.rank}: must be positive")
        if not self.alpha > 0:
            errors.append(f"adapter.alpha={self.alpha}: must be positive")
        if not 0 <= self.dropout < 1:
            errors.append(f"adapter.dropout={self.dropout}: must be at least 0 and below 1")
        if not self.targets:
            errors.append(f"adapter.targets=[]: nothing would be trained; name some of {', '.join(TARGETS)}")
        names = [target.value for target in self.targets]
        errors += [f"adapter.targets: {name} is listed twice" for name in TARGETS if names.count(name) > 1]
        return errors


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """DoRA (arXiv 2402.09353): LoRA, and the norm of each row of an adapted weight is trained separately."""

    name: str = "dora"


register_variant("adapter", NoAdapterConfig)
register_variant("adapter", LoraConfig, FROM_FILE)
register_variant("adapter", DoraConfig, FROM_FILE)


def adapter_spec(cfg: AdapterConfig) -> AdapterSpec | None:
    """The adapter that `adapter=...` names; None without one."""
    if not isinstance(cfg, LoraConfig):
        return None
    names = {target.value for target in cfg.targets}
    return AdapterSpec(
        rank=cfg.rank,
        alpha=cfg.alpha,
        targets=tuple(name for name in TARGETS if name in names),
        dropout=cfg.dropout,
        rslora=cfg.scaling is AdapterScaling.rslora,
        dora=isinstance(cfg, DoraConfig),
        trains_router=cfg.router is RouterTraining.full,
    )


def saved_adapter(section: dict[str, Any]) -> AdapterConfig:
    """The section `adapter` of a saved configuration.

    Args:
        section: Its plain values; empty in a run from before there were adapters.
    """
    kind = VARIANTS["adapter"][section.get("name", NoAdapterConfig.name)]
    cfg = OmegaConf.to_object(OmegaConf.merge(writable(OmegaConf.structured(kind)), section))
    assert isinstance(cfg, AdapterConfig)
    return cfg


def quantizes_base(cfg: AdapterConfig) -> bool:
    """Whether the frozen weights are kept in NF4."""
    return isinstance(cfg, LoraConfig) and cfg.quantize_base is QuantizeBase.nf4
