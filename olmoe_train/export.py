"""Write a run's checkpoint as a Hugging Face directory, which Transformers, vLLM, SGLang and llama.cpp
read; or convert between that, original OLMo checkpoints and precisions."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from olmoe_train.checkpoint.directory import step_of
from olmoe_train.checkpoint.hf import holds_model, write_directory
from olmoe_train.checkpoint.olmo import holds_olmo_model, write_olmo_directory
from olmoe_train.checkpoint.source import Source, open_source
from olmoe_train.checkpoint.special_tokens import special_token_errors
from olmoe_train.choices import ExportFormat, Precision
from olmoe_train.cli import run_verb
from olmoe_train.config import ExportConfig
from olmoe_train.errors import UserError
from olmoe_train.model import OlmoeConfig
from olmoe_train.model_card import model_card

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def main(cfg: ExportConfig) -> None:
    if cfg.format is ExportFormat.olmo and cfg.max_shard_size != ExportConfig.max_shard_size:
        print(f"warning: max_shard_size={cfg.max_shard_size} has no effect: format=olmo is one file")
    source = open_source(cfg.source, cfg.step, cfg.trust_pickle)
    dtype = source.config.dtype if cfg.precision is None else DTYPES[cfg.precision]
    assert dtype is not None
    if cfg.out is not None:
        out = Path(cfg.out).expanduser()
    elif source.checkpoint is not None:
        out = Path(cfg.source).expanduser() / cfg.format.value / source.checkpoint.name
    else:
        raise UserError(f"out=...: say where to write the conversion of source={cfg.source}")
    source = as_asked(source, cfg.tokenizer, cfg.eos_token_id, cfg.pad_token_id)
    if not write_export(source, out, dtype, cfg.max_shard_size, cfg.format):
        print(f"already exported, nothing to do: {out} holds {source.name}")
        return
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"exported {source.name} to {out} ({size / 10**6:,.1f} MB, {str(dtype).removeprefix('torch.')})")


def hf_directory(run_dir: Path, checkpoint: Path) -> Path:
    """Where a run's own exports are."""
    return run_dir / "hf" / checkpoint.name


def export_checkpoint(run_dir: Path, checkpoint: Path, out: Path) -> bool:
    """A run's checkpoint as an HF directory; False where `out` holds it already."""
    return write_export(open_source(run_dir, str(step_of(checkpoint))), out, torch.float32)


def write_export(
    source: Source,
    out: Path,
    dtype: torch.dtype,
    max_shard_size: str = ExportConfig.max_shard_size,
    format: ExportFormat = ExportFormat.hf,  # noqa: A002  the key's name
    card: str | None = None,
) -> bool:
    """Write `out` and read it back; False where it holds this export already. card: README.md, by default
    the source's.

    UserError where it holds anything else, or the tokenizer names other special tokens than the model.
    """
    config, read = source.config, source.read
    if errors := special_token_errors(config, source.tokenizer):
        fix = (
            "set the right one with eos_token_id=... or pad_token_id=..., or give its own with tokenizer=..."
        )
        raise UserError("\n  ".join([f"{source.name} does not fit its tokenizer:", *errors, fix]))
    if out.is_dir() and any(out.iterdir()):
        holds = holds_olmo_model if format is ExportFormat.olmo else holds_model
        if not holds(out, config, read, dtype):
            raise UserError(f"out={out} is not empty, and not this export: choose another, or delete it")
        return False
    if format is ExportFormat.olmo:
        write_olmo_directory(config, out, read, dtype, source.tokenizer)
        return True
    write_directory(
        config,
        out,
        read,
        dtype,
        max_shard_size,
        tokenizer=source.tokenizer,
        card=card or card_of(source),
        generation=source.generation,
        verify=True,
    )
    return True


def as_asked(
    source: Source, tokenizer: str | None, eos_token_id: int | None, pad_token_id: int | None
) -> Source:
    """With the tokenizer and special tokens of the command line, where it names them."""
    ids = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    asked = {name: value for name, value in ids.items() if value is not None}
    config = OlmoeConfig.from_dict(source.config.to_dict(), **asked)
    generation = None if source.generation is None else source.generation | asked
    path = source.tokenizer if tokenizer is None else Path(tokenizer).expanduser()
    if tokenizer is not None and not path.exists():
        raise UserError(f"tokenizer={tokenizer}: not there; give a directory or a tokenizer.json")
    return replace(source, config=config, generation=generation, tokenizer=path)


def card_of(source: Source) -> str | None:
    """Of a run, its own; a converted model keeps the one it has."""
    if source.checkpoint is not None:
        return model_card(source.checkpoint.parent.parent, source.checkpoint)
    readme = source.tokenizer / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else None


def run() -> int:
    return run_verb("export", ExportConfig, main)


if __name__ == "__main__":
    sys.exit(run())
