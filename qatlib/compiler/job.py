"""A Program with all that is known of its work on a target before its maps have places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qatlib.compiler.steps import Step
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Map, Task, Tasks
from qatlib.program import Program


@dataclass(frozen=True)
class Job:
    """A Program as its memory plan sees it: the passes of every step, none for the host's steps, views and constants.

    ``maps`` are the integer values that have a place; those in ``boundary`` enter or leave the accelerator.
    """

    program: Program
    steps: tuple[Step, ...]
    passes: tuple[tuple[Task, ...], ...]
    maps: Mapping[str, Map]
    constants: frozenset[str]
    boundary: frozenset[str]
    target: Target


def describe(program: Program, steps: Sequence[Step], target: Target) -> Job:
    """What ``target`` has to do for ``program``."""
    fixed = frozenset(op.output for op in program.ops if op.kind == "constant")
    host = [step.op for step in steps if step.unit == "host"]
    border = {*program.inputs, *program.outputs, *(op.output for op in host), *(x for op in host for x in op.inputs)}
    tasks = Tasks(program, target, frozenset(border))
    views = {step.op.output for step in steps if step.unit == "npu" and tasks.is_view(step.op)}
    idle = {*views, *fixed, *(op.output for op in host)}
    passes = tuple(() if step.op.output in idle else tasks.of(step.op) for step in steps)
    names = [name for name, value in program.values.items() if not value.qtype.is_float and name not in fixed]
    return Job(program, tuple(steps), passes, {n: tasks.map(n) for n in names}, fixed, frozenset(border), target)
