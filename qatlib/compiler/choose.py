"""Which plan a Program gets: the best, by the objective, of those that its level of ``opt`` may make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict

from qatlib.compiler.job import Job, describe
from qatlib.compiler.memory import Draft, MemoryPlan, draft, time_plan
from qatlib.compiler.options import LEVELS, CompileOptions, Objective, check_options
from qatlib.compiler.placement import GREEDY, Policy
from qatlib.compiler.steps import order_steps
from qatlib.compiler.target import Target
from qatlib.compiler.timeline import latency
from qatlib.errors import CompileError
from qatlib.ops.work import Size
from qatlib.program import Program

_POLICIES = (
    Policy(maps=False, staging=False, cascades=False),
    Policy(staging=False, cascades=False),
    GREEDY,
)
"""Of O0, O1 and O2."""
_PLANNED_OPS = 4000
"""Plans times ops, as a plan takes the longer the more ops there are."""


class Search(BaseModel):
    """What a search did: ``steps`` it took, how many it ``kept``, whether the time limit ``cut`` it short."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = 0
    kept: int = 0
    cut: bool = False


NO_SEARCH = Search()


@dataclass(frozen=True)
class Choice:
    """A plan with what led to it; ``blocks`` of outputs by op are those that are not the op's own choice."""

    job: Job
    policy: Policy
    draft: Draft
    cycles: int
    dram_bytes: int
    blocks: Mapping[str, Size] = field(default_factory=dict)
    search: Search = NO_SEARCH

    @property
    def memory(self) -> MemoryPlan:
        return self.draft.plan

    def cost(self, objective: Objective) -> tuple[float, float]:
        """The smaller the better.

        "balance": the product of both, in which a percent fewer cycles is worth a percent fewer bytes.
        """
        if objective == "latency":
            return self.cycles, self.dram_bytes
        if objective == "bandwidth":
            return self.dram_bytes, self.cycles
        return float(1 + self.cycles) * (1 + self.dram_bytes), self.cycles

    @property
    def allowed(self) -> bool:
        """Whether inputs are where the options say that they are."""
        return self.job.options.input_source != "sram" or not self.job.entering & self.draft.off_chip


def make(job: Job, policy: Policy, blocks: Mapping[str, Size] | None = None) -> Choice:
    """The plan of one policy."""
    found = draft(job, policy)
    cycles, dram_bytes = totals(job, found)
    return Choice(job, policy, found, cycles, dram_bytes, blocks or {})


def totals(job: Job, memory: MemoryPlan | Draft) -> tuple[int, int]:
    """Cycles of the simulation, and bytes from and to the DRAM, of one inference."""
    rows = time_plan(job, memory)
    moved = sum(timing.dram_bytes for row in rows for timing in row)
    return latency(job, memory, rows, job.plays), moved


def choose(program: Program, target: Target, options: CompileOptions) -> Choice:
    """The plan of ``program``; CompileError (QAT250) if ``target`` cannot do what ``options`` ask.

    A level may also make the plans of the levels below it, an objective other than latency those of latency: so no
    level is worse than the one below it in the objective, and no other objective makes more traffic than it need.
    """
    check_options(options, target)
    job = describe(program, order_steps(program), target, options)
    if options.opt != "O3":
        return _best(job, options.objective)
    from qatlib.compiler.search import improve

    found = improve(_best(job, "latency"), "latency")
    if options.objective != "latency":
        other = min(_best(job, options.objective), found, key=lambda one: one.cost(options.objective))
        found = improve(replace(other, search=found.search), options.objective)
    return found


def _best(job: Job, objective: Objective) -> Choice:
    """Of equal plans that of the highest level."""
    level = min(LEVELS.index(job.options.opt), len(_POLICIES) - 1)
    policies = list(reversed(_POLICIES[: level + 1]))
    if objective != "latency":
        policies += [replace(policy, saves="bytes") for policy in policies]
    if job.target.sram.bank_bytes is not None:
        policies += [replace(policy, spread=True) for policy in policies]
    if job.joining:
        policies += [replace(policy, joins=False) for policy in policies]
    found = [choice for policy in policies if (choice := make(job, policy)).allowed]
    if not found:
        names = sorted(job.entering)
        size = sum(job.maps[name].stored_bytes for name in names)
        seen = f"is sram, but {', '.join(names)} of {size} bytes do not stay in the {job.target.sram.bytes} of the SRAM"
        raise CompileError("QAT250", "options.input_source", seen, "Use ddr or auto, or smaller inputs")
    best = min(found, key=lambda one: one.cost(objective))
    if best is not found[0]:  # some of what the level adds cost more than it saved
        best = min(_without_costly_staging(found[0], objective), best, key=lambda one: one.cost(objective))
    return best


def _without_costly_staging(choice: Choice, objective: Objective) -> Choice:
    """Weights stay off chip where staging them makes the plan worse; of many ops only the first are asked."""
    steps = choice.job.steps
    names = [step.op.name for step in steps if step.op.name in choice.draft.staged]
    for name in names[: _PLANNED_OPS // max(1, len(steps))]:
        policy = replace(choice.policy, unstaged=choice.policy.unstaged | {name})
        choice = min(choice, make(choice.job, policy), key=lambda one: one.cost(objective))
    return choice
