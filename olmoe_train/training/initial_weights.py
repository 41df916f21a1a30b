"""The initial weights: downloads them if model.init_from is a name on the hub, and loads them."""

import os
from pathlib import Path

import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.adapter_base import load_base
from olmoe_train.checkpoint.convert.stored_model import bias_error, load_into, open_stored_model
from olmoe_train.config.choices import StripPrefix
from olmoe_train.config.initial_model import initial_directory
from olmoe_train.config.model import ModelConfig
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.peft_read import read_peft
from olmoe_train.model.hf.directory import assign, check_same_architecture
from olmoe_train.model.hf.hub import PICKLE_FILES, SMALL_FILES, WEIGHT_FILES, hub_snapshot, is_hub_name
from olmoe_train.model.hf.remote import remote_directory
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import is_remote


def download_initial_weights(model: ModelConfig) -> None:
    """Bring the weights into the cache of each node, where all of its ranks then read them; collective.

    The first rank of a node downloads while the others wait. What the cache has is not downloaded again, so
    a run that could not wait any longer continues where its download ended.

    Raises:
        UserError: The hub does not provide the model, or ranks have found different commits of it.
    """
    if model.init_from is not None and is_remote(model.init_from):
        url = model.init_from
        gather_from_all(lambda: remote_directory(url, model.trust_pickle, key="model.init_from"))
    if model.init_from is None or not is_hub_name(model.init_from):
        return
    name = model.init_from
    files = SMALL_FILES + WEIGHT_FILES + (PICKLE_FILES if model.trust_pickle else ())

    def download() -> str | None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            hub_snapshot(name, model.revision, files)
        return model.revision

    if len(found := set(gather_from_all(download))) > 1:
        raise UserError(
            f"model.init_from={name}: ranks found different commits of it, {', '.join(map(str, found))}; set "
            "model.revision to one of them"
        )


def fill_model(model: OlmoeForCausalLM, cfg: ModelConfig) -> None:
    """Load the weights of model.init_from, and the adapter of model.adapter_from, into a sharded model."""
    assert cfg.init_from is not None
    directory = initial_directory(cfg.init_from, cfg.revision)
    strip_prefix = cfg.strip_prefix is StripPrefix.auto
    if model.adapter is None:
        load_into(model, directory, cfg.trust_pickle, strip_prefix)
        return
    stored = open_stored_model(directory, trust_pickle=cfg.trust_pickle, strip_prefix=strip_prefix)
    if stored.bias_LE is not None:
        raise UserError(bias_error(stored, "an adapter's base cannot have one: set adapter=none"))
    check_same_architecture(model.config, stored.config, stored.name)
    model.base = load_base(model, stored.read, directory)
    if cfg.adapter_from is not None:
        load_adapter(model, Path(cfg.adapter_from).expanduser())


@torch.no_grad()
def load_adapter(model: OlmoeForCausalLM, directory: Path) -> None:
    """Copy a PEFT adapter into the adapter of a sharded model, in place.

    Raises:
        UserError: The adapter cannot be read, or it is another one than the model's.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in fitting_adapter(model, directory).items():
        assign(parameters[name], tensor)


def fitting_adapter(model: OlmoeForCausalLM, directory: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter by the names of the model's parameters.

    Raises:
        UserError: The adapter cannot be read, or it is another one than the model's.
    """
    spec, tensors = read_peft(directory, model.config)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(f"model.adapter_from={directory}: {spec} does not fit {model.adapter}")
    return tensors
