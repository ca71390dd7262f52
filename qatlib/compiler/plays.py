"""Tasks in time, each played once; on which units of a target."""

from __future__ import annotations

from collections.abc import Callable, Collection

from qatlib.compiler.cycles import slices, stages
from qatlib.compiler.simulate import Pipeline
from qatlib.compiler.spans import UNITS, Unit
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Task
from qatlib.compiler.traffic import Traffic, move


def units_of(target: Target) -> tuple[Unit, ...]:
    """The units that ``target`` has."""
    absent = {"resize": target.resize_unit is None, "warp": target.warp_unit is None}
    return tuple(unit for unit in UNITS if not absent.get(unit))


def path_of(task: Task, target: Target) -> tuple[Unit, Unit]:
    """Where a pass is computed, and what follows."""
    if task.engine == "array":
        return "array", "vector"
    own: dict[str, Unit] = {"resize": "resize", "warp": "warp"}
    unit = own.get(task.work.form, "vector")
    return (unit if unit in units_of(target) else "vector"), "vector"


class Plays:
    """Remembers tasks that were played: who chooses a plan asks again and again; always of the same target."""

    def __init__(self) -> None:
        self._moved: dict[tuple[object, ...], Traffic] = {}
        self._found: dict[tuple[object, ...], Pipeline] = {}
        self._tasks: dict[int, Task] = {}  # a task that is remembered must keep its id

    def play(
        self,
        task: Task,
        target: Target,
        off: Collection[str],
        staging: bool,
        slack: float,
        late: Callable[[float], float],
    ) -> tuple[Pipeline, Traffic]:
        """``task`` with its core at cycle 0, and what it moves; see :func:`.traffic.move`.

        ``late`` says at which cycle so many bytes of weights, its first slice, are there.
        """
        self._tasks[id(task)] = task
        staging = staging and bool(task.weights)
        key = (id(task), *(at.name in off for at in (task.target, *task.inputs)), staging, slack if staging else 0)
        if key not in self._moved:
            self._moved[key] = move(task, target, off, staging, slack)
        moved = self._moved[key]
        arrival = late(moved.early) if moved.staged else 0.0
        key = (*key, round(arrival, 6))
        if key not in self._found:
            held = stages(task, target, moved, off)
            cut = slices(task, target, moved, held.core, slack)
            self._found[key] = Pipeline(path_of(task, target), target, moved, held, cut, arrival)
            self._found[key].run()
        return self._found[key], moved
