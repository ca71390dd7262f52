"""How many of a model's multiply-accumulates are quantized: the number that shows a model left in float by mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qatlib.fake.model import FakeQuantModel
from qatlib.fake.op import FakeOp
from qatlib.graph.fuse import DENSE
from qatlib.graph.ir import OPAQUE, Node
from qatlib.ops.base import BY_NAME

_COUNTED = (*DENSE, "matmul", OPAQUE)
"""Interpolation is not: torch may compute it as a product with a matrix of mostly zeros."""
_DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


@dataclass(frozen=True)
class Coverage:
    """Multiply-accumulates of one sample: of the model, of its quantized ops, and of each op that has any.

    ``float_ops`` are the ops with multiply-accumulates that run in float, the largest first.
    """

    total: int
    quantized: int
    by_op: Mapping[str, int]
    float_ops: tuple[str, ...]

    @property
    def share(self) -> float:
        """Quantized part of the total; 1 for a model that multiplies nothing."""
        return self.quantized / self.total if self.total else 1.0

    def __str__(self) -> str:
        names = f"; in float: {', '.join(self.float_ops[:5])}" if self.float_ops else ""
        more = f" and {len(self.float_ops) - 5} more" if len(self.float_ops) > 5 else ""
        return f"{self.share:.2%} of {self.total:,} multiply-accumulates are quantized{names}{more}"


def mac_coverage(model: FakeQuantModel) -> Coverage:
    """Count the multiply-accumulates of every op, and whether weights and inputs of that op are quantized.

    Counted are convolutions, transposed convolutions and matrix products, by torch's own operation counter while each
    op computes one sample of zeros in float; so an op that is built of them, or a module kept whole, counts too. The
    model, its observers and its state are left as they are.
    """
    nodes = model.graph.by_name()
    by_op = {name: macs for name, op in model.ops() if op.node.op in _COUNTED and (macs := _macs(op, nodes))}
    in_float = [name for name in by_op if not _is_quantized(model, model.op(name), nodes)]
    return Coverage(
        total=sum(by_op.values()),
        quantized=sum(macs for name, macs in by_op.items() if name not in in_float),
        by_op=by_op,
        float_ops=tuple(sorted(in_float, key=lambda name: -by_op[name])),
    )


def _is_quantized(model: FakeQuantModel, op: FakeOp, nodes: Mapping[str, Node]) -> bool:
    operands = [name for name in op.node.inputs if nodes[name].content == "float"]
    return not op.hybrid and op.node.op != OPAQUE and all(model.quantizer(name) is not None for name in operands)


def _macs(op: FakeOp, nodes: Mapping[str, Node]) -> int:
    """Multiply-accumulates of one op for one sample: half of torch's count of floating-point operations."""
    params = op.float_params()
    device = next(iter(params.values())).device if params else torch.device("cpu")
    inputs = [zeros_of(nodes[name], device) for name in op.node.inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if op.node.op != OPAQUE:
            BY_NAME[op.node.op].forward(op.node.attrs, params, *inputs)
        elif op.callee is not None:
            op.callee(*inputs)
    return int(counter.get_total_flops()) // 2


def zeros_of(node: Node, device: torch.device) -> Tensor:
    """The value of a node for one sample; a size of -k is k times the batch."""
    return torch.zeros([abs(size) for size in node.shape], dtype=_DTYPES[node.content], device=device)
