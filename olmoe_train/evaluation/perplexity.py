"""Validation loss and perplexity of a run's newest checkpoint or an HF directory.

The loss is the mean over all target tokens, however they fall into sequences, batches and ranks.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import build_eval_batches
from olmoe_train.data.mixture import VALIDATION, mixture_components, read_manifests
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import IGNORE_INDEX

Batches = Iterable[dict[str, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy, nats a target token."""
    tokens: int
    """Target tokens: each has a label and a token before it."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate_data(
    model: OlmoeForCausalLM,
    data: DataConfig,
    cfg: EvaluationConfig,
    device: torch.device,
    watched: Callable[[Batches], Batches] = iter,
) -> dict[str, Evaluation]:
    """By name, each source of the mixture that has a validation split; last, as "validation", all its tokens
    together. Collective where there are ranks. watched: passes batches on, and sees that there is progress.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    manifests = read_manifests(data)
    chosen = [source for source in mixture_components(data) if manifests[source.name].validation.tokens]
    results = {}
    for source in chosen or mixture_components(data)[:1]:  # of which the loader then says that it is empty
        one = replace(data, dir=str(source.directory), mixture=[])
        batches = build_eval_batches(one, rank, world_size, cfg.micro_batch_size, cfg.max_sequences)
        results[source.name] = evaluate_model(model, watched(batches), device)
    parts = list(results.values())
    if len(parts) > 1:
        tokens = sum(part.tokens for part in parts)
        loss = sum(part.loss * part.tokens for part in parts if part.tokens) / max(1, tokens)
        parts.append(Evaluation(loss if tokens else math.nan, tokens))
    return results | {VALIDATION: parts[-1]}


def evaluate_model(model: OlmoeForCausalLM, batches: Batches, device: torch.device) -> Evaluation:
    """Mean loss over every target token of all ranks' batches; leaves the model's mode as it was.

    batches: keyword arguments of training_forward, [B, S] on any device; as many on every rank,
    because a sharded model's forward is a collective. Sums are fp64.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of target tokens
    with torch.no_grad():
        for batch in batches:
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            sums[0] += model.training_forward(**inputs).ce_sum
            sums[1] += (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss_sum, tokens = sums.tolist()
    return Evaluation(loss_sum / tokens if tokens else math.nan, int(tokens))
