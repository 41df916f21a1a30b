"""What `olmoe plan check=true` builds of a run, part by part, and what it says about each."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import open_stored_model, run_checkpoint
from olmoe_train.checkpoint.directory import latest_checkpoint
from olmoe_train.checkpoint.planned_files import planned_files, shards_of_ranks
from olmoe_train.checkpoint.sharded import refuse_other_model, saved_state, stored_metadata, training_tensors
from olmoe_train.config.balancing import LossFreeConfig
from olmoe_train.config.choices import Strategy, StripPrefix
from olmoe_train.config.compose import plain_values
from olmoe_train.config.initial_model import initial_directory
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.objective import GrpoConfig, NextTokenConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.distributed.deepspeed_config import deepspeed_config
from olmoe_train.distributed.mesh import Mesh, build_mesh
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.ablations import refuse_export
from olmoe_train.model.hf.directory import (
    check_same_architecture,
    parameter_shapes,
    plan_shards,
    shard_name,
)
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from olmoe_train.planning.report import GB, MB
from olmoe_train.training.batch import Batch, count_tokens
from olmoe_train.training.build import build_data, build_layout, build_schedule, count_steps, engine_of
from olmoe_train.training.compatibility import check_changes, resume_fingerprint
from olmoe_train.training.initial_weights import fitting_adapter
from olmoe_train.training.preflight.fake_run.batches import first_batches, made_up_batch
from olmoe_train.training.preflight.fake_run.ranks import fake_ranks
from olmoe_train.training.preflight.fake_run.step import (
    allocate,
    as_it_can_be_faked,
    fake_step,
    make_moments,
    objective_of,
    without_values,
)
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.tensor_files import byte_count

OK, ERROR, NOT_BUILT = "ok", "error", "not built"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """What became of one part of the run."""

    name: str
    state: str
    """OK, ERROR or NOT_BUILT."""
    text: str
    """What was found; the reason; or the message of the error."""
    bytes_kept: int = 0
    """Of the checkpoint: bytes of all checkpoints that the run keeps, or of one if it keeps all."""


class NotBuiltError(Exception):
    """A part that fake ranks cannot have; the message says why."""


def built_parts(cfg: TrainConfig, world_size: int, has_data: bool) -> Iterator[Part]:
    """Build a run on fake ranks, one part after the other.

    A part that fails does not keep the others from being built, unless they need it.

    Args:
        cfg: A configuration that has passed the preflight checks.
        world_size: Number of ranks.
        has_data: Whether the prepared data is there to be read.
    """
    with fake_ranks(world_size):
        run = FakeRun(cfg, has_data)
        for name, build in run.parts.items():
            part = _built(name, build)
            yield replace(part, bytes_kept=run.bytes_kept) if name == "checkpoint" else part


def _built(name: str, build: Callable[[], str]) -> Part:
    try:
        return Part(name, OK, build())
    except NotBuiltError as reason:
        return Part(name, NOT_BUILT, str(reason))
    except UserError as error:
        return Part(name, ERROR, str(error))
    except Exception as error:  # torch raises a dozen types for shapes that do not fit
        return Part(name, ERROR, f"building the {name} fails: {type(error).__name__}: {error}")


class FakeRun:
    """The parts of a run, as far as they are built. In `fake_ranks`."""

    def __init__(self, cfg: TrainConfig, has_data: bool) -> None:
        self.cfg, self.has_data, self.world_size = cfg, has_data, dist.get_world_size()
        self.buildable = as_it_can_be_faked(cfg)
        self.parts: dict[str, Callable[[], str]] = {
            "mesh": self.build_mesh,
            "shards": self.build_shards,
            "weights": self.compare_initial_weights,
            "resume": self.compare_checkpoint,
            "first batch": self.read_first_batch,
            "step": self.take_step,
            "checkpoint": self.list_checkpoint,
            "export": self.list_export,
        }
        self._mesh: Mesh | None = None
        self._model: OlmoeForCausalLM | None = None
        self._batch: Batch | None = None
        self._tensors: dict[str, Tensor] | None = None
        self._base_dtype = torch.float32  # of the model that an adapter is merged with
        self.bytes_kept = 0

    # --- layout ---------------------------------------------------------------------------------------------

    def build_mesh(self) -> str:
        """The meshes of training."""
        self._mesh = build_mesh(self.cfg.parallel, CPU)
        copies, shards = self._mesh.dense.shape
        text = f"{self.cfg.parallel.strategy.value}: {_grid(copies, shards)}"
        if self._mesh.expert is None:
            return text
        copies, shards, ranks = self._mesh.expert.shape
        group = self._mesh.expert["expert"].mesh.tolist()
        return (
            f"{text}; experts: {_grid(copies, shards)} x {ranks} expert-parallel ranks; ranks {group[0]} to "
            f"{group[-1]} exchange tokens"
        )

    def build_shards(self) -> str:
        """The model in its layout."""
        if self._mesh is None:
            raise NotBuiltError("there is no mesh")
        self._model = build_layout(self.buildable, self._mesh)
        parameters = dict(self._model.named_parameters())
        held = [0] * self.world_size
        for parameter in parameters.values():
            for rank, shard in enumerate(shards_of_ranks(parameter, self.world_size)):
                held[rank] += math.prod(shard.sizes)
        total = sum(parameter.numel() for parameter in parameters.values())
        most, fewest = max(held), min(held)
        text = f"{total:,} parameters in {len(parameters):,} tensors; a rank holds {fewest:,} to {most:,}"
        return text if most > fewest else f"{text.partition(' a rank')[0]} each rank holds {most:,}"

    # --- what the run starts from ---------------------------------------------------------------------------

    def compare_initial_weights(self) -> str:
        """Names and shapes in the files of model.init_from and model.adapter_from."""
        section = self.cfg.model
        if section.init_from is None:
            return f"random, of seed={self.cfg.seed}"
        if self._model is None:
            raise NotBuiltError("there is no model to compare them with")
        directory = initial_directory(section.init_from, section.revision)
        if not (directory / "config.json").is_file():
            checkpoint = run_checkpoint(directory)
            raise NotBuiltError(
                f"the weights of {checkpoint} are compared with the model when training starts"
            )
        stored = open_stored_model(
            directory,
            trust_pickle=section.trust_pickle,
            strip_prefix=section.strip_prefix is StripPrefix.auto,
        )
        check_same_architecture(self._model.config, stored.config, stored.name)
        assert stored.config.dtype is not None
        self._base_dtype = stored.config.dtype
        text = f"the tensors of model.init_from={section.init_from} have the model's names and shapes"
        if section.adapter_from is not None:
            fitting_adapter(self._model, Path(section.adapter_from).expanduser())
            text += f"; so have those of model.adapter_from={section.adapter_from}"
        return text

    def compare_checkpoint(self) -> str:
        """The checkpoint that the run would resume from."""
        resume = self.cfg.checkpoint.resume
        newest = latest_checkpoint(Path(self.cfg.run_dir).expanduser())
        checkpoint = newest if resume in ("auto", "never") else Path(resume).expanduser()
        if checkpoint is None:
            return "a new run"
        if resume == "never":
            raise UserError(
                f"checkpoint.resume=never, but run_dir={self.cfg.run_dir} already holds {checkpoint.name}: "
                "use another run_dir, delete this one, or set checkpoint.resume=auto to continue it"
            )
        if self._model is None:
            raise NotBuiltError("there is no model to compare the checkpoint with")
        saved = saved_state(checkpoint)
        try:
            refuse_other_model(
                checkpoint, training_tensors(self._model, None)[0], stored_metadata(checkpoint)
            )
        except UserError as error:
            fix = "give a checkpoint of this model, or begin a new run with checkpoint.resume=never"
            raise UserError(f"checkpoint.resume={resume}: {error}\n  {fix}") from None
        text = f"from {checkpoint}, after step {saved['step']:,}: it has the model's tensors"
        if not self.has_data or self._model.adapter is not None:
            return f"{text}; what its run computed is compared when training starts"
        data = build_data(self.cfg)
        schedule = build_schedule(self.cfg, count_steps(self.cfg, data))
        now = resume_fingerprint(plain_values(self.cfg), schedule, data)
        check_changes(saved, now, self.cfg.checkpoint.allow_changes, checkpoint)
        return f"{text}, and its run computed the same"

    # --- a step ---------------------------------------------------------------------------------------------

    def read_first_batch(self) -> str:
        """The first micro-batch of the first and the last rank."""
        if not self.has_data:
            self._batch = made_up_batch(self.cfg)
            shape = list(self._batch["input_ids"].shape)
            return f"made up, {shape}, because there is no data"
        ranks = sorted({0, self.world_size - 1})
        batches = first_batches(self.cfg, ranks)
        self._batch = batches[0]
        found = (f"rank {r} {list(b['input_ids'].shape)}" for r, b in zip(ranks, batches, strict=True))
        steps = count_steps(self.cfg, build_data(self.cfg))
        per_step = self.cfg.trainer.global_batch_size // self.cfg.trainer.micro_batch_size // self.world_size
        text = f"{', '.join(found)} of data.dir={self.cfg.data.dir}; {per_step:,} of them a step"
        if isinstance(self.cfg.objective, GrpoConfig):
            self._batch = made_up_batch(self.cfg)  # the answers would be sampled first
        return f"{text}, {_count(steps, 'step', 'steps')}"

    def take_step(self) -> str:
        """Forward, backward, clipping and update."""
        if self._model is None or self._mesh is None or self._batch is None:
            raise NotBuiltError("it needs the shards and the first batch")
        is_deepspeed = self.cfg.parallel.strategy is Strategy.deepspeed
        totals = count_tokens([dict(self._batch)], False, CPU)
        batch = {name: column for name, column in self._batch.items() if name != "repetitive"}
        with without_values():
            allocate(self.buildable, self._model, self._mesh)
            if is_deepspeed:
                optimizer = build_optimizer(
                    parameter_groups(self._model, self.cfg.optimizer), self.cfg.optimizer
                )
                make_moments(optimizer)
            else:
                engine = engine_of(self.buildable, self._model, CPU)
                is_own = self.has_data and not isinstance(self.cfg.objective, GrpoConfig)
                objective = objective_of(self.buildable, self._model, is_own, self._mesh)
                fake_step(self.buildable, engine, objective, batch, totals)
                optimizer = engine.state()[1]
            self._tensors = training_tensors(self._model, optimizer)[0]
        if is_deepspeed:
            deepspeed_config(
                self.cfg.trainer, self.cfg.parallel, self.cfg.optimizer.max_grad_norm, self.world_size, False
            )
            raise NotBuiltError(
                "DeepSpeed's engine needs real ranks; its configuration was put together, and mesh, shards "
                "and checkpoint are those in CPU memory that it starts from and saves"
            )
        return f"forward, backward, clipping and update of one micro-batch{self._left_out()}"

    def _left_out(self) -> str:
        """What of the step is not that of the run."""
        left_out = ["torch.compile"] if self.cfg.trainer.compile else []
        left_out += ["bf16"] if self.buildable.trainer.precision is not self.cfg.trainer.precision else []
        objective = self.cfg.objective
        if isinstance(objective, GrpoConfig):
            left_out.append("the sampling of answers, and the loss of objective=grpo")
        elif not isinstance(objective, NextTokenConfig):
            left_out.append("the reference" if self.has_data else f"the loss of objective={objective.name}")
        return f"; without {' and '.join(left_out)}" if left_out else ""

    # --- files ----------------------------------------------------------------------------------------------

    def list_checkpoint(self) -> str:
        """The files of a checkpoint, by rank."""
        if self._tensors is None:
            raise NotBuiltError("it needs the step, in which the optimizer makes its state")
        files = planned_files(self._tensors, self.world_size)
        of_ranks = [sum(of_rank.values()) for of_rank in files]
        total, keep = sum(of_ranks), self.cfg.checkpoint.keep
        self.bytes_kept = max(1, keep) * total
        names = [name for of_rank in files for name in of_rank]
        fewest, most = (in_bytes(value) for value in (min(of_ranks), max(of_ranks)))
        kept = f"; checkpoint.keep={keep}: {in_bytes(self.bytes_kept)}" if keep else ""
        each = f"each rank writes {most}" if fewest == most else f"a rank writes {fewest} to {most}"
        return f"{_listed(names)}, {in_bytes(total)}; {each}{kept}"

    def list_export(self) -> str:
        """The files of an export in the format of Transformers."""
        config = olmoe_config(self.cfg.model)
        try:
            refuse_export(config.ablations)
        except UserError as error:
            raise NotBuiltError(str(error)) from None
        if isinstance(self.cfg.balancing, LossFreeConfig):
            raise NotBuiltError(
                "balancing=loss_free: no format has a parameter for its bias; olmoe export fold=drop leaves "
                "the bias out, and says what that changes"
            )
        is_adapted = self.cfg.adapter.name != "none"
        dtype = self._base_dtype if is_adapted else torch.float32
        shapes = parameter_shapes(OlmoeForCausalLM, config)
        shards = plan_shards(shapes, dtype, byte_count(ExportConfig.max_shard_size))
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
        merged = ", the adapter merged with its base" if is_adapted else ""
        kind = str(dtype).removeprefix("torch.")
        return f"config.json and {_listed(names)}, {in_bytes(total)} in {kind}{merged}"


def as_train_config(cfg: TrainConfig) -> TrainConfig:
    """The configuration of `olmoe train` in that of another verb which accepts the same keys."""
    return TrainConfig(**{field.name: getattr(cfg, field.name) for field in fields(TrainConfig)})


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _grid(copies: int, shards: int) -> str:
    return f"{_count(copies, 'copy', 'copies')} x {_count(shards, 'shard', 'shards')}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,} files, {names[0]} to {names[-1]}"


def in_bytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / GB:,.1f} GB" if count >= GB else f"{count / MB:,.2f} MB"
