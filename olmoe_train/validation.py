"""Cross-field checks of a training config, all reported together, before anything is allocated."""

import math
from pathlib import Path

import torch
import torch.distributed as dist

from olmoe_train.checkpoint.source import tokenizer_directory
from olmoe_train.checkpoint.special_tokens import special_token_errors
from olmoe_train.choices import (
    ActivationCheckpointing,
    BalanceScope,
    Device,
    Offload,
    Precision,
    Strategy,
)
from olmoe_train.cli import documented_keys
from olmoe_train.config import ParallelConfig, SourceConfig, TrainConfig, olmoe_config
from olmoe_train.data.config import OlmoFilesConfig
from olmoe_train.data.mixture import mixture_errors, read_manifests, sources, verify
from olmoe_train.distributed.zero_config import deepspeed_config
from olmoe_train.errors import UserError
from olmoe_train.validation_backend import backend_errors, machine_errors


def validate(cfg: TrainConfig, world_size: int) -> list[str]:
    """Raise one UserError that lists everything wrong with `cfg` on `world_size` ranks, each with key, value
    and fix.

    Returns warnings: options that are set and have no effect in this run.
    """
    errors = [*configuration_errors(cfg, world_size), *_data_errors(cfg), *machine_errors(cfg)]
    if not errors:
        errors = _deepspeed_file_errors(cfg, world_size)
    if errors:
        count = f"{len(errors)} errors" if len(errors) > 1 else "1 error"
        raise UserError("\n  - ".join([f"{count} in the configuration:", *errors]))
    return [*_no_effect(cfg), *_gathering_without_effect(cfg.parallel, world_size)]


def configuration_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with `cfg` on `world_size` ranks, data.dir left aside; a message an error."""
    errors = [*_trainer_errors(cfg, world_size), *_schedule_errors(cfg), *_model_errors(cfg)]
    return errors + backend_errors(cfg)


def _trainer_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    trainer, parallel, errors = cfg.trainer, cfg.parallel, []
    if trainer.max_steps is None and trainer.max_tokens is None and trainer.max_epochs is None:
        errors.append(
            "trainer.max_steps, max_tokens and max_epochs are all null: set one, so that the run ends"
        )
    positive = {
        "trainer.max_steps": trainer.max_steps,
        "trainer.max_tokens": trainer.max_tokens,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.stop_at_step": trainer.stop_at_step,
        "trainer.global_batch_size": trainer.global_batch_size,
        "trainer.micro_batch_size": trainer.micro_batch_size,
        "trainer.log_every": trainer.log_every,
        "logging.dead_expert_steps": cfg.logging.dead_expert_steps,
        "parallel.expert_parallel_size": parallel.expert_parallel_size,
        "parallel.replicate_size": parallel.replicate_size,
        "data.sequence_length": cfg.data.sequence_length - 1,  # one token has no next one to predict
        "evaluation.micro_batch_size": cfg.evaluation.micro_batch_size,
        "evaluation.max_sequences": cfg.evaluation.max_sequences,
        "checkpoint.max_failures": cfg.checkpoint.max_failures,
        "optimizer.lr": cfg.optimizer.lr,
        "trainer.timeout": trainer.timeout,
        "trainer.spike_sigmas": trainer.spike_sigmas,
    }
    errors += [
        f"{key}={value}: must be positive"
        for key, value in positive.items()
        if value is not None and value <= 0
    ]
    not_negative = {
        "checkpoint.every": cfg.checkpoint.every,
        "checkpoint.keep": cfg.checkpoint.keep,
        "checkpoint.keep_every": cfg.checkpoint.keep_every,
        "checkpoint.export_every": cfg.checkpoint.export_every,
        "evaluation.every": cfg.evaluation.every,
        "trainer.max_skipped_steps": trainer.max_skipped_steps,
        "parallel.prefetch": parallel.prefetch,
        "data.num_workers": cfg.data.num_workers,
        "optimizer.weight_decay": cfg.optimizer.weight_decay,
        "optimizer.max_grad_norm": cfg.optimizer.max_grad_norm,
        "loss.router_aux_loss_coef": cfg.loss.router_aux_loss_coef,
        "loss.router_z_loss_coef": cfg.loss.router_z_loss_coef,
    }
    errors += [f"{key}={value}: must not be negative" for key, value in not_negative.items() if value < 0]
    a_pass = trainer.micro_batch_size * world_size
    if a_pass > 0 and trainer.global_batch_size % a_pass:
        nearest = max(1, round(trainer.global_batch_size / a_pass)) * a_pass
        errors.append(
            f"trainer.global_batch_size={trainer.global_batch_size}: must be a multiple of "
            f"trainer.micro_batch_size x ranks = {trainer.micro_batch_size} x {world_size} = "
            f"{a_pass}; the nearest is {nearest}"
        )
    errors += _parallel_errors(cfg, world_size)
    if any(not 0 <= beta < 1 for beta in cfg.optimizer.betas):
        errors.append(f"optimizer.betas={list(cfg.optimizer.betas)}: each must be in [0, 1)")
    return errors


def _parallel_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    parallel, errors = cfg.parallel, []
    if parallel.strategy is not Strategy.fsdp and parallel.replicate_size != 1:
        errors.append(
            f"parallel.replicate_size={parallel.replicate_size}: has no meaning with parallel.strategy="
            f"{parallel.strategy.value}; use parallel.strategy=fsdp for HSDP, or leave replicate_size=1"
        )
    elif parallel.replicate_size > 0 and world_size % parallel.replicate_size:
        errors.append(
            f"parallel.replicate_size={parallel.replicate_size}: must divide the {world_size} ranks"
        )
    errors += _expert_parallel_errors(cfg, world_size)
    if parallel.strategy is Strategy.deepspeed:
        errors += _deepspeed_errors(cfg, world_size)
    return errors


def _expert_parallel_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    parallel, experts = cfg.parallel, cfg.model.num_experts
    size = parallel.expert_parallel_size
    if size <= 1 or parallel.replicate_size < 1:
        return []  # off, or reported as not positive
    if experts == 1:
        return [
            (
                f"parallel.expert_parallel_size={size}: a dense model (model.num_experts=1) has no experts "
                "to share; set it to 1"
            )
        ]
    errors = []
    if experts % size:
        errors.append(
            f"parallel.expert_parallel_size={size}: must divide model.num_experts={experts}, "
            "since each rank of the group holds as many experts"
        )
    # The ranks that hold one copy of the experts between them.
    group = world_size // parallel.replicate_size if parallel.strategy is Strategy.fsdp else world_size
    if group % size:
        errors.append(
            f"parallel.expert_parallel_size={size}: must divide the number of ranks that share a copy of the "
            f"model, which is {group}; try {math.gcd(size, group)}"
        )
    elif parallel.strategy is Strategy.fsdp:
        # FSDP2 cuts these experts on the second dimension of their weights, and cuts it evenly or not at all.
        shards = group // size
        for name, width in (
            ("model.hidden_size", cfg.model.hidden_size),
            ("2 x model.intermediate_size", 2 * cfg.model.intermediate_size),
        ):
            if width % shards:
                errors.append(
                    f"parallel.expert_parallel_size={size}: {name}={width} must be a multiple of the "
                    f"{shards} ranks that share these experts; raise expert_parallel_size or replicate_size"
                )
    return errors


def _deepspeed_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What DeepSpeed 0.19 cannot do, each with the nearest that works."""
    parallel, trainer, errors = cfg.parallel, cfg.trainer, []
    stage = f"parallel.zero_stage={parallel.zero_stage}"
    if not 0 <= parallel.zero_stage <= 3:
        return [f"{stage}: must be 0, 1, 2 or 3"]
    if parallel.zero_stage == 0 and trainer.precision is Precision.bf16:
        errors.append(
            f"{stage} with trainer.precision=bf16: DeepSpeed accumulates gradients in fp32 from ZeRO-1 on; "
            "set parallel.zero_stage=1, or parallel.strategy=ddp"
        )
    if trainer.spike_sigmas is not None:
        errors.append(
            f"trainer.spike_sigmas={trainer.spike_sigmas}: DeepSpeed tells the gradient norm when weights "
            "have changed already; set it to null, or parallel.strategy=fsdp"
        )
    if parallel.offload is Offload.optimizer and parallel.zero_stage == 0:
        errors.append(f"{stage} with parallel.offload=optimizer: nothing is partitioned; set zero_stage=2")
    if parallel.offload is Offload.parameters and parallel.zero_stage != 3:
        errors.append(f"{stage} with parallel.offload=parameters: only ZeRO-3 moves them; set zero_stage=3")
    sums_in_bf16 = parallel.zero_stage in (1, 2) and trainer.precision is Precision.bf16
    if sums_in_bf16 and parallel.offload is Offload.optimizer and _micro_batches(cfg, world_size) > 1:
        errors.append(
            f"{stage} with parallel.offload=optimizer and trainer.precision=bf16: DeepSpeed sums gradients "
            "of several micro-batches in bf16 there; set zero_stage=3, which sums in fp32, or raise "
            "trainer.micro_batch_size until a step is one micro-batch"
        )
    if parallel.zero_stage == 3 and trainer.compile:
        errors.append(
            f"{stage} with trainer.compile=true: ZeRO-3 gathers weights in hooks inside of what is compiled, "
            "which is compiled anew for every layer until torch gives up; set zero_stage=2, or strategy=fsdp"
        )
    if parallel.zero_stage == 3 and trainer.activation_checkpointing is ActivationCheckpointing.selective:
        errors.append(
            f"{stage} with trainer.activation_checkpointing=selective: its recomputation meets gathers of "
            "weights that the first pass did not have; set it to full, or parallel.strategy=fsdp"
        )
    return errors


def _micro_batches(cfg: TrainConfig, world_size: int) -> int:
    """Of a rank, a step; 0 where that is an error of its own."""
    a_pass = cfg.trainer.micro_batch_size * world_size
    return cfg.trainer.global_batch_size // a_pass if a_pass > 0 else 0


def _deepspeed_file_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """A user's own DeepSpeed JSON, merged and, where there are ranks to parse it for, read by DeepSpeed."""
    path = cfg.parallel.deepspeed_config
    if cfg.parallel.strategy is not Strategy.deepspeed or path is None:
        return []
    try:
        config = deepspeed_config(cfg, world_size, cuda=False)
        if dist.is_initialized():
            from olmoe_train.distributed.deepspeed import import_deepspeed, parse_config  # takes seconds

            cuda = torch.cuda.is_available() and cfg.trainer.device is not Device.cpu
            import_deepspeed(torch.device("cuda" if cuda else "cpu"))
            parse_config(config, path)
    except UserError as error:
        return [str(error)]
    return []


def _schedule_errors(cfg: TrainConfig) -> list[str]:
    scheduler, errors = cfg.scheduler, []
    for what, options in (
        ("warmup", ("warmup_steps", "warmup_tokens", "warmup_fraction")),
        ("decay", ("decay_steps", "decay_tokens")),
    ):
        chosen = [
            f"scheduler.{name}={getattr(scheduler, name)}"
            for name in options
            if getattr(scheduler, name) is not None
        ]
        if len(chosen) > 1:
            errors.append(
                f"{' and '.join(chosen)}: set only one of them and the others null; "
                f"they are the same {what} in other units"
            )
        errors += [f"{text}: must not be negative" for text in chosen if "=-" in text]
    for name in ("warmup_fraction", "warmup_start_factor", "final_factor"):
        value = getattr(scheduler, name)
        if value is not None and not 0 <= value <= 1:
            errors.append(f"scheduler.{name}={value}: must be between 0 and 1")
    return errors


def _model_errors(cfg: TrainConfig) -> list[str]:
    errors: list[str] = []
    try:
        olmoe_config(cfg.model)
    except UserError as error:
        errors += [f"model: {line.removeprefix('- ')}" for line in str(error).splitlines()]
    if cfg.data.sequence_length > cfg.model.max_position_embeddings:
        errors.append(
            f"data.sequence_length={cfg.data.sequence_length}: is beyond model.max_position_embeddings="
            f"{cfg.model.max_position_embeddings}; lower the one or raise the other"
        )
    init_from = cfg.model.init_from
    if init_from is not None:
        errors += _init_from_errors(cfg, init_from, check_tokens=not errors)
    if cfg.checkpoint.resume not in ("auto", "never"):
        errors += _resume_errors(Path(cfg.checkpoint.resume))
    known = {key for key, _, _ in documented_keys(TrainConfig)}
    known |= {key.split(".")[0] for key in known}
    for key in set(cfg.checkpoint.allow_changes) - known:
        errors.append(f"checkpoint.allow_changes=[{key}]: there is no such key or section")
    return errors


def _init_from_errors(cfg: TrainConfig, init_from: str, check_tokens: bool) -> list[str]:
    try:
        tokenizer = tokenizer_directory(init_from)
    except UserError as error:
        return [f"model.init_from={init_from}: {str(error).removeprefix(f'source={init_from}: ')}"]
    return _special_token_errors(cfg, tokenizer) if check_tokens else []


def _resume_errors(resume: Path) -> list[str]:
    if not resume.is_dir():
        return [f"checkpoint.resume={resume}: give auto, never, or an existing checkpoint"]
    if any(resume.glob("*_optim_states.pt")) or any(resume.glob("global_step*")):
        return [
            (
                f"checkpoint.resume={resume}: a native checkpoint of DeepSpeed, whose pickles run code when "
                "they are loaded; where you trust it, make an HF directory of it (its zero_to_fp32.py with "
                "--safe_serialization, and a config.json), and start with model.init_from"
            )
        ]
    return []


def _special_token_errors(cfg: TrainConfig, tokenizer: Path) -> list[str]:
    try:
        return [f"model.{error}" for error in special_token_errors(olmoe_config(cfg.model), tokenizer)]
    except UserError as error:
        return [str(error)]


def _data_errors(cfg: TrainConfig) -> list[str]:
    errors = mixture_errors(cfg.data)
    if (
        not errors
        and cfg.trainer.max_epochs is not None
        and any(part.weight is not None for part in cfg.data.mixture)
    ):
        errors.append(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: a mixture by weight has no end; give its sources "
            "token budgets (tokens in place of weight), or set trainer.max_steps or trainer.max_tokens"
        )
    if errors:
        return errors
    try:
        manifest = next(iter(read_manifests(cfg.data).values()))  # their tokenizers are all the same
        verify(cfg.data)
    except UserError as error:
        return [str(error)]
    if manifest.vocab_size > cfg.model.vocab_size:
        errors.append(
            f"model.vocab_size={cfg.model.vocab_size}: the data in data.dir={cfg.data.dir} has token "
            f"ids up to {manifest.vocab_size - 1}; "
            f"set model.vocab_size={math.ceil(manifest.vocab_size / 64) * 64} or prepare it anew"
        )
    if cfg.model.eos_token_id != manifest.eos_token_id:
        errors.append(
            f"model.eos_token_id={cfg.model.eos_token_id}: documents in data.dir={cfg.data.dir} end with "
            f"token {manifest.eos_token_id}; set model.eos_token_id={manifest.eos_token_id}"
        )
    elif not _model_errors(cfg):
        # Exports carry this tokenizer; and the padding token's embedding learns nothing.
        errors += _special_token_errors(cfg, sources(cfg.data)[0].directory / "tokenizer")
    return errors


def _no_effect(cfg: TrainConfig) -> list[str]:
    warnings = []
    defaults = SourceConfig()
    for name, value in vars(cfg.data.source).items():
        if value != getattr(defaults, name):
            warnings.append(f"data.source.{name} has no effect here: `olmoe prepare` alone reads it")
    if cfg.data.olmo != OlmoFilesConfig():
        warnings.append("data.olmo has no effect here: `olmoe prepare` alone reads it")
    if len(cfg.data.mixture) == 1:
        warnings.append("data.mixture has one source: its weight has no effect")
    if cfg.data.mixture:
        warnings += [
            f"data.mixture: {name} has no validation split and is not evaluated"
            for name, manifest in read_manifests(cfg.data).items()
            if manifest.validation.tokens == 0
        ]
    if cfg.model.num_experts == 1:
        warnings += [
            f"loss.{name} has no effect: a dense model (model.num_experts=1) has no router to regularise"
            for name in ("router_aux_loss_coef", "router_z_loss_coef")
            if getattr(cfg.loss, name) != 0
        ]
    elif cfg.loss.balance_scope is BalanceScope.micro_batch and cfg.loss.router_aux_loss_coef == 0:
        warnings.append("loss.balance_scope has no effect: loss.router_aux_loss_coef is 0")
    if cfg.checkpoint.keep_every and not cfg.checkpoint.keep:
        warnings.append("checkpoint.keep_every has no effect: checkpoint.keep=0 keeps every checkpoint")
    if cfg.parallel.strategy is not Strategy.deepspeed:
        warnings += [
            f"parallel.{name} has no effect: parallel.strategy is {cfg.parallel.strategy.value}"
            for name in ("zero_stage", "offload", "deepspeed_config")
            if getattr(cfg.parallel, name) != getattr(ParallelConfig(), name)
        ]
    if cfg.model.trust_pickle and cfg.model.init_from is None:
        warnings.append("model.trust_pickle has no effect: model.init_from is null")
    if cfg.optimizer.max_grad_norm == 0:
        warnings.append("optimizer.max_grad_norm=0: gradients are not clipped")
    return warnings


def _gathering_without_effect(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Warnings about options of how weights are gathered, where none are."""
    if parallel.strategy is not Strategy.fsdp:
        reason = f"parallel.strategy is {parallel.strategy.value}"
    elif world_size <= parallel.replicate_size:
        reason = "each rank has a whole copy of the model"
    else:
        return []
    return [
        f"parallel.{name} has no effect: {reason}"
        for name in ("reshard_after_forward", "prefetch")
        if getattr(parallel, name) != getattr(ParallelConfig(), name)
    ]
