"""An estimate of latency from the numbers in a target file: a model of a model, never a measurement.

Per op: ``cycles = max(compute, sram, dram) + launch``. Ops run one after the other. The terms are derived in
``docs/targets.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import qatlib.ops  # noqa: F401  (fills the registry)
from qatlib.compiler.memory import MemoryPlan
from qatlib.compiler.steps import Step
from qatlib.compiler.target import Target
from qatlib.ops.base import BY_KIND, Cost
from qatlib.program import Op, Program
from qatlib.qtype import BYTES

if TYPE_CHECKING:
    import pandas

    from qatlib.compiler.executable import Executable

Unit = Literal["mac", "vector", "view", "weights", "host"]
Bound = Literal["compute", "sram", "dram", "launch", "none"]


@dataclass(frozen=True)
class OpEstimate:
    """One op, batch 1.

    ``unit`` is "view" for a reshape that shares its input's bytes, "weights" for a constant, whose bytes its readers
    pay for, and "host" for what the host runs; these cost nothing here. ``utilization`` is MACs over what the array
    could have done in the op's cycles at the op's dtype.
    """

    op: str
    module: str
    kind: str
    unit: Unit
    macs: int
    vector_ops: int
    sram_bytes: int
    dram_bytes: int
    compute_cycles: int
    sram_cycles: int
    dram_cycles: int
    launch_cycles: int
    cycles: int
    bound: Bound
    utilization: float
    latency_us: float


@dataclass(frozen=True)
class Performance:
    """Estimate for one inference of batch 1; ``source`` is where the target's numbers come from."""

    target: str
    source: str
    clock_hz: float
    peak_macs_per_cycle: int
    rows: tuple[OpEstimate, ...]

    @property
    def cycles(self) -> int:
        return sum(row.cycles for row in self.rows)

    @property
    def latency_us(self) -> float:
        return self.cycles / self.clock_hz * 1e6

    @property
    def fps(self) -> float | None:
        """Inferences per second, one at a time; None if the accelerator has nothing to do."""
        return self.clock_hz / self.cycles if self.cycles else None

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def dram_bytes(self) -> int:
        """DRAM traffic of one inference: weights and spilled activations."""
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
        totals = ("target", "source", "clock_hz", "cycles", "latency_us", "fps", "macs", "dram_bytes", "utilization")
        document: dict[str, Any] = {key: getattr(self, key) for key in totals}
        document["basis"] = "estimate of the target file's model, not a measurement"
        document["cycles_by_bound"] = dict(sorted(self.cycles_by_bound().items()))
        document["ops"] = [dict(sorted(asdict(row).items())) for row in self.rows]
        return dict(sorted(document.items()))

    def to_frame(self) -> pandas.DataFrame:
        """One row per op, columns as in :class:`OpEstimate`."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows], columns=list(OpEstimate.__dataclass_fields__))


_BOUNDS: tuple[Bound, ...] = ("compute", "sram", "dram", "launch")


def perf_model(executable: Executable) -> Performance:
    """Latency, traffic and utilization of a compiled Program as its target's description predicts them."""
    return executable.performance


def estimate(program: Program, steps: Sequence[Step], plan: MemoryPlan, target: Target) -> Performance:
    """Per-op estimates in execution order."""
    return Performance(
        target=target.name,
        source=target.source,
        clock_hz=target.clock_hz,
        peak_macs_per_cycle=target.mac_array.macs_per_cycle.int8,
        rows=tuple(_row(step, program, plan, target) for step in steps),
    )


def _row(step: Step, program: Program, plan: MemoryPlan, target: Target) -> OpEstimate:
    op = step.op
    if step.unit == "host" or op.output not in plan.places:
        return _free(op, "host" if step.unit == "host" else "weights")
    if any(name in plan.places and plan.shares_bytes(op.output, name) for name in op.inputs):
        return _free(op, "view")
    cost = BY_KIND[op.kind].cost(op, program)
    rate = _mac_rate(op, program, target) if cost.macs else 0
    compute = max(_mac_cycles(op, program, cost, target) if cost.macs else 0, _vector_cycles(op, program, cost, target))
    arenas = {name: place.arena for name, place in plan.places.items()}
    computed = [name for name in op.inputs if name in arenas]
    read = sum(program.values[name].bytes() for name in computed)
    constant = max(0, cost.input_bytes - read) if len(computed) < len(op.inputs) else 0
    spilled = sum(program.values[name].bytes() for name in (*computed, op.output) if arenas[name] == "dram")
    dram_bytes = spilled + constant + cost.weight_bytes
    sram_bytes = max(0, cost.input_bytes - constant + cost.output_bytes - spilled)
    sram = math.ceil(sram_bytes / target.sram.bytes_per_cycle)
    dram = target.dram.latency_cycles + math.ceil(dram_bytes / target.dram_bytes_per_cycle) if dram_bytes else 0
    work = max(compute, sram, dram)
    cycles = work + target.launch_cycles
    return OpEstimate(
        op=op.name,
        module=op.module,
        kind=op.kind,
        unit="mac" if cost.macs else "vector",
        macs=cost.macs,
        vector_ops=cost.vector_ops,
        sram_bytes=sram_bytes,
        dram_bytes=dram_bytes,
        compute_cycles=compute,
        sram_cycles=sram,
        dram_cycles=dram,
        launch_cycles=target.launch_cycles,
        cycles=cycles,
        bound=_bound(compute, sram, dram, target.launch_cycles),
        utilization=cost.macs / (cycles * rate) if rate and cycles else 0.0,
        latency_us=cycles / target.clock_hz * 1e6,
    )


def _free(op: Op, unit: Unit) -> OpEstimate:
    return OpEstimate(op.name, op.module, op.kind, unit, 0, 0, 0, 0, 0, 0, 0, 0, 0, "none", 0.0, 0.0)


def _bound(*cycles: int) -> Bound:
    """The largest term; of equal ones the first."""
    return _BOUNDS[cycles.index(max(cycles))]


def mac_dtype(op: Op, program: Program) -> str:
    """The wider dtype of what a conv, linear or matmul multiplies."""
    if "weight" in op.consts:
        weight = str(program.constant(op, "weight").dtype).removeprefix("torch.")
        dtypes = [program.values[op.inputs[0]].qtype.dtype, weight]
    else:
        dtypes = [value.qtype.dtype for value in program.in_values(op)]
    return max(dtypes, key=lambda dtype: BYTES[dtype])


def _mac_rate(op: Op, program: Program, target: Target) -> int:
    rate = target.mac_array.macs_per_cycle.of(mac_dtype(op, program))
    assert rate is not None, "check_model refuses dtypes without a rate"
    return rate


def _mac_cycles(op: Op, program: Program, cost: Cost, target: Target) -> int:
    """Cycles with channels filled up to whole lanes; of a product of matrices the columns and the summed axis.

    Groups of one input channel lie side by side on the output lanes, each using one input lane.
    """
    rate = _mac_rate(op, program, target)
    if "weight" in op.consts:
        outputs, inputs = program.constant(op, "weight").shape[:2]
    else:
        outputs, inputs = (value.sizes()[-1] for value in (program.values[op.output], program.values[op.inputs[0]]))
    groups = op.attrs.get("groups", 1)
    lanes_in, lanes_out = target.mac_array.input_lanes, target.mac_array.output_lanes
    blocks = 1 if inputs == 1 else groups
    filled = blocks * _fill(outputs // blocks, lanes_out) * _fill(inputs, lanes_in)
    return -(-cost.macs * filled // (outputs * inputs * rate))


def _vector_cycles(op: Op, program: Program, cost: Cost, target: Target) -> int:
    dtypes = (value.qtype.dtype for value in (*program.in_values(op), program.values[op.output]))
    rate = target.vector_unit.elements_per_cycle.of(max(dtypes, key=lambda dtype: BYTES[dtype]))
    assert rate is not None, "a Target has a vector rate for every dtype that its ops allow"
    return -(-cost.vector_ops // rate)


def _fill(channels: int, lanes: int) -> int:
    return -(-channels // lanes) * lanes
