"""The registry has every metric that runs log, and no others."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from olmoe_train.config.choices import PreferenceKind
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import LoggingConfig
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.run.loggers import MetricsLog
from olmoe_train.run.metric import Group
from olmoe_train.run.metrics_registry import METRICS, find_metric, shown
from olmoe_train.run.metrics_tables import markdown_table, with_tables
from olmoe_train.run.sinks.wandb import WandbSink
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.faults import records
from tests.support.preferences import pair, write_preferences
from tests.support.prepared_texts import prepare_texts
from tests.support.prompts import grpo_values, write_prompts
from tests.support.runs import TINY, compose, real_tokens
from tests.support.task_records import task_values
from tests.support.tasks import write_task

STEP = {"trainer.max_steps": 1, "trainer.global_batch_size": 4, "trainer.micro_batch_size": 4}


def logged(directory: Path, values: dict[str, Any]) -> set[str]:
    """Names of the metrics of a run of one step, with validation before and after."""
    train(compose(values | STEP | {"run_dir": directory, "evaluation.at_start": True}))
    dist.destroy_process_group()
    return {name for record in records(directory) for name in record}


def runs(directory: Path) -> Iterator[dict[str, Any]]:
    """Values by key of runs that together log every metric."""
    documents = real_tokens()[:3]
    for name in ("one", "two"):
        write_prepared(directory / name, documents, documents[:1], vocab_size=258)
    mixture = "[{dir: one, weight: 1}, {dir: two, weight: 2}]"
    stages = f"[{{mixture: {mixture}}}]"
    filtered = {"data.stages": stages, "data.repetition_filter": True, "data.packing": "best_fit"}
    model = OlmoeForCausalLM(olmoe_config(compose(TINY | {"data.dir": directory}).model))
    model.save_pretrained(directory / "hf")
    analyzed = {"logging.router_analysis_every": 1, "logging.router_reference": directory / "hf"}
    yield TINY | {"data.dir": directory, "logging.details_every": 1} | filtered | analyzed
    sides = [[2, 3, 4], [5, 6]]
    write_preferences(directory / "pairs", pair([7, 8], *sides) * 4, pair([7, 8], *sides), vocab_size=258)
    of_pairs = TINY | {
        "objective": "preference",
        "data.dir": directory / "pairs",
        "data.packing": "none",
        "objective.sft_weight": 0.1,
        "logging.dead_expert_steps": 1,  # an alert
    }
    for kind in PreferenceKind:
        yield of_pairs | {"objective.kind": kind.value}
    texts = prepare_texts(directory / "texts")
    card = write_task(directory, "toy", [{"query": "def", "choices": ["main", "done"], "gold": 0}])
    yield TINY | {
        "balancing": "sequence",
        "data.dir": texts,
        "evaluation.sets": f"[{{name: web, dir: {texts}}}]",
        "evaluation.tasks": f"[{card}]",
        "trainer.ema_decay": 0.9,
    }
    (directory / "grpo").mkdir()
    write_prompts(directory / "grpo")
    yield grpo_values(directory / "grpo") | {
        "objective.kl_coef": 0.1,
        "evaluation.prompts": "[t5]",
        "evaluation.sample_tokens": 4,
    }


def test_every_metric_that_is_logged_is_registered_and_the_reverse(tmp_path: Path) -> None:
    found = {
        name
        for number, values in enumerate(runs(tmp_path))
        for name in logged(tmp_path / f"{number}", values)
    }
    assert {name for name in found if find_metric(name) is None} == set()
    assert {metric.name for metric in METRICS} == {
        metric.name for name in found if (metric := find_metric(name)) is not None
    }


def test_a_name_has_one_metric() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for name in names:
        example = name.replace("NAME", "web").replace("NN", "03")
        metric = find_metric(example)
        assert metric is not None
        assert metric.name == name
    assert find_metric("eval/web/rewards/margins") is find_metric("rewards/margins")
    assert [find_metric(name) for name in ("train/nothing", "eval/web/lr", "router/layer_3/load")] == [
        None
    ] * 3


def test_values_are_shown_as_the_registry_says() -> None:
    assert shown("train/loss", 0.5) == "loss 0.5000"
    assert shown("eval/web/rewards/accuracies", 0.25) == "accuracy 0.250"
    assert shown("task/gsm.v1/acc_per_char", 0.25) == "per char 0.250"
    assert shown("perf/mfu", None) is None
    assert shown("train/skipped_steps", 3) is None


def test_the_documentation_has_the_tables_of_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/metrics.md").read_text(encoding="utf-8")
    assert with_tables(page) == page, "python -m olmoe_train.run.metrics_tables docs/reference/metrics.md"
    assert all(markdown_table(group) in page for group in Group)
    assert with_tables(page.replace("cross-entropy |", "entropy |")) == page


def test_wandb_keeps_the_best_of_losses_and_validation_and_the_last_of_other_values(tmp_path: Path) -> None:
    init_distributed("cpu")
    log = MetricsLog(tmp_path, LoggingConfig(), {}, step=0)
    (sink,) = log._sinks
    assert isinstance(sink, WandbSink), "wandb logs offline without a key"
    run = sink.run
    for step, loss in ((1, 0.5), (2, 0.25), (3, 1.0), (4, 1.0)):  # wandb holds back the last row
        values = {"step": step, "train/loss": loss, "router/dead_experts": step}
        log.write(values | {"task/arc_easy/acc": 1 - loss, "task/arc_easy/ce": loss})
    until = time.monotonic() + 30
    while run.summary.get("step") != 3 and time.monotonic() < until:  # wandb's own process takes the rows
        time.sleep(0.1)
    expected = {
        "train/loss": {"min": 0.25},
        "router/dead_experts": {"last": 3},
        "task/arc_easy/acc": {"max": 0.75},
        "task/arc_easy/ce": {"min": 0.25},
    }
    assert {name: dict(run.summary[name]) for name in expected} == expected
    log.close()


def test_results_of_tasks_reach_every_sink_and_are_json(tmp_path: Path) -> None:
    init_distributed("cpu")
    cfg = LoggingConfig(tensorboard=True)
    log = MetricsLog(tmp_path, cfg, {}, step=0)
    values = task_values()
    values["eval/tasks"][1]["score"] = math.nan
    log.write({"step": 3} | values)
    assert len(log._sinks) == 2, "a sink failed"
    log.close()
    (record,) = records(tmp_path, "eval/tasks")
    assert record["eval/tasks"][1]["score"] is None
    (path,) = tmp_path.glob("wandb/offline-run-*/files/media/table/eval/tasks_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["step", "task", "metric", "score", "standard error", "chance", "questions"]
    assert table["data"] == [
        [3, "arc_easy", "acc", 0.61, 0.02, 0.25, 570],
        [3, "gsm.v1", "bits_per_byte", None, 0.125, None, 1319],
    ]
