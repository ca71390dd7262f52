"""The integers of a fake-quant model, by section ``convert`` of ``params.yaml``."""

from __future__ import annotations

from qatlib.compiler.target import load_target
from qatlib.conversion import table_ops, to_program
from qatlib.fake.model import FakeQuantModel
from qatlib.pipeline.formats import owners_of, within
from qatlib.pipeline.match import first_owner
from qatlib.pipeline.project import Project
from qatlib.program import Program


def program_of(project: Project, model: FakeQuantModel) -> Program:
    """The Program of a calibrated or trained model, with the multipliers of ``compile.target``."""
    section = project.config.convert
    preserve = project.resolve_ops(section.preserve, "convert.preserve")
    named = within(owners_of(model.graph), table_ops(model, preserve))
    records = first_owner(section.tables, named, "convert.tables")
    tables = {name: record.spec for name, record in records.items()}
    return to_program(model, preserve, load_target(project.config.compile.target).multiplier_bits, tables)
