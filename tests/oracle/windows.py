"""Windows that slide over the spatial axes of ``[N, C, *in]``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from .integers import Ints

Pads = Sequence[Sequence[int]]


def pad(x: Ints, padding: Pads, fill: int) -> Ints:
    """``x`` with ``[before, after]`` elements of ``fill`` per spatial axis."""
    return np.pad(x, [(0, 0), (0, 0), *((int(b), int(a)) for b, a in padding)], constant_values=fill)


def taps(
    x: Ints, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Ints]]:
    """For every position in the kernel: the position and the elements ``[N, C, *out]`` that it meets."""
    out = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    for position in product(*(range(k) for k in kernel)):
        cut = tuple(
            slice(p * d, p * d + (o - 1) * s + 1, s) for p, o, s, d in zip(position, out, stride, dilation, strict=True)
        )
        yield position, x[(slice(None), slice(None), *cut)]


def adaptive_bounds(size: int, parts: int) -> list[tuple[int, int]]:
    """``[floor(i * in / out), ceil((i + 1) * in / out))`` for every output position i of one axis."""
    return [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]
