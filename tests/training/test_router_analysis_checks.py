"""What the preflight checks say of the router analyses during training."""

from dataclasses import replace

import pytest

from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.config.train import LoggingConfig, TrainConfig
from olmoe_train.data.mixture import read_manifests
from olmoe_train.training.preflight.router_analysis import (
    has_router_analysis,
    router_analysis_errors,
    router_analysis_warnings,
)
from tests.support.faults import config, write_data
from tests.support.pair import TINY, make_pair


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("checks")
    make_pair(TINY | {"vocab_size": 64, "num_experts": 4})[0].save_pretrained(root / "hf")
    run = config(write_data(root / "data"), root / "run")
    return replace(run, logging=LoggingConfig(router_analysis_every=5, router_reference=str(root / "hf")))


def test_a_reference_of_another_architecture_is_refused(cfg: TrainConfig) -> None:
    (error,) = router_analysis_errors(cfg, read_manifests(cfg.data))
    assert "hf: has num_experts=4, and model.num_experts is 8; only models of one architecture" in error
    nowhere = replace(cfg, logging=replace(cfg.logging, router_reference="nowhere@3"))
    (error,) = router_analysis_errors(nowhere, read_manifests(cfg.data))
    assert error.startswith("logging.router_reference=nowhere@3: neither an HF directory")


def test_keys_without_effect_are_named(cfg: TrainConfig) -> None:
    manifests = read_manifests(cfg.data)
    assert router_analysis_warnings(cfg, manifests) == []
    off = replace(cfg, logging=replace(cfg.logging, router_analysis_every=0))
    (warning,) = router_analysis_warnings(off, manifests)
    assert warning == "logging.router_reference has no effect: logging.router_analysis_every=0"
    for without, reason in (
        (replace(cfg, objective=PreferenceConfig()), "objective=preference"),
        (replace(cfg, model=replace(cfg.model, num_experts=1)), "a dense model"),
    ):
        (warning,) = router_analysis_warnings(without, manifests)
        assert warning.startswith(f"logging.router_analysis_every has no effect: {reason}")
        assert not has_router_analysis(without, manifests)
