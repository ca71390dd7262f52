"""The ``qatlib`` command: looks at what the pipeline left in ``reports/``, and compares device dumps.

`explain` imports no torch.
"""

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
    from qatlib.analysis.findings import read_findings
    from qatlib.analysis.goals import judge
    from qatlib.analysis.views import terminal_table

    with _one_line_errors():
        document = _read("reports/summary.json")
        results = judge(_goals(), document, document["stale"])
        Console().print(terminal_table(document, read_findings(), results, "reports/profiler.html"))


@main.command()
@click.argument("code")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the page, and what was found.")
def explain(code: str, as_json: bool) -> None:
    """Show what a finding or error CODE such as QAT031 means, and what of it the last run found."""
    from qatlib.analysis.explain import explanation, full_code, page
    from qatlib.analysis.findings import FINDINGS, Found, of_code, read_findings

    with _one_line_errors():
        text = page(code)
        found = of_code(read_findings() if Path(FINDINGS).exists() else Found(), full_code(code))
    if as_json:
        click.echo(json.dumps({"code": full_code(code), "page": text, **found.document()}))
    else:
        Console().print(explanation(text, found))


@main.command()
@click.argument("code", required=False)
@click.option("--module", help="Module of the finding, where there are several of that code.")
@click.option("--dry-run", is_flag=True, help="Show the change and write nothing.")
def apply(code: str | None, module: str | None, dry_run: bool) -> None:
    """Write the edit of finding CODE into params.yaml, keeping comments and layout; print the diff and what to run.

    Without CODE it is the first finding that has an edit which is not there yet.
    """
    from qatlib.analysis.apply import finding_of, first_change, plan
    from qatlib.analysis.explain import full_code
    from qatlib.analysis.findings import read_findings

    if module and not code:
        raise click.UsageError("--module needs the code of the finding")
    with _one_line_errors():
        if code is None:
            finding, change = first_change(read_findings())
            click.echo(f"{finding.code} {finding.module}: {finding.title}")
        else:
            finding = finding_of(read_findings(), full_code(code), module)
            change = plan(finding)
        if not change.diff:
            click.echo("params.yaml holds this edit already; run: dvc repro")
            return
        click.echo(change.diff)
        if not dry_run:
            change.write()
    click.echo(f"try it without the change: {finding.command}" if dry_run else "written; run next: dvc repro")


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


@main.command("check")
@click.argument("part", required=False, type=click.Choice(["entries", "shared", "fuse", "qconfig", "target"]))
def check_command(part: str | None) -> None:
    """Look at params.yaml and the model before calibration, all or one PART; exit 1 on errors.

    One sample of the calib split is read, for its shapes; nothing is written.
    """
    with _one_line_errors():
        from qatlib.analysis.check import check, show
        from qatlib.pipeline.config import load_config
        from qatlib.pipeline.project import Project

        sections = check(Project(load_config()), part)
    Console(width=None if sys.stdout.isatty() else 160).print(show(sections))
    sys.exit(1 if any(section.errors for section in sections) else 0)


@main.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--inputs", "files", multiple=True, required=True, type=click.Path(path_type=Path),
              help=".npy of one input, batch first; once per input of the Program, in its order.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def golden(program: Path, files: tuple[Path, ...], out: Path) -> None:
    """Run the Program in folder PROGRAM and write its inputs and every op's integers."""
    from qatlib.golden.vectors import read_inputs, write_golden
    from qatlib.program import Program

    with _one_line_errors(2):
        write_golden(Program.load(program), read_inputs(files), out)


@main.command("compare-dump")
@click.argument("dump", type=click.Path(path_type=Path))
@click.option("--golden", "golden_folder", required=True, type=click.Path(path_type=Path), help="Golden vectors.")
@click.option("--map", "map_file", type=click.Path(path_type=Path), help="YAML or JSON: device name to golden name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def compare_dump_command(dump: Path, golden_folder: Path, map_file: Path | None, as_json: bool) -> None:
    """Compare tensors that a device wrote to DUMP with golden vectors; exit 0 equal, 1 differs, 2 error."""
    from qatlib.golden import compare_dump
    from qatlib.golden.dump import load_map
    from qatlib.golden.view import show

    with _one_line_errors(2):
        comparison = compare_dump(golden_folder, dump, load_map(map_file) if map_file else None)
    if as_json:
        click.echo(json.dumps(comparison.document(), indent=2, allow_nan=False))
    else:
        show(comparison)
    sys.exit(0 if comparison.equal else 1)


@main.command()
@click.argument("program_dir", type=click.Path())
@click.argument("path", type=click.Path())
@click.option("--flavour", type=click.Choice(["integer", "qdq"]), default="integer", show_default=True)
@click.option("--opset", type=int, help="ONNX operator set; the default is stated in the output.")
@click.option("--inputs", "files", multiple=True, type=click.Path(path_type=Path),
              help=".npy of one input to compare on, batch first; once per input, in their order.")  # fmt: skip
def export(program_dir: str, path: str, flavour: Any, opset: int | None, files: tuple[Path, ...]) -> None:
    """Write the Program in PROGRAM_DIR to PATH as ONNX, and run it beside the emulator on random inputs, or on yours.

    Exits with 1 if the integer flavour differs from the emulator anywhere but behind a float island.
    """
    with _one_line_errors():
        from qatlib.export.trial import try_document
        from qatlib.golden.vectors import read_inputs

        lines, good = try_document(program_dir, path, flavour, opset, read_inputs(files))
        for line in lines:
            click.echo(line)
    sys.exit(0 if good else 1)


@main.command()
@click.option("--images", type=click.IntRange(min=1), help="Validation images to look at.")
@click.option("--top", type=click.IntRange(min=1), help="Measure only that many ops, ranked by gradient.")
@click.option("--group", "groups", multiple=True, help="Module to measure as a whole; give it once per module.")
@click.option("--metric/--no-metric", default=None, help="Score every trial by the metric, too.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the whole result as CSV.")
def sensitivity(out: Path | None, **options: Any) -> None:
    """Measure what each op costs at the output of the model that ships, by analyze.sensitivity of params.yaml.

    Reads the artifacts of the pipeline; options take the place of settings.
    """
    with _one_line_errors():
        from qatlib.analysis.study import study_of, write_study
        from qatlib.analysis.study_view import show
        from qatlib.pipeline.config import SensitivityParams, load_config
        from qatlib.pipeline.project import Project

        config = load_config()
        given = {key: value for key, value in options.items() if value not in (None, ())}
        section = (config.analyze.sensitivity or SensitivityParams()).model_copy(update=given)
        study = study_of(Project(config), section)
        if out is not None:
            write_study(study, out)
        show(study)


def _goals() -> Any:
    from qatlib.pipeline.config import load_config

    return load_config().goals


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError("QAT195", path, f"cannot be read ({error})", "Run dvc repro first") from None


class _one_line_errors:  # noqa: N801 reads as a statement
    def __init__(self, exit_code: int = 1) -> None:
        self._exit_code = exit_code

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QatError):
            click.echo(str(error), err=True)
            sys.exit(self._exit_code)


if __name__ == "__main__":
    main()
