"""The command: see :mod:`bench.diagnosis`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from bench.diagnosis.faults import FAULTS
from bench.diagnosis.nets import NETS
from bench.diagnosis.score import clean, markdown, read_rows, score, write_rows

ROWS = Path(__file__).with_name("score.csv")


@click.command()
@click.option("--only", default="", help="Faults whose name, network or code holds this text; others keep their rows.")
@click.option("--table", is_flag=True, help="Print the table of docs/diagnosis.md and run nothing.")
def main(only: str, table: bool) -> None:
    """Plant every fault, run the pipeline, and write which rank the finding had that names it."""
    if table:
        click.echo(markdown(read_rows(ROWS)))
        return
    cases = (*map(clean, NETS), *FAULTS)
    known = {row.planted: row for row in read_rows(ROWS)}
    for fault in cases:
        if only in f"{fault.name} {fault.net} {fault.code}":
            with tempfile.TemporaryDirectory() as folder:
                row = score(fault, Path(folder))
            known[row.planted] = row
            click.echo(f"{row}")
    rows = [known[fault.planted] for fault in cases if fault.planted in known]
    write_rows(ROWS, rows)
    click.echo(markdown(rows))


if __name__ == "__main__":
    main()
