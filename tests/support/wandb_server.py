"""A wandb server of this machine: it keeps the history of runs and lets them resume."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

History = list[dict[str, Any]]
PROJECT = {"id": "1", "name": "p", "entity": {"id": "1", "name": "e"}}
VIEWER = {"id": "1", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}


class JsonHandler(BaseHTTPRequestHandler):
    """Answers with JSON, and logs nothing."""

    def reply(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Handler(JsonHandler):
    protocol_version = "HTTP/1.1"
    runs: dict[str, History]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            content = gzip.decompress(content)
        answer: dict[str, Any] = {}
        if self.path.startswith("/graphql"):
            body = json.loads(content)
            answer = {"data": self.answer(body["query"], body.get("variables") or {})}
        elif stream := re.fullmatch(r"/files/e/p/(.+)/file_stream", self.path):
            add_history(self.runs[stream[1]], json.loads(content).get("files") or {})
        self.reply(json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(b"")

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name", "")
        if "upsertBucket" in query:
            inserted = name not in self.runs
            history = self.runs.setdefault(name, [])
            return {"upsertBucket": {"inserted": inserted, "bucket": bucket(name, history)}}
        if "createRunFiles" in query:
            url = f"http://{self.headers['Host']}/upload"
            files = [{"name": file, "uploadUrl": url} for file in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            found = bucket(name, self.runs[name]) if name in self.runs else None
            return {"model": {**PROJECT, "bucket": found}}
        return {"viewer": VIEWER, "serverInfo": {"cliVersionInfo": {}, "features": []}}


def bucket(name: str, history: History) -> dict[str, Any]:
    return {
        "id": f"id-{name}",
        "name": name,
        "displayName": name,
        "config": "{}",
        "summaryMetrics": "{}",
        "historyLineCount": len(history),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in history[-1:]]),
        "eventsTail": "[]",
        "tags": [],
        "project": PROJECT,
    }


def add_history(rows: History, files: dict[str, Any]) -> None:
    new = files.get("wandb-history.jsonl", {"offset": len(rows), "content": []})
    values = [json.loads(row) for row in new["content"]]
    rows[new["offset"] : new["offset"] + len(values)] = values


@contextmanager
def wandb_server() -> Iterator[tuple[int, dict[str, History]]]:
    """Yield its port, and the rows of each run by the id of the run, placed where the client says."""
    runs: dict[str, History] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"runs": runs}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, runs
    finally:
        server.shutdown()
        server.server_close()
