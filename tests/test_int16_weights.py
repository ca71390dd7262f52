"""int16 weights: codes, exactness, agreement with fake-quant, and targets that have none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qatlib.analysis.accumulators import SaturationGauge, may_saturate
from qatlib.compiler import check_model, load_target
from qatlib.conversion import to_program
from qatlib.emulator import Emulator, emulate
from qatlib.export import check_onnx, export_onnx
from qatlib.fake.calibrate import calibrate, ranges_on
from qatlib.fake.fake_quant import WeightFakeQuantize
from qatlib.fake.qconfig import QConfig, get_default_qconfig
from qatlib.program import Program
from tests.models import calibrated, images, model
from tests.oracle import run

WIDE = QConfig(weight=replace(QConfig().weight, dtype="int16"))


def net() -> nn.Module:
    torch.manual_seed(0)
    return model(
        lambda s, x: s.head(F.relu(s.conv(x)).flatten(1)), conv=nn.Conv2d(3, 8, 3), head=nn.Linear(8 * 14 * 14, 5)
    )


def converted(qconfig: QConfig) -> Program:
    return to_program(calibrated(net(), images(8), qconfig_dict={"": qconfig}))


def test_int16_weights_have_int16_codes_and_are_exact() -> None:
    program = converted(WIDE)
    weight = program.constant(program.ops[1], "weight")
    assert weight.dtype == torch.int16
    assert int(weight.int().abs().flatten(1).amax(1).min()) >= 32767, "every channel uses its whole range"
    x = images(4, seed=5)
    _, traced = emulate(program, x, trace=True)
    for name, expected in run(program, x.numpy()).items():
        np.testing.assert_array_equal(traced[name].numpy(), expected, err_msg=name)


def test_onnx_runtime_multiplies_by_int16_weights(tmp_path: Path) -> None:
    program, x = converted(WIDE), images(4, seed=5)
    export_onnx(program, tmp_path / "net.onnx")
    assert not any(check_onnx(program, tmp_path / "net.onnx", (x,)).values())


def test_int16_weights_are_closer_to_float() -> None:
    x = images(4, seed=5)
    with torch.no_grad():
        wanted = net()(x)
    wide, narrow = (float((emulate(converted(q), x)[0] - wanted).norm()) for q in (WIDE, QConfig()))
    assert wide < narrow


WIDEST = replace(get_default_qconfig("int16", "min_max"), weight=WIDE.weight)


def wide_net(adds: bool = False) -> nn.Module:
    """Sums far larger than one product: 128 weights of one size."""
    torch.manual_seed(1)
    linear = nn.Linear(128, 6)
    with torch.no_grad():
        linear.weight.copy_(0.1 * (1 + 0.2 * torch.rand(6, 128)))
        linear.weight[1].mul_(1e-3)
        linear.weight[2, ::2].mul_(-1)
    return model(lambda s, x: F.relu(s.linear(x) + x[:, :6] if adds else s.linear(x)) * 1.0, linear=linear)


@pytest.mark.parametrize("adds", [False, True])
def test_sums_of_16_by_16_bits_stay_within_the_accumulator(adds: bool) -> None:
    """A channel's weights get a scale at which the sums of calibration fill half of it; the others keep theirs."""
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) * 2
    net = wide_net(adds)
    fake = calibrated(net, x, qconfig_dict={"": WIDEST})
    program = to_program(fake)
    (op,) = (op for op in program if op.kind == "linear")
    codes = program.constant(op, "weight").double()
    inputs = emulate(program, x, trace=True)[1][op.inputs[0]].double()
    sums = (inputs @ codes.T + program.constant(op, "bias")).abs().amax(0)
    assert float(sums.max()) < 2**30 * 1.001
    assert float(sums[0]) > 2**30 * 0.99, "and not smaller than they have to be"
    with torch.no_grad():
        wanted, results = net(x), (emulate(program, x)[0], fake(x))
    for got in results:
        assert float((got - wanted).abs().max()) < 2e-3 * float(wanted.max())
    own = WeightFakeQuantize(WIDEST.weight).scales(net.linear.weight)
    with_sums = fake.op("linear" if not adds else op.name).weight_scales()
    assert bool((with_sums > own)[[0, 3, 4, 5]].all())
    for name, expected in run(program, x.numpy()).items():
        np.testing.assert_array_equal(emulate(program, x, trace=True)[1][name].numpy(), expected, err_msg=name)


def test_a_second_calibration_forgets_the_first() -> None:
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0))
    fake = calibrated(wide_net(), x * 10, qconfig_dict={"": WIDEST})
    calibrate(fake, [x])
    again = calibrated(wide_net(), x, qconfig_dict={"": WIDEST})
    assert torch.equal(fake.op("linear").weight_scales(), again.op("linear").weight_scales())


def test_a_look_at_other_data_leaves_the_scales() -> None:
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0))
    fake = calibrated(wide_net(), x, qconfig_dict={"": WIDEST})
    before = fake.op("linear").weight_scales()
    ranges_on(fake, [x * 10])
    assert torch.equal(fake.op("linear").weight_scales(), before)


def test_twice_what_calibration_saw_is_no_overflow() -> None:
    """And what all inputs could reach is reported by name, with what they did reach."""
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0))
    program = to_program(calibrated(wide_net(), x, qconfig_dict={"": WIDEST}))
    (op,) = (op for op in program if op.kind == "linear")
    assert may_saturate(op)
    gauge, emulator = SaturationGauge(op, program), Emulator(program)
    emulator.walk(torch.ones(1, 128), visit=lambda one, given, _: gauge.add(given) if one.name == op.name else None)
    assert gauge.result().saturated == 0
    assert 1.7 * 2**30 < gauge.result().largest < 2**31


def test_a_target_without_int16_weights_refuses_them() -> None:
    target = load_target("bayes-like")
    assert check_model(converted(QConfig()), target) == ()
    assert [v.code for v in check_model(converted(WIDE), target)] == ["QAT185", "QAT185"]
    rules = {kind: rule.model_copy(update={"weights": ("int8", "int16")}) for kind, rule in target.ops.items()}
    assert check_model(converted(WIDE), target.model_copy(update={"ops": rules})) == ()
