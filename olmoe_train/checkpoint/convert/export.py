"""Write a run's checkpoint as a Hugging Face directory, which Transformers, vLLM, SGLang and llama.cpp
read; or convert between that, original OLMo checkpoints and precisions."""

from dataclasses import replace
from pathlib import Path

import torch

from olmoe_train.checkpoint.convert.model_card import model_card
from olmoe_train.checkpoint.convert.olmo import holds_olmo_model, write_olmo_directory
from olmoe_train.checkpoint.convert.source import Source, open_source
from olmoe_train.checkpoint.directory import step_of
from olmoe_train.config.choices import ExportFormat, Precision
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.hf.directory import holds_model, write_directory
from olmoe_train.model.hf.special_tokens import special_token_errors
from olmoe_train.model.transformer import OlmoeForCausalLM
from olmoe_train.utils.errors import UserError

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


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
        if format is ExportFormat.olmo:
            same = holds_olmo_model(out, config, read, dtype)
        else:
            same = holds_model(OlmoeForCausalLM, out, config, read, dtype)
        if not same:
            raise UserError(f"out={out} is not empty, and not this export: choose another, or delete it")
        return False
    if format is ExportFormat.olmo:
        write_olmo_directory(config, out, read, dtype, source.tokenizer)
        return True
    write_directory(
        OlmoeForCausalLM,
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
