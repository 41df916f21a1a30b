"""trainer.train_only before the run starts: what is refused, and what has no effect."""

from pathlib import Path

import pytest

from olmoe_train.config import compose
from olmoe_train.config.train import TrainConfig
from olmoe_train.training.preflight.train_only import train_only_errors, train_only_warnings
from tests.support.sizes import SIZES, overrides, section


def config(file: Path, *changes: str) -> TrainConfig:
    model = overrides(section("model", SIZES))
    return compose(*model, "data.dir=somewhere", f"trainer.train_only={file}", *changes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experts.yaml"
    path.write_text("layers: {1: [6, 1]}")
    return path


def test_what_would_not_be_exact_is_refused(file: Path) -> None:
    assert train_only_errors(config(file, "optimizer.weight_decay=0")) == []
    assert train_only_errors(config(file, "optimizer.no_decay=[expert_matrix]")) == []
    wrong = {
        "balancing=loss_free": "balancing=loss_free",
        "adapter=lora": "adapter=lora",
        "optimizer=adamw": "optimizer.weight_decay=0.1",
        "parallel.strategy=deepspeed": "parallel.strategy=deepspeed",
        "model.experts_backend=sonicmoe": "sonicmoe",
    }
    errors = train_only_errors(config(file, *wrong))
    assert all(name in error for name, error in zip(wrong.values(), errors, strict=True))
    file.write_text("layers: {3: [0]}")
    (error,) = train_only_errors(config(file, "optimizer=muon", "optimizer.weight_decay=0"))
    assert error == f"trainer.train_only={file}: layers.3: the model has the layers 0 to 2"


def test_losses_of_frozen_routers_have_no_effect(file: Path) -> None:
    random, aux = train_only_warnings(config(file, "loss.router_z_loss_coef=0"))
    assert "without model.init_from" in random
    assert aux.startswith("loss.router_aux_loss_coef has no effect: trainer.train_only freezes")
    file.write_text("layers: {1: [6, 1]}\nalso: [router]")
    assert train_only_warnings(config(file)) == [random]
