"""The report's data: extremes survive, sizes hold, the verdict is right, and a file that grows is read."""

import base64
import hashlib
import http.client
import json
import math
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olmoe_train.cli.report import main
from olmoe_train.cli.sources import collect_sources
from olmoe_train.config.verbs import ReportConfig
from olmoe_train.evaluation.tasks.task import TaskMetric
from olmoe_train.reporting.downsample import expert_loads, keep_extremes
from olmoe_train.reporting.health import assess
from olmoe_train.reporting.html_report import ASSETS, payload, render
from olmoe_train.reporting.run_data import RunData, RunReader, Series
from olmoe_train.reporting.serve import make_server
from olmoe_train.run.metrics_registry import METRICS
from olmoe_train.utils.errors import UserError
from tests.support.report_runs import EVIL, rich_records, write_records, write_rich_run
from tests.support.task_records import result, task_values

STEPS, LAYERS, EXPERTS = 10_000, 16, 64


def read(source: Path) -> RunReader:
    reader = RunReader(source)
    reader.update()
    return reader


def page_data(page: str) -> dict[str, Any]:
    return dict(json.loads(page.split('id="data">')[1].split("</script>")[0]))


def test_a_curve_keeps_the_extremes_of_every_bucket() -> None:
    values = np.random.default_rng(0).normal(size=STEPS)
    values[1234], values[7001], values[5000] = 40.0, -40.0, math.nan
    steps, kept = keep_extremes(Series(list(range(1, STEPS + 1)), values.tolist()), 1000)
    assert len(steps) <= 1003
    assert (steps[0], steps[-1]) == (1, STEPS)
    found = dict(zip(steps, kept, strict=True))
    assert found[5001] is None
    for start in range(0, STEPS, 20):  # 500 buckets
        bucket = values[start : start + 20]
        inside = [value for step, value in found.items() if start < step <= start + 20 and value is not None]
        assert min(inside) == pytest.approx(np.nanmin(bucket), rel=1e-5)
        assert max(inside) == pytest.approx(np.nanmax(bucket), rel=1e-5)


def big_run() -> RunData:
    """10,000 records of all that 16 layers of 64 experts log, with one burst and one silence of an expert."""
    random = np.random.default_rng(0)
    loads = random.dirichlet(np.full(EXPERTS, 20.0), (STEPS, LAYERS)).astype(np.float32)
    loads[3333, 5, 17], loads[6666, 9, 3] = 0.125, 0.0
    steps = list(range(1, STEPS + 1))
    data = RunData(loads=Series(steps, list(loads)), layers=list(range(LAYERS)))
    names = [m.name for m in METRICS if "NN" not in m.name] + ["router/layer_NN/max_violation"]
    names += ["router/layer_NN/entropy", "router/layer_NN/dead_experts", "router/layer_NN/z"]
    families = [
        name.replace("NN", f"{layer:02d}") for name in names for layer in range(LAYERS if "NN" in name else 1)
    ]
    for name in families:
        if not name.startswith(("step", "tokens", "time", "resumes")):
            data.scalars[name] = Series(steps, random.normal(size=STEPS).tolist())
    data.clock = Series(steps, [(4096.0 * step, 1.7e9 + step) for step in steps])
    return data


def test_a_long_run_of_many_experts_stays_under_two_megabytes(tmp_path: Path) -> None:
    reader = read(write_records(tmp_path, [{"step": 1}]))
    reader.data = big_run()
    start = time.process_time()
    page = render([reader])
    assert time.process_time() - start < 20
    assert 5e5 < len(page.encode()) < 2e6
    loads = page_data(page)["runs"][0]["loads"]
    assert 3334 in loads["steps"], "the step of the burst is no frame"
    bucket = next(
        i for i, (a, b) in enumerate(zip(loads["from"], loads["to"], strict=True)) if a <= 3334 <= b
    )
    assert decoded(loads, "most")[5, 17, bucket] == pytest.approx(0.125 * EXPERTS, rel=0.02)
    assert decoded(loads, "frames")[loads["steps"].index(3334), 5, 17] == pytest.approx(8.0, rel=0.02)
    bucket = next(
        i for i, (a, b) in enumerate(zip(loads["from"], loads["to"], strict=True)) if a <= 6667 <= b
    )
    assert decoded(loads, "least")[9, 3, bucket] == 0


def decoded(loads: dict[str, Any], name: str) -> np.ndarray:
    """Loads in multiples of the fair share, as the page computes them."""
    levels = np.frombuffer(base64.b64decode(loads[name]), np.uint8).astype(float)
    values = np.where(levels == 0, 0, loads["low"] * (loads["high"] / loads["low"]) ** ((levels - 1) / 254))
    layers, experts = len(loads["layers"]), loads["experts"]
    return values.reshape((-1, layers, experts) if name == "frames" else (layers, experts, -1))


def test_a_short_run_is_kept_whole() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(4), (30, 2)).astype(np.float32)
    loads = expert_loads(Series(list(range(30)), list(shares)), [0, 1], 200, 10**6)
    assert loads["steps"] == list(range(30))
    assert "most" not in loads
    assert decoded(loads, "frames") == pytest.approx(4 * shares, rel=0.03, abs=0.002)


def records_with(changes: dict[str, Any], count: int = 100) -> RunData:
    """A healthy run of 16 experts, of which 4 take a token, with changes: values, or functions of 0 to 1."""
    data = RunData()
    for step in range(1, count + 1):
        record: dict[str, Any] = {"step": step, "tokens": step, "time": time.time() - count + step}
        record |= {
            "train/ce_loss": 5.0,
            "train/grad_norm": 1.0,
            "router/max_violation": 0.5,
            "router/entropy": 2.4,
        }
        record |= {
            "router/dead_experts": 0,
            "router/layer_00/entropy": 2.4,
            "router/layer_00/load": [1 / 16] * 16,
        }
        for name, value in changes.items():
            record[name] = value(step / count) if callable(value) else value
        data.add(record)
    return data


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({}, "", "good"),
        ({"router/dead_experts": 1}, "Dead experts", "bad"),  # 1 of 16
        ({"router/max_violation": 1.4}, "Busiest expert", "watch"),  # 2.4 of at most 4
        ({"router/max_violation": 2.9}, "Busiest expert", "bad"),
        ({"router/layer_00/entropy": 1.0}, "Entropy", "watch"),  # e**1 = 2.7 of 4 experts
        ({"router/layer_00/entropy": 0.2}, "Entropy", "bad"),
        ({"router/max_violation": lambda done: done}, "Trend", "watch"),
        ({"train/skipped_steps": 1}, "Skipped steps", "watch"),
        ({"train/skipped_steps": 7}, "Skipped steps", "bad"),
        ({"train/grad_norm": lambda done: None if done == 0.5 else 1.0}, "NaN or infinity", "watch"),
        ({"train/ce_loss": lambda done: None if done > 0.9 else 5.0}, "NaN or infinity", "bad"),
        ({"train/ce_loss": lambda done: 5 + 4 * done}, "Training loss", "bad"),
        ({"perf/mfu": None}, "", "good"),  # on a CPU
    ],
)
def test_verdict(changes: dict[str, Any], name: str, level: str) -> None:
    verdict = assess(records_with(changes), {"model.num_experts_per_tok": 4}, {"state": "running"})
    assert verdict["level"] == level
    assert [check["name"] for check in verdict["checks"] if check["level"] != "good"] == (
        [name] if name else []
    )
    router = name in ("Dead experts", "Busiest expert", "Entropy", "Trend")
    assert ("The router is healthy" in verdict["headline"]) == (not router)
    assert verdict["state"]["level"] == "good"


def test_a_crashed_run_is_named() -> None:
    data = records_with({"time": 1.7e9, "train/lr": 1.0})
    assert "probably crashed" in assess(data, {}, {"state": "running"})["state"]["text"]
    assert (
        assess(data, {}, {"state": "failed", "reason": "rank 1: OOM"})["state"]["text"]
        == "failed: rank 1: OOM"
    )
    early = assess(records_with({"router/max_violation": 2.9}, 30), {"model.num_experts_per_tok": 4}, {})
    assert (early["level"], early["headline"][:29]) == ("watch", "Too early to judge the router")
    dense = assess(records_with({"router/layer_00/load": [1.0]}), {}, {})
    assert dense["headline"] == "The model is dense, without a router; the training is healthy"


def test_a_file_that_grows_is_cut_off_damaged_and_replaced(tmp_path: Path) -> None:
    records = rich_records()
    write_records(tmp_path, records[:30])
    reader = read(tmp_path)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('\x00\x00broken\n{"no": "step"}\n[1]\n')
        file.write("".join(json.dumps(record) + "\n" for record in records[30:]) + '{"step": 61, "train/lo')
    assert reader.update()
    assert not reader.update()
    assert reader.data.bad_lines == [31, 32, 33]
    whole = read(write_records(tmp_path / "whole", records))
    assert reader.data.scalars == whole.data.scalars
    assert [start.first_step for start in reader.data.starts] == [1, 31]
    longer = [{"step": step, "text": "x" * 4000} for step in range(1, 101)]
    write_records(tmp_path / "new", longer)
    assert (tmp_path / "new" / "metrics.jsonl").stat().st_size > path.stat().st_size
    (tmp_path / "new" / "metrics.jsonl").replace(path)  # as a resume does
    assert reader.update()
    assert reader.data.clock.steps == list(range(1, 101))


def test_everything_that_a_run_logged_is_on_the_page(tmp_path: Path) -> None:
    run = write_rich_run(tmp_path / "run")
    data = payload([read(run)])
    logged = {name for record in rich_records() for name in record}
    drawn = {line["metric"] for chart in data["charts"] for line in chart["lines"]}
    drawn |= {name.replace("NN", f"{i:02d}") for name in drawn for i in range(3)}
    besides = {"step", "tokens", "time", "resumes", "alerts", "eval/samples", "eval/tasks"}
    constant = {f"router/layer_{i:02d}/dead_experts" for i in range(3)}
    assert logged - drawn - besides - constant == {f"router/layer_{i:02d}/load" for i in range(3)}
    by_id = {chart["id"]: chart for chart in data["charts"]}
    assert by_id["my/own_metric"]["section"] == "Other"
    assert [line["metric"] for line in by_id["rewards/margins"]["lines"]] == [
        "eval/validation/rewards/margins",
        "rewards/margins",
    ]
    run_values = data["runs"][0]
    assert run_values["unigram"] == 6.5
    assert run_values["skipped"] == [{"step": 31, "count": 1}]
    assert [(part["name"], part["kind"]) for part in run_values["analysis"]] == [
        ("saturation", "table"),
        ("saturation: by_layer", "matrix"),
        ("domains: by_layer", "matrix"),
        ("coactivation: all: matrix", "matrix"),
        ("words", "table"),
    ]
    assert run_values["analysis"][1]["row_labels"] == ["k 1", "k 8"]
    assert run_values["analysis"][2]["options"] == ["code", "web"]


def test_tasks_are_compared_with_guessing_and_drawn_from_the_second_evaluation_on(tmp_path: Path) -> None:
    values = task_values(0.28)  # two standard errors above 0.25 are 0.29
    values["eval/tasks"] += [
        result("boolq", "acc_per_char", 0.5625, 0.03, 0.5, 270),  # the limit is 0.56
        result("piqa", "acc", 0.4, 0.02, 0.5, 600),
        {"task": "no metric"},
    ]
    values["eval/tasks"][1]["score"] = None
    first = {"step": 1, "eval/tasks": [result("arc_easy", "acc", 0.9, 0.1, 0.25, 570)]}
    once = payload([read(write_records(tmp_path / "once", [first, {"step": 2} | values, {"step": 3}]))])
    tasks = once["runs"][0]["tasks"]
    assert tasks["step"] == 2
    assert [(one["task"], one["score"], one["at_chance"]) for one in tasks["results"]] == [
        ("arc_easy", 0.28, True),
        ("gsm.v1", None, False),
        ("boolq", 0.5625, False),
        ("piqa", 0.4, True),
    ]
    assert tasks["results"][1]["questions"] == 1319
    assert [chart["id"] for chart in once["charts"]] == []
    records = [{"step": step, "eval/code/bits_per_byte": 2.0} | task_values() for step in (2, 4)]
    charts = payload([read(write_records(tmp_path / "twice", records))])["charts"]
    by_id = {chart["id"]: chart for chart in charts}
    assert {chart["section"] for chart in charts} == {"Evaluation"}
    assert by_id.keys() == {
        "eval/NAME/bits_per_byte",
        *(f"task/NAME/{metric.value}" for metric in TaskMetric),
    }
    assert [line["label"] for line in by_id["task/NAME/ce"]["lines"]] == ["arc_easy", "gsm.v1"]
    none = payload([read(write_records(tmp_path / "none", [{"step": 1, "eval/tasks": []}]))])
    assert none["runs"][0]["tasks"] is None


def test_metrics_alone_are_enough_and_texts_are_no_markup(tmp_path: Path) -> None:
    whole = write_rich_run(tmp_path / "whole")
    alone = write_records(tmp_path / "alone", rich_records())
    main(
        ReportConfig(source=[str(alone / "metrics.jsonl"), str(whole)], out=str(tmp_path / "out" / "r.html"))
    )
    page = (tmp_path / "out" / "r.html").read_text()
    assert re.search("https?://", page) is None
    assert page.count("</script>") == 2
    assert "<!-- " not in page
    data = page_data(page)
    assert [run["name"] for run in data["runs"]] == ["alone", "whole"]
    assert data["runs"][0]["config"] == {}
    assert data["runs"][0]["unigram"] is None
    assert data["runs"][1]["samples"][0]["texts"][0]["completion"] == f"args): {EVIL}"


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source=.*nothing: no such directory"):
        main(ReportConfig(source=[str(tmp_path / "nothing")]))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no records yet"):
        main(ReportConfig(source=[str(tmp_path)]))
    write_records(tmp_path, rich_records()[:2])
    with pytest.raises(UserError, match="is a directory: name a file"):
        main(ReportConfig(source=[str(tmp_path)], out=str(tmp_path)))
    assert collect_sources(["source=a b", "out=x", "source=it's"]) == ["out=x", r"source=['a b','it\'s']"]
    assert collect_sources(["source=[a,b]"]) == ["source=[a,b]"]


def test_the_live_form_answers_this_machine_alone_and_only_get(tmp_path: Path) -> None:
    records = rich_records()
    reader = read(write_records(tmp_path, records[:30]))
    server = make_server([reader], 0)
    port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    try:
        assert ask("/")[0] == 200
        assert ask("/", Host=f"evil.example:{port}")[0] == 403
        assert ask("/data.json", Host="127.0.0.1")[0] == 403
        assert ask("/", "POST")[0] == 501
        assert ask("/../metrics.jsonl")[0] == 404
        code, headers, body = ask("/data.json")
        assert (code, json.loads(body)["runs"][0]["records"]) == (200, 30)
        assert ask("/data.json", **{"If-None-Match": headers["ETag"]})[0] == 304
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records[30:]))
        code, _, body = ask("/data.json", **{"If-None-Match": headers["ETag"]})
        assert (code, json.loads(body)["runs"][0]["records"]) == (200, 60)
        with pytest.raises(UserError, match=rf"port={port} is in use"):
            make_server([reader], port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_uplot_is_the_release_that_its_page_names() -> None:
    listed = re.findall(r"\| `([\w.]+)` \| `(\w{64})` \|", (ASSETS / "uplot" / "README.md").read_text())
    assert {name for name, _ in listed} == {"uPlot.iife.min.js", "uPlot.min.css", "LICENSE"}
    for name, digest in listed:
        assert hashlib.sha256((ASSETS / "uplot" / name).read_bytes()).hexdigest() == digest
