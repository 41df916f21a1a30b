"""wandb servers that are down or never answer: the run does not care. A resumed run is one wandb run."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from olmoe_train.config.choices import WandbMode
from olmoe_train.config.train import LoggingConfig, WandbConfig
from olmoe_train.run.sinks import wandb as wandb_sink
from tests.support.faults import assert_same_end, at_step, config, metrics, run
from tests.support.ranks import RankError, run_ranks
from tests.support.wandb_server import JsonHandler, wandb_server

ONLINE = LoggingConfig(wandb=WandbConfig(mode=WandbMode.online))


@contextmanager
def dead_server() -> Iterator[int]:
    """A port that nobody listens at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def hanging_server() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


ANSWER = {
    "viewer": {"id": "1", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {}, "features": []},
    "model": {"bucket": None},
    "upsertBucket": {
        "inserted": True,
        "bucket": {
            "id": "1",
            "name": "r",
            "displayName": "r",
            "config": "{}",
            "historyLineCount": 0,
            "project": {"id": "1", "name": "p", "entity": {"id": "1", "name": "e"}},
        },
    },
}


@contextmanager
def server_that_stops_answering() -> Iterator[int]:
    """Lets a run begin; what comes after waits for ever."""
    stop = threading.Event()

    class Handler(JsonHandler):
        def do_POST(self) -> None:  # noqa: N802 - http.server calls it
            self.rfile.read(int(self.headers["Content-Length"]))
            if not self.path.startswith("/graphql"):
                stop.wait()
                return
            self.reply(json.dumps({"data": ANSWER}).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        stop.set()
        server.shutdown()


def environment(port: int, scratch: Path) -> dict[str, str]:
    return os.environ | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_CACHE_DIR": str(scratch),
        "WANDB_CONFIG_DIR": str(scratch),
    }


def point_wandb_at(port: int, scratch: Path) -> None:
    os.environ |= environment(port, scratch)
    os.environ.pop("WANDB_SERVICE", None)
    wandb_sink.WANDB_START_S = wandb_sink.WANDB_END_S = 4.0


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (dead_server, "warning: wandb could not start"),
        (hanging_server, "warning: wandb could not start"),
        (server_that_stops_answering, "warning: wandb failed ("),
    ],
)
def test_a_server_that_fails(
    data: Path, twin: Path, tmp_path: Path, server: Callable[[], AbstractContextManager[int]], said: str
) -> None:
    cfg = config(data, tmp_path / "run", logging=ONLINE)
    with server() as port:
        assert run_ranks(2, run, cfg, partial(point_wandb_at, port, tmp_path), timeout=60) == [0, 0]
    assert_same_end(tmp_path / "run", twin)
    assert said in (tmp_path / "run" / "log.txt").read_text()


# --- a run that is resumed is one wandb run -----------------------------------------------------------------


class DiedError(Exception):
    pass


def die() -> None:
    raise DiedError


def train_in_three_starts(data: Path, run_dir: Path, mode: WandbMode, port: int, scratch: Path) -> None:
    """Six steps, with a checkpoint every 2. The first start dies after step 1, the second after step 5."""
    cfg = config(
        data,
        run_dir,
        parallel={"expert_parallel_size": 1},
        checkpoint={"every": 2},
        logging=LoggingConfig(wandb=WandbConfig(mode=mode)),
    )
    server = partial(point_wandb_at, port, scratch)
    for step in (2, 6):
        with pytest.raises(RankError, match="DiedError"):
            run_ranks(1, run, cfg, server, partial(at_step, 0, step, die))
    assert run_ranks(1, run, cfg, server) == [0]


@pytest.mark.parametrize("mode", [WandbMode.online, WandbMode.offline])
def test_starts_of_one_run_directory_are_one_wandb_run(data: Path, tmp_path: Path, mode: WandbMode) -> None:
    run_dir = tmp_path / "run"
    with wandb_server() as (port, runs):
        train_in_three_starts(data, run_dir, mode, port, tmp_path)
        pieces = sorted(run_dir.glob("wandb/offline-run-*"))
        assert len(pieces) == (3 if mode is WandbMode.offline else 0)
        for piece in pieces:
            wandb = [str(Path(sys.executable).with_name("wandb")), "sync", str(piece)]
            subprocess.run(wandb, env=environment(port, tmp_path), check=True, capture_output=True)
        assert list(runs) == [json.loads((run_dir / "wandb.json").read_text())["id"]]
        (rows,) = runs.values()
    # Steps that are trained again are there twice, told apart by the number of the start.
    trained = [(row["resumes"], row["step"]) for row in rows if "train/loss" in row]
    assert trained == [(0, 1), *((1, step) for step in range(1, 6)), *((2, step) for step in (5, 6))]
    own_steps = [row["_step"] for row in rows]
    assert own_steps == sorted(set(own_steps))
    losses = [row["train/loss"] for row in rows if row["resumes"] == 2 and "train/loss" in row]
    assert losses == [record["train/loss"] for record in metrics(run_dir)[4:]]
