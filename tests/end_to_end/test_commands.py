"""Stopping, resuming and failing: what `train` does when it is launched as people launch it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.end_to_end.conftest import Quickstart
from tests.support.commands import TINY, command_environment, olmoe, run, train_command
from tests.support.faults import metrics, status
from tests.support.sizes import SIZES


def test_stopped_and_resumed_in_another_layout_ends_with_the_same_losses(
    quickstart: Quickstart, tmp_path: Path
) -> None:
    options = [f"data.dir={quickstart.data_dir}", f"run_dir={tmp_path}", "logging.wandb.mode=disabled"]
    alone = ["trainer.stop_at_step=3", "parallel.expert_parallel_size=1"]
    first = run(*train_command(*options, *alone, ranks=1), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("stopped", 3)
    second = run(*train_command(*options), cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("done", 6)

    resumed, straight = losses(tmp_path), losses(quickstart.run_dir)
    assert resumed.keys() == straight.keys()
    assert all(abs(resumed[step] / straight[step] - 1) < 1e-5 for step in straight), (resumed, straight)


def test_deepspeeds_launcher_starts_what_torchrun_continues(quickstart: Quickstart, tmp_path: Path) -> None:
    options = [f"data.dir={quickstart.data_dir}", f"run_dir={tmp_path}", "logging.wandb.mode=disabled"]
    options += ["parallel.strategy=deepspeed", "parallel.zero_stage=3", "parallel.expert_parallel_size=2"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", "--module"]
    training = [
        "olmoe_train.train",
        "experiment=quickstart",
        *TINY,
        *options,
        "parallel.expert_parallel_size=2",
        "trainer.stop_at_step=3",
    ]
    first = run(*launcher, *training, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("stopped", 3)
    used = json.loads((tmp_path / "deepspeed.json").read_text())
    assert used["zero_optimization"]["stage"] == 3
    second = run(*train_command(*options), cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    resumed, straight = losses(tmp_path), losses(quickstart.run_dir)
    assert resumed.keys() == straight.keys()
    assert all(abs(resumed[step] / straight[step] - 1) < 1e-5 for step in straight), (resumed, straight)


def losses(run_dir: Path) -> dict[int, float]:
    return {step["step"]: step["train/loss"] for step in metrics(run_dir)}


def test_a_signal_saves_and_exits_with_75(quickstart: Quickstart, tmp_path: Path) -> None:
    options = [f"data.dir={quickstart.data_dir}", f"run_dir={tmp_path}", "logging.wandb.mode=disabled"]
    command = train_command(*options, "trainer.max_steps=100000", "evaluation.at_start=false")
    with subprocess.Popen(command, cwd=tmp_path, env=command_environment()) as process:
        log = tmp_path / "metrics.jsonl"
        while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 2):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    assert status(tmp_path)["state"] == "stopped"
    assert (tmp_path / "checkpoints" / f"step-{status(tmp_path)['step']:08d}").is_dir()


def test_bad_configuration_is_reported_once_and_whole(quickstart: Quickstart, tmp_path: Path) -> None:
    wrong = ["trainer.global_batch_size=7", "data.dir=nowhere", "model.num_experts_per_tok=9"]
    result = run(*train_command(*wrong, f"run_dir={tmp_path}/run"), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    for part in ("trainer.global_batch_size=7:", "data.dir=nowhere:", "num_experts_per_tok=9 is more"):
        assert result.stderr.count(part) == 1, result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("error: ") :].splitlines()
    assert all(line.startswith(("error: ", "  ")) for line in message)  # no word of torchrun after it
    assert not (tmp_path / "run").exists()


def test_the_last_line_names_a_killed_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "olmoe_train.cli.torchrun", "--standalone", "--no-python"]
    result = run(*command, "bash", "-c", "kill -KILL $BASHPID", cwd=tmp_path)
    assert result.returncode == 128 + signal.SIGKILL
    last = result.stderr.splitlines()[-1]
    assert re.match(r"error: rank 0 \(host .+, process \d+\) was killed by SIGKILL; see ", last)


def test_a_missing_source_is_the_users_to_mend(tmp_path: Path) -> None:
    verbs = {
        "export": [],
        "generate": ["prompt=x"],
        "evaluate": ["data.dir=nowhere"],
        "upcycle": ["out=there", "num_experts=8", "num_experts_per_tok=2"],
    }
    for verb, extra in verbs.items():
        result = olmoe(verb, "source=nowhere", *extra, cwd=tmp_path)
        assert result.returncode == 2, (verb, result.stderr)
        assert "nowhere" in result.stderr
        assert "Traceback" not in result.stderr


def test_resolved_config_is_yaml(tmp_path: Path) -> None:
    OlmoeForCausalLM(OlmoeConfig(**SIZES | {"max_position_embeddings": 96})).save_pretrained(tmp_path / "HF")
    overrides = ("experiment=olmoe_sft", "model.init_from=HF", "data.dir=none")
    result = olmoe("train", *overrides, "--cfg", "job", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert OmegaConf.create(result.stdout).model.hidden_size == SIZES["hidden_size"]
    assert "sequence_length: 96\n" in result.stdout  # in the preset: that of the model
