"""Fake-quant against the Program of an example, op by op on the same integer inputs: ``reports/lsb.csv``.

    python -m examples.lsb_table warp --items 64

Section 5 of ``docs/numerics.md`` says how far apart they may be. Needs the artifacts of ``dvc repro``.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import click
from torch import Tensor

from qatlib.atomic import write_text
from qatlib.errors import QatError
from qatlib.fake.model import FakeQuantModel
from qatlib.pipeline.config import load_config
from qatlib.pipeline.project import Project
from qatlib.program import Program
from tests.ops.agreement import gaps

ROOT = Path(__file__).parent
TIME = re.compile(r"(\.t|\.out\.)\d+(?=\.|$)")
"""The time step in the name of an unrolled recurrent step, or of its part of the joined output."""


@dataclass(frozen=True)
class Row:
    """One op, or the ops that differ only in the time step, which is ``*`` in their name.

    ``stored_lsb`` is the largest error that the tables among them state, in codes; ``largest_lsb`` the largest seen
    difference in codes, of an int32 output in units of its accumulator.
    """

    name: str
    kind: str
    dtype: str
    ops: int
    elements: int
    differing: int
    largest_lsb: float
    stored_lsb: float | None

    @property
    def share(self) -> float:
        return self.differing / self.elements


def rows(model: FakeQuantModel, program: Program, *inputs: Tensor) -> list[Row]:
    """One row per op, in execution order of the first; time steps of a recurrent layer together."""
    ops, merged = {op.name: op for op in program}, dict[tuple[str, str, str], Row]()
    for name, gap in gaps(model, program, *inputs).items():
        op = ops[name]
        stored = op.attrs["table"]["worst_lsb"] if op.kind == "table" else None
        row = Row(
            TIME.sub(r"\1*", name), op.kind, program.values[op.output].qtype.dtype,
            1, gap.elements, gap.differing, gap.largest, stored,
        )  # fmt: skip
        key = (row.name, row.kind, row.dtype)
        merged[key] = _sum(merged[key], row) if key in merged else row
    return list(merged.values())


def _sum(a: Row, b: Row) -> Row:
    stored = [x for x in (a.stored_lsb, b.stored_lsb) if x is not None]
    return Row(
        a.name, a.kind, a.dtype, a.ops + b.ops, a.elements + b.elements, a.differing + b.differing,
        max(a.largest_lsb, b.largest_lsb), max(stored, default=None),
    )  # fmt: skip


def load(folder: Path, items: int) -> tuple[FakeQuantModel, Program, tuple[Tensor, ...]]:
    """Fake-quant model and Program that the pipeline made in ``folder``, and the first inputs of the test split.

    Sets threads, seeds and determinism of torch for the whole process, as ``params.yaml`` says. Raises CheckpointError
    or ProgramError where the artifacts are not there.
    """
    with contextlib.chdir(folder):
        project = Project(load_config("params.yaml"))
        model = project.load_fake_quant("artifacts/qat.safetensors")
        inputs, _ = next(iter(project.batches("test", items, items)))
        return model, Program.load("artifacts/program"), tuple(inputs)


def as_csv(table: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(field.name for field in fields(Row)), "share"])
    for row in table:
        values = ("" if x is None else f"{x:.6g}" if isinstance(x, float) else x for x in (*astuple(row), row.share))
        writer.writerow(values)
    return text.getvalue()


@click.command(help=__doc__)
@click.argument("name")
@click.option("--items", type=click.IntRange(min=1), default=64, show_default=True, help="Items of the test split.")
def main(name: str, items: int) -> None:
    folder = ROOT / name
    try:
        model, program, inputs = load(folder, items)
    except (QatError, OSError) as error:
        raise click.ClickException(str(error)) from error
    text = as_csv(rows(model, program, *inputs))
    write_text(folder / "reports" / "lsb.csv", text)
    click.echo(text, nl=False)


if __name__ == "__main__":
    main()
