"""Compiling a Program for a target, and running the result from its own planned memory.

``compile_model`` = legalize → choose (order, memory plan) → estimate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from qatlib.atomic import Contents, atomic_folder, write_json
from qatlib.compiler.choose import NO_SEARCH, Search, choose
from qatlib.compiler.image import Record, pack_image, read_image
from qatlib.compiler.job import Job, describe
from qatlib.compiler.layout import Layout, layout
from qatlib.compiler.legalize import Violation, check_model
from qatlib.compiler.machine import Machine
from qatlib.compiler.memory import MemoryPlan, misfit
from qatlib.compiler.options import DEFAULTS, CompileOptions, parse_options
from qatlib.compiler.perf import Performance, estimate
from qatlib.compiler.steps import Step, Unit, order_steps
from qatlib.compiler.streams import Stream, decoded, encoded_only
from qatlib.compiler.target import Target, load_target
from qatlib.compiler.tiled import Runner
from qatlib.compiler.tiles import check_blocks
from qatlib.emulator import Emulator
from qatlib.errors import CompileError, ProgramError
from qatlib.ops.work import Size
from qatlib.program import Program, Value

SCHEMA: Literal[4] = 4
IMAGE = "weights.bin"
CONTENTS = Contents(("executable.json", "refused.json"), ("program", IMAGE, "performance.json"))
"""``refused.json`` is what the pipeline writes in the place of an Executable that the target refuses."""
_ARENA_BYTES = 1 << 25
"""Memory of the simulated arenas; larger batches run in parts."""


@dataclass(frozen=True)
class Executable:
    """A Program placed on a target: execution order, memory plan, estimate.

    ``blocks`` of outputs by op are those that a search chose, ``search`` says how it went. ``streams`` are the encoded
    weights by op, from which a run decodes what it computes with; none if the target does not compress.
    """

    program: Program
    target: Target
    steps: tuple[Step, ...]
    memory: MemoryPlan
    performance: Performance
    options: CompileOptions = DEFAULTS
    blocks: Mapping[str, Size] = field(default_factory=dict)
    search: Search = NO_SEARCH
    streams: Mapping[str, Stream] = field(default_factory=dict)

    @cached_property
    def job(self) -> Job:
        """The work of every step, as the plan and the estimate see it, with the weights that are stored."""
        return describe(decoded(self.program, self.streams), self.steps, self.target, self.options, self.blocks)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs for a batch, computed block by block out of the planned SRAM and DRAM (:class:`.machine.Machine`).

        Inputs and outputs are those of :func:`qatlib.emulator.emulate`, with which every element agrees. Raises
        CompileError (QAT189) where the plan lets an op read bytes that are not its input's.
        """
        program = self.program
        carriers = self._emulator.accept(*inputs)
        batch = max((_batch(program.values[name], x) for name, x in carriers.items()), default=0)
        if batch == 0:
            raise ProgramError("QAT180", "inputs", "hold no sample", "Give at least one")
        planned = sum(use.peak_bytes for use in (self.memory.sram, self.memory.dram))
        boundary = [program.values[name] for name in (*program.inputs, *program.outputs)]
        whole = any(_batch_axis(value)[1] > 1 for value in boundary)  # there samples need not lie one after the other
        step = batch if whole else max(1, _ARENA_BYTES // max(1, planned))
        parts = [self._part(carriers, start, min(step, batch - start)) for start in range(0, batch, step)]
        return tuple(
            torch.cat([part[k] for part in parts], _batch_axis(program.values[name])[0])
            for k, name in enumerate(program.outputs)
        )

    @cached_property
    def _emulator(self) -> Emulator:
        """What computes the ops of every run."""
        return Emulator(self.job.program)

    @cached_property
    def _layout(self) -> Layout:
        return layout(self.job, self.memory, self.streams)

    def _part(self, carriers: Mapping[str, Tensor], start: int, count: int) -> tuple[Tensor, ...]:
        machine = Machine(self.program, self.memory, count, self._layout.rolling, self._layout.shown)
        runner = Runner(self.job, self._layout, self._emulator, machine)
        for name, carrier in carriers.items():
            axis, times = _batch_axis(self.program.values[name])
            runner.put(name, carrier.narrow(axis, start * times, count * times))
        runner.run()
        return tuple(self._emulator.narrow(name, runner.get(name)) for name in self.program.outputs)

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``program/``, ``executable.json`` and, for readers, ``performance.json``; all of it or nothing.

        Encoded weights are in ``weights.bin`` and not in ``program/``. Raises OutputError as :meth:`Program.save` does;
        an Executable that is there is replaced.
        """
        image = pack_image(self.program, self.streams, self.target.sram.alignment)
        document = _Document(
            schema_version=SCHEMA,
            target=self.target,
            options=self.options,
            steps=[_StepRecord(op=step.op.name, unit=step.unit) for step in self.steps],
            blocks=dict(sorted(self.blocks.items())),
            search=self.search,
            memory=self.memory,
            weights=list(image.records),
            weights_sha256=image.sha256,
        )
        with atomic_folder(folder, CONTENTS) as inside:
            self.program.save(inside / "program", without=encoded_only(self.program, self.streams))
            if self.streams:
                (inside / IMAGE).write_bytes(image.data)
            write_json(inside / "executable.json", document.model_dump(mode="json"), "weights")
            self.performance.write_json(inside / "performance.json")

    @staticmethod
    def load(folder: str | Path) -> Executable:
        """Read what :meth:`save` wrote.

        Raises ProgramError for a Program that is damaged and CompileError for the rest (QAT189; QAT251 for stored
        weights). The estimate is made again from the plan that was saved.
        """
        folder = Path(folder)
        path = folder / "executable.json"
        again = "Compile the Program again"
        try:
            content = json.loads(path.read_text())
            version = content.get("schema_version") if isinstance(content, dict) else None
            if isinstance(version, int) and version != SCHEMA:
                raise CompileError("QAT189", str(path), f"is of schema {version}; {SCHEMA} is read here", again)
            document = _Document.model_validate(content)
        except OSError as error:
            raise CompileError("QAT189", str(path), f"cannot be read ({error.strerror})", again) from None
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"])
            raise CompileError("QAT189", str(path), f"{at}: {first['msg']}", again) from None
        except CompileError:
            raise
        except (ValueError, RecursionError) as error:
            raise CompileError("QAT189", str(path), f"is not JSON ({error})", again) from None
        streams, weights = read_image(folder / IMAGE, document.weights, document.weights_sha256)
        program = Program.load(folder / "program", weights)
        steps = {step.op.name: step for step in order_steps(program)}
        if sorted((r.op, r.unit) for r in document.steps) != sorted((s.op.name, s.unit) for s in steps.values()):
            raise CompileError("QAT189", str(path), "names other ops than its Program", again)
        if strange := sorted(set(document.blocks) - set(steps)):
            raise CompileError("QAT189", str(path), f"has a block for {strange[0]!r}, which is no op", again)
        ordered = tuple(steps[record.op] for record in document.steps)
        broken = misfit(document.memory, program, ordered, document.target)
        if broken:
            raise CompileError("QAT189", str(path), broken, again)
        try:
            job = describe(program, ordered, document.target, document.options, document.blocks)
        except ValueError as error:
            raise CompileError("QAT189", str(path), f"has a block that its target cannot: {error}", again) from None
        image = pack_image(program, job.streams, document.target.sram.alignment)
        if tuple(document.weights) != image.records or job.streams != streams:
            raise CompileError("QAT251", str(folder / IMAGE), "has other weights than its Program", again)
        return assemble(document.target, job, document.memory, document.blocks, document.search)


class _StepRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    op: str
    unit: Unit


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[4]
    target: Target
    options: CompileOptions
    steps: list[_StepRecord]
    blocks: dict[str, Annotated[Size, Field(strict=False)]]
    search: Search
    memory: MemoryPlan
    weights: list[Record]
    weights_sha256: str


def compile_model(
    program: Program, target: Target | str | Path, options: CompileOptions | Mapping[str, Any] | None = None
) -> Executable:
    """Place ``program`` on ``target`` (a Target, a shipped name or the path of a YAML file).

    Raises CompileError with every violation that :func:`try_compile` finds, under the first one's code,
    and QAT250 for options that are wrong or that the target cannot.
    """
    if not isinstance(target, Target):
        target = load_target(target)
    executable, violations = try_compile(program, target, options)
    if executable is None:
        count = "1 violation" if len(violations) == 1 else f"{len(violations)} violations"
        listed = "".join(f"\n  {violation}" for violation in violations)
        fix = f"Change these in qconfig or the model, or compile for a target other than {target.name}"
        raise CompileError(violations[0].code, f"target {target.name}", f"refuses the Program, {count}:{listed}", fix)
    return executable


def try_compile(
    program: Program, target: Target, options: CompileOptions | Mapping[str, Any] | None = None
) -> tuple[Executable | None, tuple[Violation, ...]]:
    """What :func:`compile_model` gives, or None and all violations of :func:`check_model`; if there is none, those of
    ops of which no block fits the target's buffers.

    Raises CompileError QAT250 for options that are wrong or that the target cannot.
    """
    options = parse_options(options)
    if violations := check_model(program, target):
        return None, violations
    choice = choose(program, target, options)
    if violations := check_blocks(choice.job):
        return None, violations
    return assemble(target, choice.job, choice.memory, choice.blocks, choice.search), ()


def assemble(
    target: Target,
    job: Job,
    memory: MemoryPlan,
    blocks: Mapping[str, Size] = MappingProxyType({}),
    search: Search = NO_SEARCH,
) -> Executable:
    """The Executable of a plan for ``job``, which is one of ``target``."""
    performance = estimate(job, memory)
    return Executable(
        job.program, target, job.steps, memory, performance, job.options, dict(blocks), search, job.streams
    )


def _batch(value: Value, x: Tensor) -> int:
    axis, times = _batch_axis(value)
    return x.shape[axis] // times


def _batch_axis(value: Value) -> tuple[int, int]:
    """Axis of the batch and how many times the batch it holds; ProgramError (QAT180) for a boundary without one."""
    axis = next((axis for axis, size in enumerate(value.shape) if size < 0), None)
    if axis is None:
        seen = f"has shape {list(value.shape)}, without a batch axis"
        raise ProgramError("QAT180", value.name, seen, "Let inputs and outputs carry the batch; -1 stands for it")
    return axis, -value.shape[axis]
