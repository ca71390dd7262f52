"""What an fx node stands for: its operator, its line in the user's source, the shape of its result."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from qatlib.errors import GraphError
from qatlib.ops.base import BY_MODULE, Content, Operator

LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""Folders whose frames are not the user's code."""


BATCHES = (2, 3)
"""The sizes at which a model is run to see which axes follow the batch."""


@dataclass(frozen=True)
class Shape:
    """That a call made one tensor, of these sizes and with this content, from the inputs of the model."""

    sizes: tuple[int, ...]
    content: Content

    @staticmethod
    def of(x: torch.Tensor) -> Shape:
        content: Content = "float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "int"
        return Shape(tuple(x.shape), content)


@dataclass(frozen=True)
class Examples:
    """Example inputs, one tensor each, with the batch along ``axes``."""

    inputs: tuple[torch.Tensor, ...]
    axes: tuple[int, ...]

    def at(self, batch: int) -> list[torch.Tensor]:
        """The first sample, ``batch`` times."""
        pairs = zip(self.inputs, self.axes, strict=True)
        return [torch.cat([x.narrow(axis, 0, 1)] * batch, axis) for x, axis in pairs]


def batched(first: int, second: int) -> int | None:
    """A size seen at both of :data:`BATCHES`: itself, or -k if it is k times the batch, or None if neither."""
    if first == second:
        return first
    times = first // BATCHES[0]
    return -times if (first, second) == (times * BATCHES[0], times * BATCHES[1]) else None


def batched_shape(first: Shape, second: Shape, where: str) -> tuple[int, ...]:
    """Sizes as :func:`batched`; raises GraphError QAT136 where an axis follows the batch in another way."""
    sizes = [batched(a, b) for a, b in zip(first.sizes, second.sizes, strict=False)]
    if len(first.sizes) != len(second.sizes) or None in sizes:
        seen = f"has shape {list(first.sizes)} at batch {BATCHES[0]} and {list(second.sizes)} at batch {BATCHES[1]}"
        raise GraphError("QAT136", where, seen, "Keep the batch axis")
    return tuple(size for size in sizes if size is not None)


def operator_of(module: nn.Module) -> Operator | None:
    """The operator of a module: of its own type, or of a base class whose forward it inherits."""
    for base in type(module).__mro__:
        if base in BY_MODULE and type(module).forward is base.forward:
            return BY_MODULE[base]
    return None


def source_line(node: fx.Node) -> str:
    """``file.py:line`` of the user's code that made a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    own = [f"{Path(path).name}:{line}" for path, line in frames if not path.startswith(LIBRARIES)]
    return own[-1] if own else ""


def scope_of(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """Qualified name and type of the modules in whose call a node was made, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple((path, class_name(kind)) for path, kind in stack)


def class_name(kind: type) -> str:
    """Module and name of a class; of one that torch made for parametrized weights, those of the user's class."""
    if kind.__module__ == parametrize.__name__ and kind.__name__.startswith("Parametrized"):
        kind = kind.__bases__[0]
    return f"{kind.__module__}.{kind.__qualname__}"


def type_name(node: fx.Node, called: nn.Module | None) -> str:
    """Of the called module, function or method, as people write it."""
    if called is not None:
        return class_name(type(called))
    if isinstance(node.target, str):
        return f"torch.Tensor.{node.target}"
    return function_type(node.target)


def function_type(function: Any) -> str:
    """Module and name of a function, as people write it."""
    package = re.sub(r"^_operator$", "operator", getattr(function, "__module__", None) or "torch")
    return f"{package}.{getattr(function, '__name__', function)}"
