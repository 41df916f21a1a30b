"""Average checkpoints of a run, or models that share their initial weights. The result is a Hugging Face
directory. With decay=..., the mean of checkpoints of a constant learning rate takes the place of a decay.
"""

import sys
from dataclasses import replace
from pathlib import Path

from olmoe_train.checkpoint.convert.export import model_card_of, write_export
from olmoe_train.checkpoint.convert.merge import (
    UNIFORM,
    check_sources,
    decay_weights,
    given_weights,
    merge_warnings,
    merged_reader,
    steps_of,
)
from olmoe_train.checkpoint.convert.model_card import merged_card
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.model_sources import names_of_sources, open_source
from olmoe_train.cli.sources import collect_sources
from olmoe_train.config.verbs import MergeConfig
from olmoe_train.utils.errors import UserError


def main(cfg: MergeConfig) -> None:
    """Average the models, and print their weights and where the mean is."""
    if cfg.decay is not None and cfg.weights != UNIFORM:
        raise UserError(f"decay={cfg.decay.value} and weights={cfg.weights}: both give weights; set only one")
    names = names_of_sources(cfg.sources, "sources")
    models = [open_source(name, cfg.trust_pickle, cfg.strip_prefix, "sources") for name in names]
    check_sources(models)
    if cfg.decay is None:
        weights = given_weights(cfg.weights, len(models))
    else:
        weights = decay_weights(cfg.decay, steps_of(models))
    for warning in merge_warnings(models, weights, cfg.decay):
        print(f"warning: {warning}")

    first, out = models[0], Path(cfg.out).expanduser()
    dtype = first.config.dtype if cfg.precision is None else cfg.precision.dtype
    assert dtype is not None
    read = merged_reader([model.read for model in models], weights, dtype)
    merged = replace(first, read=read, checkpoint=None, adapter=None)
    sources = dict(zip(names, weights, strict=True))
    card = merged_card(merged.config, sources, _why(cfg), model_card_of(first), first.tokenizer)
    if not write_export(merged, out, dtype, cfg.max_shard_size, card=card):
        print(f"already merged, nothing to do: {out} holds this mean")
        return
    for name, weight in sources.items():
        print(f"{weight:8.5f}  {name}")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"merged to {out} ({size / 10**6:,.1f} MB, {str(dtype).removeprefix('torch.')})")


def _why(cfg: MergeConfig) -> str:
    """The sentence of the card about the weights."""
    if cfg.decay is not None:
        return f"The weights make up for a decay of the learning rate (decay={cfg.decay.value})."
    return "The weights are equal." if cfg.weights == UNIFORM else "The weights were given."


def run() -> int:
    """Run `olmoe merge` with the command line; returns the exit code."""
    sys.argv[1:] = collect_sources(sys.argv[1:], "sources")
    return run_verb("merge", MergeConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
