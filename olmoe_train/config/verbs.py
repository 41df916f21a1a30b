"""The options of every verb but `olmoe train`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from olmoe_train.config.choices import (
    ExportFormat,
    Precision,
)
from olmoe_train.config.data import DataConfig, TokenizerConfig
from olmoe_train.config.train import EvaluationConfig, TrainConfig


@dataclass(frozen=True)
class PrepareConfig:
    seed: int = 0
    """Salt of the split into training and validation documents."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass(frozen=True)
class ExportConfig:
    source: str = MISSING
    """Run directory whose checkpoint is exported; or an HF directory or original OLMo checkpoint (config.yaml
    with model.safetensors or model.pt) to convert."""
    step: str = "latest"
    """Step of a run to export: a number, or latest."""
    out: str | None = None
    """Directory to write; null: hf/step-XXXXXXXX (olmo/step-XXXXXXXX) in the run directory."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, e.g. 5GB or 200MB. format=hf only: OLMo reads one file."""
    precision: Precision | None = None
    """Data type of the exported weights: bf16, fp32; null: as stored, which in a run is fp32."""
    format: ExportFormat = ExportFormat.hf
    """hf: what Transformers reads. olmo: the original OLMo MoE branch's layout (megablocks experts), in one
    file."""
    trust_pickle: bool = False
    """Read weights that are a pickle (pytorch_model.bin, OLMo's model.pt): torch.load(weights_only=True)."""
    tokenizer: str | None = None
    """Directory of tokenizer files, or a tokenizer.json, to put beside the model; null: the source's own."""
    eos_token_id: int | None = None
    """End-of-text token of the exported model; null: the source's."""
    pad_token_id: int | None = None
    """Padding token of the exported model; null: the source's."""


@dataclass(frozen=True)
class GenerateConfig:
    source: str = MISSING
    """HF directory, run directory (its newest checkpoint), or original OLMo checkpoint."""
    prompt: str = MISSING
    """Text to continue."""
    max_new_tokens: int = 64
    """Most tokens to add."""
    temperature: float = 0.0
    """0: greedy; else softmax temperature."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to top_p."""
    seed: int = 0
    """Seed of the sampling."""
    trust_pickle: bool = False
    """Read weights that are a pickle (pytorch_model.bin, OLMo's model.pt): torch.load(weights_only=True)."""


@dataclass(frozen=True)
class EvaluateConfig:
    source: str = MISSING
    """HF directory, run directory (its newest checkpoint), or original OLMo checkpoint."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trust_pickle: bool = False
    """Read weights that are a pickle (pytorch_model.bin, OLMo's model.pt): torch.load(weights_only=True)."""


@dataclass(frozen=True)
class UpcycleConfig:
    source: str = MISSING
    """Dense model: a run or HF directory of this package with model.num_experts=1 (model=olmo_dense_*), or an
    HF directory with model_type olmo (OLMo 1)."""
    out: str = MISSING
    """HF directory to write."""
    num_experts: int = MISSING
    """Experts a layer (E)."""
    num_experts_per_tok: int = MISSING
    """Experts a token is sent to (K)."""
    intermediate_size: int | None = None
    """Width of one expert (F); null: the dense MLP's. A divisor of it cuts the MLP into slices, each an
    expert: num_experts and num_experts_per_tok are then multiples of their number."""
    norm_topk_prob: bool = True
    """Renormalise the top-k probabilities to sum to 1: the new model starts with the dense one's outputs.
    false, as OLMoE-1B-7B has it: the MLPs' outputs start multiplied by the sum of the probabilities."""
    noise_fraction: float = 0.0
    """Share of each copy's weights, 0 to 1, that are drawn anew; the noise in OLMoE's script has 0.5."""
    noise_std: float = 0.02
    """Standard deviation of what is drawn anew (truncated normal)."""
    seed: int = 0
    """Seed of the router and of the noise."""
    step: str = "latest"
    """Step of a run to upcycle: a number, or latest."""
    data_dir: str | None = None
    """Prepared data (data.dir) whose first tokens both models are run on, to compare them, and to measure the
    size of queries and keys where source is an OLMo 1; null: random tokens."""
    precision: Precision | None = None
    """Data type of the weights written: bf16, fp32; null: as stored, which in a run is fp32."""
    max_shard_size: str = ExportConfig.max_shard_size
    """Largest safetensors file, e.g. 5GB or 200MB."""
    trust_pickle: bool = False
    """Read weights that are a pickle (pytorch_model.bin): torch.load(weights_only=True)."""
    tokenizer: str | None = None
    """Directory of tokenizer files, or a tokenizer.json, to put beside the model; null: the source's own."""
    eos_token_id: int | None = None
    """End-of-text token of the new model; null: the source's."""
    pad_token_id: int | None = None
    """Padding token of the new model; null: the source's."""


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    run_dir: str = "none"
    """No effect: nothing is written."""
    seed: int = 0
    """No effect: no weight is drawn."""
    gpus: int = 8
    """GPUs of the run, one a rank."""
    gpu_memory_gib: float = 80.0
    """Memory of one GPU, GiB."""
    reserve_gib: float = 6.0
    """Part of it that tensors cannot have, GiB: CUDA context and libraries 1, NCCL buffers 0.5 for each of
    up to four groups of ranks, the allocator's fragments 5% of 60."""
    mfu: float = 0.188
    """Model FLOPs utilisation, a share of the GPU's peak. Default: OLMoE-1B-7B's own pretraining, 23,600
    tokens/s a GPU on H100s (arXiv 2409.02060, section 4.1.1)."""
    gpu_tflops: float | None = None
    """Dense peak of one GPU in trainer.precision, TFLOP/s; null: an H100's (SXM), 989.5 in bf16 and 67 in
    fp32."""
