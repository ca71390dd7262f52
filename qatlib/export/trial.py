"""What ``qatlib export`` does: export, run on inputs given or random, say how the result compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qatlib.emulator import batch_sizes
from qatlib.errors import ProgramError
from qatlib.export.document import OPSET, Flavour, export_onnx
from qatlib.export.runtime import check_onnx, measure_distance
from qatlib.program import Program

BATCH = 4
_CHANCE = ("QAT181", "QAT207")
"""What random inputs may do to a valid Program: NaN out of a float island, an index outside of what it reads."""


def try_document(
    folder: str | Path,
    path: str | Path,
    flavour: Flavour = "integer",
    opset: int | None = None,
    inputs: Sequence[Tensor] = (),
) -> tuple[list[str], bool]:
    """Export the Program in ``folder`` and compare it with the emulator on ``inputs``, or else on a random batch.

    Returns what there is to say, a line each, and False if an integer document differs where none may, outside of what
    is computed from float islands, or if it cannot be compared: but no random batch is held against it. Raises as
    :meth:`Program.load` and :func:`export_onnx` do, then with nothing written.
    """
    program = Program.load(folder)
    model = export_onnx(program, path, flavour, OPSET if opset is None else opset)
    lines = [f"{path}: {flavour} flavour, opset {model.opset_import[0].version}, {len(model.graph.node)} nodes"]
    compare = _distances if flavour == "qdq" else _differences
    try:
        found, good = compare(program, path, inputs or random_inputs(program))
    except ProgramError as error:
        if inputs or error.code not in _CHANCE:
            return [*lines, f"written, but not compared: {error}"], False
        return [*lines, f"written, but not compared on random inputs: {error}", "Give --inputs to compare it."], True
    return lines + found, good


def _distances(program: Program, path: str | Path, inputs: Sequence[Tensor]) -> tuple[list[str], bool]:
    distances = measure_distance(program, path, inputs)
    return [
        f"output {name}: {distances[name].equal:.2%} equal, at most {distances[name].largest_lsb:.3g} LSB away"
        for name in dict.fromkeys(program.outputs)
        if name in distances
    ], True


def _differences(program: Program, path: str | Path, inputs: Sequence[Tensor]) -> tuple[list[str], bool]:
    counts = check_onnx(program, path, inputs)
    batch = max(batch_sizes(program, inputs), default=1)
    total = sum(value.elements(batch) for value in program.values.values())
    soft = behind_islands(program)
    lines = [f"{sum(counts.values())} of {total} elements in {len(counts)} tensors differ from the emulator"]
    lines += [
        f"  {name}: {count} differ{', behind a float island' if name in soft else ''}"
        for name, count in counts.items()
        if count
    ]
    return lines, not any(count for name, count in counts.items() if name not in soft)


def behind_islands(program: Program) -> set[str]:
    """Values that float islands write, or that are computed from those."""
    soft: set[str] = set()
    for op in program:
        if op.kind == "float_op" or soft.intersection(op.inputs):
            soft.add(op.output)
    return soft


def random_inputs(program: Program, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    """One batch for every input: all codes of int8 and int16; reals that reach a little beyond the codes they become.

    Truth values and indices are 0 or 1.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name in program.inputs:
        value = program.values[name]
        qtype, shape = value.qtype, value.sizes(batch)
        if qtype.is_float:
            readers = (program.values[op.output].qtype for op in program if name in op.inputs)
            reach = next((-out.limits[0] * out.scale for out in readers if out.scale is not None), 1.0)
            made.append(torch.randn(shape, generator=generator) * (reach / 2))
        elif qtype.scale is None or qtype.truth:
            made.append(torch.randint(0, 2, shape, generator=generator).to(getattr(torch, qtype.dtype)))
        else:
            lo, hi = qtype.limits
            made.append(torch.randint(lo, hi + 1, shape, generator=generator).to(getattr(torch, qtype.dtype)))
    return made
