"""Compute validation loss and perplexity of a run's newest checkpoint, or of a Hugging Face directory.

The loss is the mean over all target tokens. It does not depend on how tokens are divided into sequences,
batches and ranks.
"""

import sys

from olmoe_train.checkpoint.convert.stored_model import load_stored_model
from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import StripPrefix
from olmoe_train.config.verbs import AnalyzeConfig, EvaluateConfig
from olmoe_train.data.manifest import Manifest
from olmoe_train.data.mixture import VALIDATION, mixture_errors, read_manifests, verify
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.evaluation.perplexity import evaluate_data
from olmoe_train.evaluation.samples import sample_prompts
from olmoe_train.model import OlmoeConfig
from olmoe_train.utils.errors import UserError


def main(cfg: EvaluateConfig) -> None:
    """Evaluate the model, and print loss, perplexity and number of tokens of every source of the data."""
    if errors := mixture_errors(cfg.data):
        raise UserError("\n  ".join(errors))
    manifest = next(iter(read_manifests(cfg.data).values()))
    verify(cfg.data)
    device = resolve_device()
    model, directory = load_stored_model(
        cfg.source, device, cfg.trust_pickle, cfg.strip_prefix is StripPrefix.auto
    )
    check_data(model.config, manifest, cfg)
    results = evaluate_data(model, cfg.data, cfg.evaluation, device, check_finite=True)
    total = results.pop(VALIDATION)
    print(f"source           {cfg.source}")
    for name, part in results.items():
        print(f"  {name}: loss {part.loss:.4f}, perplexity {part.perplexity:.2f}, tokens {part.tokens:,}")
    print(f"loss             {total.loss:.4f} nats per token")
    print(f"perplexity       {total.perplexity:.2f}")
    print(f"tokens           {total.tokens:,}")
    if not cfg.data.mixture and manifest.unigram_entropy is not None:
        entropy = f"{manifest.unigram_entropy:.4f} nats per token"
        print(f"unigram entropy  {entropy} (the loss of predictions from token frequencies only)")
    if cfg.evaluation.prompts:
        tokenizer, evaluation = load_tokenizer(directory), cfg.evaluation
        samples = sample_prompts(model, tokenizer, evaluation.prompts, evaluation.sample_tokens, device)
        for sample in samples:
            print(f"\n{sample['prompt']}{sample['completion']}")


def check_data(config: OlmoeConfig, manifest: Manifest, cfg: EvaluateConfig | AnalyzeConfig) -> None:
    """Check that prepared data fits a model.

    Args:
        config: Architecture of the model.
        manifest: Manifest of the data.
        cfg: The options.

    Raises:
        UserError: The model cannot read the data, or the data was made by another tokenizer than the
            model's; the message lists all reasons.
    """
    errors = []
    if manifest.preferences is not None:
        errors.append(
            f"data.dir={cfg.data.dir} holds preferences, and this command computes the loss of texts: give "
            "other data; a run with objective=preference validates on preferences"
        )
    if manifest.vocab_size > config.vocab_size:
        errors.append(
            f"data.dir={cfg.data.dir} has token ids up to {manifest.vocab_size - 1}, but the model has only "
            f"{config.vocab_size} embeddings: prepare the data with the model's own tokenizer"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if manifest.eos_token_id not in ends:
        errors.append(
            f"data.dir={cfg.data.dir}: documents end with token {manifest.eos_token_id}, but the model's "
            f"eos_token_id is {config.eos_token_id}: the data was prepared with another tokenizer"
        )
    if cfg.data.sequence_length > config.max_position_embeddings:
        errors.append(
            f"data.sequence_length={cfg.data.sequence_length} is greater than the model's "
            f"max_position_embeddings={config.max_position_embeddings}: lower it"
        )
    if errors:
        raise UserError("\n  ".join(errors))


def run() -> int:
    """Run `olmoe evaluate` with the command line; returns the exit code."""
    return run_verb("evaluate", EvaluateConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
