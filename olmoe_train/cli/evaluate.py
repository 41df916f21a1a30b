"""Validation loss and perplexity of a run's newest checkpoint or of a Hugging Face directory.

The loss is the mean over all target tokens, however they fall into sequences, batches and ranks.
"""

import sys

from olmoe_train.checkpoint.convert.source import load_source
from olmoe_train.cli.app import run_verb
from olmoe_train.config.verbs import EvaluateConfig
from olmoe_train.data.mixture import VALIDATION, mixture_errors, read_manifests, verify
from olmoe_train.data.tokens import Manifest
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.evaluation.perplexity import evaluate_data
from olmoe_train.model import OlmoeConfig
from olmoe_train.utils.errors import UserError


def main(cfg: EvaluateConfig) -> None:
    if errors := mixture_errors(cfg.data):
        raise UserError("\n  ".join(errors))
    manifest = next(iter(read_manifests(cfg.data).values()))
    verify(cfg.data)
    device = resolve_device()
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
    return run_verb("evaluate", EvaluateConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
