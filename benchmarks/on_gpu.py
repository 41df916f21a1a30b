"""Everything that only a GPU can show, in one command: are the CUDA paths right, and how fast are they?

Needs torch >= 2.11, numpy, safetensors and the olmoe_train beside it: no Hydra, no installation, no data.
Where transformers, sonic-moe, deepspeed or xxhash are missing, what needs them is skipped, and the table says
so.

    python benchmarks/on_gpu.py --out DIR                 # OLMoE-1B-7B's shape
    python benchmarks/on_gpu.py --out DIR --device cpu     # a tiny shape, gloo in place of NCCL: try it out

The work is cut into parts. Each runs in a process of its own and writes DIR/PART.json; what it prints is in
DIR/PART.log. A call starts no more parts after --minutes; the same command again goes on with the parts that
have no result for this code, device, torch and shape. Every call writes DIR/table.md. A part that fails, runs
out of memory or is killed does not stop the others.

Exit codes: 0 all parts are done; 1 a part failed; 2 wrong arguments, or no GPU; 3 parts are left.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bare import replace_missing  # noqa: E402 - needs the path
from benchmarks.gpu_rows import Report, Row, Skip, Status  # noqa: E402

PARTS = {
    "machine": "gpu_kernels.machine",
    "parity": "gpu_kernels.parity_",
    "backends": "gpu_kernels.backends",
    "uneven_experts": "gpu_kernels.uneven_experts",
    "gather": "gpu_kernels.gather",
    "head": "gpu_kernels.head",
    "documents": "gpu_kernels.documents",
    "host_syncs": "gpu_timing.host_syncs",
    "fsdp": "gpu_layouts.fsdp",
    "expert_parallel": "gpu_layouts.expert_parallel",
    "expert_parallel_2": "gpu_layouts.expert_parallel_2",
    "compile": "gpu_layouts.compile_",
    "checkpointing": "gpu_layouts.checkpointing",
    "muon": "gpu_layouts.muon",
    "adapters": "gpu_layouts.adapters",
    "saves": "gpu_layouts.saves",
    "deepspeed": "gpu_layouts.deepspeed",
    "expert_layer": "gpu_timing.expert_layer",
    "step": "gpu_timing.step",
    "profile": "gpu_timing.profile",
    "memory": "gpu_timing.memory",
}
"""Name -> module.function, in the order in which they run: what is right comes before what is fast."""
TINY = {
    "layers": 2,
    "hidden": 64,
    "width": 32,
    "experts": 8,
    "top_k": 2,
    "heads": 4,
    "vocabulary": 256,
    "sequence": 32,
    "micro_batch": 2,
    "micro_batches": 2,
    "rounds": 1,
}
"""Defaults of --device cpu."""
LEAST = 60.0
"""Seconds of a call of 8 minutes that must be left for another part to start; less of a shorter call."""


def parse() -> argparse.Namespace:
    from benchmarks.gpu_step import add_shape

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--parts", default="", help=f"default: all of {','.join(PARTS)}")
    parser.add_argument("--again", default="", help="parts to repeat although they have results; all: every")
    parser.add_argument("--minutes", type=float, default=8.0, help="length of this call")
    add_shape(parser)
    if parser.parse_known_args()[0].device == "cpu":
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    args.parts = _names(parser, "--parts", args.parts) or list(PARTS)
    args.again = args.parts if args.again == "all" else _names(parser, "--again", args.again)
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: cuda or cpu")
    args.profile = False  # gpu_step.py's; here the profile is a part
    return args


def _names(parser: argparse.ArgumentParser, option: str, text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if wrong := [name for name in names if name not in PARTS]:
        parser.error(f"{option}: no part is called {', '.join(wrong)}; the parts: {', '.join(PARTS)}")
    return names


# --- one part, in a process of its own --------------------------------------------------------------------


def run_part(args: argparse.Namespace, name: str, key: dict[str, Any]) -> None:
    """Run a part and write its result. What it prints goes to DIR/PART.log."""
    os.setsid()  # so that its own processes can be ended with it
    log = os.open(args.out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    report, start, status, reason = Report(), time.monotonic(), None, ""
    try:
        choose_backends(args)
        module, function = PARTS[name].split(".")
        run: Callable[[argparse.Namespace, Report], None]
        run = getattr(import_module(f"benchmarks.{module}"), function)
        run(args, report)
    except Skip as skip:
        status, reason = Status.skipped, str(skip)
    except BaseException as error:  # a part's end must not look like a success, whatever it is
        status, reason = Status.failed, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write_result(args, name, key, status or report.status, reason, report.rows, time.monotonic() - start)


def choose_backends(args: argparse.Namespace) -> None:
    """args.backends without those that cannot run here, whose reasons are in args.left_out."""
    import torch

    from olmoe_train.model.moe.sonicmoe import why_not_here

    torch.manual_seed(0)
    args.left_out = {}
    if "sonicmoe" in args.backends and (reason := why_not_here(args.device != "cpu")) is not None:
        args.backends = [name for name in args.backends if name != "sonicmoe"]
        args.left_out["sonicmoe"] = reason


def write_result(
    args: argparse.Namespace,
    name: str,
    key: dict[str, Any],
    status: Status,
    reason: str,
    rows: list[Row],
    seconds: float,
) -> None:
    result = {
        "part": name,
        "status": status.value,
        "reason": reason,
        "traceback": f"{name}.log" if status is Status.failed and reason else "",
        "seconds": round(seconds, 1),
        "key": key,
        "rows": [asdict(row) | {"status": row.status.value} for row in rows],
    }
    temporary = args.out / f"{name}.json.tmp"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(args.out / f"{name}.json")


# --- all parts --------------------------------------------------------------------------------------------


def in_process(seconds: float, function: Callable[..., None], *arguments: Any) -> int | None:
    """The exit code of a call in a forked process; None if it was ended after so many seconds.

    This process imports torch and never uses it, so that a fork takes no time and may use CUDA.
    """
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the part leads a group
        except ProcessLookupError:
            process.kill()
        process.join()
        return None
    return process.exitcode


def facts(path: Path, device: str) -> None:
    """Write the device's name and the number of GPUs; in a process of its own, because it uses CUDA."""
    import torch

    name, count = "cpu", 0
    if device == "cuda" and torch.cuda.is_available():
        name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    path.write_text(json.dumps({"device": name, "gpus": count, "torch": torch.__version__}))


def key_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a result is valid for: code, device, torch and shape."""
    path = args.out / "facts.json"
    in_process(120, facts, path, args.device)
    digest = hashlib.sha256()
    for folder in ("benchmarks", "olmoe_train"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    shape = {name: vars(args)[name] for name in (*TINY, "backends", "compile")}
    code = {"commit": commit or "no git", "code": digest.hexdigest()[:12]}
    return json.loads(path.read_text()) | code | {"shape": shape}


def result_of(args: argparse.Namespace, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a part, if it has one that is valid for `key`; the commit alone may differ."""
    path = args.out / f"{name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    ignored = {"commit": ""}
    return result if result["key"] | ignored == key | ignored else None


def run_parts(args: argparse.Namespace, key: dict[str, Any]) -> None:
    """Run the parts that have no result, until the call's time is used."""
    whole, start = 60 * args.minutes, time.monotonic()
    waiting = [name for name in args.parts if name in args.again or result_of(args, name, key) is None]
    for number, name in enumerate(waiting):
        left = whole - (time.monotonic() - start)
        if number and left < min(LEAST, whole / 8):
            print(f"{name}: left for the next call")
            continue
        (args.out / f"{name}.json").unlink(missing_ok=True)
        print(f"{name} ... ", end="", flush=True)
        began = time.monotonic()
        code = in_process(left, run_part, args, name, key)
        took = time.monotonic() - began
        if code is None and number:
            print(f"ended after {took:.0f} s, as this call's time is used: left for the next call")
            continue
        if code is None or result_of(args, name, key) is None:
            reason = f"more than {args.minutes:g} minutes" if code is None else f"ended with exit code {code}"
            write_result(args, name, key, Status.failed, reason, [], took)
        result = result_of(args, name, key)
        assert result is not None
        print(f"{result['status']} in {took:.1f} s{': ' * bool(result['reason'])}{result['reason']}")


def table(args: argparse.Namespace, key: dict[str, Any]) -> list[str]:
    """Lines of Markdown: every row of every part, and what is left."""
    shape = ", ".join(f"{name} {value}" for name, value in key["shape"].items())
    lines = [
        f"# {key['device']}, torch {key['torch']}, commit {key['commit']}, code {key['code']}",
        "",
        f"`python benchmarks/on_gpu.py {' '.join(sys.argv[1:])}`; {shape}",
        "",
        "| part | what | value | tolerance | result |",
        "|---|---|---|---|---|",
    ]
    for name in PARTS:
        result = result_of(args, name, key)
        if result is None:
            lines.append(f"| {name} | | | | left |")
            continue
        if not result["rows"] or result["reason"]:
            lines.append(f"| {name} | | | | {_verdict(result)} |")
        for row in result["rows"]:
            value = "" if row["value"] is None else f"{_number(row['value'])} {row['unit']}".strip()
            tolerance = "" if row["tolerance"] is None else _number(row["tolerance"])
            lines.append(f"| {name} | {_cell(row['what'])} | {value} | {tolerance} | {_verdict(row)} |")
    return lines


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return _cell(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _verdict(item: dict[str, Any]) -> str:
    return _cell(f"{item['status']}: {item['reason']}" if item["reason"] else item["status"])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:300]


def main() -> int:
    replace_missing()
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    key = key_of(args)
    if args.device == "cuda" and not key["gpus"]:
        print("torch finds no GPU here; --device cpu tries a tiny shape", file=sys.stderr)
        return 2
    for module in ("gpu_kernels", "gpu_layouts", "gpu_timing"):
        import_module(f"benchmarks.{module}")  # once, before the forks
    run_parts(args, key)
    (args.out / "table.md").write_text("\n".join(table(args, key)) + "\n")
    results = {name: result_of(args, name, key) for name in args.parts}
    failed = [name for name, result in results.items() if result and result["status"] == Status.failed.value]
    left = [name for name, result in results.items() if result is None]
    print(f"{args.out / 'table.md'}: {len(results) - len(left)} parts of {len(results)} have results")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    if left:
        print(f"left: {', '.join(left)}; the same command goes on with them")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
