"""An estimate of latency from the numbers in a target file: a model of a model, never a measurement.

Ops run one after the other, each as long as the slowest of the core and the two memories (:mod:`.cycles`). The model is
described in ``docs/targets.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from qatlib.compiler.cycles import Timing
from qatlib.compiler.job import Job
from qatlib.compiler.memory import MemoryPlan, time_plan

if TYPE_CHECKING:
    import pandas

    from qatlib.compiler.executable import Executable

Unit = Literal["mac", "vector", "view", "weights", "host"]
Bound = Literal["mac", "vector", "weights", "sram", "dram", "launch", "none"]
BASIS = "estimate of the target file's model, not a measurement"


@dataclass(frozen=True)
class OpEstimate:
    """One op, batch 1.

    ``unit`` is "view" for an op that shares its inputs' bytes, "weights" for a constant, whose bytes its readers
    pay for, and "host" for what the host runs; these cost nothing here. ``block`` are rows, columns and channels of
    the outputs that are computed at a time. ``mac_cycles``, ``vector_cycles``, ``sram_cycles`` and ``dram_cycles`` are
    what each part is busy, ``wait_cycles`` what the core waits for staged weights. ``weight_bytes`` are the weights
    as stored, ``utilization`` MACs over what the array could have done in the op's cycles at the op's dtype.
    """

    op: str
    module: str
    kind: str
    unit: Unit
    block: str = ""
    macs: int = 0
    vector_ops: int = 0
    weight_bytes: int = 0
    sram_bytes: int = 0
    dram_bytes: int = 0
    mac_cycles: int = 0
    vector_cycles: int = 0
    wait_cycles: int = 0
    sram_cycles: int = 0
    dram_cycles: int = 0
    launch_cycles: int = 0
    cycles: int = 0
    bound: Bound = "none"
    utilization: float = 0.0
    latency_us: float = 0.0


@dataclass(frozen=True)
class Performance:
    """Estimate for one inference of batch 1, while ``cores`` run one each.

    ``source`` is where the target's numbers come from.
    """

    target: str
    source: str
    clock_hz: float
    peak_macs_per_cycle: float
    rows: tuple[OpEstimate, ...]
    cores: int = 1

    @property
    def cycles(self) -> int:
        return sum(row.cycles for row in self.rows)

    @property
    def latency_us(self) -> float:
        return self.cycles / self.clock_hz * 1e6

    @property
    def fps(self) -> float | None:
        """Inferences per second, one at a time on each core; None if the accelerator has nothing to do."""
        return self.cores * self.clock_hz / self.cycles if self.cycles else None

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def dram_bytes(self) -> int:
        """DRAM traffic of one inference: weights, scales and maps that live there."""
        return sum(row.dram_bytes for row in self.rows)

    @property
    def utilization(self) -> float:
        """MACs over what the array could do at its int8 rate in the whole latency, 0 to 1."""
        return self.macs / (self.cycles * self.peak_macs_per_cycle) if self.cycles else 0.0

    def cycles_by_bound(self) -> dict[str, int]:
        """Cycles of the ops that each resource limits."""
        return {bound: sum(r.cycles for r in self.rows if r.bound == bound) for bound in _BOUNDS}

    def to_dict(self) -> dict[str, Any]:
        """JSON data with sorted keys: totals, and the per-op rows under ``ops``."""
        totals = (
            "target",
            "source",
            "clock_hz",
            "cores",
            "cycles",
            "latency_us",
            "fps",
            "macs",
            "dram_bytes",
            "utilization",
        )
        document: dict[str, Any] = {key: getattr(self, key) for key in totals}
        document["basis"] = BASIS
        document["cycles_by_bound"] = dict(sorted(self.cycles_by_bound().items()))
        document["ops"] = [dict(sorted(asdict(row).items())) for row in self.rows]
        return dict(sorted(document.items()))

    def to_frame(self) -> pandas.DataFrame:
        """One row per op, columns as in :class:`OpEstimate`."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows], columns=list(OpEstimate.__dataclass_fields__))


_BOUNDS: tuple[Bound, ...] = ("mac", "vector", "weights", "sram", "dram", "launch")


def perf_model(executable: Executable) -> Performance:
    """Latency, traffic and utilization of a compiled Program as its target's description predicts them."""
    return executable.performance


def estimate(job: Job, plan: MemoryPlan) -> Performance:
    """Per-op estimates in execution order."""
    target = job.target
    timings = time_plan(job, plan)
    rows = tuple(_row(job, i, timings[i]) for i in range(len(job.steps)))
    return Performance(target.name, target.source, target.clock_hz, target.mac_array.peak, rows, job.options.cores)


def _row(job: Job, at: int, timings: Sequence[Timing]) -> OpEstimate:
    step, passes, target = job.steps[at], job.passes[at], job.target
    op = step.op
    if not timings:
        unit: Unit = "host" if step.unit == "host" else "weights" if op.name in job.constants else "view"
        return OpEstimate(op.name, op.module, op.kind, unit)
    first = passes[0]
    work = sum(timing.cycles for timing in timings)
    cycles, longest = work + target.launch_cycles, max(timings, key=lambda timing: timing.cycles)
    peak = target.mac_array.peak / (target.mac_array.slowdown(first.dtype) or 1.0)

    def total(field: str) -> int:
        return sum(getattr(timing, field) for timing in timings)

    return OpEstimate(
        op=op.name,
        module=op.module,
        kind=op.kind,
        unit="mac" if first.engine == "array" else "vector",
        block="x".join(map(str, first.cut.ofm)),
        macs=first.macs,
        vector_ops=sum(task.vector_ops for task in passes),
        weight_bytes=total("weight_bytes"),
        sram_bytes=total("sram_bytes"),
        dram_bytes=total("dram_bytes"),
        mac_cycles=total("mac"),
        vector_cycles=total("vector"),
        wait_cycles=total("weight_wait"),
        sram_cycles=total("sram"),
        dram_cycles=total("dram"),
        launch_cycles=target.launch_cycles,
        cycles=cycles,
        bound="launch" if target.launch_cycles > work else longest.limit,
        utilization=first.macs / (cycles * peak) if first.macs and cycles else 0.0,
        latency_us=cycles / target.clock_hz * 1e6,
    )
