"""Make an OLMoE from a dense model (sparse upcycling): every expert starts as a copy of the dense MLP, or as
a slice of a copy, and the router starts from random weights. The result is a Hugging Face directory, for
model.init_from and for Transformers.
"""

import sys
from dataclasses import replace
from pathlib import Path

from olmoe_train.checkpoint.convert.export import model_card_of, with_overrides, write_export
from olmoe_train.checkpoint.convert.model_card import upcycled_card
from olmoe_train.checkpoint.convert.upcycle import (
    model_overrides,
    open_dense,
    option_warnings,
    summary,
    tokens_to_compare,
    upcycle_dense,
    upcycle_olmo,
    upcycled_config,
)
from olmoe_train.cli.app import run_verb
from olmoe_train.config.verbs import UpcycleConfig


def main(cfg: UpcycleConfig) -> None:
    """Upcycle the dense model; print how the two models compare, and how to train the new one."""
    dense, is_olmo = open_dense(cfg)
    dense = with_overrides(dense, cfg.tokenizer, cfg.eos_token_id, cfg.pad_token_id)
    config = upcycled_config(dense.config, cfg)
    input_ids_BS = tokens_to_compare(config, cfg.data_dir)
    for warning in option_warnings(cfg):
        print(f"warning: {warning}")
    upcycle = upcycle_olmo if is_olmo else upcycle_dense
    read, notes = upcycle(dense, config, cfg, input_ids_BS)
    notes = [summary(dense.config, config), *notes]

    out = Path(cfg.out).expanduser()
    upcycled = replace(dense, config=config, read=read, checkpoint=None)
    name = Path(cfg.source).expanduser().resolve().name
    card = upcycled_card(config, name, notes, model_card_of(dense), dense.tokenizer)
    dtype = dense.config.dtype if cfg.precision is None else cfg.precision.dtype
    assert dtype is not None
    if not write_export(upcycled, out, dtype, cfg.max_shard_size, card=card):
        print(f"already upcycled, nothing to do: {out} holds what these options make of {dense.name}")
        return
    print("\n".join(notes))
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"upcycled {dense.name} to {out} ({size / 10**6:,.1f} MB, {str(dtype).removeprefix('torch.')})")
    print(f"to train it: model.init_from={cfg.out} {' '.join(model_overrides(config))}")


def run() -> int:
    """Run `olmoe upcycle` with the command line; returns the exit code."""
    return run_verb("upcycle", UpcycleConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
