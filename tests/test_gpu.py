"""The same integers on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatlib import calibrate, convert_fx, prepare_qat_fx
from qatlib.emulator import Emulator
from qatlib.program import Program
from tests.kind_nets import NETS
from tests.models import everything, images
from tests.nets import random_net
from tests.strategies import KINDS, cases
from tests.test_random_nets import converted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def assert_equal_on_both(program: Program, inputs: Sequence[Tensor]) -> None:
    there = Emulator(program, "cuda").trace(*inputs)
    for name, here in Emulator(program).trace(*inputs).items():
        assert torch.equal(here, there[name].cpu()), name


def test_every_value_equals_the_cpu() -> None:
    net, batch = everything(), images(8)
    model = prepare_qat_fx(net, example_inputs=[batch])
    calibrate(model, [batch])
    assert_equal_on_both(convert_fx(model).program, [batch])


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_op_equals_the_cpu(name: str) -> None:
    assert_equal_on_both(NETS[name].program(), NETS[name].inputs)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_net_equals_the_cpu(seed: int) -> None:
    net = random_net(seed)
    assert_equal_on_both(converted(net), net.batch(3, 4, reach=1.5))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_generated_ops_equal_the_cpu(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    assert_equal_on_both(case.program, [torch.from_numpy(x) for x in case.inputs])


def test_calibration_runs_on_the_device() -> None:
    net, batch = everything().cuda(), images(8).cuda()
    model = prepare_qat_fx(net, example_inputs=[batch])
    calibrate(model, [batch], "cuda")
    assert all(q.scale.is_cuda for _, op in model.ops() if (q := op.activation_post_process))
