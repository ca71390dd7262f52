"""FakeQuantModel: a graph whose every node is a module that computes in float and quantizes its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from qatlib.errors import QConfigError, StateError
from qatlib.fake.fake_quant import (
    FakeQuantize,
)
from qatlib.fake.op import FakeOp
from qatlib.fake.qconfig import QConfig
from qatlib.fake.state import FakeQuantState, StateCell
from qatlib.graph.inputs import in_order
from qatlib.graph.ir import INPUT, Graph, Node
from qatlib.graph.source import class_name
from qatlib.ops.base import BY_NAME
from qatlib.qtype import BOOL, FLOAT, INT32, DType, QType

Visit = Callable[[Node, tuple[Tensor, ...], Tensor], None]
Instead = Callable[[Node, Tensor], Tensor]
Step = tuple[Node, tuple[Tensor, ...], Tensor]
"""A node, its inputs and its output."""


class FakeQuantModel(nn.Module):
    """Runs its graph like the float model, inputs and outputs nested as there.

    Its state is in the checkpoint (buffer ``state_code``), as is whether it was trained (``trained_code``). ``origins``
    are the settings by which every op has the formats of its output and its weights, in words.
    """

    state_code: Tensor
    trained_code: Tensor

    def __init__(self, graph: Graph, plan: Mapping[str, QConfig | None], quantizes_output: Mapping[str, bool]) -> None:
        super().__init__()
        self.graph = graph
        self.origins: Mapping[str, tuple[str, str]] = {}
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

        last_use = {name: node.name for node in graph.nodes for name in node.inputs if name not in graph.outputs}
        self._dying: dict[str, list[str]] = {name: [] for name in self._ops}
        for name, reader in last_use.items():
            self._dying[reader].append(name)

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

    @contextmanager
    def held_parameters(self) -> Iterator[None]:
        """Round the parameters of each op once: for runs without gradients between which nothing is set or trained."""
        ops = [op for op in self._ops.values() if op.held is None]
        for op in ops:
            op.held = {}
        try:
            yield
        finally:
            for op in ops:
                op.held = None

    def steps(self, *inputs: Tensor) -> Iterator[Step]:
        """Forward, one node whenever the next is asked for."""
        return self._steps(self._named(inputs))

    def float_steps(self, *inputs: Tensor) -> Iterator[Step]:
        """Likewise without what quantizes outputs and observes them: in CALIBRATION state the float model."""
        return self._steps(self._named(inputs), FakeOp.compute)

    def compute(self, name: str, *inputs: Tensor) -> Tensor:
        """One node on given inputs, with its output quantized as the state says."""
        result: Tensor = self._ops[name](*inputs)
        return result

    def _run(self, inputs: tuple[Tensor, ...], visit: Visit | None = None, instead: Instead | None = None) -> Any:
        values = self._named(inputs)
        for step in self._steps(values, instead=instead):
            if visit is not None:
                visit(*step)
        return tree_unflatten([values[name] for name in self.graph.outputs], self.graph.structure)

    def _named(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = self.graph.inputs
        if len(inputs) != len(names):
            raise QConfigError("QAT143", "inputs", f"got {len(inputs)} tensors for {list(names)}", "Pass one each")
        return dict(zip(names, inputs, strict=True))

    def _steps(
        self,
        values: dict[str, Tensor],
        forward: Callable[..., Tensor] = FakeOp.__call__,
        instead: Instead | None = None,
    ) -> Iterator[Step]:
        """Run the ops on ``values``, which loses each after its last reader; the outputs stay."""
        for name, op in self._ops.items():
            arguments = tuple(values[i] for i in op.node.inputs)
            values[name] = forward(op, *arguments)
            if instead is not None:
                values[name] = instead(op.node, values[name])
            yield op.node, arguments, values[name]
            for dead in self._dying[name]:
                del values[dead]

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
