"""wandb servers that are down, or take connections and never answer: the run does not care."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from olmoe_train.config.choices import WandbMode
from olmoe_train.config.train import LoggingConfig, WandbConfig
from olmoe_train.run import loggers
from tests.support.faults import assert_same_end, config, run
from tests.support.ranks import run_ranks

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

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if not self.path.startswith("/graphql"):
                stop.wait()
                return
            content = json.dumps({"data": ANSWER}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        stop.set()
        server.shutdown()


def point_wandb_at(port: int, scratch: Path) -> None:
    os.environ |= {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_CACHE_DIR": str(scratch),
        "WANDB_CONFIG_DIR": str(scratch),
    }
    os.environ.pop("WANDB_SERVICE", None)
    loggers.WANDB_START_S = loggers.WANDB_END_S = 4.0


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
