"""Export a stored model: a training checkpoint, a Hugging Face directory or an original OLMo checkpoint is
written as a Hugging Face directory (for Transformers, vLLM, SGLang and llama.cpp) or as an OLMo checkpoint.
"""

from dataclasses import replace
from pathlib import Path

import torch

from olmoe_train.checkpoint.convert.model_card import model_card
from olmoe_train.checkpoint.convert.olmo import holds_olmo_model, write_olmo_directory
from olmoe_train.checkpoint.convert.stored_model import StoredModel, bias_error, open_stored_model
from olmoe_train.checkpoint.directory import step_of
from olmoe_train.config.choices import ExportFormat
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.ablations import refuse_export
from olmoe_train.model.adapters.peft_read import read_peft
from olmoe_train.model.adapters.peft_write import write_peft
from olmoe_train.model.hf.directory import holds_model, write_directory
from olmoe_train.model.hf.special_tokens import special_token_errors
from olmoe_train.model.transformer import OlmoeForCausalLM
from olmoe_train.utils.errors import UserError


def hf_directory(run_dir: Path, checkpoint: Path) -> Path:
    """The directory of a run in which the export of one of its checkpoints is written."""
    return run_dir / "hf" / checkpoint.name


def export_checkpoint(run_dir: Path, checkpoint: Path, out: Path) -> bool:
    """Export a training checkpoint as a Hugging Face directory: in fp32, or an adapter merged with its base
    in the dtype of the base.

    Args:
        run_dir: The run directory that the checkpoint belongs to.
        checkpoint: The checkpoint directory.
        out: The directory to write.

    Returns:
        True if `out` was written, False if it already holds this export.

    Raises:
        UserError: As `write_export`.
    """
    stored = open_stored_model(run_dir, str(step_of(checkpoint)))
    assert stored.config.dtype is not None
    return write_export(stored, out, stored.config.dtype)


def write_export(
    stored: StoredModel,
    out: Path,
    dtype: torch.dtype,
    max_shard_size: str = ExportConfig.max_shard_size,
    format: ExportFormat = ExportFormat.hf,  # noqa: A002  the name of the key
    card: str | None = None,
) -> bool:
    """Write a stored model to a directory, then read the directory back and compare it.

    Args:
        stored: The model to write.
        out: The directory to write.
        dtype: Data type of the weights in `out`.
        max_shard_size: Largest safetensors file, such as "5GB". Used by `ExportFormat.hf` only.
        format: The file format of `out`.
        card: Text of README.md. None: the card of `stored` (`model_card_of`).

    Returns:
        True if `out` was written, False if it already holds this export.

    Raises:
        UserError: `out` holds anything else, the format cannot represent the model or the bias in its choice
            of experts, or the tokenizer files name other special tokens than the model's configuration.
    """
    if stored.bias_LE is not None:
        raise UserError(bias_error(stored, f"format={format.value} has no parameter for it: keep the run"))
    config, read = stored.config, stored.read
    refuse_export(config.ablations)
    if errors := special_token_errors(config, stored.tokenizer):
        fix = (
            "set the right token with eos_token_id=... or pad_token_id=..., or give the model's own "
            "tokenizer with tokenizer=..."
        )
        raise UserError("\n  ".join([f"{stored.name} does not fit its tokenizer:", *errors, fix]))
    if out.is_dir() and any(out.iterdir()):
        if format is ExportFormat.olmo:
            same = holds_olmo_model(out, config, read, dtype)
        else:
            same = holds_model(OlmoeForCausalLM, out, config, read, dtype)
        if not same:
            raise UserError(
                f"out={out} is not empty, and does not hold this export: choose another directory, or delete "
                "it"
            )
        return False
    if format is ExportFormat.olmo:
        write_olmo_directory(config, out, read, dtype, stored.tokenizer)
        return True
    write_directory(
        OlmoeForCausalLM,
        config,
        out,
        read,
        dtype,
        max_shard_size,
        tokenizer=stored.tokenizer,
        card=card or model_card_of(stored),
        generation=stored.generation,
        verify=True,
    )
    return True


def write_adapter(stored: StoredModel, out: Path) -> bool:
    """Write the adapter of a run in PEFT's format (model/adapters/peft_write.py).

    Args:
        stored: A model whose checkpoint holds an adapter.
        out: The directory to write.

    Returns:
        True if `out` was written, False if it already holds this adapter.

    Raises:
        UserError: `stored` has no adapter, PEFT cannot represent it, or `out` holds anything else.
    """
    adapter = stored.adapter
    if adapter is None:
        raise UserError(f"format=peft: {stored.name} has no adapter; use format=hf")
    if out.is_dir() and any(out.iterdir()):
        try:
            spec, tensors = read_peft(out, stored.config)
            same = replace(spec, dropout=0.0) == replace(adapter.spec, dropout=0.0)
            same = same and all(torch.equal(tensors[name], adapter.read(name)) for name in adapter.names)
        except UserError:
            same = False
        if not same:
            raise UserError(
                f"out={out} is not empty, and does not hold this adapter: choose another directory, or "
                "delete it"
            )
        return False
    write_peft(out, adapter.spec, adapter.names, adapter.read, adapter.base_name)
    return True


def with_overrides(
    stored: StoredModel, tokenizer: str | None, eos_token_id: int | None, pad_token_id: int | None
) -> StoredModel:
    """A stored model with another tokenizer or other special tokens.

    Args:
        stored: The model.
        tokenizer: A directory with tokenizer files, or a tokenizer.json. None: the tokenizer of `stored`.
        eos_token_id: End-of-text token. None: the token of `stored`.
        pad_token_id: Padding token. None: the token of `stored`.

    Returns:
        A copy of `stored`; the ids are set in its configuration and in its generation_config.json.

    Raises:
        UserError: `tokenizer` does not exist, or an id is invalid.
    """
    ids = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    overrides = {name: value for name, value in ids.items() if value is not None}
    config = OlmoeConfig.from_dict(stored.config.to_dict(), **overrides)
    generation = None if stored.generation is None else stored.generation | overrides
    path = stored.tokenizer if tokenizer is None else Path(tokenizer).expanduser()
    if tokenizer is not None and not path.exists():
        raise UserError(f"tokenizer={tokenizer}: does not exist; give a directory or a tokenizer.json")
    return replace(stored, config=config, generation=generation, tokenizer=path)


def model_card_of(stored: StoredModel) -> str | None:
    """The README.md of a stored model: made from the run for a training checkpoint, else its own file."""
    if stored.checkpoint is not None:
        run_dir = stored.checkpoint.parent.parent
        return model_card(run_dir, stored.checkpoint, stored.tokenizer, stored.which)
    readme = stored.tokenizer / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else None
