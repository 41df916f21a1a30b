"""What `source=` names: an HF directory, or a run directory with its training checkpoints."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from olmoe_train.checkpoint.directory import (
    checkpoint_path,
    complete_checkpoints,
    is_complete,
    latest_checkpoint,
)
from olmoe_train.checkpoint.hf import assign
from olmoe_train.checkpoint.training import open_model_tensors
from olmoe_train.config import ModelConfig, olmoe_config
from olmoe_train.errors import UserError
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM

RUN_CONFIG, RUN_TOKENIZER = "config.yaml", "tokenizer"


def load_source(source: str, device: torch.device) -> tuple[OlmoeForCausalLM, Path]:
    """(The model in eval mode, with the dtype it is stored in; the directory that has its tokenizer files.)

    A run gives its newest complete checkpoint, every file of which is verified. UserError where `source` is
    neither kind of directory, or has nothing complete.
    """
    directory = Path(source).expanduser()
    if (directory / "config.json").is_file():
        return OlmoeForCausalLM.from_pretrained(directory, device=device), directory
    config = run_config(directory)
    read = open_model_tensors(run_checkpoint(directory))
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model = model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assign(parameter, read(name))
    return model.eval(), directory / RUN_TOKENIZER


def run_config(run_dir: Path) -> OlmoeConfig:
    """The architecture of a run, from its config.yaml."""
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise UserError(
            f"source={run_dir}: neither an HF directory (config.json) nor a run directory ({RUN_CONFIG})"
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
        there = ", ".join(str(int(p.name.removeprefix("step-"))) for p in complete_checkpoints(run_dir))
        raise UserError(f"step={step}: no complete checkpoint {path}; there are steps {there or '(none)'}")
    return path
