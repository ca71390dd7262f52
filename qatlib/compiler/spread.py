"""Places in the SRAM that leave what a step uses to different banks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from qatlib.compiler.job import Job
from qatlib.compiler.lifetimes import Buffer


class Spread:
    """Chooses where ``buffers`` of an SRAM lie whose banks have ranges of addresses; those without values are weights
    that the last of their steps stages.
    """

    def __init__(self, job: Job, buffers: Sequence[Buffer]) -> None:
        bank = job.target.sram.bank_bytes
        assert bank is not None, "only of banks with addresses of their own"
        self._bank, self._capacity = bank, job.target.sram.bytes
        home = {value: buffer.name for buffer in buffers for value in buffer.values}
        self._near: dict[str, set[str]] = defaultdict(set)
        for at, (step, passes) in enumerate(zip(job.steps, job.passes, strict=True)):
            names = {home[x] for x in (*step.op.inputs, step.op.output) if x in home and passes}
            names |= {buffer.name for buffer in buffers if not buffer.values and buffer.end == at}
            for name in names:
                self._near[name] |= names

    def offset(
        self, buffer: Buffer, placed: Sequence[tuple[int, Buffer]], taken: Sequence[tuple[int, int]]
    ) -> int | None:
        """Where the fewest buffers that are used with this one share a bank with it; of equal places the one in the
        smallest gap, then the lowest. None if no gap between ``taken``, bytes in order, holds it.
        """
        others = [(low, low + one.size) for low, one in placed if one.name in self._near[buffer.name]]
        found: list[tuple[int, int, int]] = []
        top = 0
        for low, high in [*taken, (self._capacity, self._capacity)]:
            last = low - buffer.size
            if last >= top:
                first = (top // self._bank + 1) * self._bank
                for at in (top, *range(first, last + 1, self._bank)):
                    shared = sum(self._meet((at, at + buffer.size), other) for other in others)
                    found.append((shared, low - top, at))
            top = max(top, high)
        return min(found)[2] if found else None

    def _meet(self, a: tuple[int, int], b: tuple[int, int]) -> bool:
        """Whether bytes from the first to before the second are in a bank of others."""
        return a[0] // self._bank <= (b[1] - 1) // self._bank and b[0] // self._bank <= (a[1] - 1) // self._bank
