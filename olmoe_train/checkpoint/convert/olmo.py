"""Checkpoints of the MoE branch of allenai/OLMo, the code that trained OLMoE-1B-7B: config.yaml, and the
weights in model.safetensors or model.pt (unsharded).

    this package, model.layers.N.            OLMo, transformer.blocks.N.
    self_attn.{q,k,v}_proj.weight            att_proj.weight, the three concatenated along dimension 0
    self_attn.o_proj.weight                  attn_out.weight
    self_attn.{q,k}_norm.weight              {q,k}_norm.weight
    input_layernorm.weight                   attn_norm.weight
    post_attention_layernorm.weight          ff_norm.weight
    mlp.gate.weight [E, D]                   ffn.router.layer.weight
    mlp.experts.gate_up_proj [E, 2F, D]      ffn.experts.mlp.w1 (gate) and v1 (up), each [E F, D] (megablocks)
    mlp.experts.down_proj [E, D, F]          ffn.experts.mlp.w2 [E F, D], the transpose of each expert

Outside the blocks: transformer.wte (embedding), transformer.ln_f (final norm), transformer.ff_out (head).

Shapes: E experts, F expert width, D hidden size.
"""

import base64
import binascii
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.directory import dtype_to_use, parameter_shapes
from olmoe_train.model.hf.special_tokens import copy_tokenizer
from olmoe_train.model.olmo_config import (
    CONFIG,
    is_olmo_directory,
    model_section,
    olmo_config,
    read_olmo_config,
)
from olmoe_train.model.transformer import OlmoeForCausalLM
from olmoe_train.utils.files import atomic_directory
from olmoe_train.utils.tensor_files import WEIGHTS, StoredWeights, check_tensor_shapes, write_safetensors

PICKLE = "model.pt"
_OUTSIDE = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "transformer.ff_out.weight",
}
_IN_BLOCK = {
    "self_attn.o_proj.weight": "attn_out.weight",
    "self_attn.q_norm.weight": "q_norm.weight",
    "self_attn.k_norm.weight": "k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ff_norm.weight",
    "mlp.gate.weight": "ffn.router.layer.weight",
}


# --- tensors ----------------------------------------------------------------------------------------------


def open_olmo(
    directory: Path, trust_pickle: bool = False, strip_prefix: bool = False
) -> tuple[OlmoeConfig, Callable[[str], Tensor]]:
    """Open an OLMo checkpoint. Only file headers are read.

    Args:
        directory: Holds config.yaml and the weights.
        trust_pickle: Accept weights in model.pt, a pickle, through torch.load(weights_only=True).
        strip_prefix: Take the prefixes of wrappers (`_orig_mod.`, `module.`) off the names of the tensors.

    Returns:
        The configuration, with the dtype of the weights; and a function that reads one whole parameter by
        its in-memory name. The function raises a UserError if a value is not finite.

    Raises:
        UserError: As `read_olmo_config`, or the weights are a pickle and `trust_pickle` is false, or a tensor
            is missing, unexpected or of the wrong shape; the message names every such tensor.
    """
    config = read_olmo_config(directory)
    stored = StoredWeights(directory, trust_pickle, strip_prefix, PICKLE, _decode)
    found = {name: tensor.shape for name, tensor in stored.tensors.items()}
    check_tensor_shapes(f"{directory} does not fit its config.yaml:", olmo_shapes(config), found)
    config.dtype = dtype_to_use(None, (tensor.dtype for tensor in stored.tensors.values()), directory)
    return config, lambda name: _from_olmo(config, name, stored.read_finite)


def olmo_shapes(config: OlmoeConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of OLMo's state dict with its shape, in the order of the state dict."""
    width, experts = config.hidden_size, config.num_experts
    head_width = width // config.num_attention_heads
    block = {
        "k_norm.weight": (config.num_key_value_heads * head_width,),
        "q_norm.weight": (width,),
        "attn_out.weight": (width, width),
        "ffn.experts.mlp.w1": (experts * config.intermediate_size, width),
        "ffn.experts.mlp.w2": (experts * config.intermediate_size, width),
        "ffn.experts.mlp.v1": (experts * config.intermediate_size, width),
        "ffn.router.layer.weight": (experts, width),
        "attn_norm.weight": (width,),
        "ff_norm.weight": (width,),
        "att_proj.weight": (width + 2 * config.num_key_value_heads * head_width, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config.vocab_size, width)}
    shapes["transformer.ln_f.weight"] = (width,)
    for layer in range(config.num_hidden_layers):
        shapes |= {f"transformer.blocks.{layer}.{name}": shape for name, shape in block.items()}
    if not config.tie_word_embeddings:
        shapes["transformer.ff_out.weight"] = (config.vocab_size, width)
    return shapes


def _from_olmo(config: OlmoeConfig, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """This package's parameter `name`, made from OLMo's tensors; `read` returns one of those by name."""
    if name in _OUTSIDE:
        return read(_OUTSIDE[name])
    _, _, layer, part = name.split(".", 3)
    block = f"transformer.blocks.{layer}"
    if part in _IN_BLOCK:
        return read(f"{block}.{_IN_BLOCK[part]}")
    if match := re.fullmatch(r"self_attn\.([qkv])_proj\.weight", part):
        width = config.hidden_size
        kv_width = config.num_key_value_heads * config.head_dim
        return read(f"{block}.att_proj.weight").split([width, kv_width, kv_width])["qkv".index(match[1])]
    experts_EFD = (config.num_experts, config.intermediate_size, config.hidden_size)
    if part == "mlp.experts.gate_up_proj":
        halves = [read(f"{block}.ffn.experts.mlp.{half}").view(experts_EFD) for half in ("w1", "v1")]
        return torch.cat(halves, dim=1)
    assert part == "mlp.experts.down_proj", name
    return read(f"{block}.ffn.experts.mlp.w2").view(experts_EFD).transpose(1, 2)


def _to_olmo(config: OlmoeConfig, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """OLMo's tensor `name`, made from this package's parameters; `read` returns one of those by name."""
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    if name in outside:
        return read(outside[name])
    _, _, layer, part = name.split(".", 3)
    ours = f"model.layers.{layer}"
    in_block = {theirs: ours_part for ours_part, theirs in _IN_BLOCK.items()}
    if part in in_block:
        return read(f"{ours}.{in_block[part]}")
    if part == "att_proj.weight":
        return torch.cat([read(f"{ours}.self_attn.{which}_proj.weight") for which in "qkv"])
    width = config.intermediate_size
    if part == "ffn.experts.mlp.w2":
        return read(f"{ours}.mlp.experts.down_proj").transpose(1, 2).flatten(0, 1)
    rows = {"ffn.experts.mlp.w1": slice(0, width), "ffn.experts.mlp.v1": slice(width, None)}[part]
    return read(f"{ours}.mlp.experts.gate_up_proj")[:, rows].flatten(0, 1)


def _encode(name: str) -> str:
    """The key under which OLMo stores a tensor in a safetensors file (olmo/safetensors_util.py)."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode()


def _decode(key: str) -> str:
    """The tensor name in such a key; any other key is returned unchanged.

    The name is read from the pickle's string opcodes. Nothing is unpickled.
    """
    try:
        content = base64.b64decode(key, altchars=b"-_", validate=True)
        return ".".join(str(value) for _, value, _ in pickletools.genops(content) if isinstance(value, str))
    except (binascii.Error, ValueError, UnicodeError):
        return key


# --- writing ----------------------------------------------------------------------------------------------


def write_olmo_directory(
    config: OlmoeConfig,
    directory: Path,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint that OLMo loads. One tensor at a time is in memory.

    The files are written beside `directory`, read back and compared, and moved into place only then.

    Args:
        config: Architecture of the model.
        directory: The directory to write.
        read: Returns one whole parameter by its in-memory name.
        dtype: Data type of the weights in the file.
        tokenizer: Directory whose tokenizer files are copied, or a tokenizer.json. None: no tokenizer.

    Raises:
        UserError: OLMo's MoE cannot express `config`.
        RuntimeError: What was read back is not what was written.
    """
    section = olmo_config(config)
    names = {_encode(name): name for name in olmo_shapes(config)}
    shapes = {key: olmo_shapes(config)[name] for key, name in names.items()}
    with atomic_directory(directory, last=CONFIG) as temporary:
        write_safetensors(
            temporary / WEIGHTS,
            shapes,
            dtype,
            lambda key: _to_olmo(config, names[key], read).to("cpu", dtype),
        )
        OmegaConf.save({"model": section}, temporary / CONFIG)
        copy_tokenizer(tokenizer, temporary)
        if not holds_olmo_model(temporary, config, read, dtype):
            raise RuntimeError(
                f"{directory}: the files read back differ from what was written; is the disk failing?"
            )


def holds_olmo_model(
    directory: Path, config: OlmoeConfig, read: Callable[[str], Tensor], dtype: torch.dtype
) -> bool:
    """Whether `directory` holds, bit for bit, the model that `write_olmo_directory` would write."""
    if not is_olmo_directory(directory) or model_section(directory / CONFIG) != olmo_config(config):
        return False
    there, stored = open_olmo(directory)
    return there.dtype == dtype and all(
        torch.equal(stored(name), read(name).to("cpu", dtype))
        for name in parameter_shapes(OlmoeForCausalLM, config)
    )
