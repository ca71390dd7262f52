"""Several processes that calibrate or train one model: what they tell each other through torch.distributed.

Without a process group there is one process, and everything here is what it does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qatlib.errors import QatError, StageError

T = TypeVar("T")


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def share(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, the only one that calls it; what it raises there is raised in all.

    An error that is none of :mod:`qatlib.errors` is StageError QAT199 in the others, as it may not travel.
    """
    if size() == 1:
        return make()
    found: tuple[T | None, Exception | None] = None, None
    if rank() == 0:
        try:
            found = make(), None
        except Exception as error:
            found = None, error
    box = [(found[0], _that_travels(found[1]))]
    dist.broadcast_object_list(box, src=0)
    if (raised := found[1] or box[0][1]) is not None:
        raise raised
    return box[0][0]  # type: ignore[return-value]


def _that_travels(error: Exception | None) -> Exception | None:
    if error is None or isinstance(error, QatError):
        return error
    seen = f"raised {type(error).__name__}: {error}"
    return StageError("QAT199", "the first process", seen, "Run with -v, in one process, for its place")


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
