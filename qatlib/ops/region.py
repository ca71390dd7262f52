"""Which region of each input a region of the output needs, stated by the operator in its own file.

A box is (start, stop) per axis, of one sample: the axis of the batch is never cut. A part of an op is that op on boxes
of its inputs, with the constants and attributes that belong to them, so that the operator's own kernel computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qatlib.ops.work import Size
from qatlib.program import Op, Program, Value

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Need:
    """A box of an input; what of it lies outside of the input is ``fill``."""

    box: Box
    fill: float = 0.0


@dataclass(frozen=True)
class Part:
    """An op for one box of its output.

    ``needs`` has one entry per input, None for one that the part does not read. The kernel is that of the op with
    ``attrs`` and what ``consts`` gives instead of its own; parts of equal ``key`` share it, and None is the op's own
    kernel.
    """

    needs: tuple[Need | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    consts: Callable[[], Mapping[str, Tensor]] = dict
    key: Hashable = None


@dataclass(frozen=True)
class Axes:
    """Axes of a value that count as rows, columns and channels, outermost first; others are not cut."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Regions:
    """How the output of an op can be cut.

    Args:
        axes: where the rows, columns and channels of a block lie.
        part: what a box needs.
        phases: rows and columns of the output for one of a block, whose channels hold them all.
        group: channels that are cut apart from the next as many; a box holds some of them, or several groups.
    """

    axes: Axes
    part: Callable[[Box], Part]
    phases: tuple[int, int] = (1, 1)
    group: int = 0

    def boxes(self, sizes: Sequence[int], block: Size) -> list[Box]:
        """Boxes that cover a value of ``sizes``, each at most a block; rows are the outermost loop."""
        found: list[Box] = [whole(sizes)]
        for axis, cuts in self.cuts(sizes, block).items():
            found = [(*box[:axis], cut, *box[axis + 1 :]) for box in found for cut in cuts]
        return found

    def cuts(self, sizes: Sequence[int], block: Size) -> dict[int, list[tuple[int, int]]]:
        """The same by axis: rows, columns, channels."""
        rows, columns = (n * phase for n, phase in zip(block, self.phases, strict=False))
        channels = max(1, block[2] // (self.phases[0] * self.phases[1]))
        cuts = _cut_axes(sizes, self.axes.rows, rows) | _cut_axes(sizes, self.axes.columns, columns)
        if self.group and self.axes.channels:
            (axis,) = self.axes.channels
            return cuts | {axis: _cut_groups(sizes[axis], channels, self.group)}
        return cuts | _cut_axes(sizes, self.axes.channels, channels)


def _cut_axes(sizes: Sequence[int], axes: Sequence[int], step: int) -> dict[int, list[tuple[int, int]]]:
    """Cuts of axes of which one counts within the next outer one: the innermost first, of the others what is left."""
    steps, left = {}, step
    for axis in reversed(axes):
        steps[axis] = max(1, left)
        left //= sizes[axis]
    return {axis: spans(0, sizes[axis], steps[axis]) for axis in axes}


def _cut_groups(size: int, step: int, group: int) -> list[tuple[int, int]]:
    if step >= group:
        return spans(0, size, step - step % group)
    return [span for start in range(0, size, group) for span in spans(start, start + group, step)]


def spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """[start, stop) in pieces of ``step``, the last one shorter."""
    return [(at, min(stop, at + step)) for at in range(start, stop, step)]


def whole(sizes: Sequence[int]) -> Box:
    return tuple((0, size) for size in sizes)


# -- axes --------------------------------------------------------------------------------------------------------------


def image_axes(value: Value) -> Axes:
    """Of ``[N, C, ..., W]``, as :func:`qatlib.ops.work.size_of` counts; without that of the batch."""
    axes = len(value.shape)
    rows, columns = (0, *range(2, axes - 1)), (axes - 1,) if axes > 2 else ()
    return _static(value, Axes(rows if axes else (), columns, (1,) if axes > 1 else ()))


def vector_axes(value: Value) -> Axes:
    """Of vectors along the last axis, as :func:`qatlib.ops.work.rows_of` counts."""
    last = len(value.shape) - 1
    return _static(value, Axes((), tuple(range(last)), (last,)))


def matrix_axes(value: Value) -> Axes:
    """Of matrices along the last two axes: each of the others is a row."""
    axes = len(value.shape)
    return _static(value, Axes(tuple(range(axes - 2)), (axes - 2,), (axes - 1,)))


def _static(value: Value, axes: Axes) -> Axes:
    return without(axes, [axis for axis, size in enumerate(value.shape) if size < 0])


def without(axes: Axes, fixed: Collection[int]) -> Axes:
    """``axes`` of which ``fixed`` are not cut."""
    rows, columns, channels = (
        tuple(axis for axis in group if axis not in fixed) for group in (axes.rows, axes.columns, axes.channels)
    )
    return Axes(rows, columns, channels)


def renumbered(axes: Axes, number: Mapping[int, int]) -> Axes:
    """``axes`` under other numbers; those without one are not cut."""
    rows, columns, channels = (
        tuple(number[axis] for axis in group if axis in number) for group in (axes.rows, axes.columns, axes.channels)
    )
    return Axes(rows, columns, channels)


# -- operands ----------------------------------------------------------------------------------------------------------


def broadcast(box: Box, out: Value, value: Value) -> Box:
    """What elements in ``box`` of ``out`` read of an operand that is broadcast to it."""
    missing = len(out.shape) - len(value.shape)
    return tuple(
        (0, 1) if size == 1 else span for size, span in zip(value.shape, box[missing:], strict=True)
    )  # fmt: skip


def pointwise(op: Op, program: Program, *roles: str) -> Regions:
    """Regions of an op whose operands are broadcast to its output; constants of ``roles`` hold one number a channel."""
    out, operands = program.values[op.output], program.in_values(op)
    sliced = tuple(role for role in roles if program.constant(op, role).numel() > 1)

    def part(box: Box) -> Part:
        needs = tuple(Need(broadcast(box, out, value)) for value in operands)
        if not sliced:
            return Part(needs)
        start, stop = box[1]

        def consts() -> dict[str, Tensor]:
            return {role: program.constant(op, role)[start:stop] for role in sliced}

        return Part(needs, {}, consts, (start, stop))

    return Regions(image_axes(out), part)


def over_kept(op: Op, program: Program, axes: Sequence[int], keepdim: bool) -> Regions:
    """Regions of an op that takes ``axes`` of its input together: the others can be cut."""
    (x,) = program.in_values(op)
    number, at = {}, 0
    for axis in range(len(x.shape)):
        if axis not in axes:
            number[axis] = at
        at += axis not in axes or keepdim
    sizes = x.sizes()

    def part(box: Box) -> Part:
        return Part((Need(tuple(box[number[axis]] if axis in number else (0, n) for axis, n in enumerate(sizes))),))

    return Regions(renumbered(image_axes(x), number), part)


# -- windows -----------------------------------------------------------------------------------------------------------


def window_span(span: tuple[int, int], kernel: int, stride: int, dilation: int, before: int) -> tuple[int, int]:
    """What outputs in ``span`` read along an axis, in positions of the input without its padding."""
    start, stop = span
    return start * stride - before, (stop - 1) * stride + (kernel - 1) * dilation + 1 - before


def group_span(span: tuple[int, int], outputs: int, inputs: int) -> tuple[int, int]:
    """Groups that output channels in ``span`` belong to, where a group has ``outputs``; and where their inputs end."""
    first, last = span[0] // outputs, -(-span[1] // outputs)
    return first * inputs, last * inputs


def drawn(index: Sequence[int]) -> tuple[int, int]:
    """The span of the positions ``index``."""
    return min(index), max(index) + 1
