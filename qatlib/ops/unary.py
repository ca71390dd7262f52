"""Unary nonlinear functions: one float definition for the fake-quant model and, in float64, for the table."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import QConfigError
from qatlib.integer import pieces
from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.clamp import export_clamp
from qatlib.ops.region import Regions, pointwise
from qatlib.program import Op, Program
from qatlib.tables import Floats, Source, Table, build

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering


@dataclass(frozen=True)
class Function:
    """``compute(x, **parameters)`` in torch, for any float dtype, and how models spell it.

    ``parameters`` are torch's arguments after the input, in order, with torch's defaults (None: has to be given).
    ``inner`` are further parameters that only composites set. Modules keep parameters as attributes of the same names.
    """

    compute: Callable[..., Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[str, float] = field(default_factory=dict)
    module: type[nn.Module] | None = None
    aliases: tuple[str, ...] = ()


def _shifted_exp(x: Tensor, offset: float) -> Tensor:
    return torch.exp(x + offset)


def _reciprocal(x: Tensor, numerator: float, eps: float) -> Tensor:
    return numerator / (x + eps)


def _power_of(x: Tensor, base: float) -> Tensor:
    return torch.pow(base, x)


def _rsqrt(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x + eps)


FUNCTIONS: dict[str, Function] = {
    "sigmoid": Function(torch.sigmoid, module=nn.Sigmoid, aliases=("expit",)),
    "tanh": Function(torch.tanh, module=nn.Tanh),
    "silu": Function(F.silu, module=nn.SiLU),
    "gelu": Function(F.gelu, {"approximate": "none"}, module=nn.GELU),
    "mish": Function(F.mish, module=nn.Mish),
    "elu": Function(F.elu, {"alpha": 1.0}, module=nn.ELU),
    "selu": Function(F.selu, module=nn.SELU),
    "celu": Function(F.celu, {"alpha": 1.0}, module=nn.CELU),
    "softplus": Function(F.softplus, {"beta": 1.0, "threshold": 20.0}, module=nn.Softplus),
    "logsigmoid": Function(F.logsigmoid, module=nn.LogSigmoid),
    "softsign": Function(F.softsign, module=nn.Softsign),
    "hardswish": Function(F.hardswish, module=nn.Hardswish),
    "hardsigmoid": Function(F.hardsigmoid, module=nn.Hardsigmoid),
    "hardshrink": Function(F.hardshrink, {"lambd": 0.5}, module=nn.Hardshrink),
    "softshrink": Function(F.softshrink, {"lambd": 0.5}, module=nn.Softshrink),
    "tanhshrink": Function(F.tanhshrink, module=nn.Tanhshrink),
    "threshold": Function(F.threshold, {"threshold": None, "value": None}, module=nn.Threshold),
    "exp": Function(_shifted_exp, inner={"offset": 0.0}),
    "expm1": Function(torch.expm1),
    "log": Function(torch.log),
    "log2": Function(torch.log2),
    "log10": Function(torch.log10),
    "log1p": Function(torch.log1p),
    "sqrt": Function(torch.sqrt),
    "rsqrt": Function(_rsqrt, inner={"eps": 0.0}),
    "reciprocal": Function(_reciprocal, inner={"numerator": 1.0, "eps": 0.0}),
    "square": Function(torch.square),
    "sin": Function(torch.sin),
    "cos": Function(torch.cos),
    "tan": Function(torch.tan),
    "atan": Function(torch.atan, aliases=("arctan",)),
    "erf": Function(torch.erf),
    "pow": Function(torch.pow, {"exponent": None}),
    "rpow": Function(_power_of, {"base": None}, aliases=("exp2",)),
}


POLES = frozenset({"log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "pow", "tan"})
"""Functions that, or whose slopes, are infinite or undefined at some inputs."""


def _spelled(name: str) -> Iterator[Any]:
    """Functions and methods that torch has under ``name``, in-place forms included; methods by name."""
    for spelling in (name, f"{name}_"):
        yield from (getattr(place, spelling) for place in (torch, F, torch.special) if hasattr(place, spelling))
        if hasattr(Tensor, spelling):
            yield spelling


NAMES: dict[Any, str] = {
    **{f.module: name for name, f in FUNCTIONS.items() if f.module},
    **{target: name for name, f in FUNCTIONS.items() for alias in (name, *f.aliases) for target in _spelled(alias)},
    operator.pow: "pow",
}
"""The function by the module type, torch function or method name that calls it."""


def parameters(attrs: Attrs) -> dict[str, Any]:
    """The parameters of the function that ``attrs`` name, defaults filled in."""
    function = FUNCTIONS[attrs["function"]]
    defaults = {**function.parameters, **function.inner}
    return {key: attrs.get(key, default) for key, default in defaults.items()}


def evaluate(attrs: Attrs, x: Tensor) -> Tensor:
    """The function that ``attrs`` name, in the dtype of ``x``."""
    return FUNCTIONS[attrs["function"]].compute(x, **parameters(attrs))


class Unary(Operator):
    """``f(x)``. Attributes: ``function``, a key of :data:`FUNCTIONS`, and its parameters.

    ``pow`` is ``x ** exponent`` and ``rpow`` is ``base ** x``. For composites, ``exp`` adds ``offset`` to x, ``rsqrt``
    adds ``eps``, and ``reciprocal`` is ``numerator / (x + eps)``.
    """

    name = "unary"
    kinds = ("table",)
    operation = "table"
    modules = tuple(target for target in NAMES if isinstance(target, type))
    functions = tuple(target for target in NAMES if not isinstance(target, type | str))
    methods = tuple(target for target in NAMES if isinstance(target, str))

    def trace(self, call: Call) -> Traced:
        target = call.function if call.module is None else self._module(call.module)
        name = NAMES[target]
        if name in ("pow", "rpow"):
            return self._power(call, name)
        function = FUNCTIONS[name]
        found = call.bind("input", *function.parameters, input=None, **function.parameters)
        x = found["input"]
        if not isinstance(x, Ref):
            raise call.refuse(f"{name} of a constant", "Compute the constant once, in __init__")
        if call.module is not None:
            found |= {key: getattr(call.module, key) for key in function.parameters}
        values = {key: self._plain(call, key, found[key]) for key in function.parameters}
        return Traced((x,), {"function": name, **values})

    @staticmethod
    def _module(module: nn.Module) -> type[nn.Module]:
        return next(base for base in type(module).__mro__ if base in NAMES)

    def _power(self, call: Call, name: str) -> Traced:
        found = call.bind("input", "exponent", input=call.kwargs.get("self"))
        base, exponent = (2.0, found["input"]) if name == "rpow" else (found["input"], found.get("exponent"))
        if isinstance(exponent, Ref) and not isinstance(base, Ref):
            return Traced((exponent,), {"function": "rpow", "base": self._plain(call, "base", base)})
        if not isinstance(base, Ref):
            raise call.refuse("a power of constants", "Compute the constant once, in __init__")
        return Traced((base,), {"function": "pow", "exponent": self._plain(call, "exponent", exponent)})

    @staticmethod
    def _plain(call: Call, key: str, value: Any) -> float | str:
        """A parameter as JSON data."""
        if isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise call.refuse(f"{key} is a {type(value).__name__}, not a finite number", "Use a plain number")
        return float(value)

    def check_formats(self, node: str, inputs: Sequence[str], output: str) -> None:
        if inputs[0] not in ("int8", "int16") or output not in ("int8", "int16"):
            raise QConfigError(
                "QAT148", node, f"a table from {inputs[0]} to {output}", "Use int8 or int16 before and after it"
            )

    def has_poles(self, attrs: Attrs) -> bool:
        if attrs["function"] == "pow" and attrs["exponent"] >= 1 and float(attrs["exponent"]).is_integer():
            return False
        return attrs["function"] in POLES

    def blows_up_at_zero(self, attrs: Attrs) -> bool:
        return attrs["function"] in ("rsqrt", "reciprocal") or (attrs["function"] == "pow" and attrs["exponent"] < 0)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return evaluate(attrs, inputs[0])

    def lower(self, low: Lowering) -> None:
        source = Source(low.inputs[0].qtype, low.codes(0), low.observed(0))

        def f(x: Floats) -> Floats:
            result: Floats = evaluate(low.attrs, torch.from_numpy(x)).numpy()
            return result

        table = build(f, source, low.out, low.out.limits, low.table, low.name)
        attrs = {**low.attrs, "lo": table.lo, "hi": table.hi, "table": table.record()}
        low.emit("table", attrs, {role: torch.from_numpy(part) for role, part in table.constants().items()})

    # -- right of the Program ------------------------------------------------------------------------------------

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        outputs = expanded(op, program).float()
        smallest, _ = program.in_values(op)[0].qtype.limits
        outputs = outputs.roll(smallest)  # by the bits of the code: 0, 1, …, -2, -1
        mask = len(outputs) - 1

        def run(x: Tensor) -> Tensor:
            """Looked up in the order of memory, so that channels-last inputs are read and written in one sweep."""
            order = sorted(range(x.dim()), key=lambda axis: -x.stride()[axis])
            swept = x.permute(order)
            codes = swept.reshape(-1)
            found = torch.empty_like(codes, dtype=torch.float32)
            for axis, start, size in pieces(codes):
                index = codes.narrow(axis, start, size).to(torch.int32).bitwise_and_(mask)
                torch.index_select(outputs, 0, index, out=found.narrow(axis, start, size))
            return found.view(swept.shape).permute([order.index(axis) for axis in range(x.dim())])

        return run

    def regions(self, op: Op, program: Program) -> Regions:
        return pointwise(op, program)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        entries = expanded(op, program).cpu().numpy().astype(program.values[op.output].qtype.dtype)
        graph.write(op.output, graph.gather_table(op.inputs[0], entries))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        """The function after the clamp of the table's input, if it has one."""
        span = attrs.get("table", {}).get("range")
        x = export_clamp(graph, inputs[0], span)
        return onnx_form(graph, attrs["function"], x, parameters(attrs))


def expanded(op: Op, program: Program) -> Tensor:
    """The output code of every input code of a ``table`` op, smallest first: int32, 256 or 65,536 entries."""
    constants = {role: program.constant(op, role).cpu().numpy() for role in op.consts}
    return torch.from_numpy(Table.read(op.attrs, constants).expanded()).to(program.device, torch.int32)


def onnx_form(graph: Graph, name: str, x: str, p: Mapping[str, Any]) -> str:
    """A function of :data:`FUNCTIONS` with parameters ``p`` as float32 ONNX nodes."""

    def n(op_type: str, *inputs: str | float, **attrs: Any) -> str:
        names = (i if isinstance(i, str) else graph.constant(np.float32(i)) for i in inputs)
        return graph.node(op_type, *names, **attrs)

    match name:
        case "sigmoid" | "tanh" | "sin" | "cos" | "tan" | "atan" | "erf" | "sqrt" | "log" | "softsign" | "selu":
            return n(name.capitalize(), x)
        case "elu" | "celu":
            return n(name.capitalize(), x, alpha=p["alpha"])
        case "silu":
            return n("Mul", x, n("Sigmoid", x))
        case "gelu" if p["approximate"] == "none":
            return n("Mul", n("Mul", x, 0.5), n("Add", n("Erf", n("Mul", x, math.sqrt(0.5))), 1.0))
        case "gelu":
            inner = n("Mul", n("Add", x, n("Mul", n("Pow", x, 3.0), 0.044715)), math.sqrt(2 / math.pi))
            return n("Mul", n("Mul", x, 0.5), n("Add", n("Tanh", inner), 1.0))
        case "mish":
            return n("Mul", x, n("Tanh", n("Softplus", x)))
        case "softplus":
            return n("Div", n("Softplus", n("Mul", x, p["beta"])), p["beta"])
        case "logsigmoid":
            return n("Neg", n("Softplus", n("Neg", x)))
        case "hardswish":
            return n("Mul", x, n("HardSigmoid", x, alpha=1 / 6, beta=0.5))
        case "hardsigmoid":
            return n("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        case "hardshrink":
            return n("Shrink", x, lambd=p["lambd"], bias=0.0)
        case "softshrink":
            return n("Shrink", x, lambd=p["lambd"], bias=p["lambd"])
        case "tanhshrink":
            return n("Sub", x, n("Tanh", x))
        case "threshold":
            return n("Where", n("Greater", x, p["threshold"]), x, p["value"])
        case "exp":
            return n("Exp", n("Add", x, p["offset"]))
        case "expm1":
            return n("Sub", n("Exp", x), 1.0)
        case "log2" | "log10":
            return n("Div", n("Log", x), math.log(float(name[3:])))
        case "log1p":
            return n("Log", n("Add", x, 1.0))
        case "rsqrt":
            return n("Reciprocal", n("Sqrt", n("Add", x, p["eps"])))
        case "reciprocal":
            return n("Div", p["numerator"], n("Add", x, p["eps"]))
        case "square":
            return n("Mul", x, x)
        case "pow":
            return n("Pow", x, p["exponent"])
        case "rpow":
            return n("Pow", p["base"], x)
    raise NotImplementedError(name)
