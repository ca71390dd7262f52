"""Commands before the first run."""

from __future__ import annotations

import sys

import click

from qatlib.cli.common import console, one_line_errors


@click.command("check")
@click.argument("part", required=False, type=click.Choice(["entries", "shared", "fuse", "qconfig", "target"]))
def check_command(part: str | None) -> None:
    """Look at params.yaml and the model before calibration, all or one PART; exit 1 on errors.

    One sample of the calib split is read, for its shapes; nothing is written.
    """
    with one_line_errors():
        from qatlib.analysis.check import check, show
        from qatlib.pipeline.config import load_config
        from qatlib.pipeline.project import Project

        sections = check(Project(load_config()), part)
    console().print(show(sections))
    sys.exit(1 if any(section.errors for section in sections) else 0)
