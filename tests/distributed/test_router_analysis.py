"""Router analyses during training, in a sharded layout."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.config.data import MixtureSource
from olmoe_train.config.train import EvaluationConfig, LoggingConfig, TrainConfig
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.faults import config
from tests.support.ranks import run_ranks


def records(cfg: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train_twice(plain: TrainConfig, analyzed: TrainConfig) -> None:
    """The second run has the first one, when it was complete, as its reference."""
    train(plain)
    train(replace(analyzed, trainer=replace(analyzed.trainer, stop_at_step=2)))
    train(analyzed)


def test_training_is_the_same_and_agrees_with_itself_in_the_end(tmp_path: Path) -> None:
    """FSDP2 with expert parallelism, and a resume between two analyses."""
    for name, first in (("low", 2), ("high", 40)):
        documents = [[first + (start * 7 + i * i) % 20 for i in range(200)] for start in range(8)]
        write_prepared(tmp_path / name, documents, documents[:1], vocab_size=64)
    plain = config(
        tmp_path, tmp_path / "plain", trainer={"max_steps": 4}, evaluation=EvaluationConfig(at_start=False)
    )
    mixture = [MixtureSource(name, weight=1) for name in ("low", "high")]
    plain = replace(plain, data=replace(plain.data, mixture=mixture))
    logging = LoggingConfig(
        router_analysis_every=1,
        router_analysis_sequences=3,
        router_reference=str(tmp_path / "plain@4"),
        wandb=plain.logging.wandb,
    )
    analyzed = replace(plain, run_dir=str(tmp_path / "analyzed"), logging=logging)
    run_ranks(2, train_twice, plain, analyzed)

    steps = {row["step"]: row for row in records(plain) if "train/loss" in row}
    for row in records(analyzed):
        if "train/loss" in row:
            expected = steps.pop(row["step"])
            same = [key for key in expected if key.startswith(("train/", "router/"))]
            assert {key: row[key] for key in same} == {key: expected[key] for key in same}
    assert not steps
    found = {row["step"]: row for row in records(analyzed) if "router/layer_00/saturation" in row}
    assert list(found) == [0, 1, 2, 3, 4]
    for layer in ("router/layer_00", "router/layer_01"):
        saturation = [row[f"{layer}/saturation"] for row in found.values()]
        assert 0.25 < saturation[0] < saturation[2] < saturation[4] == pytest.approx(1, abs=0.01)
        # Step 4 is the reference, so that its agreement with step 3 is the saturation of step 3.
        assert found[4][f"{layer}/agreement_with_previous"] == pytest.approx(saturation[3], abs=0.01)
        assert saturation[3] != pytest.approx(saturation[2], abs=0.02)
        # The analysis of step 2 is made again when the run resumes from it.
        assert f"{layer}/agreement_with_previous" in found[3]
        for name in ("low", "high"):
            assert sum(found[4][f"{layer}/domain_share/{name}"]) == pytest.approx(2, abs=1e-4)
    shares = [found[4][f"router/layer_00/domain_share/{name}"] for name in ("low", "high")]
    assert shares[0] != shares[1]
