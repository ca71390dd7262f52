"""Tasks in time, each played once; on which units of a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

from qatlib.compiler.banks import Lay
from qatlib.compiler.cycles import Slices, Stage, Stages, slices, stages
from qatlib.compiler.simulate import Pipeline
from qatlib.compiler.spans import UNITS, Unit
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Task
from qatlib.compiler.traffic import Traffic, move

_TOGETHER = 512
"""Blocks of a task that are played one by one beside another; of more, several are taken as one."""


def units_of(target: Target) -> tuple[Unit, ...]:
    """The units that ``target`` has."""
    own = {"table": target.table_unit, "resize": target.resize_unit, "warp": target.warp_unit}
    return tuple(unit for unit in UNITS if own.get(unit, target) is not None)


class Plays:
    """Remembers tasks that were played: who chooses a plan asks again and again; always of the same target."""

    def __init__(self) -> None:
        self._moved: dict[tuple[object, ...], Traffic] = {}
        self._found: dict[tuple[object, ...], Pipeline] = {}
        self._pairs: dict[tuple[object, ...], tuple[Pipeline, Pipeline]] = {}
        self._tasks: dict[int, Task] = {}  # a task that is remembered must keep its id

    def play(
        self,
        task: Task,
        target: Target,
        off: Collection[str],
        staging: bool,
        slack: float,
        late: Callable[[float], float],
        lay: Lay | None = None,
    ) -> tuple[Pipeline, Traffic]:
        """``task`` with its core at cycle 0, and what it moves; see :func:`.traffic.move`.

        ``late`` says at which cycle so many bytes of weights, its first slice, are there.
        """
        self._tasks[id(task)] = task
        staging = staging and bool(task.weights)
        key = (id(task), *(at.name in off for at in (task.target, *task.inputs)), staging, slack if staging else 0, lay)
        if key not in self._moved:
            self._moved[key] = move(task, target, off, staging, slack, lay)
        moved = self._moved[key]
        arrival = late(moved.early) if moved.staged else 0.0
        key = (*key, round(arrival, 6))
        if key not in self._found:
            held = stages(task, target, moved, off)
            cut = slices(task, target, moved, held.core, slack)
            self._found[key] = Pipeline((task.unit, "vector"), target, moved, held, cut, arrival)
            self._found[key].run()
        return self._found[key], moved

    def pair(
        self, tasks: tuple[Task, Task], target: Target, off: Collection[str], lays: tuple[Lay | None, Lay | None]
    ) -> tuple[Pipeline, Pipeline]:
        """Two tasks of different units, without weights, whose cores start at cycle 0 and which share the buses."""
        self._tasks |= {id(task): task for task in tasks}
        away = (tuple(at.name in off for at in (task.target, *task.inputs)) for task in tasks)
        key = (*map(id, tasks), *away, *lays)
        if key not in self._pairs:
            one, other = (_alone(task, target, off, lay) for task, lay in zip(tasks, lays, strict=True))
            play_together(one, other)
            self._pairs[key] = one, other
        return self._pairs[key]


def _alone(task: Task, target: Target, off: Collection[str], lay: Lay | None) -> Pipeline:
    moved = move(task, target, off, staging=False, slack=0, lay=lay)
    held = several_as_one(stages(task, target, moved, off))
    return Pipeline((task.unit, "vector"), target, moved, held, Slices(held.core, held.core), 0.0)


def play_together(one: Pipeline, other: Pipeline) -> None:
    """Play two tasks that start at once and share the buses; who asks first is served first, ``one`` if both do."""
    one.share(other)
    left = [one, other]
    while left:
        min(left, key=lambda task: task.asks()).advance()
        left = [task for task in left if not task.done]


def several_as_one(held: Stages) -> Stages:
    """The same work in as few blocks as are played one by one: two tasks side by side seldom repeat a state."""
    n = math.ceil(held.blocks / _TOGETHER)
    if n <= 1:
        return held
    first, last = (Stage(s.cycles * n, s.busy * n, s.weights * n, s.moving * n) for s in (held.first, held.last))
    return replace(held, blocks=held.blocks / n, first=first, last=last)
