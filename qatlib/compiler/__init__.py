"""From a Program to an accelerator: what the target refuses, where each value lives, what it would cost.

``compile_model`` runs, in this order: legalize (:mod:`.legalize`), order (:mod:`.steps`), memory plan (:mod:`.memory`;
which one, :mod:`.choose` decides by the options, with :mod:`.search`), time (:mod:`.timeline`), estimate
(:mod:`.perf`). Fusing or cutting ops rewrites the Program and belongs before the memory plan. The Executable runs bit
for bit as the Program does.
"""

from qatlib.compiler.executable import Executable, compile_model, try_compile
from qatlib.compiler.legalize import Violation, check_model
from qatlib.compiler.memory import MemoryPlan
from qatlib.compiler.options import CompileOptions
from qatlib.compiler.perf import OpEstimate, Performance, perf_model
from qatlib.compiler.target import Target, load_target, shipped_targets
from qatlib.compiler.timeline import Timeline
from qatlib.compiler.trace import write_trace

__all__ = [
    "CompileOptions",
    "Executable",
    "MemoryPlan",
    "OpEstimate",
    "Performance",
    "Target",
    "Timeline",
    "Violation",
    "check_model",
    "compile_model",
    "load_target",
    "perf_model",
    "shipped_targets",
    "try_compile",
    "write_trace",
]
