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
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.directory import dtype_to_use, parameter_shapes
from olmoe_train.model.hf.special_tokens import copy_tokenizer
from olmoe_train.model.transformer import OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_directory
from olmoe_train.utils.tensor_files import WEIGHTS, StoredWeights, check_tensor_shapes, write_safetensors

CONFIG, PICKLE = "config.yaml", "model.pt"
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
# Options of OLMo that change what the model computes: (the value that makes it an OLMoE, OLMo's default).
_REQUIRED: dict[str, tuple[Any, Any]] = {
    "block_type": ("moe", "sequential"),
    "activation_type": ("swiglu", "swiglu"),
    "layer_norm_type": ("rms", "default"),
    "layer_norm_with_affine": (True, True),
    "attention_layer_norm": (True, False),
    "attention_layer_norm_with_affine": (True, True),
    "norm_after": (False, False),
    "rope": (True, False),
    "alibi": (False, False),
    "include_bias": (False, True),
    "moe_dropless": (True, True),
    "moe_shared_expert": (False, False),
    "moe_interleave": (False, False),
    "scale_logits": (False, False),
    "embedding_layer_norm": (False, False),
    # OLMo clips before q_norm and k_norm. OLMoE, in Transformers and in this package, clips after them.
    "clip_qkv": (None, None),
}


# --- configuration ----------------------------------------------------------------------------------------


def is_olmo_directory(directory: Path) -> bool:
    """Whether a directory has a config.yaml of OLMo; the config.yaml of a run directory has other keys."""
    path = directory / CONFIG
    return path.is_file() and "d_model" in _model_section(path)


def read_olmo_config(directory: Path) -> OlmoeConfig:
    """Read the configuration of an OLMo checkpoint.

    Args:
        directory: Holds OLMo's config.yaml.

    Returns:
        The same architecture as an OlmoeConfig.

    Raises:
        UserError: The file cannot be read, lacks a key, or describes a model that is not an OLMoE; the
            message lists every option that differs.
    """
    path = directory / CONFIG
    theirs = _model_section(path)
    others = [
        f"{key} is {theirs.get(key, default)!r}, an OLMoE has {value!r}"
        for key, (value, default) in _REQUIRED.items()
        if theirs.get(key, default) != value
    ]
    if others:
        raise UserError("\n  ".join([f"{path} does not describe an OLMoE:", *others]))
    try:
        heads = theirs["n_heads"]
        wide = theirs.get("mlp_hidden_size") or theirs["mlp_ratio"] * theirs["d_model"]
        kv_heads = theirs.get("n_kv_heads") or (1 if theirs.get("multi_query_attention") else heads)
        return OlmoeConfig(
            vocab_size=theirs.get("embedding_size") or theirs["vocab_size"],
            hidden_size=theirs["d_model"],
            intermediate_size=wide // 2,  # OLMo's width is that of gate and up together
            num_hidden_layers=theirs["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=theirs["max_sequence_length"],
            initializer_range=theirs.get("init_std", OlmoeConfig.initializer_range),
            rms_norm_eps=theirs.get("layer_norm_eps", OlmoeConfig.rms_norm_eps),
            pad_token_id=theirs["pad_token_id"],
            eos_token_id=theirs["eos_token_id"],
            tie_word_embeddings=theirs["weight_tying"],
            rope_parameters={"rope_type": "default", "rope_theta": float(theirs.get("rope_theta", 10000))},
            attention_dropout=theirs.get("attention_dropout", 0.0),
            num_experts=theirs["moe_num_experts"],
            num_experts_per_tok=theirs["moe_top_k"],
            router_aux_loss_coef=theirs.get("moe_loss_weight", OlmoeConfig.router_aux_loss_coef),
        )
    except KeyError as error:
        raise UserError(f"{path}: model.{error.args[0]} is missing") from None
    except TypeError as error:
        raise UserError(f"{path}: not the configuration of an OLMo model: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def olmo_config(config: OlmoeConfig) -> dict[str, Any]:
    """The `model` section of OLMo's config.yaml for an architecture.

    Raises:
        UserError: The architecture has something that OLMo's MoE does not have; the message lists it.
    """
    rope = {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    cannot = [
        f"{name}={getattr(config, name)!r}"
        for name, value in {
            "hidden_act": "silu",
            "attention_bias": False,
            "norm_topk_prob": False,
            "clip_qkv": None,
        }.items()
        if getattr(config, name) != value
    ]
    if rope != {"rope_type": "default"}:
        cannot.append(f"rope_parameters={config.rope_parameters}")
    if not isinstance(config.eos_token_id, int) or config.pad_token_id is None:
        cannot.append(
            f"eos_token_id={config.eos_token_id}, pad_token_id={config.pad_token_id} (OLMo needs exactly one "
            "of each)"
        )
    if cannot:
        raise UserError(f"format=olmo: OLMo's MoE does not support {', '.join(cannot)}; use format=hf")
    return {key: value for key, (value, _) in _REQUIRED.items()} | {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "mlp_hidden_size": 2 * config.intermediate_size,
        "max_sequence_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "weight_tying": config.tie_word_embeddings,
        "rope_theta": config.rope_parameters["rope_theta"],
        "layer_norm_eps": config.rms_norm_eps,
        "bias_for_layer_norm": False,
        "attention_dropout": config.attention_dropout,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "init_fn": "normal",
        "init_std": config.initializer_range,
        "init_cutoff_factor": 3.0,
        "moe_num_experts": config.num_experts,
        "moe_top_k": config.num_experts_per_tok,
        "moe_loss_weight": config.router_aux_loss_coef,
    }


def _model_section(path: Path) -> dict[str, Any]:
    try:
        # Not resolved: a checkpoint must not read environment variables through ${oc.env:...}.
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # YAML and OmegaConf raise a dozen exception types
        raise UserError(f"{path}: cannot be read: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    return {str(key): value for key, value in model.items()} if isinstance(model, dict) else {}


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
    if not is_olmo_directory(directory) or _model_section(directory / CONFIG) != olmo_config(config):
        return False
    there, stored = open_olmo(directory)
    return there.dtype == dtype and all(
        torch.equal(stored(name), read(name).to("cpu", dtype))
        for name in parameter_shapes(OlmoeForCausalLM, config)
    )
