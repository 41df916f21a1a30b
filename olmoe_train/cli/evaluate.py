"""Compute validation loss, perplexity and bits per byte of a run's newest checkpoint, or of a Hugging Face
directory, on the validation split of prepared data and on named held-out sets (evaluation.sets).

The loss is the mean over all target tokens. It does not depend on how tokens are divided into sequences,
batches and ranks.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from olmoe_train.checkpoint.convert.sharded_model import load_on_ranks
from olmoe_train.checkpoint.convert.stored_model import open_stored_model
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.ranks import HELP, end_process, on_ranks
from olmoe_train.config.choices import DTYPES, StripPrefix
from olmoe_train.config.verbs import AnalyzeConfig, EvaluateConfig
from olmoe_train.data.manifest import Manifest
from olmoe_train.data.mixture import VALIDATION, read_manifests, verify
from olmoe_train.data.token_bytes import token_bytes_or_reason
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.distributed.rendezvous import leave_distributed
from olmoe_train.evaluation.perplexity import Evaluation, evaluate_data, evaluate_sets
from olmoe_train.evaluation.samples import sample_prompts
from olmoe_train.model import OlmoeConfig
from olmoe_train.training.preflight.evaluated_model import layout_errors, layout_warnings, option_errors
from olmoe_train.training.preflight.evaluation import set_errors
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import write_out
from olmoe_train.utils.finite import finite_or_none

LEAVE_S = 600.0
"""Longest time that ranks wait for each other when they meet and when they leave, in seconds."""


def main(cfg: EvaluateConfig) -> None:
    """Evaluate the model, and print loss, perplexity and number of tokens of every source of the data."""
    device = init_distributed(cfg.device.value, LEAVE_S, device_key="device")
    try:
        evaluate(cfg, device)
    finally:
        leave_distributed(LEAVE_S)


def evaluate(cfg: EvaluateConfig, device: torch.device) -> dict[str, Evaluation]:
    """`main` within a process group. Every rank returns the results; rank 0 prints and writes them.

    Raises:
        UserError: The model, the data, a set or an option is wrong; the message names the key and the fix.
    """
    if errors := option_errors(cfg):
        raise UserError("\n  ".join(errors))
    manifests = read_manifests(cfg.data)
    manifest = next(iter(manifests.values()))
    verify(cfg.data)
    strip_prefix = cfg.strip_prefix is StripPrefix.auto
    stored = open_stored_model(cfg.source, trust_pickle=cfg.trust_pickle, strip_prefix=strip_prefix)
    check_data(stored.config, manifest, cfg)
    world_size = dist.get_world_size()
    errors = set_errors(cfg.evaluation.sets, cfg.data, manifests)
    if errors := errors + layout_errors(cfg.parallel, stored.config, world_size):
        raise UserError("\n  ".join(errors))
    if cfg.precision is not None:
        stored.config.dtype = DTYPES[cfg.precision]
    model = load_on_ranks(stored, cfg.parallel, device)
    is_whole, evaluation = world_size == 1, cfg.evaluation
    results = evaluate_data(model, cfg.data, evaluation, device, check_finite=is_whole)
    of_sets = evaluate_sets(model, cfg.data, evaluation, device, check_finite=is_whole)
    check_results(results | of_sets, stored.config)
    samples: list[dict[str, str]] = []
    if evaluation.prompts:
        tokenizer = load_tokenizer(stored.tokenizer)
        samples = sample_prompts(model, tokenizer, evaluation.prompts, evaluation.sample_tokens, device)
    if dist.get_rank() == 0:
        warn(cfg, world_size)
        show(cfg, manifest, results, of_sets)
        for sample in samples:
            print(f"\n{sample['prompt']}{sample['completion']}")
    if cfg.out is not None:
        out = Path(cfg.out).expanduser()
        content = {"source": cfg.source, "sets": as_json(results | of_sets)} | (
            {"samples": samples} if samples else {}
        )
        on_rank_0(lambda: write_out(out, json.dumps(content, indent=2) + "\n"))
    return results | of_sets


def check_results(results: dict[str, Evaluation], config: OlmoeConfig) -> None:
    """Refuse a loss that is not finite. One process names the logit; ranks cannot, and say so.

    Raises:
        UserError: A loss is not finite.
    """
    for name, one in results.items():
        if one.tokens and not math.isfinite(one.loss):
            raise UserError(
                f"the loss of {name} is not finite: the weights are damaged, or {config.dtype} cannot hold "
                "what the model computes; on one process, this command names the first such logit"
            )


def warn(cfg: EvaluateConfig, world_size: int) -> None:
    """Print warnings to the standard error."""
    warnings = layout_warnings(cfg.parallel, world_size)
    _, reason = token_bytes_or_reason(cfg.data)
    if reason is not None:
        warnings.append(f"no bits per byte: {reason}")
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)


def show(
    cfg: EvaluateConfig, manifest: Manifest, results: dict[str, Evaluation], of_sets: dict[str, Evaluation]
) -> None:
    """Print the results.

    Args:
        cfg: The options.
        manifest: That of the data.
        results: Source of the data, or "validation" -> result.
        of_sets: Name of a set -> result.
    """
    total = results[VALIDATION]
    print(f"source           {cfg.source}")
    for name, part in results.items():
        if name != VALIDATION:
            text = f"loss {part.loss:.4f}, perplexity {part.perplexity:.2f}, tokens {part.tokens:,}"
            print(f"  {name}: {text}")
    print(f"loss             {total.loss:.4f} nats per token")
    print(f"perplexity       {total.perplexity:.2f}")
    if total.bits_per_byte is not None:
        print(f"bits per byte    {total.bits_per_byte:.4f}")
    print(f"tokens           {total.tokens:,}")
    if not cfg.data.mixture and manifest.unigram_entropy is not None:
        entropy = f"{manifest.unigram_entropy:.4f} nats per token"
        print(f"unigram entropy  {entropy} (the loss of predictions from token frequencies only)")
    if of_sets:
        print(f"\n{table(results | of_sets)}")


def table(results: dict[str, Evaluation]) -> str:
    """One line per set."""
    width = max(map(len, ["set", *results]))
    lines = [f"{'set':<{width}}  {'loss':>8}  {'perplexity':>12}  {'bits per byte':>13}  {'tokens':>12}"]
    for name, one in results.items():
        bits = "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
        lines.append(
            f"{name:<{width}}  {one.loss:>8.4f}  {one.perplexity:>12,.2f}  {bits:>13}  {one.tokens:>12,}"
        )
    return "\n".join(lines)


def as_json(results: dict[str, Evaluation]) -> dict[str, Any]:
    """The results for the JSON file; null where a number is not finite or not known."""
    return {
        name: {
            "loss": finite_or_none(one.loss),
            "perplexity": finite_or_none(one.perplexity),
            "bits_per_byte": one.bits_per_byte,
            "tokens": one.tokens,
            "bytes": one.bytes,
            "loss_by_position": one.loss_by_position,
        }
        for name, one in results.items()
    }


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
    description = f"{__doc__}\n{HELP}"
    return on_ranks(
        "olmoe_train.cli.evaluate", partial(run_verb, "evaluate", EvaluateConfig, main, description)
    )


if __name__ == "__main__":
    end_process(run())
