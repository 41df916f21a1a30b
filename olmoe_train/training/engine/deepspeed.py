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
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from olmoe_train.checkpoint.sharded import load_checkpoint, persistent_buffers
from olmoe_train.config.optimizer import ADAMW_STATE, OptimizerConfig
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.distributed.deepspeed_config import deepspeed_config
from olmoe_train.distributed.expert_parallel import apply_expert_parallelism
from olmoe_train.distributed.fsdp import shard
from olmoe_train.distributed.materialize import shard_slices
from olmoe_train.distributed.mesh import build_mesh, local_tensor
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter
from olmoe_train.optim.build import build_optimizer, scale_learning_rates, trained_parameters
from olmoe_train.optim.clipping import clip_gradients
from olmoe_train.optim.roles import parameter_groups as role_groups
from olmoe_train.training.engine.base import Judge, StepOutcome
from olmoe_train.training.engine.deepspeed_model import (
    build_zero_model,
    import_deepspeed,
    is_expert,
    parameter_groups,
    start_deepspeed,
)
from olmoe_train.utils.errors import UserError

log = logging.getLogger(__name__)


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
        # The balancer's own are shared with `initial` and with every sharded copy, so they need no copying.
        if buffers := [name for name in persistent_buffers(initial) if not name.startswith("balancer.")]:
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
        balancer: object = self.model.balancer
        if isinstance(balancer, nn.Module):
            balancer.to(device, torch.float32)  # in case DeepSpeed has rounded buffers to bf16

    def _start(self, initial: OlmoeForCausalLM, config: dict[str, Any]) -> None:
        self.model = build_zero_model(self.trainer, self.parallel, initial, config, self.device)
        self._trained = trained_parameters(self.model)
        optimizer = build_optimizer(parameter_groups(self.model), self.optimizer_config)
        assert isinstance(optimizer, torch.optim.AdamW), "preflight refuses other optimizers"
        self._adamw = optimizer
        self._norm = torch.zeros((), device=self.device)
        if self.stage == 0:
            self._adamw.register_step_pre_hook(self._clip_whole_gradients)
        self._adamw.register_step_pre_hook(self._skip_not_finite)
        self._engine = start_deepspeed(self.model, self._adamw, config, self.parallel)
        self.optimizer = self._engine.optimizer
        self.model.base = initial.base
        for (name, parameter), source in zip(
            self.model.named_parameters(), initial.parameters(), strict=True
        ):
            assert parameter.requires_grad == source.requires_grad, name
            self._write(parameter, None, _gather(source))
        for ours, theirs in zip(self.model.buffers(), initial.buffers(), strict=True):
            ours.copy_(theirs)  # quantized weights
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
        for parameter, target in zip(self._trained, trained_parameters(stored), strict=True):
            index = shard_slices(target)
            if is_expert(parameter):
                index = (slice(None), *index[1:])  # `_read` returns only this rank's experts
            state: dict[str, Tensor] = {"step": count.cpu().clone()}
            state |= {moment: torch.zeros_like(target, requires_grad=False) for moment in ADAMW_STATE}
            adamw.state[target] = state
            moments = ((moment, state[moment]) for moment in ADAMW_STATE)
            for key, tensor in ((None, target.detach()), *moments):
                local_tensor(tensor).copy_(self._read(parameter, key)[index])
        return stored, adamw

    @torch.no_grad()
    def load(self, checkpoint: Path) -> dict[str, Any]:
        stored, adamw = self._sharded_copy()
        saved = load_checkpoint(checkpoint, stored, adamw)
        sources = trained_parameters(stored)
        steps = [float(state["step"]) for state in adamw.state.values()]
        # A flat partition has one step count: moments that are not those of all parameters begin anew.
        is_whole = len(steps) == len(sources) and len(set(steps)) == 1
        if steps and not is_whole:
            log.warning("WARNING: with parallel.strategy=deepspeed the moments of all parameters begin anew")
        for flat in self._partitions():
            self._adamw.state[flat]["step"].fill_(steps[0] if is_whole else 0.0)
        for parameter, source in zip(self._trained, sources, strict=True):
            self._write(parameter, None, _gather(source))
            for moment in ADAMW_STATE if is_whole else ():
                self._write(parameter, moment, _gather(adamw.state[source][moment]))
        return saved

    # --- the engine's state, one parameter at a time -------------------------------------------------------

    def _sharded_copy(self) -> tuple[OlmoeForCausalLM, torch.optim.AdamW]:
        """Return a model and an optimizer in CPU memory, sharded as FSDP2 shards them, with unset values."""
        mesh = build_mesh(self.parallel, torch.device("cpu"))
        with torch.device("meta"):
            stored = OlmoeForCausalLM(self.model.config)
        if self.model.adapter is not None:
            add_adapter(stored, self.model.adapter)
        if mesh.expert is not None:
            apply_expert_parallelism(stored, mesh.expert["expert"])
        shard(stored, mesh, self.trainer.precision, self.parallel)
        for module in stored.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:  # frozen ones stay on the meta device: checkpoints have none
                    module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        stored.tie_weights()
        assert self.model.balancer is not None
        stored.set_balancer(self.model.balancer)  # the same object: its buffers are saved and loaded in place
        adamw = build_optimizer(role_groups(stored, self.optimizer_config), self.optimizer_config)
        assert isinstance(adamw, torch.optim.AdamW)
        return stored, adamw

    def _make_moments(self) -> None:
        """Create the moments before the first step. DeepSpeed 0.19 (ZeRO-1 and 2) links parameters to
        optimizer state after the first group's first step, when the other groups have none yet."""
        for flat in self._partitions():
            step = torch.tensor(0.0, dtype=torch.float32, device=flat.device)
            self._adamw.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in ADAMW_STATE}}
        if self.stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> Sequence[Tensor]:
        """Return the fp32 tensors that AdamW updates on this rank. With ZeRO-1 to 3 the tensors are flat."""
        if self.stage == 0:
            return self._trained
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
                if parameter.requires_grad:
                    utils.safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, moment)
            return
        if moment is None:
            parameter.data.copy_(value)
        elif self.stage == 0:
            self._adamw.state[parameter][moment].copy_(value)
        if self.stage > 0 and parameter.requires_grad:
            value = value.to(self.device)
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _clip_whole_gradients(self, *_: Any) -> None:
        """Clip by the exact global norm. DeepSpeed's ZeRO-0 clips by the mean of the ranks' norms, which is
        not the global norm with expert parallelism."""
        self._norm = clip_gradients(self._trained, self.optimizer_config.max_grad_norm, self._copies)

    def _copies(self, parameter: nn.Parameter) -> int:
        """Return on how many ranks a parameter exists: every rank, or for experts every
        expert_parallel_size-th rank."""
        return dist.get_world_size() // (self.parallel.expert_parallel_size if is_expert(parameter) else 1)

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


def _gather(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor. With expert parallelism, gather only this rank's experts. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor  # frozen, on one rank
    names = tensor.device_mesh.mesh_dim_names
    assert names is not None
    placements = [Shard(0) if name == "expert" else Replicate() for name in names]
    return tensor.redistribute(placements=placements).to_local()
