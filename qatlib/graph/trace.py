"""torch model → Graph: symbolic tracing with torch.fx, then every call normalized by its operator."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from qatlib.errors import GraphError
from qatlib.graph.ir import Graph
from qatlib.graph.normalize import normalize
from qatlib.graph.source import LIBRARIES, Shape, operator_of, source_line
from qatlib.graph.verify import verify


def trace(
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
) -> Graph:
    """Graph of ``model`` at inference. The model is not changed.

    Args:
        example_inputs: real tensors, batch first; one sample is enough.
        leaf: qualified names of modules that are kept whole, in float.
        wrap: functions that are kept whole, in float.

    Raises GraphError: QAT130 if the model's control flow depends on tensors, QAT131 if it fails on the example inputs,
    QAT132 naming every operator that is not supported, QAT134 for an unsupported variant of one that is.
    """
    with _inference(model), torch.no_grad():
        module = _symbolic(model, example_inputs, leaf, wrap)
        runs = [_results(module, example_inputs, batch) for batch in (2, 3)]
        return verify(normalize(module, runs, set(leaf), wrap), "trace")


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Tracer(fx.Tracer):
    def __init__(self, leaf: Sequence[str], wrap: Sequence[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(wrap))
        # fx looks in the globals of each forward; a function called from elsewhere is found where it is defined.
        self._autowrap_search += [sys.modules[function.__module__] for function in wrap]
        self.record_stack_traces = True
        self._leaf = set(leaf)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = module_qualified_name in self._leaf or operator_of(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)


def _symbolic(
    model: nn.Module, inputs: Sequence[Tensor], leaf: Sequence[str], wrap: Sequence[Callable[..., Any]]
) -> fx.GraphModule:
    modules = dict(model.named_modules())
    for name in leaf:
        if name not in modules:
            raise GraphError("QAT135", f"model.leaf {name!r}", "no module has this name", "Use a qualified module name")
    parameters = list(inspect.signature(model.forward).parameters.values())
    if len(parameters) < len(inputs) and all(p.kind is not p.VAR_POSITIONAL for p in parameters):
        raise GraphError(
            "QAT131", "inputs", f"{len(inputs)} tensors for a forward that takes {len(parameters)}", "Pass one each"
        )
    absent = {p.name: p.default for p in parameters[len(inputs) :] if p.default is not p.empty}
    tracer = _Tracer(leaf, wrap)
    try:
        return fx.GraphModule(model, tracer.trace(model, concrete_args=absent or None))
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(LIBRARIES)]
        at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else type(model).__name__
        line = f" `{frames[-1].line}`" if frames else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraphError(
            "QAT130",
            at,
            f"the model cannot be traced at{line}: {reason}",
            "Replace control flow on tensor values by tensor operations (torch.where), or move the line into a function"
            " named in model.wrap",
        ) from error


# -- shapes ------------------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise GraphError(
                "QAT131",
                source_line(n) or n.name,
                f"fails on the example input: {reason}",
                "Check shapes of data and model",
            ) from error
        self.results[n.name] = Shape(tuple(result.shape)) if isinstance(result, Tensor) else result
        return result


def _results(module: fx.GraphModule, inputs: Sequence[Tensor], batch: int) -> dict[str, Any]:
    """By name of fx node: :class:`Shape` of a tensor, or the value of anything else, at one batch size."""
    recorder = _Recorder(module)
    arguments = iter([torch.cat([x[:1]] * batch) for x in inputs])
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    recorder.run(*(next(arguments, None) if not n.args else next(arguments, n.args[0]) for n in nodes))
    return recorder.results
