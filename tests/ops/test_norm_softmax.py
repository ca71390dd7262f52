"""Softmax and the norms: their steps, their formats, how far they are from float, and every step exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.analysis.agreement import gaps
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import GraphError
from qatlib.fake.fake_quant import fake_quantize
from qatlib.fake.prepare import fuse_fx
from qatlib.graph.same import evaluate_graph
from qatlib.program import Program
from tests.models import calibrated, lively, model
from tests.onnx_runtime import assert_same_in_onnx
from tests.ops.reductions import assert_exact, converted, prepared, sqnr_db

generator = torch.Generator().manual_seed(0)
X = torch.randn(8, 12, 64, generator=generator) * 2
IMAGE = torch.randn(4, 8, 6, 6, generator=generator) * 2 + 1


def learned(module: nn.Module) -> nn.Module:
    """Weights and biases that do something."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0 if parameter is module.weight else 0.0, 0.3)
    return nn.Sequential(module)


def of_codes(program: Program, net: nn.Module, *inputs: Tensor) -> Tensor:
    """The float net on the very numbers that the codes of its inputs stand for: its own error without theirs."""
    values = emulate(program, inputs, trace=True)[1]
    names = [f"{name}.quant" for name in program.inputs]
    reals = [values[name].float() * program.values[name].qtype.scale for name in names]
    return net(*reals).detach()


Make = Callable[[], nn.Module]
SOFTMAX = [".max", ".sub", ".exp", ".sum", ".reciprocal", ".mul"]
NORM = [".mean", ".sub", ".square", ".var", ".rsqrt", ".mul"]
CASES: dict[str, tuple[Make, Tensor, list[str]]] = {
    "softmax": (lambda: nn.Sequential(nn.Softmax(-1)), X, SOFTMAX),
    "softmax, other axis": (lambda: model(lambda s, x: F.softmax(x, dim=1)), X, SOFTMAX),
    "softmax method": (lambda: model(lambda s, x: x.softmax(-2)), X, SOFTMAX),
    "softmax, torch": (lambda: model(lambda s, x: torch.softmax(x, 2)), X, SOFTMAX),
    "softmax 2d": (lambda: nn.Sequential(nn.Softmax2d()), IMAGE, SOFTMAX),
    "softmin": (lambda: nn.Sequential(nn.Softmin(-1)), X, [".min", *SOFTMAX[1:]]),
    "log softmax": (
        lambda: model(lambda s, x: F.log_softmax(x, -1)),
        X,
        [".max", ".sub", ".exp", ".sum", ".log", ".out"],
    ),
    "layer norm": (lambda: learned(nn.LayerNorm(64)), X, [*NORM, ".scale", ".shift"]),
    "layer norm, two axes": (lambda: learned(nn.LayerNorm([12, 64])), X, [*NORM, ".scale", ".shift"]),
    "layer norm, no bias": (lambda: learned(nn.LayerNorm(64, bias=False)), X, [*NORM, ".scale"]),
    "layer norm, bare": (lambda: model(lambda s, x: F.layer_norm(x, (64,))), X, NORM),
    "rms norm": (lambda: learned(nn.RMSNorm(64)), X, [".square", ".mean", ".rsqrt", ".mul", ".scale"]),
    "rms norm, functional": (lambda: model(lambda s, x: F.rms_norm(x, [64], eps=1e-5)), X,
                             [".square", ".mean", ".rsqrt", ".mul"]),
    "group norm": (lambda: learned(nn.GroupNorm(4, 8)), IMAGE,
                   [".groups", *NORM, ".channels", ".scale.reshape", ".shift.reshape", ".scale", ".shift"]),
    "group norm, bare": (lambda: model(lambda s, x: F.group_norm(x, 2)), IMAGE, [".groups", *NORM, ".channels"]),
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm2d(8)), IMAGE, NORM),
    "instance norm, affine": (lambda: learned(nn.InstanceNorm2d(8, affine=True)), IMAGE,
                              [*NORM, ".scale.reshape", ".shift.reshape", ".scale", ".shift"]),
    "instance norm, functional": (lambda: model(lambda s, x: F.instance_norm(x)), X, NORM),
    "normalize": (lambda: model(lambda s, x: F.normalize(x, dim=-1)), X, [".square", ".sum", ".rsqrt", ".mul"]),
    "normalize channels": (lambda: model(lambda s, x: F.normalize(x)), IMAGE, [".square", ".sum", ".rsqrt", ".mul"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_float_and_error(name: str) -> None:
    """SQNR without the error of the input's own rounding. int16 in and out: more than 50 dB.

    int8: more than 30 dB for norms. Probabilities, most of them small beside the largest, cannot be told better in 8
    bits (28 dB); so there and elsewhere at most 1.5 dB are lost to rounding the float result to the output's codes.
    """
    make, x, steps = CASES[name]
    net = make().eval()
    graph = fuse_fx(net, (x,))
    found = [node.name for node in graph.nodes if node.composite]
    assert [n[len(found[0].rsplit(steps[0], 1)[0]) :] for n in found] == steps
    torch.testing.assert_close(evaluate_graph(graph, [x])[0], net(x).detach(), rtol=1e-3, atol=1e-4)
    for dtype, least in (("int8", 28 if "soft" in name else 30), ("int16", 50)):
        fake, program = converted(net, x, dtype=dtype)
        assert assert_exact(program, x) <= {"sum", "amax", "amin"}
        wanted = of_codes(program, net, x)
        measured = sqnr_db(wanted, emulate(program, x)[0])
        assert measured > least, f"{dtype}: {measured:.1f} dB"
        out = fake.qtype(fake.graph.outputs[0])
        rounded = fake_quantize(wanted, torch.tensor(out.scale), dtype)
        assert dtype == "int16" or measured > sqnr_db(wanted, rounded) - 1.5
    assert_same_in_onnx(program, x)


@pytest.mark.parametrize(("dtype", "out"), [("int8", "int16"), ("int16", "int8")])
@pytest.mark.parametrize("name", ["softmax", "layer norm", "rms norm", "group norm"])
def test_mixed_formats(name: str, dtype: str, out: str) -> None:
    make, x, _ = CASES[name]
    net = make().eval()
    entry = fuse_fx(net, (x,)).nodes[0].name
    _, program = converted(net, x, dtype=out, **{entry: dtype})
    assert program.values[f"{entry}.quant"].qtype.dtype == dtype
    (last,) = (op.inputs[0] for op in program if op.kind == "dequantize")
    assert program.values[last].qtype.dtype == out
    assert_exact(program, x)
    assert sqnr_db(of_codes(program, net, x), emulate(program, x)[0]) > 30
    assert_same_in_onnx(program, x)


@pytest.mark.parametrize("name", CASES)
def test_fake_quant_against_integers_step_by_step(name: str) -> None:
    """int16 steps differ by at most 1 code, on fewer than 3 %; tables by their stored error and the rounding."""
    make, x, _ = CASES[name]
    fake, program = converted(make().eval(), x, dtype="int8")
    for step, gap in gaps(fake, program, x).items():
        op = next(op for op in program if op.name == step)
        if op.kind == "table":
            assert gap.largest <= op.attrs["table"]["worst_lsb"] + 1, f"{step}: {gap}"
        else:
            wide = program.values[step].qtype.dtype == "int16"
            assert gap.largest <= 1, f"{step}: {gap}"
            assert gap.differing <= max(2, (0.03 if wide else 1e-3) * gap.elements), f"{step}: {gap}"


# -- softmax -----------------------------------------------------------------------------------------------------------


def test_formats_of_the_steps_and_who_changes_them() -> None:
    net = nn.Sequential(nn.Softmax(-1))
    fake = prepared(net, X)
    formats = {name: (fake.dtype(name), fake.qtype(name).scale) for name in ("0.sub", "0.exp")}
    assert formats == {"0.sub": ("int16", 2.0**-11), "0.exp": ("int16", torch.tensor(1 / 32767).item())}
    assert [fake.dtype(f"0.{step}") for step in ("max", "sum", "reciprocal", "mul")] == ["int8", *["int16"] * 2, "int8"]
    changed = prepared(net, X, **{"0__exp": "int8"})
    assert changed.dtype("0.exp") == "int8"
    assert changed.dtype("0.sub") == "int16"


def test_probabilities_sum_to_one() -> None:
    _, program = converted(nn.Sequential(nn.Softmax(-1)), X, dtype="int16")
    total = emulate(program, X)[0].sum(-1)
    assert float((total - 1).abs().max()) < 2e-3


def test_rows_that_calibration_did_not_see() -> None:
    """Scores far apart and equal ones: no step overflows."""
    _, program = converted(nn.Sequential(nn.Softmax(-1)), X, dtype="int16")
    unseen = torch.zeros(2, 12, 64)
    unseen[0, :, 3] = 1e3
    got = emulate(program, unseen)[0]
    assert float(got[0, :, 3].min()) > 0.5
    assert float(got[0, :, 4:].max()) < 1e-3
    assert float((got[1] - got[1, 0, 0]).abs().max()) == 0


MASK = torch.ones(12, 12).tril().logical_not() * -1e4


class Scores(nn.Module):
    """Attention scores with a mask of -1e4 added, as many models write it."""

    def __init__(self, also: bool = False, reshaped: bool = False) -> None:
        super().__init__()
        self.also, self.reshaped = also, reshaped
        self.register_buffer("mask", MASK)

    def forward(self, x: Tensor) -> Any:
        scores = x @ x.transpose(1, 2) / 8 + self.mask
        if self.reshaped:
            scores = scores.view(-1, 1, 12, 12)
        return (scores.softmax(-1), scores) if self.also else scores.softmax(-1)


@pytest.mark.parametrize("reshaped", [False, True])
def test_masks_leave_the_codes_to_the_scores(reshaped: bool) -> None:
    net = Scores(reshaped=reshaped).eval()
    graph = fuse_fx(net, (X,))
    (node,) = (node for node in graph.nodes if node.op == "add")
    assert node.attrs["below_maximum"] == [-1, 16.0, -5e3]
    fake, program = converted(net, X, dtype="int16")
    largest = float((X @ X.transpose(1, 2) / 8).abs().max())
    assert fake.qtype("add").scale < 2 * (largest + 16) / 65535 * 1.01
    assert sqnr_db(net(X), emulate(program, X)[0]) > 45
    assert float(emulate(program, X)[0].reshape(-1, 12, 12)[:, MASK < 0].abs().max()) == 0


def test_a_range_that_others_read_stays() -> None:
    graph = fuse_fx(Scores(also=True).eval(), (X,))
    assert all("below_maximum" not in node.attrs for node in graph.nodes)


# -- norms -------------------------------------------------------------------------------------------------------------


def test_weights_of_a_norm_train() -> None:
    fake = prepared(learned(nn.LayerNorm(64)), X)
    fake(X).square().sum().backward()
    for name in ("0.weight", "0.bias"):
        gradient = fake.op(name).value.grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0


def test_a_row_without_variance() -> None:
    """The table of rsqrt covers every variance from 0 on, seen or not: eps keeps it finite."""
    _, program = converted(nn.Sequential(nn.LayerNorm(64)), X)
    flat = torch.full((2, 12, 64), 0.3)
    assert float(emulate(program, flat)[0].abs().max()) < 0.1


@pytest.mark.parametrize(("outlier", "least"), [(1, 50), (30, 30)])
def test_a_channel_far_out(outlier: int, least: int) -> None:
    """Transformers have a few channels many times larger than the rest. The squares of the rest then have few codes."""
    x = X.clone()
    x[..., 5] *= outlier
    net = nn.Sequential(nn.LayerNorm(64)).eval()
    _, program = converted(net, x, dtype="int16")
    assert sqnr_db(of_codes(program, net, x), emulate(program, x)[0]) > least


def test_batch_norm_on_its_own() -> None:
    """Over [batch, channels] without a linear layer before it: one requantization, bits moved around it."""
    net = lively(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())).eval()
    x = torch.randn(64, 6)
    fake = calibrated(net, x)
    program = to_program(fake)
    assert [op.kind for op in program if op.kind not in ("quantize", "dequantize")] == [
        "reshape",
        "conv",
        "reshape",
        "clamp",
    ]
    assert sqnr_db(net(x).detach(), emulate(program, x)[0]) > 30
    assert fake.op("0.conv").weight.requires_grad


REFUSED: dict[str, tuple[Any, Tensor, str]] = {
    "softmax over the batch": (lambda s, x: x.softmax(0), X, "batch"),
    "implicit softmax over the batch": (lambda s, x: F.softmax(x), X, "batch"),
    "running statistics": (lambda s, x: F.instance_norm(x, torch.zeros(12), torch.ones(12), use_input_stats=False), X,
                           "running statistics"),
    "p = 1": (lambda s, x: F.normalize(x, p=1), X, "p = 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_are_refused(name: str) -> None:
    body, x, seen = REFUSED[name]
    with pytest.raises(GraphError) as caught:
        fuse_fx(model(body), (x,))
    assert caught.value.code == "QAT134"
    assert seen in caught.value.seen


def test_local_response_norm_has_no_integer_form() -> None:
    with pytest.raises(GraphError) as caught:
        fuse_fx(nn.Sequential(nn.LocalResponseNorm(2)), (IMAGE,))
    assert caught.value.code in ("QAT130", "QAT132")
