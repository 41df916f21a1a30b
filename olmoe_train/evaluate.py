"""Validation loss and perplexity of a run's newest checkpoint or an HF directory.

The loss is the mean over all target tokens, however they fall into sequences, batches and ranks.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.source import load_source
from olmoe_train.cli import run_verb
from olmoe_train.config import EvaluateConfig
from olmoe_train.data.loader import build_eval_batches
from olmoe_train.data.tokens import Manifest, read_manifest
from olmoe_train.errors import UserError
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.losses import IGNORE_INDEX


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


def evaluate_model(
    model: OlmoeForCausalLM, batches: Iterable[dict[str, Tensor]], device: torch.device
) -> Evaluation:
    """Mean loss over every target token of all ranks' batches; leaves the model's mode as it was.

    batches: input_ids, labels and perhaps attention_mask, [B, S] int64 on any device; as many on every rank,
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
    manifest = read_manifest(cfg.data.dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_source(cfg.source, device, cfg.trust_pickle)
    check_data(model.config, manifest, cfg)
    batches = build_eval_batches(
        cfg.data, 0, 1, cfg.evaluation.micro_batch_size, cfg.evaluation.max_sequences
    )
    result = evaluate_model(model, batches, device)
    print(f"source           {cfg.source}")
    print(f"loss             {result.loss:.4f} nats a token")
    print(f"perplexity       {result.perplexity:.2f}")
    print(f"tokens           {result.tokens:,}")
    if manifest.unigram_entropy is not None:
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
