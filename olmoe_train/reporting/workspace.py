"""A W&B workspace in code: sections and panels for what runs have logged, and the runs that they show.

https://github.com/wandb/wandb-workspaces builds the specification. Ids of panels depend on the section and
the title only. So a change that someone made to a panel in the browser survives an update.
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from olmoe_train.config.choices import XAxis
from olmoe_train.reporting.panels import COMPARISON, Kind, Panel, panels_by_section
from olmoe_train.reporting.wandb_runs import WandbRun
from olmoe_train.utils.errors import UserError

if TYPE_CHECKING:  # an extra, and importing it takes a second
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

OPEN = (COMPARISON, "Loss", "Router", "Experts")
"""Sections that are unfolded when the workspace is opened."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
"""Colors of the runs, in the order in which they are given: the palette of Okabe and Ito, which color-blind
people can tell apart."""


def require_package() -> None:
    """Check that wandb-workspaces is installed.

    Raises:
        UserError: It is not; the message has the command that installs it.
    """
    try:
        import wandb_workspaces  # noqa: F401 - whether it can be imported is the question
    except ImportError as error:
        raise UserError(
            f'olmoe dashboard needs wandb-workspaces ({error}): pip install "olmoe-train[dashboard]"'
        ) from error


def check_name(name: str) -> None:
    """Check the name that a user gives to a workspace and its report.

    Raises:
        UserError: W&B does not take the name.
    """
    if refused := sorted({character for character in name if _is_refused(character)}):
        raise UserError(
            f"name={name!r}: W&B does not take {' '.join(refused)} in a name or in the address made of it; "
            "leave it out"
        )
    if not 0 < len(name) <= 128:
        raise UserError(f"name={name!r} has {len(name)} characters; W&B takes 1 to 128")


def default_name(runs: Sequence[WandbRun]) -> str:
    """The names of the runs, without the characters that W&B does not take in a name."""
    name = ", ".join(run.name for run in runs)
    return "".join("-" if _is_refused(character) else character for character in f"olmoe: {name}")[:128]


def _is_refused(character: str) -> bool:
    """Whether wandb_workspaces/utils/validators.py refuses the character, or an address gives it a meaning.

    The former are emojis, and also + = < > | ~ ^ ` $.
    """
    return character in "/?#%\\" or unicodedata.category(character).startswith(("So", "Sk", "Sm", "Sc", "Cs"))


def build_workspace(
    runs: Sequence[WandbRun], entity: str, project: str, name: str, x_axis: XAxis
) -> "ws.Workspace":
    """Build the workspace of one run or of several. No network is needed.

    Args:
        runs: The runs that it shows. The first one is the baseline of a comparison.
        entity: User or team.
        project: Project that has the runs.
        name: What people call the workspace.
        x_axis: Horizontal axis of the charts.
    """
    import wandb_workspaces.workspaces as ws

    several = len(runs) > 1
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(
                name=section, panels=[wandb_panel(panel, x_axis) for panel in panels], is_open=section in OPEN
            )
            for section, panels in run_panels(runs, x_axis).items()
        ],
        settings=ws.WorkspaceSettings(x_axis=x_axis.value),
        runset_settings=ws.RunsetSettings(
            filters=only_runs(runs),
            run_settings={run.id: ws.RunSettings(color=color) for run, color in colored(runs)},
            baseline_run=runs[0].id if several else None,
            pinned_runs=[run.id for run in runs[:20]] if several else [],  # W&B pins at most 20
        ),
        auto_generate_panels=False,
    )


def run_panels(runs: Sequence[WandbRun], x_axis: XAxis) -> dict[str, list[Panel]]:
    """The panels of each section for what any of the runs has logged."""
    numbers = {name for run in runs for name in run.numbers}
    lists = {name for run in runs for name in run.lists}
    return panels_by_section(numbers, lists, x_axis, compares=len(runs) > 1)


def only_runs(runs: Sequence[WandbRun]) -> Any:
    """The filter of W&B that leaves these runs only."""
    from wandb_workspaces import expr

    return expr.And(expr.Metric("ID").isin([run.id for run in runs]))


def colored(runs: Sequence[WandbRun]) -> list[tuple[WandbRun, str]]:
    """Each run with its color."""
    return [(run, COLORS[number % len(COLORS)]) for number, run in enumerate(runs)]


def wandb_panel(panel: Panel, x_axis: XAxis) -> "wr.Panel":
    """A panel in the words of W&B."""
    import wandb_workspaces.reports.v2 as wr

    made: Any
    if panel.kind is Kind.run_differences:
        made = wr.RunComparer(diff_only="split")
    elif panel.kind is Kind.pictures:
        made = wr.MediaBrowser(
            title=panel.title, media_keys=list(panel.keys), num_columns=1, gallery_axis="step"
        )
    elif panel.kind is Kind.table:
        made = wr.WeavePanelSummaryTable(table_name=panel.keys[0])
    else:  # W&B draws a histogram's history as a heat map in a panel of lines
        made = wr.LinePlot(
            title=panel.title,
            x=x_axis.value,
            y=list(panel.keys),
            metric_regex=panel.pattern,
            title_y=panel.y_label,
        )
    made._id = stable_id(panel.section, panel.title)
    return made


def stable_id(*parts: str) -> str:
    """An id as W&B has them, 11 letters and digits, that depends on the parts only."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:11]


def workspace_json(workspace: "ws.Workspace") -> dict[str, Any]:
    """What W&B stores of a workspace: entity, project, name, and the specification of the view."""
    view = workspace._to_model()  # the package has no public form of the specification
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": view.entity, "project": view.project, "name": view.display_name, "spec": spec}
