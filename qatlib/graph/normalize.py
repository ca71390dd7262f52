"""fx calls → Nodes: each call is handed to the operator that knows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from qatlib.errors import GraphError
from qatlib.graph.ir import INPUT, OPAQUE, Graph, Node
from qatlib.graph.source import Shape, operator_of, source_line
from qatlib.graph.unsupported import unsupported
from qatlib.ops.base import BY_FUNCTION, BY_METHOD, Call, Operator, Ref


def normalize(module: fx.GraphModule, runs: list[dict[str, Any]], leaf: set[str], wrap: Sequence[Any]) -> Graph:
    """``runs`` are the results at two batch sizes: an axis that differs between them is the batch axis."""
    return _Normalizer(module, runs, leaf, {id(function) for function in wrap}).graph()


@dataclass
class _Normalizer:
    module: fx.GraphModule
    runs: list[dict[str, Any]]
    leaf: set[str]
    wrapped: set[int]
    nodes: list[Node] = field(default_factory=list)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def graph(self) -> Graph:
        *calls, output = self.module.graph.nodes
        for call in calls:
            self.env[call] = self._visit(call)
        if self.missing:
            raise unsupported(self.missing)
        leaves, structure = tree_flatten(_plain(self._resolve(output.args[0])))
        for value in leaves:
            if not isinstance(value, Ref):
                seen = f"the model returns {type(value).__name__} that no operator made"
                raise GraphError("QAT136", "output", seen, "Return tensors computed from the inputs")
        return Graph(tuple(self.nodes), tuple(value.name for value in leaves), structure)

    def _resolve(self, value: Any) -> Any:
        return map_arg(value, lambda node: self.env[node])

    def _visit(self, node: fx.Node) -> Any:
        """A :class:`Ref` for a tensor of the graph; the value itself for parameters, sizes and other constants."""
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.module.get_submodule(owner), name)
        first, second = (run[node.name] for run in self.runs)
        if not isinstance(first, Shape):
            return _static(first, second) if not _holds_tensor(first) else self._unsupported(node, None)
        if node.op == "placeholder":
            return self._add(Node(node.name, INPUT, shape=self._shape(node), module_type="input"))
        return self._call(node)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        first, second = (run[node.name].sizes for run in self.runs)
        if len(first) != len(second):
            seen = "the number of axes depends on the batch size"
            raise GraphError("QAT136", source_line(node) or node.name, seen, "Keep the batch axis")
        return tuple(a if a == b else -1 for a, b in zip(first, second, strict=True))

    def _call(self, node: fx.Node) -> Ref:
        target: Any = node.target
        called = self.module.get_submodule(target) if node.op == "call_module" else None
        operator = self._operator(node, called)
        if operator is None:
            if target in self.leaf or (callable(target) and (id(target) in self.wrapped or not _of_torch(target))):
                return self._opaque(node, called)
            return self._unsupported(node, called)
        call = Call(
            where=self._described(node),
            args=tuple(self._resolve(node.args)),
            kwargs=dict(self._resolve(node.kwargs)),
            module=called,
            function=None if called else target,
            out_shape=self._shape(node),
        )
        try:
            traced = operator.trace(call)
        except GraphError:
            if not self.missing:
                raise
            # Perhaps a consequence of what is missing, which is reported first.
            return Ref(self._name(node, called), self._shape(node))
        name = self._name(node, called)
        return self._add(
            Node(
                name,
                operator.name,
                tuple(ref.name for ref in traced.inputs),
                traced.attrs,
                traced.params,
                self._shape(node),
                str(target) if called else "",
                _type_name(node, called),
                source_line(node),
            )
        )

    def _operator(self, node: fx.Node, called: nn.Module | None) -> Operator | None:
        if str(node.target) in self.leaf:
            return None
        if called is not None:
            return operator_of(called)
        return BY_METHOD.get(str(node.target)) if node.op == "call_method" else BY_FUNCTION.get(node.target)  # type: ignore[arg-type]

    def _opaque(self, node: fx.Node, called: nn.Module | None) -> Ref:
        """A wrapped function or leaf module, kept as it is; its arguments have to be tensors of the graph."""
        args = [*self._resolve(node.args), *self._resolve(node.kwargs).values()]
        refs = [arg for arg in args if isinstance(arg, Ref)]
        if len(refs) != len(args):
            raise GraphError(
                "QAT134", self._described(node), "is kept whole but called with constants", "Pass tensors only"
            )
        name = self._name(node, called)
        callee: Any = called if called is not None else node.target
        return self._add(
            Node(name, OPAQUE, tuple(r.name for r in refs), {}, {}, self._shape(node), str(node.target) if called else
            "",
                 _type_name(node, called), source_line(node), callee=callee)
        )  # fmt: skip

    def _unsupported(self, node: fx.Node, called: nn.Module | None) -> Ref:
        if node.op == "call_module":
            called = self.module.get_submodule(str(node.target))
        self.missing.append((self._name(node, called), _type_name(node, called), source_line(node)))
        first = self.runs[0][node.name]
        return Ref(self.missing[-1][0], self._shape(node) if isinstance(first, Shape) else ())

    def _described(self, node: fx.Node) -> str:
        at = source_line(node)
        return f"{node.target if node.op == 'call_module' else node.name}" + (f" ({at})" if at else "")

    def _name(self, node: fx.Node, called: nn.Module | None) -> str:
        """The module's qualified name, or scope and function name; a further call of the same gets ``#1``, ``#2`` …"""
        if called is not None:
            base = str(node.target)
        else:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            scope = str(stack[-1][0]) if stack and isinstance(stack[-1], tuple) else ""
            function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
            base = f"{scope}.{function}".strip(".")
        name, k = base, 0
        while name in self.taken:
            k += 1
            name = f"{base}#{k}"
        self.taken.add(name)
        return name

    def _add(self, node: Node) -> Ref:
        self.nodes.append(node)
        self.taken.add(node.name)
        return Ref(node.name, node.shape)


def _of_torch(function: Any) -> bool:
    """Whether it is of torch or Python itself, not a function that the user marked with ``torch.fx.wrap``."""
    package = (getattr(function, "__module__", None) or "builtins").partition(".")[0]
    return package in ("torch", "_operator", "builtins", "math")


def _plain(value: Any) -> Any:
    """fx's immutable lists and dicts as the ones that the model returns."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return tuple(_plain(item) for item in value) if type(value) is tuple else value


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])


def _static(first: Any, second: Any) -> Any:
    """A size or other plain value; -1 where it follows the batch."""
    leaves, structure = tree_flatten(first)
    others = tree_flatten(second)[0]
    merged = [a if a == b else -1 for a, b in zip(leaves, others, strict=True)]
    return structure.unflatten(merged) if leaves else first


def _type_name(node: fx.Node, called: nn.Module | None) -> str:
    if called is not None:
        return f"{type(called).__module__}.{type(called).__qualname__}"
    if isinstance(node.target, str):
        return f"torch.Tensor.{node.target}"
    return function_type(node.target)


def function_type(function: Any) -> str:
    """Module and name of a function, as people write it."""
    package = re.sub(r"^_operator$", "operator", getattr(function, "__module__", None) or "torch")
    return f"{package}.{getattr(function, '__name__', function)}"
