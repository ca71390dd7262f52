"""Commands before the first run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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


@click.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", help='"module:callable" that returns the float model.')
@click.option("--data", help='"module:callable", called with a split, that returns its Dataset.')
@click.option("--metric", help='"module:callable" that returns a metric; default accuracy.')
@click.option("--loss", help='"module:callable", the loss of QAT; default cross entropy.')
@click.option("--checkpoint", default="float.safetensors", show_default=True, help="Trained float weights.")
@click.option("--target", default="bayes-like", show_default=True, help="Accelerator: shipped name, or a file.")
def init(folder: Path, target: str, **entries: Any) -> None:
    """Lay the pipeline out in FOLDER (default: here), in a git repository: dvc.yaml, params.yaml and what they name.

    Model and data that are not named get a module to fill in. Nothing is overwritten.
    """
    with one_line_errors():
        from qatlib.scaffold import ENTRIES, Entries, init

        written = init(folder, Entries(**entries), target)
    click.echo(f"written: {', '.join(str(path) for path in written)}")
    steps = [f"fill in {ENTRIES}.py"] if written[-1].stem == ENTRIES else []
    steps += [f"put the trained weights into {entries['checkpoint']}: dvc add {entries['checkpoint']}"]
    steps += ["qatlib check", "dvc repro", "qatlib summary"]
    click.echo("\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)))
