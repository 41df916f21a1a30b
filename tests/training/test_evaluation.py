"""The evaluation callback: data without a validation split, the sets of evaluation.sets, and tasks."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from olmoe_train.config.train import EvaluationConfig, EvaluationSet, ParallelConfig, TrainConfig
from olmoe_train.evaluation.tasks import log_likelihoods
from olmoe_train.train import train
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared
from tests.support.faults import config, records, without_timing, write_data
from tests.support.prepared_texts import TEXTS, prepare_texts
from tests.support.tasks import write_task


def test_data_without_a_validation_split_is_trained_on_with_a_warning(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", [[2 + i % 60 for i in range(400)]], vocab_size=64)
    changes = {"trainer": {"max_steps": 2}, "parallel": ParallelConfig()}
    evaluation = EvaluationConfig(at_start=True, every=1)
    assert train(config(data, tmp_path / "run", evaluation=evaluation, **changes)).step == 2
    logged = records(tmp_path / "run")
    assert len(logged) == 2  # one record per step, and none of an evaluation
    assert not any(name.startswith("eval/") for record in logged for name in record)
    assert (tmp_path / "run" / "log.txt").read_text().count("no validation split") == 1


def assert_same_training(one: TrainConfig, other: TrainConfig) -> None:
    """Two runs logged the same values of training, bit for bit."""
    before, after = (
        [without_timing(row) for row in records(cfg.run_dir, "train/loss")] for cfg in (one, other)
    )
    assert before == after


def test_sets_are_logged_and_change_no_training(tmp_path: Path) -> None:
    data = prepare_texts(tmp_path / "data")
    shutil.copytree(data, tmp_path / "copy")
    other = prepare_texts(tmp_path / "other", TEXTS[:2], tokenizer=data / "tokenizer")
    changes = {
        "trainer": {"max_steps": 2},
        "parallel": ParallelConfig(),
        "model": {"vocab_size": 320},
    }
    sets = [EvaluationSet("copy", str(tmp_path / "copy")), EvaluationSet("other", str(other))]
    plain = config(data, tmp_path / "plain", **changes)
    with_sets = replace(plain, run_dir=str(tmp_path / "sets"))
    train(plain)
    train(replace(with_sets, evaluation=EvaluationConfig(every=1, sets=sets)))
    assert_same_training(plain, with_sets)
    evaluated = records(with_sets.run_dir, "eval/other/loss")
    assert [row["step"] for row in evaluated] == [0, 1, 2]
    for row in evaluated:
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert row[f"eval/copy/{key}"] == row[f"eval/validation/{key}"] != row[f"eval/other/{key}"]
    assert "bits_per_byte is not measured" not in (tmp_path / "sets" / "log.txt").read_text()


def test_an_evaluation_that_was_interrupted_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two tasks at step 2, the run goes on from step 1 and ends like a run without a stop."""
    data = prepare_texts(tmp_path / "data")
    questions = [{"query": "def main", "choices": ["(argument)", "done"], "gold": 0}] * 2
    card = write_task(tmp_path / "tasks", "toy", questions)
    changes = {
        "trainer": {"max_steps": 3},
        "parallel": ParallelConfig(),
        "model": {"vocab_size": 320, "max_position_embeddings": 128},
        "evaluation": EvaluationConfig(every=1, at_start=False, tasks=[str(card)], tokens_per_pass=16),
    }
    whole, stopped = (config(data, tmp_path / name, **changes) for name in ("whole", "stopped"))
    passes: list[int] = []
    stop_at: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        passes.append(1)
        if [len(passes)] == stop_at:
            raise RuntimeError("stopped")
        return sums(*arguments)

    sums = log_likelihoods._sums
    monkeypatch.setattr(log_likelihoods, "_sums", counted)
    train(whole)
    in_each = len(passes) // 3
    assert in_each > 1
    stop_at.append(len(passes) + in_each + 2)
    with pytest.raises(RuntimeError, match="stopped"):
        train(stopped)
    assert len(records(stopped.run_dir, "eval/tasks")) == 1
    assert train(stopped).step == 3
    rows = [[without_timing(row) for row in records(cfg.run_dir)] for cfg in (whole, stopped)]
    assert rows[1] == rows[0]


def test_tasks_are_logged_and_change_no_training(tmp_path: Path) -> None:
    """With and without tasks, every loss is the same, bit for bit, also of the step after an evaluation."""
    data = prepare_texts(tmp_path / "data")
    records_of_task = [
        {"query": "def main", "choices": ["(argument)", "🙂"], "gold": 0},
        {"query": "Köln", "choices": ["café", "数学"], "gold": 1},
    ]
    card = write_task(tmp_path / "tasks", "toy", records_of_task)
    changes = {
        "trainer": {"max_steps": 2},
        "parallel": ParallelConfig(),
        "model": {"vocab_size": 320, "max_position_embeddings": 128},
    }
    plain = config(data, tmp_path / "plain", **changes)
    train(plain)
    asked = replace(plain, run_dir=str(tmp_path / "tasks-run"))
    tasks = [str(card), f"{card}:bpb"]
    train(replace(asked, evaluation=EvaluationConfig(every=1, tasks=tasks, tokens_per_pass=64)))
    assert_same_training(plain, asked)
    evaluated = records(asked.run_dir, "eval/tasks")
    assert [row["step"] for row in evaluated] == [0, 1, 2]
    for row in evaluated:
        toy, of_bytes = row["eval/tasks"]
        assert (toy["task"], toy["metric"], toy["chance"], toy["questions"]) == (
            "toy",
            "acc_per_char",
            0.5,
            2,
        )
        assert (of_bytes["task"], of_bytes["metric"], of_bytes["chance"]) == (
            "toy_bpb",
            "bits_per_byte",
            None,
        )
        assert toy["score"] == row["task/toy/acc_per_char"] in (0.0, 0.5, 1.0)
        # fp32: the two tasks share no pass.
        assert of_bytes["score"] == pytest.approx(row["task/toy/bits_per_byte"], rel=1e-6)
        assert "task/toy_bpb/acc" not in row


def test_wrong_sets_are_named_before_the_first_step(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    unlike = prepare_texts(tmp_path / "unlike")
    empty = write_prepared(tmp_path / "empty", [[2, 3]], vocab_size=64)
    sets = [
        EvaluationSet("validation", str(data)),
        EvaluationSet("a", str(data)),
        EvaluationSet("a", str(tmp_path / "nowhere")),
        EvaluationSet("b/c", str(unlike)),
        EvaluationSet("d", str(empty)),
    ]
    evaluation = EvaluationConfig(sets=sets)
    cfg = config(data, tmp_path / "run", evaluation=evaluation, parallel=ParallelConfig())
    with pytest.raises(UserError) as caught:
        validate(cfg, 1)
    for message in (
        "evaluation.sets[0].name=validation: is the name of a validation split",
        "evaluation.sets[2].name=a: is the name of evaluation.sets[1], too",
        f"evaluation.sets[2].dir={tmp_path / 'nowhere'}: there is no prepared data",
        "evaluation.sets[3].name=b/c: may have only letters",
        f"evaluation.sets[3].dir={unlike}: was prepared with another tokenizer than data.dir={data}",
        f"evaluation.sets[4].dir={empty}: its validation split is empty",
    ):
        assert message in str(caught.value)
    assert str(caught.value).count("evaluation.sets") == 7
