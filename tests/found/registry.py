"""What registers a model as people write it, and how its inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import lively


def reals(*shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda rng, batch: torch.randn(batch, *shape, generator=rng)


def unit(*shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda rng, batch: torch.rand(batch, *shape, generator=rng)


def ids(below: int, *shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda rng, batch: torch.randint(0, below, (batch, *shape), generator=rng)


def lengths_mask(length: int, dtype: torch.dtype = torch.int64) -> Callable[[torch.Generator, int], Tensor]:
    """1 for the first positions of each sample, 0 for the rest; at least two positions."""

    def draw(rng: torch.Generator, batch: int) -> Tensor:
        ends = torch.randint(2, length + 1, (batch, 1), generator=rng)
        return (torch.arange(length) < ends).to(dtype)

    return draw


@dataclass(frozen=True)
class Found:
    """A model and how its inputs are drawn.

    ``wide`` are ops that need int16 in any case. ``least_db`` is the SQNR that 16 bits have to reach.
    """

    make: Callable[[], nn.Module]
    draws: tuple[Callable[[torch.Generator, int], Tensor], ...]
    wide: tuple[str, ...] = ()
    least_db: float = 60.0
    slow: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return lively(self.make(), 1).eval()

    def inputs(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(seed)
        return tuple(draw(rng, batch) for draw in self.draws)


NETS: dict[str, Found] = {}


def found(name: str, *draws: Callable[[torch.Generator, int], Tensor], **options: Any) -> Callable[[Any], Any]:
    """Register a class or function that makes the model called ``name``."""

    def register(make: Any) -> Any:
        NETS[name] = Found(make, draws, **options)
        return make

    return register
