"""The options that have a fixed set of choices, by the names that YAML and the command line use."""

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Precision(Enum):
    """Data type of the computation, or of exported weights."""

    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def dtype(self) -> "torch.dtype":
        # Imported here: options are read and refused, and their help is printed, without torch.
        import torch

        return torch.bfloat16 if self is Precision.bf16 else torch.float32


class ExportFormat(Enum):
    hf = "hf"
    peft = "peft"
    olmo = "olmo"


class BiasExport(Enum):
    refuse = "refuse"
    drop = "drop"


class StripPrefix(Enum):
    none = "none"
    auto = "auto"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ActivationCheckpointing(Enum):
    none = "none"
    selective = "selective"
    full = "full"


class Strategy(Enum):
    fsdp = "fsdp"
    ddp = "ddp"
    deepspeed = "deepspeed"


class Offload(Enum):
    none = "none"
    optimizer = "optimizer"
    parameters = "parameters"


class Convention(Enum):
    olmoe = "olmoe"
    olmoe_0924 = "olmoe_0924"
    hf = "hf"
    megatron = "megatron"


class BalanceScope(Enum):
    micro_batch = "micro_batch"
    all_ranks = "all_ranks"
    running = "running"
    global_batch = "global_batch"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class DecayShape(Enum):
    linear = "linear"
    sqrt = "sqrt"
    cosine = "cosine"


class MergeDecay(Enum):
    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"


class MuonScale(Enum):
    match_rms = "match_rms"
    spectral = "spectral"


class Weights(Enum):
    weights = "weights"
    ema = "ema"


class WandbMode(Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


class XAxis(Enum):
    step = "step"
    tokens = "tokens"


class DataFormat(Enum):
    prepared = "prepared"
    olmo = "olmo"


class TokenDtype(Enum):
    uint16 = "uint16"
    uint32 = "uint32"


class SourceKind(Enum):
    python_stdlib = "python_stdlib"
    files = "files"
    datasets = "datasets"


class Records(Enum):
    text = "text"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    preference = "preference"
    unpaired_preference = "unpaired_preference"


class LearnedTurns(Enum):
    all = "all"
    last = "last"
    marked = "marked"
    completion = "completion"


class Turns(Enum):
    together = "together"
    expand = "expand"


class OnBadRecord(Enum):
    strict = "strict"
    quarantine = "quarantine"


class Packing(Enum):
    concat = "concat"
    best_fit = "best_fit"
    none = "none"


class Truncate(Enum):
    drop = "drop"
    prompt_start = "prompt_start"
    completion_end = "completion_end"


class PreferenceKind(Enum):
    dpo = "dpo"
    dpo_norm = "dpo_norm"
    ipo = "ipo"
    simpo = "simpo"
    orpo = "orpo"
    kto = "kto"


class Reference(Enum):
    cached = "cached"
    live = "live"
    none = "none"


class RewardKind(Enum):
    exact = "exact"
    regex = "regex"
    python = "python"


class RoutingUse(Enum):
    record = "record"
    replay = "replay"


class IpoLogProbs(Enum):
    per_token = "per_token"
    summed = "summed"


class ExpertsBackend(Enum):
    auto = "auto"
    loop = "loop"
    grouped_mm = "grouped_mm"
    sonicmoe = "sonicmoe"


class RoutingKind(Enum):
    token_choice = "token_choice"
    expert_choice = "expert_choice"


class Norm(Enum):
    rms = "rms"
    nonparametric = "nonparametric"


class Initialization(Enum):
    truncated_normal = "truncated_normal"
    normal = "normal"


class AdapterTarget(Enum):
    attention = "attention"
    experts = "experts"
    lm_head = "lm_head"
    embeddings = "embeddings"


class RouterTraining(Enum):
    frozen = "frozen"
    full = "full"


class AdapterScaling(Enum):
    standard = "standard"
    rslora = "rslora"


class QuantizeBase(Enum):
    none = "none"
    nf4 = "nf4"


class DataSplit(Enum):
    train = "train"
    validation = "validation"


class Relevance(Enum):
    gate = "gate"
    token = "token"


class PruneBy(Enum):
    frequency = "frequency"
    reap = "reap"


class Gpu(Enum):
    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"
    mi300x = "mi300x"


class Optimise(Enum):
    none = "none"
    tokens_per_day = "tokens_per_day"
