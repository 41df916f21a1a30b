"""Builds the model that DeepSpeed trains, and starts DeepSpeed's engine."""

import logging
import os
import shutil
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from olmoe_train.config.choices import Precision
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.distributed.compile import compile_layers
from olmoe_train.distributed.expert_parallel import exchange_tokens, keep_quantized_experts
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter, quantize_base, quantized_weights
from olmoe_train.model.moe.balancing import set_router_options
from olmoe_train.model.moe.experts import OlmoeExperts
from olmoe_train.model.outputs import TrainingOutput
from olmoe_train.optim.build import trained_parameters
from olmoe_train.utils.errors import UserError


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


def build_zero_model(
    trainer: TrainerConfig,
    parallel: ParallelConfig,
    stored: OlmoeForCausalLM,
    config: dict[str, Any],
    device: torch.device,
) -> OlmoeForCausalLM:
    """Build the model with this rank's experts and with zeros as weights. With ZeRO-3 each part of the model
    is partitioned as soon as it is allocated."""
    import deepspeed

    model = _meta_copy(stored)
    if parallel.expert_parallel_size > 1:
        _keep_own_experts(model, parallel.expert_parallel_size)
    checkpoint_activations(model, trainer.activation_checkpointing)
    if trainer.compile:
        compile_layers(model)
    if trainer.precision is Precision.bf16:
        # Not model.bfloat16(), which would round the fp32 scales of quantized weights, too.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
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


def _meta_copy(stored: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """A whole model like `stored` on the meta device, with its adapter, kernels, balancer and router
    options."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(stored.config)
    if stored.adapter is not None:
        add_adapter(model, stored.adapter)
        if quantized_weights(stored):
            quantize_base(model)
    model.set_experts_backend(stored.decoder_layers[0].mlp.experts.backend)
    if stored.balancer is not None:
        model.set_balancer(stored.balancer)
    router = stored.decoder_layers[0].mlp.gate
    set_router_options((layer.mlp for layer in model.decoder_layers), router.temperature, router.jitter)
    return model


def _keep_own_experts(model: OlmoeForCausalLM, size: int) -> None:
    """Keep only this rank's experts (on the meta device), and exchange tokens with the other ranks."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(size)
    for layer in model.decoder_layers:
        for name, parameter in list(layer.mlp.experts.named_parameters(recurse=False)):
            local = nn.Parameter(parameter.detach()[: len(parameter) // size], parameter.requires_grad)
            layer.mlp.experts.register_parameter(name, local)
        group = groups._get_expert_parallel_group(f"ep_size_{size}")
        keep_quantized_experts(layer.mlp.experts, dist.get_rank(group), size)
        exchange_tokens(layer.mlp, group)


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


def parameter_groups(model: OlmoeForCausalLM) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, one per set of ranks that hold copies of the same parameters.
    DeepSpeed identifies the groups by these names."""
    dense = [p for p in trained_parameters(model) if not is_expert(p)]
    experts: list[Any] = [p for p in trained_parameters(model) if is_expert(p)]
    groups: list[dict[str, Any]] = [{"params": dense, "name": "dense"}] if dense else []
    if experts:
        groups.append({"params": experts, "name": experts[0].group_name, "moe": True})
    return groups


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether `_mark_experts` marked the parameter: its ranks hold different experts."""
    return hasattr(parameter, "group_name")


def start_deepspeed(
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
    if output.log_probs is None:
        return output.ce_sum, output.router
    return output.ce_sum, output.router, output.log_probs
