"""The schemas of every option of every verb, and `compose`, which makes a config from overrides."""

from olmoe_train.config.adapter import AdapterConfig, NoAdapterConfig
from olmoe_train.config.balancing import AuxiliaryLossConfig, BalancingConfig
from olmoe_train.config.compose import compose
from olmoe_train.config.data import DataConfig, MixtureSource, SourceConfig, TokenizerConfig
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.objective import NextTokenConfig, ObjectiveConfig
from olmoe_train.config.optimizer import (
    AdamWConfig,
    MuonConfig,
    NorMuonConfig,
    OptimizerConfig,
    RMSpropConfig,
)
from olmoe_train.config.train import (
    CheckpointConfig,
    EvaluationConfig,
    EvaluationSet,
    LoggingConfig,
    LossConfig,
    ParallelConfig,
    SchedulerConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
)
from olmoe_train.config.variants import VariantConfig, register_variant
from olmoe_train.config.verbs import (
    EvaluateConfig,
    ExportConfig,
    PlanConfig,
    PrepareConfig,
    UpcycleConfig,
)

__all__ = [
    "AdamWConfig",
    "AdapterConfig",
    "AuxiliaryLossConfig",
    "BalancingConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "EvaluationSet",
    "ExportConfig",
    "GenerateConfig",
    "LoggingConfig",
    "LossConfig",
    "MixtureSource",
    "ModelConfig",
    "MuonConfig",
    "NextTokenConfig",
    "NoAdapterConfig",
    "NorMuonConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "PrepareConfig",
    "RMSpropConfig",
    "SchedulerConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainerConfig",
    "UpcycleConfig",
    "VariantConfig",
    "WandbConfig",
    "compose",
    "olmoe_config",
    "register_variant",
]
