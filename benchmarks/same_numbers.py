"""Prove that a change of the code changed no number: record two checkouts, compare them bit for bit.

    python -m benchmarks.same_numbers record OUT --checkout DIR [--continue-from OLD_OUT]
    python -m benchmarks.same_numbers compare BEFORE AFTER [--first-step-only TOLERANCE] [--ignore PATTERN]

`record` runs the code of DIR on the CPU and writes OUT/numbers.json; all runs stay in OUT. The parts:

    corpus           SHA-256 of every file that `olmoe prepare data=python_stdlib` writes
    quickstart       40 steps of experiment=quickstart on two ranks with expert parallelism 2
    resumed          the same run, stopped at step 20 and continued to step 40
    continued        (--continue-from) OLD_OUT/quickstart-at-20, the run directory of another checkout, copied
                     and continued to step 40: run directories that older code wrote can still be resumed
    export hf, olmo  SHA-256 of every file of both exports of the quickstart's last checkpoint; of README.md
                     the losses only, since it also shows paths and the configuration
    layout NAME      six steps of a tiny model in each layout of tests/distributed/test_equivalence.py

A run is recorded as all values of metrics.jsonl except perf/*; the step, tokens, samples and expert use of
its last checkpoint; and the SHA-256 of each whole tensor there (parameters and AdamW moments).

`compare` prints one line per part and exits 1 if anything differs. AFTER's `resumed` and `continued` must
also equal BEFORE's `quickstart`. Floats are compared by their shortest exact representation.
--first-step-only compares only a run's first step, within a relative tolerance: its losses, its gradient
norm, and of the quickstart every gradient (the norm of the difference to the recorded gradient, relative to
the gradient's norm). It is for a change that reorders floating-point sums on purpose. --ignore leaves out
parts and values, such as "layout zero*" and "corpus: manifest.json".

Both records must come from one machine and one version of PyTorch. The script uses only what both checkouts
have: the command line, run directories, `olmoe_train.train.train` and the keys of the configuration.
"""

import argparse
import fnmatch
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import same_layouts
from benchmarks.same_layouts import LAYOUTS, STEPS, run_directory, write_inputs

Numbers = dict[str, Any]
"""Flat: the name of a value -> the value or a hash."""
LOSSES_AND_NORM = ("loss", "ce_loss", "load_balancing_loss", "router_z_loss", "grad_norm")
STATE = ("step", "tokens", "samples", "expert_last_used")
"""Those keys of a checkpoint's state that are numbers of the run."""
GROUPS = ("quickstart", "layouts-1", "layouts-2", "layouts-4")
CODE = "import olmoe_train; from pathlib import Path; found = Path(olmoe_train.__file__).resolve()"
STOPPED_AT, END = 20, 40
ONE_STEP = "quickstart-at-1"
MOST_SHOWN = 8
ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = """
experiment=quickstart trainer.max_steps=500 trainer.log_every=1 trainer.device=cpu evaluation.every=20
evaluation.max_sequences=16 logging.wandb.mode=disabled parallel.expert_parallel_size=2"""


# --- reading what a run left ------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(directory: Path) -> Numbers:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): digest(path) for path in paths}


def export_of(directory: Path) -> Numbers:
    """files_of, but of the model card only the rows of its tables: it shows paths and the configuration."""
    found = files_of(directory)
    if found.pop("README.md", None):
        lines = (directory / "README.md").read_text().splitlines()
        rows = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| ")]
        found |= {f"README.md: {row[0]}": row[1:] for row in rows}
    return found


def whole_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Each whole tensor by its name, put together from the shards of all ranks."""
    pieces: dict[str, list[tuple[Tensor, list[int]]]] = {}
    for path in sorted(checkpoint.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key, saved in json.loads(file.metadata()["DCP_SHARDING_INFO"]).items():
                pieces.setdefault(key, []).append((file.get_tensor(key), saved["saved_offsets"]))
    assert pieces, f"{checkpoint} has no tensors"
    for key, parts in sorted(pieces.items()):
        ends = [[o + n for o, n in zip(offsets, part.shape, strict=True)] for part, offsets in parts]
        whole = parts[0][0].new_zeros([max(of_dim) for of_dim in zip(*ends, strict=True)])
        for (part, offsets), end in zip(parts, ends, strict=True):
            whole[tuple(slice(o, e) for o, e in zip(offsets, end, strict=True))] = part
        yield key, whole


def tensors_of(checkpoint: Path) -> Numbers:
    """SHA-256 of each whole tensor."""
    found = {}
    for key, whole in whole_tensors(checkpoint):
        content = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
        found[f"{key} {list(whole.shape)} {whole.dtype}"] = hashlib.sha256(content).hexdigest()
    return found


def first_gradients(out: Path) -> dict[str, Tensor]:
    """The gradients of the quickstart's first step, after clipping: AdamW's first moment is (1 - beta1) times
    the gradient there."""
    checkpoint = out / ONE_STEP / "checkpoints" / "step-00000001"
    moments = {name: tensor for name, tensor in whole_tensors(checkpoint) if "exp_avg." in name}
    assert moments, f"{checkpoint} has no moments"
    return moments


def compare_gradients(before: Path, after: Path, tolerance: float) -> bool:
    """Print the largest relative difference of a gradient. True if one is beyond the tolerance."""
    old, new = first_gradients(before), first_gradients(after)
    assert old.keys() == new.keys()
    distances = {name: ((new[name] - old[name]).norm() / old[name].norm()).item() for name in old}
    worst = max(distances, key=lambda name: distances[name])
    failed = not distances[worst] <= tolerance
    word = "DIFFERENT " if failed else "within    "
    print(f"{word} gradients of the first step: {len(old)} tensors; at most {distances[worst]:.1e}, {worst}")
    return failed


def numbers_of(run: Path, step: int) -> Numbers:
    found: Numbers = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        values = {name: value for name, value in line.items() if not name.startswith(("step", "perf/"))}
        found |= {f"step {line['step']}: {name}": value for name, value in values.items()}
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    content = json.loads((checkpoint / "state.json").read_text())
    state = content["state"]
    # Older checkpoints hold the metrics' state at the top, newer ones among the callbacks' states.
    state = state.get("callbacks", {}).get("logging", {}) | state
    found |= {f"state: {name}": state[name] for name in STATE}
    found |= {f"AdamW's step of {name}": value for name, value in content["adam_steps"].items()}
    return found | tensors_of(checkpoint)


# --- record -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorder:
    out: Path
    checkout: Path

    def python(self, name: str, *arguments: str) -> None:
        """python ARGUMENTS with the checkout's code; its output goes to OUT/logs."""
        environment = os.environ | {
            "PYTHONPATH": str(self.checkout),
            "PYTHONSAFEPATH": "1",  # neither the script's directory nor the current one
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        path, started = self.out / "logs" / f"{name.replace(' ', '-')}.log", time.monotonic()
        with path.open("w") as log:
            run = [sys.executable, *arguments]
            code = subprocess.call(run, cwd=self.checkout, env=environment, stdout=log, stderr=log)
        if code:
            sys.exit(f"{name} failed with exit code {code}, {path}:\n{path.read_text()[-4000:]}")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)

    def olmoe(self, name: str, *arguments: str) -> None:
        self.python(name, "-m", "olmoe_train", *arguments)

    def torchrun(self, name: str, ranks: int, *arguments: str) -> None:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        self.python(name, *launcher, *arguments)

    def quickstart(self, run: str, data: Path, stop: int) -> None:
        where = f"run_dir={self.out / run} data.dir={data} trainer.stop_at_step={stop}"
        self.torchrun(f"{run} to {stop}", 2, "-m", "olmoe_train.train", *f"{QUICKSTART} {where}".split())


def record_quickstart(recorder: Recorder, data: Path | None, old: Path | None) -> dict[str, Numbers]:
    """data: a corpus that is prepared already; old: another record, whose run is continued."""
    out, parts = recorder.out, {}
    if data is None:
        data = out / "corpus"
        recorder.olmoe("corpus", "prepare", "data=python_stdlib", f"data.dir={data}")
        parts["corpus"] = files_of(data)
    recorder.quickstart("quickstart", data, END)
    recorder.quickstart("quickstart-at-20", data, STOPPED_AT)
    recorder.quickstart(ONE_STEP, data, 1)
    stopped = {"resumed": out} | ({"continued": old} if old is not None else {})
    for run, record in stopped.items():
        shutil.copytree(record / "quickstart-at-20", out / run)
        recorder.quickstart(run, data, END)
    parts |= {run: numbers_of(out / run, END) for run in ("quickstart", *stopped)}
    for name in ("hf", "olmo"):
        export = out / f"export-{name}"
        keys = (f"source={out}/quickstart", f"format={name}", f"out={export}")
        recorder.olmoe(f"export {name}", "export", *keys)
        parts[f"export {name}"] = export_of(export)
    return parts


def record_layouts(recorder: Recorder, ranks: int) -> dict[str, Numbers]:
    script = str(Path(same_layouts.__file__).resolve())
    recorder.torchrun(f"layouts of {ranks} ranks", ranks, script, str(recorder.out))
    names = [name for name, layout in LAYOUTS.items() if layout.ranks == ranks]
    return {f"layout {name}": numbers_of(run_directory(recorder.out, name), STEPS) for name in names}


def record(options: argparse.Namespace) -> int:
    out, checkout = options.out.resolve(), options.checkout.resolve()
    if not (checkout / "olmoe_train" / "train.py").is_file():
        sys.exit(f"--checkout {checkout}: no olmoe_train/train.py there")
    out.mkdir(parents=True)
    (out / "logs").mkdir()
    recorder = Recorder(out, checkout)
    recorder.python("code", "-c", f"{CODE}; assert str(found).startswith({str(checkout)!r}), found")
    parts: dict[str, Numbers] = {}
    if "quickstart" in options.only:
        old = options.continue_from and options.continue_from.resolve()
        parts |= record_quickstart(recorder, options.data and options.data.resolve(), old)
    write_inputs(out)
    for ranks in (1, 2, 4):
        if f"layouts-{ranks}" in options.only:
            parts |= record_layouts(recorder, ranks)
    machine = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    (out / "numbers.json").write_text(json.dumps({"machine": machine, "parts": parts}, indent=1))
    return 0


# --- compare ----------------------------------------------------------------------------------------------


def differences(
    part: str, before: Numbers, after: Numbers, options: argparse.Namespace
) -> tuple[int, list[str]]:
    """How many values were compared, and a line for each that differs."""
    names = list(before | after)
    if options.first_step_only is not None:
        first = STOPPED_AT + 1 if part == "continued" else 1
        names = [n for n in (f"step {first}: train/{name}" for name in LOSSES_AND_NORM) if n in before]
    names = [n for n in names if not any(fnmatch.fnmatch(f"{part}: {n}", p) for p in options.ignore)]
    found = []
    for name in names:
        old, new = before.get(name, "absent"), after.get(name, "absent")
        if options.first_step_only is not None and isinstance(old, float) and isinstance(new, float):
            same = math.isclose(old, new, rel_tol=options.first_step_only)
        else:
            same = repr(old) == repr(new)
        if not same:
            found.append(f"{name}: {shown(old)} before, {shown(new)} after")
    return len(names), found


def shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) else repr(value)[:80]


def compare(options: argparse.Namespace) -> int:
    records = [json.loads((path / "numbers.json").read_text()) for path in (options.before, options.after)]
    if records[0]["machine"] != records[1]["machine"]:
        print(f"not comparable: {records[0]['machine']} before, {records[1]['machine']} after")
        return 1
    before, after = (record["parts"] for record in records)
    pairs = [(part, part) for part in before | after if part != "continued"]
    pairs += [
        ("quickstart", run) for run in ("resumed", "continued") if run in after and "quickstart" in before
    ]
    compared = failed = 0
    for old, new in pairs:
        if any(fnmatch.fnmatch(new, pattern) for pattern in options.ignore):
            continue
        count, found = differences(new, before.get(old, {}), after.get(new, {}), options)
        compared += count
        title = new if old == new else f"{new} (against {old})"
        if found:
            failed += 1
            print(f"DIFFERENT  {title}: {len(found)} of {count} values", *found[:MOST_SHOWN], sep="\n    ")
        elif count:
            print(f"same       {title}: {count} values")
    if options.first_step_only is not None and "quickstart" in before:
        failed += compare_gradients(options.before, options.after, options.first_step_only)
    print(f"{compared} values compared; {failed} parts differ")
    return int(failed > 0 or compared == 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="record|compare")
    verb = verbs.add_parser("record", help="run the code of a checkout and write OUT/numbers.json")
    verb.set_defaults(run=record)
    verb.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    verb.add_argument("--checkout", type=Path, default=ROOT, help="default: this one")
    verb.add_argument("--data", type=Path, help="a prepared python_stdlib corpus; default: prepare one")
    verb.add_argument("--continue-from", type=Path, metavar="OLD_OUT", help="continue that record's run, too")
    verb.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="default: all of them")
    verb = verbs.add_parser("compare", help="compare two records; exit code 1 if anything differs")
    verb.set_defaults(run=compare)
    verb.add_argument("before", type=Path, metavar="BEFORE")
    verb.add_argument("after", type=Path, metavar="AFTER")
    verb.add_argument("--first-step-only", type=float, metavar="TOLERANCE", help="relative, for example 1e-6")
    verb.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="of a part, or `part: value`"
    )
    options = parser.parse_args()
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
