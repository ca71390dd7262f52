"""torch model → Graph: symbolic tracing with torch.fx, then every call normalized by its operator."""

from __future__ import annotations

import inspect
import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.utils._pytree import tree_leaves

from qatlib.errors import GraphError
from qatlib.graph.inputs import Inputs, batch_axes, ordered_inputs
from qatlib.graph.ir import Graph
from qatlib.graph.normalize import normalize
from qatlib.graph.run import fails, run_at
from qatlib.graph.snapshot import as_it_was
from qatlib.graph.source import BATCHES, LIBRARIES, Examples, operator_of
from qatlib.graph.verify import verify


def trace(
    model: nn.Module,
    example_inputs: Inputs,
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
) -> Graph:
    """Graph of ``model`` at inference. The model is not changed.

    Args:
        example_inputs: real tensors, in the order of ``forward`` or by its names; one sample is enough. The batch is
            first. Where the model takes that for none of its inputs together, such as a recurrent state
            ``[layers, batch, features]``, it is the second axis of those inputs with which the model runs.
        leaf: qualified names of modules that are kept whole, in float.
        wrap: functions that are kept whole, in float.

    Raises GraphError: QAT130 if the model's control flow depends on tensors, QAT131 if it fails on the example inputs,
    QAT132 naming every operator that is not supported, QAT133 if ``forward`` keeps state in the model, QAT134 for an
    unsupported variant of a supported operator, QAT138 for example inputs that no model could take.
    """
    inputs = ordered_inputs(model, example_inputs)
    try:
        return _trace(model, Examples(inputs, (0,) * len(inputs)), leaf, wrap)
    except GraphError as error:
        axes = batch_axes(model, inputs) if error.code == "QAT131" else None
        if axes is None:
            raise
    return _trace(model, Examples(inputs, axes), leaf, wrap)


def _trace(model: nn.Module, examples: Examples, leaf: Sequence[str], wrap: Sequence[Callable[..., Any]]) -> Graph:
    with as_it_was(model) as snapshot:
        module = _symbolic(model, examples, leaf, wrap)
        if assigned := snapshot.traced():
            raise GraphError(
                "QAT133",
                assigned[0],
                "is assigned in forward, so that one call changes the next",
                "Take the state as an input of the model and return it as an output",
            )
        runs = [run_at(module, examples, batch) for batch in BATCHES]
        return verify(normalize(module, runs, set(leaf), wrap), "trace")


class _FollowsBatchError(TypeError):
    """The model needs one number where the example inputs give another for each batch size."""


class _Proxy(fx.Proxy):
    """Sees ``x += y`` as the in-place operation that it is, which fx takes for ``x = x + y``, and ``x[key] = y``.

    Sizes, and whatever else the example inputs tell for every batch size, may be compared, counted, sliced with and
    iterated over: ``assert h == 16``, ``table[:, :length]``, ``for part in x.split(4)``.
    """

    tracer: _Tracer

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __bool__(self) -> bool:
        known, value = self.tracer.example_value(self.node)
        return bool(value) if known else super().__bool__()

    def __index__(self) -> int:
        known, value = self.tracer.example_value(self.node)
        if not known or not isinstance(value, int):
            raise TypeError("a tensor's element is used as a number")
        return value

    def __int__(self) -> int:
        return int(float(self))

    def __float__(self) -> float:
        known, value = self.tracer.example_value(self.node)
        if not known or not isinstance(value, int | float):
            raise TypeError("a tensor's element is used as a number")
        return value

    def __iter__(self) -> Iterator[fx.Proxy]:
        length = self.tracer.example_length(self.node)
        return super().__iter__() if length is None else iter([self[k] for k in range(length)])  # type: ignore[index]

    def __len__(self) -> int:
        length = self.tracer.example_length(self.node)
        return super().__len__() if length is None else length

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Attribute(fx.proxy.Attribute, _Proxy):
    """``x.shape`` and the like, until it is known whether it is a method that is called."""


class _Examples(fx.Interpreter):
    """What the nodes recorded so far are on the example inputs at one batch size.

    Every node runs once, in order, so that a call that overwrites a tensor takes effect once.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, examples: Examples, batch: int) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.args_iter = iter(examples.at(batch))

    def value(self, node: fx.Node) -> Any:
        for earlier in self.graph.nodes:
            if earlier not in self.env:
                try:
                    self.env[earlier] = self.run_node(earlier)
                except Exception as error:
                    raise fails(earlier, error) from error
        return self.env[node]


_FACTORIES = (torch.zeros, torch.ones, torch.full, torch.empty, torch.rand, torch.randn)
"""Functions that torch does not hand to a proxy when all they are given is sizes."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True
    """A buffer may be expanded, repeated or sliced by sizes of the inputs."""

    def __init__(self, leaf: Sequence[str], wrap: Sequence[Callable[..., Any]], examples: Examples) -> None:
        super().__init__(autowrap_functions=(*_FACTORIES, *wrap))
        self._inputs = examples
        self._examples: list[_Examples] = []
        # fx looks in the globals of each forward; a function called from elsewhere is found where it is defined.
        self._autowrap_search += [torch, *(sys.modules[function.__module__] for function in wrap)]
        self.record_stack_traces = True
        self._leaf = set(leaf)

    def example_value(self, node: fx.Node) -> tuple[bool, Any]:
        """Whether ``node`` is a plain value (no tensor) that the example inputs tell, and that value.

        Raises _FollowsBatchError if it differs between :data:`BATCHES`.
        """
        first, second = self._values(node)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(first)):
            return False, None
        if first != second:
            seen = f"one value is needed of what is {first} at batch {BATCHES[0]} and {second} at batch {BATCHES[1]}"
            raise _FollowsBatchError(seen)
        return True, first

    def example_length(self, node: fx.Node) -> int | None:
        """Number of parts that ``node`` has if it is a tuple or a tensor; None if it cannot be iterated over."""
        first, second = self._values(node)
        if not isinstance(first, tuple | list | Tensor):
            return None
        if len(first) != len(second):
            raise _FollowsBatchError(f"parts are taken one by one along the batch ({len(first)} at batch {BATCHES[0]})")
        return len(first)

    def _values(self, node: fx.Node) -> tuple[Any, Any]:
        """What ``node`` is at both batch sizes, computed while the tracer's own patches of nn.Module are off."""
        originals = _symbolic_trace._orig_module_call, _symbolic_trace._orig_module_getattr
        patched = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__, nn.Module.__getattr__ = originals  # type: ignore[method-assign]
        try:
            if not self._examples:
                self._examples = [_Examples(self.root, self.graph, self._inputs, size) for size in BATCHES]
            first, second = (examples.value(node) for examples in self._examples)
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]
        return first, second

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = module_qualified_name in self._leaf or operator_of(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)


def _symbolic(
    model: nn.Module, examples: Examples, leaf: Sequence[str], wrap: Sequence[Callable[..., Any]]
) -> fx.GraphModule:
    modules = dict(model.named_modules())
    for name in leaf:
        if name not in modules:
            raise GraphError("QAT135", f"model.leaf {name!r}", "no module has this name", "Use a qualified module name")
    for function in wrap:
        if function.__name__.startswith("_"):
            seen = "has a name that begins with _, which torch.fx never wraps"
            raise GraphError("QAT135", f"model.wrap {function.__name__!r}", seen, "Give it another name")
    parameters = list(inspect.signature(model.forward).parameters.values())
    count = len(examples.inputs)
    if len(parameters) < count and all(p.kind is not p.VAR_POSITIONAL for p in parameters):
        raise GraphError(
            "QAT131", "inputs", f"{count} tensors for a forward that takes {len(parameters)}", "Pass one each"
        )
    absent = {p.name: p.default for p in parameters[count:] if p.default is not p.empty}
    tracer = _Tracer(leaf, wrap, examples)
    try:
        graph = tracer.trace(model, concrete_args=absent or None)
    except GraphError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(LIBRARIES)]
        at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else type(model).__name__
        line = f" `{frames[-1].line}`" if frames else ""
        if isinstance(error, NotImplementedError) and str(error).startswith("argument of type"):
            seen = f"{str(error).replace('argument', 'a value')} is returned, or given to an operator"
            raise GraphError(
                "QAT136", at, seen, "Use tensors, and tuples, lists, dicts or dataclasses of them"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraphError(
            "QAT130",
            at,
            f"the model cannot be traced at{line}: {reason}",
            "Leave the batch size to torch: -1 in view and reshape, a // b in place of int(a / b)"
            if isinstance(error, _FollowsBatchError)
            else "Replace control flow on tensor values by tensor operations (torch.where), or move the line into a"
            " function named in model.wrap",
        ) from error
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)  # else fx wraps the function by its name in every later trace
    return fx.GraphModule(model, graph)
