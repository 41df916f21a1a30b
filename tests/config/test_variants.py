"""Groups of typed variants (optimizer, objective, balancing, adapter) and the older spellings of keys."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from olmoe_train.cli.app import run_verb
from olmoe_train.config import AdamWConfig, OptimizerConfig, TrainConfig, compose, register_variant
from olmoe_train.config.aliases import current_saved_config
from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import BalanceScope
from olmoe_train.config.reference import documented_keys, help_text
from olmoe_train.config.variants import VARIANTS, variant_errors
from olmoe_train.training.compatibility import changes
from olmoe_train.utils.errors import UserError


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    name: str = "sgd"
    momentum: float = 0.9
    """Decay rate of the running mean of the gradient."""

    def errors(self) -> list[str]:
        wrong = [] if 0 <= self.momentum < 1 else [f"optimizer.momentum={self.momentum}: must be in [0, 1)"]
        return super().errors() + wrong


@pytest.fixture
def sgd(tmp_path: Path) -> Iterator[Path]:
    """A third party's optimizer: its dataclass and a directory with its preset."""
    register_variant("optimizer", SGDConfig)
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "sgd.yaml").write_text("defaults: [sgd_schema, _self_]\nlr: 0.5\n")
    yield tmp_path
    del VARIANTS["optimizer"]["sgd"]
    del ConfigStore.instance().repo["optimizer"]["sgd_schema.yaml"]


def command_line(
    monkeypatch: pytest.MonkeyPatch, presets: Path, *overrides: str
) -> tuple[int, list[TrainConfig]]:
    arguments = ["train", "--config-dir", str(presets), "data.dir=x", *overrides]
    monkeypatch.setattr(sys, "argv", arguments)
    reached: list[TrainConfig] = []
    return run_verb("train", TrainConfig, reached.append), reached


def test_the_default_variants_are_named_in_the_config() -> None:
    cfg = compose("data.dir=x", "optimizer=adamw", "optimizer.lr=1e-3")
    assert cfg.optimizer == replace(AdamWConfig(), lr=1e-3, betas=[0.9, 0.95])  # type: ignore[arg-type]
    names = [section.name for section in (cfg.optimizer, cfg.objective, cfg.balancing, cfg.adapter)]
    assert names == ["adamw", "next_token", "aux", "none"]
    assert variant_errors(cfg) == []


def test_an_unknown_key_of_a_variant_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"not in 'AdamWConfig'(.|\n)*did you mean optimizer\.betas\?"):
        compose("data.dir=x", "optimizer.beta=[0.9,0.95]")


def test_an_unknown_variant_lists_those_there_are() -> None:
    with pytest.raises(UserError) as caught:
        compose("data.dir=x", "optimizer=adam")
    assert [line.strip() for line in str(caught.value).splitlines()[-4:]] == [
        "adamw",
        "muon",
        "normuon",
        "rmsprop",
    ]
    assert "Available options in 'optimizer'" in str(caught.value)


def test_a_third_party_adds_a_variant(sgd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, [cfg] = command_line(monkeypatch, sgd, "optimizer=sgd", "optimizer.momentum=0.8")
    assert code == 0
    assert cfg.optimizer == SGDConfig(lr=0.5, momentum=0.8)
    keys = {key for key, _, _ in documented_keys(TrainConfig)}
    assert {"optimizer.betas", "optimizer.momentum"} <= keys
    text = help_text("train", TrainConfig)
    assert "with optimizer=sgd:" in text
    assert "  optimizer.momentum = 0.9\n" in text


def test_a_variant_has_no_keys_of_another(
    sgd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, sgd, "optimizer=sgd", "optimizer.eps=1e-6") == (2, [])
    assert "Key 'eps' not in 'SGDConfig'" in capsys.readouterr().err


def test_a_variant_from_python_needs_no_registration() -> None:
    assert variant_errors(TrainConfig(optimizer=SGDConfig())) == []
    wrong = TrainConfig(optimizer=SGDConfig(momentum=1.5, lr=0.0))
    assert variant_errors(wrong) == [
        "optimizer.lr=0.0: must be positive",
        "optimizer.momentum=1.5: must be in [0, 1)",
    ]


def test_a_name_that_is_not_the_variant_is_refused() -> None:
    [error] = variant_errors(compose("data.dir=x", "optimizer.name=sgd"))
    assert error.startswith("optimizer.name=sgd: the keys of this section are those of optimizer=adamw")
    assert "choose the variant with optimizer=sgd" in error
    [error] = variant_errors(TrainConfig(optimizer=OptimizerConfig()))
    assert error == "optimizer: OptimizerConfig is no variant; use one of adamw, muon, normuon, rmsprop"


def test_a_name_is_registered_once() -> None:
    @dataclass(frozen=True)
    class Another(OptimizerConfig):
        name: str = "adamw"

    with pytest.raises(ValueError, match="optimizer=adamw is already AdamWConfig"):
        register_variant("optimizer", Another)
    with pytest.raises(ValueError, match="must give its field `name` a default"):
        register_variant("optimizer", OptimizerConfig)


OLD_EXPERIMENT = """# @package _global_
loss: {balance_scope: micro_batch}
optimizer: {lr: 0.25}
"""


@pytest.mark.parametrize(
    ("overrides", "scope"),
    [
        (["loss.balance_scope=micro_batch"], "micro_batch"),
        (["loss.balance_scope=micro_batch", "balancing.scope=micro_batch"], "micro_batch"),
        (["experiment=mine"], "micro_batch"),
        (["experiment=mine", "loss.balance_scope=global_batch"], "global_batch"),
        (["experiment=mine", "balancing.scope=global_batch"], "global_batch"),
        (["experiment=olmoe_1b_7b_0924", "loss.balance_scope=global_batch"], "global_batch"),
    ],
)
def test_older_spellings_work_and_the_command_line_wins(
    overrides: list[str], scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(OLD_EXPERIMENT)
    code, [cfg] = command_line(monkeypatch, tmp_path, *overrides)
    assert code == 0
    assert cfg.balancing == AuxiliaryLossConfig(scope=BalanceScope[scope])
    assert not hasattr(cfg.loss, "balance_scope")
    if "experiment=mine" in overrides:
        assert cfg.optimizer.lr == 0.25


def test_older_and_newer_spelling_must_agree() -> None:
    with pytest.raises(UserError) as caught:
        compose("data.dir=x", "loss.balance_scope=micro_batch", "balancing.scope=global_batch")
    assert "loss.balance_scope=micro_batch and balancing.scope=global_batch" in str(caught.value)
    assert "keep balancing.scope and remove the other" in str(caught.value)


def test_a_command_line_with_both_spellings_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("loss.balance_scope=micro_batch", "balancing.scope=global_batch")
    assert command_line(monkeypatch, tmp_path, *both) == (2, [])
    assert "error: loss.balance_scope=micro_batch and balancing.scope=global_batch" in capsys.readouterr().err


def test_older_and_newer_spelling_must_agree_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nloss: {balance_scope: global_batch}\nbalancing: {scope: micro_batch}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert command_line(monkeypatch, tmp_path, "experiment=mine") == (2, [])
    assert "loss.balance_scope=global_batch and balancing.scope=micro_batch" in capsys.readouterr().err


def test_a_preset_of_before_the_variants_is_the_first_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("lr: 0.125\n")
    (tmp_path / "optimizer" / "betas.yaml").write_text("betas: [0.5, 0.5]\n")
    _, [cfg] = command_line(monkeypatch, tmp_path, "optimizer=mine")
    assert isinstance(cfg.optimizer, AdamWConfig)
    assert cfg.optimizer.lr == 0.125
    assert command_line(monkeypatch, tmp_path, "optimizer=betas") == (2, [])
    assert "must start with its variant: defaults: [NAME_schema, _self_]" in capsys.readouterr().err


def test_the_config_of_an_older_run_is_that_of_the_first_variants() -> None:
    old = {"seed": 1, "loss": {"balance_scope": "micro_batch", "convention": "hf"}, "optimizer": {"lr": 0.5}}
    now = current_saved_config(old)
    assert now["loss"] == {"convention": "hf"}
    defaults = {"router_jitter": 0.0, "router_temperature": 1.0}
    assert now["balancing"] == {"name": "aux", "scope": "micro_batch"} | defaults
    assert (now["optimizer"]["name"], now["optimizer"]["lr"]) == ("adamw", 0.5)
    assert (now["objective"], now["adapter"]) == ({"name": "next_token"}, {"name": "none"})
    assert current_saved_config(now) == now
    assert "balancing" not in old


def test_the_older_name_of_a_variant_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "balancing").mkdir()
    old_preset = "defaults: [auxiliary_loss_schema, _self_]\nscope: micro_batch\n"
    (tmp_path / "balancing" / "mine.yaml").write_text(old_preset)
    for choice in ("mine", "auxiliary_loss"):
        _, [cfg] = command_line(monkeypatch, tmp_path, f"balancing={choice}", "balancing.scope=micro_batch")
        assert cfg.balancing == AuxiliaryLossConfig(scope=BalanceScope.micro_batch)
        assert cfg.balancing.name == "aux"
    old = {"balancing": {"name": "auxiliary_loss", "scope": "micro_batch"}}
    assert current_saved_config(old)["balancing"]["name"] == "aux"


def test_a_key_that_an_older_run_did_not_have_has_its_default() -> None:
    old = {"optimizer": {"name": "muon", "lr": 0.5}}
    now = current_saved_config(old)
    assert (now["optimizer"]["lr"], now["optimizer"]["momentum"], now["optimizer"]["no_decay"]) == (
        0.5,
        0.95,
        [],
    )


def test_the_checkpoint_of_an_older_run_differs_in_nothing() -> None:
    cfg = TrainConfig(balancing=AuxiliaryLossConfig(scope=BalanceScope.micro_batch))
    now = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    old = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    assert isinstance(now, dict)
    assert isinstance(old, dict)
    for group in ("objective", "balancing", "adapter"):
        del old[group]
    del old["optimizer"]["name"], old["optimizer"]["no_decay"]
    old["loss"]["balance_scope"] = "micro_batch"
    before, after = ({"config": config, "schedule": {}, "fingerprint": {}} for config in (old, now))
    assert changes(before, after) == []
    old["loss"]["balance_scope"] = "global_batch"
    assert [change.key for change in changes(before, after)] == ["balancing.scope"]
