"""What an operator is, and the registry of all operators.

An operator file sits on both sides of the Program: it recognises calls in a trace and computes them in float (left),
lowers them to Program ops, and gives those ops an integer kernel and a cost (right). Subclassing :class:`Operator` in a
file of this folder is all the registration there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from qatlib.errors import GraphError, ProgramError
from qatlib.ops.region import Regions
from qatlib.ops.work import Form, Operation, Work, size_of
from qatlib.program import Op, Program, Value
from qatlib.qtype import limits

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering

Attrs = Mapping[str, Any]
Params = Mapping[str, Tensor]
Range = tuple[int, int]
Kernel = Callable[..., Tensor]
"""Integer kernel: input codes in (as float32 or float64 tensors of integers, or float32 reals), output codes out."""


Content = Literal["float", "int", "bool"]
"""What the elements of a tensor are: real numbers, integers without a scale (indices), or truth values."""


@dataclass(frozen=True)
class Ref:
    """A tensor computed in the graph, by name of the node that makes it.

    A negative size -k in ``shape`` is k times the batch: -1 is the batch itself.
    """

    name: str
    shape: tuple[int, ...]
    content: Content = "float"


@dataclass(frozen=True)
class Format:
    """Format that an inner step takes unless the user's qconfig names the step; None leaves the default."""

    dtype: Literal["int8", "int16"] | None = None
    scale: float | None = None


class Steps(Protocol):
    """Where the inner steps of a composite go; see :meth:`Call.emit` and :meth:`Call.ref`."""

    def emit(
        self, op: str, inputs: Sequence[Ref], attrs: Attrs, params: Params, suffix: str, format: Format | None
    ) -> Ref: ...

    def ref(self, value: Any) -> Ref: ...

    def derive(self, tensor: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Call:
    """One call seen in a trace.

    ``args`` and ``kwargs`` hold :class:`Ref` for tensors computed from the inputs, and plain values, parameters or
    other constant tensors otherwise. ``module`` is the called module, or None for a function or method.
    """

    where: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: nn.Module | None = None
    function: Any = None
    """The called function, or the name of the called method."""
    out_shape: tuple[int, ...] = ()
    """Shape of the result, or of its first tensor; -1 for the batch."""
    steps: Steps | None = None

    def emit(
        self,
        op: str,
        inputs: Sequence[Ref],
        attrs: Attrs | None = None,
        params: Params | None = None,
        *,
        suffix: str,
        format: Format | None = None,
    ) -> Ref:
        """Append an inner step of a composite: a node named after the call with ``suffix`` (".exp").

        ``op`` is the name of an :class:`Operator`, whose ``forward`` on tensors without data gives the shape.
        """
        assert self.steps is not None
        return self.steps.emit(op, inputs, attrs or {}, params or {}, suffix, format)

    def ref(self, value: Any) -> Ref:
        """A constant (number, parameter, other tensor) as a node that the graph can read; a Ref as it is."""
        if isinstance(value, Ref):
            return value
        assert self.steps is not None
        return self.steps.ref(value)

    def derive(self, tensor: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(tensor)`` as a parameter that trains if ``tensor`` does.

        All calls that derive the same ``what`` of the same tensor share it, as they share the tensor.
        """
        assert self.steps is not None
        return self.steps.derive(tensor, what, make)

    def bind(self, *names: str, **defaults: Any) -> dict[str, Any]:
        """Arguments by name, ``names`` in positional order; missing ones come from ``defaults``."""
        bound: dict[str, Any] = dict(defaults)
        bound.update(zip(names, self.args, strict=False))
        bound.update({key: value for key, value in self.kwargs.items() if key in names or key in defaults})
        return bound

    def refuse(self, seen: str, fix: str) -> GraphError:
        """The error for a variant of the operator that is not supported."""
        return GraphError("QAT134", self.where, seen, fix)


@dataclass(frozen=True)
class Traced:
    """What an operator makes of a :class:`Call`: tensor inputs, plain attributes, float parameters.

    ``op`` names another operator whose node this is.
    """

    inputs: tuple[Ref, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)
    format: Format | None = None
    op: str = ""


@dataclass(frozen=True)
class Cost:
    """Work of one Program op for one sample.

    ``macs`` multiply-accumulates, ``vector_ops`` elementwise operations, bytes read from weights and moved for
    activations.
    """

    macs: int = 0
    vector_ops: int = 0
    weight_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0


class Operator(ABC):
    """One kind of computation. Subclasses are stateless; the class itself is never instantiated by users."""

    name: ClassVar[str]
    """Name in graphs, and the ``kind`` of its Program ops unless :attr:`kinds` says otherwise."""
    kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of Program ops whose kernel and cost live here; defaults to ``(name,)``."""
    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    functions: ClassVar[tuple[Callable[..., Any], ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ()
    keeps_scale: ClassVar[bool] = False
    """True if the output has the format of the first input: bits are moved or clamped, never rescaled."""
    takes_clamp: ClassVar[bool] = False
    """True if a relu after it can be its output clamp (attribute ``clamp``)."""
    form: ClassVar[Form] = "elements"
    """What the work of its ops looks like: see :class:`qatlib.ops.work.Work`."""
    operation: ClassVar[Operation] = ""

    # -- left of the Program -------------------------------------------------------------------------------------

    def trace(self, call: Call) -> Any:
        """Normalize a call; raise GraphError (QAT134) for an unsupported variant.

        The result is a :class:`Traced`, which becomes one node with the name of the call; or, of a composite, the
        :class:`Ref` of its last step, or a tuple of them for a call that returns several tensors.
        """
        raise NotImplementedError(f"{type(self).__name__} is never called by a model")

    def check_formats(self, node: str, inputs: Sequence[str], output: str) -> None:  # noqa: B027 most take every mix
        """Raise QConfigError (QAT148) at ``prepare`` for a mix of dtypes that has no integer form.

        ``inputs`` and ``output`` are dtypes; "float32" is the accumulator of a high-precision output.
        """

    def has_poles(self, attrs: Attrs) -> bool:
        """Whether it is a function of one tensor that, or whose slope, is infinite or undefined at some inputs."""
        return False

    def rounds(self, attrs: Attrs) -> bool:
        """Whether an operator that keeps the scale makes values that are no codes, which are rounded to codes again."""
        return False

    def blows_up_at_zero(self, attrs: Attrs) -> bool:
        """Whether it has poles, and the one at 0 makes values there that say nothing of those elsewhere: 1/x."""
        return False

    @abstractmethod
    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        """The operator in float."""

    def real_range(self, attrs: Attrs, low: float, high: float) -> tuple[float, float]:
        """Of an operator that keeps the scale: the range of its output where that of its first input is [low, high]."""
        return low, high

    def lower(self, low: Lowering) -> None:
        """Emit the Program op(s) of one node; see :class:`qatlib.lowering.Lowering`."""
        raise NotImplementedError(f"{type(self).__name__} has no Program form")

    # -- right of the Program ------------------------------------------------------------------------------------

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        """Prepare constants and choose an exact route; ``ranges`` are the proven code ranges of the inputs."""
        raise NotImplementedError(f"{type(self).__name__} has no integer kernel")

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        """Write the op as ONNX nodes that compute the same integers; see :class:`qatlib.export.integer.IntegerGraph`.

        Raises ProgramError (QAT220) for an op without such a form.
        """
        raise ProgramError("QAT220", op.name, f"kind {op.kind!r} has no ONNX form", "Export without this op")

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        """Write :meth:`forward` as float32 ONNX nodes and return the name of the result.

        ``inputs`` and ``consts`` name float32 tensors. Float islands and the QDQ flavour share it. Raises ProgramError
        (QAT220) for an operator without such a form.
        """
        raise ProgramError(
            "QAT220", graph.scope, f"operator {self.name!r} has no float ONNX form", "Export without this op"
        )

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        """What :meth:`export_float` takes to compute the real numbers of a Program op: attributes and constants.

        By default the attributes of the op, its output clamp as the real bounds ``clamp``, and no constants.
        """
        return graph.real_attrs(op), {}

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        """Proven range of the output codes."""
        if "lo" in op.attrs:
            return int(op.attrs["lo"]), int(op.attrs["hi"])
        if self.keeps_scale:
            return ranges[0]
        return limits(value.qtype.dtype)

    def cost(self, op: Op, program: Program) -> Cost:
        """Work for one sample. The default is one vector operation per output element."""
        out = program.values[op.output]
        return Cost(
            vector_ops=out.elements(),
            weight_bytes=sum(program.constants[key].nbytes for key in op.consts.values()),
            input_bytes=sum(value.bytes() for value in program.in_values(op)),
            output_bytes=out.bytes(),
        )

    def work(self, op: Op, program: Program) -> Work:
        """The shape of the work of one sample. The default is :attr:`form` from the first input to the output."""
        inputs = program.in_values(op)
        overlays = tuple(range(len(inputs))) if self.form == "elements" else ()
        sizes = size_of(inputs[0] if inputs else program.values[op.output]), size_of(program.values[op.output])
        return Work(self.form, *sizes, operation=self.operation, overlays=overlays)

    def regions(self, op: Op, program: Program) -> Regions | None:
        """How the output can be computed region by region; None, the default: only whole, from whole inputs."""
        return None

    # -- registry ------------------------------------------------------------------------------------------------

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            return
        instance = cls()
        tables: tuple[tuple[dict[Any, Operator], tuple[Any, ...]], ...] = (
            (BY_NAME, (cls.name,)),
            (BY_KIND, cls.kinds or (cls.name,)),
            (BY_MODULE, cls.modules),
            (BY_FUNCTION, cls.functions),
            (BY_METHOD, cls.methods),
        )
        for table, keys in tables:
            for key in keys:
                if key in table and type(table[key]) is not cls:
                    raise TypeError(f"{key!r} is claimed by {table[key]!r} and {instance!r}")
                table[key] = instance


BY_NAME: dict[str, Operator] = {}
BY_KIND: dict[str, Operator] = {}
BY_MODULE: dict[type[nn.Module], Operator] = {}
BY_FUNCTION: dict[Callable[..., Any], Operator] = {}
BY_METHOD: dict[str, Operator] = {}
