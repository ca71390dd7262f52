"""A Program with all that is known of its work on a target before its maps have places."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from qatlib.compiler.banks import Lay
from qatlib.compiler.blocks import Cut, blocks, cut_array
from qatlib.compiler.cycles import Timing, time
from qatlib.compiler.options import DEFAULTS, CompileOptions
from qatlib.compiler.plays import Plays
from qatlib.compiler.steps import Step
from qatlib.compiler.streams import Stream
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Map, Task, Tasks
from qatlib.ops.work import Size, Work
from qatlib.program import Op, Program


class Timer:
    """Remembers what a target takes for a task, and which blocks: a choice of a plan asks again and again.

    Always of the same target.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], Timing] = {}
        self._losses: dict[int, dict[str, tuple[int, int]]] = {}
        self._blocks: dict[tuple[Work, int], tuple[Size, ...]] = {}
        self._cuts: dict[tuple[Work, Size], Cut] = {}
        self._tasks: dict[int, Task] = {}  # a task that is remembered must keep its id

    def time(
        self,
        task: Task,
        target: Target,
        off: Collection[str],
        staging: bool = True,
        slack: float = 0,
        lay: Lay | None = None,
    ) -> Timing:
        """See :func:`.cycles.time`."""
        self._tasks[id(task)] = task
        away = tuple(at.name in off for at in (task.target, *task.inputs))
        staged = staging and bool(task.weights)
        key = (id(task), away, staged, slack if staged else 0, lay)
        if key not in self._found:
            self._found[key] = time(task, target, off, staging, slack, lay)
        return self._found[key]

    def losses(self, task: Task, target: Target, constants: frozenset[str]) -> dict[str, tuple[int, int]]:
        """Cycles, and bytes from and to the DRAM, that each map of a task costs if it alone is off chip."""
        if id(task) not in self._losses:
            inside, lost = self.time(task, target, constants), {}
            for name in {task.target.name, *(x.name for x in task.inputs)} - constants:
                away = self.time(task, target, constants | {name})
                lost[name] = away.cycles - inside.cycles, away.dram_bytes - inside.dram_bytes
            self._losses[id(task)] = lost
        return self._losses[id(task)]

    def blocks(self, work: Work, target: Target, count: int) -> tuple[Size, ...]:
        """See :func:`.blocks.blocks`."""
        if (work, count) not in self._blocks:
            self._blocks[work, count] = blocks(work, target, count)
        return self._blocks[work, count]

    def cut(self, work: Work, target: Target, block: Size) -> Cut:
        """See :func:`.blocks.cut_array`."""
        if (work, block) not in self._cuts:
            self._cuts[work, block] = cut_array(work, target, block)
        return self._cuts[work, block]


@dataclass(frozen=True)
class Job:
    """A Program as its memory plan sees it: the passes of every step, none for the host's steps, views and constants.

    ``maps`` are the integer values that have a place; those in ``boundary`` enter or leave the accelerator, those in
    ``entering`` enter it. ``target`` is the machine as one of the cores that run sees it.
    """

    program: Program
    steps: tuple[Step, ...]
    passes: tuple[tuple[Task, ...], ...]
    maps: Mapping[str, Map]
    constants: frozenset[str]
    boundary: frozenset[str]
    entering: frozenset[str]
    target: Target
    options: CompileOptions
    timer: Timer = field(default_factory=Timer, compare=False, repr=False)
    plays: Plays = field(default_factory=Plays, compare=False, repr=False)

    @cached_property
    def life(self) -> tuple[dict[str, int], dict[str, int]]:
        """The step that makes each value, in that order, and the last one that needs it.

        -1 is before the first step and the number of steps is after the last.
        """
        start = dict.fromkeys(self.program.inputs, -1) | {step.op.output: i for i, step in enumerate(self.steps)}
        end = dict(start)
        for i, step in enumerate(self.steps):
            end |= dict.fromkeys(step.op.inputs, i)
        return start, end | dict.fromkeys(self.program.outputs, len(self.steps))

    @cached_property
    def shown(self) -> tuple[str | None, ...]:
        """What each step shows in another shape; None if it is no view."""
        views = [step.unit == "npu" and not passes for step, passes in zip(self.steps, self.passes, strict=True)]
        return tuple(
            step.op.inputs[0] if view and step.op.inputs else None for step, view in zip(self.steps, views, strict=True)
        )

    @cached_property
    def overlaid(self) -> tuple[tuple[tuple[str, ...], frozenset[str]], ...]:
        """Inputs of each step in whose place its output can be computed if nothing needs them later, and its others.

        What the step before reads at the same time is none of the former.
        """
        found, before = [], None
        for at, (step, passes) in enumerate(zip(self.steps, self.passes, strict=True)):
            read = self.steps[before].op.inputs if before is not None and self.beside(before, at) else ()
            over, others = self._overlaid(step.op, passes)
            found.append((tuple(x for x in over if x not in read), others))
            before = at if passes else before
        return tuple(found)

    def beside(self, a: int, b: int) -> bool:
        """Whether the target can run both steps at once, if no bytes are in the way (:mod:`.beside`)."""
        unit, one, other = self.target.table_unit, self.passes[a], self.passes[b]
        if unit is None or not unit.beside_vector_unit or len(one) != 1 or len(other) != 1:
            return False
        return {one[0].unit, other[0].unit} == {"table", "vector"}

    def _overlaid(self, op: Op, passes: tuple[Task, ...]) -> tuple[tuple[str, ...], frozenset[str]]:
        if len(passes) != 1 or op.output in self.boundary:
            return (), frozenset()
        overlays = passes[0].work.overlays
        names = [x for x in (op.inputs[i] for i in overlays) if x in self.maps and x not in self.boundary]
        values, width = self.program.values, self.maps[op.output].element_bytes
        shape = values[op.output].shape  # block by block, each element must lie where the operand's lies
        fit = (x for x in names if values[x].shape == shape and self.maps[x].element_bytes == width)
        return tuple(fit), frozenset(x for i, x in enumerate(op.inputs) if i not in overlays)

    @cached_property
    def joining(self) -> frozenset[int]:
        """Steps whose output is their inputs side by side, stored alike: each but the last fills its part exactly."""
        found = set()
        for at, (step, passes) in enumerate(zip(self.steps, self.passes, strict=True)):
            names = step.op.inputs
            if len(passes) != 1 or not passes[0].work.joins or any(x not in self.maps for x in names):
                continue
            parts, whole = [self.maps[x] for x in names], self.maps[step.op.output]
            exact = all(part.stored_bytes == self.program.values[part.name].bytes() for part in parts[:-1])
            if exact and all(part.brick == whole.brick for part in parts):
                found.add(at)
        return frozenset(found)

    @cached_property
    def streams(self) -> dict[str, Stream]:
        """Weights that are stored encoded, by op, in the order of the Program."""
        tasks = {passes[0].op.name: passes[0] for passes in self.passes if passes}
        found = ((op.name, tasks[op.name].stream) for op in self.program if op.name in tasks)
        return {name: stream for name, stream in found if stream is not None}

    @property
    def joins(self) -> frozenset[str]:
        """What the steps in ``joining`` make."""
        return frozenset(self.steps[at].op.output for at in self.joining)

    @cached_property
    def losses(self) -> dict[str, tuple[int, int]]:
        """Cycles, and bytes from and to the DRAM, that each map costs if it alone is off chip."""
        lost: dict[str, tuple[int, int]] = {}
        for task in (task for passes in self.passes for task in passes):
            for name, (more_cycles, more_bytes) in self.timer.losses(task, self.target, self.constants).items():
                cycles, moved = lost.get(name, (0, 0))
                lost[name] = cycles + more_cycles, moved + more_bytes
        return lost


def describe(
    program: Program,
    steps: Sequence[Step],
    target: Target,
    options: CompileOptions = DEFAULTS,
    blocks: Mapping[str, Size] = MappingProxyType({}),
) -> Job:
    """What ``target`` has to do for ``program``; ``blocks`` of outputs by op replace those that it would choose."""
    target = target.share(options.cores)
    fixed = frozenset(op.output for op in program.ops if op.kind == "constant")
    host = [step.op for step in steps if step.unit == "host"]
    entering = {*program.inputs, *(op.output for op in host if op.kind == "quantize")}
    border = {*entering, *program.outputs, *(x for op in host for x in (op.output, *op.inputs))}
    tasks = Tasks(program, target, frozenset(border), blocks)
    views = {step.op.output for step in steps if step.unit == "npu" and tasks.is_view(step.op)}
    idle = {*views, *fixed, *(op.output for op in host)}
    passes = tuple(() if step.op.output in idle else tasks.of(step.op) for step in steps)
    names = [name for name, value in program.values.items() if not value.qtype.is_float and name not in fixed]
    maps = {name: tasks.map(name) for name in names}
    return Job(
        program, tuple(steps), passes, maps, fixed, frozenset(border), frozenset(entering & set(names)), target, options
    )
