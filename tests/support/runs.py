"""Complete runs of a tiny model with the real train(), in any layout."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from olmoe_train import config
from olmoe_train.config.adapter import DoraConfig, LoraConfig
from olmoe_train.config.balancing import AuxiliaryLossConfig, BalancingConfig, LossFreeConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    AdapterTarget,
    BalanceScope,
    Initialization,
    Norm,
    Offload,
    Packing,
    Precision,
    QuantizeBase,
    RouterTraining,
    RoutingKind,
    Strategy,
)
from olmoe_train.config.data import MixtureSource
from olmoe_train.config.optimizer import AdamWConfig, MuonConfig, NorMuonConfig, OptimizerConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from tests.support.data import write_prepared
from tests.support.sizes import SIZES, overrides, section

STEPS, SEQUENCES, LENGTH = 6, 16, 32
TINY: dict[str, Any] = {
    # One token per byte of real_tokens(), and more.
    **section("model", SIZES | {"vocab_size": 320, "max_position_embeddings": LENGTH}),
    "data.sequence_length": LENGTH,
    # Large enough that the experts contribute to the gradient norm.
    "model.initializer_range": 0.15,
    "trainer.max_steps": STEPS,
    "trainer.global_batch_size": SEQUENCES,
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.log_every": 1,
    "optimizer.lr": 1e-3,
    # Far below the norms that occur. So every step is clipped, and a wrong norm makes a wrong step.
    "optimizer.max_grad_norm": 0.1,
    "scheduler": "constant",
    "checkpoint.every": 0,
    "evaluation.at_start": False,
    "evaluation.max_sequences": 8,
    "logging.wandb.mode": "disabled",
}


DOCUMENTS: dict[str, Any] = {
    "mixture": [MixtureSource("../lines", weight=2), MixtureSource("../others", weight=1)],
    "packing": Packing.best_fit,
    "mask_documents": True,
    "repetition_filter": True,
}
ADAPTERS: dict[str, LoraConfig] = {
    # Every target, and the router losses: no weight of the model is left out of the gradients' path.
    "lora": LoraConfig(rank=4, alpha=10.0, targets=list(AdapterTarget), router=RouterTraining.full),
    "lora_frozen_router": LoraConfig(rank=4, alpha=10.0, targets=list(AdapterTarget)),
    "dora": DoraConfig(rank=4, alpha=10.0),
    "nf4": LoraConfig(rank=4, alpha=10.0, quantize_base=QuantizeBase.nf4),
}
# The design choices that only training has, together.
ABLATED: dict[str, Any] = {
    "num_shared_experts": 1,
    "routing": RoutingKind.expert_choice,
    "qk_norm": False,
    "norm": Norm.nonparametric,
    "initialization": Initialization.normal,
}
BALANCING: dict[str, BalancingConfig] = {
    "all_ranks": AuxiliaryLossConfig(scope=BalanceScope.all_ranks),
    "running": AuxiliaryLossConfig(scope=BalanceScope.running),
    # Both the bias and the sequence-wise loss are large enough to matter within six steps.
    "loss_free": LossFreeConfig(bias_update_rate=0.02, sequence_coef=0.1),
}
OPTIMIZERS: dict[str, Callable[..., OptimizerConfig]] = {
    "muon": MuonConfig,
    "normuon": NorMuonConfig,
    "moments in bf16": partial(AdamWConfig, moments_dtype=Precision.bf16),
}
# By default ZeRO-3 does not partition parameters of up to 100,000 elements. Here that is every parameter.
PARTITION_ALL = Path(__file__).with_name("partition_all.json")


@dataclass(frozen=True)
class Layout:
    ranks: int
    micro_batch: int
    strategy: str = "fsdp"
    experts: int = 1
    copies: int = 1
    checkpointing: str = "none"
    padded: bool = False
    precision: str = "fp32"
    zero_stage: int = 2
    offload: str = "none"
    documents: bool = False
    """Two sources of short documents, packed, with isolated documents (see DOCUMENTS)."""
    kept: bool = False
    """Use parallel.reshard_after_forward=false."""
    adapter: str = ""
    """A key of ADAPTERS; the run then starts from a base model."""
    compiled: bool = False
    prefetch: int = 1
    optimizer: str = "adamw"
    """A key of OPTIMIZERS, whose runs also keep an average of the weights; or adamw."""
    ablated: bool = False
    """Use the model of ABLATED."""
    balancing: str = ""
    """A key of BALANCING; by default balancing=aux with the counts of the global batch."""

    def config(self, tiny: TrainConfig, run_dir: Path, base: Path | None = None) -> TrainConfig:
        """The configuration of a run. base: the model that an adapter adapts."""
        trainer = replace(
            tiny.trainer,
            micro_batch_size=self.micro_batch,
            activation_checkpointing=ActivationCheckpointing(self.checkpointing),
            precision=Precision(self.precision),
            compile=self.compiled,
        )
        parallel = ParallelConfig(
            strategy=Strategy(self.strategy),
            expert_parallel_size=self.experts,
            replicate_size=self.copies,
            reshard_after_forward=not self.kept,
            prefetch=self.prefetch,
            zero_stage=self.zero_stage,
            offload=Offload(self.offload),
            deepspeed_config=str(PARTITION_ALL) if self.strategy == "deepspeed" else None,
        )
        data = replace(tiny.data, **DOCUMENTS) if self.documents else tiny.data
        cfg = replace(tiny, run_dir=str(run_dir), trainer=trainer, parallel=parallel, data=data)
        if self.ablated:
            return replace(cfg, model=replace(cfg.model, **ABLATED))
        if self.balancing:
            cfg = replace(cfg, balancing=BALANCING[self.balancing])
        if self.optimizer in OPTIMIZERS:
            lr, clipping = cfg.optimizer.lr, cfg.optimizer.max_grad_norm
            return replace(
                cfg,
                optimizer=OPTIMIZERS[self.optimizer](lr=lr, max_grad_norm=clipping),
                trainer=replace(trainer, ema_decay=0.5),
            )
        if not self.adapter:
            return cfg
        assert isinstance(cfg.optimizer, AdamWConfig)
        return replace(
            cfg,
            adapter=ADAPTERS[self.adapter],
            model=replace(cfg.model, init_from=str(base)),
            # lora_B starts at 0, and AdamW's ratio of moments is all that it consists of. With eps=1e-8 the
            # ratio is rounding error where a gradient is nearly 0, as for q_proj and k_proj here: two runs of
            # one layout then differ by up to 3e-5. With eps=1e-5 they differ by less than 1e-6.
            optimizer=replace(cfg.optimizer, eps=1e-5),
        )


def compose(values: dict[str, Any]) -> TrainConfig:
    """Return the configuration that the package composes from values by key."""
    return config.compose(*overrides(values))


def real_tokens() -> list[list[int]]:
    """Return source files of the standard library, one document per file and one token per byte.

    The ids 0 and 1 remain eos and padding.
    """
    files = sorted(Path(os.__file__).parent.glob("a*.py"))
    return [[2 + byte for byte in path.read_bytes()[:4000]] for path in files]


def write_lines(directory: Path, pattern: str) -> None:
    """Write prepared data from files of the standard library, one document per line.

    The longest documents are longer than a sequence.
    """
    files = sorted(Path(os.__file__).parent.glob(pattern))
    lines = [line for path in files for line in path.read_bytes()[:9000].splitlines() if line.strip()]
    documents = [[2 + byte for byte in line[: LENGTH + 8]] for line in lines]
    write_prepared(directory, documents, documents[:5], vocab_size=258)
