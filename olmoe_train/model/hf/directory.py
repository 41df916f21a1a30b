"""Hugging Face directories: config.json, generation_config.json, safetensors shards and tokenizer files.

In memory the experts of a layer are stacked (`mlp.experts.gate_up_proj` [E, 2F, D], `down_proj` [E, D, F]);
on disk each has the hub's own tensors (`mlp.experts.0.gate_proj.weight` [F, D], ...). Both namings are read,
the hub's is written.

Shapes: E experts, F expert width, D hidden.
"""

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.special_tokens import (
    copy_tokenizer,
    generation_defaults,
    write_generation_config,
)
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_directory, write_json
from olmoe_train.utils.tensor_files import INDEX, WEIGHTS, StoredWeights, byte_count, first_few

# Fields that may differ between a directory and the model that its weights go into: none changes what the
# same weights compute for the same tokens, save attention_dropout, which is the training run's to choose.
_NOT_COMPARED = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "extra",
    "initializer_range",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "return_dict",
    "router_aux_loss_coef",
    "use_cache",
}

Index = tuple[int | slice, ...]


def hub_parts(name: str, shape: torch.Size) -> dict[str, Index]:
    """The hub tensors that a parameter is stored as, each with the place it has in the parameter."""
    block, _, kind = name.rpartition(".")
    if not block.endswith("mlp.experts"):
        return {name: ()}
    if kind == "down_proj":
        return {f"{block}.{expert}.down_proj.weight": (expert,) for expert in range(shape[0])}
    assert kind == "gate_up_proj", name
    width = shape[1] // 2
    halves = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}
    return {
        f"{block}.{expert}.{half}.weight": (expert, rows)
        for expert in range(shape[0])
        for half, rows in halves.items()
    }


# --- writing ----------------------------------------------------------------------------------------------


def write_directory(
    model_class: type[nn.Module],
    config: OlmoeConfig,
    directory: str | Path,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_size: str | int = "5GB",
    tokenizer: Path | None = None,
    card: str | None = None,
    generation: dict[str, Any] | None = None,
    verify: bool = False,
) -> None:
    """Write an HF directory from `read`, which gives each whole parameter by its in-memory name when it is
    its turn.

    Holds about one shard in memory beyond what `read` returns. The directory appears complete: files are
    written and synced beside it, then moved, config.json last. tokenizer: a directory whose tokenizer files
    are copied, or a tokenizer.json. card: README.md. generation: generation_config.json, by default made of
    `config`. verify: compare what was written to a second reading before it appears. UserError where
    `directory` already holds weights.
    """
    directory = Path(directory)
    if any(directory.glob("*.safetensors*")):
        raise UserError(f"{directory} already holds a model: choose another directory, or delete it")
    shards = plan_shards(parameter_shapes(model_class, config), dtype, byte_count(max_shard_size))
    with atomic_directory(directory, last="config.json") as temporary:
        _write_shards(temporary, shards, read, dtype)
        _as_written(config, dtype, model_class).save_pretrained(temporary)
        write_generation_config(temporary, generation or generation_defaults(config))
        copy_tokenizer(tokenizer, temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        if verify and not holds_model(model_class, temporary, config, read, dtype):
            raise RuntimeError(f"{directory}: not what was written reads back; is the disk failing?")


def parameter_shapes(model_class: type[nn.Module], config: OlmoeConfig) -> dict[str, torch.Size]:
    """Every parameter of a model and its shape, nothing allocated; a tied head is the embedding, and not
    listed."""
    with torch.device("meta"):
        model = model_class(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


Shard = list[tuple[str, str, Index]]
"""(hub name, parameter name, place in the parameter) of each tensor of one file."""


def plan_shards(shapes: dict[str, torch.Size], dtype: torch.dtype, max_bytes: int) -> list[Shard]:
    """Deal tensors out to files in order, a new file where the next tensor would exceed `max_bytes`."""
    shards: list[Shard] = []
    used = 0
    for name, shape in shapes.items():
        for hub_name, index in hub_parts(name, shape).items():
            size = torch.empty(shape, device="meta", dtype=dtype)[index].nbytes
            if not shards or used + size > max_bytes:
                shards.append([])
                used = 0
            shards[-1].append((hub_name, name, index))
            used += size
    return shards


def _write_shards(
    directory: Path, shards: list[Shard], read: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    weight_map: dict[str, str] = {}
    parameters = total_bytes = 0
    last_name, last = "", torch.empty(0)
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for hub_name, name, index in shard:
            if name != last_name:
                last_name, last = name, read(name).to("cpu", dtype)
            tensors[hub_name] = last[index].contiguous()
            parameters += tensors[hub_name].numel()
            total_bytes += tensors[hub_name].nbytes
        # Readers of Transformers' files insist on this mark.
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        metadata = {"total_parameters": parameters, "total_size": total_bytes}
        write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})


def holds_model(
    model_class: type[nn.Module],
    directory: Path,
    config: OlmoeConfig,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> bool:
    """Whether `directory` is what write_directory would write: the same configuration and tensors, bit for
    bit."""
    if not (directory / "config.json").is_file():
        return False
    stored = StoredWeights(directory)
    if OlmoeConfig.from_pretrained(directory) != _as_written(config, dtype, model_class):
        return False
    compared = 0
    for name, shape in parameter_shapes(model_class, config).items():
        whole = read(name).to("cpu", dtype)
        for hub_name, index in hub_parts(name, shape).items():
            if hub_name not in stored.tensors or not torch.equal(stored.read(hub_name), whole[index]):
                return False
            compared += 1
    return compared == len(stored.tensors)


def _as_written(config: OlmoeConfig, dtype: torch.dtype, model_class: type[nn.Module]) -> OlmoeConfig:
    return OlmoeConfig.from_dict(config.to_dict(), architectures=[model_class.__name__], dtype=dtype)


# --- reading ----------------------------------------------------------------------------------------------


def open_pretrained(
    model_class: type[nn.Module], directory: str | Path, trust_pickle: bool = False
) -> tuple[OlmoeConfig, Callable[[str], Tensor]]:
    """(Configuration, with the dtype of the weights; a function that reads one whole parameter, in its stored
    dtype, by its in-memory name.)"""
    directory = Path(directory)
    config = OlmoeConfig.from_pretrained(directory)
    stored = StoredWeights(directory, trust_pickle)
    if config.dtype is None:
        config.dtype = next(iter(stored.tensors.values())).dtype
    with torch.device("meta"):
        model = model_class(config)
    return config, _reader(model, config, stored, directory)


def _reader(
    model: nn.Module, config: OlmoeConfig, stored: StoredWeights, directory: Path
) -> Callable[[str], Tensor]:
    plan = _match_names(model, config, stored, directory)
    refuse_untied(config, stored, directory)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(name: str) -> Tensor:
        dtypes = (stored.tensors[stored_name].dtype for stored_name in plan[name])
        whole = torch.empty(shapes[name], dtype=functools.reduce(torch.promote_types, dtypes))
        for stored_name, index in plan[name].items():
            whole[index] = stored.read(stored_name)
        return whole

    return read


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter, or into this rank's shard of it."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank cuts its shard out of its own copy, nothing is sent.
        whole = whole.to(parameter.device_mesh.device_type)
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def _match_names(
    model: nn.Module, config: OlmoeConfig, stored: StoredWeights, directory: Path
) -> dict[str, dict[str, Index]]:
    """For each parameter the stored tensors that make it up. UserError lists all that do not fit."""
    prefix_there = any(name.startswith("model.") for name in stored.tensors)
    prefix_here = any(name.startswith("model.") for name, _ in model.named_parameters())
    plan: dict[str, dict[str, Index]] = {}
    missing, misshaped = [], []
    for name, parameter in model.named_parameters():
        # A base model's file has no `model.` in front, and a base model can be read from a whole one's.
        there = f"model.{name}" if prefix_there and not prefix_here else name
        there = there.removeprefix("model.") if not prefix_there else there
        parts: dict[str, Index] = (
            {there: ()} if there in stored.tensors else hub_parts(there, parameter.shape)
        )
        plan[name] = parts
        for stored_name, index in parts.items():
            expected = tuple(torch.empty(parameter.shape, device="meta")[index].shape)
            if stored_name not in stored.tensors:
                missing.append(stored_name)
            elif (shape := stored.tensors[stored_name].shape) != expected:
                misshaped.append(f"{stored_name} is {list(shape)}, the model's is {list(expected)}")
    used = {stored_name for parts in plan.values() for stored_name in parts}
    ignored = {"lm_head.weight"} if not prefix_here or config.tie_word_embeddings else set()
    # A constant that older converters wrote with every layer.
    ignored |= {name for name in stored.tensors if name.endswith("rotary_emb.inv_freq")}
    unexpected = sorted(stored.tensors.keys() - used - ignored)
    complaints = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(complaints.values()):
        lines = [f"tensors {what}: {first_few(names)}" for what, names in complaints.items() if names]
        raise UserError("\n  ".join([f"{directory} does not fit its config.json or the model:", *lines]))
    return plan


def refuse_untied(config: OlmoeConfig, stored: StoredWeights, directory: Path) -> None:
    """A file may hold a tied head beside the embedding; then it must be the same."""
    both = ("lm_head.weight", "model.embed_tokens.weight")
    if config.tie_word_embeddings and all(name in stored.tensors for name in both):
        head, embedding = (stored.read(name) for name in both)
        if not torch.equal(head, embedding):
            raise UserError(
                f"{directory}: tie_word_embeddings is true, but lm_head.weight is not the embedding; to keep "
                "both, set it to false in config.json"
            )


def refuse_other_function(model: OlmoeConfig, stored: OlmoeConfig, name: str) -> None:
    """UserError names every field with which the weights of `stored`, called `name`, would mean another
    function in a model of config `model`."""
    differences = [
        f"{item.name} is {getattr(stored, item.name)!r} there and {getattr(model, item.name)!r} in the model"
        for item in fields(OlmoeConfig)
        if item.name not in _NOT_COMPARED and getattr(stored, item.name) != getattr(model, item.name)
    ]
    if differences:
        raise UserError("\n  ".join([f"{name} describes another model:", *differences]))
