"""A W&B Report of one run or a comparison: a table of the runs, then the panels of each section."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from olmoe_train.config.choices import XAxis
from olmoe_train.reporting.wandb_runs import WandbRun
from olmoe_train.reporting.workspace import colored, only_runs, run_panels, stable_id, wandb_panel

if TYPE_CHECKING:  # an extra, and importing it takes a second
    import wandb_workspaces.reports.v2 as wr

PANEL_WIDTH, PANEL_HEIGHT = 12, 8
"""In the units of W&B's grid, which is 24 wide."""
HEAD = (
    "Run",
    "Wandb id",
    "Layers",
    "Experts per layer",
    "Experts per token",
    "Steps",
    "Tokens",
    "Least validation loss",
    "Tokens per second, last",
)


def build_report(
    runs: Sequence[WandbRun], entity: str, project: str, title: str, x_axis: XAxis, offline: bool
) -> "wr.Report":
    """Build the report of one run or of several.

    Args:
        runs: The runs that it shows.
        entity: User or team.
        project: Project that has the runs.
        title: Title of the report.
        x_axis: Horizontal axis of the charts.
        offline: Leave the project out of the grids of panels, because W&B's server knows its number.
    """
    import wandb_workspaces.reports.v2 as wr

    def grid(section: str, panels: list[Any]) -> wr.PanelGrid:
        runset = wr.Runset(
            entity="" if offline else entity,
            project="" if offline else project,
            name=", ".join(run.name for run in runs),
            filters=only_runs(runs),
            run_settings={run.id: wr.RunSettings(color=color) for run, color in colored(runs)},
        )
        runset._id = stable_id("runs", section)
        for panel in panels:  # PanelGrid gives each one its place
            panel.layout = wr.Layout(w=PANEL_WIDTH, h=PANEL_HEIGHT)
        return wr.PanelGrid(runsets=[runset], panels=panels)

    blocks: list[Any] = [wr.TableOfContents(), wr.H1("Runs"), wr.MarkdownBlock(table_of_runs(runs))]
    for section, panels in run_panels(runs, x_axis).items():
        blocks += [wr.H1(section), grid(section, [wandb_panel(panel, x_axis) for panel in panels])]
    return wr.Report(
        entity=entity,
        project=project,
        title=title,
        description="Made by olmoe dashboard from metrics.jsonl.",
        blocks=blocks,
        width="fluid",
    )


def report_json(report: "wr.Report") -> dict[str, Any]:
    """What W&B stores of a report: entity, project, title, and the specification."""
    spec = report._to_model().spec  # the package has no public form of the specification
    return {
        "entity": report.entity,
        "project": report.project,
        "title": report.title,
        "spec": json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def table_of_runs(runs: Sequence[WandbRun]) -> str:
    """The runs as a Markdown table: architecture, length, and what came of it."""
    rows: list[tuple[str, ...]] = [HEAD]
    for run in runs:
        model = run.config.get("model") or {}
        validation = [
            record["eval/validation/loss"]
            for record in run.records
            if record.get("eval/validation/loss") is not None
        ]
        speeds = [r["perf/tokens_per_second"] for r in run.records if r.get("perf/tokens_per_second")]
        last = run.records[-1]
        rows.append(
            (
                run.name.replace("|", "\\|"),
                run.id,
                *(
                    str(model.get(key, ""))
                    for key in ("num_hidden_layers", "num_experts", "num_experts_per_tok")
                ),
                f"{last['step']:,}",
                f"{last.get('tokens', 0):,}",
                f"{min(validation):.4f}" if validation else "",
                f"{speeds[-1]:,.0f}" if speeds else "",
            )
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
