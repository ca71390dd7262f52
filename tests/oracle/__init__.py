"""The contract of ``docs/numerics.md`` a second time, in NumPy int64: slow, plain, and independent of ``qatlib``.

Nothing here reads ``qatlib.integer``, ``qatlib.emulator`` or a kernel; ``qatlib.program`` serves as the data container.
"""

from .factors import FactorError, bias_codes, clamp_codes, factor, joint_factor
from .integers import half_away, half_even, single_precision
from .run import run

__all__ = [
    "FactorError",
    "bias_codes",
    "clamp_codes",
    "factor",
    "half_away",
    "half_even",
    "joint_factor",
    "run",
    "single_precision",
]
