"""One task in time: its blocks pass the units and the buses, event by event.

Two units hold each block one after the other for the times of :func:`.cycles.stages`, of which :func:`.cycles.time` is
the closed form. Beside it each bus serves who asks first, buffers have room for two blocks, and slices of weights are
copied into one half of their place while the other half is in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from qatlib.compiler.cycles import Slices, Stage, Stages
from qatlib.compiler.hardware import Channel, Memory
from qatlib.compiler.spans import Cause, Span, Sum, Tracks, Unit
from qatlib.compiler.target import Target
from qatlib.compiler.traffic import Traffic, bus_cycles, staging_rate

Bus = Literal["sram", "dram"]
Way = Literal["read", "write"]
_ROOM = 2
"""Blocks of inputs, of sums and of results that the buffers hold."""
_EPS = 1e-9
_DIGITS = 6
"""Behind the comma of a cycle: states that are equal up to them are the same."""

_Seen = dict[tuple[float, ...], tuple[int, float, dict[tuple[Unit, Cause], float], dict[Unit, Sum]]]


class Pipeline:
    """The blocks of one task on two ``units``; its core starts at cycle 0, the first slice of weights is there at
    ``arrival``, by ``moved`` and ``cut``.

    After :meth:`run`, ``cycles`` is when the task ends, ``last_from`` when its last slice of weights came into use,
    from where on the next task's first can be copied, and ``tracks`` what happened. A unit that is neither busy nor
    accounted for there has nothing more to do.
    """

    def __init__(
        self, units: tuple[Unit, Unit], target: Target, moved: Traffic, held: Stages, cut: Slices, arrival: float
    ) -> None:
        self.tracks, self.cycles, self.last_from = Tracks(), 0.0, 0.0
        self._units, self._held = units, held
        self._count = max(1, math.ceil(held.blocks - _EPS))
        # the formula counts parts of blocks: here all are shorter alike on the slower unit, and on the other no longer
        self._part = held.blocks / self._count
        slower = max(held.first.cycles, held.last.cycles) * self._part
        self._cycles = min(held.first.cycles, slower), min(held.last.cycles, slower)
        self._moves = _per_block(target, moved, self._count)
        self._free: dict[Bus, float] = {bus: 0.0 for (bus, _), (cycles, _) in self._moves.items() if cycles}
        # numbers of the next blocks to be read, to pass the first and the last unit, and to be written; and when
        # blocks did, as far as it still matters
        self._read = self._one = self._two = self._write = 0
        self._granted: dict[int, tuple[float, Bus]] = {}
        self._arrived: dict[int, tuple[float, Bus]] = {}
        self._first: dict[int, float] = {}
        self._late: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._written: dict[int, tuple[float, Bus]] = {}

        later = math.ceil((1 - cut.first) / cut.later - _EPS) if cut.later else 0
        self._bounds = [0.0, *(cut.first + k * cut.later for k in range(later)), 1.0]
        self._speed, self._latency = staging_rate(target), float(target.dram.read_latency_cycles)
        self._weights = float(moved.weights)
        self._arrivals, self._used = [arrival], list[float]()
        self._copied = arrival - self._latency

    def run(self) -> None:
        """Play all blocks. Where a state comes again, what happened since is repeated as long as nothing else would."""
        seen: _Seen = {}
        while not self.done:
            written = self._write
            self.advance()
            if self._write > written:
                self._leap(seen)

    @property
    def done(self) -> bool:
        return self._write == self._count

    def advance(self) -> None:
        """Play the next request to the buses and what follows from it."""
        if self._next_is_write():
            self._write_block()
        else:
            self._read_block()
        while self._pass_first() or self._pass_last():
            pass
        if self.done:
            self.cycles = max(self._written[self._count - 1][0], self._last[self._count - 1] + self._held.tail)

    def asks(self) -> float:
        """When the next request to the buses comes."""
        return self._last[self._write] if self._next_is_write() else self._first.get(self._read - _ROOM, 0.0)

    def share(self, other: Pipeline) -> None:
        """Use the same buses as ``other``."""
        other._free |= self._free
        self._free = other._free

    # -- buses ---------------------------------------------------------------------------------------------------------

    def _next_is_write(self) -> bool:
        """Whether a finished block asks no later than the next to be read, for which there has to be room."""
        if self._write == self._two:
            return False
        at = self._read - _ROOM
        return self._read == self._count or at >= self._one or self._last[self._write] <= self._first.get(at, 0.0)

    def _read_block(self) -> None:
        i, at = self._read, self._first.get(self._read - _ROOM, 0.0)
        served = [(*self._serve(bus, "read", at), bus) for bus in self._free]
        self._granted[i] = max(((grant, bus) for grant, _, bus in served), default=(at, "sram"))
        self._arrived[i] = max(((end, bus) for _, end, bus in served), default=(at, "sram"))
        self._read += 1

    def _write_block(self) -> None:
        i, at = self._write, self._last[self._write]
        served = [(*self._serve(bus, "write", at), bus) for bus in self._free]
        self._written[i] = max(((end, bus) for _, end, bus in served), default=(at, "sram"))
        self._write += 1

    def _serve(self, bus: Bus, way: Way, at: float) -> tuple[float, float]:
        """When ``bus`` begins and ends to move a block's bytes."""
        cycles, size = self._moves[bus, way]
        if not cycles:
            return at, at
        grant = max(at, self._free[bus])
        self.tracks.wait(bus, "compute", grant - self._free[bus])
        self._free[bus] = grant + cycles
        self.tracks.add(Span(bus, way, grant, grant + cycles, cycles, 1, size))
        return grant, grant + cycles

    # -- units ---------------------------------------------------------------------------------------------------------

    def _pass_first(self) -> bool:
        """The next block on the first unit, if it was read and there is room for its sums."""
        i, held, unit = self._one, self._held, self._units[0]
        if i == self._read or i - _ROOM >= self._two:
            return False
        free, (grant, bus) = self._first.get(i - 1, 0.0), self._granted[i]
        waits: list[tuple[float, Cause]] = [
            (free, "compute"),
            (grant, bus),
            (self._last.get(i - _ROOM, 0.0), "compute"),
        ]
        if i == 0:
            waits.append((held.lead, "table" if held.lead_for == "table" else held.memory))
        start, cause = max(waits, key=lambda wait: wait[0])
        self.tracks.wait(unit, cause, start - free)
        computed = self._over_slices(i, start)
        arrived, late = self._arrived[i]
        self.tracks.wait(unit, late, arrived - computed)
        span = Span(unit, "compute", start, max(computed, arrived), held.first.busy * self._part, 1)
        self._hold(unit, held.first, self._cycles[0], span)
        self._first[i], self._late[i] = max(computed, arrived), max(0.0, arrived - computed)
        self._one += 1
        return True

    def _over_slices(self, i: int, start: float) -> float:
        """When the first unit is through with block ``i``, waiting for each slice of weights that the block needs."""
        at, here, end = start, i / self._count, (i + 1) / self._count
        while True:
            k = len(self._used)
            arrival = self._arrival(k)
            self.tracks.wait(self._units[0], "weights", arrival - at)
            at = max(at, arrival)
            if k == len(self._bounds) - 2 and here <= self._bounds[k] + _EPS:
                self.last_from = at
            until = min(end, self._bounds[k + 1])
            at += (until - here) * self._count * self._cycles[0]
            here = until
            if until < self._bounds[k + 1] - _EPS or k == len(self._bounds) - 2:
                return at
            self._used.append(at)
            if here >= end - _EPS:
                return at

    def _arrival(self, k: int) -> float:
        """When slice ``k`` is there: copied after the one before it, once the place of the one before that is free."""
        if k == len(self._arrivals):
            share = self._bounds[k + 1] - self._bounds[k]
            start = max(self._copied, self._used[k - _ROOM]) if k >= _ROOM else self._copied
            self._copied = start + share * self._weights / self._speed
            self._arrivals.append(self._copied + self._latency)
            size = share * self._weights
            self.tracks.add(Span("dma", "weights", start, self._copied, self._copied - start, 0, size))
        return self._arrivals[k]

    def _pass_last(self) -> bool:
        """The next block on the last unit, if it has passed the first and there is room for its results."""
        i, held, unit = self._two, self._held, self._units[1]
        if i == self._one or i - _ROOM >= self._write:
            return False
        free = self._last.get(i - 1, 0.0)
        waits: list[tuple[float, Cause]] = [(free, "compute"), (self._first[i], "compute")]
        if i >= _ROOM:
            waits.append(self._written[i - _ROOM])
        start, cause = max(waits, key=lambda wait: wait[0])
        end = start
        if held.last.cycles:  # what a block waits for there passes as well while it waits for a bus
            work = (held.last.busy + held.last.weights) * self._part
            end += max(min(work, self._cycles[1]), self._cycles[1] - self._late[i])
            self.tracks.wait(unit, cause, start - free)
            self._hold(unit, held.last, end - start, Span(unit, "compute", start, end, held.last.busy * self._part, 1))
        self._last[i] = end
        self._two += 1
        return True

    def _hold(self, unit: Unit, stage: Stage, cycles: float, span: Span) -> None:
        """A block that a unit holds for ``cycles``, with what it waits for in them."""
        rest = cycles - span.busy
        weights = min(rest, stage.weights * self._part)
        moving = min(rest - weights, stage.moving * self._part)
        self.tracks.wait(unit, "weights", weights)
        self.tracks.wait(unit, self._held.memory, moving)
        self.tracks.wait(unit, "compute", rest - weights - moving)
        self.tracks.add(span)

    # -- states that come again ----------------------------------------------------------------------------------------

    def _leap(self, seen: _Seen) -> None:
        """If all is as some blocks before, only later, repeat what happened since, up to the next slice of weights."""
        k = len(self._used)
        last = k == len(self._bounds) - 2
        until = self._count if last else int(self._bounds[k + 1] * self._count) - 1
        if until - self._read < 2 * _ROOM:
            return
        now = self._written[self._write - 1][0]
        state = self._state(now)
        if state not in seen:
            seen[state] = self._write, now, self.tracks.stalls.copy(), dict(self.tracks.sums)
            return
        write, then, stalls, sums = seen.pop(state)
        period = self._write - write
        times = (until - self._read) // period
        if not times:
            return
        self._repeat(times, (now - then) * times, stalls, sums)
        self._shift(times * period, (now - then) * times)

    def _state(self, now: float) -> tuple[float, ...]:
        """Numbers of blocks under way and the times that matter to them, from ``now`` on; what no longer does goes."""
        old = self._write - _ROOM
        for held in (self._granted, self._arrived, self._first, self._late, self._last, self._written):
            for i in [i for i in held if i < old]:
                del held[i]
        times = [
            *self._free.values(), *self._first.values(), *self._last.values(), *(t for t, _ in self._granted.values()),
            *(t for t, _ in self._arrived.values()), *(t for t, _ in self._written.values()),
        ]  # fmt: skip
        ahead = (n - self._write for n in (self._read, self._one, self._two))
        return (
            *ahead,
            len(self._used),
            *(round(late, _DIGITS) for late in self._late.values()),
            *(round(time - now, _DIGITS) for time in times),
        )

    def _repeat(self, times: int, later: float, stalls: dict[tuple[Unit, Cause], float], sums: dict[Unit, Sum]) -> None:
        for key, cycles in self.tracks.stalls.items():
            self.tracks.stalls[key] += times * (cycles - stalls.get(key, 0.0))
        for unit, total in list(self.tracks.sums.items()):
            before, end = sums.get(unit, Sum()), self.tracks.spans[unit][-1].end
            busy, blocks = total.busy - before.busy, total.blocks - before.blocks
            if blocks:
                what = "compute" if unit in self._units else "read and write"
                size = (total.bytes - before.bytes) * times
                self.tracks.add(Span(unit, what, end, end + later, busy * times, blocks * times, size))

    def _shift(self, blocks: int, later: float) -> None:
        self._free = {bus: time + later for bus, time in self._free.items()}
        self._first = {i + blocks: time + later for i, time in self._first.items()}
        self._late = {i + blocks: cycles for i, cycles in self._late.items()}
        self._last = {i + blocks: time + later for i, time in self._last.items()}
        self._granted = {i + blocks: (time + later, bus) for i, (time, bus) in self._granted.items()}
        self._arrived = {i + blocks: (time + later, bus) for i, (time, bus) in self._arrived.items()}
        self._written = {i + blocks: (time + later, bus) for i, (time, bus) in self._written.items()}
        self._read, self._one = self._read + blocks, self._one + blocks
        self._two, self._write = self._two + blocks, self._write + blocks


def _per_block(target: Target, moved: Traffic, count: int) -> dict[tuple[Bus, Way], tuple[float, float]]:
    """Cycles and bytes of a block on each bus: its part of those for which the bus is busy with the whole task."""
    found: dict[tuple[Bus, Way], tuple[float, float]] = {}
    buses: tuple[tuple[Bus, Memory, Mapping[Channel, float]], ...] = (
        ("sram", target.sram, moved.sram),
        ("dram", target.dram, moved.dram),
    )
    for bus, memory, channels in buses:
        total, written = sum(channels.values()), channels.get("write", 0.0)
        cycles = max(bus_cycles(target, memory, channels), moved.banks if bus == "sram" else 0.0)
        ways: tuple[tuple[Way, float], ...] = (("read", total - written), ("write", written))
        for way, size in ways:
            found[bus, way] = (cycles * size / total / count, size / count) if total else (0.0, 0.0)
    return found
