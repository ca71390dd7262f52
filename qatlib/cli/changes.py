"""Commands on what changed: between two runs, and since the last one."""

from __future__ import annotations

import json
from typing import Any

import click

from qatlib.cli.common import console, one_line_errors
from qatlib.cli.results import show_summary

_MD = click.option("--md", "as_md", is_flag=True, help="Print Markdown, for a pull request.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.option("--base", help="Git revision, branch or DVC experiment to compare with.")
@_MD
@_JSON
def report(base: str | None, as_md: bool, as_json: bool) -> None:
    """Show the results of the last run; with --base, what changed since and what came of the edits tried."""
    _one_form(as_md, as_json)
    with one_line_errors():
        if base is None:
            show_summary(as_md, as_json)
        else:
            _compare(base, None, as_md, as_json)


@click.command()
@click.argument("revisions", metavar="A[..B]")
@_MD
@_JSON
def compare(revisions: str, as_md: bool, as_json: bool) -> None:
    """Show what changed from revision A to B, or to the working copy: scores, trials, parameters, findings, ops.

    A and B are git revisions, branches or DVC experiments.
    """
    _one_form(as_md, as_json)
    base, dots, head = revisions.partition("..")
    if not base or (dots and not head) or head.startswith("."):
        raise click.BadParameter("give A, or A..B", param_hint="A[..B]")
    with one_line_errors():
        _compare(base, head or None, as_md, as_json)


@click.command()
@click.argument("stage", required=False)
@_JSON
def why(stage: str | None, as_json: bool) -> None:
    """Show what `dvc repro` would run, all or up to STAGE, and why: changed parameters, files, stages before."""
    from qatlib.cli.why_view import lines
    from qatlib.pipeline.why import why

    with one_line_errors():
        found = why(stage)
    if as_json:
        click.echo(json.dumps([one.document() for one in found], indent=2, default=str))
    else:
        console().print(lines(found))


def _one_form(as_md: bool, as_json: bool) -> None:
    if as_md and as_json:
        raise click.UsageError("--md and --json are two forms of the same: give one")


def _compare(base: str, head: str | None, as_md: bool, as_json: bool) -> None:
    from qatlib.analysis.compare import compare
    from qatlib.analysis.compare_view import markdown, tables
    from qatlib.analysis.revision import WORKSPACE, load_revision
    from qatlib.pipeline.why import outdated, why

    first, second = load_revision(base), load_revision(head or WORKSPACE)
    document: dict[str, Any] = compare(first, second, outdated(why()) if second.name == WORKSPACE else ())
    if as_json:
        click.echo(json.dumps(document, indent=2, allow_nan=False, default=str))
    elif as_md:
        click.echo(markdown(document), nl=False)
    else:
        console().print(tables(document))
