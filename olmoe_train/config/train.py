"""Every option of every verb: frozen dataclasses, checked before anything is allocated.

Hydra composes YAML from configs/ onto these schemas (cli.py), `OmegaConf.to_object` turns the result into the
dataclasses once at start-up, and `validate()` (validation.py) reports all cross-field errors at once. The
string under a field is its documentation: meaning, then unit; `olmoe VERB --help` prints it.
"""

from dataclasses import dataclass, field

from olmoe_train.config.adapter import AdapterConfig, NoAdapterConfig
from olmoe_train.config.balancing import AuxiliaryLossConfig, BalancingConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    Convention,
    Device,
    Offload,
    Precision,
    Schedule,
    Strategy,
    WandbMode,
)
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.objective import NextTokenConfig, ObjectiveConfig
from olmoe_train.config.optimizer import AdamWConfig, OptimizerConfig


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int | None = None
    """Optimizer steps in the whole run, which ends at max_steps, max_tokens or max_epochs, whichever comes
    first."""
    max_tokens: int | None = None
    """Training tokens in the whole run."""
    max_epochs: float | None = None
    """Passes over the training data in the whole run, rounded up to whole steps: the last step is filled with
    the next epoch's first sequences. With a mixture, its sources' token budgets together are an epoch."""
    stop_at_step: int | None = None
    """Stop here with a checkpoint, the schedule untouched; run again without it to continue."""
    global_batch_size: int = 16
    """Sequences an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = 8
    """Sequences a forward pass of one rank."""
    precision: Precision = Precision.bf16
    """bf16: compute in bfloat16 with fp32 master weights and fp32 gradient reduction. fp32: everything
    fp32."""
    device: Device = Device.auto
    """auto: cuda where there is one, else cpu."""
    log_every: int = 10
    """Steps between logged metrics."""
    timeout: float = 600.0
    """Seconds for a step or a save, after which every rank tells where it stands and the run ends."""
    max_skipped_steps: int = 10
    """How many of the last 128 steps may be skipped (gradient not finite) before the run stops."""
    spike_sigmas: float | None = None
    """Skip a step whose loss or gradient norm is so many deviations above the last 128's mean; null: off."""
    compile: bool = False
    """torch.compile each decoder layer."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """Recompute activations in backward: none, selective (keep matmul outputs), full (keep layer inputs
    only)."""


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Strategy = Strategy.fsdp
    """fsdp: shard parameters, gradients and optimizer (FSDP2). ddp: a whole copy on every rank. deepspeed:
    ZeRO, whose stage is zero_stage."""
    expert_parallel_size: int = 1
    """Ranks that share the experts of a layer, each holding num_experts / expert_parallel_size of them and
    seeing its own data; tokens travel by all-to-all. Divides the experts, and the ranks of a model copy."""
    replicate_size: int = 1
    """HSDP: number of model copies; each is sharded over world_size / replicate_size ranks. fsdp only."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward, and gather them again in its backward. false: keep
    them, one all-gather less a layer and micro-batch for the memory of the whole model. fsdp only."""
    prefetch: int = 1
    """Layers whose weights are asked for ahead of the one that computes, in forward and in backward; each
    takes the memory of one layer. 0: in their turn. fsdp only."""
    zero_stage: int = 2
    """What DeepSpeed shards over the ranks: 0 nothing, 1 the optimizer, 2 gradients too, 3 parameters too.
    deepspeed only."""
    offload: Offload = Offload.none
    """What DeepSpeed keeps in CPU memory: none, optimizer (with the fp32 weights; the update is made there),
    parameters (zero_stage 3: they too). deepspeed only."""
    deepspeed_config: str | None = None
    """JSON file of DeepSpeed options to add to those that this run generates, which are written to
    run_dir/deepspeed.json. deepspeed only."""


@dataclass(frozen=True)
class LossConfig:
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss in the total; none in a dense model's (model.num_experts=1)."""
    router_z_loss_coef: float = 0.001
    """Weight of the router z-loss in the total; none in a dense model's."""
    convention: Convention = Convention.olmoe
    """How both router losses are normalised: olmoe (paper), olmoe_0924 (as released), hf (pooled),
    megatron (summed)."""


@dataclass(frozen=True)
class SchedulerConfig:
    kind: Schedule = Schedule.cosine
    """Shape after warm-up."""
    warmup_steps: int | None = None
    """Linear warm-up in optimizer steps. Set at most one of warmup_steps, warmup_tokens and
    warmup_fraction."""
    warmup_tokens: int | None = None
    """Linear warm-up in tokens."""
    warmup_fraction: float | None = None
    """Linear warm-up as a share of the decay horizon, 0 to 1."""
    warmup_start_factor: float = 0.1
    """Learning rate at step 0, as a share of the peak."""
    decay_steps: int | None = None
    """Step at which the decay ends. Null here and in decay_tokens: the end of the run."""
    decay_tokens: int | None = None
    """Tokens at which the decay ends."""
    final_factor: float = 0.1
    """Learning rate at the end of the decay and after, as a share of the peak."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest complete checkpoints to keep; 0: all. Older ones are deleted once the newest is verified."""
    keep_every: int = 0
    """Keep for good the checkpoints of steps that this divides; 0: none."""
    export_every: int = 0
    """Steps between exports to run_dir/hf, each of a checkpoint that is saved for it; 0: none."""
    async_save: bool = False
    """Write in the background, from a copy in the host's memory (12 bytes a parameter, over all ranks)."""
    max_failures: int = 3
    """Saves that may fail in a row before the run ends; it goes on after fewer."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint of run_dir, if any; never: start anew in an empty
    run_dir; a path: continue from that checkpoint directory."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys or sections ([optimizer.lr]) whose change resuming accepts although it alters the mathematics."""


@dataclass(frozen=True)
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    """online (needs an API key; falls back to offline without one), offline (files under run_dir/wandb),
    disabled."""
    project: str = "olmoe-train"
    """Project the run is filed under."""
    name: str | None = None
    """Display name; null: the name of run_dir."""


@dataclass(frozen=True)
class LoggingConfig:
    dead_expert_steps: int = 100
    """An expert without a token for so many steps counts as dead, in router/dead_experts and a warning."""
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 0
    """Steps between validations; 0: only before the first and after the last step."""
    at_start: bool = True
    """Validate before the first step."""
    micro_batch_size: int = 8
    """Sequences a validation forward pass of one rank."""
    max_sequences: int | None = None
    """Validate on the first so many sequences; null: the whole validation split."""


@dataclass(frozen=True)
class TrainConfig:
    run_dir: str = "runs/train"
    """Where config, metrics, checkpoints, exports and logs of this run go; relative to the working
    directory."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    objective: ObjectiveConfig = field(default_factory=NextTokenConfig)
    balancing: BalancingConfig = field(default_factory=AuxiliaryLossConfig)
    adapter: AdapterConfig = field(default_factory=NoAdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
