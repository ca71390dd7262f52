"""Several processes that calibrate or train one model: what they tell each other through torch.distributed.

Without a process group there is one process, and everything here is what it does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def share(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, the only one that calls it."""
    if size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The value of every process, in the order of their numbers."""
    if size() == 1:
        return [value]
    found: list[T | None] = [None] * size()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def summed(value: float) -> float:
    """Sum over the processes; not finite in all of them if it is so in one."""
    return sum(gather(value))


def largest(x: Tensor) -> Tensor:
    """Maximum over the processes, element by element; infinity where one has NaN. ``x`` itself if there is one."""
    if size() == 1:
        return x
    x = x.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by the sum over the processes."""
    if size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        group = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in group])
        dist.all_reduce(flat)
        for gradient, total in zip(group, torch.split(flat, [g.numel() for g in group]), strict=True):
            gradient.copy_(total.view_as(gradient))
