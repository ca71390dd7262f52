"""sum, mean, amax, amin, var and std, from torch's spelling to integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qatlib.analysis.agreement import gaps
from qatlib.emulator import emulate
from qatlib.errors import GraphError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx
from qatlib.graph.same import evaluate_graph
from qatlib.ops.reduce import Sum
from qatlib.program import Program, Value
from qatlib.qtype import QType
from tests.models import model
from tests.onnx_runtime import assert_same_in_onnx
from tests.ops.reductions import assert_exact, converted, sqnr_db

Body = Callable[[Any, Tensor], Any]
X = torch.randn(6, 4, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 + 0.3

SPELLINGS: dict[str, tuple[Body, str]] = {
    "mean": (lambda s, x: torch.mean(x, 1), "sum"),
    "global pool": (lambda s, x: x.mean([2, 3]), "sum"),
    "global pool, kept": (lambda s, x: x.mean((-2, -1), keepdim=True), "sum"),
    "positional keepdim": (lambda s, x: x.mean(-1, True), "sum"),
    "sum": (lambda s, x: x.sum(dim=(1, 3)), "sum"),
    "torch.sum": (lambda s, x: torch.sum(x, [3], keepdim=True), "sum"),
    "NumPy's names": (lambda s, x: x.sum(axis=-1, keepdims=True), "sum"),
    "amax": (lambda s, x: torch.amax(x, dim=(2, 3)), "amax"),
    "amax method": (lambda s, x: x.amax(-1, keepdim=True), "amax"),
    "amin": (lambda s, x: x.amin((1, -1)), "amin"),
    "var": (lambda s, x: x.var(-1), "sum"),
    "var, biased": (lambda s, x: torch.var(x, (2, 3), unbiased=False, keepdim=True), "sum"),
    "var, correction": (lambda s, x: torch.var(x, dim=1, correction=0), "sum"),
    "std": (lambda s, x: torch.std(x, -1), "sum"),
    "std method": (lambda s, x: x.std(dim=(1, 2, 3), keepdim=True), "sum"),
    "var_mean": (lambda s, x: torch.var_mean(x, -1), "sum"),
    "std_mean, kept": (lambda s, x: torch.std_mean(x, [1, 2], keepdim=True), "sum"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    body, kind = SPELLINGS[name]
    net = model(body)
    wanted = net(X)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for got, want in zip(evaluate_graph(fuse_fx(net, (X,)), [X]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    _, program = converted(net, X)
    assert kind in assert_exact(program, X)
    for got, want in zip(emulate(program, X), wanted, strict=True):
        assert got.shape == want.shape
        assert sqnr_db(want, got) > 30
    assert_same_in_onnx(program, X)


@pytest.mark.parametrize("out", ["int8", "int16"])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_every_mix_of_formats(dtype: str, out: str) -> None:
    net = model(lambda s, x: (x.mean((2, 3)), x.sum(1), x.amax(-1)))
    fake, program = converted(net, X, dtype=out, x=dtype)
    assert program.values["x.quant"].qtype.dtype == dtype
    assert {program.values[name].qtype.dtype for name in ("mean", "sum")} == {out}
    assert program.values["amax"].qtype == program.values["x.quant"].qtype, "the largest keeps its format"
    assert assert_exact(program, X) == {"sum", "amax"}
    assert_same_in_onnx(program, X)
    assert_near(fake, program, X)


def assert_near(fake: FakeQuantModel, program: Program, x: Tensor) -> None:
    """Within 1 code, on fewer than 0.1 % of the elements (int16: 3 %, by the rounding of the 20-bit multiplier)."""
    for name, gap in gaps(fake, program, x).items():
        assert gap.largest <= 1, name
        allowed = 0.03 if program.values[name].qtype.dtype == "int16" else 1e-3
        assert gap.differing <= max(1, allowed * gap.elements), f"{name}: {gap}"


def test_fake_quant_agrees_on_many_elements() -> None:
    x = torch.randn(200, 16, 10, 9, generator=torch.Generator().manual_seed(1))
    fake, program = converted(model(lambda s, x: (x.mean(1), x.sum((1, 2)), x.amin(2))), x)
    assert_near(fake, program, x)


def test_a_sum_past_int32_saturates() -> None:
    """70,000 codes of 32767 are 2.29e9."""
    x = torch.ones(2, 70_000)
    x[1] = -1
    fake, program = converted(model(lambda s, x: x.sum(1)), x, dtype="int16")
    (op,) = (op for op in program if op.kind == "sum")
    codes = emulate(program, x, trace=True)[1]["x.quant"][:, 0].tolist()
    assert op.attrs["acc_bound"] == 70_000 * 32768
    assert min(abs(code) for code in codes) * 70_000 > 2**31
    assert assert_exact(program, x) == {"sum"}
    assert_same_in_onnx(program, x)
    assert fake.graph.nodes[-1].op == "sum"


def test_a_sum_of_what_is_not_negative_is_not_negative() -> None:
    """The tables of sqrt and rsqrt behind a sum of squares need no code below 0."""
    _, program = converted(model(lambda s, x: x.std(-1)), X, dtype="int16")
    op = next(op for op in program if op.name == "std.var")
    operator = Sum()
    value = Value("y", (-1,), QType("int16", 1.0))
    assert operator.out_range(op, value, [(0, 32767)])[0] == 0
    assert operator.out_range(op, value, [(-5, 0)])[1] == 0
    assert operator.out_range(op, value, [(-5, 5)]) == (-32768, 32767)


def test_truth_values_are_counted() -> None:
    _, program = converted(model(lambda s, x: ((x > 0).sum(-1), (x > 0).float().mean(1))), X)
    counts, shares = emulate(program, X)
    assert counts.dtype == torch.int32
    codes = emulate(program, X, trace=True)[1]["x.quant"]
    assert torch.equal(counts, (codes > 0).sum(-1).int())
    assert sqnr_db((codes > 0).float().mean(1), shares) > 30
    assert_exact(program, X)
    assert_same_in_onnx(program, X)


def test_unbiased_and_biased_differ() -> None:
    nets = [model(lambda s, x, c=c: torch.var(x, -1, correction=c)) for c in (0, 1, 2)]
    found = [emulate(converted(net, X, dtype="int16")[1], X)[0].mean() for net in nets]
    assert found[1] / found[0] == pytest.approx(7 / 6, rel=1e-3)
    assert found[2] / found[0] == pytest.approx(7 / 5, rel=1e-3)


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (lambda s, x: x.mean(), "batch"),
        (lambda s, x: x.sum(0), "batch"),
        (lambda s, x: x.amax((0, 1)), "batch"),
        (lambda s, x: x.var(-1, correction=7), "divides by 0"),
        (lambda s, x: torch.std(x, True), "batch"),
    ],
)
def test_variants_that_are_refused(body: Body, seen: str) -> None:
    with pytest.raises(GraphError) as caught:
        fuse_fx(model(body), (X,))
    assert caught.value.code == "QAT134"
    assert seen in caught.value.seen
    assert "test_reduce.py:" in caught.value.where


@pytest.mark.parametrize("body", [lambda s, x: x.prod(1), lambda s, x: torch.cumsum(x, 1)])
def test_without_an_integer_form(body: Body) -> None:
    with pytest.raises(GraphError) as caught:
        fuse_fx(model(body), (X,))
    assert caught.value.code == "QAT132"
