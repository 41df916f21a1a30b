"""benchmarks/gpu_step.py, tried out on the CPU: that it runs with torch alone, and notices what is wrong."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks import gpu_models, gpu_step
from olmoe_train.model import OlmoeForCausalLM

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "device": "cpu",
    "layers": 2,
    "hidden": 64,
    "width": 32,
    "experts": 8,
    "top-k": 2,
    "heads": 4,
    "vocabulary": 256,
    "sequence": 32,
    "micro-batch": 2,
    "micro-batches": 2,
    "rounds": 1,
}
SHAPE = [f"--{name}={value}" for name, value in OPTIONS.items()] + ["--no-compile"]
# Runs a file as a program in a process that can import none of the modules named first.
ALONE = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def imports_of_the_package() -> list[str]:
    """What it depends on beyond torch, numpy and safetensors, and Transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in project["dependencies"]}
    assert names >= {"torch", "numpy", "safetensors", "jinja2", "hydra-core", "omegaconf"}
    names -= {"torch", "numpy", "safetensors", "jinja2"}  # torch itself depends on jinja2
    return [*sorted(name.replace("hydra-core", "hydra") for name in names), "transformers"]


@pytest.mark.slow
def test_it_needs_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    program = [sys.executable, "-c", ALONE, ",".join(imports_of_the_package())]
    command = [*program, str(ROOT / "benchmarks" / "gpu_step.py"), *SHAPE]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "parity: not checked, transformers is not installed" in run.stdout
    assert run.stdout.count("| ours, grouped_mm |") == 3  # expert layer, step, step of 16 layers


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *SHAPE, *options])
    return gpu_step.main()


@pytest.mark.slow
def test_it_compares_with_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--profile") == 0
    told = capsys.readouterr().out
    for name in ("ours, grouped_mm", "ours, loop", "transformers"):
        assert re.search(rf"parity: {name}: .*: passed", told)
        assert told.count(f"| {name} |") == 3
    assert "aten::mm" in told


def test_it_notices_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the experts of one layer, by a half."""
    real = gpu_models.our_loss

    def half_more(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight.register_hook(lambda gradient: 1.5 * gradient)
        return weight

    def wrong(model: OlmoeForCausalLM, backend: str, router: bool = True) -> gpu_models.Loss:
        model.model.layers[1].mlp.experts.own = half_more
        return real(model, backend, router)

    monkeypatch.setattr(gpu_models, "our_loss", wrong)
    assert run(monkeypatch, "--backends", "grouped_mm") == 1
    told = capsys.readouterr().out
    assert re.search(r"ours, grouped_mm: .* FAILED .*'model.layers.1.mlp.experts.down_proj'", told)
    assert re.search(r"transformers: .*: passed", told)
