"""Masks: scores so low that a softmax takes them for 0, and what calibration looks at beside them.

A node's attribute ``below_maximum`` is ``[axis, distance, masks]``: values at or below ``masks`` are masks. With an
axis (from the end), what lies more than ``distance`` below the largest of its row does not count either. Without one,
all values but the masks count, and the masks are to have codes ``distance`` below the least of them; None stands for a
64th of the largest magnitude. :mod:`qatlib.graph.masks` sets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BELOW = 16.0
"""exp(-16) is 1.1e-7: what is further below the largest of its row counts as 0."""
MASKED = -5e3
"""Numbers at or below this are masks where they are masks at all: -1e4, -1e9, the lowest float."""
FILL = -1e9
"""Finite stand-in for -inf, so that calibration meets finite values behind it; both have the lowest code."""


def relevant(x: Tensor, below_maximum: Sequence[Any] | None) -> Tensor:
    """``x`` with the values that do not count raised to those that do; a row of nothing but masks counts as 0."""
    if below_maximum is None:
        return x
    axis, distance, masks = below_maximum
    hidden = x <= masks
    if axis is None:
        kept = x[~hidden]
        if kept.numel() == 0:
            return torch.zeros_like(x)
        room = kept.abs().max() / 64 if distance is None else distance
        return torch.where(hidden, kept.min() - room, x)
    top = x.masked_fill(hidden, -torch.inf).amax(axis, keepdim=True)
    return torch.where(top > -torch.inf, torch.maximum(x, top - distance), torch.zeros_like(x))


def relevant_pair(reference: Tensor, other: Tensor, below_maximum: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
    """Both as :func:`relevant`; masks of the reference are equal in both, for nobody reads which code they have."""
    wanted = relevant(reference, below_maximum)
    if below_maximum is None or below_maximum[0] is not None:
        return wanted, relevant(other, below_maximum)
    return wanted, torch.where(reference <= below_maximum[2], wanted, other)


def floor_of_sum(total: Tensor, below_maximum: Sequence[Any]) -> float:
    """How low a sum is to be where a mask was added, to be far enough below all that counts; 0 if nothing does."""
    _, distance, masks = below_maximum
    kept = total.detach()[total > masks]
    if kept.numel() == 0:
        return 0.0
    return float(kept.min() - (kept.abs().max() / 64 if distance is None else distance))
