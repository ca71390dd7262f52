"""The traced model, run at two batch sizes: what every call returned, and what it changed in place."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from qatlib.errors import GraphError
from qatlib.graph.source import Examples, Shape, source_line

_EMPTY = ("empty", "empty_like", "new_empty")
_NEW = (*_EMPTY, "new_zeros", "new_ones", "new_full", "new_tensor", "zeros_like", "ones_like", "full_like")
"""Calls that read shape and type of their first tensor, not its elements."""

Held = Literal["same", "part", None]
"""How a tensor holds what was changed: all of it in the same order, some of the elements, or none."""


@dataclass(frozen=True)
class Write:
    """An in-place change of the tensor that the call ``target`` returned.

    ``held``: of every call whose result is read again, for each leaf of the result :data:`Held`. ``constants``: where
    no input reaches what was changed, the leaves as they are from then on.
    """

    target: str
    held: dict[str, list[Held]]
    constants: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Run:
    """By name of fx node what every call returned, and the changes in place.

    ``results`` has a :class:`Shape` for each tensor that depends on the inputs, and anything else, constant tensors
    included, as it is. An assignment returns what was assigned to; None if that held the value already, as after
    ``x[0] += 1``, where the sum is computed in place before.
    """

    results: dict[str, Any] = field(default_factory=dict)
    writes: dict[str, Write] = field(default_factory=dict)


def run_at(module: fx.GraphModule, examples: Examples, batch: int) -> Run:
    """The traced model on the first sample of ``examples``, ``batch`` times."""
    recorder = _Recorder(module)
    arguments = iter(examples.at(batch))
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    recorder.run(*(next(arguments, None) if not n.args else next(arguments, n.args[0]) for n in nodes))
    return recorder.recorded


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.recorded = Run()
        self._order = {node: place for place, node in enumerate(module.graph.nodes)}
        self._from_inputs: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        tensors = [x for source in n.all_input_nodes for x in _tensors(self.env[source]) if not x.is_inference()]
        versions = [(x, x._version) for x in tensors]
        self._check_is_no_number(n)
        try:
            result = super().run_node(n)
        except Exception as error:
            raise fails(n, error) from error
        if _name(n) in _EMPTY and isinstance(result, Tensor):
            result.zero_()  # else what it happens to hold is taken for a constant
        depends = self._depends(n, result)
        if depends:
            self._from_inputs.add(n)
        self.recorded.results[n.name] = tree_map(
            lambda x: x if not isinstance(x, Tensor) else Shape.of(x) if depends else x.clone(), result
        )
        if changed := [x for x, version in versions if x._version != version]:
            self.recorded.writes[n.name] = self._write(n, changed, depends)
        return self.env[n.all_input_nodes[0]] if n.target is operator.setitem else result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not operator.setitem:
            return super().call_function(target, args, kwargs)
        whole, key, value = args
        if isinstance(value, Tensor) and value.numel() and _is_that(whole, key, value):
            return None
        whole[key] = value
        return whole

    def _check_is_no_number(self, n: fx.Node) -> None:
        if _name(n) in ("item", "tolist") and any(source in self._from_inputs for source in n.all_input_nodes):
            raise GraphError(
                "QAT130",
                source_line(n) or n.name,
                f"{_name(n)}() makes a Python number of an element that depends on the inputs",
                "Leave it a tensor",
            )

    def _depends(self, n: fx.Node, result: Any) -> bool:
        """Whether a call's tensors depend on the elements of the inputs; what is random counts as if it did."""
        if n.op in ("placeholder", "get_attr", "output"):
            return n.op != "get_attr"
        name, sources = _name(n), n.all_input_nodes
        if not _tensors(result):
            return False
        if name in _NEW:
            sources = sources[1:]
        return name.startswith(("rand", "normal", "bernoulli")) or any(x in self._from_inputs for x in sources)

    def _write(self, n: fx.Node, candidates: list[Tensor], depends: bool) -> Write:
        """What a call changed that is read again. Elements that depend on the inputs make all that holds them so."""
        out = n.kwargs.get("out")
        target = out if isinstance(out, fx.Node) else n.all_input_nodes[0]
        changed = self.env[target]
        if not any(changed is x for x in candidates):
            seen = f"{_name(n)} changes another tensor in place than its first, or several"
            raise GraphError("QAT137", source_line(n) or n.name, seen, "Compute a new tensor instead")
        if target.op == "get_attr":
            raise GraphError(
                "QAT133",
                str(target.target),
                f"is changed in place at {source_line(n) or n.name}, so that one call changes the next",
                "Take the state as an input of the model and return it as an output",
            )
        written = _positions(changed)
        write = Write(target.name, {})
        for other, value in self.env.items():
            last = max((self._order[user] for user in other.users), default=-1)
            held = [_held(x, changed, written) for x in tree_leaves(value)]
            if any(held) and last > self._order[n]:
                write.held[other.name] = held
                if depends:
                    self._from_inputs.add(other)
                else:
                    write.constants[other.name] = [
                        x.clone() if isinstance(x, Tensor) else x for x in tree_leaves(value)
                    ]
        return write


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _name(n: fx.Node) -> str:
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")


def _geometry(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage().data_ptr(), x.dtype, x.storage_offset(), tuple(x.shape), x.stride()


def _is_that(whole: Tensor, key: Any, value: Tensor) -> bool:
    """Whether ``value`` is ``whole[key]`` itself, not another tensor of the same elements."""
    part = whole[key]
    return _geometry(part) == _geometry(value)


def _positions(x: Tensor) -> Tensor:
    """Which elements of its storage a tensor holds."""
    count = x.untyped_storage().nbytes() // x.element_size()
    held = torch.zeros(count, dtype=torch.bool)
    held.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return held


def _held(x: Any, changed: Tensor, written: Tensor) -> Held:
    if not isinstance(x, Tensor) or x.untyped_storage().data_ptr() != changed.untyped_storage().data_ptr():
        return None
    if _geometry(x) == _geometry(changed):
        return "same"
    return "part" if (written & _positions(x)).any() else None


def fails(node: fx.Node, error: Exception) -> GraphError:
    """The error for a call that raises on the example inputs."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    at = source_line(node) or node.name
    return GraphError("QAT131", at, f"fails on the example input: {reason}", "Check shapes of data and model")
