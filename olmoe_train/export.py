"""Write a run's checkpoint as a Hugging Face directory, which Transformers, vLLM, SGLang and llama.cpp
read."""

import sys
from pathlib import Path

import torch

from olmoe_train.checkpoint.hf import holds_model, write_directory
from olmoe_train.checkpoint.source import RUN_TOKENIZER, run_checkpoint, run_config
from olmoe_train.checkpoint.training import open_model_tensors
from olmoe_train.choices import Precision
from olmoe_train.cli import run_verb
from olmoe_train.config import ExportConfig
from olmoe_train.errors import UserError
from olmoe_train.model_card import model_card

_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def main(cfg: ExportConfig) -> None:
    run_dir = Path(cfg.source).expanduser()
    run_config(run_dir)  # the first thing to complain about a source that is none
    checkpoint = run_checkpoint(run_dir, cfg.step)
    out = Path(cfg.out).expanduser() if cfg.out is not None else hf_directory(run_dir, checkpoint)
    if not export_checkpoint(run_dir, checkpoint, out, cfg.max_shard_size, cfg.precision):
        print(f"already exported, nothing to do: {out} holds {checkpoint.name} of {run_dir}")
        return
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"exported {checkpoint.name} of {run_dir} to {out} ({size / 10**6:,.1f} MB, {cfg.precision.value})")


def hf_directory(run_dir: Path, checkpoint: Path) -> Path:
    """Where a run's own exports are."""
    return run_dir / "hf" / checkpoint.name


def export_checkpoint(
    run_dir: Path,
    checkpoint: Path,
    out: Path,
    max_shard_size: str = ExportConfig.max_shard_size,
    precision: Precision = ExportConfig.precision,
) -> bool:
    """Write `out` and read it back; False where it holds this export already. UserError where it holds
    anything else."""
    config, dtype, read = run_config(run_dir), _DTYPES[precision], open_model_tensors(checkpoint)
    if out.is_dir() and any(out.iterdir()):
        if not holds_model(out, config, read, dtype):
            raise UserError(f"out={out} is not empty, and not this export: choose another, or delete it")
        return False
    card = model_card(run_dir, checkpoint)
    tokenizer = run_dir / RUN_TOKENIZER
    write_directory(config, out, read, dtype, max_shard_size, tokenizer=tokenizer, card=card, verify=True)
    return True


def run() -> int:
    return run_verb("export", ExportConfig, main)


if __name__ == "__main__":
    sys.exit(run())
