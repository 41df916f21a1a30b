"""Builds what a run needs from its configuration. This file, build_objective.py, build_balancer.py and the
loop see it whole."""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from olmoe_train.checkpoint.saver import Saver
from olmoe_train.config.choices import PreferenceKind, Strategy
from olmoe_train.config.compose import plain_values
from olmoe_train.config.expert_file import NamedExperts, read_experts
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.objective import GrpoConfig, NextTokenConfig, PreferenceConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import SampleForm, TrainingData, build_train_loader
from olmoe_train.data.manifest import TOKENIZER
from olmoe_train.data.mixture import mixture_components
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.distributed.materialize import materialize
from olmoe_train.distributed.mesh import Mesh, build_mesh
from olmoe_train.distributed.parallelize import parallelize
from olmoe_train.distributed.trained_experts import freeze_all_but, mask_frozen_experts, trained_summary
from olmoe_train.evaluation.tasks.build import read_tasks
from olmoe_train.evaluation.tasks.requests import EncodedTask, encode_tasks
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.balancing import set_router_options
from olmoe_train.optim.average import averages_as_weights, keep_average
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import groups_table, parameter_groups
from olmoe_train.optim.schedule import Schedule
from olmoe_train.optim.skip_step import SkipGuard
from olmoe_train.planning.adapter import adapter_counts, adapter_plan, meta_model
from olmoe_train.planning.duration import total_steps, warmup_and_decay_steps
from olmoe_train.run.directory import Run
from olmoe_train.run.loggers import MetricsLog, close_metrics, draws_pictures
from olmoe_train.run.stragglers import StragglerDetector
from olmoe_train.training.batch import Batch, StepBatches
from olmoe_train.training.build_balancer import build_balancer
from olmoe_train.training.callbacks.base import Callback
from olmoe_train.training.callbacks.checkpoints import Checkpoints
from olmoe_train.training.callbacks.evaluation import Evaluate
from olmoe_train.training.callbacks.exports import Exports
from olmoe_train.training.callbacks.logging import EndOfLog, Logging
from olmoe_train.training.callbacks.router_analysis import RouterAnalysis
from olmoe_train.training.callbacks.spikes import Spikes
from olmoe_train.training.callbacks.stages import Stages
from olmoe_train.training.callbacks.stragglers import Stragglers
from olmoe_train.training.callbacks.uploads import Uploads
from olmoe_train.training.details import StepDetails
from olmoe_train.training.engine.base import Engine
from olmoe_train.training.engine.fsdp import FsdpEngine
from olmoe_train.training.explain.own_batches import note_own_batches
from olmoe_train.training.initial_weights import download_initial_weights, fill_model
from olmoe_train.training.objectives.base import Objective
from olmoe_train.training.preflight.checks import validate
from olmoe_train.training.preflight.machine.start import start_warnings
from olmoe_train.training.preflight.router_analysis import has_router_analysis
from olmoe_train.training.resume import saved_state
from olmoe_train.training.run_facts import run_facts
from olmoe_train.training.state import TrainState
from olmoe_train.training.throughput import Throughput
from olmoe_train.utils.redaction import redact

log = logging.getLogger(__name__)


def build_run(cfg: TrainConfig) -> Run:
    """The run in its directory, to be entered; the configuration has passed the preflight checks.

    Raises:
        UserError: lists everything that is wrong with the configuration.
    """
    warnings = [*validate(cfg, dist.get_world_size()), *start_warnings(cfg)]
    download_initial_weights(cfg.model)
    tokenizer = mixture_components(cfg.data)[0].directory / "tokenizer"
    return Run(cfg.run_dir, cfg.trainer.timeout, cfg.trainer.rendezvous_timeout, tokenizer, warnings)


def build_model(cfg: TrainConfig, mesh: Mesh) -> OlmoeForCausalLM:
    """The model in its layout on this rank, with its initial weights. Memory is allocated after sharding."""
    model = build_layout(cfg, mesh)
    materialize(model, mesh.device, cfg.seed)
    if cfg.model.init_from is not None:
        fill_model(model, cfg.model)
    if (named := trained_experts(cfg)) is not None:
        mask_frozen_experts(model, named, mesh)
    return model


def build_layout(cfg: TrainConfig, mesh: Mesh) -> OlmoeForCausalLM:
    """The model in its layout on this rank, on the meta device: shapes of shards, and no memory."""
    adapter = adapter_plan(cfg.adapter)
    model = meta_model(olmoe_config(cfg.model), adapter, cfg.trainer.precision)
    if adapter is not None:
        log.info("adapter=%s: %s", cfg.adapter.name, adapter_counts(model.config, adapter))
    model.set_experts_backend(cfg.model.experts_backend.value)
    model.set_balancer(build_balancer(cfg, model.config))
    named = trained_experts(cfg)
    if named is not None:
        freeze_all_but(model, named)
        log.info("trainer.train_only=%s: %s", cfg.trainer.train_only, trained_summary(model, named))
    blocks = (layer.mlp for layer in model.decoder_layers)
    set_router_options(blocks, cfg.balancing.router_temperature, cfg.balancing.router_jitter)
    return parallelize(model, cfg.trainer, cfg.parallel, mesh)


def trained_experts(cfg: TrainConfig) -> NamedExperts | None:
    """The experts of trainer.train_only; None: everything is trained."""
    path, model = cfg.trainer.train_only, cfg.model
    if path is None:
        return None
    return read_experts(Path(path).expanduser(), model.num_hidden_layers, model.num_experts)


def build_engine(cfg: TrainConfig, device: torch.device) -> Engine:
    """The engine of parallel.strategy, with the initial weights; collective."""
    return engine_of(cfg, build_model(cfg, build_mesh(cfg.parallel, device)), device)


def engine_of(cfg: TrainConfig, model: OlmoeForCausalLM, device: torch.device) -> Engine:
    """The engine of parallel.strategy for a model in its layout; collective."""
    groups = parameter_groups(model, cfg.optimizer)
    log.info("optimizer=%s:\n  %s", cfg.optimizer.name, "\n  ".join(groups_table(groups)))
    if cfg.parallel.strategy is Strategy.deepspeed:
        # Imported here: DeepSpeed is large, and other strategies do without it.
        from olmoe_train.training.engine.deepspeed import ZeroEngine

        return ZeroEngine(model, device, Path(cfg.run_dir), cfg.trainer, cfg.parallel, cfg.optimizer)
    optimizer = build_optimizer(groups, cfg.optimizer)
    if cfg.trainer.ema_decay is not None:
        keep_average(optimizer, cfg.trainer.ema_decay)
    return FsdpEngine(model, optimizer, cfg.optimizer.max_grad_norm, device, cfg.trainer.fused_backward)


def build_data(cfg: TrainConfig) -> TrainingData:
    """The data of a run. A sample is a sequence; for grpo it is a prompt with its answer, for kto a
    completion, and for other preference losses a pair."""
    objective = cfg.objective
    if isinstance(objective, GrpoConfig):
        longest_prompt = cfg.data.sequence_length - objective.max_new_tokens
        return TrainingData(cfg.data, cfg.seed, SampleForm(longest_prompt=longest_prompt))
    is_kto = isinstance(objective, PreferenceConfig) and objective.kind is PreferenceKind.kto
    return TrainingData(cfg.data, cfg.seed, SampleForm(single=is_kto))


def count_steps(cfg: TrainConfig, data: TrainingData) -> int:
    """Optimizer steps of the whole run. Only trainer.max_epochs opens the samples.

    Warns if an epoch is shorter than a step.
    """
    epoch = data.samples.epoch if cfg.trainer.max_epochs is not None else None
    steps = total_steps(cfg.trainer, cfg.data.sequence_length, epoch)
    size = cfg.trainer.global_batch_size
    if epoch is not None and epoch < size:
        unchanged = steps == 1 and build_schedule(cfg, steps).multiplier(1) == 0
        log.warning(
            "WARNING: a step of trainer.global_batch_size=%d sequences is more than an epoch, which has %d. "
            "The run has %d step%s%s. For more steps, lower trainer.global_batch_size, or raise "
            "trainer.max_epochs",
            *(size, epoch, steps, "s" * (steps > 1)),
            ", and its learning rate is 0: the weights do not change" if unchanged else "",
        )
    return steps


def build_schedule(cfg: TrainConfig, last_step: int) -> Schedule:
    """The learning rate's schedule of a run of `last_step` steps."""
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    return Schedule(cfg.scheduler, *warmup_and_decay_steps(cfg.scheduler, sizes, last_step), sizes)


def train_batches(
    cfg: TrainConfig, data: TrainingData, start_sample: int
) -> "torch.utils.data.DataLoader[dict[str, torch.Tensor]]":
    """This rank's micro-batches from global sample index `start_sample`, without end."""
    return build_train_loader(
        data,
        start_sample=start_sample,
        sizes=BatchSizes.of(cfg.trainer, cfg.data.sequence_length),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        micro_batch_size=cfg.trainer.micro_batch_size,
    )


def build_step_batches(
    cfg: TrainConfig,
    data: TrainingData,
    start_sample: int,
    columns: tuple[str, ...],
    batches: Iterable[Batch] | None,
) -> StepBatches:
    """This rank's micro-batches, grouped into optimizer steps.

    Args:
        cfg: the run's.
        data: the prepared data.
        start_sample: global index of the first sample.
        columns: what the objective reads of each micro-batch.
        batches: in place of the prepared data.
    """
    if batches is not None and dist.get_rank() == 0:
        note_own_batches(Path(cfg.run_dir), start_sample)
    source = batches if batches is not None else train_batches(cfg, data, start_sample)
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    sequences = cfg.trainer.micro_batch_size * dist.get_world_size()
    return StepBatches(source, sizes, sequences, columns, start_sample, batches is None)


def build_spikes(
    cfg: TrainConfig,
    run: Run,
    engine: Engine,
    guard: SkipGuard,
    data: TrainingData,
    batches: StepBatches,
    throughput: Throughput,
) -> list[Spikes]:
    """The callback that explains spikes; none for objectives whose loss is not a sum over documents."""
    if not (cfg.logging.explain_spikes and isinstance(cfg.objective, NextTokenConfig)):
        return []
    spikes = Spikes(
        *(Path(cfg.run_dir), guard, engine.model, data, batches, throughput, run.watchdog),
        sizes=BatchSizes.of(cfg.trainer, cfg.data.sequence_length),
        micro_batch_size=cfg.trainer.micro_batch_size,
        with_routing=not cfg.trainer.compile,
        device=engine.device,
    )
    return [spikes]


def build_metrics(
    cfg: TrainConfig, run: Run, model: OlmoeConfig, data: TrainingData, step: int
) -> MetricsLog:
    """Where the metrics of a run go, from step `step` on; closed when the run ends, however it ends."""
    config = redact(plain_values(cfg) | {"run": run_facts(cfg.parallel, model, data)})
    metrics = MetricsLog(run.path, cfg.logging, config, step)
    run.close_at_end(partial(close_metrics, metrics, run.path))
    return metrics


def build_details(
    cfg: TrainConfig, model: OlmoeForCausalLM, data: TrainingData, last_step: int, device: torch.device
) -> StepDetails:
    return StepDetails(
        model,
        data,
        every=cfg.logging.details_every,
        log_every=cfg.trainer.log_every,
        last_step=last_step,
        sizes=BatchSizes.of(cfg.trainer, cfg.data.sequence_length),
        micro_batch_size=cfg.trainer.micro_batch_size,
        with_flow=draws_pictures(cfg.logging),
        device=device,
    )


def build_router_analyses(
    cfg: TrainConfig,
    run: Run,
    engine: Engine,
    data: TrainingData,
    metrics: MetricsLog,
    throughput: Throughput,
) -> list[Callback]:
    """The router analyses, if logging.router_analysis_every asks for them."""
    if not has_router_analysis(cfg, data.manifests):
        return []
    return [
        RouterAnalysis(
            cfg.logging,
            cfg.evaluation.micro_batch_size,
            cfg.trainer.precision.dtype,
            data,
            engine.model,
            metrics,
            throughput,
            run.watchdog.with_heartbeat,
            engine.device,
        )
    ]


def build_tasks(cfg: TrainConfig, data: TrainingData, model: OlmoeConfig) -> list[EncodedTask]:
    """The questions of evaluation.tasks, by the tokenizer of the data.

    Raises:
        UserError: A question does not fit the model.
    """
    if not cfg.evaluation.tasks:
        return []
    tokenizer = load_tokenizer(mixture_components(data.cfg)[0].directory / TOKENIZER)
    return encode_tasks(read_tasks(cfg.evaluation.tasks, cfg.evaluation.max_questions), tokenizer, model)


def build_throughput(cfg: TrainConfig, engine: Engine, tokens: int) -> Throughput:
    """Measures the speed of the run from now on. tokens: trained on so far."""
    model, length, precision = engine.model, cfg.data.sequence_length, cfg.trainer.precision
    return Throughput(model.config, length, precision, engine.device, tokens, model.adapter)


def build_callbacks(
    cfg: TrainConfig,
    run: Run,
    engine: Engine,
    objective: Objective,
    guard: SkipGuard,
    data: TrainingData,
    batches: StepBatches,
    fingerprint: dict[str, Any],
    state: TrainState,
    extra: tuple[Callback, ...],
) -> list[Callback]:
    """The callbacks of a run, in the order in which every hook is called.

    Logging comes first, so that a step's line is in the log before anything that follows from the step.
    Stragglers are compared once logging has waited for the device, and then spikes are explained. Validation
    comes before the save of the same step, as a save may end the run; uploads wait for that save. `extra`
    callbacks come last, when the step is complete and saved.
    """
    run_dir, device = Path(cfg.run_dir), engine.device
    metrics = build_metrics(cfg, run, engine.model.config, data, state.step)
    throughput = build_throughput(cfg, engine, state.tokens)
    logging = Logging(
        run,
        metrics,
        throughput,
        engine,
        objective,
        guard,
        data,
        build_details(cfg, engine.model, data, state.last_step, device),
        dead_expert_steps=cfg.logging.dead_expert_steps,
        alarms=cfg.logging.alarms,
        device=device,
    )
    detector = StragglerDetector(run.watchdog.peers, engine.model.lm_head, device)
    stragglers = Stragglers(detector, batches, metrics)
    tasks = build_tasks(cfg, data, engine.model.config)
    averaged = partial(averages_as_weights, *engine.state()) if cfg.trainer.ema_decay is not None else None
    evaluate = Evaluate(
        *(cfg.evaluation, data, tasks, engine.model, objective, metrics, throughput, run.watchdog, device),
        averaged=averaged,
    )
    exports = Exports(run_dir, cfg.checkpoint.export_every)
    spikes = build_spikes(cfg, run, engine, guard, data, batches, throughput)
    analyses = build_router_analyses(cfg, run, engine, data, metrics, throughput)
    callbacks: list[Callback] = [logging, stragglers, *spikes, evaluate, *analyses, exports]

    uploads = [Uploads(cfg.checkpoint, run, metrics)] if cfg.checkpoint.upload_to is not None else []

    def on_save(checkpoint: Path) -> None:
        for callback in [*callbacks, *uploads, *extra]:
            callback.on_save(checkpoint)

    saver = Saver(cfg.checkpoint, run_dir, engine.state, state.step, on_save)
    checkpoints = Checkpoints(
        saver,
        run,
        guard,
        throughput,
        metrics,
        lambda now: saved_state(now, guard, [*callbacks, *extra], fingerprint),
    )
    stages: list[Callback] = [Stages(data)] if cfg.data.stages else []
    return [*callbacks, *stages, checkpoints, *uploads, EndOfLog(run, metrics), *extra]
