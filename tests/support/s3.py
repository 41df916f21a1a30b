"""A local S3 over HTTP (moto's server) that fails on request: errors 5xx, resets, cut and slow answers."""

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from olmoe_train.utils import object_store

BUCKET = "s3://bucket"
KEY_ID, SECRET = "AKIATESTTESTTESTTEST", "secret/of+the/tests0123456789abcdefghij"
Start = Callable[..., Any]


@dataclass
class Fault:
    """What becomes of the next requests that match."""

    kind: str
    """500, 503 and 403: the answer's status. reset: the connection. cut: half of the body. slow: 0.1 s before
    each quarter of the body. stall: 2 s before the body."""
    matching: str
    """Regular expression that is searched for in "METHOD /bucket/key"."""
    times: int = 1


@dataclass
class FaultyS3:
    """The WSGI application: moto's, behind the faults."""

    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """METHOD /bucket/key of each request so far."""
    url: str = ""

    def __post_init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        with self._lock:
            self.requests.append(line)
            fault = next((one for one in self.faults if one.times and re.search(one.matching, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is None:
            return self._moto(environ, start)
        if fault.kind in ("stall", "slow", "cut"):
            return _disturbed(b"".join(self._moto(environ, start)), fault.kind, environ["werkzeug.socket"])
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault.kind.isdecimal():
            code = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}[fault.kind]
            start(f"{fault.kind} {code}", [("Content-Type", "application/xml")])
            message = f"injected for {KEY_ID} {SECRET}"  # a server may say so
            return [f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()]
        connection: socket.socket = environ["werkzeug.socket"]
        assert fault.kind == "reset"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        return []

    def count(self, matching: str) -> int:
        """Number of requests so far that match."""
        return sum(re.search(matching, line) is not None for line in self.requests)


def _disturbed(body: bytes, kind: str, connection: socket.socket) -> Iterator[bytes]:
    if kind == "stall":
        time.sleep(2)
        yield body
    elif kind == "slow":
        quarter = -(-len(body) // 4)
        for first in range(0, len(body), quarter):
            time.sleep(0.1)
            yield body[first : first + quarter]
    else:
        assert kind == "cut"
        yield body[: len(body) // 2]
        connection.shutdown(socket.SHUT_RDWR)


class _Quiet(WSGIRequestHandler):
    """Without a line in the log per request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextmanager
def faulty_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A server with an empty bucket; the environment names it, with credentials, and retries are quick."""
    application = FaultyS3()
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    application.url = f"http://127.0.0.1:{server.port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", application.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(object_store, "REQUEST_ATTEMPTS", 1)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(BUCKET)
    application.requests.clear()
    try:
        yield application
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
        _forget_buckets()


def _forget_buckets() -> None:
    from moto.s3.models import s3_backends

    for account in s3_backends.values():
        for backend in account.values():
            backend.reset()
