"""Stored models, which a `source=` key names: a Hugging Face directory, an original OLMo checkpoint, or a run
directory with its training checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.checkpoint.convert.adapter_base import SavedAdapter, check_base, open_adapter
from olmoe_train.checkpoint.convert.olmo import open_olmo
from olmoe_train.checkpoint.directory import (
    checkpoint_path,
    complete_checkpoints,
    is_complete,
    latest_checkpoint,
    step_of,
)
from olmoe_train.checkpoint.remote import fetch_model
from olmoe_train.checkpoint.sharded import model_tensor_names, open_model_tensors
from olmoe_train.config.choices import StripPrefix, Weights
from olmoe_train.config.initial_model import RUN_CONFIG, run_config, run_router_temperature
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.hf.directory import assign, check_same_architecture, open_pretrained, parameter_shapes
from olmoe_train.model.hf.pretrained import load_model
from olmoe_train.model.hf.special_tokens import read_generation_config
from olmoe_train.model.moe.loss_free import BIAS, LossFreeBias, fixed_bias
from olmoe_train.model.olmo_config import is_olmo_directory
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import is_remote
from olmoe_train.utils.tensor_files import first_few

RUN_TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class StoredModel:
    """A stored model whose file headers have been read. Weights are read one parameter at a time."""

    name: str
    """What to call the model in messages."""
    config: OlmoeConfig
    """The architecture; `dtype` is the one that the model is loaded and exported in."""
    read: Callable[[str], Tensor]
    """Returns one whole parameter by its in-memory name, on the CPU, in its stored dtype. It raises a
    UserError if a value is not finite; a run saves no such values. A router's weight is divided by the run's
    balancing.router_temperature, so the model needs none."""
    tokenizer: Path
    """Directory of the tokenizer files. It may have none."""
    generation: dict[str, Any] | None = None
    """Content of generation_config.json. None: the model has no such file."""
    checkpoint: Path | None = None
    """The training checkpoint that the weights are in. None: the model is not from a run directory."""
    adapter: SavedAdapter | None = None
    """The adapter that `read` adds to its base. None: the checkpoint holds a whole model."""
    bias_LE: Tensor | None = None
    """Bias in the choice of experts (balancing=loss_free), fp32. None: there is none."""
    which: Weights = Weights.weights
    """Whether `read` returns the weights of the checkpoint, or their average."""


def split_step(name: str) -> tuple[str, str | None]:
    """Split SOURCE@STEP, or SOURCE@REVISION on the hub. A path that exists is not split."""
    directory, at, step = name.rpartition("@")
    if not at or Path(name).expanduser().exists():
        return name, None
    return directory, step


def open_stored_model(
    source: str | Path,
    step: str = "latest",
    trust_pickle: bool = False,
    strip_prefix: bool = False,
    which: Weights = Weights.weights,
) -> StoredModel:
    """Open the model that `source=` names.

    Args:
        source: A Hugging Face directory, an OLMo checkpoint, or a run directory; or the URL of a Hugging Face
            or run directory, which is brought into the cache.
        step: Which checkpoint of a run directory: a step number, or "latest". All its files are verified.
        trust_pickle: Accept weights in a pickle, through torch.load(weights_only=True).
        strip_prefix: Take the prefixes of wrappers (`_orig_mod.`, `module.`) off the names of the tensors. A
            run's checkpoints never have such prefixes.
        which: The weights of a run, or their average.

    Raises:
        UserError: `source` is not such a directory, has no complete checkpoint of this step, no average where
            that is asked for, is damaged or quantized, or has its weights in a pickle and `trust_pickle` is
            false.
    """
    if is_remote(source):
        source, step = fetch_model(str(source), step, trust_pickle)
    directory = Path(source).expanduser()
    is_hf = (directory / "config.json").is_file()
    if is_hf or is_olmo_directory(directory):
        what = f"source={directory} is not a run directory and has no"
        if step != "latest":
            raise UserError(f"step={step}: {what} steps; omit step")
        if which is not Weights.weights:
            raise UserError(f"which={which.value}: {what} average; omit which")
    if is_hf:
        config, read = open_pretrained(OlmoeForCausalLM, directory, trust_pickle, strip_prefix)
        return StoredModel(str(directory), config, read, directory, read_generation_config(directory))
    if is_olmo_directory(directory):
        config, read = open_olmo(directory, trust_pickle, strip_prefix)
        return StoredModel(str(directory), config, read, directory)
    config = run_config(directory)
    config.dtype = torch.float32  # training stores fp32 master weights, whatever trainer.precision is
    checkpoint = run_checkpoint(directory, step)
    name = f"{checkpoint.name} of {directory}"
    if which is Weights.ema:
        if not model_tensor_names(checkpoint, which):
            raise UserError(
                f"which=ema: {name} has no average of its weights, because trainer.ema_decay was null; omit "
                "which, or train with trainer.ema_decay"
            )
        name = f"the average of {name}"
    adapter = open_adapter(checkpoint, which)
    if adapter is not None:
        return replace(_open_adapted(directory, name, config, checkpoint, adapter), which=which)
    read, names = open_model_tensors(checkpoint, which), model_tensor_names(checkpoint)
    if extra := sorted(names - {BIAS} - parameter_shapes(OlmoeForCausalLM, config).keys()):
        raise UserError(
            f"{name} holds tensors that an OLMoE model does not have, so its outputs cannot be reproduced: "
            f"{first_few(extra)}"
        )
    return StoredModel(
        *(name, config, _with_temperature(read, run_router_temperature(directory))),
        directory / RUN_TOKENIZER,
        checkpoint=checkpoint,
        bias_LE=read(BIAS) if BIAS in names else None,
        which=which,
    )


def _with_temperature(read: Callable[[str], Tensor], temperature: float) -> Callable[[str], Tensor]:
    """Divide the weights of the routers by the temperature: the logits are then those of training."""

    def read_folded(name: str) -> Tensor:
        return read(name) / temperature if name.endswith(".mlp.gate.weight") else read(name)

    return read if temperature == 1 else read_folded


def _open_adapted(
    run_dir: Path, name: str, config: OlmoeConfig, checkpoint: Path, adapter: SavedAdapter
) -> StoredModel:
    """The model of an adapter's run: its base, with the adapter added in fp32 as weights are read."""
    values = OmegaConf.to_container(OmegaConf.load(run_dir / RUN_CONFIG))
    assert isinstance(values, dict)
    section = values["model"]
    # config.yaml comes first: a user can correct it, but not the path in the checkpoint.
    places = [section["init_from"], adapter.base.path]
    found = [place for place in places if Path(place).expanduser().exists()]
    if not found:
        raise UserError(
            f"{name} is an adapter, and its base model is not at {adapter.base.path}: bring it back, or set "
            f"model.init_from in {run_dir / RUN_CONFIG} to where it is"
        )
    strip_prefix = section.get("strip_prefix") == StripPrefix.auto.name
    base = open_stored_model(
        found[0], trust_pickle=section.get("trust_pickle", False), strip_prefix=strip_prefix
    )
    check_base(base.config, base.read, adapter.base, base.name)
    config.dtype = base.config.dtype
    read = adapter.reader_of_merged(base.read)
    return StoredModel(
        name, config, read, run_dir / RUN_TOKENIZER, base.generation, checkpoint=checkpoint, adapter=adapter
    )


def load_stored_model(
    source: str,
    device: torch.device,
    trust_pickle: bool = False,
    strip_prefix: bool = False,
    which: Weights = Weights.weights,
) -> tuple[OlmoeForCausalLM, Path]:
    """Load the model that `source=` names onto a device.

    Args:
        source: As for `open_stored_model`; the newest checkpoint of a run directory is taken.
        device: Where the parameters go.
        trust_pickle, strip_prefix, which: As for `open_stored_model`.

    Returns:
        The model in eval mode, in the dtype of the stored model; and the directory of its tokenizer files.

    Raises:
        UserError: As `open_stored_model`, or a weight is not finite.
    """
    stored = open_stored_model(source, trust_pickle=trust_pickle, strip_prefix=strip_prefix, which=which)
    return load_whole(stored, device), stored.tokenizer


def load_whole(stored: StoredModel, device: torch.device) -> OlmoeForCausalLM:
    """Load a stored model onto a device, in eval mode.

    Raises:
        UserError: A weight is not finite.
    """
    model = load_model(OlmoeForCausalLM, stored.config, stored.read, device)
    model.generation_config = stored.generation
    use_bias(model, stored, device)
    return model


def use_bias(model: OlmoeForCausalLM, stored: StoredModel, device: torch.device) -> None:
    """Make a model choose experts with the bias of the stored model, if it has one."""
    if stored.bias_LE is not None:
        model.set_balancer(fixed_bias(stored.bias_LE, model.config.num_experts_per_tok).to(device))


def load_into(
    model: OlmoeForCausalLM, source: str | Path, trust_pickle: bool = False, strip_prefix: bool = False
) -> None:
    """Copy the weights of a stored model into a model, in place.

    Every rank reads for itself, without communication, and holds one whole parameter in memory at a time.

    Args:
        model: Its parameters may be whole or sharded (DTensor). Values are cast to each parameter's dtype.
        source: As for `open_stored_model`; the newest checkpoint of a run directory is taken.
        trust_pickle, strip_prefix: As for `open_stored_model`.

    Raises:
        UserError: As `open_stored_model`, a weight is not finite, the architectures differ (the message
            names every such field), or `source` has a bias that `model` has not.
    """
    stored = open_stored_model(source, trust_pickle=trust_pickle, strip_prefix=strip_prefix)
    check_same_architecture(model.config, stored.config, stored.name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assign(parameter, stored.read(name).to(parameter.dtype))
    if stored.bias_LE is not None:
        if not isinstance(model.balancer, LossFreeBias):
            raise UserError(bias_error(stored, "this run has no such bias: set balancing=loss_free"))
        model.balancer.bias.copy_(stored.bias_LE)


def bias_error(stored: StoredModel, why: str) -> str:
    """The message about a stored model whose bias has no place."""
    return (
        f"{stored.name} chooses experts with the bias of balancing=loss_free, and {why}, or leave the bias "
        "out with olmoe export fold=drop, which says what that changes, and use the export"
    )


def tokenizer_directory(source: str | Path) -> Path:
    """The directory of the tokenizer files of the model that `source=` names; it may have none.

    Raises:
        UserError: There is no model.
    """
    directory = Path(source).expanduser()
    if (directory / "config.json").is_file() or is_olmo_directory(directory):
        return directory
    run_config(directory)
    run_checkpoint(directory)
    return directory / RUN_TOKENIZER


def run_checkpoint(run_dir: Path, step: str = "latest") -> Path:
    """The complete checkpoint of a run at a step.

    Args:
        run_dir: The run directory.
        step: A step number, or "latest".

    Raises:
        UserError: There is no complete checkpoint of this step; the message lists the steps that have one.
    """
    if step == "latest":
        newest = latest_checkpoint(run_dir)
        if newest is None:
            raise UserError(f"source={run_dir}: no complete checkpoint in {run_dir / 'checkpoints'} yet")
        return newest
    if not step.isdecimal():
        raise UserError(f"step={step}: give a number, or latest")
    path = checkpoint_path(run_dir, int(step))
    if not is_complete(path):
        steps = ", ".join(str(step_of(path)) for path in complete_checkpoints(run_dir))
        raise UserError(
            f"step={step}: {path} is not a complete checkpoint; complete steps: {steps or 'none'}"
        )
    return path
