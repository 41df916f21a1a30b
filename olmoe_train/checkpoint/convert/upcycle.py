"""Sparse upcycling: an OLMoE is made from a dense model. Every expert starts as a copy of the dense MLP, or
as a slice of a copy, and the router starts from random weights.

The dense and the new model are run on the same tokens, so that the result comes with a statement of how far
their outputs agree.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.olmo_dense import (
    centered_writers,
    olmo_model,
    open_dense_olmo,
    record_query_key_rms,
    without_qk_norm,
)
from olmoe_train.checkpoint.convert.stored_model import StoredModel, open_stored_model
from olmoe_train.checkpoint.convert.streamed_forward import streamed_logits
from olmoe_train.checkpoint.convert.upcycled_weights import Reinitialization, upcycled_reader
from olmoe_train.config.choices import StripPrefix
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.verbs import UpcycleConfig
from olmoe_train.data.manifest import read_manifest
from olmoe_train.data.tokens import open_split
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.ablations import ABLATIONS, refuse_export
from olmoe_train.model.initialization import generator_of
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object

SEQUENCES, LENGTH = 4, 128
"""Number of sequences that both models are run on, and tokens per sequence."""
LARGEST_DIFFERENCE = 1e-3
"""Tolerance for fp32 logits that should be equal: largest absolute difference / largest logit."""


# --- input --------------------------------------------------------------------------------------------------


def open_dense(cfg: UpcycleConfig) -> tuple[StoredModel, bool]:
    """Open the dense model of `cfg.source` as an OLMoE with one expert.

    Returns:
        The stored model, and whether it is an OLMo 1, whose norms differ from OLMoE's (olmo_dense.py).

    Raises:
        UserError: The model cannot be upcycled; the message says why.
    """
    directory = Path(cfg.source).expanduser()
    strip_prefix = cfg.strip_prefix is StripPrefix.auto
    path = directory / "config.json"
    kind = read_json_object(path).get("model_type", "olmoe") if path.is_file() else "olmoe"
    if kind == "olmo":
        if cfg.step != "latest":
            raise UserError(
                f"step={cfg.step}: source={directory} is not a run directory and has no steps; omit step"
            )
        return open_dense_olmo(directory, cfg.trust_pickle, strip_prefix), True
    if kind in ("olmo2", "olmo3"):
        raise UserError(
            f"source={directory}: model_type {kind!r} cannot be upcycled to an OLMoE. Its layers add "
            "norm(f(x)) to the residual stream x, and OLMoE's add f(norm(x)). The first normalizes each "
            "token's output of f, the second each token's input, and no choice of weights makes them equal"
        )
    if kind != "olmoe":
        raise UserError(
            f"source={directory}: model_type is {kind!r}; what can be upcycled is olmo (OLMo 1 in the format "
            "of Transformers) and olmoe with one expert (model=olmo_dense_*)"
        )
    dense = open_stored_model(directory, cfg.step, cfg.trust_pickle, strip_prefix)
    if dense.config.num_experts != 1:
        raise UserError(
            f"source={directory} is not a dense model: it has {dense.config.num_experts} experts per layer"
        )
    refuse_export(dense.config.ablations)  # the new model would have the same fields
    return dense, False


def upcycled_config(dense: OlmoeConfig, cfg: UpcycleConfig) -> OlmoeConfig:
    """The architecture of the upcycled model.

    Raises:
        UserError: Options are invalid or do not fit the dense model; the message lists all of them.
    """
    dense_width = dense.intermediate_size
    width = dense_width if cfg.intermediate_size is None else cfg.intermediate_size
    errors = []
    if width < 1 or dense_width % width:
        errors.append(f"intermediate_size={width}: must divide the width of the dense MLP, {dense_width}")
    else:
        slices = dense_width // width
        errors += [
            f"{name}={getattr(cfg, name)}: must be a multiple of {slices}, the number of experts of "
            f"intermediate_size={width} into which one copy of the dense MLP ({dense_width}) is cut"
            for name in ("num_experts", "num_experts_per_tok")
            if getattr(cfg, name) % slices
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


def option_warnings(cfg: UpcycleConfig) -> list[str]:
    """One message for each option that has no effect, and for each that harms the new model."""
    found = []
    if cfg.noise_fraction == 0 and cfg.noise_std != UpcycleConfig.noise_std:
        found.append(f"noise_std={cfg.noise_std} has no effect: noise_fraction is 0")
    if cfg.norm_topk_prob and cfg.num_experts > cfg.num_experts_per_tok == 1:
        found.append(
            "num_experts_per_tok=1 with norm_topk_prob=true: the weight of the chosen expert is always 1, so "
            "the router gets no gradient; use 2 experts per token, or norm_topk_prob=false"
        )
    return found


def tokens_to_compare(config: OlmoeConfig, data_dir: str | None) -> Tensor:
    """The tokens that both models are run on.

    Args:
        config: Architecture of either model, for the vocabulary and the longest sequence.
        data_dir: Prepared data, whose first training tokens are taken. None: random tokens.

    Returns:
        Token ids, int64 [SEQUENCES, up to LENGTH].

    Raises:
        UserError: The data has too few tokens, or token ids that the model does not have.
    """
    length = min(LENGTH, config.max_position_embeddings)
    if data_dir is None:
        return torch.randint(config.vocab_size, (SEQUENCES, length), generator=generator_of("upcycle"))
    manifest = read_manifest(data_dir)
    if manifest.vocab_size > config.vocab_size:
        raise UserError(
            f"data_dir={data_dir}: has token ids up to {manifest.vocab_size - 1}, and the model's vocab_size "
            f"is {config.vocab_size}; give data that was prepared with the model's tokenizer"
        )
    split = open_split(data_dir, "train")
    if len(split) < SEQUENCES * length:
        raise UserError(f"data_dir={data_dir}: has {len(split)} tokens, {SEQUENCES * length} are needed")
    return torch.from_numpy(split.read(0, SEQUENCES * length).astype("int64")).view(SEQUENCES, length)


# --- result -------------------------------------------------------------------------------------------------

Upcycled = tuple[Callable[[str], Tensor], list[str]]
"""A function that returns the new model's parameters by name; and notes on how its outputs compare with those
of the dense model."""


def upcycle_dense(
    dense: StoredModel, config: OlmoeConfig, cfg: UpcycleConfig, input_ids_BS: Tensor
) -> Upcycled:
    """Upcycle an OLMoE with one expert.

    Args:
        dense: The dense model (`open_dense`).
        config: Architecture of the new model (`upcycled_config`).
        cfg: The options.
        input_ids_BS: Token ids on which both models are run, int64 [B, S].

    Raises:
        RuntimeError: The new model's outputs should equal the dense model's, and they do not.
    """
    read = _upcycled_reader(dense.read, dense.config, config, cfg)
    expected = streamed_logits(_on_meta(dense.config), dense.read, input_ids_BS)
    return read, compare_logits(expected, streamed_logits(_on_meta(config), read, input_ids_BS), cfg)


def upcycle_olmo(
    dense: StoredModel, config: OlmoeConfig, cfg: UpcycleConfig, input_ids_BS: Tensor
) -> Upcycled:
    """Upcycle an OLMo 1 (olmo_dense.py). Arguments and errors are those of `upcycle_dense`.

    The result equals the dense model except for q_norm and k_norm, whose weights are measured on
    `input_ids_BS`: the typical root mean square of the dense model's queries and keys.
    """
    model = olmo_model(dense.config)
    recorded = record_query_key_rms(model)
    expected = streamed_logits(model, dense.read, input_ids_BS)
    # The norms multiply each token by a factor, so the geometric mean over tokens is the right average.
    typical_rms = {name: torch.cat(of_tokens).log().mean().exp() for name, of_tokens in recorded.items()}
    stored = centered_writers(dense.read)
    read = _upcycled_reader(
        lambda name: stored(name).float() * typical_rms[name] if name in typical_rms else stored(name),
        dense.config,
        config,
        cfg,
    )
    without_norms = streamed_logits(without_qk_norm(_on_meta(config)), read, input_ids_BS)
    notes = [f"without q_norm and k_norm, {note}" for note in compare_logits(expected, without_norms, cfg)]
    complete = streamed_logits(_on_meta(config), read, input_ids_BS)
    notes.append(
        f"with them, {difference(expected, complete)}: OLMo 1 has none, and nothing is equal to that; their "
        f"weights are the usual size of its queries and keys ({_tokens(cfg)})"
    )
    return read, notes


def _upcycled_reader(
    read: Callable[[str], Tensor], dense: OlmoeConfig, config: OlmoeConfig, cfg: UpcycleConfig
) -> Callable[[str], Tensor]:
    reinitialization = Reinitialization(cfg.noise_fraction, cfg.noise_std)
    return upcycled_reader(read, dense.intermediate_size, config, cfg.seed, reinitialization)


def _on_meta(config: OlmoeConfig) -> OlmoeForCausalLM:
    with torch.device("meta"):
        return OlmoeForCausalLM(config)


def compare_logits(expected_BSV: Tensor, found_BSV: Tensor, cfg: UpcycleConfig) -> list[str]:
    """Compare the logits of the dense model and of the new model, each fp32 [B, S, V].

    Returns:
        One note for the user: whether the logits are equal, by how much they differ, and why they do.

    Raises:
        RuntimeError: No option makes the two differ, and they do.
    """
    reasons = []  # a model card shows these texts
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
        raise RuntimeError(f"the new model's outputs should equal the dense model's, but {seen}")
    return [f"the dense model's outputs: {seen}"]


def difference(expected_BSV: Tensor, found_BSV: Tensor) -> str:
    """The largest difference of two sets of logits, fp32 [B, S, V], and their mean KL divergence, as text."""
    log_p, log_q = expected_BSV.log_softmax(-1), found_BSV.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0)
    largest, scale = (found_BSV - expected_BSV).abs().max(), expected_BSV.abs().max()
    return (
        f"logits up to {scale:.3g} differ by up to {largest:.2g}, predictions by {divergence:.2g} nats (KL)"
    )


def _tokens(cfg: UpcycleConfig) -> str:
    return "random tokens" if cfg.data_dir is None else f"tokens of {Path(cfg.data_dir).resolve().name}"


def summary(dense: OlmoeConfig, config: OlmoeConfig) -> str:
    """One line for the user: number and kind of the experts that were made."""
    slices = dense.intermediate_size // config.intermediate_size
    cut = f", each cut into {slices} experts of width {config.intermediate_size}" if slices > 1 else ""
    return (
        f"{config.num_experts} experts, {config.num_experts_per_tok} a token: "
        f"{config.num_experts // slices} copies of the MLP of width {dense.intermediate_size}{cut}"
    )


def model_overrides(config: OlmoeConfig) -> list[str]:
    """The overrides with which `olmoe train` builds this architecture.

    Returns:
        "model.KEY=VALUE" for every field that differs from its default, and for every integer, because the
        presets set those.
    """
    described = {
        name: value
        for name, value in vars(ModelConfig()).items()
        if hasattr(config, name) and name not in (*ABLATIONS, "initialization")
    }
    return [
        f"model.{name}={_in_hydra(value)}"
        for name, default in described.items()
        if (value := getattr(config, name)) != default or type(value) is int
    ]


def _in_hydra(value: object) -> str:
    """A value as text that a shell passes on and Hydra parses."""
    if isinstance(value, dict):
        return "'{" + ",".join(f"{key}:{_in_hydra(item)}" for key, item in value.items()) + "}'"
    if isinstance(value, list):
        return "'[" + ",".join(_in_hydra(item) for item in value) + "]'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
