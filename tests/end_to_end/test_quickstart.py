"""The first command of the README, with a tiny model, and what it leaves behind."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmoe_train.config.data import DataConfig
from olmoe_train.data.loader import build_eval_batches
from tests.end_to_end.conftest import Quickstart
from tests.support.commands import REPO, TINY, olmoe, run
from tests.support.faults import metrics, records
from tests.support.report_runs import write_records
from tests.support.task_records import result, task_values
from tests.support.wandb_views import names_in_wandb, uncovered

STEP_KEYS = {
    "step",
    "tokens",
    "train/loss",
    "train/ce_loss",
    "train/load_balancing_loss",
    "train/router_z_loss",
    "train/grad_norm",
    "train/lr",
    "perf/tokens_per_second",
    "perf/mfu",
    "perf/peak_memory_gib",
    "router/max_violation",
    "router/entropy",
    "router/dead_experts",
    "router/layer_01/max_violation",
}
EVALUATION_KEYS = {"step", "tokens", "eval/validation/loss", "eval/validation/perplexity"}


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return records(run_dir, "eval/validation/loss")


FROM_PYTHON = """
import sys
from olmoe_train.config import compose
from olmoe_train.train import train

state = train(compose("experiment=quickstart", *sys.argv[1:]))
print("state", state.step, state.last_step, state.stopped_by_signal)
"""


def test_from_python_in_one_process(quickstart: Quickstart, tmp_path: Path) -> None:
    options = [*TINY, f"data.dir={quickstart.data_dir}", f"run_dir={tmp_path / 'run'}"]
    result = run(sys.executable, "-c", FROM_PYTHON, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "state 6 6 False"
    mine, theirs = metrics(tmp_path / "run"), metrics(quickstart.run_dir)
    for record, expected in zip(mine, theirs, strict=True):  # two ranks with expert parallelism
        assert record["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


def test_metrics(quickstart: Quickstart) -> None:
    logged = metrics(quickstart.run_dir)
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in logged] == [
        512 * step for step in range(1, 7)
    ]  # 8 sequences of 64
    for record in logged:
        assert record.keys() >= STEP_KEYS
        # The declared total, with the default coefficients.
        total = record["train/ce_loss"]
        total += 0.01 * record["train/load_balancing_loss"] + 0.001 * record["train/router_z_loss"]
        assert record["train/loss"] == pytest.approx(total, rel=1e-5)
        assert record["perf/mfu"] is None  # a CPU has no peak on its data sheet
        assert 0 < record["router/entropy"] <= math.log(8)

    before, after = evaluations(quickstart.run_dir)
    assert (before["step"], after["step"]) == (0, 6)
    for record in (before, after):
        assert record.keys() >= EVALUATION_KEYS
        assert record["eval/validation/perplexity"] == pytest.approx(math.exp(record["eval/validation/loss"]))
    # Untrained, the model says nothing: a little over ln(4096) = 8.32, which is uniform over the vocabulary.
    assert 8.2 < before["eval/validation/loss"] < 8.6
    assert after["eval/validation/loss"] < before["eval/validation/loss"]


def test_run_directory(quickstart: Quickstart) -> None:
    run_dir = quickstart.run_dir
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 6)
    config = (run_dir / "config.yaml").read_text()
    assert "hidden_size: 32" in config
    assert "${" not in config
    assert (run_dir / "checkpoints" / "step-00000006").is_dir()
    assert "step 6/6" in (run_dir / "log.txt").read_text()
    pickles = [p for p in run_dir.rglob("*") if p.suffix in (".pt", ".pkl", ".bin") or p.name == ".metadata"]
    assert not pickles


def test_summary_tells_what_the_files_say(quickstart: Quickstart) -> None:
    summary = quickstart.output.split("== summary")[1]
    first, last = evaluations(quickstart.run_dir)
    manifest = json.loads((quickstart.data_dir / "manifest.json").read_text())
    assert f"{first['eval/validation/loss']:.4f} -> {last['eval/validation/loss']:.4f}" in summary
    assert f"{last['eval/validation/perplexity']:,.2f}" in summary
    assert f"{manifest['unigram_entropy']:.4f} nats" in summary
    assert re.search(r"[1-9][\d,]* tokens/s", summary)
    assert re.search(r"the busiest expert has \d\.\d\d x its fair share", summary)
    assert len(re.findall(r"layer \d +[▁-█]{8}\n", summary)) == 2
    written = [quickstart.run_dir / name for name in ("metrics.jsonl", "report.html")]
    for path in (quickstart.run_dir, quickstart.hf_dir, *written):
        assert path.exists()
        assert str(path) in summary


def test_summary_has_the_tasks_of_the_last_evaluation(quickstart: Quickstart, tmp_path: Path) -> None:
    assert "\ntask python_basics   acc_per_char 0." in quickstart.output.split("== summary")[1]
    own = records(quickstart.run_dir)
    last = own[-1] | task_values()
    last["eval/tasks"].append(result("python_basics", "acc_per_char", 0.55, 0.0642, 0.25, 60))
    write_records(tmp_path, [*own, last])
    summary = REPO / "launch" / "summary.py"
    done = run(sys.executable, summary, tmp_path, quickstart.data_dir, quickstart.hf_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("task ")] == [
        "task arc_easy        acc 0.61 ± 0.02 (guessing: 0.25), 570 questions",
        "task gsm.v1          bits_per_byte 0.75 ± 0.12, 1,319 questions",
        "task python_basics   acc_per_char 0.55 ± 0.06 (guessing: 0.25), 60 questions",
    ]


def test_second_run_skips_what_is_done(quickstart: Quickstart) -> None:
    def fingerprint() -> dict[Path, int]:
        kept = [quickstart.data_dir, quickstart.run_dir / "checkpoints", quickstart.hf_dir]
        return {p: p.stat().st_mtime_ns for directory in kept for p in directory.rglob("*") if p.is_file()}

    before, lines = fingerprint(), records(quickstart.run_dir)
    again = run(REPO / "launch" / "quickstart.sh", *quickstart.overrides, cwd=quickstart.run_dir)
    assert again.returncode == 0, again.stdout + again.stderr
    assert fingerprint() == before
    assert records(quickstart.run_dir) == lines
    assert again.stdout.split("== summary")[1] == quickstart.output.split("== summary")[1]


def test_transformers_opens_the_export_and_finds_our_loss(quickstart: Quickstart) -> None:
    model = AutoModelForCausalLM.from_pretrained(quickstart.hf_dir, dtype=torch.float32)
    assert type(model).__name__ == "OlmoeForCausalLM"
    data = DataConfig(dir=str(quickstart.data_dir), sequence_length=64)
    loss = torch.zeros((), dtype=torch.float64)
    targets = 0
    for batch in build_eval_batches(data, rank=0, world_size=1, micro_batch_size=8, max_sequences=64):
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss += F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        targets += int((batch["targets"] != -100).sum())
    ours = evaluations(quickstart.run_dir)[-1]["eval/validation/loss"]
    assert loss.item() / targets == pytest.approx(ours, abs=1e-5)


def test_evaluate_verb_finds_the_same_loss(quickstart: Quickstart, tmp_path: Path) -> None:
    options = [f"data.dir={quickstart.data_dir}", "data.sequence_length=64", "evaluation.max_sequences=64"]
    result = olmoe("evaluate", f"source={quickstart.hf_dir}", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = float(re.search(r"^loss +([\d.]+)", result.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert printed == pytest.approx(evaluations(quickstart.run_dir)[-1]["eval/validation/loss"], abs=1e-4)


def test_generate_verb_writes_what_transformers_writes(quickstart: Quickstart, tmp_path: Path) -> None:
    prompt = "def main("
    tokenizer = AutoTokenizer.from_pretrained(quickstart.hf_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(quickstart.hf_dir, dtype=torch.float32)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    expected = str(tokenizer.decode(tokens[0], skip_special_tokens=True))
    for source in (quickstart.hf_dir, quickstart.run_dir):
        result = olmoe("generate", f"source={source}", f"prompt={prompt}", "max_new_tokens=8", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected + "\n"


def test_the_dashboard_has_panels_for_what_is_logged_and_no_others(
    quickstart: Quickstart, tmp_path: Path
) -> None:
    result = olmoe("dashboard", f"source={quickstart.run_dir}", "--dry-run", "out=made.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    spec = json.loads((tmp_path / "made.json").read_text())["workspace"]["spec"]
    assert uncovered(spec, names_in_wandb(quickstart.run_dir)) == (set(), set())


def test_export_has_the_hubs_names(quickstart: Quickstart) -> None:
    with safe_open(quickstart.hf_dir / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in names
    assert "model.layers.0.self_attn.q_norm.weight" in names
    assert len(names) == 3 + 2 * (
        2 + 4 + 2 + 1 + 8 * 3
    )  # norms 2, projections 4, q and k norms 2, router, experts
