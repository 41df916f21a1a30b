"""The evaluation callback on data without a validation split."""

from pathlib import Path

from olmoe_train.config.train import EvaluationConfig, ParallelConfig
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.faults import config, records


def test_data_without_a_validation_split_is_trained_on_with_a_warning(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", [[2 + i % 60 for i in range(400)]], vocab_size=64)
    changes = {"trainer": {"max_steps": 2}, "parallel": ParallelConfig()}
    evaluation = EvaluationConfig(at_start=True, every=1)
    assert train(config(data, tmp_path / "run", evaluation=evaluation, **changes)).step == 2
    logged = records(tmp_path / "run")
    assert len(logged) == 2  # one record per step, and none of an evaluation
    assert not any(name.startswith("eval/") for record in logged for name in record)
    assert (tmp_path / "run" / "log.txt").read_text().count("no validation split") == 1
