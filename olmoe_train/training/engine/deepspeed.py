"""DeepSpeed ZeRO-0 to ZeRO-3 with the same model, losses, batches and checkpoints as FSDP2.

The project's dispatch (expert_parallel.py) distributes the experts over the ranks. DeepSpeed receives only
the groups of ranks that hold the same experts. DeepSpeed's AutoEP is not used, because it would replace the
MoE block by another MoE layer with its own router.

Before the first step and in every checkpoint, the state is sharded as FSDP2 shards it. `build_model` makes a
model that is sharded over the ranks in CPU memory, and the engine starts from this model. For a checkpoint,
the engine fills such a sharded model, one parameter at a time. Therefore the checkpoint format is the same
for every strategy, nothing is pickled, no rank ever holds the full model, and a run can continue under any
other layout.
"""

import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from olmoe_train.checkpoint.sharded import MOMENTS, load_checkpoint, persistent_buffers
from olmoe_train.config.choices import Precision
from olmoe_train.config.optimizer import OptimizerConfig
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.distributed.compile import compile_layers
from olmoe_train.distributed.deepspeed_config import deepspeed_config
from olmoe_train.distributed.expert_parallel import apply_expert_parallelism, exchange_tokens
from olmoe_train.distributed.fsdp import shard
from olmoe_train.distributed.materialize import shard_slices
from olmoe_train.distributed.mesh import build_mesh, local_tensor
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.experts import OlmoeExperts
from olmoe_train.model.outputs import TrainingOutput
from olmoe_train.optim.build import build_optimizer, scale_learning_rates
from olmoe_train.optim.clipping import clip_gradients
from olmoe_train.training.engine.base import Judge, StepOutcome
from olmoe_train.utils.errors import UserError


class ZeroEngine:
    """An engine that trains with DeepSpeed. See base.Engine.

    model: The model. Call its `training_forward`, as with every engine. ZeRO-3 gathers the parameters there.
    """

    def __init__(
        self,
        initial: OlmoeForCausalLM,
        device: torch.device,
        run_dir: Path,
        trainer: TrainerConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
    ) -> None:
        """Start DeepSpeed and write its configuration to run_dir/deepspeed.json. Collective.

        Args:
            initial: A model with the initial weights, sharded in CPU memory by `build_model`.
            device: The device to train on.
            run_dir: Directory of the run.
            trainer: Batch sizes, precision and what is recomputed.
            parallel: ZeRO stage, offloading and expert parallelism.
            optimizer: AdamW's options.

        Raises:
            UserError: The model has buffers, a C++ compiler is missing, or DeepSpeed rejects the options.
        """
        self.trainer, self.parallel, self.optimizer_config = trainer, parallel, optimizer
        self.stage, self.device = parallel.zero_stage, device
        if buffers := persistent_buffers(initial):
            raise UserError(
                f"parallel.strategy=deepspeed: this engine does not keep the model's buffers "
                f"({', '.join(buffers)}); use parallel.strategy=fsdp"
            )
        config = deepspeed_config(
            trainer, parallel, optimizer.max_grad_norm, dist.get_world_size(), device.type == "cuda"
        )
        if dist.get_rank() == 0:
            (run_dir / "deepspeed.json").write_text(json.dumps(config, indent=2) + "\n")
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress on every rank
            import_deepspeed(device)
            self._start(initial, config)

    def _start(self, initial: OlmoeForCausalLM, config: dict[str, Any]) -> None:
        self.model = _build(self.trainer, self.parallel, initial, config, self.device)
        self._parameters: list[nn.Parameter] = list(self.model.parameters())
        optimizer = build_optimizer(_parameter_groups(self.model), self.optimizer_config)
        assert isinstance(optimizer, torch.optim.AdamW), "preflight refuses other optimizers"
        self._adamw = optimizer
        self._norm = torch.zeros((), device=self.device)
        if self.stage == 0:
            self._adamw.register_step_pre_hook(self._clip_whole_gradients)
        self._adamw.register_step_pre_hook(self._skip_not_finite)
        self._engine = _start(self.model, self._adamw, config, self.parallel)
        self.optimizer = self._engine.optimizer
        for parameter, source in zip(self._parameters, initial.parameters(), strict=True):
            self._write(parameter, None, _gather(source))
        self._make_moments()

    @property
    def learning_rate(self) -> float:
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def set_learning_rate(self, multiplier: float) -> None:
        scale_learning_rates(self.optimizer, multiplier)

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed averages gradients over ranks. The loss is a share of a global mean: sum them instead.
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, judge: Judge) -> StepOutcome:
        """Reduce, clip and update in one DeepSpeed call. Then call the judge, too late to prevent the update.

        The hook `_skip_not_finite` skips gradients that are not finite. Preflight rejects spike skipping.
        """
        self._engine.step()
        norm = self._norm if self.stage == 0 else torch.as_tensor(self._engine.get_global_grad_norm())
        return StepOutcome(norm, judge(norm))

    def state(self) -> tuple[OlmoeForCausalLM, torch.optim.AdamW]:
        """Return the weights and moments in CPU memory, sharded as FSDP2 shards them. Collective."""
        stored, adamw = self._sharded_copy()
        count = next(state["step"] for state in self._adamw.state.values() if "step" in state)
        for parameter, target in zip(self._parameters, stored.parameters(), strict=True):
            index = shard_slices(target)
            if self.parallel.expert_parallel_size > 1 and target.ndim == 3:
                index = (slice(None), *index[1:])  # `_read` returns only this rank's experts
            state: dict[str, Tensor] = {"step": count.cpu().clone()}
            state |= {moment: torch.zeros_like(target, requires_grad=False) for moment in MOMENTS}
            adamw.state[target] = state
            for key, tensor in ((None, target.detach()), *((moment, state[moment]) for moment in MOMENTS)):
                local_tensor(tensor).copy_(self._read(parameter, key)[index])
        return stored, adamw

    @torch.no_grad()
    def load(self, checkpoint: Path) -> dict[str, Any]:
        stored, adamw = self._sharded_copy()
        saved = load_checkpoint(checkpoint, stored, adamw)
        steps = {float(state["step"]) for state in adamw.state.values()}
        assert len(steps) <= 1, "parameters that were updated in different steps"
        for flat in self._partitions():
            self._adamw.state[flat]["step"].fill_(max(steps, default=0.0))
        for parameter, source in zip(self._parameters, stored.parameters(), strict=True):
            self._write(parameter, None, _gather(source))
            for moment in MOMENTS if source in adamw.state else ():
                self._write(parameter, moment, _gather(adamw.state[source][moment]))
        return saved

    # --- the engine's state, one parameter at a time -------------------------------------------------------

    def _sharded_copy(self) -> tuple[OlmoeForCausalLM, torch.optim.AdamW]:
        """Return a model and an optimizer in CPU memory, sharded as FSDP2 shards them, with unset values."""
        mesh = build_mesh(self.parallel, torch.device("cpu"))
        with torch.device("meta"):
            stored = OlmoeForCausalLM(self.model.config)
        if mesh.expert is not None:
            apply_expert_parallelism(stored, mesh.expert["expert"])
        shard(stored, mesh, self.trainer.precision, self.parallel)
        stored.to_empty(device="cpu")
        adamw = build_optimizer(stored.parameters(), self.optimizer_config)
        assert isinstance(adamw, torch.optim.AdamW)
        return stored, adamw

    def _make_moments(self) -> None:
        """Create the moments before the first step. DeepSpeed 0.19 (ZeRO-1 and 2) links parameters to
        optimizer state after the first group's first step, when the other groups have none yet."""
        for flat in self._partitions():
            step = torch.tensor(0.0, dtype=torch.float32, device=flat.device)
            self._adamw.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> Sequence[Tensor]:
        """Return the fp32 tensors that AdamW updates on this rank. With ZeRO-1 to 3 the tensors are flat."""
        if self.stage == 0:
            return self._parameters
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        one_by_one = getattr(self.optimizer, "single_partition_of_fp32_groups", None)
        return one_by_one if one_by_one is not None else self.optimizer.fp32_groups_flat_partition

    def _read(self, parameter: Any, moment: str | None) -> Tensor:
        """Return a full parameter in fp32 (moment=None), or one of its moments. Collective.

        With expert parallelism, an expert tensor contains only this rank's experts.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return parameter.detach() if moment is None else self._adamw.state[parameter][moment]
        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    def _write(self, parameter: Any, moment: str | None, value: Tensor) -> None:
        """Write what `_read` returns: each rank stores its own partition of the full value."""
        from deepspeed import utils

        if self.stage == 3:
            # The last rank's partition is padded. DeepSpeed's setter for full values does not handle padding.
            size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
            part = value.flatten()[rank * size : (rank + 1) * size]
            part = torch.nn.functional.pad(part, (0, size - len(part)))
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, moment)
            return
        if moment is None:
            parameter.data.copy_(value)
        elif self.stage == 0:
            self._adamw.state[parameter][moment].copy_(value)
        if self.stage > 0:
            value = value.to(self.device)
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _clip_whole_gradients(self, *_: Any) -> None:
        """Clip by the exact global norm. DeepSpeed's ZeRO-0 clips by the mean of the ranks' norms, which is
        not the global norm with expert parallelism."""
        self._norm = clip_gradients(self._parameters, self.optimizer_config.max_grad_norm, self._copies)

    def _copies(self, parameter: nn.Parameter) -> int:
        """Return on how many ranks a parameter exists: every rank, or for experts every
        expert_parallel_size-th rank."""
        return dist.get_world_size() // (self.parallel.expert_parallel_size if parameter.ndim == 3 else 1)

    @torch.no_grad()
    def _skip_not_finite(self, *_: Any) -> None:
        """Skip the update if any gradient on any rank is not finite: fused AdamW makes no update where
        `found_inf` is 1. DeepSpeed checks for overflow only in fp16."""
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        bad = torch.zeros((), device=parameters[0].device)
        for parameter in parameters:
            if parameter.grad is not None:
                bad += (~parameter.grad.isfinite()).any()
        dist.all_reduce(bad)
        self._adamw.found_inf = (bad > 0).float()  # type: ignore[attr-defined]


# --- building the engine's model --------------------------------------------------------------------------


def import_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for this device and use the existing process group.

    Raises:
        UserError: The device is the CPU and there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "c++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"parallel.strategy=deepspeed: on CPU DeepSpeed compiles its communication, and there is no "
            f"{compiler}; install a C++ compiler, or use parallel.strategy=fsdp"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # not set in a run without a launcher
    import deepspeed

    deepspeed.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 uses names of torch.distributed that torch 2.13 deprecates and a later torch renames.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_init_required=False)


def parse_config(config: dict[str, Any], path: str | None) -> Any:
    """Parse the configuration with DeepSpeed.

    Raises:
        UserError: DeepSpeed rejects the configuration. The message contains DeepSpeed's error.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        return DeepSpeedConfig(config)
    except Exception as error:  # pydantic errors, assertions, ValueError: it depends on the option
        raise UserError(f"parallel.deepspeed_config={path}: DeepSpeed does not take it: {error}") from error


def _build(
    trainer: TrainerConfig,
    parallel: ParallelConfig,
    stored: OlmoeForCausalLM,
    config: dict[str, Any],
    device: torch.device,
) -> OlmoeForCausalLM:
    """Build the model with this rank's experts and with zeros as weights. With ZeRO-3 each part of the model
    is partitioned as soon as it is allocated."""
    import deepspeed

    with torch.device("meta"):
        model = OlmoeForCausalLM(stored.config)
    model.set_experts_backend(stored.decoder_layers[0].mlp.experts.backend)
    if stored.balancer is not None:
        model.set_balancer(stored.balancer)
    if parallel.expert_parallel_size > 1:
        _keep_own_experts(model, parallel.expert_parallel_size)
    checkpoint_activations(model, trainer.activation_checkpointing)
    if trainer.compile:
        compile_layers(model)
    if trainer.precision is Precision.bf16:
        model.bfloat16()
    for part in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        part.to_empty(device=device)
        if part is model.lm_head:
            model.tie_weights()
        for parameter in part.parameters():
            parameter.data.zero_()
        if parallel.expert_parallel_size > 1:
            _mark_experts(part, parallel.expert_parallel_size)
        if parallel.zero_stage == 3:
            deepspeed.zero.Init(module=part, config_dict_or_path=config)
    return model


def _keep_own_experts(model: OlmoeForCausalLM, size: int) -> None:
    """Keep only this rank's experts (on the meta device), and exchange tokens with the other ranks."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(size)
    for layer in model.decoder_layers:
        for name, parameter in list(layer.mlp.experts.named_parameters(recurse=False)):
            local = nn.Parameter(parameter.detach()[: len(parameter) // size])
            layer.mlp.experts.register_parameter(name, local)
        exchange_tokens(layer.mlp, groups._get_expert_parallel_group(f"ep_size_{size}"))


def _mark_experts(part: nn.Module, size: int) -> None:
    """Mark the expert parameters for DeepSpeed: they have copies only on every size-th rank."""
    from deepspeed.utils import groups

    name = f"ep_size_{size}"
    experts = [module for module in part.modules() if isinstance(module, OlmoeExperts)]
    parameter: Any
    for module in experts:
        for parameter in module.parameters(recurse=False):
            parameter.allreduce, parameter.group_name = False, name  # ZeRO-0 to 2
            parameter.ds_zero_placement_family = "autoep_expert"  # ZeRO-3
            parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)


def _parameter_groups(model: OlmoeForCausalLM) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, one per set of ranks that hold copies of the same parameters.
    DeepSpeed identifies the groups by these names."""
    dense = [p for p in model.parameters() if not hasattr(p, "group_name")]
    experts = [p for p in model.parameters() if hasattr(p, "group_name")]
    groups: list[dict[str, Any]] = [{"params": dense, "name": "dense"}]
    if experts:
        groups.append({"params": experts, "name": experts[0].group_name, "moe": True})
    return groups


def _start(
    model: OlmoeForCausalLM, adamw: torch.optim.AdamW, config: dict[str, Any], parallel: ParallelConfig
) -> Any:
    """Return DeepSpeed's engine for a model, and redirect the model's `training_forward` to the engine."""
    from deepspeed import DeepSpeedEngine

    class EngineWithExpertGroups(DeepSpeedEngine):
        """Reads `allreduce` of parameters, although the model has no MoE layer of DeepSpeed."""

        def _configure_distributed_model(self, model: nn.Module) -> None:
            super()._configure_distributed_model(model)
            self.has_moe_layers = True

    # ZeRO-3 reads ds_zero_placement_family instead.
    experts = parallel.expert_parallel_size > 1 and parallel.zero_stage < 3
    forward = model.training_forward
    # To detect the start of backward, DeepSpeed looks for tensors in tuples but not in dataclasses.
    model.forward = lambda *inputs, **named: _as_tuple(forward(*inputs, **named))  # type: ignore[method-assign]
    engine = (EngineWithExpertGroups if experts else DeepSpeedEngine)(
        args=None,
        model=model,
        optimizer=adamw,
        dist_init_required=False,
        config=config,
        config_class=parse_config(config, parallel.deepspeed_config),
    )
    model.training_forward = lambda *inputs, **named: TrainingOutput(  # type: ignore[method-assign]
        *engine(*inputs, **named)
    )
    return engine


def _as_tuple(output: TrainingOutput) -> tuple[Any, ...]:
    return output.ce_sum, output.router


def _gather(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor. With expert parallelism, gather only this rank's experts. Collective."""
    assert isinstance(tensor, DTensor)
    names = tensor.device_mesh.mesh_dim_names
    assert names is not None
    placements = [Shard(0) if name == "expert" else Replicate() for name in names]
    return tensor.redistribute(placements=placements).to_local()
