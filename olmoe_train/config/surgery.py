"""The options of the verbs that choose among the experts of a model by their routing of sampled data."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from olmoe_train.config.choices import DataSplit, Precision, PruneBy, Relevance, StripPrefix
from olmoe_train.config.data import DataConfig


@dataclass(frozen=True)
class SampledRoutingConfig:
    """A model, and the data on which its routing is counted."""

    source: str = MISSING
    """The model: an HF directory, a run directory (its newest checkpoint), RUN@STEP, an original OLMo
    checkpoint, or a model on the Hugging Face hub, ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION."""
    data: DataConfig = field(default_factory=DataConfig)
    split: DataSplit = DataSplit.train
    """Split of the data that is sampled. train: in the order of a training run with seed 0. validation: from
    its start."""
    max_sequences: int = 256
    """Sequences to sample, at most one epoch of training data. With data.mixture and split=validation, this
    many of each source."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one rank."""
    trust_pickle: bool = False
    """Read weights from a pickle (pytorch_model.bin, or OLMo's model.pt) with
    torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of the
    tensors."""


@dataclass(frozen=True)
class ExpertsConfig(SampledRoutingConfig):
    """Select the experts of each layer that matter most for a task, for expert-specialized fine-tuning
    (ESFT). trainer.train_only trains only these."""

    select: Relevance = Relevance.token
    """Relevance of an expert to the data; over the experts of a layer it sums to 1. token: its share of the
    K choices of a token. gate: its share of the routing weights of the K chosen experts."""
    p: float = 0.2
    """Relevance to reach, above 0 and up to 1: of each layer the smallest set of experts whose relevance sums
    to p or more is selected."""
    out: str = MISSING
    """File to write (YAML)."""
    precision: Precision | None = None
    """Data type of the weights and of the computation; null: as stored, which is fp32 in a run. Routers
    compute in fp32 in any case."""


@dataclass(frozen=True)
class PruneConfig(SampledRoutingConfig):
    """Keep some experts of each layer, chosen on a sample of data, and remove the others. The result is a
    Hugging Face directory."""

    keep: int = MISSING
    """Experts to keep in each layer (N), at least num_experts_per_tok of the model."""
    by: PruneBy = PruneBy.reap
    """What keeps an expert. reap: mean of routing weight x 2-norm of the expert's output over the tokens that
    it processes (REAP, arXiv 2510.13999). frequency: number of these tokens."""
    out: str = MISSING
    """HF directory to write."""
    validation_sequences: int | None = 128
    """Compare the losses of both models on at most this many sequences of each validation split; null: on
    all, 0: no comparison."""
    precision: Precision | None = None
    """Data type of the weights written; null: as stored, which is fp32 in a run. The sample is computed in
    the stored one."""
    max_shard_size: str = "5GB"
    """Size limit of a safetensors file, such as 5GB or 200MB."""
