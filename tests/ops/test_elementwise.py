"""Elementwise operators, from torch's spellings to integers: section 4 of docs/numerics.md."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.analysis.agreement import Gap, gaps
from qatlib.conversion import convert_fx, to_program
from qatlib.emulator import Emulator, emulate
from qatlib.errors import GraphError, ProgramError, QConfigError
from qatlib.export import check_onnx, export_onnx
from qatlib.export.runtime import measure_distance
from qatlib.fake.model import FakeQuantModel, set_preserve_qat_mode
from qatlib.fake.prepare import fuse_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig, get_default_qconfig
from qatlib.fake.state import FakeQuantState
from qatlib.ops.base import BY_NAME
from qatlib.ops.compare import mantissa_of
from qatlib.ops.elementwise import lone_factor, sum_factors
from qatlib.program import Op, Program
from tests.models import calibrated
from tests.onnx_runtime import assert_same_in_onnx
from tests.oracle import half_even

Body = Callable[..., Any]
KINDS = ("add", "mul", "maximum", "minimum", "neg", "abs", "compare", "logical", "where", "cast", "clamp")
MIXES = [(a, b, c) for a in ("int8", "int16") for b in ("int8", "int16") for c in ("int8", "int16")]
SHAPE = (3, 4, 5, 6)


class Net(nn.Module):
    """``body(net, x, y)`` with a parameter per channel, a buffer of one image and a mask."""

    def __init__(self, body: Body, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body = body
        self.scale = nn.Parameter(torch.randn(shape[1], 1, 1, generator=generator) + 0.2)
        self.register_buffer("image", torch.randn(shape[1:], generator=generator) + 3)
        self.register_buffer("mask", torch.rand(shape[2:], generator=generator) < 0.4)
        self.register_buffer("point", torch.tensor(0.5))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


def net(body: Body, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    return Net(body, shape).eval()


def pair(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2, torch.randn(shape, generator=generator)


def prepared(body: Body, inputs: tuple[Tensor, ...], mix: tuple[str, str, str] = ("int8",) * 3) -> FakeQuantModel:
    """Formats of x, y and of everything computed."""
    formats = {"": get_default_qconfig(mix[2], "min_max")}
    names = {name: get_default_qconfig(dtype, "min_max") for name, dtype in zip(("x", "y"), mix, strict=False)}
    module = net(body, tuple(inputs[0].shape))
    used = [n.name for n in fuse_fx(module, inputs).nodes]
    rules = {**formats, "module_name": {name: names[name] for name in names if name in used}}
    return calibrated(module, *inputs, qconfig_dict=rules)


# -- the contract a second time ----------------------------------------------------------------------------------------


def by_the_contract(op: Op, program: Program, values: dict[str, np.ndarray]) -> np.ndarray:
    """Section 4 in int64 and Python integers, from the attributes and constants of one op."""
    x = [values[name].astype(np.int64) for name in op.inputs]
    consts = {role: program.constant(op, role).numpy().astype(np.int64) for role in op.consts}
    m, n = consts.get("multiplier"), consts.get("shift")
    lo, hi = op.attrs.get("lo"), op.attrs.get("hi")
    qmin, qmax = program.values[op.output].qtype.limits

    def req(term: np.ndarray, i: int = 0) -> np.ndarray:
        return np.clip(half_even(term * m[i], n[i]), lo, hi)

    if op.kind == "add":
        return np.clip(half_even(x[0] * m[0] + x[1] * m[1], n[0]), lo, hi)
    if op.kind == "mul":
        return req(x[0] * x[1])
    if op.kind in ("maximum", "minimum"):
        return getattr(np, op.kind)(req(x[0], 0), req(x[1], 1))
    if op.kind == "cast" and op.attrs["hi"] > 2**15:
        return x[0]
    if op.kind == "cast":
        scale = np.float32(program.values[op.output].qtype.scale)
        return np.clip(np.rint(x[0].astype(np.float32) / scale), lo, hi).astype(np.int64)
    if op.kind == "clamp":
        return np.clip(x[0], lo, hi)
    if op.kind in ("neg", "abs"):
        return np.clip(-x[0] if op.kind == "neg" else abs(x[0]), qmin, qmax)
    if op.kind == "logical":
        function = {"not": np.logical_not, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        return function[op.attrs["function"]](*x).astype(np.int64)
    if op.kind == "compare":
        sides = [
            term.astype(object) * (int(k) << int(e))
            for term, k, e in zip(x, consts["mantissa"], consts["exponent"], strict=True)
        ]
        return np.asarray(getattr(operator, op.attrs["function"])(*sides)).astype(np.int64)
    terms = iter([req(term, i) for i, term in enumerate(x[1:])])
    sides = [next(terms) if op.attrs[side] is None else op.attrs[side] for side in ("true", "false")]
    return np.where(x[0] != 0, *sides)


def assert_exact(program: Program, *inputs: Tensor) -> None:
    """Every op of these kinds gives the contract's integers for its own inputs, whatever the batch."""
    _, traced = emulate(program, inputs, trace=True)
    values = {name: tensor.numpy() for name, tensor in traced.items()}
    seen = 0
    for op in program:
        if op.kind in KINDS:
            want = by_the_contract(op, program, values)
            assert values[op.output].shape == want.shape == program.values[op.output].sizes(len(inputs[0]))
            assert (values[op.output] == want).all(), op
            low, high = Emulator(program)._ranges[op.output]
            assert low <= want.min(), op
            assert want.max() <= high, op
            seen += 1
    assert seen
    first = emulate(program, [x[:1] for x in inputs])
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(first, emulate(program, inputs), strict=True))


# -- as models write them ----------------------------------------------------------------------------------------------

Spelling = tuple[Body, list[str]]
SPELLINGS: dict[str, Spelling] = {
    # name: (body, ops of its own in the graph)
    "x + y": (lambda m, x, y: x + y, ["add"]),
    "add with alpha": (lambda m, x, y: torch.add(x, y, alpha=2), ["sub"]),
    "add method with alpha": (lambda m, x, y: x.add(y, alpha=-0.3), ["sub"]),
    "iadd": (lambda m, x, y: operator.iadd(x * 2, y), ["mul", "add"]),
    "add a number": (lambda m, x, y: x + 1.5, ["add"]),
    "a number added": (lambda m, x, y: 2 + x, ["add"]),
    "add a parameter": (lambda m, x, y: x + m.scale, ["add"]),
    "add a buffer": (lambda m, x, y: torch.add(input=m.image, other=x), ["add"]),
    "broadcast": (lambda m, x, y: x + y.flatten(1)[:, :6].view(-1, 1, 1, 6), None),
    "x - y": (lambda m, x, y: x - y, ["sub"]),
    "x - number": (lambda m, x, y: x - 0.7, ["sub"]),
    "number - x": (lambda m, x, y: 1 - x, ["sub"]),
    "rsub": (lambda m, x, y: torch.rsub(x, y, alpha=0.5), ["sub"]),
    "sub in place": (lambda m, x, y: (x * 2).sub_(y, alpha=3).subtract(1), ["mul", "sub", "sub"]),
    "subtract": (lambda m, x, y: torch.subtract(x, m.scale), ["sub"]),
    "x + 0": (lambda m, x, y: (0 + x) + y, ["add"]),
    "relu behind": (lambda m, x, y: F.relu6(x - y), ["sub"]),
    "x * y": (lambda m, x, y: x * y, ["mul"]),
    "x * x": (lambda m, x, y: x * x, ["mul"]),
    "x * number": (lambda m, x, y: x * 0.5, ["mul"]),
    "negative number * x": (lambda m, x, y: -0.3 * x, ["mul"]),
    "x * 0": (lambda m, x, y: x * 0 + y, ["mul", "add"]),
    "x * tensor without axes": (lambda m, x, y: x * m.point, ["mul"]),
    "x * parameter": (lambda m, x, y: x.mul(m.scale), ["mul"]),
    "multiply": (lambda m, x, y: torch.multiply(m.image, x), ["mul"]),
    "imul": (lambda m, x, y: operator.imul(x + y, y), ["add", "mul"]),
    "mul_": (lambda m, x, y: (x + y).mul_(3), ["add", "mul"]),
    "x * 1": (lambda m, x, y: 1 * (x * 1.0) + y, ["add"]),
    "x / number": (lambda m, x, y: x / 8, ["mul"]),
    "x / buffer": (lambda m, x, y: torch.div(x, m.image.abs() + 0.1), ["mul"]),
    "x / y": (lambda m, x, y: x / (y.abs() + 2), ["abs", "add", "unary", "mul"]),
    "number / y": (lambda m, x, y: 3 / (y.abs() + 2), ["abs", "add", "unary"]),
    "div_": (lambda m, x, y: (x + y).div_(2), ["add", "mul"]),
    "true_divide": (lambda m, x, y: torch.true_divide(x, 3), ["mul"]),
    "-x": (lambda m, x, y: -x, ["neg"]),
    "neg": (lambda m, x, y: x.negative().neg_(), ["neg", "neg"]),
    "abs": (lambda m, x, y: torch.abs(x).abs(), ["abs", "abs"]),
    "maximum": (lambda m, x, y: torch.maximum(x, y), ["maximum"]),
    "minimum": (lambda m, x, y: x.minimum(y), ["minimum"]),
    "maximum with a parameter": (lambda m, x, y: torch.maximum(m.scale, x), ["maximum"]),
    "minimum with a number": (lambda m, x, y: torch.minimum(x, torch.tensor(0.5)), ["clamp"]),
    "clamp": (lambda m, x, y: torch.clamp(x, -0.5, 0.7), ["clamp"]),
    "clamp by keyword": (lambda m, x, y: x.clamp(max=0.7), ["clamp"]),
    "clamp_min": (lambda m, x, y: torch.clamp_min(x, 0.2), ["clamp"]),
    "clamp_max": (lambda m, x, y: x.clamp_max(0.2), ["clamp"]),
    "clip": (lambda m, x, y: torch.clip(x, -1, float("inf")), ["clamp"]),
    "hardtanh": (lambda m, x, y: F.hardtanh(x, max_val=0.5), ["clamp"]),
    "clamp to a tensor": (lambda m, x, y: torch.clamp(x, min=m.scale, max=y), ["maximum", "minimum"]),
    "clamp to a tensor of one element": (lambda m, x, y: x.clamp(min=m.point), ["clamp"]),
    "where greater": (lambda m, x, y: torch.where(x > y, x, y), ["compare", "where"]),
    "where with numbers": (lambda m, x, y: torch.where(x.le(0.3), -1.0, 2.5), ["compare", "where"]),
    "where with a number": (lambda m, x, y: torch.where(y >= 0, x, 0), ["compare", "where"]),
    "where method": (lambda m, x, y: x.where(y < x, m.scale), ["compare", "where"]),
    "static mask": (lambda m, x, y: torch.where(m.mask, x, y), ["where"]),
    "masked_fill": (lambda m, x, y: x.masked_fill(y.lt(0), 1.25), ["compare", "where"]),
    "masked_fill of a static mask": (lambda m, x, y: torch.masked_fill(x, m.mask, m.point), ["where"]),
    "masked_fill_": (lambda m, x, y: (x + y).masked_fill_(~m.mask, 0), ["add", "where"]),
    "logic": (
        lambda m, x, y: torch.where(((x > 0) & (y > 0)) | ~(x >= y) ^ m.mask, x, y),
        ["compare"] * 3 + ["logical"] * 4 + ["where"],
    ),
    "logical functions": (
        lambda m, x, y: torch.where(torch.logical_and(x, y > 0).logical_not(), x, y),
        ["compare", "compare", "logical", "logical", "where"],
    ),
    "eq and ne": (lambda m, x, y: torch.where(x.eq(0) | torch.ne(y, 0), x, y), ["compare"] * 2 + ["logical", "where"]),
    "float of a mask": (lambda m, x, y: x * (y > 0).float(), ["compare", "cast", "mul"]),
    "mask times x": (lambda m, x, y: x * (y > 0), ["compare", "mul"]),
    "type_as": (lambda m, x, y: (1.0 - (y > 0).type_as(x)) * -3 + x, ["compare", "cast", "sub", "mul", "add"]),
    "to": (lambda m, x, y: x + (y != 0).to(x.dtype), ["compare", "cast", "add"]),
    "bool": (lambda m, x, y: torch.where(F.relu(x).bool(), x, y), ["clamp", "compare", "where"]),
    "casts that do nothing": (lambda m, x, y: x.float().to(y).to("cpu").double().float() + y, ["add"]),
    "a constant cast to its neighbour": (lambda m, x, y: x + m.image.to(x.dtype).type_as(y), ["add"]),
    "integers": (
        lambda m, x, y: torch.where(((x > 0).long() + (y > 0).long() * 2 - 1).eq(2), x, y),
        ["compare", "cast", "compare", "cast", "mul", "add", "sub", "compare", "where"],
    ),
    "integers turn real": (
        lambda m, x, y: x * ((x > 0).int() - (x < 0).int()).float() / 3,
        ["compare", "cast", "compare", "cast", "sub", "cast", "mul", "mul"],
    ),
    "integers in a product": (
        lambda m, x, y: x + ((y > 0).int() * 3) * 0.5,
        ["compare", "cast", "mul", "cast", "mul", "add"],
    ),
    "more integers": (
        lambda m, x, y: x * torch.where(y > 0, (-(x > 0).int()).abs().clamp(0, 1).maximum((y > 1).int()), 7),
        ["compare", "compare", "cast", "neg", "abs", "clamp", "compare", "cast", "maximum", "where", "cast", "mul"],
    ),
    "truth values in sums": (lambda m, x, y: torch.where((x > 0) + (y > 0) * m.mask, x, y), None),
}


def own_ops(body: Body, inputs: tuple[Tensor, ...]) -> list[str]:
    graph = fuse_fx(net(body, tuple(inputs[0].shape)), inputs)  # compares with the model itself
    return [n.op for n in graph.nodes if n.op not in ("input", "constant", "reshape")]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    body, ops = SPELLINGS[name]
    inputs = pair()
    found = own_ops(body, inputs)
    assert ops is None or sorted(found) == sorted(ops)


@pytest.mark.parametrize("name", SPELLINGS)
def test_integers_by_the_contract_and_in_onnx(name: str, tmp_path: Path) -> None:
    body, _ = SPELLINGS[name]
    for mix in (("int8", "int8", "int8"), ("int16", "int8", "int16")):
        fake = prepared(body, pair(), mix)
        program = convert_fx(fake).program
        fresh = pair(seed=7)
        assert_exact(program, *fresh)
        assert_same_in_onnx(program, *fresh)
        assert Program.load(_saved(program, tmp_path / mix[0])).ops == program.ops


def _saved(program: Program, folder: Path) -> Path:
    program.save(folder)
    return folder


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_qdq_flavour_is_close_and_islands_are_the_same_functions(name: str, tmp_path: Path) -> None:
    fake, fresh = prepared(SPELLINGS[name][0], pair()), pair(seed=3)
    program = convert_fx(fake).program
    export_onnx(program, tmp_path / "qdq.onnx", flavour="qdq")
    distance = measure_distance(program, tmp_path / "qdq.onnx", fresh)
    assert max(found.largest_lsb for found in distance.values()) <= 2
    kept = [name for name, op in fake.ops() if op.node.op not in ("constant", "quantize")]
    program = to_program(fake, preserve=kept)
    export_onnx(program, tmp_path / "islands.onnx")
    traced = emulate(program, fresh, trace=True)[1]
    for value, differing in check_onnx(program, tmp_path / "islands.onnx", fresh).items():
        assert differing <= traced[value].numel() / 100, value


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_every_mix_of_formats(mix: tuple[str, str, str]) -> None:
    def body(m: Any, x: Tensor, y: Tensor) -> Any:
        return (
            *(x + y, x - 0.3 * y, x * y, torch.maximum(x, y), torch.minimum(x, y), torch.where(x > y, x, y)),
            *(-x, abs_of(y), x.masked_fill(x < y, -0.5), F.relu(x - y)),
        )

    shape = (8, 8, 16, 20)
    program = convert_fx(fake := prepared(body, pair(shape), mix)).program
    fresh = pair(shape, seed=5)
    assert_exact(program, *fresh)
    assert_same_in_onnx(program, *fresh)
    for name, gap in gaps(fake, program, *fresh).items():
        wide = "int16" in [program.values[name].qtype.dtype] + [
            v.qtype.dtype for op in program if op.output == name for v in program.in_values(op)
        ]
        assert gap.largest <= 1, (name, gap)
        assert gap.share < (2.0**-5 if wide else 1e-3), (name, gap)


def abs_of(x: Tensor) -> Tensor:
    return torch.abs(x)


@pytest.mark.parametrize("name", SPELLINGS)
def test_fake_quant_agrees(name: str) -> None:
    """At most one code, on fewer than 0.1 % of the elements: tables and what reads int16 steps excepted."""
    body, _ = SPELLINGS[name]
    shape = (32, 8, 12, 6)
    fake = prepared(body, pair(shape), ("int8", "int8", "int8"))
    program = convert_fx(fake).program
    for op, gap in distances(fake, program, *pair(shape, seed=9)):
        assert gap.largest <= 1, (op, gap)
        read = {value.qtype.dtype for value in program.in_values(op)}
        assert gap.share < (1e-3 if "int16" not in read else 2.0**-5), (op, gap)


def distances(fake: FakeQuantModel, program: Program, *inputs: Tensor) -> list[tuple[Op, Gap]]:
    """As :func:`gaps`, for the ops of these kinds, integers without a scale and truth values among them."""
    emulator = Emulator(program)
    values = emulator.trace(*inputs)
    found = []
    for op in program:
        if op.kind not in KINDS:
            continue
        reals = []
        for name in op.inputs:
            content, codes = fake.graph.by_name()[name].content, values[name]
            scale = program.values[name].qtype.scale
            reals.append({"float": codes.float() * (scale or 1), "int": codes.long(), "bool": codes.bool()}[content])
        with torch.no_grad():
            made = fake.compute(op.name, *reals)
        scale = program.values[op.output].qtype.scale or 1.0
        wanted = (made.double() / scale).round().clamp(*program.values[op.output].qtype.limits)
        apart = (wanted - values[op.output]).abs()
        found.append((op, Gap(apart.numel(), int((apart > 0).sum()), float(apart.max()))))
    return found


# -- factors -----------------------------------------------------------------------------------------------------------


def exact_sum_factors(r1: float, r2: float, largest: tuple[int, int], reach: int, bits: int) -> tuple[int, int, int]:
    """The rule of section 4 in rationals, for two factors of which none is left out."""
    sizes = [abs(Fraction(r1)), abs(Fraction(r2))]
    small = 0 if sizes[0] <= sizes[1] else 1
    sizes[1 - small] = min(sizes[1 - small], 2 * (reach + largest[small] * sizes[small]))
    n = 0
    while round(sizes[small] * 2 ** (n + 1)) < 2**bits:
        n += 1
    while n and max(sizes) * Fraction(2) ** n >= 2**31 - Fraction(1, 2):
        n -= 1

    def multiplier(size: Fraction) -> int:
        size *= Fraction(2) ** n
        drop = max(0, round(size).bit_length() - bits)
        return min(round(size / 2**drop) * 2**drop, (2**bits - 1) * 2 ** (31 - bits))

    m = [multiplier(size) * (1 if r > 0 else -1) for size, r in zip(sizes, (r1, r2), strict=True)]
    return m[0], m[1], n


@pytest.mark.parametrize("bits", [8, 13, 20, 21])
def test_factors_of_a_sum_follow_the_rule(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for _ in range(300):
        r1, r2 = (float(s * 2.0**e) for s, e in zip(rng.choice([-1, 1], 2), rng.uniform(-38, 14, 2), strict=True))
        largest = tuple(int(v) for v in rng.choice([128, 32768], 2))
        reach = int(rng.choice([128, 32768]))
        assert sum_factors((r1, r2), largest, reach, bits, "op") == exact_sum_factors(r1, r2, largest, reach, bits)


def test_factors_of_a_sum_by_hand() -> None:
    eight = (128, 128)
    assert sum_factors((0.5, 0.125), eight, 128, 8, "op") == (512, 128, 10), "the smaller has 8 bits"
    assert sum_factors((0.125, -0.5), eight, 128, 8, "op") == (128, -512, 10)
    assert sum_factors((1.0, 2.0**-41), eight, 128, 8, "op") == (128, 0, 7), "moves no code"
    assert sum_factors((2.0**-41, -1.0), eight, 128, 8, "op") == (0, -128, 7)
    assert sum_factors((2.0**-50, 2.0**-60), eight, 128, 8, "op") == (0, 0, 0)
    assert sum_factors((1.0, 1e30), eight, 128, 8, "op") == (128, 512 << 7, 7), "2 (128 + 128) saturates as 1e30 does"
    assert sum_factors((300.0, 300.0), eight, 128, 8, "op") == (300, 300, 0)
    with pytest.raises(ProgramError, match="QAT171 op: scale ratios"):
        sum_factors((2.0**32, -(2.0**33)), eight, 128, 8, "op")
    with pytest.raises(ProgramError, match="QAT171 op: scale ratio inf"):
        sum_factors((float("inf"), 1.0), eight, 128, 8, "op")


def test_a_lone_factor_has_no_end_that_fails() -> None:
    assert lone_factor(2.0**-41, 20, "op") == (0, 0)
    assert lone_factor(2.0**-40, 20, "op") == (2**19, 59)
    assert lone_factor(2.0**21, 20, "op") == (2**20 - 1, 0)
    assert lone_factor(2.0**20 - 0.25, 20, "op") == (2**20 - 1, 0), "would round to 2^20, whose shift is -1"
    assert lone_factor(0.75, 8, "op") == (192, 8)
    with pytest.raises(ProgramError, match="QAT171 op: scale ratio inf"):
        lone_factor(float("inf"), 20, "op")


def test_scales_that_lie_far_apart_convert() -> None:
    """Dead tensors, and outputs that were zero in calibration."""

    def body(m: Any, x: Tensor, y: Tensor) -> Any:
        dead = x * 0
        return x + dead, dead + dead, x - x, dead * y, torch.maximum(x, dead), (x - x) * y, torch.where(x > 0, dead, x)

    x, y = pair()
    program = convert_fx(prepared(body, (x * 1e3, y))).program
    assert_exact(program, x, y)
    outputs = emulate(program, (x * 1e3, y))
    assert (outputs[0] - x * 1e3).abs().max() < 1e3 / 10
    assert all((outputs[i] == 0).all() for i in (1, 2, 3))


def test_a_mask_of_the_largest_float_leaves_the_rest_its_bits() -> None:
    """Whatever the mask's scale: its codes other than 0 saturate, and the other term keeps its multiplier."""
    values = [-1e4, -1e9, torch.finfo(torch.float32).min]
    for low in values:
        ratios = (0.9, -low / 64 / 0.04)
        m1, m2, shift = sum_factors(ratios, (128, 128), 128, 20, "op")
        assert m1 / 2**shift == pytest.approx(0.9, rel=2**-19)
        assert abs(m2 / 2**shift) >= min(-low / 64 / 0.04, 256) * 0.999


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [-float("inf"), torch.finfo(torch.float32).min, -1e9])
def test_masks_saturate_and_calibration_looks_past_them(low: float, tmp_path: Path) -> None:
    def body(m: Any, x: Tensor, y: Tensor) -> Any:
        return torch.maximum(x.masked_fill(m.mask & (y < 9), low), y - 30)

    x, y = pair()
    fake = prepared(body, (x, y))
    program = convert_fx(fake).program
    op = next(op for op in program if op.kind == "where")
    assert op.attrs["true"] == -128
    scale = program.values[op.output].qtype.scale
    lowest = float(x[~net(body).mask.expand_as(x)].min())
    assert scale == pytest.approx((16 - lowest) / 127.5, rel=1e-6), "16 below all that is visible ends the range"
    assert_exact(program, x, y)
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", (x, y)).values()) == {0}
    out = emulate(program, (x, y), trace=True)[1][op.output] * scale
    kept = ~net(body).mask.expand_as(x)
    assert (out[kept] - x[kept]).abs().max() < scale
    assert (out[~kept] == -128 * scale).all()


@pytest.mark.parametrize("low", [-float("inf"), torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("added", [False, True])
def test_masked_attention(low: float, added: bool) -> None:
    """A mask that is an input, filled in or added: what it hides has no weight, the rest is near the float model."""

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
            scores = q @ k.transpose(1, 2) / 8**0.5
            if added:
                scores = scores + (1.0 - seen[:, None].float()) * max(low, torch.finfo(torch.float32).min)
            else:
                scores = scores.masked_fill(~seen.unsqueeze(1), low)
            return torch.softmax(scores, -1) @ k

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4, 6, 8, generator=generator) for _ in range(2))
    seen = torch.rand(4, 6, generator=generator) < 0.7
    seen[:, 0] = True
    module = Attention().eval()
    integer = convert_fx(calibrated(module, q, k, seen))
    assert (integer(q, k, seen) - module(q, k, seen)).abs().max() < 0.1
    weights = integer._emulator.trace(q, k, seen)["softmax.mul"]
    assert (weights[~seen[:, None].expand_as(weights)] == 0).all()


def test_the_code_of_a_fill() -> None:
    def body(m: Any, x: Tensor, y: Tensor) -> Any:
        return x.masked_fill(y > 0, 0.777), F.relu(torch.where(y > m.image - 1, float("-inf"), 1.0))

    program = convert_fx(prepared(body, pair())).program
    filled, both = (op for op in program if op.kind == "where")
    scale = program.values[filled.output].qtype.scale
    assert filled.attrs["true"] == round(0.777 / scale)
    assert filled.attrs["false"] is None
    assert both.attrs["true"] == -128
    assert both.attrs["false"] == round(1.0 / program.values[both.output].qtype.scale)
    assert len(both.inputs) == 1


def test_truth_values_cost_nothing_to_cast() -> None:
    program = convert_fx(prepared(lambda m, x, y: (x > y).float(), pair())).program
    (cast,) = (op for op in program if op.kind == "cast")
    assert program.values[cast.output].qtype.scale == 1
    assert_exact(program, *pair())


# -- comparisons -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.75, 2.0**-24, 0.1, 3.3e37, 1.2e-38])
def test_a_scale_is_its_mantissa_and_exponent(scale: float) -> None:
    scale = float(np.float32(scale))
    m, k = mantissa_of(scale)
    assert m % 2 == 1
    assert m < 2**24
    assert Fraction(m) * Fraction(2) ** k == Fraction(scale)


@pytest.mark.parametrize("function", ["gt", "ge", "lt", "le", "eq", "ne"])
def test_comparisons_are_those_of_the_exact_reals(function: str) -> None:
    """Every pair of codes, for scales far apart and near each other."""
    for s_x, s_y in (
        (0.1, 0.1),
        (0.1, 0.3),
        (1e-6, 40.0),
        (2.0**-24, 2.0**60),
        (0.3, np.nextafter(np.float32(0.3), 1)),
    ):
        qconfig = {
            "": QConfig(),
            "module_name": {
                name: QConfig(FakeQuantSpec(scale=float(np.float32(s)))) for name, s in (("x", s_x), ("y", s_y))
            },
        }
        codes = torch.arange(-128, 128)
        grid = torch.cartesian_prod(codes, codes)
        s_x, s_y = float(np.float32(s_x)), float(np.float32(s_y))
        x, y = grid[:, :1].float() * s_x, grid[:, 1:].float() * s_y
        module = Net(lambda m, x, y: getattr(torch, function)(x, y).float(), (1, 1, 1)).eval()
        program = convert_fx(calibrated(module, x, y, qconfig_dict=qconfig)).program
        (op,) = (op for op in program if op.kind == "compare")
        got = Emulator(program).compute(op, grid[:, :1].float(), grid[:, 1:].float()).flatten().tolist()
        compare = getattr(operator, function)
        f_x, f_y = Fraction(s_x), Fraction(s_y)
        assert got == [compare(a * f_x, b * f_y) for a, b in grid.tolist()]


def test_integers_compare_with_whole_numbers() -> None:
    program = convert_fx(prepared(lambda m, x, y: ((x > 0).long() * 100 - 50 == 50).float(), pair())).program
    (_, last) = (op for op in program if op.kind == "compare")
    assert [program.values[name].qtype.dtype for name in last.inputs] == ["int32", "int32"]
    assert_exact(program, *pair())


def test_integer_sums_saturate() -> None:
    big = 2**31 - 10
    program = convert_fx(prepared(lambda m, x, y: (x > 0).long() * big + (y > 0).long() * big, pair())).program
    assert_exact(program, *pair())
    (out,) = emulate(program, pair())
    assert out.dtype == torch.int32
    assert int(out.max()) == 2**31 - 1


# -- layouts, gradients, islands ---------------------------------------------------------------------------------------


def test_layout_does_not_matter() -> None:
    x, y = pair()
    program = convert_fx(
        prepared(lambda m, x, y: torch.where(x > y, x * m.scale, y - m.image) + x.mean((2, 3), keepdim=True), (x, y))
    ).program
    last = [t.to(memory_format=torch.channels_last) for t in (x, y)]
    assert torch.equal(emulate(program, (x, y))[0], emulate(program, last)[0])


def test_a_parameter_trains() -> None:
    fake = prepared(lambda m, x, y: x * m.scale + y, pair())
    fake.set_state(FakeQuantState.QAT)
    fake(*pair()).sum().backward()
    gradients = [p.grad for p in fake.parameters() if p.grad is not None]
    assert len(gradients) == 1
    assert gradients[0].shape == (4, 1, 1)


def test_float_islands() -> None:
    """Preserved ops get truth values as 0 and 1."""
    x, y = pair()
    fake = prepared(lambda m, x, y: torch.where((x > y) & m.mask, x, y).masked_fill(~(x > 1), 0.5) - x, (x, y))
    kept = [name for name, op in fake.ops() if op.node.op in ("where", "logical", "sub")]
    inside = emulate(convert_fx(fake).program, (x, y))[0]
    set_preserve_qat_mode(fake, prefixes=tuple(kept))
    program = to_program(fake)
    assert {op.attrs["operator"] for op in program.islands()} == {"where", "logical", "sub"}
    scale = program.values[program.outputs[0].removesuffix(".dequant")].qtype.scale
    assert (emulate(program, (x, y))[0] - inside).abs().max() <= scale * 1.001


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x, y: m.conv(x) - y,
        lambda m, x, y: torch.sub(y, m.conv(x)),
        lambda m, x, y: torch.add(m.conv(x), y, alpha=3),
    ],
)
def test_differences_are_not_fused_as_sums(body: Body) -> None:
    module = net(body)
    module.conv = nn.Conv2d(4, 4, 1)
    graph = fuse_fx(module, pair())
    assert [n.op for n in graph.nodes if n.op != "input"] == ["conv", "sub"]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x, y: F.dropout(x, 0.3, m.training),
        lambda m, x, y: F.alpha_dropout(x),
        lambda m, x, y: torch.dropout(x, 0.5, train=False),
        lambda m, x, y: (+x).clone().detach().contiguous(),
        lambda m, x, y: x.to(torch.float32).half().float().cpu().to(device="cpu").type(torch.float32),
        lambda m, x, y: x * 1 / 1 - 0 + 0.0,
    ],
)
def test_calls_that_compute_nothing_vanish(body: Body) -> None:
    graph = fuse_fx(net(body), pair())
    assert {n.op for n in graph.nodes} == {"input"}
    assert graph.outputs == ("x",)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (lambda m, x, y: x // y, "floor division"),
        (lambda m, x, y: torch.remainder(x, 2), "remainder"),
        (lambda m, x, y: torch.div(x, 2, rounding_mode="floor"), "rounding_mode 'floor'"),
        (lambda m, x, y: x / 0, "division by 0"),
        (lambda m, x, y: x / (m.image * 0), "a constant that holds 0"),
        (lambda m, x, y: x + float("inf"), "an operand is inf"),
        (lambda m, x, y: torch.where(x > 0, x, float("inf")), "fills with inf"),
        (lambda m, x, y: torch.where(x > float("-inf"), x, y), "compares with -inf"),
        (lambda m, x, y: (x * 3).long() + 1, "real numbers cast to integers"),
        (lambda m, x, y: torch.where(x > 0)[0], "condition alone"),
        (lambda m, x, y: ((x > 0).int() & 1) == 1, "bits of integers"),
        (lambda m, x, y: -(x > 0).int().bool(), None),
        (lambda m, x, y: (x > 0).int().clamp(0.5), "integers clamped to 0.5"),
        (lambda m, x, y: torch.maximum(x > 0, y > 0), "maximum of truth values"),
        (lambda m, x, y: torch.clamp(x, min=float("nan")), "clamp to NaN"),
        (lambda m, x, y: F.dropout(x), "stays on at inference"),
    ],
)
def test_variants_that_are_refused(body: Body, seen: str | None) -> None:
    with pytest.raises(GraphError) as raised:
        fuse_fx(net(body), pair())
    if seen is not None:
        assert raised.value.code == "QAT134"
        assert seen in raised.value.seen


@pytest.mark.parametrize("name", ["add", "mul", "maximum", "where", "neg", "cast"])
def test_formats_without_an_integer_form(name: str) -> None:
    with pytest.raises(QConfigError, match="QAT148 here"):
        BY_NAME[name].check_formats("here", ["int16", "int32"] if name != "cast" else ["int16"], "int8")
    BY_NAME[name].check_formats("here", ["int8"], "int16")
