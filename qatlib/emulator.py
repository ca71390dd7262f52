"""Running a Program with torch, bit for bit as ``docs/numerics.md`` says.

Between operators, codes travel as float32 tensors of integers (int32 accumulators above 2^24 as float64): the kernels
of :mod:`qatlib.ops` stay exact on them by proven bounds. Integers are made only where somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from qatlib import ops as _ops  # noqa: F401 registers the operators
from qatlib.errors import ProgramError, QatError
from qatlib.integer import exact_kernels
from qatlib.ops.base import BY_KIND, Kernel, Range
from qatlib.ops.boundary import quantize
from qatlib.ops.region import Part
from qatlib.program import Op, Program

Visit = Callable[[Op, tuple[Tensor, ...], Tensor], None]
Step = tuple[Op, tuple[Tensor, ...], Tensor]
"""An op, the carriers of its inputs and of its output."""
_INTEGER = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "float32": torch.float32}


class Emulator:
    """A Program made ready to run on ``device``: constants converted and an exact route chosen for every op, once.

    Raises ProgramError: QAT182 for an op kind that has no kernel, QAT174 for an op without the inputs, attributes or
    constants that its kernel needs, QAT176 for sums beyond 2^53.
    """

    def __init__(self, program: Program, device: str | torch.device = "cpu") -> None:
        self.program = program.to(device)
        self.device = torch.device(device)
        self._ranges: dict[str, Range] = {}
        self._kernels: dict[str, Kernel] = {}
        self._parts: dict[str, dict[Hashable, Kernel]] = {}
        for name in program.inputs:
            self._ranges[name] = self._full_range(name)
        for op in self.program.ops:
            self._prepare(op)
        last_use = {name: i for i, op in enumerate(program.ops) for name in op.inputs}
        kept = set(program.outputs)
        self._dying = [
            {name for name in op.inputs if last_use[name] == i and name not in kept} for i, op in enumerate(program.ops)
        ]

    def _prepare(self, op: Op) -> None:
        operator, value = BY_KIND.get(op.kind), self.program.values[op.output]
        if operator is None:
            raise ProgramError(
                "QAT182", op.name, f"op kind {op.kind!r} is unknown", "Load it with the version that wrote it"
            )
        ranges = [self._ranges[name] for name in op.inputs]
        try:
            self._kernels[op.name] = operator.kernel(op, self.program, ranges)
            self._ranges[op.name] = (
                self._full_range(op.output) if value.qtype.is_float else operator.out_range(op, value, ranges)
            )
        except (QatError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a kernel meets in an op that lacks what it needs
            first = next(iter(str(error).splitlines()), "")
            seen = f"is no {op.kind} that can be computed ({type(error).__name__}: {first})"
            fix = "The Program was built or edited wrongly; convert it again"
            raise ProgramError("QAT174", op.name, seen, fix) from error

    def _full_range(self, name: str) -> Range:
        qtype = self.program.values[name].qtype
        return (0, 0) if qtype.is_float else qtype.codes

    @property
    def routes(self) -> dict[str, str]:
        """Exact route of every op that sums products: op name to route name."""
        return {name: kernel.route for name, kernel in self._kernels.items() if hasattr(kernel, "route")}

    # -- running -------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs for a batch: float32 where the Program ends in float, integers of the value's dtype elsewhere."""
        values = self._run(inputs, None, free=True)
        return tuple(self.narrow(name, values[name]) for name in self.program.outputs)

    def walk(self, *inputs: Tensor, visit: Visit) -> tuple[Tensor, ...]:
        """Run, and call ``visit(op, input carriers, output carrier)`` after every op."""
        values = self._run(inputs, visit, free=True)
        return tuple(self.narrow(name, values[name]) for name in self.program.outputs)

    def steps(self, *inputs: Tensor) -> Iterator[Step]:
        """Run, one op whenever the next is asked for."""
        steps = self._steps(inputs, {}, free=True)
        while True:
            with exact_kernels():
                step = next(steps, None)
            if step is None:
                return
            yield step

    def trace(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Every named value: integers of its dtype, or float32."""
        values = self._run(inputs, None, free=False)
        return {name: self.narrow(name, value) for name, value in values.items()}

    def compute(self, op: Op, *inputs: Tensor) -> Tensor:
        """One op on carriers. The inputs may be of any batch size and are not changed."""
        with exact_kernels():
            return self._kernels[op.name](*inputs)

    def kernel(self, op: Op, part: Part) -> Kernel:
        """Kernel of a part of an op, for the inputs that it needs; to be called within :func:`.integer.exact_kernels`.

        Parts of equal key share it.
        """
        if part.key is None:
            return self._kernels[op.name]
        parts = self._parts.setdefault(op.name, {})
        if part.key not in parts:
            ranges = [self._ranges[name] for name, need in zip(op.inputs, part.needs, strict=True) if need is not None]
            consts = {op.consts[role]: tensor for role, tensor in part.consts().items()}
            program = replace(self.program, constants={**self.program.constants, **consts})
            operator = BY_KIND[op.kind]
            parts[part.key] = operator.kernel(replace(op, attrs=part.attrs or op.attrs), program, ranges)
        return parts[part.key]

    def accept(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The inputs of a run as carriers on the device, by name.

        Raises ProgramError (QAT180) unless there is one tensor per input, of its shape, with real numbers for float32
        and integers within the format for the rest (0 and 1 for truth values), and all of one batch size.
        """
        names = self.program.inputs
        if len(inputs) != len(names):
            seen = f"got {len(inputs)} tensors for {len(names)} inputs {list(names)}"
            raise ProgramError("QAT180", "inputs", seen, "Pass one each")
        carriers = {name: self._accept(name, x) for name, x in zip(names, inputs, strict=True)}
        batches = batch_sizes(self.program, inputs)
        if len(batches) > 1:
            seen = " and ".join(f"{batch} in {name!r}" for batch, name in sorted(batches.items()))
            raise ProgramError("QAT180", "inputs", f"have different batch sizes, {seen}", "Give all the same")
        return carriers

    def _run(self, inputs: Sequence[Tensor], visit: Visit | None, free: bool) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        with exact_kernels():
            for step in self._steps(inputs, values, free):
                if visit is not None:
                    visit(*step)
        return values

    def _steps(self, inputs: Sequence[Tensor], values: dict[str, Tensor], free: bool) -> Iterator[Step]:
        """Fill ``values`` op by op; with ``free`` each leaves after its last reader."""
        values |= self.accept(*inputs)
        for op, dying in zip(self.program.ops, self._dying, strict=True):
            arguments = tuple(values[name] for name in op.inputs)
            values[op.output] = self._kernels[op.name](*arguments)
            yield op, arguments, values[op.output]
            if free:
                for name in dying:
                    del values[name]

    def _accept(self, name: str, x: Tensor) -> Tensor:
        value = self.program.values[name]
        if not isinstance(x, Tensor):
            raise ProgramError("QAT180", name, f"is a {type(x).__name__}", "Pass a torch.Tensor")
        if not value.fits(x.shape):
            raise ProgramError(
                "QAT180", name, f"has shape {list(x.shape)}, expected {list(value.shape)}", "-1 stands for the batch"
            )
        if x.is_complex() or x.is_floating_point() != value.qtype.is_float:
            raise ProgramError(
                "QAT180", name, f"has dtype {x.dtype}, expected {value.qtype.format}", "Convert it first"
            )
        carrier = self.widen(name, x.detach().to(self.device))
        if not value.qtype.is_float:
            lo, hi = value.qtype.codes
            outside = (carrier < lo) | (carrier > hi)
            if bool(outside.any()):
                at, count = outside.nonzero()[0].tolist(), int(outside.sum())
                seen = f"holds {int(x[tuple(at)])} at {at}, and {count} of {x.numel()} elements lie outside"
                raise ProgramError("QAT180", name, f"{seen} [{lo}, {hi}]", f"Give integers from {lo} to {hi}")
        return carrier

    # -- formats -------------------------------------------------------------------------------------------------

    def widen(self, name: str, x: Tensor) -> Tensor:
        """Integers of value ``name`` as a carrier; floats become float32."""
        return x.to(torch.float64 if self.program.values[name].qtype.dtype == "int32" else torch.float32)

    def narrow(self, name: str, carrier: Tensor) -> Tensor:
        """A carrier of value ``name`` as integers of its dtype, or float32: a copy that is the caller's own."""
        return carrier.to(_INTEGER[self.program.values[name].qtype.dtype], copy=True)

    def real(self, name: str, carrier: Tensor) -> Tensor:
        """Real numbers of a carrier of value ``name``, float32.

        An int32 accumulator is read by its ``dequantize``; integers without a scale stand for themselves.
        """
        qtype = self.program.values[name].qtype
        if qtype.is_float:
            return carrier
        if qtype.scale is not None:
            return carrier.float() * qtype.scale
        reader = next((op for op in self.program.ops if op.kind == "dequantize" and name in op.inputs), None)
        if reader is None:
            return carrier.float()
        return self.compute(reader, carrier)

    def codes(self, name: str, real: Tensor) -> Tensor:
        """Real numbers as a carrier of value ``name``, by the rule of ``quantize``."""
        qtype = self.program.values[name].qtype
        if qtype.is_float:
            return real
        if qtype.scale is None:
            return real.double()
        return quantize(real, qtype.scale, *qtype.limits)


@overload
def emulate(program: Program, inputs: Tensor | Sequence[Tensor], trace: Literal[False] = ...) -> tuple[Tensor, ...]: ...
@overload
def emulate(
    program: Program, inputs: Tensor | Sequence[Tensor], trace: Literal[True]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]: ...
def emulate(
    program: Program, inputs: Tensor | Sequence[Tensor], trace: bool = False
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs of ``program`` for a batch, and with ``trace`` also every named tensor's integers.

    Runs where the first input is. To run many batches, keep an :class:`Emulator`. Raises ProgramError as
    :class:`Emulator` and :meth:`Emulator.accept` do, QAT181 for NaN where integers are made, QAT207 for an index
    outside of what it reads.
    """
    tensors = tuple(inputs) if isinstance(inputs, Sequence) else (inputs,)
    device = next((x.device for x in tensors if isinstance(x, Tensor)), torch.device("cpu"))
    emulator = Emulator(program, device)
    if not trace:
        return emulator(*tensors)
    values = emulator.trace(*tensors)
    return tuple(values[name] for name in program.outputs), values


def batch_sizes(program: Program, inputs: Sequence[Tensor]) -> dict[int, str]:
    """Batch sizes that ``inputs`` have, each with the last input that has it; none if no input has a batch axis."""
    return {
        size // -want: name
        for name, x in zip(program.inputs, inputs, strict=True)
        for want, size in zip(program.values[name].shape, x.shape, strict=True)
        if want < 0
    }
