"""Commands on what the last run left in ``reports/``, and on the artifacts behind it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qatlib.cli.common import console, goals, one_line_errors, read_json


@click.command()
def summary() -> None:
    """Show the accuracy of every form of the network, the worst findings and the latency estimate."""
    with one_line_errors():
        show_summary()


@click.command()
@click.argument("code")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the page, and what was found.")
def explain(code: str, as_json: bool) -> None:
    """Show what a finding or error CODE such as QAT031 means, and what of it the last run found."""
    from qatlib.analysis.explain import explanation, full_code, page
    from qatlib.analysis.findings import FINDINGS, Found, of_code, read_findings

    with one_line_errors():
        text = page(code)
        found = of_code(read_findings() if Path(FINDINGS).exists() else Found(), full_code(code))
    if as_json:
        click.echo(json.dumps({"code": full_code(code), "page": text, **found.document()}))
    else:
        Console().print(explanation(text, found))


@click.command()
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
    with one_line_errors():
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


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def gate(as_json: bool) -> None:
    """Exit with 1 unless every goal of params.yaml is met; what is missing, stale or not finite fails."""
    from qatlib.analysis.goals import judge

    with one_line_errors():
        document = read_json("reports/summary.json")
        results = judge(goals(), document, document["stale"])
    rows = [{"goal": r.text, "value": r.value, "met": r.met} for r in results]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            click.echo(f"{'ok    ' if row['met'] else 'FAILED'}  {row['goal']}  (is {row['value']})")
    sys.exit(0 if rows and all(row["met"] for row in rows) else 1)


@click.command()
@click.option("--images", type=click.IntRange(min=1), help="Validation images to look at.")
@click.option("--top", type=click.IntRange(min=1), help="Measure only that many ops, ranked by gradient.")
@click.option("--group", "groups", multiple=True, help="Module to measure as a whole; give it once per module.")
@click.option("--metric/--no-metric", default=None, help="Score every trial by the metric, too.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the whole result as CSV.")
def sensitivity(out: Path | None, **options: Any) -> None:
    """Measure what each op costs at the output of the model that ships, by analyze.sensitivity of params.yaml.

    Reads the artifacts of the pipeline; options take the place of settings.
    """
    with one_line_errors():
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


@click.command()
@click.argument("mode", type=click.Choice(["FvsQ", "QvsQ", "CvsQ"]))
@click.option("--images", type=click.IntRange(min=1), help="Validation images to look at; default those of analyze.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for page and tables; default profile/MODE.")
@click.option(
    "--channels", multiple=True, metavar="MODULE", help="Also its outputs channel by channel; may be repeated."
)
def profile(mode: Any, images: int | None, out: Path | None, channels: tuple[str, ...]) -> None:
    """Compare two neighbours among the models of the last run, op by op: page, similarity tables, findings.

    FvsQ: float and calibrated; QvsQ: what ships as fake-quant and as integers; CvsQ: the calibrated model and the
    integers made of it, without the training between.
    """
    with one_line_errors():
        from qatlib.analysis.channels import channel_similarity, write_channels
        from qatlib.analysis.pairs import pipeline_pair
        from qatlib.analysis.profiler import model_profiler
        from qatlib.cli.profile_view import show
        from qatlib.pipeline.config import load_config
        from qatlib.pipeline.project import Project

        project = Project(load_config())
        section = project.config.analyze
        first, second = pipeline_pair(project, mode)
        count, folder = images or section.batches * section.batch_size, out or Path("profile") / mode
        if channels:
            data = project.batches("val", count, section.batch_size)
            write_channels(channel_similarity(first, second, data, channels, mode), mode, folder)
        findings = model_profiler(first, second, project.batches("val", count, section.batch_size), mode, folder)
        console().print(show(folder, mode, findings))


def show_summary(as_md: bool = False, as_json: bool = False) -> None:
    """Print the last run as tables, Markdown or JSON, with what ``compile.targets`` came to."""
    from qatlib.analysis import targets
    from qatlib.analysis.findings import read_findings
    from qatlib.analysis.goals import judge
    from qatlib.analysis.revision import PARAMS, workspace
    from qatlib.analysis.views import summary_markdown, terminal_table

    document, found = read_json("reports/summary.json"), read_findings()
    others = targets.read_targets(workspace(PARAMS) or "", workspace)
    results = judge(goals(), document, document["stale"])
    if as_json:
        judged = [{"goal": one.text, "value": one.value, "met": one.met} for one in results]
        click.echo(json.dumps({"summary": document, "goals": judged, "targets": others, **found.document()}, indent=2))
    elif as_md:
        click.echo(summary_markdown(document, found, results) + targets.markdown(others), nl=False)
    else:
        console().print(terminal_table(document, found, results))
        if others:
            table = Table(*targets.HEADINGS, title="Other targets (estimates)", title_justify="left")
            for row in targets.rows(others):
                table.add_row(*row)
            console().print(table)
