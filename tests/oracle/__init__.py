"""The contract of ``docs/numerics.md`` a second time, in NumPy int64: slow, plain, and independent of ``qatlib``.

Nothing here reads ``qatlib.integer``, ``qatlib.emulator`` or a kernel; ``qatlib.program`` serves as the data container.
"""

from .factors import (
    FactorError,
    addend_factor,
    bias_codes,
    clamp_codes,
    compare_factors,
    factor,
    lone_factor,
    signed_pair,
    sum_factor,
)
from .integers import half_away, half_even, single_precision
from .run import run

__all__ = [
    "FactorError",
    "addend_factor",
    "bias_codes",
    "clamp_codes",
    "compare_factors",
    "factor",
    "half_away",
    "half_even",
    "lone_factor",
    "run",
    "signed_pair",
    "single_precision",
    "sum_factor",
]
