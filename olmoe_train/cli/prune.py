"""Keep some of the experts of each layer, by their use on a sample of data (REAP, arXiv 2510.13999, or
frequency), and write the smaller model as a Hugging Face directory, for model.init_from and for Transformers.

Every rank holds the whole model. The ranks share the sample, and the result does not depend on their number.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from olmoe_train.checkpoint.convert.export import model_card_of, write_export
from olmoe_train.checkpoint.convert.model_card import pruned_card
from olmoe_train.checkpoint.convert.prune import pruned_model
from olmoe_train.checkpoint.convert.stored_model import StoredModel, bias_error, load_whole, open_stored_model
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.help import description
from olmoe_train.cli.ranks import on_ranks
from olmoe_train.cli.routing_sample import all_ranks, count_sample, open_checked, sample_facts, source_facts
from olmoe_train.config.expert_file import experts_text
from olmoe_train.config.surgery import PruneConfig
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.mixture import VALIDATION, read_manifests
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.evaluation.perplexity import Evaluation, evaluate_data
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.ablations import refuse_export
from olmoe_train.planning.flops import parameter_counts
from olmoe_train.reporting.expert_selection import best_experts, removed_shares, saliency
from olmoe_train.reporting.router_analysis import Array
from olmoe_train.reporting.routing_counts import RoutingCounts
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import write_out
from olmoe_train.utils.tables import aligned

RECORD = "kept_experts.yaml"
"""File of the written directory that names the kept experts, by their numbers in the source."""


def main(cfg: PruneConfig) -> None:
    """Prune the model, and print what was taken away and both losses.

    Raises:
        UserError: The model, the data or an option is wrong; the message names the key and the fix.
    """
    out = Path(cfg.out).expanduser()
    with all_ranks() as device:
        stored = open_checked(cfg)
        check_options(cfg, stored, out)
        model = load_whole(stored, device)
        counts = count_sample(model, cfg, device)
        before = validation(model, cfg, device)
        del model
        kept_LN = best_experts(saliency(counts, cfg.by), cfg.keep)
        shares = removed_shares(counts, kept_LN)
        on_rank_0(lambda: write(cfg, stored, kept_LN, shares[1], out))
        after = validation(load_whole(open_stored_model(out), device), cfg, device)
        on_rank_0(lambda: record(cfg, stored, counts, kept_LN, shares, (before, after), out))


def check_options(cfg: PruneConfig, stored: StoredModel, out: Path) -> None:
    """Check the options against the model, before anything is computed."""
    config = stored.config
    refuse_export(config.ablations)
    if stored.bias_LE is not None:
        raise UserError(bias_error(stored, "the pruned model has no parameter for it: keep the run"))
    if not config.num_experts_per_tok <= cfg.keep < config.num_experts:
        raise UserError(
            f"keep={cfg.keep}: the model has {config.num_experts} experts per layer and sends a token to "
            f"{config.num_experts_per_tok} of them; give {config.num_experts_per_tok} to "
            f"{config.num_experts - 1}"
        )
    if cfg.validation_sequences is not None and cfg.validation_sequences < 0:
        raise UserError(f"validation_sequences={cfg.validation_sequences}: must not be negative")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: is not an empty directory; choose another one, or delete it")


def validation(model: OlmoeForCausalLM, cfg: PruneConfig, device: torch.device) -> Evaluation | None:
    """The loss on the validation splits. None: there is no such split, or it is not asked for. Collective."""
    has_split = any(manifest.validation.tokens for manifest in read_manifests(cfg.data).values())
    if cfg.validation_sequences == 0 or not has_split:
        return None
    how = EvaluationConfig(micro_batch_size=cfg.micro_batch_size, max_sequences=cfg.validation_sequences)
    return evaluate_data(model, cfg.data, how, device)[VALIDATION]


def write(cfg: PruneConfig, stored: StoredModel, kept_LN: list[list[int]], mass_L: Array, out: Path) -> None:
    """Write the directory of the pruned model."""
    pruned = pruned_model(stored, kept_LN)
    dtype = stored.config.dtype if cfg.precision is None else cfg.precision.dtype
    assert dtype is not None
    kept = (
        f"Of the {stored.config.num_experts} experts of each layer {cfg.keep} were kept, by {cfg.by.value}."
    )
    removed = (
        f"On the sample the routers gave the removed ones {mass_L.mean():.2%} of the probability, "
        f"{mass_L.min():.2%} to {mass_L.max():.2%} by layer."
    )
    name = cfg.source if stored.checkpoint is None else stored.checkpoint.parents[1].name
    card = pruned_card(pruned.config, name, [kept, removed], model_card_of(stored), stored.tokenizer)
    write_export(pruned, out, dtype, cfg.max_shard_size, card=card)


def record(
    cfg: PruneConfig,
    stored: StoredModel,
    counts: RoutingCounts,
    kept_LN: list[list[int]],
    shares: tuple[Array, Array],
    losses: tuple[Evaluation | None, Evaluation | None],
    out: Path,
) -> None:
    """Write kept_experts.yaml, and print a table of the layers, both sizes and both losses."""
    choices_L, mass_L = shares
    rows = [("layer", "choices removed", "probability removed", "kept")]
    for layer, kept in enumerate(kept_LN):
        numbers = ", ".join(map(str, kept))
        rows.append((str(layer), f"{choices_L[layer]:.2%}", f"{mass_L[layer]:.2%}", numbers))
    print("\n".join(aligned(rows, left=(3,))))
    if not stored.config.norm_topk_prob:
        low, high = (1 / (1 - mass) for mass in (mass_L.min(), mass_L.max()))
        print(
            "norm_topk_prob=false: without the removed experts the routing weights of the others are larger, "
            f"about {low:.3f} to {high:.3f} times by layer, 1 / (1 - probability removed)"
        )
    facts = {
        "source": source_facts(cfg.source, stored),
        "sample": sample_facts(cfg, counts),
        "by": cfg.by.value,
        "num_experts": cfg.keep,
        "choices_removed": [round(float(share), 6) for share in choices_L],
        "probability_removed": [round(float(share), 6) for share in mass_L],
    }
    before, after = losses
    if before is not None and after is not None:
        facts["validation_loss"] = {"before": before.loss, "after": after.loss, "tokens": before.tokens}
        print(f"validation loss {before.loss:.4f}, pruned {after.loss:.4f} ({before.tokens:,} tokens)")
    write_out(out / RECORD, experts_text(facts, dict(enumerate(kept_LN))))
    smaller_config = open_stored_model(out).config
    total, smaller = (parameter_counts(one).total for one in (stored.config, smaller_config))
    print(f"pruned to {out}: {smaller:,} of {total:,} parameters ({smaller / total:.1%})")
    print(f"to train it: model.init_from={out}; to evaluate it: olmoe evaluate source={out}")


def run() -> int:
    """Run `olmoe prune` with the command line; returns the exit code."""
    return on_ranks(
        "olmoe_train.cli.prune", partial(run_verb, "prune", PruneConfig, main, description("prune", __doc__))
    )


if __name__ == "__main__":
    sys.exit(run())
