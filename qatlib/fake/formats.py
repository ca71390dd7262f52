"""What every tensor of a fake-quant model really got: the qconfig table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qatlib.atomic import write_text
from qatlib.fake.fake_quant import ConstantFakeQuantize
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.op import FakeOp
from qatlib.fake.prepare import is_high_precision_candidate
from qatlib.graph.calls import calls_of_shared
from qatlib.graph.fuse import DENSE
from qatlib.graph.ir import OPAQUE
from qatlib.ops.base import BY_NAME

if TYPE_CHECKING:
    import pandas as pd

BITS = {"int8": 8, "int16": 16}
ACCUMULATOR = "int32"
"""Output of a convolution or linear that is not rounded to an activation format."""


@dataclass(frozen=True)
class FormatRow:
    """One op. ``kind`` is its operator, empty for an inner step of a composite. ``call`` is "2 of 3" for the second of
    three calls of one module. ``inputs`` are dtypes in order; ``observer`` is what sets the output's scale: a
    calibration method, ``fixed``, ``constant``, the name of the op whose format is kept, or nothing. ``scale`` is in
    real units per code, None before calibration. ``output_rule`` and ``weight_rule`` are the settings that the formats
    come from. ``weight_axis`` counts the axes of the user's weight; ``weight_bits`` are the bits that the weights of
    the median channel use, fewer than those of the dtype where sums or biases need a larger scale, None before
    calibration.
    """

    op: str
    type: str
    kind: str
    call: str
    inputs: str
    output: str
    observer: str
    scale: float | None
    output_rule: str
    weight: str
    weight_axis: int | None
    weight_bits: float | None
    weight_rule: str
    message: str


def format_rows(model: FakeQuantModel) -> list[FormatRow]:
    """A row per op, in forward order."""
    calls = calls_of_shared(model.graph.nodes)
    return [_row(model, name, op, calls.get(name)) for name, op in model.ops()]


def check_qconfig(model: FakeQuantModel, path: str | Path | None = None) -> pd.DataFrame:
    """The rows of :func:`format_rows` as a table, and as CSV in ``path`` if one is given."""
    import pandas as pd

    names = [field.name for field in fields(FormatRow)]
    table = pd.DataFrame([asdict(row) for row in format_rows(model)], columns=names)
    table["weight_axis"] = table["weight_axis"].astype("Int64")
    if path is not None:
        write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return table


def _row(model: FakeQuantModel, name: str, op: FakeOp, call: tuple[int, int] | None) -> FormatRow:
    fake, weights = op.activation_post_process, op.weight_fake_quant
    output = ACCUMULATOR if _keeps_accumulator(op) else model.dtype(name)
    observer, scale = "", None
    if (quantizer := model.quantizer(name)) is not None and quantizer.calibrated:
        scale = float(quantizer.scale)
    if fake is not None:
        observer = "fixed" if fake.spec.scale else fake.spec.method
        observer = "constant" if isinstance(fake, ConstantFakeQuantize) else observer
    elif quantizer is not None:
        observer = f"as {op.node.inputs[0]}"
    output_rule, weight_rule = model.origins.get(name, ("", ""))
    return FormatRow(
        op=name,
        type=op.node.module_type.rsplit(".", 1)[-1],
        kind="" if op.node.composite else op.node.op,
        call="" if call is None else f"{call[0]} of {call[1]}",
        inputs=", ".join(model.dtype(i) for i in op.node.inputs),
        output=output,
        observer=observer,
        scale=scale,
        output_rule=output_rule if fake is not None or op.hybrid or output == ACCUMULATOR else "",
        weight=weights.spec.dtype if weights else "",
        weight_axis=None if weights is None else int(op.node.op == "conv_transpose"),
        weight_bits=_weight_bits(model, op),
        weight_rule=weight_rule if weights else "",
        message="; ".join(_messages(model, name, op)),
    )


def _weight_bits(model: FakeQuantModel, op: FakeOp) -> float | None:
    weights, source = op.weight_fake_quant, model.quantizer(op.node.inputs[0]) if op.node.inputs else None
    if weights is None or source is None or not source.calibrated:
        return None
    own, used = weights.scales(op.float_params()["weight"]), op.weight_scales()
    lost = torch.log2(used.detach() / own.detach()).median()
    return BITS[weights.spec.dtype] - float(lost)


def _keeps_accumulator(op: FakeOp) -> bool:
    return op.qconfig is not None and op.qconfig.activation is None and op.node.op in DENSE


def _messages(model: FakeQuantModel, name: str, op: FakeOp) -> Iterator[str]:
    node, fake = op.node, op.activation_post_process
    computes = node.op not in ("quantize", "dequantize")
    if op.hybrid and computes:
        yield "kept whole, in float" if node.op == OPAQUE else "stays float"
    if op.preserve_qat_mode:
        yield "keeps its fake-quant form after conversion"
    if fake is not None and fake.spec.scale and node.format is None:
        yield "fixed scale"
    if _keeps_accumulator(op):
        yield "high-precision output"
    elif fake is not None and computes and _is_output(model, name):
        off = is_high_precision_candidate(model.graph, node)
        yield f"output of the network in {fake.spec.dtype}" + (", high precision is off" if off else "")
    if op.weight_fake_quant is not None and op.weight_fake_quant.spec.dtype == "int16":
        yield "int16 weights"
    quantized = {model.dtype(i) for i in node.inputs if model.dtype(i) in ("int8", "int16")}
    if len(quantized) > 1 and computes and not op.hybrid:
        yield "inputs of unequal format"
    elif quantized and fake is not None and computes and fake.spec.dtype not in quantized:
        yield f"turns {quantized.pop()} into {fake.spec.dtype}"


def _is_output(model: FakeQuantModel, name: str) -> bool:
    """Whether only outputs of the network read the value, as it is or in another shape."""
    readers = [other for other, op in model.ops() if name in op.node.inputs]
    if name in model.graph.outputs and not readers:
        return True
    return bool(readers) and all(_passes_on(model.op(r)) and _is_output(model, r) for r in readers)


def _passes_on(op: FakeOp) -> bool:
    return op.node.op == "dequantize" or (op.node.op in BY_NAME and BY_NAME[op.node.op].keeps_scale)
