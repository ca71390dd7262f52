"""The table unit: cycles by hand, tables that are loaded, and ops that run at once with those of the vector unit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from qatlib.compiler import Executable, compile_model
from qatlib.compiler.beside import pairs
from qatlib.compiler.memory import MemoryPlan, time_plan
from qatlib.compiler.spans import CAUSES
from qatlib.compiler.trace import trace
from qatlib.emulator import emulate
from tests.compiler.compiler_nets import TINY, Net, tiny

ELEMENTS = 64 * 8 * 8  # one block of the target "tiny"
MOVED = ELEMENTS / 32  # cycles of the SRAM's bus for as many bytes
LAUNCH, LATENCY, DRAM = 5, 10, 4
UNIT: dict[str, Any] = {"lookups_per_cycle": {"int8": 4, "int16": 1}, "ports": 4}
OPS = TINY["ops"] | {"table": {"inputs": ["int8", "int16"], "outputs": ["int8", "int16"]}}


def lookup(net: Net, x: str) -> str:
    """A table of 256 bytes for int8; of 16 steps in one segment for int16."""
    dtype = net.values[x].qtype.dtype
    about = {"range": None, "extra_bits": 0, "worst_lsb": 0.5, "mean_lsb": 0.25, "symmetry": "none"}
    if dtype == "int8":
        record: dict[str, Any] = about | {"division": "exact", "segments": 1, "entries": 256, "codes": [-128, 127]}
        attrs = {"function": "tanh", "table": record, "lo": -128, "hi": 127}
        return net.op("table", [x], net.shape(x), dtype, attrs, table=torch.arange(-128, 128).to(torch.int8))
    record = about | {"division": "uniform", "segments": 1, "entries": 17, "codes": [-32768, 32767]}
    attrs = {"function": "tanh", "table": record, "lo": -32768, "hi": 32767}
    parts = {"start": -32768, "step": 12, "offset": 0}
    consts = {role: torch.tensor([value], dtype=torch.int32) for role, value in parts.items()}
    return net.op("table", [x], net.shape(x), dtype, attrs, table=torch.arange(17).to(torch.int16) * 100, **consts)


def compiled(net: Net, *outputs: str, unit: dict[str, Any] | None = UNIT, **options: Any) -> Executable:
    changes = {"ops": OPS} | ({"table_unit": unit} if unit else {})
    return compile_model(net.program(*outputs), tiny(changes), options)


def cycles_of(dtype: str, unit: dict[str, Any] | None) -> tuple[int, Any]:
    net = Net()
    performance = compiled(net, lookup(net, net.input((64, 8, 8), dtype)), unit=unit).performance
    (op,) = performance.timeline.ops
    return performance.cycles, op


@pytest.mark.parametrize(
    ("dtype", "change", "load", "work"),
    [
        ("int8", {}, LATENCY + 256 / DRAM, ELEMENTS / 16),
        ("int8", {"load_bytes_per_cycle": 2}, LATENCY + 256 / 2, ELEMENTS / 16),
        ("int8", {"load_bytes_per_cycle": 99}, LATENCY + 256 / DRAM, ELEMENTS / 16),
        ("int8", {"tables_from": "unit"}, 0, ELEMENTS / 16),
        ("int8", {"ports": 2}, LATENCY + 256 / DRAM, ELEMENTS / 8),
        ("int16", {}, LATENCY + (17 * 2 + 3 * 4) / DRAM, ELEMENTS / 4),
    ],
)
def test_a_table_is_loaded_and_then_looked_up(dtype: str, change: dict[str, Any], load: float, work: float) -> None:
    cycles, op = cycles_of(dtype, UNIT | change)
    written = MOVED * (2 if dtype == "int16" else 1)
    assert cycles == math.ceil(LAUNCH + load + work + written)
    assert op.main == "table"
    assert op.busy["table"] == work
    assert op.busy["vector"] == 0
    assert op.stalls["table"]["table"] == load


def test_without_the_unit_the_vector_unit_does_it() -> None:
    cycles, op = cycles_of("int8", None)
    assert cycles == LAUNCH + ELEMENTS / 8 + MOVED
    assert op.main == "vector"
    assert "table" not in op.busy


def test_rows_and_totals_name_the_unit() -> None:
    net = Net()
    performance = compiled(net, lookup(net, net.input((64, 8, 8)))).performance
    (row,) = (row for row in performance.rows if row.kind == "table")
    assert (row.unit, row.bound, row.vector_cycles) == ("table", "table", ELEMENTS // 16)
    assert row.stall_table == LATENCY + 256 / DRAM
    assert row.compute_us == ELEMENTS / 16  # 1 MHz
    assert row.dram_bytes == 256
    (unit,) = (unit for unit in performance.to_dict()["units"] if unit["unit"] == "table")
    assert (unit["busy"], unit["table"]) == (ELEMENTS // 16, row.stall_table)


# -- at once -----------------------------------------------------------------------------------------------------------

BESIDE = UNIT | {"beside_vector_unit": True}


def branches(unit: dict[str, Any]) -> Executable:
    """A table and a clamp of the same input, and the sum of both."""
    net = Net()
    x = net.input((64, 8, 8))
    return compiled(net, net.add(lookup(net, x), net.clamp(x)), unit=unit)


def test_a_table_and_a_clamp_run_at_once_by_hand() -> None:
    alone, beside = branches(UNIT), branches(BESIDE)
    first, second, last = beside.performance.timeline.ops
    # the table's input comes first on the bus; both then work, and what the table unit makes is written meanwhile
    load = LATENCY + 256 / DRAM
    table = LAUNCH + load + ELEMENTS / 16 + MOVED
    clamp = LAUNCH + MOVED + ELEMENTS / 8 + MOVED
    assert (first.start, first.end, second.start, second.end) == (0, table, 0, clamp)
    assert last.start == clamp
    assert (first.hidden, second.hidden) == (table, 0)
    rows = {row.kind: row for row in beside.performance.rows}
    assert (rows["table"].hidden_cycles, rows["clamp"].hidden_cycles) == (table, 0)
    one_by_one = table + LAUNCH + ELEMENTS / 8 + MOVED
    assert alone.performance.cycles - beside.performance.cycles == one_by_one - clamp
    assert sum(beside.performance.cycles_by_bound().values()) == beside.performance.cycles


def test_units_that_work_at_once_share_the_buses_and_are_accounted_for() -> None:
    performance = branches(BESIDE).performance
    timeline = performance.timeline
    for unit in timeline.units:
        spans = sorted((s.start, s.end) for op in timeline.ops for s in op.spans if s.unit == unit)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        waits = timeline.stalls[unit]
        assert min(waits.values()) >= 0
        assert timeline.busy[unit] + sum(waits.values()) == timeline.cycles == performance.cycles
        for op in timeline.ops:
            assert op.busy[unit] + sum(op.stalls[unit][cause] for cause in CAUSES) == op.cycles
    (table,), (clamp, _) = ([s for op in timeline.ops for s in op.spans if s.unit == u] for u in ("table", "vector"))
    assert max(table.start, clamp.start) < min(table.end, clamp.end)
    shares = timeline.utilization(40)
    assert ((shares["table"] > 0.9) & (shares["vector"] > 0.9)).any()


def test_the_trace_has_a_track_for_the_unit() -> None:
    events = trace(branches(BESIDE).performance)["traceEvents"]
    (track,) = (e["tid"] for e in events if e["name"] == "thread_name" and e["args"]["name"] == "table")
    (span,) = (e for e in events if e["ph"] == "X" and e["tid"] == track)
    assert span["dur"] == ELEMENTS / 16
    (sram,) = (e["tid"] for e in events if e["name"] == "thread_name" and e["args"]["name"] == "sram")
    times = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == sram]
    assert all(a[1] <= b[0] for a, b in pairwise(times))


def mates(executable: Executable, plan: MemoryPlan | None = None) -> dict[str, str]:
    plan = plan or executable.memory
    names = [step.op.name for step in executable.steps]
    found = pairs(executable.job, plan, time_plan(executable.job, plan))
    return {names[a]: names[b] for a, b in found.items()}


def test_what_needs_the_other_waits_for_it() -> None:
    net = Net()
    x = net.input((64, 8, 8))
    chain = compiled(net, net.clamp(lookup(net, net.clamp(x))), unit=BESIDE)
    assert mates(chain) == {}
    starts = [op.start for op in chain.performance.timeline.ops]
    assert starts == sorted(set(starts))
    net = Net()
    x = net.input((64, 8, 8))
    view = net.reshape(lookup(net, x), 4096)
    assert mates(compiled(net, net.clamp(view), unit=BESIDE)) == {}  # by way of a view


def test_bytes_that_one_writes_and_the_other_reads_keep_them_apart() -> None:
    executable = branches(BESIDE)
    assert mates(executable) == {"table0": "clamp1"}
    plan = executable.memory
    for name, other in (("clamp1", "in0"), ("clamp1", "table0"), ("table0", "in0")):
        places = dict(plan.places)
        places[name] = places[name].model_copy(update={"offset": places[other].offset + 16})
        assert mates(executable, plan.model_copy(update={"places": places})) == {}, (name, other)


def test_what_is_read_at_once_is_not_written_over() -> None:
    net = Net()
    x = net.clamp(net.input((64, 8, 8)))
    executable = compiled(net, net.add(lookup(net, x), net.clamp(x)), unit=BESIDE)
    assert mates(executable) == {"table1": "clamp2"}
    assert not executable.memory.shares_bytes("clamp0", "clamp2")


def test_values_stay_those_of_the_program() -> None:
    net = Net(3)
    x = net.input((16, 8, 8))
    y = net.clamp(x)
    z = net.add(lookup(net, y), net.clamp(y))
    executable = compiled(net, z, net.add(lookup(net, z), net.pool("max_pool", z, 1)), unit=BESIDE)
    assert len(mates(executable)) == 2
    feed = net.feed(3)
    for seen, expected in zip(executable.run(*feed), emulate(executable.program, feed), strict=True):
        assert torch.equal(seen, expected)


def test_large_maps_side_by_side_take_as_long_as_their_bus() -> None:
    """Many blocks are taken as few: the SRAM's bus moves four maps, and is the slowest."""
    net = Net()
    x = net.input((64, 512, 512))
    changes = {"ops": OPS, "table_unit": BESIDE | {"ports": 64}, "sram.bytes": 2**28, "sram.bytes_per_cycle": 4}
    changes |= {"vector_unit.elements_per_cycle.int8": 64}
    performance = compile_model(net.program(lookup(net, x), net.clamp(x)), tiny(changes)).performance
    assert performance.timeline.ops[0].start == performance.timeline.ops[1].start
    assert performance.cycles == pytest.approx(4 * 64 * 512 * 512 / 4, rel=0.01)


def test_a_search_brings_together_what_can_run_at_once() -> None:
    """In the order of the Program a chain of two tables stands before a chain of two clamps."""
    net = Net()
    x = net.input((64, 8, 8))
    left = lookup(net, lookup(net, x))
    right = net.clamp(net.clamp(x))
    program = net.program(net.add(left, right))
    target = tiny({"ops": OPS, "table_unit": BESIDE})
    plain, searched = (compile_model(program, target, {"opt": opt}) for opt in ("O2", "O3"))
    assert len(mates(plain)) == 1
    assert len(mates(searched)) == 2
    assert searched.performance.cycles < plain.performance.cycles
