"""Looking at params.yaml and the model before anything is calibrated: what is shared, fused, quantized how, and legal.

One sample of the calibration split is read, for its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qatlib.analysis.unfused import unfused_operations
from qatlib.compiler import check_model, load_target
from qatlib.errors import CheckpointError, QatError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.formats import FormatRow, format_rows
from qatlib.graph.unshare import shared_modules
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.entry import load_entry
from qatlib.pipeline.project import Project

DECIDED_BY_DATA = ("QAT140", "QAT160", "QAT171", "QAT210", "QAT213")
"""Errors of ranges, which one sample says nothing about."""

MANY = 3
"""Inputs of one dtype, above which they are counted."""


@dataclass(frozen=True)
class Section:
    """One table. ``errors`` are messages with their codes; ``note`` stands below the table, or in place of it."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""
    errors: tuple[str, ...] = ()


def check(project: Project, part: str | None = None) -> list[Section]:
    """The sections of :data:`PARTS`, or the one named; what raises a QatError is a section with that error.

    Nothing is written. An error that several parts run into is told once. Without trained weights those of the model's
    factory stand for them.
    """
    sections = list(_weights(project))
    for name in (part,) if part else PARTS:
        title, look = PARTS[name]
        try:
            sections.append(look(project, title))
        except QatError as error:
            told = any(str(error) in section.errors for section in sections)
            sections.append(Section(title, note="Not reached: see above." if told else "", errors=_unless(told, error)))
    return sections


def show(sections: Sequence[Section]) -> Group:
    """All sections and the number of errors, for ``rich.print``."""
    parts: list[Table | Text] = []
    for section in sections:
        if section.rows:
            table = Table(title=section.title, title_justify="left")
            for index, column in enumerate(section.columns):
                table.add_column(column, overflow="fold", no_wrap=index == 0)
            for row in section.rows:
                table.add_row(*map(Text, row))
            parts.append(table)
        else:
            parts.append(Text(section.title, style="italic"))
        if section.note:
            parts.append(Text(section.note))
        parts += [Text(error, style="bold red") for error in section.errors]
        parts.append(Text())
    count = sum(len(section.errors) for section in sections)
    parts.append(Text(f"{count} error{'' if count == 1 else 's'}", style="bold red" if count else "green"))
    return Group(*parts)


def _unless(told: bool, error: QatError) -> tuple[str, ...]:
    return () if told else (str(error),)


def _weights(project: Project) -> Iterator[Section]:
    """Nothing if they load; else why not."""
    try:
        _ = project.float_model
    except CheckpointError as error:
        with suppress(QatError):  # told by what asks for the model
            project.float_model = project.untrained_model()
        yield Section("Weights", note="Below, those that the factory makes.", errors=(str(error),))
    except QatError:
        return  # told by what asks for the model


def _entries(project: Project, title: str) -> Section:
    metric = project.metric()
    loss = project.config.qat.loss
    load_entry(loss, "qat.loss")
    model, inputs = type(project.float_model).__name__, project.example_inputs
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    return Section(title, note=f"Model {model} with inputs {shapes}; metric {metric.name}, loss {loss}.")


def _shared(project: Project, title: str) -> Section:
    model = project.float_model
    rows = []
    for name, calls in shared_modules(model, project.example_inputs).items():
        module = model.get_submodule(name)
        rows.append((name, type(module).__name__, str(calls), str(sum(p.numel() for p in module.parameters()))))
    note = "Every call has scales of its own; model.unshare gives each a module of its own, and weights too if asked."
    return Section(title, ("module", "type", "calls", "weights"), rows, note if rows else "None.")


def _fuse(project: Project, title: str) -> Section:
    rows = [(row.op, row.type, row.pattern, row.seen, row.fix, row.where) for row in unfused_operations(project.graph)]
    return Section(title, ("op", "type", "pattern", "why", "what to change", "where"), rows, "" if rows else "Nothing.")


def _qconfig(project: Project, title: str) -> Section:
    columns = ("op", "type", "inputs", "output", "scale", "by", "weight", "by", "message")
    rows = [_format(row) for row in format_rows(project.fake_quant_model(project.resolve_relu6()))]
    return Section(title, columns, rows)


def _format(row: FormatRow) -> tuple[str, ...]:
    if row.scale is not None:
        scale = f"{row.scale:.6g}"
    elif row.observer in ("", "constant") or row.observer.startswith("as "):
        scale = row.observer
    else:
        scale = f"calibration: {row.observer}"
    dtypes = row.inputs.split(", ")
    inputs = f"{len(dtypes)} × {dtypes[0]}" if len(dtypes) > MANY and len(set(dtypes)) == 1 else row.inputs
    return row.op, row.type, inputs, row.output, scale, row.output_rule, row.weight, row.weight_rule, row.message


def _target(project: Project, title: str) -> Section:
    """Kinds, dtypes and sizes, which any scales show: here those of one sample."""
    section = project.config.compile
    targets = [load_target(file) for file in (section.target, *(other.file for other in section.targets))]
    model = project.fake_quant_model(project.resolve_relu6())
    try:
        calibrate(model, [project.example_inputs], project.device)
        program = program_of(project, model)
    except QatError as error:
        if error.code not in DECIDED_BY_DATA:
            raise
        return Section(title, note=f"Not known before calibration, by one sample: {error}")
    found = check_model(program, targets[0])
    rows = [(one.code, one.op, one.seen, one.fix) for one in found]
    refused = {target.name: len(check_model(program, target)) for target in targets[1:]}
    notes = [] if rows else [f"{targets[0].name} takes all {len(program.ops)} ops."]
    notes += [f"{name}: {count} refusals." if count else f"{name} takes all." for name, count in refused.items()]
    note = " ".join(notes)
    return Section(title, ("code", "op", "seen", "what to change"), rows, note, tuple(map(str, found)))


PARTS: Mapping[str, tuple[str, Callable[[Project, str], Section]]] = MappingProxyType(
    {
        "entries": ("Entry points", _entries),
        "shared": ("Modules that are called several times", _shared),
        "fuse": ("What stays unfused", _fuse),
        "qconfig": ("Formats of every op, and what sets them", _qconfig),
        "target": ("What the target refuses", _target),
    }
)
