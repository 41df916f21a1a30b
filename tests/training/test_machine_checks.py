"""The checks of `olmoe doctor`, each with a planted fault, and its short form at the start of a training."""

import http.server
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import constants

from olmoe_train.checkpoint.directory import latest_checkpoint
from olmoe_train.cli import doctor
from olmoe_train.config.choices import Packing, WandbMode
from olmoe_train.config.train import TrainConfig
from olmoe_train.planning.traffic import StepTraffic, Traffic
from olmoe_train.train import train
from olmoe_train.training.preflight.machine import together
from olmoe_train.training.preflight.machine.bandwidth import seconds_per_step
from olmoe_train.training.preflight.machine.checks import run_checks
from olmoe_train.training.preflight.machine.gpus import is_built_for, parse_links
from olmoe_train.training.preflight.machine.network import hub, port_result, unreachable, wandb
from olmoe_train.training.preflight.machine.resources import (
    disk_space,
    disk_use,
    locked_memory,
    open_files,
    run_directory,
    shared_memory,
)
from olmoe_train.training.preflight.machine.result import Result, Site, State, findings, guarded
from olmoe_train.training.preflight.machine.together import clock_result
from olmoe_train.training.preflight.machine.versions import (
    driver_version,
    required,
    version_of,
    version_results,
)
from olmoe_train.utils.errors import UserError
from tests.support.faults import config, write_data
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
KIB, MIB = 2**10, 2**20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture
def cfg(prepared: Path, tmp_path: Path) -> TrainConfig:
    return config(prepared, tmp_path / "run", parallel={"expert_parallel_size": 1})


def site(cfg: TrainConfig, ranks: int = 1, local_ranks: int | None = None, device: str = "cpu") -> Site:
    return Site(cfg, torch.device(device), 0, ranks, 0, local_ranks or ranks)


def only(results: list[Result]) -> tuple[State, str]:
    """The state of the only result, and its message with the fix."""
    (result,) = results
    return result.state, f"{result.message}; {result.fix}"


@contextmanager
def file_system(place: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if made.returncode:
        pytest.skip(f"cannot mount a file system: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def soft_limit(kind: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def versions_with(**others: str) -> Callable[[str], str | None]:
    """The versions of this host, but for some. Names have _ for a space."""
    given = {name.replace("_", " "): version for name, version in others.items()}
    return lambda name: given.get(name, version_of(name))


def test_versions_of_this_host_go_together(cfg: TrainConfig) -> None:
    assert [one.state for one in version_results(cfg, version_of)] == [State.ok]


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({"torch": "2.10.0"}, State.failed, ["requires torch>=2.11", "has torch 2.10.0", "pip install"]),
        ({"cuda": "13.0", "unusable_driver": "570.86.15"}, State.failed, ["driver 570.86.15", "580"]),
        ({"cuda": "12.6", "unusable_driver": "470.82.01"}, State.failed, ["525 or newer"]),
        ({"nccl": "2.25.1"}, State.warning, ["nccl 2.25.1", "pull/149546"]),
    ],
)
def test_versions_that_do_not_go_together(
    cfg: TrainConfig, versions: dict[str, str], state: State, words: list[str]
) -> None:
    found, text = only(version_results(cfg, versions_with(**versions)))
    assert found is state
    assert all(word in text for word in words), text


def test_what_dependencies_require_and_missing_packages_are_warnings(cfg: TrainConfig) -> None:
    found, text = only(required("datasets", versions_with(pyarrow="1.0"), "dependencies", State.warning))
    assert found is State.warning
    assert "datasets requires pyarrow" in text
    missing = lambda name: None if name == "deepspeed" else version_of(name)  # noqa: E731
    assert only(version_results(cfg, missing))[0] is State.warning  # fsdp does without DeepSpeed


def test_a_conflict_concerns_only_the_runs_that_meet_it(cfg: TrainConfig) -> None:
    on_h100 = versions_with(torch="2.13.0", compute_capability="9.0")
    assert only(version_results(cfg, on_h100))[0] is State.ok
    padded = replace(cfg, data=replace(cfg.data, packing=Packing.none))
    assert only(version_results(padded, on_h100))[0] is State.warning


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module ", "Open Kernel Module for x86_64"])
def test_the_version_of_the_driver(kind: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX {kind}  570.86.15  Thu Jan 23\nGCC 12.3.0")
    assert driver_version(tmp_path / "version") == "570.86.15"
    assert driver_version(tmp_path / "none") is None


@pytest.mark.parametrize(("limit", "state"), [(70, State.failed), (200, State.warning), (300, State.ok)])
def test_a_low_limit_of_open_files(cfg: TrainConfig, limit: int, state: State) -> None:
    """Four ranks need 64 + 2 x 4, and up to 256 + 8 x 4."""
    with soft_limit(resource.RLIMIT_NOFILE, limit):
        found, text = only(open_files(site(cfg, 4)))
    assert found is state
    assert state is State.ok or "ulimit -n" in text


def test_a_low_limit_of_locked_memory(cfg: TrainConfig, tmp_path: Path) -> None:
    cards = tmp_path / "infiniband"
    (cards / "mlx5_0").mkdir(parents=True)
    on_two_hosts = site(cfg, ranks=16, local_ranks=8, device="cuda")
    with soft_limit(resource.RLIMIT_MEMLOCK, 64 * KIB):
        found, text = only(locked_memory(on_two_hosts, cards))
        assert found is State.warning
        assert "64.0 KiB" in text
        assert "ulimit -l unlimited" in text
        # Neither a run on one host nor a host without such a card needs it.
        assert only(locked_memory(site(cfg, 8, device="cuda"), cards))[0] is State.skipped
        assert only(locked_memory(on_two_hosts, tmp_path / "none"))[0] is State.skipped


def test_a_small_shared_memory(cfg: TrainConfig, tmp_path: Path) -> None:
    """Only runs that use it are warned: two workers on two ranks, two batches of 8 x 16 tokens each."""
    workers = replace(cfg, data=replace(cfg.data, num_workers=2, sequence_length=16))
    with file_system(tmp_path / "shm", "size=32k") as directory:
        assert only(shared_memory(site(cfg, 2), directory))[0] is State.skipped
        found, text = only(shared_memory(site(workers, 2), directory))
        assert found is State.ok, text  # 2 x 2 x 2 x 8 x 16 x 32 bytes fill it exactly
        (directory / "other").write_bytes(b"0" * 4 * KIB)
        found, text = only(shared_memory(site(workers, 2), directory))
        assert found is State.warning
        assert "28.0 KiB free; loader workers may need 32.0 KiB" in text
        assert "data.num_workers=0" in text
        found, text = only(shared_memory(site(cfg, 2, device="cuda"), directory))
        assert found is State.warning
        assert "NCCL may need 1.0 GiB" in text


def test_a_directory_that_cannot_be_written(cfg: TrainConfig, tmp_path: Path) -> None:
    with file_system(tmp_path / "read-only", "ro") as place:
        found, text = only(run_directory(site(replace(cfg, run_dir=str(place / "a" / "b")))))
        assert found is State.failed
        assert f"no file can be written in {place}: Read-only file system" in text
    assert only(run_directory(site(cfg)))[0] is State.ok
    assert not Path(cfg.run_dir).exists()


def test_a_disk_that_is_too_small(cfg: TrainConfig, tmp_path: Path) -> None:
    one = disk_use(site(cfg)).checkpoint
    for space, state, words in (
        (0.5, State.failed, "less than one checkpoint"),
        (2.5, State.warning, "6 checkpoints"),  # six steps, and checkpoint.keep=0 keeps all
        (6.5, State.ok, "6 checkpoints"),
    ):
        size = int(space * one) // (4 * KIB) * 4
        with file_system(tmp_path / f"disk-{space}", f"size={size}k") as place:
            found, text = only(disk_space(site(replace(cfg, run_dir=str(place / "run")))))
        assert found is state, text
        assert words in text


def test_a_start_on_a_full_disk_ends_before_training(cfg: TrainConfig, tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "size=64k") as place:
        with pytest.raises(UserError, match=r"host .+, rank 0: run_dir=.+ less than one checkpoint of"):
            train(replace(cfg, run_dir=str(place / "run")))
        assert not list(place.iterdir())


def test_a_checkpoint_is_as_large_as_planned_and_a_start_warns_once(
    cfg: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    short = replace(cfg, trainer=replace(cfg.trainer, stop_at_step=1))
    with soft_limit(resource.RLIMIT_NOFILE, 200):
        train(short)
    assert capfd.readouterr().out.count("open files per process") == 1
    saved = latest_checkpoint(Path(cfg.run_dir))
    assert saved is not None
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert size == pytest.approx(disk_use(site(cfg)).checkpoint, rel=0.1)
    assert size > disk_use(site(cfg)).checkpoint  # each file has a header


def test_ports(cfg: TrainConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = port_result("127.0.0.1", port)
        assert result.state is State.failed
        assert f"127.0.0.1:{port} is in use on this host" in result.message
    assert port_result("127.0.0.1", port).state is State.ok
    unknown = port_result("no host", 29400)
    assert unknown.state is State.failed
    assert "does not know the name" in unknown.message


def test_a_server_that_answers_is_reached_whatever_it_says() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert unreachable(url) == ""
        server.shutdown()
    assert "refused" in unreachable(url)


def test_the_hub_is_needed_only_by_names_on_it(cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert only(hub(site(cfg)))[0] is State.skipped
    named = replace(cfg, model=replace(cfg.model, init_from="nobody/no-model"))
    found, text = only(hub(site(named)))
    assert found is State.failed
    assert "model.init_from=nobody/no-model" in text
    assert "refused" in text


def test_wandb_is_needed_only_online(cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert only(wandb(site(cfg)))[0] is State.skipped
    mode = replace(cfg.logging.wandb, mode=WandbMode.online)
    online = replace(cfg, logging=replace(cfg.logging, wandb=mode))
    found, text = only(wandb(site(online)))
    assert found is State.warning
    assert "http://127.0.0.1:9 is not reached" in text


def test_clocks_by_hand() -> None:
    assert clock_result(0.004).state is State.ok
    assert clock_result(-3.0).message == "the clock of this host is 3.0 s behind that of rank 0"
    assert clock_result(-3.0).state is State.warning
    assert clock_result(61.0).state is State.failed


def test_links_of_gpus() -> None:
    header = "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m"
    rows = [
        "GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0",
        "GPU1\tNV18\t X \tPHB\tSYS\t0-47\t0",
        "GPU2\tSYS\tPHB\t X \tSYS\t48-95\t1",
        "NIC0\tPIX\tSYS\tSYS\t X ",
    ]
    links = {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "PHB"}
    assert parse_links("\n".join([header, *rows, "", "Legend:", "  X    = Self"])) == links
    assert parse_links("") == {}


def test_architectures_that_torch_has_code_for() -> None:
    built = ["sm_80", "sm_86", "sm_90a", "compute_120"]
    assert is_built_for((8, 9), built)  # code for 8.6 runs on 8.9
    assert is_built_for((12, 1), built)  # translated when it is loaded
    assert not is_built_for((7, 0), built)
    assert not is_built_for((10, 0), built)


def test_time_of_a_steps_traffic_by_hand() -> None:
    traffic = StepTraffic(*(Traffic(bytes_sent=size) for size in (600, 400, 80, 30)))
    measured = {"all_gather": 100.0, "all_reduce": 40.0, "all_to_all": 60.0}
    # (600 + 400) / 100 + 80 / 40, and 30 / 60.
    assert seconds_per_step(traffic, measured) == (12.0, 0.5)


def test_results_of_ranks_are_merged_and_a_broken_check_is_a_warning(cfg: TrainConfig) -> None:
    def broken(site: Site) -> list[Result]:
        raise RuntimeError("no such thing")

    fine = Result("fine", State.ok, "yes")
    of_ranks = [("a", [fine]), ("a", [fine, *guarded(broken, site(cfg))]), ("b", [fine])]
    merged = findings(of_ranks)
    assert [(one.result.name, one.place) for one in merged] == [
        ("fine", "host a, ranks 0-1; host b, rank 2"),
        ("broken", "host a, rank 1"),
    ]
    assert merged[1].result.state is State.warning
    assert "RuntimeError: no such thing" in merged[1].result.message


def doctor_on_a_rank(cfg: TrainConfig, elsewhere: Path) -> list[tuple[str, str, str]]:
    """Rank 1 has a clock that is 90 s ahead, and rank 2 has other directories of the same names."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 1:
        together.time = _Ahead()  # type: ignore[assignment, attr-defined]
    if rank == 2:
        other_data = replace(cfg.data, dir=str(elsewhere / "data"))
        cfg = replace(cfg, run_dir=str(elsewhere / "run"), data=other_data)
    together.SEEN_S = 0.5  # seconds
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    here = Site(cfg, CPU, rank, ranks, rank, ranks, bandwidth_seconds=0.6)
    return [
        (one.result.name, one.result.state.value, f"{one.place}: {one.result.message}")
        for one in run_checks(here)
    ]


class _Ahead:
    """The module time, on a host whose clock is ahead."""

    def __getattr__(self, name: str) -> Any:
        import time

        return (lambda: time.time() + 90) if name == "time" else getattr(time, name)


@pytest.mark.ranks
def test_ranks_find_what_they_do_not_have_in_common(prepared: Path, tmp_path: Path) -> None:
    cfg = config(prepared, tmp_path / "run", parallel={"expert_parallel_size": 2})
    (tmp_path / "elsewhere").mkdir()
    found = run_ranks(4, doctor_on_a_rank, cfg, tmp_path / "elsewhere")
    assert found[0] == found[3]  # all ranks have the same, and so the same exit code
    host = socket.gethostname()
    texts = {name: text for name, state, text in found[0] if state == "failed"}
    assert set(texts) == {"clocks", "data", "shared_files"}
    assert f"host {host}, rank 1: the clock of this host is 90.0 s ahead of that of rank 0" in texts["clocks"]
    assert f"host {host}, rank 2: data.dir=" in texts["data"]
    assert f"host {host}, rank 2: run_dir=" in texts["shared_files"]
    assert "another directory than on rank 0" in texts["shared_files"]
    (rates,) = [text for name, _, text in found[0] if name == "bandwidth"]
    assert "all-to-all" in rates
    assert not any((tmp_path / name / "run").exists() for name in (".", "elsewhere"))
    assert not (tmp_path / "run").exists()


def run_doctor(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.setattr(sys, "argv", ["doctor", *arguments])
    return doctor.run()


def test_the_command_prints_writes_json_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_doctor(monkeypatch, "out=result.json") == 0
    printed = capsys.readouterr().out
    assert "ok       versions" in printed
    content = json.loads(Path("result.json").read_text())
    assert content["ranks"] == 1
    disk = next(one for one in content["results"] if one["name"] == "disk_space")
    assert disk["values"]["checkpoints"] == 1
    assert disk["places"] == {socket.gethostname(): [0]}

    assert run_doctor(monkeypatch, "run_dir=/proc/run", "parallel.replicate_size=3") == 2
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert [line.split()[1] for line in failed] == ["configuration", "run_directory"]
    assert "parallel.replicate_size=3" in failed[0]
    assert f"host {socket.gethostname()}, rank 0: run_dir=/proc/run" in failed[1]
    assert run_doctor(monkeypatch, "bandwidth_seconds=-1") == 2
    assert "bandwidth_seconds=-1: must not be negative" in capsys.readouterr().err
