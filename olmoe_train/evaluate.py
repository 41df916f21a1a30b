"""Validation loss and perplexity of a run's newest checkpoint or an HF directory.

The loss is the mean over all target tokens, however they fall into sequences, batches and ranks.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.source import load_source
from olmoe_train.cli import run_verb
from olmoe_train.config import DataConfig, EvaluateConfig, EvaluationConfig
from olmoe_train.data.loader import build_eval_batches
from olmoe_train.data.mixture import VALIDATION, mixture_errors, read_manifests, sources, verify
from olmoe_train.data.tokens import Manifest
from olmoe_train.errors import UserError
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.losses import IGNORE_INDEX

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
    chosen = [source for source in sources(data) if manifests[source.name].validation.tokens]
    results = {}
    for source in chosen or sources(data)[:1]:  # of which the loader then says that it is empty
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


def main(cfg: EvaluateConfig) -> None:
    if errors := mixture_errors(cfg.data):
        raise UserError("\n  ".join(errors))
    manifest = next(iter(read_manifests(cfg.data).values()))
    verify(cfg.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_source(cfg.source, device, cfg.trust_pickle)
    check_data(model.config, manifest, cfg)
    results = evaluate_data(model, cfg.data, cfg.evaluation, device)
    result = results.pop(VALIDATION)
    print(f"source           {cfg.source}")
    for name, part in results.items():
        print(f"  {name}: loss {part.loss:.4f}, perplexity {part.perplexity:.2f}, tokens {part.tokens:,}")
    print(f"loss             {result.loss:.4f} nats a token")
    print(f"perplexity       {result.perplexity:.2f}")
    print(f"tokens           {result.tokens:,}")
    if not cfg.data.mixture and manifest.unigram_entropy is not None:
        print(f"unigram entropy  {manifest.unigram_entropy:.4f} nats a token (guessing by frequency alone)")


def check_data(config: OlmoeConfig, manifest: Manifest, cfg: EvaluateConfig) -> None:
    """UserError, with all reasons, where the model cannot read this data or was made for other tokens."""
    errors = []
    if manifest.vocab_size > config.vocab_size:
        errors.append(
            f"data.dir={cfg.data.dir} has token ids up to {manifest.vocab_size - 1}, the model has "
            f"{config.vocab_size} embeddings: evaluate on data that its own tokenizer made"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if manifest.eos_token_id not in ends:
        errors.append(
            f"documents in data.dir={cfg.data.dir} end with token {manifest.eos_token_id}, the model's "
            f"eos_token_id is {config.eos_token_id}: another tokenizer made this data"
        )
    if cfg.data.sequence_length > config.max_position_embeddings:
        errors.append(
            f"data.sequence_length={cfg.data.sequence_length} is beyond the model's max_position_embeddings="
            f"{config.max_position_embeddings}: lower it"
        )
    if errors:
        raise UserError("\n  ".join(errors))


def run() -> int:
    return run_verb("evaluate", EvaluateConfig, main)


if __name__ == "__main__":
    sys.exit(run())
