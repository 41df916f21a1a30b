"""benchmarks/on_gpu.py end to end on the CPU, as on a bare machine, with gloo in place of NCCL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = ("hydra", "omegaconf", "yaml", "tokenizers", "xxhash", "zstandard", "transformers", "deepspeed")
# Python runs sitecustomize.py from PYTHONPATH when it starts: no process of the benchmark can import these.
BARE = f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n"
SKIPPED = {"parity", "host_syncs", "compile", "saves", "deepspeed"}


def on_gpu(out: Path, bare: Path, *options: str) -> subprocess.CompletedProcess[str]:
    bare.mkdir(exist_ok=True)
    (bare / "sitecustomize.py").write_text(BARE)
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), "--device=cpu", f"--out={out}"]
    environment = os.environ | {"PYTHONPATH": str(bare), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--no-compile", *options],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.ranks
def test_every_part_runs_on_a_bare_machine_and_a_second_call_repeats_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = on_gpu(out, tmp_path / "bare")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(path.read_text()) for path in out.glob("*.json") if path.stem != "facts"]
    assert len(results) == 21
    assert {result["part"] for result in results if result["status"] == "skipped"} == SKIPPED
    assert all(result["reason"] for result in results if result["status"] == "skipped")
    again = on_gpu(out, tmp_path / "bare")
    assert again.returncode == 0
    assert "..." not in again.stdout
    assert "| left |" not in (out / "table.md").read_text()
