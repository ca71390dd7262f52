"""Multiply-accumulates, counted by hand and by the Program, and which of them are quantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.fake.coverage import Coverage, mac_coverage
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import QConfig
from qatlib.ops.base import BY_KIND
from tests.models import calibrated, everything, images, model

BY_HAND = {
    "stem": 8 * 16 * 16 * 3 * 9,
    "block.conv": 8 * 16 * 16 * 8 * 9,
    "depthwise": 8 * 16 * 16 * 9,
    "alone": 8 * 16 * 16,
    "hidden": 64 * 400,
    "head": 10 * 64,
}


def test_all_of_it_is_quantized_and_counted_as_the_program_counts() -> None:
    one = calibrated(everything(), images(4))
    seen = mac_coverage(one)
    assert seen.by_op == BY_HAND
    assert (seen.total, seen.quantized, seen.share, seen.float_ops) == (sum(BY_HAND.values()),) * 2 + (1.0, ())
    program = convert_fx(one).program
    costs = {op.name: BY_KIND[op.kind].cost(op, program).macs for op in program}
    assert {name: macs for name, macs in costs.items() if macs} == seen.by_op


def test_hybrid_ops_are_named_the_largest_first() -> None:
    hybrid = {"module_name": ["stem", "block"]}
    seen = mac_coverage(calibrated(everything(), images(4), hybrid=True, hybrid_dict=hybrid))
    assert seen.float_ops == ("block.conv", "stem")
    assert seen.quantized == seen.total - BY_HAND["stem"] - BY_HAND["block.conv"]
    assert str(seen).startswith(f"{seen.share:.2%} of {seen.total:,} multiply-accumulates are quantized")
    assert str(seen).endswith("in float: block.conv, stem")


def test_a_model_of_which_only_a_pool_is_quantized() -> None:
    rules = {"": None, "module_type": {nn.MaxPool2d: QConfig()}}
    seen = mac_coverage(calibrated(everything(), images(4), qconfig_dict=rules, hybrid=True))
    assert (seen.quantized, seen.share, set(seen.float_ops)) == (0, 0.0, set(BY_HAND))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) if x.shape[0] else x


def test_a_module_kept_whole_counts_as_float() -> None:
    source = model(lambda s, x: s.d(s.w(x)), w=Whole(), d=nn.Conv2d(3, 3, 1))
    seen = mac_coverage(calibrated(source, images(2), leaf=("w",)))
    assert seen.by_op == {"w": 9 * 256, "d": 9 * 256}
    assert (seen.float_ops, seen.share) == (("w",), 0.5)


def test_functional_forms_and_groups_and_one_axis() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 2, 5)), nn.Parameter(torch.randn(7, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.conv1d(x, self.a, groups=3).transpose(1, 2), self.b)

    seen = mac_coverage(calibrated(Functional().eval(), torch.randn(4, 6, 12)))
    assert sorted(seen.by_op.values()) == sorted([6 * 8 * 2 * 5, 8 * 7 * 6])
    assert seen.share == 1.0


def test_a_model_that_multiplies_nothing() -> None:
    seen = mac_coverage(calibrated(model(lambda s, x: F.relu(x)), images(2)))
    assert seen == Coverage(0, 0, {}, ())
    assert seen.share == 1.0


def test_counting_leaves_the_observers_alone() -> None:
    one = prepare_qat_fx(everything(), example_inputs=[images(1)])
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    mac_coverage(one)
    assert all(torch.equal(before[name], tensor) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("state", ["calibration", "validation"])
def test_coverage_is_known_before_calibration(state: str) -> None:
    fresh = prepare_qat_fx(everything(), example_inputs=[images(1)])
    assert mac_coverage(fresh if state == "calibration" else calibrated(everything(), images(2))).share == 1.0


def test_interpolation_is_no_multiply_accumulate() -> None:
    net = model(lambda s, x: F.interpolate(s.conv(x), scale_factor=4.0, mode="bilinear"), conv=nn.Conv2d(3, 2, 1))
    coverage = mac_coverage(calibrated(net, images()))
    assert coverage.total == coverage.by_op["conv"] == 3 * 2 * 16 * 16
