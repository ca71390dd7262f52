"""Number formats and scale rules: section 1 of ``docs/numerics.md``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qatlib.errors import QConfigError

DType = Literal["int8", "int16", "int32", "float32"]

_LIMITS: dict[str, tuple[int, int]] = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
}
BYTES: dict[str, int] = {"int8": 1, "int16": 2, "int32": 4, "float32": 4}
DEAD_SCALE = 2.0**-24
DEAD = 2.0**-64
"""A largest magnitude below this counts as 0."""
"""Scale of a tensor or channel that is zero everywhere."""


def limits(dtype: str) -> tuple[int, int]:
    """Smallest and largest code of an integer ``dtype``; raises KeyError for ``float32``."""
    return _LIMITS[dtype]


def check_scale(scale: float, where: str) -> float:
    """Round ``scale`` to float32 and return it; raise QConfigError unless it is positive, normal and finite."""
    rounded = float(np.float32(scale))
    if not math.isfinite(rounded) or rounded < float(np.finfo(np.float32).tiny):
        raise QConfigError(
            "QAT140",
            where,
            f"scale is {scale!r}; a scale must be a positive, normal, finite float32",
            "Give the tensor a range that is neither empty nor infinite, or a fixed scale in qconfig",
        )
    return rounded


def scale_of(threshold: float, dtype: str, where: str = "scale") -> float:
    """Scale that maps ``[-threshold, threshold]`` on all codes of ``dtype``: ``2 T / (qmax - qmin)``.

    ``threshold`` is in the tensor's own unit. One below :data:`DEAD` gives :data:`DEAD_SCALE`.
    """
    qmin, qmax = limits(dtype)
    if 0 <= threshold < DEAD:
        return DEAD_SCALE
    return check_scale(float(np.float32(threshold)) * 2.0 / (qmax - qmin), where)


@dataclass(frozen=True)
class QType:
    """Format of one tensor: ``real = code * scale``, zero point 0.

    ``scale`` is None for ``float32``, and for ``int32`` accumulators, whose per-channel scale is a constant of the
    operator that reads them. ``truth`` marks truth values, stored as int8 0 and 1 with scale 1: the format "bool".
    """

    dtype: DType
    scale: float | None = None
    truth: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise QConfigError("QAT141", "dtype", f"{self.dtype!r} is unknown", f"Use one of {', '.join(BYTES)}")
        if self.dtype in ("int8", "int16"):
            if self.scale is None:
                raise QConfigError("QAT140", self.dtype, "scale is missing", "Calibrate the tensor first")
            object.__setattr__(self, "scale", check_scale(self.scale, self.dtype))
        elif self.scale is not None:
            raise QConfigError("QAT140", self.dtype, "takes no per-tensor scale", "Leave the scale out")
        if self.truth and (self.dtype, self.scale) != ("int8", 1.0):
            raise QConfigError("QAT141", "truth", f"is set for {self.dtype}", "Truth values are int8 with scale 1")

    @property
    def format(self) -> str:
        """Name of the format: the dtype, or bool."""
        return "bool" if self.truth else self.dtype

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code that a value of this format can have."""
        return (0, 1) if self.truth else self.limits

    @property
    def is_float(self) -> bool:
        return self.dtype == "float32"

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code of the dtype."""
        return limits(self.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of one element."""
        return BYTES[self.dtype]


FLOAT = QType("float32")
INT32 = QType("int32")
BOOL = QType("int8", 1.0, truth=True)
"""Truth values: code 0 or 1."""
