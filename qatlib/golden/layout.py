"""The order in which a device stored the elements of a tensor: its axes, blocks of channels, padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, permutations
from operator import mul

import numpy as np

from qatlib.golden.vectors import Array, Entry

BLOCKS = (4, 8, 16, 32)
MOST_PADDING = 64
MOST_AXES = 4
"""Tensors of up to as many axes are read in every order of them."""
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """``axes`` is the order in which the device stored the golden axes; ``padded`` the golden axis that was padded.

    ``block`` > 0: channels in blocks of that many, innermost (``[N, C/b, ..., b]``). ``view`` are the sizes of the axes
    (as in :attr:`Entry.template`) where these are not the tensor's own, but those that a reshape merged.
    """

    axes: Sizes
    padded: int | None = None
    block: int = 0
    view: Sizes = ()

    @property
    def plain(self) -> bool:
        return self.axes == tuple(range(len(self.axes))) and self.padded is None and not self.block

    def arranged(
        self, flat: Array, entry: Entry, batch: int, seen: Sizes | None, strict: bool
    ) -> Iterator[tuple[int, Array]]:
        """``(samples, elements in golden axes)`` for every number of samples, up to ``batch``, that ``flat`` may hold.

        ``seen`` is the shape that a .npy file tells; None for a raw file. If ``strict``, padding has to be one number.
        """
        template = self.view or entry.template
        if len(self.axes) != len(template):
            return
        for count in self._counts(template, batch):
            shape = tuple(-size * count if size < 0 else size for size in template)
            stored = self._stored(shape, flat.size)
            if stored is None or math.prod(shape) != math.prod(entry.sizes(count)):
                continue
            if same_axes(seen, stored, finer=self.padded is None and not self.block):
                whole = self._restored(flat.reshape(stored))
                axis = 1 if self.block else self.padded
                if axis is not None:
                    whole, padding = np.split(whole, [shape[axis]], axis)
                    if strict and padding.size and (padding != padding.flat[0]).any():
                        continue
                yield count, whole.reshape(entry.sizes(count))

    def _counts(self, template: Sizes, batch: int) -> Iterator[int]:
        """Fewer samples than the golden ones only where the batch has kept its place."""
        yield batch
        axis = next((axis for axis, size in enumerate(template) if size < 0), None)
        if axis is not None and self.axes[axis] == axis:
            yield from range(batch - 1, 0, -1)

    def _stored(self, shape: Sizes, size: int) -> Sizes | None:
        """Shape on the device of ``size`` elements that hold a golden tensor of ``shape``, if they do."""
        sizes = list(shape)
        if self.block:
            stored = (sizes[0], -(-sizes[1] // self.block), *sizes[2:], self.block)
            return stored if math.prod(stored) == size else None
        if self.padded is not None:
            rest = math.prod(sizes) // max(1, sizes[self.padded])
            sizes[self.padded] = size // max(1, rest)
            padding = sizes[self.padded] - shape[self.padded]
            if not 0 < padding < MOST_PADDING or sizes[self.padded] % 4:
                return None
        return tuple(sizes[axis] for axis in self.axes) if math.prod(sizes) == size else None

    def _restored(self, stored: Array) -> Array:
        """In golden axes, with the padding."""
        if self.block:
            return np.moveaxis(stored, -1, 2).reshape(len(stored), -1, *stored.shape[2:-1])
        return stored.transpose(np.argsort(self.axes))


def same_axes(seen: Sizes | None, stored: Sizes, finer: bool = True) -> bool:
    """Whether ``seen`` is ``stored`` up to axes of size 1 and axes that are merged, or (``finer``) not yet merged.

    Only a flat tensor merges the first axis, which holds the samples, with others.
    """
    if seen is None or len(seen) == 1:
        return True
    mine, its = ({end for end in accumulate(sizes, mul) if end != 1} for sizes in (stored, seen))
    return (its <= mine or (finer and mine <= its)) and (not stored or stored[0] in {1, *its})


def usual_layouts(entry: Entry) -> list[Layout]:
    """As torch stores them, and channels last."""
    rank = len(entry.template)
    orders = [tuple(range(rank)), (0, *range(2, rank), 1)] if rank > 2 else [tuple(range(rank))]
    return [Layout(axes) for axes in orders]


def layouts(entry: Entry, merged: Entry | None) -> Iterator[Layout]:
    """From the likely to the odd. ``merged`` is what a reshape made ``entry`` of, if one did."""
    rank, usual = len(entry.template), usual_layouts(entry)
    yield from usual
    orders = permutations(range(rank)) if rank <= MOST_AXES else ()
    yield from (Layout(axes) for axes in orders if Layout(axes) not in usual)
    yield from (Layout(layout.axes, axis) for layout in usual for axis in range(1, rank))
    if rank > 2:
        yield from (Layout(usual[0].axes, None, block) for block in BLOCKS)
    if merged is not None and merged.batch_axis == 0 and len(merged.template) <= MOST_AXES + 1:
        inner = permutations(range(1, len(merged.template)))
        yield from (Layout((0, *axes), view=merged.template) for axes in inner if list(axes) != sorted(axes))


def axis_names(rank: int) -> str:
    """One letter per axis."""
    return {1: "N", 2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}.get(rank, "ABCDEFGHIJ"[:rank])


def describe_layout(layout: Layout) -> list[tuple[str, str]]:
    """Kind and sentence of what is not as in the golden vectors."""
    letters, found = axis_names(len(layout.axes)), []
    order = "".join(letters[axis] for axis in layout.axes)
    if layout.block:
        found.append(("layout", f"channels in blocks of {layout.block}, [N, C/b, ..., b]"))
    if layout.view:
        found.append(("layout", f"the axes {letters} of its input are merged in the order {order}"))
    elif order != letters:
        found.append(("layout", f"axes are in the order {order}, golden is {letters}"))
    if layout.padded is not None:
        found.append(("padding", f"axis {letters[layout.padded]} is padded"))
    return found
