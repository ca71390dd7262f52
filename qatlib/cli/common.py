"""What the commands share: one message for every error of the user, and the files of the last run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qatlib.errors import QatError, StageError


@contextmanager
def one_line_errors(exit_code: int = 1) -> Iterator[None]:
    """End the process with ``exit_code`` and the message of a QatError on stderr."""
    try:
        yield
    except QatError as error:
        click.echo(str(error), err=True)
        sys.exit(exit_code)


def console() -> Console:
    """Of the terminal's width; where there is none, wide enough for tables in a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def goals() -> Any:
    """Those of params.yaml."""
    from qatlib.pipeline.config import load_config

    return load_config().goals


def read_json(path: str) -> Any:
    """A report of the last run; raises StageError QAT195 if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError("QAT195", path, f"cannot be read ({error})", "Run dvc repro first") from None
