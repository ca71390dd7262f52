"""The neighbours among the models of a finished run."""

from __future__ import annotations

from typing import Any

from qatlib.analysis.records import Mode
from qatlib.analysis.states import require_mode
from qatlib.pipeline.after_training import float_side
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.project import Project
from qatlib.program import Program


def pipeline_pair(project: Project, mode: Mode) -> tuple[Any, Any]:
    """The two models of ``mode`` that the pipeline left in ``artifacts/``; of CvsQ the second is converted here.

    Raises as what loads and converts them.
    """
    require_mode(mode)
    if mode == "QvsQ":
        return project.load_fake_quant("artifacts/qat.safetensors"), Program.load("artifacts/program")
    path = "artifacts/calibrated.safetensors"
    calibrated = project.load_fake_quant(path)
    if mode == "FvsQ":
        return float_side(project, path), calibrated
    return calibrated, program_of(project, calibrated)
