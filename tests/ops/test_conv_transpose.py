"""Transposed convolution: against torch in float64, against fake-quant, and every fused form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import to_program
from qatlib.emulator import Emulator, emulate
from qatlib.export import check_onnx, export_onnx, measure_distance
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.graph.same import evaluate_graph
from qatlib.graph.trace import trace
from qatlib.integer import exact_kernels
from qatlib.ops.base import BY_KIND
from qatlib.program import Op
from tests.models import calibrated, model
from tests.ops.agreement import assert_agree

LAYERS = {
    "1-d": (nn.ConvTranspose1d(4, 6, 5, 3, 2, 1), (9,)),
    "plain": (nn.ConvTranspose2d(4, 6, 3), (5, 6)),
    "upsampling": (nn.ConvTranspose2d(4, 6, 4, 2, 1), (5, 6)),
    "output padding": (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), (5, 6)),
    "grouped": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), (5, 6)),
    "depthwise": (nn.ConvTranspose2d(4, 4, 3, 2, groups=4), (5, 6)),
    "kernel below stride": (nn.ConvTranspose2d(4, 6, 2, 3, output_padding=(2, 0)), (5, 6)),
    "dilated": (nn.ConvTranspose2d(4, 6, 3, (2, 3), (1, 0), dilation=(3, 2)), (5, 6)),
    "cut deeply": (nn.ConvTranspose2d(4, 6, 3, 1, 2), (5, 6)),
    "even dilation and stride": (nn.ConvTranspose2d(4, 6, 3, 2, dilation=2), (5, 6)),
    "3-d": (nn.ConvTranspose3d(2, 3, (2, 3, 2), (1, 2, 2), (0, 1, 0)), (3, 4, 3)),
}


@pytest.mark.parametrize(("layer", "size"), LAYERS.values(), ids=LAYERS.keys())
def test_trace_and_kernel_equal_torch(layer: nn.Module, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randint(-128, 128, (2, layer.in_channels, *size)).float()
    graph = trace(model(lambda s, x: s.up(x), up=layer), (x,))
    with torch.no_grad():
        (got,) = evaluate_graph(graph, (x,))
        torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-3)
    node = graph.by_name()["up"]
    weight = torch.randint(-128, 128, node.params["weight"].shape).double()
    operator = BY_KIND["conv_transpose"]
    with exact_kernels():
        product = operator.product(Op("conv_transpose", "y", ("x",), node.attrs))  # type: ignore[attr-defined]
        got = product(x.double(), weight, None)
        wanted = operator.float_product(node.attrs, x.double(), weight, None)  # type: ignore[attr-defined]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(("layer", "size"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_onnx_runtime_computes_the_same(layer: nn.Module, size: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    x = torch.randn(2, layer.in_channels, *size)
    net = model(lambda s, x: F.relu(s.up(x)), up=layer)
    program = to_program(calibrated(net, x, qconfig_dict={"": get_default_qconfig(dtype)}))
    export_onnx(program, tmp_path / "net.onnx")
    assert not any(check_onnx(program, tmp_path / "net.onnx", (x,)).values())
    export_onnx(program, tmp_path / "qdq.onnx", flavour="qdq")
    assert all(far.largest_lsb <= 2 for far in measure_distance(program, tmp_path / "qdq.onnx", (x,)).values())


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_fused_forms_agree_with_fake_quant(dtype: str) -> None:
    torch.manual_seed(0)

    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = F.relu6(s.bn(s.up(x)))
        return s.head(s.again(y) + y)

    net = model(
        body, up=nn.ConvTranspose2d(3, 8, 4, 2, 1, bias=False), bn=nn.BatchNorm2d(8),
        again=nn.ConvTranspose2d(8, 8, 3, 1, 1), head=nn.ConvTranspose2d(8, 2, 2, 2),
    )  # fmt: skip
    x = torch.randn(48, 3, 12, 12)
    fake = calibrated(net, x, qconfig_dict={"": get_default_qconfig(dtype)})
    program = to_program(fake)
    assert [(op.kind, len(op.inputs)) for op in program][1:4] == [("conv_transpose", n) for n in (1, 2, 1)]
    assert program.values["head"].qtype.dtype == "int32"
    if dtype == "int8":
        assert_agree(fake, program, x)
    with torch.no_grad():
        wanted = net(x)
    (out,) = emulate(program, x)
    assert float((out - wanted).norm() / wanted.norm()) < (0.05 if dtype == "int8" else 0.01)


@pytest.mark.parametrize(("dtype", "kernel", "route"), [
    ("int8", 3, "float32-split"),
    ("int16", 3, "float32-bytes"),
    ("int16", 1, "float64"),
])  # fmt: skip
def test_routes_above_the_float32_bound_are_exact(dtype: str, kernel: int, route: str) -> None:
    layer = nn.ConvTranspose2d(600, 2, kernel, 2, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    x = torch.full((1, 600, 3, 3), 2.0)
    fake = calibrated(model(lambda s, x: s.up(x), up=layer), x, qconfig_dict={"": get_default_qconfig(dtype)})
    program = to_program(fake)
    assert Emulator(program).routes["up"] == route
    top = 127 if dtype == "int8" else 32767
    taps = 4 if kernel == 3 else 1  # windows of stride 2 overlap
    _, traced = emulate(program, x, trace=True)
    assert int(traced["up"].max()) == min(600 * 127 * top * taps, 2**31 - 1)


def test_a_shared_layer_keeps_one_weight() -> None:
    net = model(lambda s, x: s.up(s.up(x)), up=nn.ConvTranspose2d(3, 3, 2))
    fake = calibrated(net, torch.randn(2, 3, 4, 4))
    assert fake.op("up").weight is fake.op("up#1").weight
    assert fake.op("up").weight.requires_grad
