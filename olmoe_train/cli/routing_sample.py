"""The model and the sample of `olmoe experts` and `olmoe prune`: opens both, and counts the routing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader

from olmoe_train.checkpoint.convert.adapter_base import WeightHash
from olmoe_train.checkpoint.convert.stored_model import StoredModel
from olmoe_train.cli.analyze_sources import tokenizer_errors
from olmoe_train.cli.model_sources import check_data, open_source
from olmoe_train.config.choices import DataSplit
from olmoe_train.config.surgery import SampledRoutingConfig
from olmoe_train.data.mixture import read_manifests, verify
from olmoe_train.data.source_errors import mixture_errors
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.distributed.rendezvous import leave_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.hf.directory import parameter_shapes
from olmoe_train.reporting.routing_counts import Batch, RoutingCounts, count_routing, domain_batches
from olmoe_train.reporting.routing_sample import TrainingSample, training_sample
from olmoe_train.utils.errors import UserError

LEAVE_S = 600.0
"""Longest time that ranks wait for each other when they meet and when they leave, in seconds."""


@contextmanager
def all_ranks() -> Iterator[torch.device]:
    """The process group of the ranks, within the block; the device of this rank."""
    device = init_distributed(timeout_s=LEAVE_S)
    try:
        yield device
    finally:
        leave_distributed(LEAVE_S)


def open_checked(cfg: SampledRoutingConfig) -> StoredModel:
    """Open the model, and check that it has routers and that the data fits it. Collective.

    Raises:
        UserError: The model, the data or an option is wrong; the message names the key and the fix.
    """
    errors = mixture_errors(cfg.data)
    for key in ("micro_batch_size", "max_sequences"):
        if getattr(cfg, key) < 1:
            errors.append(f"{key}={getattr(cfg, key)}: must be positive")
    if errors:
        raise UserError("\n  ".join(errors))
    verify(cfg.data)
    stored = open_source(cfg.source, cfg.trust_pickle, cfg.strip_prefix)
    if stored.config.num_experts == 1:
        raise UserError(f"source={cfg.source}: is a dense model, which has no experts to choose from")
    if stored.config.routing == "expert_choice":
        raise UserError(
            f"source={cfg.source}: has model.routing=expert_choice, and here experts are judged by the "
            "tokens that choose them"
        )
    check_data(stored.config, next(iter(read_manifests(cfg.data).values())), cfg.data)
    if errors := tokenizer_errors(cfg.source, stored.tokenizer, cfg.data):
        raise UserError("\n  ".join(errors))
    return stored


def count_sample(model: OlmoeForCausalLM, cfg: SampledRoutingConfig, device: torch.device) -> RoutingCounts:
    """Count the routing of a whole model on the sample. Collective.

    Returns:
        The counts over the tokens of all ranks; the same for any number of ranks.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches: Sequence[DataLoader[Batch] | TrainingSample]
    if cfg.split is DataSplit.validation:
        batches = domain_batches(cfg.data, cfg.micro_batch_size, cfg.max_sequences, rank, ranks)
    else:
        batches = [training_sample(cfg.data, cfg.max_sequences, cfg.micro_batch_size, rank, ranks)]
    with Progress(console=Console(stderr=True), disable=rank != 0, transient=True) as progress:
        bar = progress.add_task("routing", total=sum(len(one) for one in batches))
        return count_routing(model, batches, device, False, None, partial(progress.advance, bar))


def sample_facts(cfg: SampledRoutingConfig, counts: RoutingCounts) -> dict[str, object]:
    """What the sample was, as YAML values."""
    sources = {"mixture": [one.dir for one in cfg.data.mixture]} if cfg.data.mixture else {}
    return {
        "data": cfg.data.dir,
        **sources,
        "split": cfg.split.value,
        "sequence_length": cfg.data.sequence_length,
        "tokens": int(counts.tokens_N.sum()),
    }


def source_facts(name: str, stored: StoredModel) -> dict[str, object]:
    """What the model was: its name, and a hash of all its weights, which are read for it."""
    digest = WeightHash()
    for parameter in parameter_shapes(OlmoeForCausalLM, stored.config):
        digest.add(parameter, stored.read(parameter))
    return {"name": name, "xxh3_128": digest.hexdigest()}
