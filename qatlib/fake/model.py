"""FakeQuantModel: a graph whose every node is a module that computes in float and quantizes its output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from qatlib.errors import QConfigError, StateError
from qatlib.fake.fake_quant import (
    ConstantFakeQuantize,
    FakeQuantize,
    WeightFakeQuantize,
    fake_quantize,
    round_to,
    within_reach,
)
from qatlib.fake.qconfig import QConfig
from qatlib.fake.state import FakeQuantState, StateCell
from qatlib.graph.inputs import in_order
from qatlib.graph.ir import CONSTANT, INPUT, OPAQUE, Graph, Node
from qatlib.graph.source import class_name
from qatlib.ops.base import BY_NAME, Attrs
from qatlib.ops.masks import floor_of_sum
from qatlib.qtype import BOOL, FLOAT, INT32, DType, QType, limits

Visit = Callable[[Node, tuple[Tensor, ...], Tensor], None]
Instead = Callable[[Node, Tensor], Tensor]


class FakeOp(nn.Module):
    """One node. ``activation_post_process`` quantizes its output, ``weight_fake_quant`` its weights; either may be
    None.

    A hybrid op has neither and stays float. ``preserve_qat_mode`` keeps the op in this form after conversion.
    """

    largest_sum: Tensor
    """Of weights of 16 bits: the largest magnitude of every channel's sum that calibration saw."""

    def __init__(
        self,
        node: Node,
        qconfig: QConfig | None,
        quantizes_output: bool,
        cell: StateCell,
        shared: dict[int, nn.Parameter],
        modules: dict[int, nn.Module],
    ) -> None:
        super().__init__()
        self.node, self.qconfig = node, qconfig
        self.preserve_qat_mode = False
        self._cell = cell
        for role, tensor in node.params.items():
            if id(tensor) not in shared:
                trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
                shared[id(tensor)] = nn.Parameter(tensor.detach().clone(), requires_grad=trainable)
            self.register_parameter(role, shared[id(tensor)])
        if isinstance(node.callee, nn.Module):
            modules.setdefault(id(node.callee), copy.deepcopy(node.callee))
            self.callee: Callable[..., Any] | None = modules[id(node.callee)]
        else:
            self.callee = node.callee
        self._unclamped: Attrs | None = None  # of an op whose clamp its fake-quant does along with the rounding
        if node.op in BY_NAME and BY_NAME[node.op].takes_clamp:
            self._unclamped = {key: value for key, value in node.attrs.items() if key != "clamp"}
        weighted = qconfig is not None and "weight" in node.params
        self.weight_fake_quant: WeightFakeQuantize | None = None
        if qconfig and weighted:
            self.weight_fake_quant = WeightFakeQuantize(qconfig.weight, len(node.params["weight"]))
        self._sees_sums = self.weight_fake_quant is not None and self.weight_fake_quant.spec.dtype == "int16"
        if self._sees_sums:
            self.register_buffer("largest_sum", torch.zeros(len(node.params["weight"])))
        self._input_quantizer: tuple[FakeQuantize, ...] = ()
        self._masked_inputs: list[tuple[int, FakeQuantize, float]] = []
        self._largest_other: dict[int, float] = {}
        self._input_range: Callable[[], tuple[float, float] | None] = lambda: None
        spec = qconfig.activation if qconfig and quantizes_output else None
        self.activation_post_process: FakeQuantize | None = None
        below = node.attrs.get("below_maximum")
        if spec and node.op == CONSTANT:
            self.activation_post_process = ConstantFakeQuantize(spec, cell, node.name, node.params["value"], below)
        elif spec:
            self.activation_post_process = FakeQuantize(spec, cell, node.name, below)

    @property
    def hybrid(self) -> bool:
        """Whether the op stays float."""
        return self.qconfig is None

    def compute(self, *inputs: Tensor) -> Tensor:
        """The op before its output is quantized."""
        return self._compute(self.node.attrs, *inputs)

    def _compute(self, attrs: Attrs, *inputs: Tensor) -> Tensor:
        if self.node.op == OPAQUE:
            assert self.callee is not None
            result: Tensor = self.callee(*inputs)
            return result
        params = self.quantized_params() if self._cell.state.quantizes else self.float_params()
        operator = BY_NAME[self.node.op]
        if self._input_quantizer and self._cell.state.quantizes and operator.has_poles(attrs):
            return within_reach(
                lambda x: operator.forward(attrs, params, x),
                inputs[0],
                self._input_range(),
                self._input_quantizer[0].scale,
            )
        return operator.forward(attrs, params, *inputs)

    def float_params(self) -> dict[str, Tensor]:
        """Parameters as trained."""
        return {role: getattr(self, role) for role in self.node.params}

    def quantized_params(self) -> dict[str, Tensor]:
        """Weights rounded to their codes, the bias to the accumulator's unit ``s_x * s_w[c]``, as integers will be."""
        params, fake = self.float_params(), self.weight_fake_quant
        if fake is None:
            return params
        if self._cell.state is FakeQuantState.QAT:
            fake.start(fake.scales(params["weight"]))
        scales = self.weight_scales()
        params["weight"] = fake.quantized(params["weight"], scales)
        if self._input_quantizer:
            params["bias"] = round_to(params["bias"], scales * self._input_quantizer[0].scale)
        return params

    def weight_scales(self) -> Tensor:
        """Scale of every output channel, float32 ``[O]``: that of the weights, or the smallest at which the bias stays
        within 2^30 units of ``s_x * s_w[c]``, and under weights of 16 bits the sums that calibration saw.

        A channel of hardly any weight may have a large bias; 16 bits times 16 bits leave no bits for a sum.
        """
        assert self.weight_fake_quant is not None
        params = self.float_params()
        scales = self.weight_fake_quant.scales(params["weight"])
        if self._input_quantizer:
            unit = self._input_quantizer[0].scale.double() * 2**30
            needed = params["bias"].detach().abs()
            if self._sees_sums:
                needed = torch.maximum(needed, self.largest_sum)
            scales = torch.maximum(scales, (needed.double() / unit).float())
        return scales

    def forward(self, *inputs: Tensor) -> Tensor:
        fake = self.activation_post_process
        if fake is not None and self._unclamped is not None:
            sums = _in_float32(self._compute(self._unclamped, *inputs))
            self._observe(inputs, sums)
            quantized: Tensor = fake(sums, None, self.node.attrs.get("clamp"), _owns_memory(sums, inputs))
            return quantized
        out = _in_float32(self.compute(*inputs))
        self._observe(inputs, out)
        if fake is not None:
            out = fake(out, self._telling(inputs, out))
        elif self._input_quantizer and self._cell.state.quantizes and BY_NAME[self.node.op].rounds(self.node.attrs):
            out = fake_quantize(out, self._input_quantizer[0].scale, self._input_quantizer[0].spec.dtype)
        return out

    def start_learning(self) -> None:
        """Begin with learned scales where they are, as the first forward in QAT does."""
        if (weights := self.weight_fake_quant) is not None:
            weights.start(weights.scales(self.float_params()["weight"]))
        if (fake := self.activation_post_process) is not None:
            fake.start(fake.scale)
            fake.refresh()

    def forget(self) -> None:
        """Drop what earlier calibrations saw of sums and addends."""
        self._largest_other.clear()
        if self._sees_sums:
            self.largest_sum.zero_()
        if isinstance(self.activation_post_process, ConstantFakeQuantize):
            self.activation_post_process.forget()

    def _observe(self, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Keep what scales depend on besides the values of the output."""
        if self._sees_sums and self._cell.state is FakeQuantState.CALIBRATION:
            self._see_sums(inputs, out)
        if self._masked_inputs and self._cell.state.observes:
            self._make_room(inputs, out)

    def _see_sums(self, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Keep the largest magnitude of every channel's sum, without what is fused behind it."""
        operator, node = BY_NAME[self.node.op], self.node
        if len(inputs) > 1 or "clamp" in node.attrs:
            bare = {key: value for key, value in node.attrs.items() if key != "clamp"}
            out = operator.forward(bare, self.float_params(), inputs[0])
        axis = operator.channel_axis % out.dim()  # type: ignore[attr-defined]
        largest = out.detach().abs().movedim(axis, 0).flatten(1)
        if largest.numel():
            self.largest_sum.copy_(torch.maximum(self.largest_sum, largest.amax(1)))

    def _make_room(self, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Let the masks among the addends reach so low that the sum is, too."""
        if self.node.op not in ("add", "sub"):
            return
        alpha = float(self.node.attrs.get("alpha", 1))
        weights = 1.0, alpha if self.node.op == "add" else -alpha
        for i, quantizer, masks in self._masked_inputs:
            other = float((inputs[1 - i] * weights[1 - i]).max())
            self._largest_other[i] = max(self._largest_other.get(i, other), other)
            if bool((inputs[i] <= masks).any()):
                quantizer.make_room(floor_of_sum(out, self.node.attrs["below_maximum"]) - other)

    def _pass_room(self, low: float) -> None:
        """Let the masks among the inputs reach so low that the output reaches ``low``."""
        for i, quantizer, _ in self._masked_inputs:
            factor = self.node.attrs.get("masked_factor", 1.0)
            quantizer.make_room(low / factor - self._largest_other.get(i, 0.0))

    def _telling(self, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """Of 1/x and the like, the values where x is not below half a code: there, the code is 0 and the value huge."""
        state, node = self._cell.state, self.node
        if not (self._input_quantizer and state.observes and BY_NAME[node.op].blows_up_at_zero(node.attrs)):
            return None
        _, qmax = limits(self._input_quantizer[0].spec.dtype)
        size = inputs[0].detach().abs()
        return out[size > size.amax() / (2 * qmax)]

    def extra_repr(self) -> str:
        fused = f" [+ {' + '.join(self.node.absorbed)}]" if self.node.absorbed else ""
        return f"{self.node.op}{fused}" + (", float" if self.hybrid else "")


def _owns_memory(x: Tensor, inputs: tuple[Tensor, ...]) -> bool:
    """Whether ``x`` is no view and shares no memory with ``inputs``."""
    if x._is_view():
        return False
    start = x.untyped_storage().data_ptr()
    return all(start != given.untyped_storage().data_ptr() for given in inputs)


class FakeQuantModel(nn.Module):
    """Runs its graph like the float model, inputs and outputs nested as there.

    Its state is in the checkpoint (buffer ``state_code``), as is whether it was trained (``trained_code``).
    """

    state_code: Tensor
    trained_code: Tensor

    def __init__(self, graph: Graph, plan: Mapping[str, QConfig | None], quantizes_output: Mapping[str, bool]) -> None:
        super().__init__()
        self.graph = graph
        self._cell = StateCell()
        self._ops: dict[str, FakeOp] = {}
        self._contents = {node.name: node.content for node in graph.nodes}
        self.register_buffer("state_code", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("trained_code", torch.tensor(0, dtype=torch.uint8))
        self.register_load_state_dict_post_hook(_restore_state)  # type: ignore[no-untyped-call]
        shared: dict[int, nn.Parameter] = {}
        modules: dict[int, nn.Module] = {}
        for node in graph.nodes:
            if node.op != INPUT:
                op = FakeOp(node, plan[node.name], quantizes_output[node.name], self._cell, shared, modules)
                self._ops[node.name] = op
                self._place(node.name, op)
                masked = [(i, self._quantizer(node.inputs[i])) for i in node.attrs.get("masked_inputs", ())]
                op._masked_inputs = [(i, q, q.below_maximum[2]) for i, q in masked if q and q.below_maximum]
                if op._masked_inputs and op.activation_post_process is not None:
                    op.activation_post_process.pass_room = op._pass_room
                operator = BY_NAME.get(node.op)
                reads_scale = op.weight_fake_quant is not None or (
                    operator is not None and (operator.rounds(node.attrs) or operator.has_poles(node.attrs))
                )
                if reads_scale and not op.hybrid and (quantizer := self._quantizer(node.inputs[0])):
                    op._input_quantizer = (quantizer,)  # in a tuple: it belongs to another op
                    op._input_range = partial(self.observed, node.inputs[0])

    def _place(self, name: str, op: FakeOp) -> None:
        """Register ``op`` under its dotted name: submodules and state dicts then read like the user's model."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            owner = _child(owner, part) or _adopt(owner, part, nn.Module())
        existing = _child(owner, leaf)
        if existing is not None:
            op._modules.update(existing._modules)
        _adopt(owner, leaf, op)

    def _quantizer(self, name: str) -> FakeQuantize | None:
        """What quantizes the value of a node: its own module, or that of the node whose format it keeps."""
        op = self._ops.get(name)
        if op is None or op.hybrid:
            return None
        if op.activation_post_process is None and BY_NAME[op.node.op].keeps_scale:
            return self._quantizer(op.node.inputs[0])
        return op.activation_post_process

    def observed(self, name: str) -> tuple[float, float] | None:
        """Range of real values that calibration saw of a node, None if it did not look.

        Of a node that keeps the format of its input: what becomes of the input's range.
        """
        op = self._ops.get(name)
        if op is None or op.hybrid:
            return None
        if op.activation_post_process is None and BY_NAME[op.node.op].keeps_scale:
            seen = self.observed(op.node.inputs[0])
            return None if seen is None else BY_NAME[op.node.op].real_range(op.node.attrs, *seen)
        fake = op.activation_post_process
        if fake is None or (fake.low == 0 and fake.high == 0 and fake.spec.scale is not None):
            return None
        return float(fake.low), float(fake.high)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> FakeQuantState:
        return self._cell.state

    def set_state(self, state: FakeQuantState) -> None:
        """The one place where the state changes; raises StateError (QAT150) for quantizing without scales."""
        if state.quantizes:
            missing = [name for name, op in self._ops.items() if (q := op.activation_post_process) and not q.calibrated]
            if missing:
                raise StateError(
                    "QAT150",
                    missing[0],
                    f"{len(missing)} of {len(self._ops)} ops have no scale, so {state.name} cannot quantize",
                    "Calibrate the model, or load a calibrated checkpoint, first",
                )
        for op in self._ops.values():
            if op.activation_post_process is not None:
                op.activation_post_process.refresh()
        self._cell.state = state
        self.state_code.fill_(list(FakeQuantState).index(state))

    def check_scorable(self) -> None:
        """Raise StateError (QAT156) unless a score would be that of the quantized model."""
        if self.state is not FakeQuantState.VALIDATION or self.training:
            mode = "train" if self.training else "eval"
            raise StateError(
                "QAT156",
                "evaluation",
                f"the fake-quant model is in {self.state.name} state and {mode} mode; in CALIBRATION it would score as"
                " the float model does",
                "Call model.eval(), then set_fake_quantize(model, FakeQuantState.VALIDATION)",
            )

    @property
    def trained(self) -> bool:
        """Whether QAT moved the weights away from the float model's."""
        return bool(self.trained_code)

    def mark_trained(self) -> None:
        self.trained_code.fill_(1)

    # -- running -------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Outputs nested as those of the float model; inputs in its order, or by name. Raises QConfigError QAT143."""
        return self._run(in_order(self.graph.inputs, inputs, named))

    def walk(self, *inputs: Tensor, visit: Visit) -> Any:
        """Forward that calls ``visit(node, inputs, output)`` after every node."""
        return self._run(inputs, visit=visit)

    def substituted(self, *inputs: Tensor, instead: Instead) -> Any:
        """Forward in which ``instead(node, output)`` takes the place of every node's output."""
        return self._run(inputs, instead=instead)

    def compute(self, name: str, *inputs: Tensor) -> Tensor:
        """One node on given inputs, with its output quantized as the state says."""
        result: Tensor = self._ops[name](*inputs)
        return result

    def _run(self, inputs: tuple[Tensor, ...], visit: Visit | None = None, instead: Instead | None = None) -> Any:
        names = self.graph.inputs
        if len(inputs) != len(names):
            raise QConfigError("QAT143", "inputs", f"got {len(inputs)} tensors for {list(names)}", "Pass one each")
        values = dict(zip(names, inputs, strict=True))
        for name, op in self._ops.items():
            arguments = tuple(values[i] for i in op.node.inputs)
            values[name] = op(*arguments)
            if instead is not None:
                values[name] = instead(op.node, values[name])
            if visit is not None:
                visit(op.node, arguments, values[name])
        return tree_unflatten([values[name] for name in self.graph.outputs], self.graph.structure)

    # -- looking -------------------------------------------------------------------------------------------------

    def ops(self) -> Iterator[tuple[str, FakeOp]]:
        """Every op by node name, in execution order."""
        yield from self._ops.items()

    def op(self, name: str) -> FakeOp:
        return self._ops[name]

    def dtype(self, name: str) -> DType:
        """Dtype of a node's output, known before calibration."""
        fake = self._quantizer(name)
        content = self._contents[name]
        if content != "float":
            return (INT32 if content == "int" else BOOL).dtype
        return "float32" if fake is None else fake.spec.dtype

    def quantizer(self, name: str) -> FakeQuantize | None:
        """What quantizes the value of a node: its own module, or that of the node whose format it keeps."""
        return self._quantizer(name)

    def qtype(self, name: str) -> QType:
        """Format of a node's output: int8/int16 with its scale, integers or truth values as they are, or float."""
        content = self._contents[name]
        if content != "float":
            return INT32 if content == "int" else BOOL
        fake = self._quantizer(name)
        return FLOAT if fake is None else QType(fake.spec.dtype, float(fake.scale))


def _in_float32(x: Tensor) -> Tensor:
    """Codes and scales need more than the bfloat16 of autocast."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _child(owner: nn.Module, name: str) -> nn.Module | None:
    return owner._modules.get(name)


def _adopt(owner: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Register a child; unlike ``add_module`` also where the user's name is that of a method, such as ``op``."""
    owner._modules[name] = module
    return module


def _restore_state(model: nn.Module, _: Any) -> None:
    assert isinstance(model, FakeQuantModel)
    model._cell.state = list(FakeQuantState)[int(model.state_code)]


def set_fake_quantize(model: FakeQuantModel, state: FakeQuantState) -> None:
    """Put the whole model in ``state``. Call ``model.eval()`` or ``model.train()`` before it."""
    model.set_state(state)


def set_preserve_qat_mode(
    model: FakeQuantModel, prefixes: tuple[str, ...] = (), types: tuple[type[nn.Module], ...] = (), value: bool = True
) -> list[str]:
    """Keep ops in fake-quant form after conversion: those under the named modules, or of modules of the types.

    A module means all inside of it; one that was fused means the op it is part of. Returns the names of the ops it
    changed; raises QConfigError (QAT144) for a prefix or type that matches none.
    """
    ops = [(name, op) for name, op in model.ops() if op.node.op not in ("quantize", "dequantize")]
    hits = {prefix: {name for name, op in ops if op.node.is_under(prefix)} for prefix in prefixes}
    hits |= {kind: {name for name, op in ops if op.node.is_of(kind)} for kind in map(class_name, types)}
    for wanted, names in hits.items():
        if not names:
            raise QConfigError("QAT144", wanted, "no operator is under this name", "Use a name from print(model)")
    changed = [name for name, _ in ops if any(name in names for names in hits.values())]
    for name in changed:
        model.op(name).preserve_qat_mode = value
    return changed
