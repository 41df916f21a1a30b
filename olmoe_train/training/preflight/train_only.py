"""Checks of trainer.train_only together with the model, the optimizer and the layout."""

from pathlib import Path

from olmoe_train.config.balancing import LossFreeConfig
from olmoe_train.config.choices import ExpertsBackend, Strategy
from olmoe_train.config.expert_file import read_experts
from olmoe_train.config.train import TrainConfig
from olmoe_train.model.roles import ParameterRole
from olmoe_train.utils.errors import UserError


def train_only_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with trainer.train_only, one message per error."""
    path, model = cfg.trainer.train_only, cfg.model
    if path is None:
        return []
    errors = []
    try:
        named = read_experts(Path(path).expanduser(), model.num_hidden_layers, model.num_experts)
        if isinstance(cfg.balancing, LossFreeConfig) and ParameterRole.router not in named.also:
            errors.append(
                "balancing=loss_free with trainer.train_only: its bias would go on changing what the frozen "
                f"routers choose; set balancing=none, or add router to `also` in {path}"
            )
    except UserError as error:
        errors.append(f"trainer.train_only={error}")
    if cfg.adapter.name != "none":
        errors.append(
            f"trainer.train_only with adapter={cfg.adapter.name}: an adapter leaves all weights of the model "
            "frozen; set adapter=none, or trainer.train_only=null"
        )
    if cfg.optimizer.weight_decay_of(ParameterRole.expert_matrix) != 0:
        errors.append(
            f"optimizer.weight_decay={cfg.optimizer.weight_decay} with trainer.train_only: it would shrink "
            "the frozen experts of a layer, which are one tensor with the trained ones; set "
            "optimizer.weight_decay=0, or optimizer.no_decay=[expert_matrix]"
        )
    if cfg.parallel.strategy is Strategy.deepspeed:
        errors.append(
            "trainer.train_only with parallel.strategy=deepspeed: DeepSpeed holds frozen weights only in "
            "trainer.precision, which rounds them, and its checkpoints would lack them; set "
            "parallel.strategy=fsdp"
        )
    if model.experts_backend is ExpertsBackend.sonicmoe:
        errors.append(
            "model.experts_backend=sonicmoe with trainer.train_only: its kernels train all experts of a "
            "layer; set model.experts_backend=auto"
        )
    return errors


def train_only_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about keys of a valid config that have no effect, or another one than expected."""
    path, model = cfg.trainer.train_only, cfg.model
    if path is None:
        return []
    warnings = []
    if model.init_from is None and cfg.checkpoint.branch_from is None:
        warnings.append(
            "trainer.train_only without model.init_from: all weights but those of the experts that are "
            "trained stay random"
        )
    named = read_experts(Path(path).expanduser(), model.num_hidden_layers, model.num_experts)
    if ParameterRole.router not in named.also:
        warnings += [
            f"loss.{name} has no effect: trainer.train_only freezes the routers, and the router losses are "
            "only reported"
            for name in ("router_aux_loss_coef", "router_z_loss_coef")
            if getattr(cfg.loss, name) != 0
        ]
    return warnings
