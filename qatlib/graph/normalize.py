"""fx calls → Nodes: each call is handed to the operator that knows it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves

from qatlib.errors import GraphError
from qatlib.graph.aliases import Views
from qatlib.graph.inputs import is_container, plain
from qatlib.graph.ir import CONSTANT, INPUT, OPAQUE, Graph, Node
from qatlib.graph.run import Run
from qatlib.graph.source import (
    BATCHES,
    Shape,
    batched,
    batched_shape,
    operator_of,
    scope_of,
    source_line,
    type_name,
)
from qatlib.graph.unsupported import unsupported
from qatlib.ops.base import BY_FUNCTION, BY_METHOD, BY_NAME, Attrs, Call, Format, Operator, Params, Ref, Traced


def normalize(module: fx.GraphModule, runs: list[Run], leaf: set[str], wrap: Sequence[Any]) -> Graph:
    """``runs`` are those at :data:`.source.BATCHES`: an axis that differs between them follows the batch."""
    return _Normalizer(module, runs, leaf, {id(function) for function in wrap}).graph()


@dataclass
class _Normalizer:
    """Visits the calls in order. ``env`` holds per call a :class:`Ref` (or a nesting of them), or a plain value, or a
    constant tensor. It is the :class:`qatlib.ops.base.Steps` of the calls that it hands to operators.
    """

    module: fx.GraphModule
    runs: list[Run]
    leaf: set[str]
    wrapped: set[int]
    nodes: list[Node] = field(default_factory=list)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    constants: dict[int, tuple[Tensor, Ref]] = field(default_factory=dict)
    derived: dict[tuple[int, str], tuple[Tensor, nn.Parameter]] = field(default_factory=dict)
    site: Node = field(default_factory=lambda: Node("", ""))

    def graph(self) -> Graph:
        *calls, output = self.module.graph.nodes
        views = Views(self, self.nodes)
        for call in calls:
            before = len(self.nodes)
            self.env[call] = self._visit(call)
            if call.name in self.runs[0].writes:
                self._overwrite(call, views, {node.name for node in self.nodes[before:]})
        if self.missing:
            raise unsupported(self.missing)
        leaves, structure = tree_flatten_with_path(plain(self._resolve(output.args[0])))
        for path, value in leaves:
            if not isinstance(value, Ref):
                seen = f"the model returns {type(value).__name__} that no operator made"
                raise GraphError("QAT136", f"output{keystr(path)}", seen, "Return tensors computed from the inputs")
        return Graph(tuple(self.nodes), tuple(value.name for _, value in leaves), structure)

    def _resolve(self, value: Any) -> Any:
        return map_arg(value, lambda node: self.env[node])

    def _visit(self, node: fx.Node) -> Any:
        """A :class:`Ref` for a tensor of the graph; the value itself for parameters, sizes and other constants."""
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.module.get_submodule(owner), name)
        if node.op == "call_function" and is_container(node.target):
            return node.target(*self._resolve(node.args), **self._resolve(node.kwargs))  # type: ignore[operator]
        first, second = (run.results[node.name] for run in self.runs)
        if not _computed(first):
            return self._constant_tensor(node, first, second) if isinstance(first, Tensor) else _static(first, second)
        if node.op == "placeholder":
            if not isinstance(first, Shape):
                raise GraphError("QAT136", node.name, "is an input that is not a tensor", "Pass tensors")
            shape, target = self._shape(node), str(node.target)
            name = target if target.isidentifier() else node.name  # fx calls an argument ``input`` input_1
            return self._add(Node(name, INPUT, shape=shape, module_type="input", content=first.content))
        if node.target in (operator.getitem, getattr) and node.op == "call_function":
            whole = self._resolve(node.args[0])
            if not isinstance(whole, Ref | Tensor):
                key = self._resolve(node.args[1])
                return whole[key] if node.target is operator.getitem else getattr(whole, key)
        return self._call(node)

    def _constant_tensor(self, node: fx.Node, first: Tensor, second: Tensor) -> Tensor:
        """A tensor that no input reaches; one that only repeats with the batch keeps a batch axis of 1."""
        if first.shape == second.shape and torch.equal(first, second):
            return first
        axes = [axis for axis, sizes in enumerate(zip(first.shape, second.shape, strict=False)) if sizes == BATCHES]
        if first.dim() == second.dim() and len(axes) == 1:
            one = first.narrow(axes[0], 0, 1)
            if torch.equal(one.expand_as(first), first) and torch.equal(one.expand_as(second), second):
                return one
        seen = "is a constant whose elements depend on the batch size"
        raise GraphError("QAT136", source_line(node) or node.name, seen, "Compute it from the inputs' other axes")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of the first tensor that a call returns."""
        first, second = (
            next(x for x in tree_leaves(run.results[node.name]) if isinstance(x, Shape)) for run in self.runs
        )
        return batched_shape(first, second, source_line(node) or node.name)

    def _content(self, node: fx.Node) -> Any:
        return next(x for x in tree_leaves(self.runs[0].results[node.name]) if isinstance(x, Shape)).content

    def _call(self, node: fx.Node) -> Any:
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
            steps=self,
        )
        self.site = Node(
            self._name(node, called),
            operator.name,
            shape=call.out_shape,
            module=str(target) if called else "",
            module_type=type_name(node, called),
            where=source_line(node),
            content=self._content(node),
            scope=scope_of(node),
        )
        site = self.site
        try:
            result = operator.trace(call)
        except GraphError:
            if not self.missing:
                raise
            # Perhaps a consequence of what is missing, which is reported first.
            return self._stand_in(node, site.name)
        if isinstance(result, Traced):
            names = tuple(ref.name for ref in result.inputs)
            op = result.op or operator.name
            result = self._add(
                replace(site, op=op, inputs=names, attrs=result.attrs, params=result.params, format=result.format)
            )
        return result

    def _overwrite(self, node: fx.Node, views: Views, made: set[str]) -> None:
        """After an in-place call, which ``made`` some nodes, all that held what it changed holds the new elements."""
        first, second = (run.writes[node.name] for run in self.runs)
        by_name = {earlier.name: earlier for earlier in self.env}
        new, target = self.env[node], by_name[first.target]
        at = source_line(node) or node.name
        if not isinstance(new, Ref):
            for name in first.held:
                leaves, structure = tree_flatten(self.env[by_name[name]])
                pairs = zip(first.constants[name], second.constants[name], strict=True)
                leaves = [self._constant_tensor(node, a, b) if isinstance(a, Tensor) else a for a, b in pairs]
                self.env[by_name[name]] = structure.unflatten(leaves)
            return
        if self.missing or not first.held:
            return
        if self.nodes[-1].op == OPAQUE:
            seen = "is kept whole but changes its argument in place, which is read again"
            raise GraphError("QAT137", at, seen, "Let it return a new tensor")
        if new.name not in made:  # a copy of another value, which does not change with this one
            new = self.emit("identity", [new], {}, {}, ".copy", None)
        nested = {name: tree_flatten(self.env[by_name[name]]) for name in first.held}
        held = [pair for name, (leaves, _) in nested.items() for pair in zip(leaves, first.held[name], strict=True)]
        parts = [x for x, how in held if how == "part"]
        changed = iter(views.change(at, self.env[target], new, parts))
        for name, (leaves, structure) in nested.items():
            pairs = zip(leaves, first.held[name], strict=True)
            leaves = [new if how == "same" else next(changed) if how else x for x, how in pairs]
            self.env[by_name[name]] = structure.unflatten(leaves)

    # -- steps of composites ---------------------------------------------------------------------------------------

    def emit(
        self, op: str, inputs: Sequence[Ref], attrs: Attrs, params: Params, suffix: str, format: Format | None
    ) -> Ref:
        first, second = (_on_meta(op, inputs, attrs, params, batch) for batch in BATCHES)
        node = replace(
            self.site,
            name=self._free(self.site.name + suffix),
            op=op,
            inputs=tuple(ref.name for ref in inputs),
            attrs=dict(attrs),
            params=dict(params),
            shape=batched_shape(first, second, self.site.described()),
            content=first.content,
            format=format,
            composite=self.site.name,
        )
        return self._add(node)

    def ref(self, value: Any) -> Ref:
        tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
        if id(tensor) not in self.constants:
            own = {id(t): name for named in (self.module.named_parameters, self.module.named_buffers)
                   for name, t in named()}  # fmt: skip
            name = self._free(own.get(id(tensor), f"{self.site.name}.{CONSTANT}"))
            content = Shape.of(tensor).content
            node = Node(
                name, CONSTANT, (), {}, {"value": tensor}, tuple(tensor.shape), where=self.site.where,
                module_type="torch.nn.parameter.Parameter" if id(tensor) in own else CONSTANT, content=content,
                scope=self.site.scope,
            )  # fmt: skip
            self.constants[id(tensor)] = tensor, self._add(node)  # the tensor is kept so that its id stays its own
        return self.constants[id(tensor)][1]

    def derive(self, tensor: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> nn.Parameter:
        key = id(tensor), what
        if key not in self.derived:
            trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            self.derived[key] = tensor, nn.Parameter(make(tensor.detach()).clone(), requires_grad=trainable)
        return self.derived[key][1]

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
                 type_name(node, called), source_line(node), callee=callee, scope=scope_of(node))
        )  # fmt: skip

    def _unsupported(self, node: fx.Node, called: nn.Module | None) -> Any:
        if node.op == "call_module":
            called = self.module.get_submodule(str(node.target))
        self.missing.append((self._name(node, called), type_name(node, called), source_line(node)))
        return self._stand_in(node, self.missing[-1][0])

    def _stand_in(self, node: fx.Node, name: str) -> Any:
        """What the calls after an unsupported one are handed, so that all unsupported ones are found."""
        first, second = (run.results[node.name] for run in self.runs)
        pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
        refs = [Ref(name, batched_shape(a, b, name), a.content) if isinstance(a, Shape) else a for a, b in pairs]
        return tree_flatten(first)[1].unflatten(refs)

    def _described(self, node: fx.Node) -> str:
        at = source_line(node)
        return f"{node.target if node.op == 'call_module' else node.name}" + (f" ({at})" if at else "")

    def _name(self, node: fx.Node, called: nn.Module | None) -> str:
        """The module's qualified name, or scope and function name; a further call of the same gets ``#1``, ``#2`` …"""
        if called is not None:
            base = str(node.target)
        else:
            scope = scope_of(node)
            function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
            base = f"{scope[-1][0]}.{function}" if scope else str(function)
        return self._free(base)

    def _free(self, base: str) -> str:
        name, k = base, 0
        while name in self.taken:
            k += 1
            name = f"{base}#{k}"
        self.taken.add(name)
        return name

    def _add(self, node: Node) -> Ref:
        self.nodes.append(node)
        self.taken.add(node.name)
        return Ref(node.name, node.shape, node.content)


def _computed(value: Any) -> bool:
    return any(isinstance(leaf, Shape) for leaf in tree_leaves(value))


def _on_meta(op: str, inputs: Sequence[Ref], attrs: Attrs, params: Params, batch: int) -> Shape:
    """Shape and content of what an operator makes, from tensors without data."""
    kinds = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
    sizes = [[-size * batch if size < 0 else size for size in ref.shape] for ref in inputs]
    tensors = [torch.empty(s, dtype=kinds[r.content], device="meta") for s, r in zip(sizes, inputs, strict=True)]
    on_meta = {role: tensor.detach().to("meta") for role, tensor in params.items()}
    return Shape.of(BY_NAME[op].forward(attrs, on_meta, *tensors))


def _of_torch(function: Any) -> bool:
    """Whether it is of torch or Python itself, not a function that the user marked with ``torch.fx.wrap``."""
    package = (getattr(function, "__module__", None) or "builtins").partition(".")[0]
    return package in ("torch", "_operator", "builtins", "math")


def _static(first: Any, second: Any) -> Any:
    """A size or other plain value; -k where it is k times the batch, -1 where it follows the batch otherwise."""
    leaves, structure = tree_flatten(first)
    others = tree_flatten(second)[0]
    merged = [_followed(a, b) for a, b in zip(leaves, others, strict=True)]
    return structure.unflatten(merged) if leaves else first


def _followed(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return first
    if isinstance(first, int) and isinstance(second, int):
        size = batched(first, second)
        return -1 if size is None else size
    return first if first == second else -1
