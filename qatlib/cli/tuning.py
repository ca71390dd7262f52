"""Commands on what a network costs on its target, and on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qatlib.cli.common import console, one_line_errors


@click.command()
@click.option("--target", help="Shipped name or YAML file; default compile.target.")
@click.option("--budget", "budget_s", type=click.FloatRange(min=0), default=600.0, show_default=True,
              help="Seconds for this run; a run that was stopped, or ran out of time, is gone on with.")  # fmt: skip
@click.option("--images", type=click.IntRange(min=1), default=1000, show_default=True, help="Validation images.")
@click.option("--points", type=click.IntRange(min=1), default=16, show_default=True, help="Of the predicted front.")
@click.option("--group", "groups", multiple=True, help="Module to choose for as a whole; give it once per module.")
@click.option("--min-ratio", type=click.FloatRange(min=0), help="Of the float metric to keep; default: goals, or 0.99.")
@click.option("--dvc", is_flag=True, help="Measure nothing; print each point as a dvc exp run command.")
@click.option("--point", type=click.IntRange(min=1), help="Take this point of the table instead of the best.")
@click.option("--write", is_flag=True, help="Write the change into params.yaml.")
@click.option("--out", default=Path("tune"), type=click.Path(path_type=Path), help="Folder; default tune.")
def tune(target: str | None, dvc: bool, point: int | None, write: bool, out: Path, **options: Any) -> None:
    """Search int8, int16 and high precision per module: accuracy against simulated latency.

    Starts from the model that ships. Predicts by sensitivity, chooses by an integer program, compiles and measures;
    leaves front.csv, front.svg, front.png and params.diff, and prints the diff of the best.
    """
    with one_line_errors():
        from qatlib.pipeline.config import load_config
        from qatlib.pipeline.project import Project
        from qatlib.tune.edit import change_of
        from qatlib.tune.search import Search, Settings
        from qatlib.tune.view import described, table, trials
        from qatlib.tune.view import write as write_files

        search = Search(Project(load_config()), out, Settings(**options), target, click.echo)
        result = search.run(measure=not dvc)
        chosen = result.best if point is None else result.point(point)
        change = None if chosen is None else change_of(search.space, chosen.choice)
        commands = trials([change_of(search.space, attempt.choice) for attempt in result.attempts]) if dvc else []
        write_files(result, out, change, commands)
        console().print(table(result))
        for line in commands:
            click.echo(line)
        if chosen is not None and change is not None:
            click.echo(f"chosen: {described(chosen)}")
            click.echo(change.diff or "params.yaml holds this already")
            if write and change.diff:
                change.write()
                click.echo("written; run next: dvc repro")


@click.command()
@click.argument("program", default="artifacts/program", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, help="Shipped name or YAML file; once per target.")
@click.option("--md", "as_md", is_flag=True, help="Print Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every refusal among it.")
def perf(program: Path, targets: tuple[str, ...], as_md: bool, as_json: bool) -> None:
    """Compile the Program in folder PROGRAM (default: of the last run) for each target: latency, traffic, memory.

    Without --target it is that of params.yaml, whose options of section compile hold for all. A target that refuses
    the Program has the codes in its row. Figures are estimates of the model that each target file describes.
    """
    if as_md and as_json:
        raise click.UsageError("--md and --json are two forms of the same: give one")
    with one_line_errors():
        from qatlib.cli.perf_view import ratio_line, table
        from qatlib.compiler.perf import BASIS
        from qatlib.compiler.table import HEADINGS, cells, markdown, on_targets
        from qatlib.program import Program

        options: dict[str, Any] | None = None
        if not targets or Path("params.yaml").exists():
            from qatlib.pipeline.config import load_config

            section = load_config().compile
            options, targets = section.options, targets or (section.target,)
        rows = on_targets(Program.load(program), targets, options)
        ratio = ratio_line(program)
        if as_json:
            document = {"basis": BASIS, "targets": [row.document() for row in rows]}
            click.echo(json.dumps(document, indent=2, allow_nan=False))
        elif as_md:
            click.echo(markdown([cells(row) for row in rows], HEADINGS) + "\n" + ratio + f"{BASIS}.".capitalize())
        else:
            console().print(table(rows, ratio))
