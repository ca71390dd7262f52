"""What one op knows while the oracle evaluates it, and the multiplications that end most ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .integers import INT32_MAX, INT32_MIN, Ints, Rounding


@dataclass(frozen=True)
class Task:
    """One op: its ``attrs`` and constants (integers as int64), limits and scale of its output, the rounding rule."""

    attrs: Mapping[str, Any]
    consts: Mapping[str, NDArray[Any]]
    limits: tuple[int, int]
    scale: float | None
    rounding: Rounding

    @property
    def counts(self) -> bool:
        """Whether the output is int32: integers without a scale, which are computed without rounding."""
        return self.limits == (INT32_MIN, INT32_MAX)

    def factor(self, i: int) -> tuple[int, int]:
        """``(M, n)`` of term i, or (1, 0) where the op has no factors."""
        if "multiplier" not in self.consts:
            return 1, 0
        return int(self.consts["multiplier"][i]), int(self.consts["shift"][i])

    def requantize(self, numerator: Ints, shift: Any) -> Ints:
        """``clamp(rne(numerator / 2^shift), lo, hi)``."""
        return np.clip(self.rounding(numerator, shift), self.attrs["lo"], self.attrs["hi"])

    def finish(self, numerator: Any, shift: Any) -> Ints:
        """:meth:`requantize`, or what is left of it for integers without a scale: saturation."""
        return self.saturated(numerator) if self.counts else self.requantize(numerator, shift)

    def exact(self, x: Ints) -> Any:
        """``x`` as Python integers where two int32 may meet in a product."""
        return x.astype(object) if self.counts else x

    def saturated(self, x: Any) -> Ints:
        """``x`` clamped to the dtype of the output."""
        return np.asarray(np.clip(x, *self.limits)).astype(np.int64)
