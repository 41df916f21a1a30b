"""Saving a workspace and a report in W&B, once: the second time updates what is there.

RUN/wandb_views.json holds the addresses, in every run directory that is shown.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmoe_train.reporting.panels import ALL_SECTIONS
from olmoe_train.reporting.wandb_runs import WandbRun
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_write_text

if TYPE_CHECKING:  # an extra, and importing it takes a second
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

FILE = "wandb_views.json"
TIMEOUT_S = 20
SETTLE_S = 0.5
"""Time for wandb-core to answer a request that was given up. If this process closes its connection before the
answer, wandb-core closes its end unread, and each of the two then waits for the other to exit."""
WITHOUT_NETWORK = "--dry-run writes the JSON without a network"


class View(Enum):
    """What W&B keeps at an address."""

    workspace = "workspace"
    report = "report"


@dataclass(frozen=True)
class SavedViews:
    """The addresses of what was saved for a set of runs in a project of W&B."""

    runs: Sequence[WandbRun]
    entity: str
    project: str

    @property
    def key(self) -> str:
        return f"{self.entity}/{self.project}: {' '.join(sorted(run.id for run in self.runs))}"

    @property
    def _files(self) -> list[Path]:
        return [run.directory / FILE for run in self.runs]

    def url(self, view: View) -> str | None:
        """The address at which it was saved before; None: it was not."""
        found = [_read(path).get(self.key, {}).get(view.value) for path in self._files]
        return next((str(url) for url in found if url), None)

    def keep(self, view: View, url: str) -> None:
        """Write the address into the run directories."""
        for path in self._files:
            content = _read(path)
            content[self.key] = content.get(self.key, {}) | {view.value: url}
            atomic_write_text(path, json.dumps(content, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): restore it; if you delete it, new views are made"
        ) from error


def save_workspace(workspace: "ws.Workspace", saved: SavedViews) -> str:
    """Save a workspace, in place of the one that was saved for these runs if there is one.

    Sections that someone added in the browser stay, after the others.

    Returns:
        The address.

    Raises:
        UserError: W&B cannot be reached, or refuses.
    """
    import wandb_workspaces.workspaces as ws

    with explained_errors():
        before = _loaded(ws.Workspace, saved.url(View.workspace))
        if before is not None:
            ids = {section.name: section._id for section in before.sections}
            for section in workspace.sections:  # W&B knows by them where someone moved a panel
                section._id = ids.get(section.name)
            added = [section for section in before.sections if section.name not in ALL_SECTIONS]
            before.name = workspace.name
            before.sections = [*workspace.sections, *added]
            before.settings = workspace.settings
            before.runset_settings = workspace.runset_settings
            workspace = before
        workspace.save()
        url = str(workspace.url)
    saved.keep(View.workspace, url)
    return url


def save_report(report: "wr.Report", saved: SavedViews) -> str:
    """Save a report, in place of the one that was saved for these runs if there is one.

    Returns:
        The address.

    Raises:
        UserError: W&B cannot be reached, or refuses.
    """
    import wandb_workspaces.reports.v2 as wr

    with explained_errors():
        before = _loaded(wr.Report, saved.url(View.report))
        if before is not None:
            report.id = before.id
        report.save()
        url = str(report.url)
    saved.keep(View.report, url)
    return url


def default_entity() -> str:
    """The account's default user or team, asked of W&B.

    Raises:
        UserError: W&B cannot be reached, or does not know the account.
    """
    import wandb

    with explained_errors():
        entity = wandb.Api(timeout=TIMEOUT_S).default_entity
    if not entity:
        raise UserError("W&B names no default entity for this account: give entity=NAME")
    return str(entity)


def require_key() -> None:
    """Check that wandb has an API key, without a network.

    Raises:
        UserError: It has none; the message has the ways out.
    """
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # it would print each address a second time
    if not wandb.login(prompt=False, verify=False):
        raise UserError(f"W&B has no API key: set WANDB_API_KEY or call `wandb login`. {WITHOUT_NETWORK}")


@contextmanager
def explained_errors() -> Iterator[None]:
    """Turn what wandb and wandb-workspaces raise into a UserError."""
    import wandb
    from wandb_workspaces.workspaces.errors import SpecVersionError, UnsupportedViewError

    try:
        yield
    except (wandb.errors.Error, ValueError, SpecVersionError, UnsupportedViewError) as error:
        time.sleep(SETTLE_S)
        server = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
        raise UserError(
            f"W&B at {server} did not save it: {str(error).rstrip('.')}. Check the network, WANDB_API_KEY, "
            f"entity and project (a run that was logged offline needs `wandb sync` first). {WITHOUT_NETWORK}"
        ) from error


def _loaded(kind: Any, url: str | None) -> Any:
    """The workspace or report at an address; None: there is no address, or nothing is there any more."""
    if url is None:
        return None
    try:
        return kind.from_url(url)
    except (ValueError, TypeError) as error:
        if "not found" not in str(error) and "NoneType" not in str(error):  # what from_url raises for None
            raise
        print(f"{url} is no longer there: saving a new one")
        return None
