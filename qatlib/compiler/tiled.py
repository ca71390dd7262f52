"""Running the steps of a compiled Program box by box, from and to the bytes of the machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatlib.compiler.job import Job
from qatlib.compiler.layout import Chain, Layout, Slice
from qatlib.compiler.machine import Machine
from qatlib.compiler.streams import damaged
from qatlib.compiler.tiles import ROWS
from qatlib.emulator import Emulator
from qatlib.errors import CompileError, QatError
from qatlib.integer import exact_kernels, pad
from qatlib.ops.region import Box, Need, Part
from qatlib.program import Op, Value


class Runner:
    """Runs a batch: :meth:`put` the inputs, :meth:`run`, :meth:`get` the outputs.

    The host's float values and the constants are held whole, beside the machine.
    """

    def __init__(self, job: Job, layout: Layout, emulator: Emulator, machine: Machine) -> None:
        self._job, self._layout, self._emulator, self._machine = job, layout, emulator, machine
        self._values = job.program.values
        self._elsewhere: dict[str, Tensor] = {}

    def run(self) -> None:
        """All steps in order. Raises CompileError (QAT189) as :class:`.machine.Machine` does."""
        layout, chained = self._layout, self._layout.chained
        early: dict[int, list[Slice]] = {}
        for first, *_ in layout.slices.values():
            early.setdefault(max(0, first.before), []).append(first)
        with exact_kernels():
            for at, (step, tiling) in enumerate(zip(self._job.steps, layout.tilings, strict=True)):
                for piece in early.get(at, ()):
                    self._load(piece)
                if at in layout.chains:
                    self._chain(layout.chains[at])
                elif at in chained or step.op.output in layout.shown:
                    continue
                elif at in layout.slices:
                    self._sliced(layout.slices[at])
                elif tiling is None or tiling.regions is None:
                    self._whole(step.op)
                else:
                    for box, part in tiling.parts:
                        self._box(step.op, box, part)

    def put(self, name: str, carrier: Tensor, box: Box | None = None) -> None:
        if self._values[name].qtype.is_float or name in self._job.constants:
            self._elsewhere[name] = carrier
        else:
            self._machine.write(name, carrier, box)

    def get(self, name: str) -> Tensor:
        if name in self._elsewhere:
            return self._elsewhere[name]
        return self._emulator.widen(name, self._machine.read(name))

    def _whole(self, op: Op) -> None:
        """An op that is not cut."""
        self.put(op.output, self._emulator.compute(op, *(self.get(name) for name in op.inputs)))

    def _load(self, piece: Slice) -> None:
        """The weights of a slice into the SRAM."""
        self._machine.stage(piece.op.name, piece.offset, piece.stored(self._emulator.program))

    def _sliced(self, pieces: Sequence[Slice]) -> None:
        """An op box by box from staged weights, of which the first slice is loaded.

        What is decoded of them has to be what the kernels were made with; it is decoded once, as long as the bytes stay
        as they were.
        """
        program = self._emulator.program
        for number, piece in enumerate(pieces):
            if number:
                self._load(piece)
            op, stored = piece.op.name, piece.stored(program)
            if piece.stream is not None:
                found = self._machine.staged(op, piece.offset, 0, stored)
                weight = piece.stream.decode(found, piece.start, piece.stop, op)
                if not torch.equal(weight, piece.weight(program)):
                    raise damaged(op, f"channels {piece.start} to {piece.stop} are not those of the Program")
            for box, part in piece.parts:
                low, high = piece.span(program, *box[piece.axis])
                self._machine.staged(op, piece.offset, low, stored[low:high])
                self._box(piece.op, box, part)

    def _chain(self, chain: Chain) -> None:
        """Ops row by row, the last one first: each makes the one before run as far ahead as its rows have room."""
        made = [0] * len(chain.tilings)

        def make(at: int, until: int) -> None:
            tiling = chain.tilings[at]
            phase = 1 if tiling.regions is None else tiling.regions.phases[0]
            while made[at] < until:
                start = made[at]
                stop = min(until, start + ROWS * phase)
                boxes = tiling.strip(start, stop)
                if at:
                    before = chain.tilings[at - 1]
                    spans = [part.needs[0].box[2] for _, part in boxes if part.needs[0] is not None]
                    first = max(0, min(low for low, _ in spans))
                    last = max(high for _, high in spans)
                    make(at - 1, min(before.sizes[2], max(last, first + self._layout.rolling[before.op.output].rows)))
                for box, part in boxes:
                    self._box(tiling.op, box, part)
                made[at] = stop

        make(len(chain.tilings) - 1, chain.tilings[-1].sizes[2])

    def _box(self, op: Op, box: Box, part: Part) -> None:
        needs = zip(op.inputs, part.needs, strict=True)
        read = [self._fetch(name, need) for name, need in needs if need is not None]
        try:
            result = self._emulator.kernel(op, part)(*read)
        except (QatError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # what torch says of inputs that are too small
            raise _misstated(op, box, f"nothing ({next(iter(str(error).splitlines()), '')})") from error
        if not _is(self._values[op.output], box, result.shape):
            raise _misstated(op, box, f"{list(result.shape)} elements")
        self.put(op.output, result, box)

    def _fetch(self, name: str, need: Need) -> Tensor:
        """A carrier of what a box needs of an input, with its padding."""
        value, inside, sides = self._values[name], need.box, None
        if not all(start >= 0 and stop <= size for size, (start, stop) in zip(value.sizes(), need.box, strict=True)):
            inside, sides = _clipped(need.box, value.sizes())
        if name in self._elsewhere:
            found = self._elsewhere[name][_index(value, inside)]
        else:
            found = self._emulator.widen(name, self._machine.read(name, inside))
        return found if sides is None else pad(found, sides, need.fill)


def _misstated(op: Op, box: Box, seen: str) -> CompileError:
    fix = f"Correct what {op.kind!r} states of its regions (qatlib/ops)"
    return CompileError("QAT189", op.name, f"gets {seen} for the box {[list(span) for span in box]}", fix)


def _clipped(box: Box, sizes: Sequence[int]) -> tuple[Box, Box]:
    """What of ``box`` lies within ``sizes``, and how much is missing before and behind it."""
    inside, sides = [], []
    for size, (start, stop) in zip(sizes, box, strict=True):
        low = min(max(start, 0), size)
        high = max(low, min(stop, size))
        inside.append((low, high))
        before = min(max(0, low - start), stop - start)
        sides.append((before, stop - start - before - (high - low)))
    return tuple(inside), tuple(sides)


def _index(value: Value, box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """``box`` of a tensor; the axis of the batch whole."""
    return tuple(slice(None) if size < 0 else slice(*span) for size, span in zip(value.shape, box, strict=True))


def _is(value: Value, box: Box, shape: Sequence[int]) -> bool:
    return len(shape) == len(box) and all(
        size < 0 or stop - start == got for size, (start, stop), got in zip(value.shape, box, shape, strict=True)
    )
