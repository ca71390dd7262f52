"""Each reason to refuse an op, by its code; the host's ops are not refused."""

from __future__ import annotations

import pytest

from qatlib.compiler import check_model, compile_model
from qatlib.errors import CompileError
from tests.compiler.compiler_nets import Net, residual, tiny


def codes(net: Net, output: str, changes: dict[str, object] | None = None) -> list[tuple[str, str]]:
    return [(v.code, v.op) for v in check_model(net.program(output), tiny(changes))]


def test_a_legal_program_with_host_ops_passes() -> None:
    assert check_model(residual()[1], tiny()) == ()


def test_unsupported_kind() -> None:
    net = Net()
    y = net.clamp(net.input((4, 8, 8)))
    assert codes(net, y) == []
    assert codes(net, y, {"ops.clamp": None}) == [("QAT184", y)]
    (violation,) = check_model(net.program(y), tiny({"ops.clamp": None}))
    assert "has no 'clamp'" in violation.seen
    assert "avg_pool" in violation.fix


def test_input_and_output_dtype() -> None:
    net = Net()
    y = net.conv(net.input((4, 8, 8), "int16"), 4, dtype="int16")
    only8 = {"ops.conv": {"inputs": ["int8"], "outputs": ["int8", "int32"]}}
    found = check_model(net.program(y), tiny(only8))
    assert [v.code for v in found] == ["QAT185", "QAT185"]
    assert "reads 'in0' as int16" in found[0].seen
    assert "writes int16" in found[1].seen
    assert [v.fix for v in found] == ["Make it int8 in qconfig"] * 2


def test_mac_array_without_a_rate_for_the_activations() -> None:
    net = Net()
    y = net.conv(net.input((4, 8, 8), "int16"), 4)
    assert codes(net, y) == []
    assert codes(net, y, {"mac_array.int16": None}) == [("QAT185", y)]


@pytest.mark.parametrize(
    ("limit", "most", "says"),
    [
        ("max_kernel", 4, "kernel 5x5 exceeds 4"),
        ("max_stride", 1, "stride 2x2 exceeds 1"),
        ("max_channels", 11, "channels 6x12 exceeds 11"),
        ("max_spatial_axes", 1, "number of spatial axes 2 exceeds 1"),
    ],
)
def test_size_limits_of_a_convolution(limit: str, most: int, says: str) -> None:
    net = Net()
    y = net.conv(net.input((6, 8, 8)), 12, kernel=5, stride=2)
    assert codes(net, y, {f"ops.conv.{limit}": most + 1}) == []
    (violation,) = check_model(net.program(y), tiny({f"ops.conv.{limit}": most}))
    assert violation.code == "QAT186"
    assert says in violation.seen
    assert str(most) in violation.fix


def test_channels_of_all_groups_count() -> None:
    net = Net()
    y = net.conv(net.input((12, 4, 4)), 6, groups=6)
    (violation,) = check_model(net.program(y), tiny({"ops.conv.max_channels": 11}))
    assert "channels 12x6 exceeds 11" in violation.seen


def test_size_limits_of_pools() -> None:
    net = Net()
    x = net.input((4, 7, 8))
    y = net.pool("max_pool", x, 4)
    assert codes(net, y, {"ops.max_pool.max_kernel": 3}) == [("QAT186", y)]
    assert codes(net, y, {"ops.max_pool.max_channels": 3}) == [("QAT186", y)]
    adaptive = net._rescaled("adaptive_avg_pool", [x], (-1, 4, 3, 3), "int8", {"output_size": [3, 3]}, 1, 1)
    # 7 -> 3: windows [0, 3), [2, 5), [4, 7); 8 -> 3: [0, 3), [2, 6), [5, 8)
    (violation,) = check_model(net.program(y, adaptive), tiny({"ops.adaptive_avg_pool.max_kernel": 3}))
    assert "kernel 3x4 exceeds 3" in violation.seen


def test_float_islands_and_boundaries_in_the_middle() -> None:
    net = Net()
    x = net.input((4, 8, 8))
    island = net.op("float_op", [x], net.shape(x), "int8", {"operator": "softmax", "attrs": {}})
    middle = net.dequantize(island)
    y = net.quantize(middle)
    found = check_model(net.program(net.clamp(y)), tiny())
    assert [(v.code, v.op) for v in found] == [("QAT187", island), ("QAT187", middle), ("QAT187", y)]
    assert "'softmax' runs in float" in found[0].seen
    assert "qat.hybrid" in found[0].fix
    assert "convert.preserve" in found[0].fix


def test_multiplier_wider_than_the_target() -> None:
    net = Net()
    y = net.conv(net.input((4, 8, 8)), 4, bits=20)
    assert codes(net, y, {"multiplier_bits": 20}) == []
    (violation,) = check_model(net.program(y), tiny({"multiplier_bits": 16}))
    assert violation.code == "QAT188"
    assert "multiplier of 20 bits" in violation.seen
    assert violation.fix == "Convert with multiplier_bits 16"


def test_compile_lists_every_violation() -> None:
    net = Net()
    y = net.clamp(net.conv(net.input((6, 8, 8)), 12, kernel=5))
    target = tiny({"ops.conv.max_kernel": 3, "ops.clamp": None, "multiplier_bits": 8})
    with pytest.raises(CompileError) as caught:
        compile_model(net.program(y), target)
    assert caught.value.code == "QAT186"
    assert "3 violations" in str(caught.value)
    for violation in check_model(net.program(y), target):
        assert str(violation) in str(caught.value)
