"""`olmoe dashboard` against a wandb server of this machine: what it saves for a run and for a comparison."""

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from olmoe_train.cli import dashboard
from olmoe_train.evaluation.tasks.task import TaskMetric
from olmoe_train.run.loggers import read_records
from olmoe_train.run.metric import SECTIONS, Group
from olmoe_train.run.metrics_registry import METRICS, section_of
from olmoe_train.run.sinks.wandb import begin_piece
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.prompts import add_word_tokenizer
from tests.support.runs import TINY, compose, real_tokens
from tests.support.tasks import write_task
from tests.support.wandb_views import ENTITY, PROJECT, Views, names_in_wandb, spec_of, uncovered, views_server

Verb = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two sources that logged every kind of value to wandb, offline."""
    home = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        write_prepared(home / "data" / name, real_tokens()[:3], real_tokens()[:1], vocab_size=258)
        add_word_tokenizer(home / "data" / name, 258)
    question = {"query": "t5 t6", "choices": ["t7", "t8 t9"], "gold": 0}
    card = write_task(home, "words.v1", [question, question | {"gold": 1}], prompt="{query}")
    values = TINY | {
        "data.dir": home / "data",
        "data.mixture": "[{dir: one, weight: 1}, {dir: two, weight: 2}]",
        "data.packing": "best_fit",
        "trainer.max_steps": 1,
        "trainer.global_batch_size": 4,
        "trainer.micro_batch_size": 4,
        "evaluation.at_start": True,
        "evaluation.prompts": ["t5 t6"],
        "evaluation.sample_tokens": 2,
        "evaluation.tasks": f"[{card}, {card}:bpb]",
        "logging.details_every": 1,
        "logging.wandb.mode": "offline",
        "run_dir": home / "mixture",
    }
    train(compose(values))
    dist.destroy_process_group()
    return home / "mixture"


@pytest.fixture
def runs(mixture: Path, tmp_path: Path) -> Path:
    """Directory of the runs mixture, dense and upcycled; dense has no router."""
    for name in ("mixture", "dense", "upcycled"):
        shutil.copytree(mixture, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("dense", "upcycled"):
        (tmp_path / name / "wandb.json").unlink()
        begin_piece(tmp_path / name / "wandb.json", 0, None)
    path = tmp_path / "dense" / "metrics.jsonl"
    records = [{k: v for k, v in r.items() if "router" not in k} for r in read_records(path)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> Iterator[Views]:
    with views_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_ENTITY", raising=False)
        import wandb

        wandb.teardown()  # a session that another test began has another server
        yield server
        wandb.teardown()


@pytest.fixture
def verb(runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Verb:
    """Call the verb in the directory of the runs: (exit code, output)."""
    monkeypatch.chdir(runs)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["olmoe", *arguments])
        code = dashboard.run()
        output = capfd.readouterr()
        return code, output.out + output.err

    return call


def sections(spec: dict[str, Any]) -> list[str]:
    return [section["name"] for section in spec["section"]["panelBankConfig"]["sections"]]


def test_every_panel_shows_a_logged_value_and_every_logged_value_is_on_a_panel(
    verb: Verb, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (runs / "mixture" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "tokens": 256, "my/number": 1}) + "\n")  # of one's own callback
    monkeypatch.setattr(socket.socket, "connect", None)  # no network, not even this machine's
    assert verb("source=mixture", "x_axis=tokens", "--dry-run")[0] == 0
    content = json.loads((runs / "mixture" / "dashboard.json").read_text())["workspace"]
    assert (content["project"], content["name"]) == (PROJECT, "olmoe: mixture")
    assert uncovered(content["spec"], names_in_wandb(runs / "mixture") | {"my/number"}) == (set(), set())
    shown = [name for name in SECTIONS if name != "Fine-tuning"]
    assert sections(content["spec"]) == [*shown, "Other"]
    assert content["spec"]["section"]["settings"]["xAxis"] == "tokens"
    panels = content["spec"]["section"]["panelBankConfig"]["sections"][-2]["panels"]
    patterns = {panel["config"].get("metricRegex") for panel in panels}
    assert "^eval/[^/]+/loss$" in patterns  # also on one of Loss
    assert {f"^task/[^/]+/{metric.value}$" for metric in TaskMetric} <= patterns


def test_saving_twice_updates(verb: Verb, runs: Path, views: Views) -> None:
    sources = "source=[mixture,dense,upcycled]"
    code, first = verb(sources, "report=true")
    assert code == 0, first
    assert views.inserted == ["project-view", "runs"]
    (workspace,) = views.named("project-view")
    spec = spec_of(workspace)
    # A panel that someone changed in the browser, and a section that someone added there.
    of_browser = {**spec["section"]["panelBankConfig"]["sections"][1], "name": "Mine"}
    spec["section"]["panelBankConfig"]["sections"].append(of_browser)
    changed = {f"__custom_panel__:{of_browser['panels'][0]['__id__']}": {"chartTitle": "mine"}}
    spec["section"]["panelBankConfig"]["panelConfigOverrides"] = changed
    workspace["spec"] = json.dumps(spec)

    code, second = verb("source=[upcycled,mixture,dense]", "report=true", "name=renamed")
    assert code == 0, second
    assert views.inserted == ["project-view", "runs"]
    assert second.splitlines()[1] == first.splitlines()[1]  # the address of the workspace
    assert {view["displayName"] for view in views.by_id.values()} == {"renamed"}
    spec = spec_of(views.named("project-view")[0])
    assert sections(spec)[-1] == "Mine"
    assert spec["section"]["panelBankConfig"]["panelConfigOverrides"] == changed
    loss = spec["section"]["panelBankConfig"]["sections"][1]
    assert loss["panels"][0]["__id__"] == of_browser["panels"][0]["__id__"]  # by which W&B finds the change

    views.by_id.clear()  # someone deleted both
    assert "no longer there" in verb(sources, "report=true")[1]
    assert views.inserted == ["project-view", "runs"] * 2
    assert verb("source=mixture")[0] == 0  # of one run, and so another workspace
    assert views.inserted[4:] == ["project-view"]


def test_a_comparison_shows_its_runs_only(verb: Verb, runs: Path, views: Views) -> None:
    names = ("mixture", "dense", "upcycled")
    code, output = verb(f"source=[{','.join(names)}]", "report=true", "out=comparison.json")
    assert code == 0, output
    ids = [json.loads((runs / name / "wandb.json").read_text())["id"] for name in names]
    (workspace,), (report,) = views.named("project-view"), views.named("runs")
    assert workspace["project"]["entityName"] == ENTITY  # the account's, which was asked for
    spec = spec_of(workspace)
    assert spec == json.loads((runs / "comparison.json").read_text())["workspace"]["spec"]
    (runset,) = spec["section"]["runSets"]
    (only,) = runset["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("name", "IN", ids)
    assert list(spec["section"]["customRunColors"]) == ids
    comparison, loss, router = spec["section"]["panelBankConfig"]["sections"][:3]
    assert [panel["viewType"] for panel in comparison["panels"]] == ["Run Comparer"]
    assert (loss["name"], router["name"]) == ("Loss", "Router")  # which dense does not have
    blocks = spec_of(report)["blocks"]
    table = next(block["content"] for block in blocks if block["type"] == "markdown-block")
    assert [row.split(" | ")[:2] for row in table.splitlines()[2:]] == [
        [f"| {name}", run_id] for name, run_id in zip(names, ids, strict=True)
    ]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert headings == ["Runs", *sections(spec)]
    assert all(grid["runSets"][0]["filters"]["filters"][0]["value"] == ids for grid in grids)
    loss_panels = grids[1]["panelBankSectionConfig"]["panels"]
    assert {panel["layout"]["x"] for panel in loss_panels} == {0, 12}  # two columns of a grid of 24


def test_errors_name_the_way_out(verb: Verb, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(runs / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(runs))
    wandb.teardown()
    (runs / "dense" / "wandb.json").unlink()
    (runs / "empty").mkdir()
    wrong = {
        ("source=mixture",): ["WANDB_API_KEY", "--dry-run"],
        ("source=dense", "--dry-run"): ["dense has no wandb.json", "logging.wandb.mode=offline"],
        ("source=empty", "--dry-run"): ["source=empty is not a run directory"],
        ("source=[mixture,./mixture]", "--dry-run"): ["are one wandb run"],
        ("source=mixture", "name=a+b", "--dry-run"): ["name='a+b'", "W&B does not take +"],
        ("source=mixture", "out=none/x.json", "--dry-run"): ["out=none/x.json cannot be written"],
    }
    for arguments, parts in wrong.items():
        code, output = verb(*arguments)
        assert code == 2, output
        assert [part for part in parts if part not in output] == [], output
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        wandb.teardown()
        monkeypatch.setattr("olmoe_train.reporting.saved_views.TIMEOUT_S", 1)
        code, output = verb("source=mixture")
    assert code == 2, output
    assert "WANDB_API_KEY" in output
    assert "--dry-run" in output
    wandb.teardown()
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    code, output = verb("source=mixture", "--dry-run")
    assert code == 2
    assert 'pip install "olmoe-train[dashboard]"' in output


def test_every_group_of_the_registry_has_a_section() -> None:
    assert {group.section for group in Group} == set(SECTIONS)
    assert {section_of(metric.name.replace("NN", "00")) for metric in METRICS} == set(SECTIONS)
    assert section_of("eval/web/rewards/margins") == "Evaluation"
    assert section_of("my/number") is None
