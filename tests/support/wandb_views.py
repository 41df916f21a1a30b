"""A wandb server of this machine that keeps workspaces and reports, as wandb-workspaces sends them."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.wandb_files import read_offline_run
from tests.support.wandb_server import VIEWER, Handler

ENTITY, PROJECT = "e", "olmoe-train"
PROJECT_EDGE = {
    "node": {
        "__typename": "Project",
        "id": "UHJvamVjdA==",
        "name": PROJECT,
        "entityName": ENTITY,
        "createdAt": "2026-01-01T00:00:00",
        "isBenchmark": False,
        "user": None,
    }
}


@dataclass
class Views:
    """What the server has, and where it is."""

    port: int = 0
    by_id: dict[str, dict[str, Any]] = field(default_factory=dict)
    inserted: list[str] = field(default_factory=list)
    """The type of each new view: project-view or runs, which is a report."""

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": "0123456789" * 4}

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [view for view in self.by_id.values() if view["type"] == kind]


class ViewsHandler(Handler):
    views: Views

    def do_POST(self) -> None:  # noqa: N802 - http.server calls it
        if self.path.startswith("/graphql"):
            super().do_POST()
        else:  # telemetry of the client
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(b"{}")

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            return {"upsertView": self.upsert(variables)}
        if "allViews" in query:
            found = [v for v in self.views.by_id.values() if v["name"] == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        if "SpecificReport" in query:
            return {"view": self.views.by_id.get(variables["reportId"])}
        if "ProjectInternalId" in query:
            return {"project": {"id": "UHJvamVjdA==", "internalId": "UHJvamVjdA=="}}
        if "GetProjects" in query:
            return {
                "models": {"pageInfo": {"hasNextPage": False, "endCursor": None}, "edges": [PROJECT_EDGE]}
            }
        if "viewer" in query.split("{")[1]:
            return {"viewer": VIEWER | {"entity": ENTITY}}
        return super().answer(query, variables)

    def upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        by_id = self.views.by_id
        same_name = [view["id"] for view in by_id.values() if view["name"] == variables["name"]]
        known = variables.get("id") or next(iter(same_name), None)
        if known is None:
            known = f"Vmlldzo{len(by_id):05}"
            self.views.inserted.append(variables["type"])
        by_id[known] = {
            **{key: variables[key] for key in ("type", "name", "displayName", "description", "spec")},
            "id": known,
            "project": {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]},
            "createdAt": "2026-01-01T00:00:00",
            "updatedAt": "2026-01-01T00:00:00",
        }
        return {"view": by_id[known], "inserted": not variables.get("id")}


@contextmanager
def views_server() -> Iterator[Views]:
    """Yield what the server has while it runs."""
    views = Views()
    handler = type("_Handler", (ViewsHandler,), {"views": views, "runs": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    views.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield views
    finally:
        server.shutdown()
        server.server_close()


def spec_of(view: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(view["spec"]))


def panel_names(spec: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The keys, and the regular expressions, of all panels of a workspace."""
    keys: set[str] = set()
    patterns: set[str] = set()
    for section in spec["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            keys |= {*config.get("metrics", []), *config.get("mediaKeys", [])}
            keys |= {config["xAxis"]} if "xAxis" in config else set()
            patterns |= {config["metricRegex"]} if "metricRegex" in config else set()
            if "panel2Config" in config:  # a table
                keys.add(config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
    return keys, patterns


def uncovered(spec: dict[str, Any], logged: set[str]) -> tuple[set[str], set[str]]:
    """What is wrong with a workspace of a run.

    Args:
        spec: The specification of the workspace.
        logged: Names that the run has in wandb.

    Returns:
        (Keys and patterns of panels that the run has not logged, names that no panel shows.)
    """
    keys, patterns = panel_names(spec)
    matched = {pattern: {name for name in logged if re.search(pattern, name)} for pattern in patterns}
    empty = {pattern for pattern, names in matched.items() if not names}
    return (keys - logged) | empty, logged - keys - set().union(*matched.values())


def names_in_wandb(run_dir: Path) -> set[str]:
    """The names under which the offline pieces of a run have values, without wandb's own.

    A picture, a histogram or a table is several values: router/load_map._type and others. The name of a task
    may have a dot of its own.
    """
    names = {
        name
        for piece in run_dir.glob("wandb/offline-run-*/*.wandb")
        for row in read_offline_run(piece).history
        for name in row
        if not name.startswith("_")
    }
    rich = {name.removesuffix("._type") for name in names if name.endswith("._type")}
    return rich | {name for name in names if not any(name.startswith(f"{one}.") for one in rich)}
