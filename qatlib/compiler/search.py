"""O3: from the plan of O2, a search for a better one. It never returns a worse one.

A step changes one thing and plans again: the block of an op, its place in the order, whether its weights are staged,
whether a map passes row by row, leaves the SRAM or comes before others. What is no worse is kept and the next step
starts from there. How many steps there are depends on the Program alone and which they are on the seed, so equal
Programs get equal plans; a time limit only ends the search between two steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from time import monotonic

from qatlib.compiler.choose import Choice, Search, make
from qatlib.compiler.job import Job
from qatlib.compiler.options import Objective
from qatlib.compiler.placement import streams
from qatlib.ops.work import Size

_STEPS_OF_AN_OP, _LEAST_STEPS, _PLANNED_OPS = 10, 40, 20_000
"""Steps for each op of a small Program; for a large one at least; in between steps times ops, as a step takes the
longer the more there are."""
_BLOCKS = 12
"""Blocks of an op that are tried."""


def improve(start: Choice, objective: Objective) -> Choice:
    """The best plan found from ``start``; ``search`` says how many steps it took, those of ``start`` included."""
    options, ops = start.job.options, len(start.job.steps)
    end, draw = monotonic() + options.time_limit_s, random.Random(options.seed)
    count = max(_LEAST_STEPS, min(_STEPS_OF_AN_OP * ops, _PLANNED_OPS // max(1, ops)))
    best, steps, kept, cut = start, start.search.steps, start.search.kept, start.search.cut
    moves: Iterator[_Move] = chain((partial(_fastest_block, at=at) for at in range(ops)), repeat(_any_move, count))
    for move in moves:
        made = move(best, draw)
        steps += 1
        if made is not None and made.allowed and made.cost(objective) <= best.cost(objective):
            kept += made.cost(objective) < best.cost(objective)
            best = made
        if monotonic() >= end:
            cut = True
            break
    return replace(best, search=Search(steps=steps, kept=kept, cut=cut))


_Move = Callable[[Choice, random.Random], Choice | None]
"""A neighbour of a plan, None if chance hit upon none."""


def _any_move(choice: Choice, draw: random.Random) -> Choice | None:
    moves = _moves(choice)
    return draw.choice(moves)(choice, draw) if moves else None


def _moves(choice: Choice) -> list[_Move]:
    """Ways to change a plan.

    Where all maps are in the SRAM, only blocks are worth a change, and the order if tables run beside other ops.
    """
    moves: list[_Move] = [_other_block] if _array_steps(choice.job) else []
    unit = choice.job.target.table_unit
    if unit and unit.beside_vector_unit and any(row[0].unit == "table" for row in choice.job.passes if row):
        moves.append(_other_order)
    if choice.draft.off_chip or choice.draft.rows:
        moves += [_other_order, _other_staging, _other_rows, _other_maps]
    return moves


def _array_steps(job: Job) -> list[int]:
    return [at for at, passes in enumerate(job.passes) if passes and passes[0].engine == "array"]


def _fastest_block(choice: Choice, _: random.Random, at: int) -> Choice | None:
    """With the block with which step ``at`` is fastest where its maps and weights are."""
    job, passes = choice.job, choice.job.passes[at]
    if not passes or passes[0].engine != "array":
        return None
    off, staging = choice.draft.off_chip | job.constants, passes[0].op.name in choice.draft.staged

    def cycles(block: Size | None) -> int:
        task = passes[0] if block is None else replace(passes[0], cut=job.timer.cut(passes[0].work, job.target, block))
        return job.timer.time(task, job.target, off, staging).cycles

    block = min((None, *job.timer.blocks(passes[0].work, job.target, _BLOCKS)), key=cycles)
    return None if block is None else _with_block(choice, at, block)


def _with_block(choice: Choice, at: int, block: Size) -> Choice:
    job, (first, *later) = choice.job, choice.job.passes[at]
    cut = job.timer.cut(first.work, job.target, block)
    passes = (*job.passes[:at], (replace(first, cut=cut), *later), *job.passes[at + 1 :])
    return make(replace(job, passes=passes), choice.policy, {**choice.blocks, first.op.name: block})


def _other_block(choice: Choice, draw: random.Random) -> Choice | None:
    at = draw.choice(_array_steps(choice.job))
    job = choice.job
    others = job.timer.blocks(job.passes[at][0].work, job.target, _BLOCKS)
    return _with_block(choice, at, draw.choice(others)) if others else None


def _other_order(choice: Choice, draw: random.Random) -> Choice | None:
    """One op at another time, after all that it reads is there and before what it makes is read."""
    job = choice.job
    movable = [at for at, step in enumerate(job.steps) if step.unit == "npu"]
    at = draw.choice(movable)
    op = job.steps[at].op
    made = {step.op.output: i for i, step in enumerate(job.steps)}
    first = max((made[name] + 1 for name in op.inputs if name in made), default=0)
    last = min((i for i, step in enumerate(job.steps) if op.output in step.op.inputs), default=len(job.steps)) - 1
    to = draw.choice([i for i in movable if first <= i <= last])
    order = [i for i in range(len(job.steps)) if i != at]
    order.insert(to, at)
    steps, passes = tuple(job.steps[i] for i in order), tuple(job.passes[i] for i in order)
    return make(replace(job, steps=steps, passes=passes), choice.policy, choice.blocks) if to != at else None


def _other_staging(choice: Choice, draw: random.Random) -> Choice | None:
    names = [passes[0].op.name for passes in choice.job.passes if passes and passes[0].weights]
    if not names:
        return None
    policy = choice.policy
    return make(choice.job, replace(policy, unstaged=policy.unstaged ^ {draw.choice(names)}), choice.blocks)


def _other_rows(choice: Choice, draw: random.Random) -> Choice | None:
    """A map that passed row by row as a whole, or the other way round."""
    job, policy = choice.job, choice.policy
    names = [steps.op.inputs[0] for steps, passes in zip(job.steps, job.passes, strict=True) if streams(passes)]
    if not names:
        return None
    name = draw.choice(names)
    if name in choice.draft.rows:
        policy = replace(policy, whole=policy.whole | {name}, streamed=policy.streamed - {name})
    else:
        policy = replace(policy, whole=policy.whole - {name}, streamed=policy.streamed | {name})
    return make(job, policy, choice.blocks)


def _other_maps(choice: Choice, draw: random.Random) -> Choice | None:
    """A map of the SRAM goes, or one that found no room comes first."""
    policy = choice.policy
    names = sorted({buffer.name for buffer in choice.draft.buffers} - choice.job.entering)
    if not names:
        return None
    name = draw.choice(names)
    if name in choice.draft.off_chip:
        policy = replace(policy, evicted=policy.evicted - {name}, favoured=policy.favoured | {name})
    else:
        policy = replace(policy, evicted=policy.evicted | {name}, favoured=policy.favoured - {name})
    return make(choice.job, policy, choice.blocks)
