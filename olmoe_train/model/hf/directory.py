"""Hugging Face directories: config.json, generation_config.json, safetensors shards and tokenizer files.

In memory the experts of a layer are stacked (`mlp.experts.gate_up_proj` [E, 2F, D], `down_proj` [E, D, F]).
On disk every expert has its own tensors, named as on the hub (`mlp.experts.0.gate_proj.weight` [F, D], ...).
Both namings are read. The hub's is written.

Weights are passed around as a function `read`, which returns one whole parameter by its in-memory name, so
that no more than a few parameters are in memory at a time.

Shapes: E experts, F expert width, D hidden size.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from olmoe_train.model.ablations import refuse_export
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.special_tokens import (
    copy_tokenizer,
    generation_defaults,
    write_generation_config,
)
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_directory, write_json
from olmoe_train.utils.tensor_files import INDEX, WEIGHTS, StoredWeights, byte_count, check_tensor_shapes

log = logging.getLogger(__name__)

# Fields that may differ between a stored model and the model that its weights are loaded into. None of them
# changes what the weights compute for given tokens, except attention_dropout, which each training run sets.
_NOT_COMPARED = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "extra",
    "initialization",
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
    """The hub tensors that a parameter is stored as.

    Args:
        name: In-memory name of the parameter.
        shape: Shape of the whole parameter.

    Returns:
        Hub name -> index at which that tensor lies in the parameter.
    """
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
    """Write a Hugging Face directory, with about one shard in memory beyond what `read` returns.

    The directory never appears half written: files are written and synced beside it, then moved into place,
    config.json last.

    Args:
        model_class: OlmoeForCausalLM or OlmoeModel.
        config: Architecture of the model.
        directory: The directory to write.
        read: Returns one whole parameter by its in-memory name.
        dtype: Data type of the weights in the files.
        max_shard_size: Largest safetensors file, in bytes or as text such as "5GB".
        tokenizer: Directory whose tokenizer files are copied, or a tokenizer.json. None: no tokenizer.
        card: Text of README.md. None: no README.md.
        generation: Content of generation_config.json. None: made from `config`.
        verify: Read the files back and compare them with `read` before they are moved into place.

    Raises:
        UserError: `directory` already holds weights, or Transformers cannot represent the model.
        RuntimeError: `verify` is true, and what was read back is not what was written.
    """
    refuse_export(config.ablations)
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
            raise RuntimeError(
                f"{directory}: the files read back differ from what was written; is the disk failing?"
            )


def parameter_shapes(model_class: type[nn.Module], config: OlmoeConfig) -> dict[str, torch.Size]:
    """Every parameter of a model with its shape; nothing is allocated. A tied head is not listed, because it
    is the same parameter as the embedding."""
    with torch.device("meta"):
        model = model_class(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


Shard = list[tuple[str, str, Index]]
"""(hub name, parameter name, index in the parameter) of each tensor of one file."""


def plan_shards(shapes: dict[str, torch.Size], dtype: torch.dtype, max_bytes: int) -> list[Shard]:
    """Assign tensors to files in order. A new file starts when the next tensor would exceed `max_bytes`."""
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


def shard_name(number: int, count: int) -> str:
    """The name of a file of weights, of `count` that are counted from 1."""
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shards(
    directory: Path, shards: list[Shard], read: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    weight_map: dict[str, str] = {}
    parameters = total_bytes = 0
    last_name, last = "", torch.empty(0)
    for number, shard in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        tensors: dict[str, Tensor] = {}
        for hub_name, name, index in shard:
            if name != last_name:
                last_name, last = name, read(name).to("cpu", dtype)
            tensors[hub_name] = last[index].contiguous()
            parameters += tensors[hub_name].numel()
            total_bytes += tensors[hub_name].nbytes
        # Transformers refuses files without this mark.
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
    """Whether `directory` holds the configuration and, bit for bit, the tensors that `write_directory` would
    write from the same arguments."""
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
    model_class: type[nn.Module],
    directory: str | Path,
    trust_pickle: bool = False,
    strip_prefix: bool = False,
) -> tuple[OlmoeConfig, Callable[[str], Tensor]]:
    """Open a Hugging Face directory. Only file headers are read.

    Args:
        model_class: OlmoeForCausalLM or OlmoeModel; the directory may hold either.
        directory: Holds config.json and the weights.
        trust_pickle: Accept weights in pytorch_model.bin, through torch.load(weights_only=True).
        strip_prefix: Take the prefixes of wrappers (`_orig_mod.`, `module.`) off the names of the tensors.

    Returns:
        The configuration, with a dtype; and a function that returns one whole parameter by its in-memory
        name, on the CPU, in its stored dtype. The function raises a UserError if a value is not finite.

    Raises:
        UserError: A file is missing, damaged or unsafe, the weights are quantized, or the tensors do not fit
            the configuration; the message names every tensor that does not fit.
    """
    directory = Path(directory)
    config = OlmoeConfig.from_pretrained(directory)
    refuse_quantized(config, directory)
    stored = StoredWeights(directory, trust_pickle, strip_prefix)
    ignored = ignored_tensors(config, stored.tensors)
    dtypes = (tensor.dtype for name, tensor in stored.tensors.items() if name not in ignored)
    config.dtype = dtype_to_use(config.dtype, dtypes, directory)
    with torch.device("meta"):
        model = model_class(config)
    return config, _reader(model, config, stored, directory)


def refuse_quantized(config: OlmoeConfig, directory: Path) -> None:
    """Raise a UserError if config.json says that the weights are quantized."""
    for key in ("quantization_config", "compression_config"):  # the second: older compressed-tensors
        if quantization := config.extra.get(key):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UserError(
                f"{directory}/config.json has {key} (quant_method {method}), and quantized weights cannot be "
                "read: give the unquantized model (in Transformers: model.dequantize(), then "
                f"save_pretrained). If the weights in the files are not quantized, delete {key} from "
                "config.json"
            )


def dtype_to_use(said: torch.dtype | None, stored: Iterable[torch.dtype], directory: Path) -> torch.dtype:
    """The dtype that stored weights are converted to. If it is not that of all of them, a warning says so.

    Args:
        said: The dtype in the configuration. None: that of the first weight is used, as in Transformers.
        stored: The dtypes of the weights in the files, in the order of the weights.
        directory: Where they are stored.
    """
    found = list(dict.fromkeys(stored))
    used = said or found[0]
    if found != [used]:
        log.warning(
            "warning: %s: the configuration %s, and the weights are stored in %s. They are converted to %s "
            "unless another type is asked for (precision=, dtype=). Training starts from the stored values",
            directory,
            "names no dtype" if said is None else f"says {_name(said)}",
            " and ".join(map(_name, found)),
            _name(used),
        )
    return used


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reader(
    model: nn.Module, config: OlmoeConfig, stored: StoredWeights, directory: Path
) -> Callable[[str], Tensor]:
    plan = _match_names(model, config, stored, directory)
    check_tied_head(config, stored, directory)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(name: str) -> Tensor:
        dtypes = (stored.tensors[stored_name].dtype for stored_name in plan[name])
        whole = torch.empty(shapes[name], dtype=functools.reduce(torch.promote_types, dtypes))
        for stored_name, index in plan[name].items():
            whole[index] = stored.read_finite(stored_name)
        return whole

    return read


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter, or into this rank's shard of it (DTensor)."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank takes its shard from its own copy, so nothing is sent.
        whole = whole.to(parameter.device_mesh.device_type)
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def _match_names(
    model: nn.Module, config: OlmoeConfig, stored: StoredWeights, directory: Path
) -> dict[str, dict[str, Index]]:
    """The stored tensors that make up each parameter, with their index in it.

    Raises:
        UserError: A tensor is missing, unexpected or of the wrong shape, which the message names.
    """
    # The files of a base model (OlmoeModel) have no "model." before each name. Either kind of model can be
    # loaded from the files of the other, except that a base model's files have no head.
    prefix_in_files = any(name.startswith("model.") for name in stored.tensors)
    prefix_in_model = any(name.startswith("model.") for name, _ in model.named_parameters())
    plan: dict[str, dict[str, Index]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        in_files = f"model.{name}" if prefix_in_files and not prefix_in_model else name
        in_files = in_files if prefix_in_files else in_files.removeprefix("model.")
        fused = in_files in stored.tensors
        plan[name] = {in_files: ()} if fused else hub_parts(in_files, parameter.shape)
        empty = torch.empty(parameter.shape, device="meta")
        expected |= {stored_name: tuple(empty[index].shape) for stored_name, index in plan[name].items()}
    ignored = ignored_tensors(config, stored.tensors, has_head=prefix_in_model)
    found = {name: tensor.shape for name, tensor in stored.tensors.items() if name not in ignored}
    check_tensor_shapes(f"{directory} does not fit its config.json or the model:", expected, found)
    return plan


def ignored_tensors(config: OlmoeConfig, names: Iterable[str], has_head: bool = True) -> set[str]:
    """Tensors that a file may hold although the model has no parameter of that name.

    Args:
        config: Architecture of the model.
        names: Names of the tensors in the file.
        has_head: Whether the model has a head (OlmoeForCausalLM).

    Returns:
        The head, where it is tied to the embedding or the model has none; and `rotary_emb.inv_freq`, a
        constant that older converters wrote for every layer.
    """
    ignored = {name for name in names if name.endswith("rotary_emb.inv_freq")}
    return ignored | ({"lm_head.weight"} if config.tie_word_embeddings or not has_head else set())


def check_tied_head(config: OlmoeConfig, stored: StoredWeights, directory: Path) -> None:
    """Raise a UserError if the head is tied, and the file has another head than the embedding."""
    both = ("lm_head.weight", "model.embed_tokens.weight")
    if config.tie_word_embeddings and all(name in stored.tensors for name in both):
        head, embedding = (stored.read_finite(name) for name in both)  # a NaN is not equal to itself
        if not torch.equal(head, embedding):
            raise UserError(
                f"{directory}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; "
                "to keep both, set tie_word_embeddings to false in config.json"
            )


def check_same_architecture(
    model: OlmoeConfig, stored: OlmoeConfig, name: str, model_name: str = "the model"
) -> None:
    """Check that stored weights compute the same in a model as where they come from.

    Args:
        model: Configuration of the model that the weights are loaded into.
        stored: Configuration that the weights are stored with.
        name: What to call the stored model in the message.
        model_name: What to call the model in the message.

    Raises:
        UserError: Fields that change what the weights compute differ; the message names all of them.
    """
    differences = [
        f"{item.name} is {getattr(stored, item.name)!r} there and {getattr(model, item.name)!r} in "
        f"{model_name}"
        for item in fields(OlmoeConfig)
        if item.name not in _NOT_COMPARED and getattr(stored, item.name) != getattr(model, item.name)
    ]
    if differences:
        raise UserError("\n  ".join([f"{name} has another architecture than {model_name}:", *differences]))
