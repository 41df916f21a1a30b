"""Presets ablation=NAME: what they change, that they are comparable, and what does not go with them."""

from typing import Any

import pytest

from olmoe_train.config import compose
from olmoe_train.config.compose import plain_values
from olmoe_train.config.keys import config_directory
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.planning.flops import parameter_counts
from olmoe_train.training.build_balancer import build_balancer
from olmoe_train.training.compatibility import changes
from olmoe_train.training.preflight.ablations import ablation_warnings
from olmoe_train.training.preflight.checks import configuration_errors

NAMES = sorted(path.stem for path in (config_directory() / "ablation").glob("*.yaml"))
# The only keys that change.
CHANGED: dict[str, dict[str, Any]] = {
    "expert_choice": {
        "model.routing": "expert_choice",
        "loss.router_aux_loss_coef": 0.0,
        "evaluation.tasks": [],
    },
    "no_load_balancing_loss": {"loss.router_aux_loss_coef": 0.0},
    "no_z_loss": {"loss.router_z_loss_coef": 0.0},
    "no_qk_norm": {"model.qk_norm": False},
    "normal_init": {"model.initialization": "normal"},
    "nonparametric_norm": {"model.norm": "nonparametric"},
    "no_decay_norm": {"optimizer.no_decay": ["norm"]},
    "no_decay_embedding": {"optimizer.no_decay": ["embedding"]},
    "adamw_eps_1e_5": {"optimizer.eps": 1e-5},
}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def quickstart(*overrides: str) -> TrainConfig:
    return compose("experiment=quickstart", "data.dir=x", *overrides)


@pytest.fixture(scope="module")
def presets() -> dict[str, TrainConfig]:
    return {name: quickstart(f"+ablation={name}") for name in NAMES}


def test_null_is_no_preset() -> None:
    """As in a sweep, which compares a preset with none: ablation=null,no_z_loss."""
    assert quickstart("ablation=null") == quickstart()
    assert compose("data.dir=x", "experiment=null") == compose("data.dir=x")


def test_each_changes_one_thing(presets: dict[str, TrainConfig]) -> None:
    before = flat(plain_values(quickstart()))
    for name, cfg in presets.items():
        assert configuration_errors(cfg, 1) == [], name
        now = flat(plain_values(cfg))
        changed = {key: value for key, value in now.items() if before[key] != value}
        if name in CHANGED:
            assert changed == CHANGED[name]
        else:  # of the sizes of the experts alone
            assert {key.rpartition(".")[0] for key in changed} == {"model"}, name


def experts(cfg: TrainConfig) -> tuple[int, int]:
    """Width of all experts of a layer together, and of those that process a token."""
    model = cfg.model
    every, active = model.num_experts, model.num_experts_per_tok
    shared, width = model.num_shared_experts, model.intermediate_size
    return (every + shared) * width, (active + shared) * width


def test_what_is_compared_has_equal_sizes(presets: dict[str, TrainConfig]) -> None:
    for name in NAMES:
        sizes = experts(presets[name])
        if name.startswith(("granularity_", "shared_expert")):
            assert sizes == (2048, 256), name
        elif name == "upcycling":  # of `dense`, whose MLP every expert starts as
            assert sizes == (8 * 256, 2 * 256)
        else:
            assert sizes == ((256, 256) if name == "dense" else (1024, 256)), name
    assert presets["shared_expert_none"].model == presets["granularity_32"].model
    # The one difference in size: the router's row of the expert that is shared.
    shared, routed = (
        parameter_counts(olmoe_config(presets[name].model))
        for name in ("shared_expert", "shared_expert_none")
    )
    assert routed.total - shared.total == routed.active - shared.active == 4 * 128


def test_the_paper_s_shared_expert_at_full_scale() -> None:
    """31 routed and one shared expert of width 2048, 3 routed ones per token: 28 of 32 experts do not act."""
    config = OlmoeConfig(num_experts=31, num_experts_per_tok=3, num_shared_experts=1)
    expert = 3 * 2048 * 2048
    counts = parameter_counts(config)
    assert counts.total - counts.active == 16 * 28 * expert
    assert counts.total == 16 * (4 * 2048**2 + 4 * 2048 + 31 * 2048 + 32 * expert) + 2 * 50304 * 2048 + 2048


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["model.qk_norm=false", "checkpoint.export_every=10"],
            "cannot represent model.qk_norm=false; set check",
        ),
        (
            ["model.norm=nonparametric", "adapter=lora"],
            "cannot represent model.norm=nonparametric; set adapter=none",
        ),
        (["ablation=expert_choice", "data.mask_documents=true"], "documents are not isolated"),
        (["ablation=expert_choice", "evaluation.tasks=[python_basics]"], "cannot answer questions"),
        (["ablation=expert_choice", "objective=grpo"], "objective=grpo: needs the probability of an answer"),
        (["model.expert_capacity=2"], "expert_capacity=2.0 has no meaning with routing=token_choice"),
        (["model.num_shared_experts=-1"], "num_shared_experts=-1 must be an integer of at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], reason: str) -> None:
    assert any(reason in error for error in configuration_errors(quickstart(*overrides), 1))


def test_the_load_balancing_loss_of_expert_choice_has_no_weight() -> None:
    cfg = quickstart("model.routing=expert_choice", "evaluation.tasks=[]", "loss.router_aux_loss_coef=0.5")
    balancer = build_balancer(cfg, olmoe_config(cfg.model))
    assert balancer.scope == "after_step"
    (warning,) = ablation_warnings(cfg)
    assert warning.startswith("loss.router_aux_loss_coef has no effect")


def test_runs_of_before_resume() -> None:
    """Their configuration has none of these keys, and what they did are the defaults."""
    now = {"config": plain_values(quickstart()), "schedule": {}, "fingerprint": {}}
    later = ("num_shared_experts", "routing", "expert_capacity", "qk_norm", "norm", "initialization")
    model = {name: value for name, value in now["config"]["model"].items() if name not in later}
    saved = now | {"config": now["config"] | {"model": model}}
    assert changes(saved, now) == []
