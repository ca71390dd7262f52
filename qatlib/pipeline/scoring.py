"""Scores that compare forms of one network."""

from __future__ import annotations

import torch
from torch import Tensor

from qatlib.compiler import Executable
from qatlib.emulator import Emulator
from qatlib.errors import ProgramError
from qatlib.pipeline.project import Project
from qatlib.program import Program


def check_compiled(project: Project, program: Program, executable: Executable, images: int) -> int:
    """Run ``images`` test images through both; return the number of images.

    Raises ProgramError (QAT177) if one output element differs: a defect of the compiler, never of the model.
    """
    emulator = Emulator(program)
    done = 0
    for inputs, _ in project.batches("test", images):
        for name, ours, theirs in zip(program.outputs, executable.run(*inputs), emulator(*inputs), strict=True):
            differing = _differing(ours, theirs)
            if differing:
                raise ProgramError(
                    "QAT177",
                    name,
                    f"{differing} of {ours.numel()} elements differ between the compiled run and the Program",
                    "This is a defect of the compiler; please report it with artifacts/program",
                )
        done += inputs[0].shape[0]
    return done


def _differing(a: Tensor, b: Tensor) -> int:
    return int(torch.count_nonzero(a != b))
