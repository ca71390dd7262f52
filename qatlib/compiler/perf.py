"""An estimate of latency from the numbers in a target file: a model of a model, never a measurement.

Latency is that of the simulation (:mod:`.timeline`); what limits an op is told by the closed form (:mod:`.cycles`). The
model is described in ``docs/targets.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qatlib.atomic import write_csv, write_json
from qatlib.compiler.cycles import Timing
from qatlib.compiler.job import Job, describe
from qatlib.compiler.memory import MemoryPlan, time_plan
from qatlib.compiler.spans import CAUSES
from qatlib.compiler.timeline import OpTime, Timeline, simulate
from qatlib.qtype import QType

if TYPE_CHECKING:
    import pandas

    from qatlib.compiler.executable import Executable

Unit = Literal["mac", "vector", "table", "view", "weights", "host"]
Bound = Literal["mac", "vector", "table", "weights", "sram", "dram", "launch", "none"]
BASIS = "estimate of the target file's model, not a measurement"


@dataclass(frozen=True)
class OpEstimate:
    """One op, batch 1.

    ``unit`` is "view" for an op that shares its inputs' bytes, "weights" for a constant, whose bytes its readers
    pay for, and "host" for what the host runs; these cost nothing here. ``block`` are rows, columns and channels of
    the outputs that are computed at a time. ``mac_cycles``, ``vector_cycles``, ``sram_cycles`` and ``dram_cycles`` are
    what each part is busy, ``bank_cycles`` those of the SRAM for which its banks alone are busy, ``wait_cycles`` what
    the core waits for staged weights. ``weight_bytes`` are the weights as stored, ``plain_weight_bytes`` in the width
    of their dtype, ``utilization`` MACs over what the array could have done in the op's cycles at the op's dtype.

    The op runs from ``start_us`` on. ``compute_us`` is what the busier of the units that compute works,
    ``load_store_us`` the busier of the two buses; both go on at once, so that the shares of the op's latency need not
    add up to 1. ``stall_*`` are the cycles that the unit of the op waits, by cause (:mod:`.spans`). ``hidden_cycles``
    are those that a longer op beside it takes anyway, none or all. ``int16_cycles``
    are those that formats of 16 bits cost, against 8 bits in the same places. ``sram_live_bytes`` of the SRAM are
    taken while the op runs. ``host_bytes`` are what the host reads and writes for an op of its own.
    """

    op: str
    module: str
    kind: str
    unit: Unit
    block: str = ""
    macs: int = 0
    vector_ops: int = 0
    weight_bytes: int = 0
    plain_weight_bytes: int = 0
    sram_bytes: int = 0
    dram_bytes: int = 0
    mac_cycles: int = 0
    vector_cycles: int = 0
    wait_cycles: int = 0
    sram_cycles: int = 0
    bank_cycles: int = 0
    dram_cycles: int = 0
    launch_cycles: int = 0
    cycles: int = 0
    bound: Bound = "none"
    utilization: float = 0.0
    latency_us: float = 0.0
    start_us: float = 0.0
    compute_us: float = 0.0
    compute_share: float = 0.0
    load_store_us: float = 0.0
    load_store_share: float = 0.0
    stall_compute: int = 0
    stall_sram: int = 0
    stall_dram: int = 0
    stall_weights: int = 0
    stall_table: int = 0
    stall_dependency: int = 0
    hidden_cycles: int = 0
    int16_cycles: int = 0
    sram_live_bytes: int = 0
    host_bytes: int = 0


COLUMNS = tuple(OpEstimate.__dataclass_fields__)


@dataclass(frozen=True)
class Performance:
    """Estimate for one inference of batch 1, while ``cores`` run one each.

    ``source`` is where the target's numbers come from. ``static_bytes`` are those of weights and other constants,
    ``sram_peak_bytes`` and ``dram_peak_bytes`` what maps and staged weights take.
    """

    target: str
    source: str
    clock_hz: float
    peak_macs_per_cycle: float
    sram_bytes_per_cycle: float
    dram_bytes_per_cycle: float
    static_bytes: int
    sram_size_bytes: int
    sram_peak_bytes: int
    dram_peak_bytes: int
    rows: tuple[OpEstimate, ...]
    timeline: Timeline = field(repr=False)
    cores: int = 1

    @property
    def cycles(self) -> int:
        return sum(row.cycles - row.hidden_cycles for row in self.rows)

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

    @property
    def dram_bytes_per_s(self) -> float:
        """Mean of an inference."""
        return self.dram_bytes * self.clock_hz / self.cycles if self.cycles else 0.0

    def cycles_by_bound(self) -> dict[str, int]:
        """Cycles of the ops that each resource limits, without hidden ones."""
        return {bound: sum(r.cycles - r.hidden_cycles for r in self.rows if r.bound == bound) for bound in _BOUNDS}

    def to_dict(self) -> dict[str, Any]:
        """JSON data with sorted keys: totals, the per-op rows under ``ops``, cycles of ``units`` by what they are for.

        ``intervals`` are equal parts of the inference: the share of each in which each unit works, and the rate of the
        DRAM's bus.
        """
        document: dict[str, Any] = {key: getattr(self, key) for key in _TOTALS}
        document["basis"] = BASIS
        document["cycles_by_bound"] = dict(sorted(self.cycles_by_bound().items()))
        busy, stalls = self.timeline.busy, self.timeline.stalls
        units = (
            {"unit": unit, "busy": round(busy[unit]), **{cause: round(stalls[unit][cause]) for cause in CAUSES}}
            for unit in self.timeline.units
        )
        document["units"] = [dict(sorted(unit.items())) for unit in units]
        document["intervals"] = self._intervals() if self.cycles else []
        document["ops"] = [dict(sorted(asdict(row).items())) for row in self.rows]
        return dict(sorted(document.items()))

    def _intervals(self) -> list[dict[str, float]]:
        shares, rates = self.timeline.utilization(INTERVALS), self.timeline.bytes_per_s("dram", INTERVALS)
        rows = (
            {
                "start_us": round(self.latency_us * i / INTERVALS, 3),
                "dram_bytes_per_s": round(float(rates[i])),
                **{unit: round(float(share[i]), 4) for unit, share in shares.items()},
            }
            for i in range(INTERVALS)
        )
        return [dict(sorted(row.items())) for row in rows]

    def write_json(self, path: str | Path) -> None:
        """What :meth:`to_dict` gives."""
        write_json(path, self.to_dict(), ("ops", "units", "intervals"))

    def write_csv(self, path: str | Path) -> None:
        """One line per op, columns as in :class:`OpEstimate`."""
        write_csv(path, COLUMNS, (asdict(row).values() for row in self.rows))

    def to_frame(self) -> pandas.DataFrame:
        """One row per op, columns as in :class:`OpEstimate`."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))


_TOTALS = (
    "target", "source", "clock_hz", "cores", "cycles", "latency_us", "fps", "macs", "utilization",
    "peak_macs_per_cycle",
    "dram_bytes", "dram_bytes_per_s", "sram_bytes_per_cycle", "dram_bytes_per_cycle",
    "static_bytes", "sram_size_bytes", "sram_peak_bytes", "dram_peak_bytes",
)  # fmt: skip
INTERVALS = 60
"""Equal parts of an inference for which ``to_dict`` gives means."""
_BOUNDS: tuple[Bound, ...] = ("mac", "vector", "table", "weights", "sram", "dram", "launch")


_UNITS: dict[str, Unit] = {"array": "mac", "table": "table"}
"""Names of units of the machine in a row; resizing and warping are called the vector unit's."""


def perf_model(executable: Executable) -> Performance:
    """Latency, traffic and utilization of a compiled Program as its target's description predicts them."""
    return executable.performance


def estimate(job: Job, plan: MemoryPlan) -> Performance:
    """Per-op estimates in execution order."""
    target = job.target
    timings = time_plan(job, plan)
    timeline = simulate(job, plan, timings)
    played = {op.op: op for op in timeline.ops}
    if _wide(job):
        other = _narrow(job)
        narrow = {op.op: op for op in simulate(other, plan, time_plan(other, plan)).ops}
    else:
        narrow = played
    rows = []
    for at, step in enumerate(job.steps):
        if step.op.name not in played:
            rows.append(_idle(job, at))
            continue
        op = played[step.op.name]
        extra = max(0, op.cycles - narrow[step.op.name].cycles)
        rows.append(replace(_row(job, at, timings[at], op), int16_cycles=extra))
    return Performance(
        target=target.name,
        source=target.source,
        clock_hz=target.clock_hz,
        peak_macs_per_cycle=target.mac_array.peak,
        sram_bytes_per_cycle=target.sram.bytes_per_cycle,
        dram_bytes_per_cycle=target.dram_bytes_per_cycle,
        sram_size_bytes=target.sram.bytes,
        static_bytes=plan.weight_bytes,
        sram_peak_bytes=plan.sram.peak_bytes,
        dram_peak_bytes=plan.dram.peak_bytes,
        rows=tuple(rows),
        timeline=timeline,
        cores=job.options.cores,
    )


def _wide(job: Job) -> bool:
    return any(value.qtype.dtype == "int16" for value in job.program.values.values())


def _narrow(job: Job) -> Job:
    """The same work if what has 16 bits had 8."""
    program, narrow = job.program, QType("int8", 1.0)
    values = {n: replace(v, qtype=narrow) if v.qtype.dtype == "int16" else v for n, v in program.values.items()}
    return describe(replace(program, values=values), job.steps, job.target)


def _idle(job: Job, at: int) -> OpEstimate:
    """What the accelerator does not run."""
    op = job.steps[at].op
    unit: Unit = "host" if job.steps[at].unit == "host" else "weights" if op.name in job.constants else "view"
    crossing = sum(job.program.values[name].bytes() for name in (*op.inputs, op.output)) if unit == "host" else 0
    return OpEstimate(op.name, op.module, op.kind, unit, host_bytes=crossing)


def _row(job: Job, at: int, timings: Sequence[Timing], played: OpTime) -> OpEstimate:
    passes, target, op = job.passes[at], job.target, job.steps[at].op
    first, cycles = passes[0], played.cycles
    longest = max(timings, key=lambda timing: timing.cycles)
    peak = target.mac_array.peak / (target.mac_array.slowdown(first.dtype) or 1.0)
    to_us = 1e6 / target.clock_hz
    compute = max(played.busy[unit] for unit in ("array", "vector", "table", "resize", "warp") if unit in played.busy)
    moving = max(played.busy["sram"], played.busy["dram"])

    def total(field: str) -> int:
        return sum(getattr(timing, field) for timing in timings)

    return OpEstimate(
        op=op.name,
        module=op.module,
        kind=op.kind,
        unit=_UNITS.get(first.unit, "vector"),
        block="x".join(map(str, first.cut.ofm)),
        macs=first.macs,
        vector_ops=sum(task.vector_ops for task in passes),
        weight_bytes=total("weight_bytes"),
        plain_weight_bytes=first.weights * first.weight_bytes,
        sram_bytes=total("sram_bytes"),
        dram_bytes=total("dram_bytes"),
        mac_cycles=total("mac"),
        vector_cycles=total("vector"),
        wait_cycles=total("weight_wait"),
        sram_cycles=total("sram"),
        bank_cycles=total("banks"),
        dram_cycles=total("dram"),
        launch_cycles=target.launch_cycles,
        cycles=cycles,
        bound="launch" if target.launch_cycles > total("cycles") else longest.limit,
        utilization=first.macs / (cycles * peak) if first.macs and cycles else 0.0,
        latency_us=cycles * to_us,
        start_us=played.start * to_us,
        compute_us=compute * to_us,
        compute_share=compute / cycles if cycles else 0.0,
        load_store_us=moving * to_us,
        load_store_share=moving / cycles if cycles else 0.0,
        **{f"stall_{cause}": round(played.stalls[played.main][cause]) for cause in CAUSES if cause != "launch"},
        hidden_cycles=played.hidden,
        sram_live_bytes=played.sram_bytes,
    )
