"""A compiled run that differs from its Program does not pass for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatlib.compiler import compile_model
from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.pipeline.scoring import check_compiled
from tests.compiler.compiler_nets import residual, tiny


def test_a_compiled_run_that_differs_is_refused_with_the_number_of_elements() -> None:
    net, program = residual()
    batches = [net.feed(2), net.feed(3)]
    project: Any = SimpleNamespace(batches=lambda split, images: ((inputs, None) for inputs in batches))
    assert check_compiled(project, program, compile_model(program, tiny()), 5) == 5

    key = next(op for op in program if op.kind == "linear").consts["bias"]
    bias = program.constants[key].clone()
    bias[1] += 40
    other = replace(program, constants=dict(program.constants) | {key: bias})
    (ours,), (theirs,) = emulate(program, batches[0]), emulate(other, batches[0])
    count = int(torch.count_nonzero(ours != theirs))
    assert count > 0
    with pytest.raises(ProgramError, match=f"QAT177 {program.outputs[0]}: {count} of {ours.numel()} elements differ"):
        check_compiled(project, program, compile_model(other, tiny()), 5)
