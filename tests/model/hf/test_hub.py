"""model.init_from by a name on the Hugging Face hub, from a cache that is built by hand: no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.hf.hub import is_hub_name
from tests.support.data import write_prepared
from tests.support.sizes import SIZES

NAME = "allenai/OLMoE-tiny"
COMMIT, NEWER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
TRAIN = [
    *("data.dir=data", "data.sequence_length=16", "trainer.max_steps=2", "trainer.precision=fp32"),
    *("trainer.global_batch_size=2", "trainer.micro_batch_size=1", "logging.wandb.mode=disabled"),
]


def olmoe(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads the environment when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def cache(home: Path, commit: str, seed: int, ref: str = "main") -> OlmoeForCausalLM:
    """Put a model into the cache in the layout of huggingface_hub: links from snapshots to blobs."""
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES, initializer_range=0.01 * (1 + seed)))
    repository = home / "hub" / f"models--{NAME.replace('/', '--')}"
    model.save_pretrained(repository / "files" / commit)
    for path in (repository / "files" / commit).iterdir():
        blob = repository / "blobs" / f"{commit}-{path.name}"
        link = repository / "snapshots" / commit / path.name
        for each in (blob, link):
            each.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return model


def test_what_exists_here_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(NAME)
    (tmp_path / NAME).mkdir(parents=True)
    assert not is_hub_name(NAME)
    assert not any(map(is_hub_name, ("olmoe", "/runs/a", "./a/b", "../b", "~/a", "a/b/c", "a/", "runs//a")))


@pytest.mark.slow
def test_a_name_is_enough_and_the_run_keeps_its_commit(tmp_path: Path) -> None:
    model = cache(tmp_path / "cache", COMMIT, seed=0)
    write_prepared(tmp_path / "data", [[5] * 100], [[6] * 100], vocab_size=90)
    ranks = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "olmoe_train.train"]
    command = [*ranks, *TRAIN, f"model.init_from={NAME}", "run_dir=run", "trainer.stop_at_step=1"]
    result = olmoe(tmp_path, *command, "optimizer.lr=1e-12", "optimizer.weight_decay=0", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    saved = OmegaConf.load(tmp_path / "run/config.yaml").model
    assert (saved.init_from, saved.revision) == (NAME, COMMIT)
    assert saved.initializer_range == 0.01
    result = olmoe(tmp_path, "olmoe_train", "export", "source=run", "out=out")
    assert result.returncode == 0, result.stderr
    trained = OlmoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-9, msg=name)

    cache(tmp_path / "cache", NEWER, seed=1)  # main moves on
    shown = olmoe(
        tmp_path, "olmoe_train", "train", f"model.init_from={NAME}", "run_dir=other", "--cfg", "job"
    )
    assert f"revision: {NEWER}" in shown.stdout
    shown = olmoe(tmp_path, "olmoe_train", "train", f"model.init_from={NAME}", "run_dir=run", "--cfg", "job")
    assert f"revision: {COMMIT}" in shown.stdout
    result = olmoe(
        tmp_path, *command[:-1], "optimizer.lr=1e-12", "optimizer.weight_decay=0", OMP_NUM_THREADS="1"
    )
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert OmegaConf.load(tmp_path / "run/config.yaml").model.revision == COMMIT


@pytest.mark.slow
def test_a_plan_by_name_and_revision(tmp_path: Path) -> None:
    cache(tmp_path / "cache", COMMIT, seed=0, ref="v1")
    arguments = ["olmoe_train", "plan", f"model.init_from={NAME}", "trainer.max_steps=1", "gpus=2"]
    result = olmoe(tmp_path, *arguments, "model.revision=v1")
    assert result.returncode == 0, result.stderr
    result = olmoe(tmp_path, *arguments)
    assert result.returncode == 2
    assert f"error: model.init_from={NAME}: no such directory here, and the Hugging Face hub" in result.stderr
    assert f"on a machine with a network, run `hf download {NAME}`" in result.stderr
    assert "Traceback" not in result.stderr
