"""Products of matrices: matmul, bmm, mm, addmm, baddbmm and the einsums that are a batched product."""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qatlib.errors import ProgramError, QConfigError
from qatlib.factors import lone_factor
from qatlib.integer import EXACT_FLOAT32, EXACT_FLOAT64, INT32, Requantizer, Route
from qatlib.ops.base import Attrs, Call, Cost, Format, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.composite import Composite
from qatlib.ops.region import Box, Need, Part, Regions, broadcast, matrix_axes
from qatlib.ops.work import Work
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering

_AT_MOST = 8
"""Chunks of the summed axis that still beat one product in float64."""


class MatMul(Operator):
    """``factor * (a @ b)``: both of at least two axes, the others broadcast. Attribute ``factor`` > 0, default 1."""

    name = "matmul"
    functions = (torch.matmul, torch.bmm, torch.mm, operator.matmul, Tensor.__matmul__, Tensor.__rmatmul__)
    methods = ("matmul", "bmm", "mm", "__matmul__", "__rmatmul__")

    def trace(self, call: Call) -> Ref | Traced:
        found = call.bind("input", "other", input=call.kwargs.get("self"))
        other = next((call.kwargs[key] for key in ("other", "mat2", "tensor2") if key in call.kwargs), None)
        a, b = found["input"], found.get("other", other)
        if "__rmatmul__" in (call.function, getattr(call.function, "__name__", "")):
            a, b = b, a
        _check(call, a, b)
        if isinstance(a, Ref) and isinstance(b, Tensor) and b.dim() == 2:
            return Traced((a,), {}, weights(_columns_first(call, b)), op="linear")
        return Traced((a, b)) if isinstance(a, Ref) and isinstance(b, Ref) else product(call, a, b)

    def check_formats(self, node: str, inputs: Sequence[str], output: str) -> None:
        for dtype in (*inputs, output):
            if dtype not in ("int8", "int16"):
                seen = f"a product of {inputs[0]} and {inputs[1]} to {output}"
                raise QConfigError("QAT148", node, seen, "Use int8 or int16 before and after it")

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        out = torch.matmul(inputs[0], inputs[1])
        c = attrs.get("factor", 1.0)
        return out if c == 1.0 else out * c

    def lower(self, low: Lowering) -> None:
        c = float(low.attrs.get("factor", 1.0))
        terms = low.inputs[0].shape[-1]
        wide = [value.qtype.dtype == "int16" for value in low.inputs]
        largest = [low.largest(0), low.largest(1)]
        drop = dropped(terms, largest, wide)
        scales = [low.input_scale(i) * 2.0**bits for i, bits in enumerate(drop)]
        m, n = lone_factor(scales[0] * scales[1] * c / low.output_scale, low.bits, low.name)
        lo, hi = low.output_clamp()
        attrs = {"factor": c, "drop": drop, "lo": lo, "hi": hi, "acc_bound": _bound(terms, largest, drop)}
        consts = {"multiplier": torch.tensor([m], dtype=torch.int32), "shift": torch.tensor([n], dtype=torch.int32)}
        low.emit(self.name, attrs, consts)

    # -- integer -------------------------------------------------------------------------------------------------

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        terms, drop = program.in_values(op)[0].shape[-1], op.attrs["drop"]
        largest = [max(-lo, hi) for lo, hi in ranges]
        acc, bound, route = exact_product(terms, *_rounded(largest, drop))
        m, n = program.constant(op, "multiplier"), program.constant(op, "shift")
        requantize = Requantizer.plan([m], n, [min(bound, 2**31)], op.attrs["lo"], op.attrs["hi"])

        def run(a: Tensor, b: Tensor) -> Tensor:
            a, b = (x if p == 0 else (x * 2.0**-p).round_() for x, p in zip((a, b), drop, strict=True))
            return requantize(acc(a, b), reuse=True)

        run.route = route  # type: ignore[attr-defined]
        return run

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        macs = program.values[op.output].elements() * program.in_values(op)[0].shape[-1]
        return Cost(macs, 0, base.weight_bytes, base.input_bytes, base.output_bytes)

    def regions(self, op: Op, program: Program) -> Regions:
        out, (a, b) = program.values[op.output], program.in_values(op)
        terms = (0, a.shape[-1])

        def part(box: Box) -> Part:
            *outer, rows, columns = box
            return Part(
                (Need(broadcast((*outer, rows, terms), out, a)), Need(broadcast((*outer, terms, columns), out, b)))
            )

        return Regions(matrix_axes(out), part)

    def work(self, op: Op, program: Program) -> Work:
        """One product of two matrices for each place along the other axes."""
        summed, (*outer, rows, columns) = program.in_values(op)[0].sizes()[-1], program.values[op.output].sizes()
        return Work("sums", (1, rows, summed), (1, rows, columns), times=math.prod(outer), factor=1)

    # -- ONNX ----------------------------------------------------------------------------------------------------

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        terms = []
        for name, bits in zip(op.inputs, op.attrs["drop"], strict=True):
            x = graph.read(name, "float64")
            part = graph.node("Mul", x, graph.constant(np.float64(2.0**-bits))) if bits else x
            terms.append(graph.node("Round", part) if bits else x)
        acc = graph.node("MatMul", *terms)
        acc = graph.saturate(acc, op.attrs["acc_bound"])
        m, n = program.constant(op, "multiplier").numpy(), program.constant(op, "shift").numpy()
        graph.write(op.output, graph.requantize([(acc, m)], n, op.attrs["lo"], op.attrs["hi"]))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        out, c = graph.node("MatMul", *inputs), attrs.get("factor", 1.0)
        return out if c == 1.0 else graph.node("Mul", out, graph.constant(np.float32(c)))


def _rounded(largest: Sequence[int], drop: Sequence[int]) -> list[int]:
    """Largest magnitudes after ``drop`` bits are rounded away."""
    return [round(size / 2**bits) for size, bits in zip(largest, drop, strict=True)]


def _bound(terms: int, largest: Sequence[int], drop: Sequence[int]) -> int:
    return terms * math.prod(_rounded(largest, drop))


def dropped(terms: int, largest: Sequence[int], wide: Sequence[bool]) -> list[int]:
    """Bits that each operand loses so that a sum of ``terms`` products fits int32: section 4, ``matmul``.

    ``largest`` are the magnitudes of their codes; only ``wide`` (int16) operands lose any, each at most 8.
    """
    drop = [0, 0]
    while _bound(terms, largest, drop) > INT32[1]:
        sizes = _rounded(largest, drop)
        left = [i for i in (0, 1) if wide[i] and drop[i] < 8]
        if not left:
            break
        drop[max(left, key=lambda i: (sizes[i], -i))] += 1
    return drop


def exact_product(terms: int, a: int, b: int) -> tuple[Callable[[Tensor, Tensor], Tensor], int, Route]:
    """``sat32(a @ b)`` by the first route that is proven exact, the bound of the sums, and the route's name.

    ``terms`` products of codes with magnitudes up to ``a`` and ``b`` make one sum. Raises ProgramError (QAT176).
    """
    bound = terms * a * b
    if bound < EXACT_FLOAT32:
        return lambda x, y: torch.matmul(x.float(), y.float()), bound, "float32"
    if bound >= EXACT_FLOAT64:
        raise ProgramError("QAT176", "matmul", f"a sum may reach {bound}, beyond 2^53", "Reduce the summed axis")
    chunk = (EXACT_FLOAT32 - 1) // (a * b)
    split = chunk * _AT_MOST >= terms

    def run(x: Tensor, y: Tensor) -> Tensor:
        if split:
            parts = zip(torch.split(x.float(), chunk, -1), torch.split(y.float(), chunk, -2), strict=True)
            acc = sum((torch.matmul(*part).double() for part in parts), start=torch.zeros((), dtype=torch.float64))
        else:
            acc = torch.matmul(x.double(), y.double())
        return acc.clamp_(*INT32) if bound > INT32[1] else acc

    return run, bound, "float32-split" if split else "float64"


def product(
    call: Call, a: Any, b: Any, suffix: str = ".product", factor: float = 1.0, format: Format | None = None
) -> Ref:
    """The step ``factor * (a @ b)`` as ``torch.matmul`` defines it; a constant matrix on the right makes it a linear
    layer with the constant as its weights.
    """
    _check(call, a, b)
    if isinstance(b, Tensor) and b.dim() <= 2 and factor == 1.0:
        out = call.emit("linear", [a], {}, weights(_columns_first(call, b)), suffix=".linear", format=format)
        return out if b.dim() == 2 else reshaped(call, out, out.shape[:-1], ".vector")
    if isinstance(a, Tensor) and a.dim() == 1:
        out = product(call, call.derive(a, "one row", lambda v: v.view(1, -1)), b, suffix, factor, format)
        return reshaped(call, out, (*out.shape[:-2], out.shape[-1]), ".vector")
    attrs = {} if factor == 1.0 else {"factor": factor}
    return call.emit("matmul", [call.ref(a), call.ref(b)], attrs, suffix=suffix, format=format)


def _check(call: Call, a: Any, b: Any) -> None:
    for x in (a, b):
        if isinstance(x, Ref) and (x.content != "float" or len(x.shape) < 2):
            raise call.refuse(f"multiplies a tensor of {x.content} and shape {list(x.shape)}", "Give it rows of reals")
    if not isinstance(a, Ref) and not isinstance(b, Ref):
        raise call.refuse("a product of constants", "Compute the constant once, in __init__")
    if (isinstance(a, Ref) and a.shape[-1] < 0) or (isinstance(b, Ref) and b.shape[-2] < 0):
        raise call.refuse("sums over the batch, so one sample would depend on the others", "Keep the batch apart")


def weights(weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Parameters of a ``linear`` node; no bias is zeros."""
    return {"weight": weight, "bias": torch.zeros_like(weight.detach()[:, 0]) if bias is None else bias}


def _columns_first(call: Call, w: Tensor) -> Tensor:
    """A constant ``[K, O]``, or ``[K]``, as the weights ``[O, K]`` of a linear layer."""
    return call.derive(w, "columns first", lambda w: w.reshape(len(w), -1).t())


def reshaped(call: Call, x: Ref, shape: Sequence[int], suffix: str) -> Ref:
    """x with another shape, in which one size may follow the batch."""
    if tuple(shape) == x.shape:
        return x
    return call.emit("reshape", [x], {"shape": [max(size, -1) for size in shape]}, suffix=suffix)


class AddMM(Composite):
    """``beta * input + alpha * (a @ b)``: addmm, baddbmm."""

    name = "addmm"
    functions = (torch.addmm, torch.baddbmm)
    methods = ("addmm", "baddbmm")

    def trace(self, call: Call) -> Ref | Traced:
        found = call.bind("input", "mat1", "mat2", beta=1, alpha=1)
        found |= {new: call.kwargs[old] for old, new in (("batch1", "mat1"), ("batch2", "mat2")) if old in call.kwargs}
        bias, a, b = found["input"], found["mat1"], found["mat2"]
        alpha, beta = float(found["alpha"]), float(found["beta"])
        if alpha <= 0:
            raise call.refuse(f"alpha is {alpha:g}", "Use a positive alpha")
        constant = isinstance(b, Tensor) and b.dim() == 2 and isinstance(bias, Tensor) and bias.dim() == 1
        if isinstance(a, Ref) and constant and (alpha, beta) == (1, 1) and len(bias) == b.shape[1]:
            return Traced((a,), {}, weights(_columns_first(call, b), bias), op="linear")
        out = product(call, a, b, factor=alpha)
        if beta == 0:
            return out
        op, attrs = ("add", {}) if beta == 1 else ("sub", {"alpha": -beta})
        return call.emit(op, [out, call.ref(bias)], attrs, suffix=".add")


# -- einsum ------------------------------------------------------------------------------------------------------------


class Einsum(Composite):
    """Two operands whose shared letters are summed or kept: a product of matrices. One operand: a permutation."""

    name = "einsum"
    functions = (torch.einsum,)

    def trace(self, call: Call) -> Ref:
        equation, *operands = call.args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = list(operands[0])
        terms, out = _letters(call, str(equation), operands)
        if len(operands) == 1 and sorted(terms[0]) == sorted(out):
            return permuted(call, operands[0], terms[0], out, "")
        if len(operands) != 2 or any(len(set(term)) < len(term) for term in (*terms, out)):
            raise call.refuse(f"einsum {equation!r} is no product of two matrices", "Write it with matmul and sum")
        shared = [letter for letter in terms[0] if letter in terms[1]]
        batch, summed = [x for x in shared if x in out], [x for x in shared if x not in out]
        own = [[x for x in term if x not in shared] for term in terms]
        if any(x not in out for letters in own for x in letters):
            raise call.refuse(f"einsum {equation!r} sums an axis of one operand", "Sum it first: x.sum(axis)")
        if not isinstance(operands[0], Ref) and not batch:  # the constant to the right, as weights
            operands, terms, own = operands[::-1], terms[::-1], own[::-1]
        sizes = {x: n for term, op in zip(terms, operands, strict=True) for x, n in zip(term, op.shape, strict=True)
                 if n != 1}  # fmt: skip
        if any(
            x.shape[term.index(k)] != sizes.get(k, 1) for x, term in zip(operands, terms, strict=True) for k in summed
        ):
            raise call.refuse(f"einsum {equation!r} sums an axis of one operand", "Sum it first: x.sum(axis)")
        columns, inner = (math.prod(sizes.get(x, 1) for x in letters) for letters in (own[1], summed))
        # The left operand's own axes but the last broadcast; the right one's and the summed ones are put together.
        rows = own[0][:-1] + batch + own[0][-1:]
        left = [*_sizes(operands[0], terms[0], rows), *([] if own[0] else [1]), inner]
        right = [*_sizes(operands[1], terms[1], batch), inner, columns]
        a = _arranged(call, operands[0], terms[0], rows + summed, left, ".a")
        b = _arranged(call, operands[1], terms[1], batch + summed + own[1], right, ".b")
        result = reshaped(call, product(call, a, b), [sizes.get(x, 1) for x in rows + own[1]], ".reshape")
        return permuted(call, result, rows + own[1], out, "")


def _letters(call: Call, equation: str, operands: Sequence[Any]) -> tuple[list[list[str]], list[str]]:
    """Letters of every operand and of the result; an ellipsis is spelled with unused letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands) or not all(isinstance(x, Ref | Tensor) for x in operands):
        raise call.refuse(f"einsum {equation!r} of {len(operands)} operands", "Pass the equation and its tensors")
    ranks = [
        len(x.shape) - len(t.replace("...", "")) if "..." in t else 0 for x, t in zip(operands, terms, strict=True)
    ]
    spare = [letter for letter in string.ascii_letters if letter not in equation][: max(ranks)]

    def spelled(term: str, rank: int) -> list[str]:
        return list(term.replace("...", "".join(spare[len(spare) - rank :])))

    found = [spelled(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    if arrow:
        return found, spelled(right, len(spare))
    once = sorted(x for x in set(left) - {",", "."} if left.count(x) == 1)
    return found, [*spare, *once]


def _sizes(x: Any, term: Sequence[str], letters: Sequence[str]) -> list[int]:
    return [x.shape[term.index(letter)] for letter in letters]


def _arranged(
    call: Call, x: Any, term: Sequence[str], order: Sequence[str], shape: Sequence[int], suffix: str
) -> Ref | Tensor:
    """An operand with its axes in ``order``, put together to ``shape``."""
    if isinstance(x, Ref):
        return reshaped(call, permuted(call, x, term, order, suffix), shape, f"{suffix}.reshape")
    dims = [term.index(letter) for letter in order]
    return call.derive(x, f"axes {dims} as {list(shape)}", lambda w: w.permute(dims).reshape(list(shape)))


def permuted(call: Call, x: Ref, term: Sequence[str], order: Sequence[str], suffix: str) -> Ref:
    dims = [term.index(letter) for letter in order]
    if dims == sorted(dims):
        return x
    return call.emit("permute", [x], {"dims": dims}, suffix=f"{suffix}.permute")
