"""OLMoE-1B-7B in numbers worked by hand, and the configurations with which tests plan its runs.

OLMoE-1B-7B in parts: experts 16 x 402,653,184; the rest of a layer 16,916,480 (four projections 2048 x 2048,
a router 64 x 2048, four norms of 2048); embedding, final norm and head 206,047,232. In all 6,919,161,856.
"""

from typing import Any

from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import TrainerConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory import MicroBatch

OLMOE_1B_7B = OlmoeConfig(intermediate_size=1024)  # the other defaults are the released model's
TOTAL, EXPERTS, DENSE, ROOT = 6_919_161_856, 402_653_184, 16_916_480, 206_047_232
ONE_SEQUENCE = MicroBatch(1, 4096, Precision.bf16, ActivationCheckpointing.none)


def fsdp(gpus: int, expert_parallel: int = 1, copies: int = 1) -> ParallelLayout:
    return ParallelLayout(Strategy.fsdp, gpus, expert_parallel, copies)


def plan_config(**changes: Any) -> PlanConfig:
    sections: dict[str, Any] = {
        "model": ModelConfig(),
        "data": DataConfig(dir="none", sequence_length=4096),
        "trainer": TrainerConfig(max_steps=100, global_batch_size=1024, micro_batch_size=4),
    }
    return PlanConfig(**sections | changes)
