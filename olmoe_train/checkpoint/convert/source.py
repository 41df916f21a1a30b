"""What `source=` names: an HF directory, an original OLMo checkpoint, or a run directory with its training
checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.checkpoint.convert.olmo import is_olmo_directory, open_olmo
from olmoe_train.checkpoint.directory import (
    checkpoint_path,
    complete_checkpoints,
    is_complete,
    latest_checkpoint,
    step_of,
)
from olmoe_train.checkpoint.sharded import open_model_tensors
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.hf.directory import assign, open_pretrained, refuse_other_function
from olmoe_train.model.hf.pretrained import model_of
from olmoe_train.model.hf.special_tokens import read_generation_config
from olmoe_train.utils.errors import UserError

RUN_CONFIG, RUN_TOKENIZER = "config.yaml", "tokenizer"


@dataclass(frozen=True)
class Source:
    """A stored model, opened: nothing but file headers is in memory."""

    name: str
    config: OlmoeConfig
    """With the dtype of the weights."""
    read: Callable[[str], Tensor]
    """One whole parameter by its in-memory name, in its stored dtype, on the CPU."""
    tokenizer: Path
    """Directory that has the tokenizer files, if any."""
    generation: dict[str, Any] | None = None
    """Its generation_config.json."""
    checkpoint: Path | None = None
    """The training checkpoint, where the source is a run."""


def open_source(source: str | Path, step: str = "latest", trust_pickle: bool = False) -> Source:
    """A run gives its complete checkpoint of `step`, every file of which is verified.

    UserError where `source` is no directory of these kinds, or has nothing complete, or has its weights in
    a pickle and trust_pickle is false.
    """
    directory = Path(source).expanduser()
    is_hf = (directory / "config.json").is_file()
    if (is_hf or is_olmo_directory(directory)) and step != "latest":
        raise UserError(f"step={step}: source={directory} has no steps, it is not a run directory")
    if is_hf:
        config, read = open_pretrained(OlmoeForCausalLM, directory, trust_pickle)
        return Source(str(directory), config, read, directory, read_generation_config(directory))
    if is_olmo_directory(directory):
        config, read = open_olmo(directory, trust_pickle)
        return Source(str(directory), config, read, directory)
    config = run_config(directory)
    config.dtype = torch.float32  # training keeps its weights so, whatever it computes in
    checkpoint = run_checkpoint(directory, step)
    read = open_model_tensors(checkpoint)
    name = f"{checkpoint.name} of {directory}"
    return Source(name, config, read, directory / RUN_TOKENIZER, checkpoint=checkpoint)


def load_source(
    source: str, device: torch.device, trust_pickle: bool = False
) -> tuple[OlmoeForCausalLM, Path]:
    """(The model in eval mode, with the dtype it is stored in; the directory that has its tokenizer files.)
    Errors as open_source."""
    opened = open_source(source, trust_pickle=trust_pickle)
    model = model_of(OlmoeForCausalLM, opened.config, opened.read, device)
    model.generation_config = opened.generation
    return model, opened.tokenizer


def load_into(model: OlmoeForCausalLM, source: str | Path, trust_pickle: bool = False) -> None:
    """Fill every parameter, whole or sharded (DTensor), in place; values are cast to its dtype.

    Each rank reads by itself: no communication, and one whole parameter at a time in memory. Errors as
    open_source, and a UserError names every field of its configuration with which these weights would mean
    another function than `model.config` describes.
    """
    opened = open_source(source, trust_pickle=trust_pickle)
    refuse_other_function(model.config, opened.config, opened.name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assign(parameter, opened.read(name).to(parameter.dtype))


def tokenizer_directory(source: str | Path) -> Path:
    """Directory that has the tokenizer files of a source, if any. UserError where there is no model."""
    directory = Path(source).expanduser()
    if (directory / "config.json").is_file() or is_olmo_directory(directory):
        return directory
    run_config(directory)
    run_checkpoint(directory)
    return directory / RUN_TOKENIZER


def run_config(run_dir: Path) -> OlmoeConfig:
    """The architecture of a run, from its config.yaml."""
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise UserError(
            f"source={run_dir}: neither an HF directory (config.json) nor a run directory or OLMo checkpoint "
            f"({RUN_CONFIG})"
        )
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(values, dict)
        return olmoe_config(ModelConfig(**values["model"]))
    except UserError:
        raise
    except Exception as error:  # YAML and OmegaConf raise a dozen kinds
        raise UserError(f"{path}: not the configuration of a run: {error}") from error


def run_checkpoint(run_dir: Path, step: str = "latest") -> Path:
    """The complete checkpoint of `step`, a number or "latest". UserError lists what there is."""
    if step == "latest":
        newest = latest_checkpoint(run_dir)
        if newest is None:
            raise UserError(f"source={run_dir}: no complete checkpoint in {run_dir / 'checkpoints'} yet")
        return newest
    if not step.isdecimal():
        raise UserError(f"step={step}: give a number, or latest")
    path = checkpoint_path(run_dir, int(step))
    if not is_complete(path):
        there = ", ".join(str(step_of(path)) for path in complete_checkpoints(run_dir))
        raise UserError(f"step={step}: no complete checkpoint {path}; there are steps {there or '(none)'}")
    return path
