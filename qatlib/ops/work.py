"""The shape of an op's work: what a model of a machine has to know of it, stated by the operator in its own file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qatlib.program import Value

Size = tuple[int, int, int]
"""Rows, columns, channels."""

Form = Literal["sums", "windows", "elements", "reduction", "copy", "resize", "warp", "view"]
Operation = Literal["", "table", "add", "mul"]


@dataclass(frozen=True)
class Work:
    """Sizes of the first input and of the output, of one of ``times`` repetitions with weights of their own.

    Args:
        form: "sums" of products over taps and channels; "windows" of one channel; "elements", each of the operands at
            its own place; a "reduction" over axes; a "copy" of codes; "resize", "warp"; a "view" of the same bytes.
        kernel, stride, dilation: rows and columns.
        own_channel: each output channel has an input channel of its own.
        operation: what a vector unit may do slower than other work on an element.
        factor: input that is the second factor of the products, where that is no constant.
        overlays: inputs in whose place the output can be written, element by element.
        joins: the output is nothing but the inputs, code by code, side by side.
    """

    form: Form
    ifm: Size
    ofm: Size
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    own_channel: bool = False
    times: int = 1
    operation: Operation = ""
    factor: int | None = None
    overlays: tuple[int, ...] = ()
    joins: bool = False

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)


def size_of(value: Value) -> Size:
    """Of one sample ``[N, C, ..., W]``: outer axes count as rows."""
    outer, *inner = value.sizes() or (1,)
    channels, *image = inner or (1,)
    width = image.pop() if image else 1
    return outer * math.prod(image), width, channels


def rows_of(value: Value) -> Size:
    """Of vectors along the last axis: a row of as many positions as there are vectors."""
    *lead, channels = value.sizes()
    return 1, math.prod(lead), channels


def image_pair(values: list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Sizes along any number of axes as rows and columns; outer axes count as rows."""
    *rows, columns = values or (1,)
    return math.prod(rows), columns
