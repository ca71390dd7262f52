"""Constants of the Program against the formulas of ``docs/numerics.md``, computed here by hand."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import to_program
from qatlib.errors import ProgramError, QConfigError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.fake.stubs import DeQuantStub, QuantStub
from qatlib.program import Op, Program
from tests.models import calibrated, images, lively, model
from tests.oracle import bias_codes, clamp_codes, factor

MIN_MAX = QConfig(FakeQuantSpec(method="min_max"))


def lowered(net: nn.Module, *inputs: Tensor, bits: int = 20) -> tuple[FakeQuantModel, Program, dict[str, Op]]:
    fake = calibrated(net, *inputs, qconfig_dict=MIN_MAX)
    program = to_program(fake, multiplier_bits=bits)
    return fake, program, {op.name: op for op in program}


def scale(program: Program, name: str) -> float:
    found = program.values[name].qtype.scale
    assert found is not None
    return found


def weight_codes(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and float32 scales per channel, in NumPy."""
    w = weight.detach().numpy()
    s = np.array([np.float32(np.float64(abs(row).max()) * 2 / 255) for row in w], np.float32)
    return np.clip(np.rint(w / s.reshape(-1, *[1] * (w.ndim - 1))), -128, 127).astype(np.int64), s


def addend_factors(r1: float, r2: float, bits: int) -> tuple[int, int, int]:
    """Section 4, "Factors of an addend", in rationals."""
    _, n = factor(r1, bits)
    while n > 0 and Fraction(r2) * 2**n >= 2**31 - Fraction(1, 2):
        n -= 1
    exact = Fraction(r2) * 2**n
    step = 1
    while exact / step >= 2**bits - Fraction(1, 2):
        step *= 2
    m2 = round(exact / step) * step
    return round(Fraction(r1) * 2**n), m2 if m2 < 2**31 else (2**bits - 1) * step // 2, n


@pytest.mark.parametrize("bits", [8, 20, 21])
def test_a_convolution_with_relu6(bits: int) -> None:
    torch.manual_seed(0)
    x = images(2)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=(1, 0), groups=1)
    tail = nn.Conv2d(5, 2, 1)
    _, program, ops = lowered(model(lambda s, x: s.t(F.relu6(s.c(x))), c=conv, t=tail), x, bits=bits)
    op = ops["c"]
    s_x, s_y = scale(program, "x.quant"), scale(program, "c")
    assert s_x == float(np.float32(float(x.abs().max()) * 2 / 255))
    codes, s_w = weight_codes(conv.weight)
    np.testing.assert_array_equal(program.constant(op, "weight"), codes)
    assert program.constant(op, "weight").dtype == torch.int8
    bias = [bias_codes(float(b), s_x, float(s)) for b, s in zip(conv.bias.tolist(), s_w, strict=True)]
    assert program.constant(op, "bias").tolist() == bias
    solved = [factor(s_x * float(s) / s_y, bits) for s in s_w]
    assert (
        list(zip(program.constant(op, "multiplier").tolist(), program.constant(op, "shift").tolist(), strict=True))
        == solved
    )
    assert (op.attrs["lo"], op.attrs["hi"]) == clamp_codes(0.0, 6.0, s_y, -128, 127)
    largest = [int(abs(w).sum()) * 128 + abs(b) for w, b in zip(codes, bias, strict=True)]
    assert op.attrs["acc_bound"] == max(largest)
    assert op.attrs["stride"] == [2, 2]
    assert op.attrs["padding"] == [[1, 1], [0, 0]]


def test_the_output_layer_shows_its_accumulator() -> None:
    x = torch.randn(4, 6)
    layer = nn.Linear(6, 3)
    _, program, ops = lowered(model(lambda s, x: s.l(x), l=layer), x)
    assert set(ops["l"].attrs) == {"acc_bound"}
    assert set(ops["l"].consts) == {"weight", "bias"}
    _, s_w = weight_codes(layer.weight)
    wanted = np.array([np.float32(scale(program, "x.quant") * float(s)) for s in s_w])
    np.testing.assert_array_equal(program.constant(ops["l.dequant"], "scale"), wanted)


def test_the_scale_of_an_output_convolution_broadcasts_over_channels() -> None:
    _, program, ops = lowered(model(lambda s, x: s.c(x), c=nn.Conv2d(3, 4, 1)), images(2))
    assert program.constant(ops["c.dequant"], "scale").shape == (4, 1, 1)


def test_the_range_of_codes_after_relu_tightens_the_bound() -> None:
    net = model(lambda s, x: s.d(F.relu(s.c(x))), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1, bias=False))
    _, _, ops = lowered(net, images(2))
    codes, _ = weight_codes(net.d.weight)
    assert ops["d"].attrs["acc_bound"] == max(int(abs(row).sum()) for row in codes) * 127


@pytest.mark.parametrize("gain", [1e-3, 0.1, 1.0, 300.0])
def test_an_addend_in_the_accumulator(gain: float) -> None:
    torch.manual_seed(1)
    x = images(2, 4, 6)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(gain * torch.logspace(-2, 0, 4).view(-1, 1, 1, 1))
    net = model(lambda s, x: s.t(s.c(x) + F.max_pool2d(x, 1)), c=conv, t=nn.Conv2d(4, 2, 1))
    _, program, ops = lowered(net, x)
    op = ops["c"]
    _, s_w = weight_codes(conv.weight)
    s_x, s_y = scale(program, "x.quant"), scale(program, "c")
    wanted = [addend_factors(s_x * float(s) / s_y, s_x / s_y, 20) for s in s_w]
    columns = [program.constant(op, role).tolist() for role in ("multiplier", "addend_multiplier", "shift")]
    assert list(zip(*columns, strict=True)) == wanted


def test_add_of_two_activations() -> None:
    net = model(lambda s, x: s.t(F.relu(F.avg_pool2d(x, 1) + F.max_pool2d(x, 1))), t=nn.Conv2d(3, 2, 1))
    _, program, ops = lowered(net, images(2))
    op, s_y = ops["add"], scale(program, "add")
    ratios = [scale(program, name) / s_y for name in op.inputs]
    _, shift = factor(max(ratios), 20)
    assert program.constant(op, "shift").tolist() == [shift]
    assert program.constant(op, "multiplier").tolist() == [round(Fraction(r) * 2**shift) for r in ratios]
    assert (op.attrs["lo"], op.attrs["hi"]) == (0, 127)


def test_cat() -> None:
    x = images(2)
    net = model(lambda s, x: s.t(torch.cat([x, F.avg_pool2d(x, 1)], -3)), t=nn.Conv2d(6, 2, 1))
    _, program, ops = lowered(net, x)
    op = ops["cat"]
    ratios = [scale(program, name) / scale(program, "cat") for name in op.inputs]
    solved = list(zip(program.constant(op, "multiplier").tolist(), program.constant(op, "shift").tolist(), strict=True))
    assert solved == [factor(r, 20) for r in ratios]
    assert ratios[0] == 1.0
    assert solved[0] == (2**19, 19)
    assert op.attrs["axis"] == 1


POOLS: dict[str, tuple[nn.Module, list[list[int]]]] = {
    "one divisor": (nn.AvgPool2d(2), [[4]]),
    "padding counted": (nn.AvgPool2d(3, 2, 1), [[9]]),
    "padding not counted": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), [[4, 6, 6], [6, 9, 9], [6, 9, 9]]),
    "hanging over the edge": (nn.AvgPool2d(4, 3, ceil_mode=True), [[16, 12], [12, 9]]),
    "adaptive, even": (nn.AdaptiveAvgPool2d(3), [[4]]),
    "adaptive, uneven": (nn.AdaptiveAvgPool2d((2, 4)), [[6, 6, 6, 6], [6, 6, 6, 6]]),
    "adaptive, sizes differ": (nn.AdaptiveAvgPool2d((1, 5)), [[12, 12, 12, 12, 12]]),
    "own divisor": (nn.AvgPool2d(2, divisor_override=5), [[5]]),
}


@pytest.mark.parametrize(("pool", "counts"), POOLS.values(), ids=POOLS.keys())
def test_mean_pools(pool: nn.Module, counts: list[list[int]]) -> None:
    _, program, ops = lowered(model(lambda s, x: s.t(s.p(x)), p=pool, t=nn.Conv2d(3, 2, 1)), images(2, size=6))
    op = ops["p"]
    s_x, s_y = scale(program, "x.quant"), scale(program, "p")
    wanted = np.array([[factor(s_x / (s_y * n), 20) for n in row] for row in counts])
    if len(set(np.ravel(counts).tolist())) == 1:
        wanted = wanted[0, :1]
    np.testing.assert_array_equal(program.constant(op, "multiplier"), wanted[..., 0])
    np.testing.assert_array_equal(program.constant(op, "shift"), wanted[..., 1])


def test_uneven_windows_of_adaptive_pooling() -> None:
    net = model(lambda s, x: s.t(s.p(x)), p=nn.AdaptiveAvgPool2d((4, 5)), t=nn.Conv2d(3, 2, 1))
    _, program, ops = lowered(net, images(2, size=7))
    rows, columns = [2, 3, 3, 2], [2, 2, 3, 2, 2]
    s_x, s_y = scale(program, "x.quant"), scale(program, "p")
    wanted = [[factor(s_x / (s_y * a * b), 20)[0] for b in columns] for a in rows]
    assert program.constant(ops["p"], "multiplier").tolist() == wanted


CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "relu": (F.relu, (0.0, float("inf"))),
    "relu6": (F.relu6, (0.0, 6.0)),
    "clamp": (lambda x: x.clamp(-0.3, 0.7), (-0.3, 0.7)),
    "one side": (lambda x: x.clamp(max=0.21), (-float("inf"), 0.21)),
    "outside": (lambda x: x.clamp(-900.0, 900.0), (-900.0, 900.0)),
}


@pytest.mark.parametrize(("clamp", "bounds"), CLAMPS.values(), ids=CLAMPS.keys())
def test_clamps_alone_keep_the_scale(clamp: Callable[[Tensor], Tensor], bounds: tuple[float, float]) -> None:
    _, program, _ = lowered(model(lambda s, x: s.t(clamp(x)), t=nn.Conv2d(3, 2, 1)), images(2) * 3)
    op = program.ops[1]
    assert op.kind == "clamp"
    assert scale(program, op.name) == scale(program, "x.quant")
    assert (op.attrs["lo"], op.attrs["hi"]) == clamp_codes(*bounds, scale(program, "x.quant"), -128, 127)


def test_scale_preserving_operators() -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = F.max_pool2d(x, 3, 2, 1, ceil_mode=True).permute(0, 2, 3, 1)
        return s.t(y.flatten(1))

    _, program, ops = lowered(model(body, t=nn.Linear(3 * 25, 2)), images(2, size=8))
    assert {program.values[name].qtype for name in ("max_pool2d", "permute", "flatten")} == {
        program.values["x.quant"].qtype
    }
    assert ops["max_pool2d"].attrs["padding"] == [[1, 2], [1, 2]], "ceil mode is padding after the last element"
    assert ops["flatten"].attrs["shape"] == [-1, 75]
    assert ops["permute"].attrs["dims"] == [0, 2, 3, 1]


def test_a_bias_beyond_int32_raises_the_scale_of_its_weights() -> None:
    net = model(lambda s, x: s.t(x), t=nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        net.t.bias.copy_(torch.tensor([1e9, -1e9]))
    _, program, ops = lowered(net, images(2) * 1e-6)
    assert [abs(abs(code) - 2**30) <= 2**7 for code in program.constant(ops["t"], "bias").tolist()] == [True, True]
    assert ops["t"].attrs["acc_bound"] < 2**31


def test_a_dead_channel() -> None:
    net = model(lambda s, x: s.u(s.t(x)), t=nn.Conv2d(3, 2, 1), u=nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        net.t.weight[1] = 0
    fake, program, ops = lowered(net, images(2))
    assert program.constant(ops["t"], "weight")[1].abs().max() == 0
    s_x, s_y = scale(program, "x.quant"), scale(program, "t")
    assert program.constant(ops["t"], "bias")[1] == bias_codes(net.t.bias[1].item(), s_x, 2.0**-24)
    assert program.constant(ops["t"], "multiplier")[1] == factor(s_x * 2.0**-24 / s_y, 20)[0]
    assert fake.state.quantizes


def test_a_ratio_that_no_shift_expresses_names_the_op() -> None:
    net = model(lambda s, x: s.t(s.pool(x)), pool=nn.AvgPool2d(2), t=nn.Conv2d(3, 2, 1))
    rules = {"": MIN_MAX, "module_name": {"pool": MIN_MAX.with_activation(scale=1e30)}}
    with pytest.raises(ProgramError, match="QAT171 pool"):
        to_program(calibrated(net, images(2), qconfig_dict=rules))


def test_weights_that_are_not_finite_name_the_channel() -> None:
    fake = calibrated(model(lambda s, x: s.t(x), t=nn.Conv2d(3, 2, 1)), images(2))
    with torch.no_grad():
        fake.op("t").weight[1, 0] = float("nan")
    with pytest.raises(QConfigError, match="QAT140 t weight of channel 1"):
        to_program(fake)


def test_folded_batch_norm_reaches_the_codes() -> None:
    torch.manual_seed(2)
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    net = model(lambda s, x: s.b(s.c(x)), c=conv, b=norm)
    lively(net)
    _, program, ops = lowered(net, images(2))
    gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    codes, s_w = weight_codes((conv.weight.detach().double() * gain.view(-1, 1, 1, 1)).float())
    assert abs(program.constant(ops["c"], "weight").numpy() - codes).max() <= 1
    offset = norm.bias.detach().double() - norm.running_mean.double() * gain
    wanted = [round(float(b) / (scale(program, "x.quant") * float(s))) for b, s in zip(offset, s_w, strict=True)]
    np.testing.assert_allclose(program.constant(ops["c"], "bias").tolist(), wanted, atol=1)


def test_fixed_scales_and_stubs() -> None:
    net = model(lambda s, x: s.out(s.t(s.q(x))), q=QuantStub(1 / 128), t=nn.Conv2d(3, 2, 1), out=DeQuantStub())
    _, program, _ = lowered(net, images(2))
    assert scale(program, "q") == 1 / 128
    assert [op.kind for op in program] == ["quantize", "conv", "dequantize"]
    assert program.outputs == ("out",)
