"""What operators state of the shape of their work agrees with what they state of its amount."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qatlib.compiler import load_target
from qatlib.compiler.job import describe
from qatlib.compiler.placement import time_all
from qatlib.compiler.steps import is_host, order_steps
from qatlib.conversion import to_program
from qatlib.ops.base import BY_KIND
from qatlib.program import Program
from tests.compiler.compiler_nets import Net
from tests.kind_nets import NETS
from tests.models import calibrated


def products(program: Program) -> dict[str, tuple[int, int]]:
    """Of every op that multiplies: products by its shape and by its cost."""
    found = {}
    for op in program:
        work, cost = BY_KIND[op.kind].work(op, program), BY_KIND[op.kind].cost(op, program)
        if work.form == "sums":
            depth = 1 if work.own_channel else work.ifm[2]
            found[op.name] = (work.times * math.prod(work.ofm) * work.taps * depth, cost.macs)
        else:
            assert cost.macs == 0, op.name
    return found


@pytest.mark.parametrize("name", NETS)
def test_the_shape_holds_all_products(name: str) -> None:
    program = NETS[name].program()
    for op, (by_shape, macs) in products(program).items():
        transposed = any(other.name == op and other.kind == "conv_transpose" for other in program)
        assert by_shape >= macs if transposed else by_shape == macs, op  # phases of a kernel need not be equal


@pytest.mark.parametrize("name", NETS)
def test_every_op_takes_time_on_the_larger_target(name: str) -> None:
    program = NETS[name].program()
    steps = order_steps(program)
    job = describe(program, steps, load_target("bayes-like"))
    for step, timings in zip(steps, time_all(job, job.constants, range(len(steps))), strict=True):
        free = is_host(step.op, program) or step.op.kind in ("constant", "reshape")
        assert (sum(timing.cycles for timing in timings) == 0) == free, step.op.name
        assert bool(timings) != free


def test_a_convolution_of_three_axes_and_a_transposed_one() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv3d(2, 4, (3, 3, 5), padding=(1, 1, 2)), nn.ConvTranspose3d(4, 2, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.conv(x))

    program = to_program(calibrated(Volume(), torch.randn(1, 2, 4, 6, 8)))
    conv, up = (op for op in program if op.kind in ("conv", "conv_transpose"))
    work = BY_KIND["conv"].work(conv, program)
    assert (work.ifm, work.ofm, work.kernel) == ((24, 8, 2), (24, 8, 4), (9, 5))
    work = BY_KIND["conv_transpose"].work(up, program)
    # 8 x 12 x 16 outputs of 2 channels, as 24 x 8 outputs of 16: each phase has one tap
    assert (work.ifm, work.ofm, work.taps) == ((24, 8, 4), (24, 8, 16), 1)
    assert all(by_shape == macs for by_shape, macs in products(program).values())


def test_groups_are_repetitions_and_depthwise_is_not() -> None:
    net = Net()
    x = net.input((8, 4, 4))
    groups, own = net.conv(x, 12, groups=2), net.conv(x, 16, groups=8)
    first, second = net.program(groups, own).ops
    program = net.program(groups, own)
    work = BY_KIND["conv"].work(first, program)
    assert (work.ifm[2], work.ofm[2], work.times, work.own_channel) == (4, 6, 2, False)
    work = BY_KIND["conv"].work(second, program)
    assert (work.ifm[2], work.ofm[2], work.times, work.own_channel) == (8, 16, 1, True)
