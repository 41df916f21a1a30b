"""Make or update the W&B workspace of a run, or of several runs to compare, from what they have logged.

With report=true there is a W&B Report, too. A second call updates both. --dry-run writes their JSON and
needs neither an API key nor a network.
"""

import json
import sys
from pathlib import Path
from typing import Any

from olmoe_train.cli.app import run_verb
from olmoe_train.cli.sources import collect_sources
from olmoe_train.config.verbs import DashboardConfig
from olmoe_train.reporting.saved_views import (
    SavedViews,
    default_entity,
    require_key,
    save_report,
    save_workspace,
)
from olmoe_train.reporting.wandb_report import build_report, report_json
from olmoe_train.reporting.wandb_runs import common_project, entity_without_network, read_wandb_runs
from olmoe_train.reporting.workspace import (
    build_workspace,
    check_name,
    default_name,
    require_package,
    workspace_json,
)
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_write_text

DRY_RUN = "--dry-run"


def main(cfg: DashboardConfig) -> None:
    """Build the workspace and the report; save them, or write their JSON."""
    runs = read_wandb_runs(cfg.source)
    project = cfg.project or common_project(runs)
    name = cfg.name if cfg.name is not None else default_name(runs)
    check_name(name)
    require_package()
    entity = entity_without_network(cfg.entity, runs)
    if not cfg.dry_run:
        require_key()
        entity = entity or default_entity()
    entity = entity or ""
    workspace = build_workspace(runs, entity, project, name, cfg.x_axis)
    report = build_report(runs, entity, project, name, cfg.x_axis, cfg.dry_run) if cfg.report else None
    out = cfg.out or (str(runs[0].directory / "dashboard.json") if cfg.dry_run else None)
    if out is not None:
        content = {"workspace": workspace_json(workspace)}
        write_json(Path(out), content | ({"report": report_json(report)} if report else {}))
        print(f"JSON        {out}")
    panels = sum(len(section.panels) for section in workspace.sections)
    print(f"sections    {', '.join(section.name for section in workspace.sections)}; {panels} panels")
    if cfg.dry_run:
        return
    saved = SavedViews(runs, entity, project)
    print(f"workspace   {save_workspace(workspace, saved)}")
    if report is not None:
        print(f"report      {save_report(report, saved)}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        atomic_write_text(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"out={path} cannot be written: {error}") from error


def run() -> int:
    """Run `olmoe dashboard` with the command line; returns the exit code."""
    arguments = ["dry_run=true" if argument == DRY_RUN else argument for argument in sys.argv[1:]]
    sys.argv[1:] = collect_sources(arguments)
    return run_verb("dashboard", DashboardConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
