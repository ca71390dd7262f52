"""Models as people write them (:mod:`tests.found`), from their source to every runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qatlib.conversion import to_program
from qatlib.emulator import Emulator, emulate
from qatlib.errors import GraphError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.coverage import mac_coverage
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig, get_default_qconfig
from qatlib.graph.trace import trace
from qatlib.program import Program
from tests.found import NETS, Found
from tests.models import model
from tests.onnx_runtime import assert_same_in_onnx

WIDE = QConfig(
    activation=FakeQuantSpec(dtype="int16", method="min_max"),
    weight=FakeQuantSpec(dtype="int16", method="min_max", averaging_constant=1.0),
)
LEAST_WIDE_DB = 60.0
LEAST_INT8_DB = 15.0
"""SQNR of the fake-quant model in int8 on other inputs than the 16 samples of its calibration."""
LEAST_INTEGER_DB = 30.0
"""SQNR of the integers with the fake-quant model, in which a code on the other side of a half goes its own way."""

EVERY = [pytest.param(net, id=name, marks=[pytest.mark.slow] * net.slow) for name, net in NETS.items()]


def prepared(net: Found, rules: dict[str, Any], *calibration: tuple[Tensor, ...]) -> FakeQuantModel:
    fake = prepare_qat_fx(net.model(), rules, example_inputs=net.inputs(2, 1))
    calibrate(fake, [(list(inputs), None) for inputs in calibration])
    return fake


def in_int8(net: Found) -> FakeQuantModel:
    rules = {"module_name": dict.fromkeys(net.wide, get_default_qconfig("int16"))} if net.wide else {}
    return prepared(net, rules, net.inputs(8, 2), net.inputs(8, 3))


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(module(*inputs))


def sqnr(want: list[Tensor], got: list[Tensor]) -> Iterator[float]:
    """Signal to quantization noise in dB of every real output."""
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape
        if a.is_floating_point():
            a, b = a.double(), b.double()
            yield float(10 * torch.log10(a.square().sum() / (a - b).square().sum().clamp(min=1e-30)))


@pytest.mark.parametrize("net", EVERY)
def test_fake_quant_in_16_bits_is_the_model(net: Found) -> None:
    """On what it was calibrated on: an SQNR that a wrong step would not reach."""
    inputs = net.inputs(3, 4)
    fake = prepared(net, {"": WIDE}, inputs)
    assert min(sqnr(outputs(net.model(), inputs), outputs(fake, inputs))) > net.least_db


@pytest.mark.parametrize("net", EVERY)
def test_int8_from_the_model_to_every_runtime(net: Found, tmp_path: Path) -> None:
    fake, inputs = in_int8(net), net.inputs(3, 4)
    coverage = mac_coverage(fake)
    assert coverage.share == 1, str(coverage)
    quantized = outputs(fake, inputs)
    assert min(sqnr(outputs(net.model(), inputs), quantized)) > LEAST_INT8_DB

    program = to_program(fake)
    assert not program.islands()
    got = emulate(program, inputs)
    assert min(sqnr(quantized, got)) > LEAST_INTEGER_DB
    is_independent_of_the_batch(program, inputs, got)
    program.save(tmp_path / "program")
    for a, b in zip(emulate(Program.load(tmp_path / "program"), inputs), got, strict=True):
        assert torch.equal(a, b)
    assert_same_in_onnx(program, *inputs)


def is_independent_of_the_batch(program: Program, inputs: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    emulator = Emulator(program)
    for i in range(len(inputs[0])):
        for one, all_of_them in zip(emulator(*(x[i : i + 1] for x in inputs)), got, strict=True):
            assert torch.equal(one, all_of_them[i : i + 1])


# -- what the trace makes of Python ------------------------------------------------------------------------------------


def _asserts(s: Any, x: Tensor) -> Tensor:
    n, length, width = x.shape
    assert width == 8
    assert x.dim() == x.ndim == len(x.shape) == 3
    assert not x.is_cuda
    if x.size(1) != 6 or length % 2:
        raise ValueError(f"length {length}")
    return x * width**-0.5 + s.table[:, :length].expand(n, -1, -1)


def _loops(s: Any, x: Tensor) -> Tensor:
    parts = [x[:, i] * (i + 1) for i in range(x.shape[1])]
    first, *rest = x.split(2, dim=1)
    total = torch.stack(parts, 1).sum(1, keepdim=True) + sum(part.mean(1, keepdim=True) for part in rest)
    return total * first[:, :1] + len(parts)


def _factories(s: Any, x: Tensor) -> Tensor:
    n, length, width = x.shape
    start = torch.zeros(n, 1, width) + torch.ones(x.size(0), 1, 1) * 0.5
    return torch.cat([start, x, s.table.repeat(n, 1, 1)[:, length:]], 1) + torch.full((n, 1, 1), 0.25)


def _unbound(s: Any, x: Tensor) -> Tensor:
    q, k, v = (x @ s.weight).view(x.shape[0], 6, 3, 8).permute(2, 0, 1, 3).unbind(0)
    a, b, c = (x @ s.weight).view(x.shape[0], 6, 3, 8).permute(2, 0, 1, 3)
    return q * k + v - a * b * c


@pytest.mark.parametrize("body", [_asserts, _loops, _factories, _unbound])
def test_sizes_are_numbers_and_every_batch_is_possible(body: Any) -> None:
    torch.manual_seed(0)
    table = nn.Buffer(torch.randn(1, 9, 8))
    net = model(body, table=table, weight=nn.Parameter(torch.randn(8, 24)))  # type: ignore[arg-type]
    x = torch.randn(4, 6, 8)
    fake = prepare_qat_fx(net, {"": WIDE}, example_inputs=(x[:2],))
    calibrate(fake, [([x], None)])
    assert min(sqnr(outputs(net, (x,)), outputs(fake, (x,)))) > LEAST_WIDE_DB
    program = to_program(fake)
    is_independent_of_the_batch(program, (x,), emulate(program, x))


@pytest.mark.parametrize("lowest", [float("-inf"), -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_a_constant_mask_that_is_added(lowest: float, bias: float) -> None:
    """The other elements of the mask keep their scale, and what is hidden has the probability 0."""
    torch.manual_seed(0)
    mask = torch.triu(torch.full((6, 6), lowest), 1) + bias * torch.randn(6, 6).tril()
    net = model(lambda s, x: (x + mask).softmax(-1), mask=nn.Buffer(mask))  # type: ignore[arg-type]
    x = torch.randn(3, 6, 6) * 2
    fake = prepare_qat_fx(net, {"": WIDE}, example_inputs=(x[:2],))
    calibrate(fake, [([x], None)])
    assert min(sqnr(outputs(net, (x,)), outputs(fake, (x,)))) > LEAST_WIDE_DB
    (got,) = emulate(to_program(fake), x)
    assert (got.triu(1) == 0).all()
    torch.testing.assert_close(got, net(x), rtol=0, atol=1e-3)


def _converts_the_batch(s: Any, x: Tensor) -> Tensor:
    return x.view(int(x.shape[0] * 6 / 3), 3, 8)


def _loops_over_the_batch(s: Any, x: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in x])


def _reads_an_element(s: Any, x: Tensor) -> Tensor:
    return x[:, : int(x[0, 0, 0])]


def _branches(s: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (_converts_the_batch, r"int\(x.shape\[0\].* is 4.0 at batch 2 and 6.0 at batch 3.* a // b in place of int"),
        (_loops_over_the_batch, "one by one along the batch"),
        (_reads_an_element, "element is used as a number.*torch.where"),
        (_branches, "control flow.*torch.where"),
    ],
)
def test_what_only_elements_or_the_batch_tell_is_refused(body: Any, says: str) -> None:
    with pytest.raises(GraphError, match=says) as error:
        trace(model(body), (torch.randn(2, 6, 8),))
    assert error.value.code == "QAT130"
    assert Path(__file__).name in str(error.value)


def test_a_model_that_fails_on_its_example_says_where() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        a, b = (x + torch.ones(5)).chunk(2, 1)
        return a + b

    with pytest.raises(GraphError, match=r"QAT131 test_nets_as_found.py:\d+: fails on the example input"):
        trace(model(body), (torch.randn(2, 6, 8),))
