"""Make an OLMoE of a dense model: every expert starts as its MLP, or as a slice of it, the router as a new
one (sparse upcycling). The result is a Hugging Face directory, for model.init_from and for Transformers.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.olmo_dense import (
    centred,
    olmo_model,
    open_dense_olmo,
    watch_sizes,
    without_qk_norm,
)
from olmoe_train.checkpoint.convert.source import Source, open_source
from olmoe_train.checkpoint.convert.streamed_forward import streamed_logits
from olmoe_train.checkpoint.convert.upcycled_weights import Noise, upcycled
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.verbs import UpcycleConfig
from olmoe_train.data.tokens import open_split, read_manifest
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.initialization import generator_of
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object

SEQUENCES, LENGTH = 4, 128
"""Of the tokens that both models are run on."""
LARGEST_DIFFERENCE = 1e-3
"""Of fp32 logits that should be the same, as a share of the largest one."""


# --- what is asked for ------------------------------------------------------------------------------------


def open_dense(cfg: UpcycleConfig) -> tuple[Source, bool]:
    """(The dense model as an OLMoE with one expert, opened; whether it is an OLMo 1.) UserError where it is
    none that can be upcycled."""
    directory = Path(cfg.source).expanduser()
    path = directory / "config.json"
    kind = read_json_object(path).get("model_type", "olmoe") if path.is_file() else "olmoe"
    if kind == "olmo":
        if cfg.step != "latest":
            raise UserError(f"step={cfg.step}: source={directory} has no steps, it is not a run directory")
        return open_dense_olmo(directory, cfg.trust_pickle), True
    if kind in ("olmo2", "olmo3"):
        raise UserError(
            f"source={directory}: model_type is {kind!r}, whose layers add norm(f(x)) to the residual "
            "stream x, where OLMoE's add f(norm(x)). One divides by the size of what f gives, the other by "
            "the size of what it takes, token by token: no weights make one the other"
        )
    if kind != "olmoe":
        raise UserError(
            f"source={directory}: model_type is {kind!r}; what can be upcycled is olmo (OLMo 1 in the format "
            "of Transformers) and olmoe with one expert (model=olmo_dense_*)"
        )
    dense = open_source(directory, cfg.step, cfg.trust_pickle)
    if dense.config.num_experts != 1:
        raise UserError(
            f"source={directory}: not a dense model, it has {dense.config.num_experts} experts a layer"
        )
    return dense, False


def upcycled_config(dense: OlmoeConfig, cfg: UpcycleConfig) -> OlmoeConfig:
    """UserError lists what cannot be."""
    wide = dense.intermediate_size
    width = wide if cfg.intermediate_size is None else cfg.intermediate_size
    errors = []
    if width < 1 or wide % width:
        errors.append(f"intermediate_size={width}: must divide the dense MLP's, {wide}")
    else:
        errors += [
            f"{name}={getattr(cfg, name)}: must be a multiple of {wide // width}, the number of experts of "
            f"intermediate_size={width} that one copy of the dense MLP ({wide}) is cut into"
            for name in ("num_experts", "num_experts_per_tok")
            if getattr(cfg, name) % (wide // width)
        ]
    if not 0 <= cfg.noise_fraction <= 1:
        errors.append(f"noise_fraction={cfg.noise_fraction}: must be from 0 to 1")
    if not cfg.noise_std > 0:
        errors.append(f"noise_std={cfg.noise_std}: must be positive")
    if errors:
        raise UserError("\n  ".join(errors))
    return OlmoeConfig.from_dict(
        dense.to_dict(),
        num_experts=cfg.num_experts,
        num_experts_per_tok=cfg.num_experts_per_tok,
        intermediate_size=width,
        norm_topk_prob=cfg.norm_topk_prob,
    )


def warnings(cfg: UpcycleConfig) -> list[str]:
    """Of options that do nothing here, or harm."""
    found = []
    if cfg.noise_fraction == 0 and cfg.noise_std != UpcycleConfig.noise_std:
        found.append(f"noise_std={cfg.noise_std} has no effect: noise_fraction is 0")
    if cfg.norm_topk_prob and cfg.num_experts > cfg.num_experts_per_tok == 1:
        found.append(
            "num_experts_per_tok=1 with norm_topk_prob=true: the one weight is always 1, from which the "
            "router learns nothing; take 2 experts a token, or norm_topk_prob=false"
        )
    return found


def tokens_to_compare(config: OlmoeConfig, data_dir: str | None) -> Tensor:
    """int64 [B, S]: the first tokens of prepared data, or random ones."""
    length = min(LENGTH, config.max_position_embeddings)
    if data_dir is None:
        return torch.randint(config.vocab_size, (SEQUENCES, length), generator=generator_of("upcycle"))
    manifest = read_manifest(data_dir)
    if manifest.vocab_size > config.vocab_size:
        raise UserError(
            f"data_dir={data_dir}: has token ids up to {manifest.vocab_size - 1}, the model's vocab_size is "
            f"{config.vocab_size}; give data that was prepared with the model's tokenizer"
        )
    split = open_split(data_dir, "train")
    if len(split) < SEQUENCES * length:
        raise UserError(f"data_dir={data_dir}: has {len(split)} tokens, {SEQUENCES * length} are needed")
    return torch.from_numpy(split.read(0, SEQUENCES * length).astype("int64")).view(SEQUENCES, length)


# --- what comes of it -------------------------------------------------------------------------------------

Upcycled = tuple[Callable[[str], Tensor], list[str]]
"""The new model's parameters by name; notes on how far it computes what the dense one does."""


def upcycle_dense(dense: Source, config: OlmoeConfig, cfg: UpcycleConfig, input_ids_BS: Tensor) -> Upcycled:
    read = _experts_of(dense.read, dense.config, config, cfg)
    expected = streamed_logits(_on_meta(dense.config), dense.read, input_ids_BS)
    return read, compare(expected, streamed_logits(_on_meta(config), read, input_ids_BS), cfg)


def upcycle_olmo(dense: Source, config: OlmoeConfig, cfg: UpcycleConfig, input_ids_BS: Tensor) -> Upcycled:
    """Of an OLMo 1 (olmo_dense.py): equal but for q_norm and k_norm, with measured weights."""
    model = olmo_model(dense.config)
    sizes = watch_sizes(model)
    expected = streamed_logits(model, dense.read, input_ids_BS)
    # The geometric mean over tokens: right on average for the factor by which each token is scaled.
    usual = {name: torch.cat(of_tokens).log().mean().exp() for name, of_tokens in sizes.items()}
    stored = centred(dense.read)
    read = _experts_of(
        lambda name: stored(name).float() * usual[name] if name in usual else stored(name),
        dense.config,
        config,
        cfg,
    )
    bare = streamed_logits(without_qk_norm(_on_meta(config)), read, input_ids_BS)
    notes = [f"without q_norm and k_norm, {note}" for note in compare(expected, bare, cfg)]
    whole = streamed_logits(_on_meta(config), read, input_ids_BS)
    notes.append(
        f"with them, {difference(expected, whole)}: OLMo 1 has none, and nothing is equal to that; their "
        f"weights are the usual size of its queries and keys ({_tokens(cfg)})"
    )
    return read, notes


def _experts_of(
    read: Callable[[str], Tensor], dense: OlmoeConfig, config: OlmoeConfig, cfg: UpcycleConfig
) -> Callable[[str], Tensor]:
    noise = Noise(cfg.noise_fraction, cfg.noise_std)
    return upcycled(read, dense.intermediate_size, config, cfg.seed, noise)


def _on_meta(config: OlmoeConfig) -> OlmoeForCausalLM:
    with torch.device("meta"):
        return OlmoeForCausalLM(config)


def compare(expected_BSV: Tensor, found_BSV: Tensor, cfg: UpcycleConfig) -> list[str]:
    """Notes on the logits of the dense model and the new one. RuntimeError where they should be the same and
    are not."""
    reasons = []
    if cfg.noise_fraction > 0:
        reasons.append(f"{cfg.noise_fraction:.0%} of each copy's weights are drawn anew")
    if not cfg.norm_topk_prob and cfg.num_experts_per_tok < cfg.num_experts:
        reasons.append(
            "norm_topk_prob=false multiplies what the MLPs give by the sum of the top-k probabilities, "
            f"{cfg.num_experts_per_tok / cfg.num_experts:.3g} or more"
        )
    if reasons:
        seen = difference(expected_BSV, found_BSV)
        return [f"not the dense model's outputs, {seen} ({_tokens(cfg)}): {' and '.join(reasons)}"]
    largest, scale = (found_BSV - expected_BSV).abs().max(), expected_BSV.abs().max()
    seen = f"in fp32 logits up to {scale:.3g} differ by at most {largest:.2g} ({_tokens(cfg)})"
    if largest > LARGEST_DIFFERENCE * scale:
        raise RuntimeError(f"the new model should compute what the dense one does, but {seen}")
    return [f"the dense model's outputs: {seen}"]


def difference(expected_BSV: Tensor, found_BSV: Tensor) -> str:
    log_p, log_q = expected_BSV.log_softmax(-1), found_BSV.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0)
    largest, scale = (found_BSV - expected_BSV).abs().max(), expected_BSV.abs().max()
    return (
        f"logits up to {scale:.3g} differ by up to {largest:.2g}, predictions by {divergence:.2g} nats (KL)"
    )


def _tokens(cfg: UpcycleConfig) -> str:
    return "random tokens" if cfg.data_dir is None else f"tokens of {Path(cfg.data_dir).resolve().name}"


def what_was_made(dense: OlmoeConfig, config: OlmoeConfig) -> str:
    slices = dense.intermediate_size // config.intermediate_size
    cut = f", each cut into {slices} experts of width {config.intermediate_size}" if slices > 1 else ""
    return (
        f"{config.num_experts} experts, {config.num_experts_per_tok} a token: "
        f"{config.num_experts // slices} copies of the MLP of width {dense.intermediate_size}{cut}"
    )


def model_overrides(config: OlmoeConfig) -> list[str]:
    """What describes the model to `olmoe train`: whole numbers, which presets set, and what differs from its
    defaults."""
    described = {name: value for name, value in vars(ModelConfig()).items() if hasattr(config, name)}
    return [
        f"model.{name}={_in_hydra(value)}"
        for name, default in described.items()
        if (value := getattr(config, name)) != default or type(value) is int
    ]


def _in_hydra(value: object) -> str:
    """A value as a shell and Hydra read it."""
    if isinstance(value, dict):
        return "'{" + ",".join(f"{key}:{_in_hydra(item)}" for key, item in value.items()) + "}'"
    if isinstance(value, list):
        return "'[" + ",".join(_in_hydra(item) for item in value) + "]'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
