"""The live form of a report: a server on 127.0.0.1 that sends the page, and its data again when a run has
grown.

The server answers GET only, and only under the names of this machine's loopback address: a page of another
site whose name resolves to 127.0.0.1 (DNS rebinding) is refused.
"""

import errno
import gzip
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from olmoe_train.reporting.html_report import embedded, payload, render
from olmoe_train.reporting.run_data import RunReader
from olmoe_train.utils.errors import UserError

ADDRESS = "127.0.0.1"


class LiveReport:
    """The newest data of the runs. Requests come in threads, one at a time reads the files."""

    def __init__(self, readers: Sequence[RunReader]) -> None:
        self._readers = readers
        self._lock = threading.Lock()
        self._version, self._state = 0, ""
        self._json = b""

    def page(self) -> bytes:
        """The HTML document with the newest data."""
        with self._lock:
            self._read()
            return render(self._readers, live=True).encode()

    def data(self) -> tuple[str, bytes]:
        """(Tag of the version, data as JSON)."""
        with self._lock:
            changed = self._read()
            if changed or not self._json:
                self._version += 1
                self._json = embedded(payload(self._readers)).encode()
            return f'"{self._version}"', self._json

    def _read(self) -> bool:
        # All readers are updated, also those after one that has changed.
        grown = [reader.update() for reader in self._readers if reader.metrics.is_file()]
        state = repr([reader.status() for reader in self._readers])
        changed, self._state = any(grown) or state != self._state, state
        if changed:
            self._json = b""
        return changed


def make_server(readers: Sequence[RunReader], port: int) -> ThreadingHTTPServer:
    """A server of the live report that is bound and not yet running.

    Raises:
        UserError: The port is in use or not allowed.
    """
    report = LiveReport(readers)
    names: list[str] = []  # known once the port is

    class Handler(BaseHTTPRequestHandler):
        server_version = "olmoe"
        sys_version = ""
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.headers.get("Host") not in names:
                self._answer(403, b"wrong host\n", "text/plain")
            elif self.path == "/":
                self._answer(200, report.page(), "text/html; charset=utf-8")
            elif self.path == "/data.json":
                tag, data = report.data()
                if self.headers.get("If-None-Match") == tag:
                    self._answer(304, b"", "application/json", tag)
                else:
                    self._answer(200, data, "application/json", tag)
            else:
                self._answer(404, b"not found\n", "text/plain")

        def _answer(self, code: int, body: bytes, kind: str, tag: str = "") -> None:
            packed = "gzip" in self.headers.get("Accept-Encoding", "") and len(body) > 1000
            if packed:
                body = gzip.compress(body, 1)
            self.send_response(code)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
            headers |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
            headers |= {"ETag": tag} if tag else {}
            headers |= {"Content-Encoding": "gzip"} if packed else {}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """The console is for the address alone."""

    try:
        server = ThreadingHTTPServer((ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is in use" if in_use else f"cannot be opened ({error})"
        raise UserError(f"port={port} {reason}: choose another, or 0 for any free one") from None
    server.daemon_threads = True
    names += [f"{name}:{server.server_port}" for name in (ADDRESS, "localhost")]
    return server


def serve(readers: Sequence[RunReader], port: int) -> None:
    """Serve the live report until Ctrl-C, and print its address."""
    with make_server(readers, port) as server:
        print(f"the report is on http://{ADDRESS}:{server.server_port}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
