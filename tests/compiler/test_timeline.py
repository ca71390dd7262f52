"""The simulation against a plain event queue, against the closed form, and against what is bound to be true of it."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.compiler import Executable, Target, compile_model, load_target
from qatlib.compiler.cycles import Slices, Stage, Stages
from qatlib.compiler.job import describe
from qatlib.compiler.placement import time_all
from qatlib.compiler.plays import Plays, play_together
from qatlib.compiler.simulate import Pipeline
from qatlib.compiler.spans import CAUSES, Unit
from qatlib.compiler.timeline import FIRST, latency
from qatlib.compiler.traffic import Traffic
from tests.compiler.compiler_nets import Net, random_net, residual, tiny

TARGETS = ("tiny", "bayes-like", "ethos-u55-256-like", "ethos-u85-256-like", "ethos-u85-512-like")
NOTHING = Traffic({}, {}, 1, 1, 0, 0, staged=False, early=0)
SRAM, DRAM = 32, 4  # bytes a cycle of the target "tiny"


def target_of(name: str) -> Target:
    return tiny() if name == "tiny" else load_target(name)


def closed_form(executable: Executable) -> dict[str, int]:
    """Cycles of each op by the formula."""
    job, plan = describe(executable.program, executable.steps, executable.target), executable.memory
    staging = {i for i, step in enumerate(job.steps) if step.op.name in plan.staged}
    timings = time_all(job, plan.off_chip | job.constants, staging)
    launch = executable.target.launch_cycles
    return {s.op.name: sum(t.cycles for t in row) + launch for s, row in zip(job.steps, timings, strict=True) if row}


# -- one task ----------------------------------------------------------------------------------------------------------


def stages_of(blocks: float, a: float, b: float, lead: float = 0, tail: float = 0) -> Stages:
    return Stages(blocks, Stage(a, a / 2, a / 8, a / 8), Stage(b, b / 4), lead, tail, "sram")


def played(held: Stages, moved: Traffic = NOTHING, cut: Slices | None = None, arrival: float = 0) -> Pipeline:
    pipeline = Pipeline(("array", "vector"), tiny(), moved, held, cut or Slices(0, 0), arrival)
    pipeline.run()
    return pipeline


cycles = st.integers(0, 400).map(lambda n: n / 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400), cycles, cycles, cycles)
def test_without_traffic_it_is_the_closed_form(blocks: int, a: int, b: float, lead: float, tail: float) -> None:
    held = stages_of(blocks, a, b, lead, tail)
    assert played(held).cycles == pytest.approx(held.core)


@pytest.mark.parametrize("blocks", [1.25, 2.5, 7.75])
def test_part_of_a_block_takes_part_of_its_time(blocks: float) -> None:
    held = stages_of(blocks, 96, 24, 8, 4)
    assert played(held).cycles == pytest.approx(held.core)
    assert played(held).tracks.sums["array"].busy == pytest.approx(blocks * 48)
    assert played(held).tracks.sums["vector"].busy == pytest.approx(blocks * 6)


Queued = tuple[Stages, int, dict[str, dict[str, float]]]
"""A task, its blocks, and the cycles for which a block is on each bus."""


def event_queue(*tasks: Queued) -> list[float]:
    """The text of docs/targets.md as a queue of requests to the buses, first come first served, writes first.

    When each of ``tasks`` ends that start at once; of requests at the same cycle those of the first task come first.
    """
    free: dict[str, float] = defaultdict(float)
    states: list[tuple[dict[int, float], ...]] = [tuple({} for _ in range(6)) for _ in tasks]
    queue = [(0.0, task, 1, i) for task, (_, count, _) in enumerate(tasks) for i in range(min(2, count))]
    heapq.heapify(queue)
    while queue:
        at, task, reading, i = heapq.heappop(queue)
        held, count, moves = tasks[task]
        grant, arrived, first, late, last, written = states[task]
        a, b, work = held.first.cycles, held.last.cycles, held.last.busy + held.last.weights
        ends, begins = [at], [at]
        for bus, sizes in moves.items():
            needed = sizes["read" if reading else "write"]
            if needed:
                begins.append(max(at, free[bus]))
                free[bus] = begins[-1] + needed
                ends.append(free[bus])
        if reading:
            grant[i], arrived[i] = max(begins), max(ends)
        else:
            written[i] = max(ends)
        moved = True
        while moved:
            moved = False
            m, v = len(first), len(last)
            if m in grant and (m < 2 or m - 2 in last):
                start = max(grant[m], first.get(m - 1, 0), last.get(m - 2, 0), held.lead if m == 0 else 0)
                first[m] = max(start + a, arrived[m])
                late[m] = first[m] - start - a
                if m + 2 < count:
                    heapq.heappush(queue, (first[m], task, 1, m + 2))
                moved = True
            if v in first and (v < 2 or v - 2 in written):
                start = max(first[v], last.get(v - 1, 0), written.get(v - 2, 0))
                last[v] = start + max(work, b - late[v])
                heapq.heappush(queue, (last[v], task, 0, v))
                moved = True
    ends = []
    for (held, count, _), (*_, last, written) in zip(tasks, states, strict=True):
        ends.append(max(written[count - 1], last[count - 1] + held.tail))
    return ends


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 120), st.integers(1, 200), cycles, cycles,
    st.tuples(cycles, cycles), st.tuples(cycles, cycles),
)  # fmt: skip
def test_it_is_what_an_event_queue_says(
    blocks: int, a: int, b: float, lead: float, sram: tuple[float, float], dram: tuple[float, float]
) -> None:
    held = stages_of(blocks, a, b, lead, 3)
    moved = Traffic(
        {"maps": sram[0] * SRAM * blocks, "write": sram[1] * SRAM * blocks},
        {"weights": dram[0] * DRAM * blocks, "write": dram[1] * DRAM * blocks},
        1, 1, 0, 0, staged=False, early=0,
    )  # fmt: skip
    both = {"sram": sram, "dram": dram}
    (expected,) = event_queue((held, blocks, by_way(both)))
    assert played(held, moved).cycles == pytest.approx(expected)


def by_way(sizes: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {bus: dict(zip(("read", "write"), each, strict=True)) for bus, each in sizes.items()}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 200), *[cycles] * 5), min_size=2, max_size=2))
def test_two_at_once_are_what_an_event_queue_says(both: list[tuple[Any, ...]]) -> None:
    tasks, queued = [], []
    for unit, (blocks, a, lead, *moves) in zip(("table", "vector"), both, strict=True):
        held = Stages(blocks, Stage(a, a / 2), Stage(), lead, 0, "sram", "table")
        sram, dram = (moves[0], moves[1]), (moves[2], moves[3])
        moved = Traffic(
            {"stream": sram[0] * SRAM * blocks, "write": sram[1] * SRAM * blocks},
            {"stream": dram[0] * DRAM * blocks, "write": dram[1] * DRAM * blocks},
            1, 1, 0, 0, staged=False, early=0,
        )  # fmt: skip
        tasks.append(Pipeline((unit, "vector"), tiny(), moved, held, Slices(0, 0), 0))
        queued.append((held, blocks, by_way({"sram": sram, "dram": dram})))
    play_together(*tasks)
    for task, expected in zip(tasks, event_queue(*queued), strict=True):
        assert task.cycles == pytest.approx(expected)


def test_blocks_that_repeat_are_not_played_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    held = stages_of(5000, 10, 7, 2, 1)
    moved = Traffic(
        {"maps": 5000 * 3 * SRAM, "write": 5000 * 2 * SRAM}, {"weights": 5000 * 8 * DRAM}, 1, 1, 0, 0, False, 0
    )
    steps = 0
    read_block = Pipeline._read_block

    def counted(self: Pipeline) -> None:
        nonlocal steps
        steps += 1
        read_block(self)

    monkeypatch.setattr(Pipeline, "_read_block", counted)
    fast = played(held, moved)
    assert steps < 100
    monkeypatch.setattr(Pipeline, "_leap", lambda self, seen: None)
    slow = played(held, moved)
    assert steps >= 5000
    assert fast.cycles == pytest.approx(slow.cycles)
    assert set(fast.tracks.stalls) == set(slow.tracks.stalls)
    for key, waited in slow.tracks.stalls.items():
        assert fast.tracks.stalls[key] == pytest.approx(waited)
    for unit, total in slow.tracks.sums.items():
        seen = fast.tracks.sums[unit]
        assert (seen.busy, seen.blocks, seen.bytes) == pytest.approx((total.busy, total.blocks, total.bytes))


def test_slices_of_weights_are_copied_while_the_one_before_is_in_use() -> None:
    weights = 800 * DRAM  # 800 cycles of copies, 10 of latency; four slices of 200, the first early
    moved = Traffic({}, {}, 1, 1, weights, 0, staged=True, early=weights / 4)
    cut = Slices(0, 0, 0.25, 0.25)
    # the core is slower: 8 blocks of 200, each slice two of them; nothing is waited for but the first
    slow = played(stages_of(8, 200, 0), moved, cut, arrival=70)
    assert slow.cycles == 70 + 8 * 200
    assert slow.last_from == 70 + 6 * 200
    assert slow.tracks.stalls["array", "weights"] == pytest.approx(70 + 8 * 200 / 8)
    starts = [span.start for span in slow.tracks.spans["dma"]]
    # the engine is free at 60, and each copy but the first waits until the slice of two before is used up
    assert starts == pytest.approx([60, 70 + 400, 70 + 800])
    # the copies are slower: the last slice comes at 60 + 600 + 10, and runs for two blocks of 50
    fast = played(stages_of(8, 50, 0), moved, cut, arrival=70)
    assert fast.cycles == pytest.approx(60 + 600 + 10 + 2 * 50)
    assert fast.last_from == pytest.approx(670)


# -- a Program ---------------------------------------------------------------------------------------------------------


def some_program(seed: int) -> Executable:
    return compile_model(random_net(seed, 12)[1], tiny({"sram.bytes": 1024}))


@pytest.fixture(scope="module", params=TARGETS)
def network(request: pytest.FixtureRequest) -> Executable:
    """Convolutions of several sizes, a depthwise one, a sum, a pool, a linear layer."""
    net = Net()
    x = net.conv(net.input((3, 64, 64)), 32, stride=2)
    y = net.conv(net.conv(x, 32, groups=32), 64, 1)
    z = net.conv(net.conv(y, 64), 64, addend=y)
    flat = net.reshape(net.pool("avg_pool", net.conv(z, 128, stride=2), 16), 128)
    return compile_model(net.program(net.linear(flat, 100)), target_of(request.param))


def test_every_cycle_of_every_unit_is_accounted_for(network: Executable) -> None:
    timeline = network.performance.timeline
    assert timeline.ops[0].start == 0
    for before, op in zip((None, *timeline.ops), timeline.ops, strict=False):
        assert before is None or op.start == before.end
        for unit in timeline.units:
            waits = op.stalls[unit]
            assert set(waits) == set(CAUSES)
            assert min(*waits.values(), op.busy[unit]) >= -1e-3, (op.op, unit)
            assert op.busy[unit] + sum(waits.values()) == pytest.approx(op.cycles)
            assert unit == "dma" or waits["launch"] == network.target.launch_cycles


def test_spans_of_a_unit_follow_one_another(network: Executable) -> None:
    timeline = network.performance.timeline
    for unit in timeline.units:
        spans = [span for op in timeline.ops for span in op.spans if span.unit == unit]
        for a, b in pairwise(spans):
            assert a.end <= b.start + 1e-6
        for span in spans:
            assert -1e-6 <= span.busy <= span.end - span.start + 1e-6
        assert sum(span.busy for span in spans) == pytest.approx(timeline.busy[unit])


def test_units_work_as_long_and_move_as_much_as_the_closed_form_says(network: Executable) -> None:
    played = {op.op: op for op in network.performance.timeline.ops}
    for row in network.performance.rows:
        if row.op not in played:
            continue
        op = played[row.op]
        busy = {"array": row.mac_cycles, "vector": row.vector_cycles, "sram": row.sram_cycles, "dram": row.dram_cycles}
        for unit, expected in busy.items():
            assert abs(op.busy[unit] - expected) <= 2  # which are rounded up
        moved: dict[Unit, float] = defaultdict(float)
        for span in op.spans:
            moved["dram" if span.what == FIRST else span.unit] += span.bytes
        assert abs(moved["sram"] - row.sram_bytes) <= 2
        assert abs(moved["dram"] - row.dram_bytes) <= 2


def test_ops_take_what_the_closed_form_says_but_for_the_ends_of_a_bus(network: Executable) -> None:
    formula, total = closed_form(network), 0
    for op in network.performance.timeline.ops:
        row = next(row for row in network.performance.rows if row.op == op.op)
        # the first slice of weights is copied while the op is launched, for which the formula adds it
        assert op.cycles >= 0.95 * formula[op.op] - row.launch_cycles - 2
        # the longest, and one block of each other part before and after it
        one = (row.sram_cycles + row.dram_cycles + row.mac_cycles + row.vector_cycles) / _blocks(op)
        assert op.cycles <= formula[op.op] + one + 0.02 * formula[op.op] + 4, op.op
        total += formula[op.op]
    assert network.performance.cycles == pytest.approx(total, rel=0.08)


def _blocks(op: object) -> int:
    return max(1, *(span.blocks for span in op.spans if span.what == "compute"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(4))
def test_random_networks_are_accounted_for(seed: int) -> None:
    executable = some_program(seed)
    timeline, formula = executable.performance.timeline, closed_form(executable)
    for op in timeline.ops:
        for unit in timeline.units:
            assert op.busy[unit] + sum(op.stalls[unit].values()) == pytest.approx(op.cycles)
            assert min(op.stalls[unit].values()) >= -1e-3
    assert timeline.cycles == pytest.approx(sum(formula.values()), rel=0.1)
    assert executable.performance.cycles == timeline.cycles


@pytest.mark.parametrize("seed", range(3))
def test_what_was_played_before_is_not_played_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = some_program(seed)
    job, plan = describe(executable.program, executable.steps, executable.target), executable.memory
    staging = {i for i, step in enumerate(job.steps) if step.op.name in plan.staged}
    timings, plays = time_all(job, plan.off_chip | job.constants, staging), Plays()
    assert latency(job, plan, timings, plays) == executable.performance.cycles
    monkeypatch.setattr(Pipeline, "run", lambda self: pytest.fail("is played again"))
    assert latency(job, plan, timings, plays) == executable.performance.cycles


def test_the_same_program_gives_the_same_timeline() -> None:
    _, program = residual()
    first, second = (compile_model(program, "bayes-like").performance for _ in range(2))
    assert first == second


def test_weights_come_while_the_op_before_runs() -> None:
    net = Net()
    x = net.conv(net.input((64, 56, 56)), 64)
    y = net.conv(x, 64)
    timeline = compile_model(net.program(y), "ethos-u85-256-like").performance.timeline
    first, second = timeline.ops
    (copy,) = (span for span in second.spans if span.what == FIRST)
    assert first.start < copy.start < copy.end < second.start
    assert second.stalls["array"]["weights"] < first.stalls["array"]["weights"]
    assert first.busy["dma"] > 0


def test_units_over_time_add_up() -> None:
    performance = compile_model(random_net(1, 14)[1], tiny()).performance
    timeline = performance.timeline
    for count in (1, 7, 100):
        for unit, shares in timeline.utilization(count).items():
            assert shares.shape == (count,)
            assert shares.max(initial=0) <= 1 + 1e-9
            assert shares.sum() * timeline.cycles / count == pytest.approx(timeline.busy[unit])
        moved = timeline.bytes_per_s("dram", count).sum() * timeline.cycles / count / 1e6
        assert moved == pytest.approx(performance.dram_bytes, abs=2 * len(timeline.ops))


def test_sram_over_time_is_that_of_the_plan() -> None:
    net = Net()
    x = net.clamp(net.input((1, 8, 8)))
    y = net.pool("max_pool", x, 2)
    executable = compile_model(net.program(y), tiny())
    # what enters is not written over: 64 and 64, then 64 and the 16 of the pool
    assert [op.sram_bytes for op in executable.performance.timeline.ops] == [128, 80]
    assert executable.memory.sram.live_bytes == 128


LARGE = [*map(target_of, TARGETS), tiny({"sram.bytes": 64}), tiny({"sram.bytes": 2**30})]


@pytest.mark.parametrize("target", LARGE, ids=lambda target: f"{target.name}-{target.sram.bytes}")
def test_a_large_image_takes_no_longer_to_simulate(target: Target) -> None:
    net = Net()
    y = net.conv(net.input((3, 4096, 4096)), 16)
    (op,) = compile_model(net.program(y), target).performance.timeline.ops
    assert len(op.spans) < 400
    assert sum(span.blocks for span in op.spans if span.unit == "array") >= 1000
    assert math.isfinite(op.end)
    assert np.isfinite(list(op.busy.values())).all()
