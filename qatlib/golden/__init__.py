"""Golden vectors of a Program, and the comparison of a device dump with them; see ``docs/golden.md``."""

from qatlib.golden.compare import Comparison, Parting, TensorResult, compare_dump
from qatlib.golden.vectors import Entry, Golden, GoldenError, load_golden, write_golden

__all__ = [
    "Comparison",
    "Entry",
    "Golden",
    "GoldenError",
    "Parting",
    "TensorResult",
    "compare_dump",
    "load_golden",
    "write_golden",
]
