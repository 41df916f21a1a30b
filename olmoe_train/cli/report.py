"""Write one HTML file about one or more runs: losses, router, experts, speed, data, configuration. It needs
no network, and metrics.jsonl is enough, so that a crashed run has a report, too. serve=true follows a running
training.
"""

import logging
import sys
from pathlib import Path

from olmoe_train.cli.app import run_verb
from olmoe_train.cli.sources import collect_sources
from olmoe_train.config.verbs import ReportConfig
from olmoe_train.reporting.html_report import render
from olmoe_train.reporting.run_data import RunReader
from olmoe_train.reporting.serve import serve
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import write_out

log = logging.getLogger(__name__)
REPORT = "report.html"


def main(cfg: ReportConfig) -> None:
    """Write the report and print where it is, or serve it."""
    if not cfg.source:
        raise UserError("source=[] names no run: give source=RUN_DIR")
    readers = [RunReader(source) for source in cfg.source]
    for reader in readers:
        reader.update()
        if not reader.data.clock.steps:
            raise UserError(
                f"{reader.metrics}: no records yet; the first comes after trainer.log_every steps"
            )
    if cfg.serve:
        if cfg.out is not None:
            log.warning("warning: out=%s has no effect: serve=true writes no file", cfg.out)
        serve(readers, cfg.port)
        return
    if cfg.port != ReportConfig.port:
        log.warning("warning: port=%s has no effect: serve=false", cfg.port)
    out = Path(cfg.out).expanduser() if cfg.out is not None else readers[0].directory / REPORT
    page = render(readers)
    write(out, page)
    for reader in readers:
        if reader.data.bad_lines:
            lines = ", ".join(map(str, reader.data.bad_lines[:10]))
            log.warning("warning: %s: left out lines that hold no record: %s", reader.metrics, lines)
    print(f"report  {out.resolve()} ({len(page.encode()) / 1e6:.2f} MB): open it in a browser")


def write(out: Path, page: str) -> None:
    """Write the file, and its directory if that is missing.

    Raises:
        UserError: `out` is a directory, or cannot be written.
    """
    if out.is_dir():
        raise UserError(f"out={out} is a directory: name a file, such as {out / REPORT}")
    write_out(out, page)


def run() -> int:
    """Run `olmoe report` with the command line; returns the exit code."""
    sys.argv[1:] = collect_sources(sys.argv[1:])
    return run_verb("report", ReportConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
