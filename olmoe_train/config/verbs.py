"""The options of every verb other than `olmoe train`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from olmoe_train.config.choices import (
    BiasExport,
    Device,
    ExportFormat,
    Gpu,
    MergeDecay,
    Optimise,
    Precision,
    StripPrefix,
    Weights,
    XAxis,
)
from olmoe_train.config.cluster import CostConfig, FailuresConfig
from olmoe_train.config.data import DataConfig, TokenizerConfig
from olmoe_train.config.doctor import DoctorConfig
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.config.launch import KubernetesConfig, SlurmConfig
from olmoe_train.config.surgery import ExpertsConfig, PruneConfig
from olmoe_train.config.train import EvaluationConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True)
class PrepareConfig:
    """Turn a corpus into tokens on disk: tokenizer, training and validation shards, and a manifest."""

    seed: int = 0
    """Decides, together with the documents' identities, which documents are held out for validation."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint of a run as a Hugging Face directory, or convert between formats and precisions."""

    source: str = MISSING
    """Run directory whose checkpoint is exported; or an HF directory or an original OLMo checkpoint
    (config.yaml with model.safetensors or model.pt) to convert."""
    step: str = "latest"
    """Step of the run to export: a number, or latest."""
    out: str | None = None
    """Directory or URL (s3://...) to write; null: hf/step-XXXXXXXX in the run directory (peft/... or olmo/...
    for the other formats; step-XXXXXXXX-ema with which=ema)."""
    max_shard_size: str = "5GB"
    """Size limit of a safetensors file, such as 5GB or 200MB. Only for format=hf: OLMo reads a single
    file."""
    precision: Precision | None = None
    """Data type of the exported weights; null: as stored, which is fp32 in a run, and in a run of an adapter
    that of its base."""
    format: ExportFormat = ExportFormat.hf
    """hf: the format of Transformers; an adapter is added to its base in fp32 and rounded once. peft: only
    the adapter of a run, in the format of PEFT. olmo: the layout of the original OLMo MoE branch (megablocks
    experts), in one file."""
    fold: BiasExport = BiasExport.refuse
    """What to do with the bias of a run with balancing=loss_free, for which no format has a parameter.
    refuse: export nothing. drop: leave the bias out, and print the validation loss with and without it on at
    most 32 sequences of each source of the run's data."""
    trust_pickle: bool = False
    """Read weights from a pickle (pytorch_model.bin, or OLMo's model.pt) with
    torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of the
    tensors."""
    tokenizer: str | None = None
    """Directory of tokenizer files, or a tokenizer.json, to export with the model; null: those of the
    source."""
    eos_token_id: int | None = None
    """End-of-text token of the exported model; null: that of the source."""
    pad_token_id: int | None = None
    """Padding token of the exported model; null: that of the source."""
    which: Weights = Weights.weights
    """Of a run. weights: the weights. ema: their average, which a run with trainer.ema_decay keeps."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate models: loss, perplexity and bits per byte on prepared data and held-out sets, and downstream
    tasks.

    Run it as `olmoe evaluate --nproc RANKS` or under torchrun, or as `olmoe evaluate` on one rank.
    """

    source: list[str] = MISSING
    """One model or several, source=A source=B or [A,B], to compare with the first one: an HF directory, a run
    directory (its newest checkpoint), RUN@STEP, RUN@all (every complete checkpoint, by step), an original
    OLMo checkpoint, or a model on the Hugging Face hub, ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision | None = None
    """Data type of the weights and of the computation; null: as stored, which is fp32 in a run. Routers
    compute in fp32 in any case."""
    device: Device = Device.auto
    """auto: cuda if there is a GPU, otherwise cpu."""
    out: str | None = None
    """JSON file to write, with all results; null: none."""
    check_overlap: str | None = None
    """Prepared training data (data.dir), to count the questions of each task that share 13 consecutive tokens
    with its training split; null: not counted."""
    trust_pickle: bool = False
    """Read weights from a pickle (pytorch_model.bin, or OLMo's model.pt) with
    torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of the
    tensors."""
    which: Weights = Weights.weights
    """Of runs; every source must then be one. weights: the weights. ema: their average, which a run with
    trainer.ema_decay keeps."""


@dataclass(frozen=True)
class AnalyzeConfig:
    """Analyze the routing of models on validation tokens: saturation, co-activation, domains, vocabulary, and
    the importance of experts."""

    source: list[str] = MISSING
    """One model or several, source=A source=B or [A,B]: an HF directory, a run directory (its newest
    checkpoint), RUN@STEP, RUN@all (every complete checkpoint, by step), an original OLMo checkpoint, or a
    model on the Hugging Face hub, ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION."""
    reference: str | None = None
    """The model with which saturation compares the others; null: the last source."""
    out: str | None = None
    """Directory to write; null: analysis in the run directory of the reference."""
    data: DataConfig = field(default_factory=DataConfig)
    micro_batch_size: int = 8
    """Sequences per forward pass of one rank."""
    max_sequences: int | None = None
    """Analyze at most this many sequences per domain, from the start of its validation split; null: all."""
    precision: Precision | None = None
    """Data type of the weights and of the computation; null: as stored, which is fp32 in a run. Routers
    compute in fp32 in any case."""
    vocabulary: bool = True
    """Whether to analyze the vocabulary. Its counts take 24 bytes x layers x vocabulary x experts on each
    rank, 1.2 GB for OLMoE-1B-7B."""
    min_count: int = 10
    """Least number of occurrences of a token id in the vocabulary analysis. An id that occurs once counts as
    wholly specialized."""
    trust_pickle: bool = False
    """Read weights from a pickle (pytorch_model.bin, or OLMo's model.pt) with
    torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of the
    tensors."""


@dataclass(frozen=True)
class UpcycleConfig:
    """Make an OLMoE from a dense model (sparse upcycling). The result is a Hugging Face directory."""

    source: str = MISSING
    """Dense model: a run or HF directory of this package with model.num_experts=1 (model=olmo_dense_*), or an
    HF directory with model_type olmo (OLMo 1)."""
    out: str = MISSING
    """HF directory to write."""
    num_experts: int = MISSING
    """Experts per layer (E)."""
    num_experts_per_tok: int = MISSING
    """Experts per token (K)."""
    intermediate_size: int | None = None
    """Hidden width of one expert (F); null: that of the dense MLP. A divisor of the dense width cuts the MLP
    into slices, and each slice becomes an expert: num_experts and num_experts_per_tok must then be multiples
    of the number of slices."""
    norm_topk_prob: bool = True
    """Normalize the top-k probabilities so that they sum to 1; the new model then starts with the outputs of
    the dense one. false, as in OLMoE-1B-7B: the outputs of the MLPs start multiplied by the sum of the
    probabilities."""
    noise_fraction: float = 0.0
    """Fraction of the weights of each copy, 0 to 1, that are replaced by random ones. The noise in OLMoE's
    script has 0.5."""
    noise_std: float = 0.02
    """Standard deviation of the random weights (truncated normal)."""
    seed: int = 0
    """Seed of the router's weights and of the noise."""
    step: str = "latest"
    """Step of the run to upcycle: a number, or latest."""
    data_dir: str | None = None
    """Prepared data (data.dir). Its first tokens are given to both models, to compare their outputs and, if
    the source is an OLMo 1, to measure the size of queries and keys. null: random tokens."""
    precision: Precision | None = None
    """Data type of the weights written; null: as stored, which is fp32 in a run."""
    max_shard_size: str = ExportConfig.max_shard_size
    """Size limit of a safetensors file, such as 5GB or 200MB."""
    trust_pickle: bool = False
    """Read weights from a pickle (pytorch_model.bin) with torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of the
    tensors."""
    tokenizer: str | None = None
    """Directory of tokenizer files, or a tokenizer.json, to write with the model; null: those of the
    source."""
    eos_token_id: int | None = None
    """End-of-text token of the new model; null: that of the source."""
    pad_token_id: int | None = None
    """Padding token of the new model; null: that of the source."""


@dataclass(frozen=True)
class MergeConfig:
    """Average models that have one architecture. The result is a Hugging Face directory."""

    sources: list[str] = MISSING
    """Models, sources=[A,B,C] or source=A source=B source=C: HF directories, run directories (their newest
    checkpoints), RUN@STEP, RUN@all (every complete checkpoint, by step), original OLMo checkpoints, or models
    on the Hugging Face hub, ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION. Tokenizer and generation config
    are those of the first."""
    out: str = MISSING
    """HF directory to write."""
    weights: Any = "uniform"
    """uniform, or a list with one number per source, such as [1,2,1]. They are divided by their sum."""
    decay: MergeDecay | None = None
    """Weights that make up for a decay of the learning rate from the first source to the last: linear, cosine
    (half a period) or sqrt (1 - sqrt(progress)). It is for checkpoints of a constant learning rate, the
    oldest first. null: `weights`."""
    precision: Precision | None = None
    """Data type of the weights written; null: that of the first source, which is fp32 in a run."""
    max_shard_size: str = ExportConfig.max_shard_size
    """Size limit of a safetensors file, such as 5GB or 200MB."""
    trust_pickle: bool = False
    """Read weights from a pickle (pytorch_model.bin, or OLMo's model.pt) with
    torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of the
    tensors."""


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Calculate what a training run would need: memory per rank, layouts that fit, speed and days.

    It accepts every key of `olmoe train`. It allocates nothing and needs neither data nor a GPU.
    """

    run_dir: str = "none"
    """Nothing is written there. With check=true it must be writable, and a checkpoint in it must fit."""
    seed: int = 0
    """No effect but with check=true on the first batch: `olmoe plan` creates no weights."""
    gpus: int = 8
    """Number of GPUs of the run, one per rank."""
    gpu: Gpu = Gpu.h100
    """Kind of GPU, the SXM or OAM module: its memory, peak and bandwidths (planning/gpus.py)."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU, in GiB; null: that of `gpu`."""
    reserve_gib: float = 6.0
    """Part of this memory that is not available for tensors, in GiB: 1 for the CUDA context and libraries,
    0.5 for the NCCL buffers of each of up to four groups of ranks, and 5% of 60 for fragmentation in the
    allocator."""
    mfu: float = 0.188
    """Model FLOPs utilization, as a fraction of the GPU's peak. The default is that of OLMoE-1B-7B's
    pretraining: 23,600 tokens/s per GPU on H100s (arXiv 2409.02060, section 4.1.1)."""
    gpu_tflops: float | None = None
    """Dense peak of one GPU in trainer.precision, in TFLOP/s; null: that of `gpu`."""
    optimise: Optimise = Optimise.none
    """tokens_per_day: rank the layouts of fsdp and ddp that fit by a cost model, and plan the best one."""
    cost: CostConfig = field(default_factory=CostConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    check: bool = False
    """Build the run on fake ranks instead: mesh, shards, first batch, a step, the files of a checkpoint and
    of an export. It reads data.dir, model.init_from and run_dir where they exist, and needs no GPU."""


@dataclass(frozen=True)
class LogprobsConfig(TrainConfig):
    """Compute the log-probabilities of the reference for preference tuning, and store them.

    It accepts every key of `olmoe train`, and reads those of the model, the data, the batch sizes and the
    layout.
    """


@dataclass(frozen=True)
class DashboardConfig:
    """Make or update the W&B workspace of a run, or of several runs to compare."""

    source: list[str] = MISSING
    """Run directories; several are compared: source=A source=B, or source=[A,B]. They must be runs of wandb:
    their wandb.json holds the run's id."""
    entity: str | None = None
    """User or team of W&B; null: logging.wandb.entity of the runs, WANDB_ENTITY, or the default of
    the account, in this order."""
    project: str | None = None
    """Project of W&B that has the runs; null: logging.wandb.project of the runs."""
    name: str | None = None
    """Name of the workspace and title of the report; null: the names of the runs."""
    x_axis: XAxis = XAxis.step
    """Horizontal axis of the charts: optimizer steps, or tokens trained on."""
    report: bool = False
    """Also make a W&B Report: a page with a table of the runs and the charts of the workspace."""
    dry_run: bool = False
    """Write the JSON to `out` and connect to no server. --dry-run is the same."""
    out: str | None = None
    """JSON file to write; null: dashboard.json in the first run directory with dry_run=true, otherwise
    none."""


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML file about one or more runs, or follow runs that are training in a browser."""

    source: list[str] = MISSING
    """Run directories, or metrics.jsonl files; several are overlaid: source=A source=B, or source=[A,B]."""
    out: str | None = None
    """HTML file to write, replaced if it is there; null: report.html in the first run directory. No effect
    with serve=true."""
    serve: bool = False
    """Serve the report on 127.0.0.1 until Ctrl-C, and update the open page as the runs go on."""
    port: int = 8320
    """TCP port of serve=true; 0: any free one."""


@dataclass(frozen=True)
class ExplainConfig:
    """Name the documents of one optimizer step of a run, with their shares of its loss and gradient.

    Run it as `olmoe explain --nproc RANKS` or under torchrun, or as `olmoe explain` on one rank.
    """

    source: str = MISSING
    """Run directory."""
    step: int = MISSING
    """Optimizer step, counted from 1."""
    out: str | None = None
    """JSON file to write; null: explain/step-XXXXXXXX.json in the run directory."""
    top: int = 20
    """Documents to look at closely: with gradient, routing and the beginning of the text. They are those with
    the most loss above the step's mean. Loss and origin are given of all documents."""
    gradients: bool = True
    """Compute the share of the gradient, with one backward pass for each of these documents and two for the
    step."""
    data_dir: str | None = None
    """Prepared data (data.dir); null: where the run had it."""
    expert_parallel_size: int = 1
    """Ranks among which the experts of a layer are distributed. The layout of the run does not matter."""
    device: Device = Device.auto
    """auto: cuda if there is a GPU, otherwise cpu."""


VERBS: dict[str, type] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "upcycle": UpcycleConfig,
    "merge": MergeConfig,
    "plan": PlanConfig,
    "doctor": DoctorConfig,
    "logprobs": LogprobsConfig,
    "dashboard": DashboardConfig,
    "report": ReportConfig,
    "explain": ExplainConfig,
    "analyze": AnalyzeConfig,
    "experts": ExpertsConfig,
    "prune": PruneConfig,
    "launch_slurm": SlurmConfig,
    "launch_k8s": KubernetesConfig,
}
"""The config dataclass of each verb; the two of `olmoe launch` are those of its launchers."""
