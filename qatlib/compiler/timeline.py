"""A compiled Program in time: which unit does what when, why units wait, how full the SRAM is, what crosses each bus.

Ops run one after the other in the order of the Executable. Only weights that are staged come under the op before, and
two neighbours run at once where the target has a table unit for it (:mod:`.beside`). An estimate of the model that the
target file describes, as :mod:`.perf` is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from qatlib.compiler.beside import pairs
from qatlib.compiler.cycles import Timing
from qatlib.compiler.job import Job
from qatlib.compiler.lays import lays
from qatlib.compiler.memory import Draft, MemoryPlan
from qatlib.compiler.placement import live_bytes
from qatlib.compiler.plays import Plays, units_of
from qatlib.compiler.simulate import Pipeline
from qatlib.compiler.spans import CAUSES, Cause, Span, Unit
from qatlib.compiler.target import Target
from qatlib.compiler.traffic import staging_rate

FIRST = "first weights"
"""Span of the first slice of weights, which comes under the op before and is counted to no bus's time."""


@dataclass(frozen=True)
class OpTime:
    """One op from cycle ``start`` to ``end``; ``main`` is the unit that computes it.

    ``busy`` and ``stalls`` are cycles of each unit: what it works, and what it waits by cause. For each unit of the
    target they add up to the op's cycles. ``sram_bytes`` is what of the SRAM is taken while the op runs.

    ``hidden`` are those of the op's cycles that a longer op beside it takes anyway: all or none.
    """

    op: str
    kind: str
    start: int
    end: int
    main: Unit
    spans: tuple[Span, ...]
    busy: dict[Unit, float]
    stalls: dict[Unit, dict[Cause, float]]
    sram_bytes: int
    hidden: int = 0

    @property
    def cycles(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """Ops of one inference of batch 1 in order; ``units`` are those of the target."""

    target: Target
    ops: tuple[OpTime, ...]
    units: tuple[Unit, ...]

    @property
    def cycles(self) -> int:
        return max((op.end for op in self.ops[-2:]), default=0)

    @cached_property
    def busy(self) -> dict[Unit, float]:
        """Cycles that each unit works."""
        return {unit: sum(op.busy[unit] for op in self.ops) for unit in self.units}

    @cached_property
    def stalls(self) -> dict[Unit, dict[Cause, float]]:
        """Cycles that each unit waits, by cause; with ``busy`` they add up to ``cycles``."""
        found = {
            unit: {cause: sum(op.stalls[unit][cause] for op in self.ops) for cause in CAUSES} for unit in self.units
        }
        for op in (op for op in self.ops if op.hidden):  # launched with the longer one, beside which others work
            for unit, waits in found.items():
                launch = op.stalls[unit]["launch"]
                waits["launch"] -= launch
                waits["dependency"] -= op.hidden - launch
        return found

    def utilization(self, intervals: int) -> dict[Unit, NDArray[np.float64]]:
        """Share of each of so many equal intervals in which a unit works, 0 to 1."""
        return {unit: self._spread(unit, "busy", intervals) * self._per_cycle(intervals) for unit in self.units}

    def bytes_per_s(self, unit: Unit, intervals: int) -> NDArray[np.float64]:
        """Bytes a second that cross a bus in each of so many equal intervals."""
        return self._spread(unit, "bytes", intervals) * self._per_cycle(intervals) * self.target.clock_hz

    def _per_cycle(self, intervals: int) -> float:
        return intervals / self.cycles if self.cycles else 0.0

    def _spread(self, unit: Unit, what: str, intervals: int) -> NDArray[np.float64]:
        """The sum of ``what`` of the spans in each interval; each span's is even over its length."""
        edges = np.linspace(0, max(self.cycles, 1), intervals + 1)
        total = np.zeros(intervals)
        for span in (span for op in self.ops for span in op.spans):
            if span.end > span.start and (span.unit == unit or (unit, what, span.what) == ("dram", "bytes", FIRST)):
                share = np.diff(np.clip(edges, span.start, span.end)) / (span.end - span.start)
                total += share * getattr(span, what)
        return total


def simulate(job: Job, plan: MemoryPlan, timings: Sequence[Sequence[Timing]]) -> Timeline:
    """Play the ops that the accelerator runs; ``timings`` are the estimates of their passes, none for other steps."""
    ops, taken = list[OpTime](), sram_bytes(job, plan)
    for step in _Player(job, plan, job.plays).steps(timings):
        ops.append(_account(job, step, int(taken[step.at + 1])))
    return Timeline(job.target, _with_copies(ops), units_of(job.target))


def latency(job: Job, plan: MemoryPlan | Draft, timings: Sequence[Sequence[Timing]], plays: Plays) -> int:
    """Cycles of the whole timeline; with the same ``plays`` again, what is as before is not played again."""
    player = _Player(job, plan, plays)
    for _ in player.steps(timings):
        pass
    return player.clock


@dataclass(frozen=True)
class _Pass:
    """A task that was played, the cycle at which its core starts, and the copy of its first slice of weights."""

    start: float
    played: Pipeline
    copy: Span | None


@dataclass(frozen=True)
class _Step:
    """Step ``at`` as it was played, from cycle ``start`` to ``end``; see :attr:`OpTime.hidden`."""

    at: int
    start: int
    end: int
    passes: tuple[_Pass, ...]
    hidden: int = 0


class _Player:
    """``clock`` is the cycle at which the next op starts, ``_open`` the one from which its weights can be copied."""

    def __init__(self, job: Job, plan: MemoryPlan | Draft, plays: Plays) -> None:
        self._job, self._plan, self._plays = job, plan, plays
        self._off, self._staged, self._lays = plan.off_chip | job.constants, plan.staged, lays(job, plan)
        self.clock, self._open, self._slack = 0, 0.0, 0.0

    def steps(self, timings: Sequence[Sequence[Timing]]) -> Iterator[_Step]:
        """Play the steps that have timings, in order."""
        mates, played = pairs(self._job, self._plan, timings), set[int]()
        for at, row in enumerate(timings):
            if at in mates:
                yield from self._pair(at, mates[at], timings[mates[at]][-1].slack)
                played.add(mates[at])
            elif row and at not in played:
                start, passes = self.clock, tuple(self._passes(at, row))
                yield _Step(at, start, self.clock, passes)

    def _pair(self, at: int, mate: int, slack: float) -> Iterator[_Step]:
        """Play two steps at once; weights of the next may lie where ``at`` reads or writes, and wait for it."""
        job, start = self._job, self.clock
        now = float(start + job.target.launch_cycles)
        tasks, places = (job.passes[at][0], job.passes[mate][0]), (self._lays[at], self._lays[mate])
        both = self._plays.pair(tasks, job.target, self._off, places)
        ends = [math.ceil(round(now + task.cycles, 6)) for task in both]
        self.clock, self._slack = max(ends), slack
        self._open = max(now + both[0].cycles, now + both[1].last_from)
        shorter = ends.index(min(ends))
        for i, (step, end, task) in enumerate(zip((at, mate), ends, both, strict=True)):
            yield _Step(step, start, end, (_Pass(now, task, None),), end - start if i == shorter else 0)

    def _passes(self, at: int, timings: Sequence[Timing]) -> Iterator[_Pass]:
        """Play step ``at``, pass by pass."""
        target, staging = self._job.target, self._job.steps[at].op.name in self._staged
        now = float(self.clock + target.launch_cycles)
        for task, timing in zip(self._job.passes[at], timings, strict=True):
            late = partial(self._late, now)
            played, moved = self._plays.play(task, target, self._off, staging, self._slack, late, self._lays[at])
            copy = None
            if moved.staged:
                took = moved.early / staging_rate(target)
                copy = Span("dma", FIRST, self._open, self._open + took, took, 0, moved.early)
            yield _Pass(now, played, copy)
            now, self._open, self._slack = now + played.cycles, now + played.last_from, timing.slack
        self.clock = math.ceil(round(now, 6))

    def _late(self, now: float, size: float) -> float:
        """When so many bytes of weights are there, in cycles after ``now``."""
        target = self._job.target
        return self._open + size / staging_rate(target) + target.dram.read_latency_cycles - now


def _account(job: Job, step: _Step, taken: int) -> OpTime:
    op, target, passes = job.steps[step.at].op, job.target, step.passes
    tracks, launch = [one.played.tracks for one in passes], float(target.launch_cycles)
    busy, stalls = dict[Unit, float](), dict[Unit, dict[Cause, float]]()
    for unit in units_of(target):
        busy[unit] = sum(track.sums[unit].busy for track in tracks if unit in track.sums)
        waits: dict[Cause, float] = {c: sum(track.stalls.get((unit, c), 0.0) for track in tracks) for c in CAUSES}
        waits["launch"] = launch
        stalls[unit] = waits | {"dependency": step.end - step.start - busy[unit] - sum(waits.values())}
    spans = [one.copy for one in passes if one.copy]
    for one in passes:
        spans += [_later(span, one.start) for track in one.played.tracks.spans.values() for span in track]
    main = job.passes[step.at][0].unit
    return OpTime(op.name, op.kind, step.start, step.end, main, tuple(spans), busy, stalls, taken, step.hidden)


def _with_copies(ops: list[OpTime]) -> tuple[OpTime, ...]:
    """The same with what the engine that copies weights does in the time of each op, which can be for the next."""
    copies = [span for op in ops for span in op.spans if span.unit == "dma"]
    found = []
    for op in ops:
        work = sum(max(0.0, min(span.end, op.end) - max(span.start, op.start)) for span in copies)
        waits: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0) | {"dependency": op.cycles - work}
        found.append(replace(op, busy=op.busy | {"dma": work}, stalls=op.stalls | {"dma": waits}))
    return tuple(found)


def _later(span: Span, cycles: float) -> Span:
    return replace(span, start=span.start + cycles, end=span.end + cycles)


def sram_bytes(job: Job, plan: MemoryPlan) -> NDArray[np.int64]:
    """Bytes of the SRAM that are taken before the first step, in each step, and after the last."""
    taken = live_bytes(job, frozenset(name for name, place in plan.places.items() if place.arena == "sram"))
    for one in plan.scratch:
        taken[one.first + 1 : one.last + 2] += one.size
    return taken
