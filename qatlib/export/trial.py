"""What ``qatlib export`` does: export, run on random inputs, say how the result compares."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qatlib.export.document import OPSET, Flavour, export_onnx
from qatlib.export.runtime import check_onnx, measure_distance
from qatlib.program import Program

BATCH = 4


def try_document(
    folder: str | Path, path: str | Path, flavour: Flavour = "integer", opset: int | None = None
) -> tuple[list[str], bool]:
    """Export the Program in ``folder`` and compare it with the emulator on a random batch.

    Returns what there is to say, a line each, and False if an integer document differs where none may: outside of what
    is computed from float islands. Raises as :meth:`Program.load` and :func:`export_onnx` do.
    """
    program = Program.load(folder)
    model = export_onnx(program, path, flavour, OPSET if opset is None else opset)
    lines = [f"{path}: {flavour} flavour, opset {model.opset_import[0].version}, {len(model.graph.node)} nodes"]
    inputs = random_inputs(program)
    if flavour == "qdq":
        distances = measure_distance(program, path, inputs)
        lines += [
            f"output {name}: {distances[name].equal:.2%} equal, at most {distances[name].largest_lsb:.3g} LSB away"
            for name in dict.fromkeys(program.outputs)
            if name in distances
        ]
        return lines, True
    counts = check_onnx(program, path, inputs)
    total = sum(value.elements(BATCH) for value in program.values.values())
    lines.append(f"{sum(counts.values())} of {total} elements in {len(counts)} tensors differ from the emulator")
    soft = behind_islands(program)
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
        elif qtype.scale is None or qtype.scale == 1.0:
            made.append(torch.randint(0, 2, shape, generator=generator).to(getattr(torch, qtype.dtype)))
        else:
            lo, hi = qtype.limits
            made.append(torch.randint(lo, hi + 1, shape, generator=generator).to(getattr(torch, qtype.dtype)))
    return made
