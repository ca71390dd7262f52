"""The ``qatlib`` command: looks at what the pipeline left in ``reports/``. It imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qatlib.errors import QatError, StageError


@click.group()
@click.version_option(package_name="qatlib")
def main() -> None:
    """From a trained float model to exact integers; the pipeline itself is run by `dvc repro`."""


@main.command()
def summary() -> None:
    """Show the accuracy of every form of the network, the worst findings and the latency estimate."""
    from qatlib.analysis.findings import Finding
    from qatlib.analysis.goals import judge
    from qatlib.analysis.views import terminal_table

    with _one_line_errors():
        document = _read("reports/summary.json")
        findings = [Finding(**{k: v for k, v in f.items() if k != "page"}) for f in _read("reports/findings.json")]
        results = judge(_goals(), document, document["stale"])
        Console().print(terminal_table(document, findings, results, "reports/profiler.html"))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def gate(as_json: bool) -> None:
    """Exit with 1 unless every goal of params.yaml is met; what is missing, stale or not finite fails."""
    from qatlib.analysis.goals import judge

    with _one_line_errors():
        document = _read("reports/summary.json")
        results = judge(_goals(), document, document["stale"])
    rows = [{"goal": r.text, "value": r.value, "met": r.met} for r in results]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            click.echo(f"{'ok    ' if row['met'] else 'FAILED'}  {row['goal']}  (is {row['value']})")
    sys.exit(0 if rows and all(row["met"] for row in rows) else 1)


def _goals() -> Any:
    from qatlib.pipeline.config import load_config

    return load_config().goals


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError("QAT195", path, f"cannot be read ({error})", "Run dvc repro first") from None


class _one_line_errors:  # noqa: N801 reads as a statement
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QatError):
            click.echo(str(error), err=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
