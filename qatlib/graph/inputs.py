"""Example inputs as they come in, and what a model takes and gives back."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qatlib.errors import GraphError, QConfigError
from qatlib.graph.snapshot import as_it_was
from qatlib.graph.source import BATCHES, Examples, Shape, batched_shape
from qatlib.ops.base import Ref

Inputs = Sequence[Tensor] | Mapping[str, Tensor]
"""One tensor per argument of ``forward``, in order or by name."""


def ordered_inputs(model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """``inputs`` in the order of ``forward``. Raises GraphError QAT138 for what is no input of the model."""
    if isinstance(inputs, Tensor):
        raise _odd("example_inputs", "is one tensor, which would be taken apart", "Write (x,) for a single input")
    if not isinstance(inputs, Mapping | list | tuple):
        seen = f"is a {_type(inputs)}, not a tuple of tensors"
        raise _odd("example_inputs", seen, "Pass a tuple, or a dict by argument name")
    parameters = inspect.signature(model.forward).parameters
    if isinstance(inputs, Mapping):
        if alone := [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.name in inputs]:
            seen = f"{alone[0]!r} can only be given by keyword"
            raise _odd("example_inputs", seen, "Wrap the model in a module that takes it by place")
        named = _in_order(inputs, parameters)
    else:
        places = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {places[k] if k < len(places) else f"[{k}]": x for k, x in enumerate(inputs)}
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in named
    ]
    if missing or not named:
        seen = f"{len(named)} inputs, but forward takes {', '.join(parameters) or 'none'}"
        raise _odd("example_inputs", seen, "Pass one tensor per argument that has no default")
    for name, x in named.items():
        _check(model, f"example input {name}", x)
    return tuple(named.values())


def _in_order(inputs: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    if unknown := sorted(set(inputs) - set(parameters)):
        seen = f"{unknown[0]!r} is no argument of forward, which takes {', '.join(parameters)}"
        raise _odd("example_inputs", seen, "Name them as forward does")
    order = list(parameters)
    for name in order[: max((order.index(name) for name in inputs), default=0)]:
        if name not in inputs:
            seen = f"{name!r} is left out before another argument"
            raise _odd(
                "example_inputs", seen, "Pass it too, or wrap the model in a module that takes only what is given"
            )
    return {name: inputs[name] for name in order if name in inputs}


def in_order(names: Sequence[str], inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The inputs of a call, some of them by name, in the order of ``names``. Raises QConfigError QAT143."""
    if not named:
        return inputs
    given = dict(zip(names, inputs, strict=False))
    if len(inputs) > len(names) or given.keys() & named.keys() or given.keys() | named.keys() != set(names):
        seen = f"got {len(inputs)} tensors and {', '.join(named)} for {list(names)}"
        raise QConfigError("QAT143", "inputs", seen, "Pass one each")
    return tuple({**given, **named}[name] for name in names)


def _check(model: nn.Module, where: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        fix = (
            "Pass torch.from_numpy(x)"
            if _type(x) == "numpy.ndarray"
            else "Pass tensors; fix other arguments in a wrapper"
        )
        raise _odd(where, f"is a {_type(x)}, not a tensor", fix)
    if x.dim() == 0 or x.shape[0] == 0:
        seen = "has no axes" if x.dim() == 0 else f"has the shape {list(x.shape)}, no sample"
        raise _odd(where, seen, "Give at least one sample, batch first")
    held = [*model.parameters(), *model.buffers()]
    devices = {p.device for p in held} or {x.device}
    if x.device not in devices:
        there = " and ".join(sorted(map(str, devices)))
        raise _odd(where, f"is on {x.device}, the model on {there}", "Move it to the model's device")
    if x.is_floating_point() or x.is_complex():
        dtypes = {p.dtype for p in held if p.dtype.is_floating_point} or {torch.float32}
        if x.dtype not in dtypes:
            there = " and ".join(sorted(map(str, dtypes)))
            raise _odd(where, f"is {x.dtype}, the model {there}", "Convert it, such as by x.float()")


def batch_axes(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """The batch axis of every input, 0 or 1, if the model runs so at two batch sizes; None if it never does.

    Those of equal size in all examples, and those with fewer seconds, are tried first.
    """
    choices = [(0, 1) if x.dim() > 1 and x.shape[1] else (0,) for x in inputs]
    possible = [axes for axes in itertools.islice(itertools.product(*choices), 64) if any(axes)]
    sizes = {axes: {x.shape[axis] for x, axis in zip(inputs, axes, strict=True)} for axes in possible}
    for axes in sorted(possible, key=lambda axes: (len(sizes[axes]), sum(axes))):
        if _follows_batch(model, Examples(inputs, axes)):
            return axes
    return None


def _follows_batch(model: nn.Module, examples: Examples) -> bool:
    """Whether the model runs at two batch sizes and gives outputs whose sizes follow."""
    with as_it_was(model):
        try:
            runs = [pytree.tree_leaves(plain(model(*examples.at(batch)))) for batch in BATCHES]
            pairs = [(Shape.of(a), Shape.of(b)) for a, b in zip(*runs, strict=True)]
            return all(batched_shape(a, b, "") != a.sizes for a, b in pairs)
        except Exception:  # whatever the model says to inputs that do not fit each other
            return False


def _odd(where: str, seen: str, fix: str) -> GraphError:
    return GraphError("QAT138", where, seen, fix)


def _type(x: Any) -> str:
    kind = type(x)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_container(target: Any) -> bool:
    """Whether calling ``target`` makes a named tuple or a dataclass of what it is given."""
    is_named = isinstance(target, type) and issubclass(target, tuple) and hasattr(target, "_fields")
    return is_named or (isinstance(target, type) and dataclasses.is_dataclass(target))


def plain(value: Any) -> Any:
    """A model's result with lists and dicts of any type as ``list`` and ``dict``; its dataclasses known to pytree."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        items = [plain(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_container(type(value)) and not isinstance(value, Ref):
        if type(value) not in pytree.SUPPORTED_NODES:
            pytree.register_dataclass(type(value))
        return type(value)(**{f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init})
    return value


def without_classes(structure: pytree.TreeSpec) -> pytree.TreeSpec:
    """The structure with tuples for named tuples and dicts for dataclasses, to be read without the model's source."""
    return pytree.tree_structure(_bare(pytree.tree_unflatten(range(structure.num_leaves), structure)))


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(item) for item in value] if isinstance(value, list) else tuple(_bare(item) for item in value)
    if is_container(type(value)):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
        return {name: _bare(item) for name, item in fields if item is not None}
    return value
