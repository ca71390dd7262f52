"""Whether a graph computes what its model computes: element by element, on inputs that no constant was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qatlib.errors import GraphError
from qatlib.graph.inputs import plain
from qatlib.graph.ir import INPUT, OPAQUE, Graph, Node
from qatlib.graph.snapshot import as_it_was
from qatlib.graph.source import Examples
from qatlib.ops.base import BY_NAME

AGREES = 1e-5
"""A difference that needs no second look, relative to the element and to the output's typical magnitude."""
NOISE = 32
"""A difference is float32 rounding up to this multiple of what that rounding does to the same element."""
WITHOUT_DOUBLE = 1e-3
"""The smallest difference that counts where the model cannot be run in float64, relative as above."""
HIDDEN = -1e8
"""Masks at or below this are the same: -inf, the least number of a dtype, -1e9."""


def evaluate_graph(graph: Graph, inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs of the graph in float, its parameters in ``dtype``. A value is dropped after the last node reading it."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    last_reader = {name: node.name for node in graph.nodes for name in node.inputs}
    for node in graph.nodes:
        if node.op != INPUT:
            values[node.name] = _computed(node, [values[i] for i in node.inputs], dtype)
        for name in set(node.inputs) - set(graph.outputs):
            if last_reader[name] == node.name:
                del values[name]
    return [values[name] for name in graph.outputs]


def _computed(node: Node, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    if node.op != OPAQUE:
        return BY_NAME[node.op].forward(node.attrs, _in(dtype, node.params), *inputs)
    assert node.callee is not None
    if dtype is not None and isinstance(node.callee, nn.Module):
        result: Tensor = torch.func.functional_call(node.callee, _state(node.callee, dtype), tuple(inputs))
    else:
        result = node.callee(*inputs)
    return result


def _in(dtype: torch.dtype | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in tensors.items()}


def _state(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return _in(dtype, {**dict(module.named_parameters()), **dict(module.named_buffers())})


def check_same(model: nn.Module, graph: Graph, inputs: Sequence[Tensor]) -> None:
    """Raise GraphError (QAT137) if an element of an output differs by more than the rounding of float32.

    Compared are at most two samples of ``inputs``, and three made of the first. Only where the outputs are apart by
    more than :data:`AGREES` are both computed in float64 as well, which tells rounding from anything else.
    """
    nodes = graph.by_name()
    axes = tuple(nodes[name].shape.index(-1) for name in graph.inputs)
    examples = Examples(tuple(inputs), axes)
    if len(axes) != len(inputs):
        raise _replaced(model, f"{len(axes)} inputs for {len(inputs)}")
    with as_it_was(model):
        few = [x.narrow(axis, 0, min(x.shape[axis], 2)) for x, axis in zip(inputs, axes, strict=True)]
        _compare(model, graph, few, _outputs(model, few))
        others = [_others(x, axis) for x, axis in zip(examples.at(1), axes, strict=True)]
        try:
            wanted = _outputs(model, others)
        except Exception:  # the model may have inputs that are only legal together, such as a length
            others = examples.at(3)
            wanted = _outputs(model, others)
        _compare(model, graph, others, wanted)


def _others(one: Tensor, axis: int) -> Tensor:
    """Three samples that are not the given one, but have elements as legal: flipped, and nearer to 0 if real."""
    flipped = one.flip([k for k in range(one.dim()) if k != axis])
    if not one.is_floating_point():
        return torch.cat([flipped, one, flipped], axis)
    return torch.cat([0.75 * flipped, 0.5 * one, 0.875 * flipped], axis)


class _NoHalf(TorchFunctionMode):
    """Leaves out conversions to float16 and bfloat16, as a graph does: its values will be rounded to integers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = (*args[1:], *(kwargs or {}).values())
        converts = func in (Tensor.to, Tensor.type) and any(x in _HALVES for x in named if isinstance(x, torch.dtype))
        if converts or func in (Tensor.half, Tensor.bfloat16):
            return args[0]
        return func(*args, **(kwargs or {}))


_HALVES = (torch.float16, torch.bfloat16)


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    with _NoHalf():
        return tree_leaves(plain(model(*(x.clone() for x in inputs))))


def _compare(model: nn.Module, graph: Graph, inputs: Sequence[Tensor], wanted: list[Tensor]) -> None:
    got = evaluate_graph(graph, [x.clone() for x in inputs])
    if len(got) != len(wanted):
        raise _replaced(model, f"{len(got)} outputs for {len(wanted)}")
    for name, a, b in zip(graph.outputs, wanted, got, strict=True):
        if a.shape != b.shape:
            raise _differs(graph, name, f"has the shape {list(b.shape)} for {list(a.shape)}")
    if all(not (_gap(a, b) > AGREES).any() for a, b in zip(wanted, got, strict=True)):
        return
    precise = _in_double(model, graph, inputs)
    for k, (name, a, b) in enumerate(zip(graph.outputs, wanted, got, strict=True)):
        wrong = _wrong(a, b, *(side[k] for side in precise)) if precise else _gap(a, b) > WITHOUT_DOUBLE
        count = int(wrong.sum())
        if count > _ties(graph, name) * a.numel():
            at = int(wrong.flatten().nonzero()[0])
            pair = f"{b.flatten()[at].item():.6g} for {a.flatten()[at].item():.6g}"
            raise _differs(graph, name, f"differs in {count} of {a.numel()} elements, at first {pair}")


def _in_double(model: nn.Module, graph: Graph, inputs: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """Outputs of model and graph in float64; nothing where one of them knows only float32."""
    double = [x.double() if x.is_floating_point() else x.clone() for x in inputs]
    try:
        with _NoHalf():
            wanted = tree_leaves(plain(torch.func.functional_call(model, _state(model, torch.float64), tuple(double))))
        got = evaluate_graph(graph, [x.clone() for x in double], torch.float64)
    except Exception:  # a float32 constant in a product, a kernel without float64
        return ()
    same = all(a.shape == b.shape for a, b in zip(wanted, got, strict=True))
    return (wanted, got) if same else ()


def _gap(wanted: Tensor, got: Tensor) -> Tensor:
    """Difference relative to the element and the typical magnitude of its tensor; 0 or 1 of what is not real.

    What the model has not defined (NaN) agrees with everything.
    """
    if not wanted.is_floating_point():
        return (wanted != got).double()
    a, b = wanted.double(), got.double()
    apart = (a - b).abs()
    same = (a == b) | a.isnan() | ((a <= HIDDEN) & (b <= HIDDEN))
    apart = torch.where(same, 0, apart.nan_to_num(torch.inf))
    return apart / (a.abs().nan_to_num(0, 0, 0) + _typical(a))


def _typical(a: Tensor) -> Tensor:
    size = a[a.isfinite() & (a != 0) & (a > HIDDEN)].abs()
    return size.median() if size.numel() else torch.ones((), dtype=a.dtype, device=a.device)


def _wrong(a: Tensor, b: Tensor, a64: Tensor, b64: Tensor) -> Tensor:
    """Where both float32 and float64 differ by more than the rounding of float32 explains."""
    rounding, apart = _gap(a64, a) + _gap(b64, b), torch.minimum(_gap(a, b), _gap(a64, b64))
    if not a.is_floating_point():
        return (apart > 0) & (rounding == 0)
    typical = rounding.median() if rounding.numel() else 0.0
    return apart > NOISE * (rounding + typical) + AGREES


def _ties(graph: Graph, name: str) -> float:
    """Share of integers that may differ: of equal values, torch's topk and sort take any first."""
    nodes = graph.by_name()
    if nodes[name].content == "float":
        return 0.0
    seen, queue = set[str](), [name]
    while queue:
        node = nodes[queue.pop()]
        if node.op == "topk":
            return 0.05
        queue += [i for i in node.inputs if i not in seen]
        seen.update(node.inputs)
    return 0.0


def _replaced(model: nn.Module, seen: str) -> GraphError:
    """torch.fx traces the forward of the class, whatever ``model.forward`` is."""
    return GraphError(
        "QAT137",
        type(model).__name__,
        f"the traced graph is not the model: it has {seen}",
        "Assign a new forward to the class, not to the model; return as many tensors for any input",
    )


def _differs(graph: Graph, name: str, seen: str) -> GraphError:
    return GraphError(
        "QAT137",
        graph.by_name()[name].described(),
        f"the traced graph is not the model: this output {seen}",
        "Avoid in-place operations on tensors that are read again, and code that depends on values or the batch size",
    )
