"""What an fx node stands for: its operator, its line in the user's source, the shape of its result."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

from qatlib.ops.base import BY_MODULE, Operator

LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""Folders whose frames are not the user's code."""


@dataclass(frozen=True)
class Shape:
    """That a call made one tensor, of these sizes."""

    sizes: tuple[int, ...]


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
