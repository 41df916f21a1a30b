"""Checks of the design choices that only training has (model/ablations.py), together with other keys."""

from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import RoutingKind
from olmoe_train.config.initial_model import as_yaml
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.train import EvaluationConfig, TrainConfig
from olmoe_train.model.ablations import ABLATIONS

FUTURE = "its experts choose among all tokens of a sequence, those after a token included"


def ablation_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with the design choices of a run, one message per error."""
    default = ModelConfig()
    found = ", ".join(
        f"model.{name}={as_yaml(getattr(cfg.model, name))}"
        for name in ABLATIONS
        if getattr(cfg.model, name) != getattr(default, name)
    )
    if not found:
        return []
    errors = []
    if cfg.checkpoint.export_every:
        errors.append(
            f"checkpoint.export_every={cfg.checkpoint.export_every}: exports are for Transformers, which "
            f"cannot represent {found}; set checkpoint.export_every=0"
        )
    if cfg.adapter.name != "none":
        errors.append(
            f"adapter={cfg.adapter.name}: an adapter is for a model that Transformers has, and it cannot "
            f"represent {found}; set adapter=none"
        )
    return errors + (_expert_choice_errors(cfg) if cfg.model.routing is RoutingKind.expert_choice else [])


def _expert_choice_errors(cfg: TrainConfig) -> list[str]:
    errors = []
    if not isinstance(cfg.objective, NextTokenConfig):
        errors.append(
            f"objective={cfg.objective.name}: needs the probability of an answer, and a model with "
            f"model.routing=expert_choice has none, because {FUTURE}; set objective=next_token"
        )
    if not (isinstance(cfg.balancing, AuxiliaryLossConfig) or cfg.balancing.name == "none"):
        errors.append(
            f"balancing={cfg.balancing.name}: with model.routing=expert_choice the load is even by "
            "construction; leave balancing out"
        )
    if cfg.data.mask_documents:
        errors.append(
            "data.mask_documents=true: with model.routing=expert_choice experts choose among all documents "
            "of a sequence, so documents are not isolated; set data.mask_documents=false"
        )
    return errors + evaluation_errors(cfg.evaluation)


def evaluation_errors(evaluation: EvaluationConfig) -> list[str]:
    """What cannot be evaluated of a model whose experts choose, one message per error."""
    return [
        f"evaluation.{name}: a model with model.routing=expert_choice cannot {what}, because {FUTURE}; set "
        f"evaluation.{name}=[]"
        for name, what in (("tasks", "answer questions"), ("prompts", "continue a text"))
        if getattr(evaluation, name)
    ]


def ablation_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about keys of a valid config that have no effect with these design choices."""
    if cfg.model.routing is RoutingKind.token_choice or cfg.loss.router_aux_loss_coef == 0:
        return []
    warning = (
        "loss.router_aux_loss_coef has no effect: with model.routing=expert_choice the load is even by "
        "construction, and the loss is only reported"
    )
    return [warning]
