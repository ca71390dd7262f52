"""Composites: calls that become several nodes, and calls made of other calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from qatlib.ops.base import BY_FUNCTION, Attrs, Call, Format, Operator, Params, Ref, Steps, Traced

INT16 = Format("int16")
"""Of inner steps: 16 bits, scale from calibration."""


class Composite(Operator):
    """Only traced: no node bears its name, so it has no float function and no Program form of its own."""

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        raise NotImplementedError(f"{self.name} is computed by its steps")


@dataclass(frozen=True)
class _Under:
    """Steps whose names begin with ``prefix`` behind the name of the call."""

    steps: Steps
    prefix: str

    def emit(
        self, op: str, inputs: Sequence[Ref], attrs: Attrs, params: Params, suffix: str, format: Format | None
    ) -> Ref:
        return self.steps.emit(op, inputs, attrs, params, self.prefix + suffix, format)

    def ref(self, value: Any) -> Ref:
        return self.steps.ref(value)

    def derive(self, tensor: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        return self.steps.derive(tensor, what, make)


def under(call: Call, suffix: str) -> Call:
    """``call`` with ``suffix`` before the suffix of every step that it emits."""
    assert call.steps is not None
    return replace(call, steps=_Under(call.steps, suffix))


def inner(
    call: Call,
    suffix: str,
    target: nn.Module | Callable[..., Any],
    *args: Any,
    shape: Sequence[int] = (),
    **kwargs: Any,
) -> Any:
    """What ``target(*args, **kwargs)`` makes as a part of ``call``: its steps are named after ``suffix``.

    ``shape`` is that of the result, by default the shape of the first argument. Raises GraphError (QAT134) for a target
    that is no operator.
    """
    from qatlib.graph.source import operator_of  # the graph imports the operators

    module = target if isinstance(target, nn.Module) else None
    operator = BY_FUNCTION.get(target) if module is None else operator_of(module)
    if operator is None:
        seen = f"{suffix.removeprefix('.')} is {getattr(target, '__qualname__', type(target).__qualname__)}"
        raise call.refuse(f"{seen}, which is no supported operator", "Use a module or function of torch")
    out_shape = tuple(shape) or args[0].shape
    part = replace(
        under(call, suffix), args=args, kwargs=kwargs, module=module, out_shape=out_shape,
        function=None if module is not None else target,
    )  # fmt: skip
    result = operator.trace(part)
    if not isinstance(result, Traced):
        return result
    op = result.op or operator.name
    return call.emit(op, result.inputs, result.attrs, result.params, suffix=suffix, format=result.format)
