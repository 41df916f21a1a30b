"""Every option of every verb: frozen dataclasses, checked before anything is allocated."""

from olmoe_train.config.compose import compose
from olmoe_train.config.data import DataConfig, MixtureSource, SourceConfig, TokenizerConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.train import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    SchedulerConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
)
from olmoe_train.config.verbs import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    PrepareConfig,
    UpcycleConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerateConfig",
    "LoggingConfig",
    "LossConfig",
    "MixtureSource",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "PrepareConfig",
    "SchedulerConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainerConfig",
    "UpcycleConfig",
    "WandbConfig",
    "compose",
    "olmoe_config",
]
