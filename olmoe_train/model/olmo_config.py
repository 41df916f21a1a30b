"""The config.yaml of the MoE branch of allenai/OLMo, the code that trained OLMoE-1B-7B, as an OlmoeConfig and
back.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.utils.errors import UserError

CONFIG = "config.yaml"
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


def is_olmo_directory(directory: Path) -> bool:
    """Whether a directory has a config.yaml of OLMo; the config.yaml of a run directory has other keys."""
    path = directory / CONFIG
    return path.is_file() and "d_model" in model_section(path)


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
    theirs = model_section(path)
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


def model_section(path: Path) -> dict[str, Any]:
    """The section `model` of a YAML file, not resolved; {} if it has none."""
    try:
        # Not resolved: a checkpoint must not read environment variables through ${oc.env:...}.
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # YAML and OmegaConf raise a dozen exception types
        raise UserError(f"{path}: cannot be read: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    return {str(key): value for key, value in model.items()} if isinstance(model, dict) else {}
