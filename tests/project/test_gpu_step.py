"""benchmarks/gpu_step.py as a program on the CPU: it needs torch alone, and it notices a wrong gradient."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
SHAPE = [f"--{name}={value}" for name, value in OPTIONS.items()] + ["--no-compile", "--profile"]
# Programs that run the benchmark as a program, in a process that is changed first.
# ALONE: the process can import none of the modules that its first argument names.
ALONE = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# WRONG_GRADIENT: the gradient of the package's experts is too large by a half.
WRONG_GRADIENT = """
import runpy, sys
from olmoe_train.model.moe import experts

def half_more(weight):
    weight = weight.clone()
    weight.register_hook(lambda gradient: 1.5 * gradient)
    return weight

experts.all_experts = half_more
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def imports_of_the_package() -> list[str]:
    """What it depends on beyond torch, numpy and safetensors, and Transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in project["dependencies"]}
    assert names >= {"torch", "numpy", "safetensors", "jinja2", "hydra-core", "omegaconf"}
    names -= {"torch", "numpy", "safetensors", "jinja2"}  # torch itself depends on jinja2
    return [*sorted(name.replace("hydra-core", "hydra") for name in names), "transformers"]


def run(*program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark with the tiny shape. program: options of Python before the file's name."""
    command = [sys.executable, *program, str(ROOT / "benchmarks" / "gpu_step.py"), *SHAPE]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_it_needs_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    done = run("-c", ALONE, ",".join(imports_of_the_package()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parity: not checked, transformers is not installed" in done.stdout
    assert done.stdout.count("| ours, grouped_mm |") == 3  # expert layer, step, step of 16 layers


@pytest.mark.slow
def test_it_compares_with_transformers(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("ours, grouped_mm", "ours, loop", "transformers"):
        assert re.search(rf"parity: {name}: .*: passed", done.stdout)
        assert done.stdout.count(f"| {name} |") == 3
    assert "aten::mm" in done.stdout


@pytest.mark.slow
def test_it_notices_a_wrong_gradient(tmp_path: Path) -> None:
    done = run("-c", WRONG_GRADIENT, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1, done.stderr
    told = done.stdout
    assert re.search(r"ours, grouped_mm: .* FAILED .*'model.layers.1.mlp.experts.down_proj'", told)
    assert re.search(r"transformers: .*: passed", told)
