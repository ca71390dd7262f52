"""The same integers on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qatlib import (
    bisect_conversion,
    calibrate,
    convert_fx,
    featuremap_similarity,
    find_bad_case,
    prepare_qat_fx,
    sensitivity,
    step_quantization,
)
from qatlib.analysis.records import Mode
from qatlib.emulator import Emulator
from qatlib.fake.exact import ExactForward
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.qconfig import FakeQuantSpec, Kind, QConfig
from qatlib.fake.state import FakeQuantState
from qatlib.integer import power_of_two
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


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-1022, 1024)
    assert torch.equal(power_of_two(exponents.cuda()).cpu(), power_of_two(exponents))


def test_wide_convolutions_equal_the_cpu() -> None:
    """Of the sizes for which cuDNN leaves plain sums of products: 3×3 with many channels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
    x = torch.randn(4, 32, 28, 28)
    model = prepare_qat_fx(net.eval(), example_inputs=[x])
    calibrate(model, [x])
    assert_equal_on_both(convert_fx(model).program, [x])


@pytest.mark.parametrize("kind", ["moving_average", "lsq", "pact", "tqt"])
def test_a_step_of_training_is_that_of_the_cpu(kind: Kind) -> None:
    """Loss and gradients of one step, nearly: a value beside a half may fall on either side."""
    spec, found = FakeQuantSpec(kind=kind), {}
    for device in ("cpu", "cuda"):
        net, x = everything().to(device), images(8).to(device)
        rule: Kind = "moving_average" if kind == "pact" else kind
        model = prepare_qat_fx(net, QConfig(spec, FakeQuantSpec(method="min_max", kind=rule)), example_inputs=[x])
        calibrate(model, [x], device)
        set_fake_quantize(model.train(), FakeQuantState.QAT)
        loss = torch.cat([out.flatten() for out in _tensors(model(x))]).square().mean()
        loss.backward()
        found[device] = (
            loss.detach().cpu(),
            {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None},
        )
    (loss, gradients), (there, others) = found.values()
    assert float(there) == pytest.approx(float(loss), rel=2e-2)
    assert gradients.keys() == others.keys()
    whole, other = (torch.cat([g.flatten() for g in side.values()]) for side in (gradients, others))
    assert float((whole - other).norm()) <= 0.05 * float(whole.norm())


def test_the_exact_forward_gives_the_integers_of_the_program() -> None:
    net, x = everything().cuda(), images(8).cuda()
    model = prepare_qat_fx(net, example_inputs=[x])
    calibrate(model, [x], "cuda")
    exact = _tensors(ExactForward(model)(x))
    for ours, theirs in zip(exact, _tensors(convert_fx(model)(x.cpu())), strict=True):
        assert torch.equal(ours.detach().cpu(), theirs)


def test_analysis_of_models_there_takes_data_from_the_cpu() -> None:
    net, x, found = everything(), images(8), {}
    for device in ("cpu", "cuda"):
        model = prepare_qat_fx(net.to(device), example_inputs=[x.to(device)])
        calibrate(model, [x], device)
        integer = convert_fx(model)
        pairs: dict[Mode, tuple[Any, Any]] = {"FvsQ": (net, model), "QvsQ": (model, integer)}
        rows = [r for mode, (one, two) in pairs.items() for r in featuremap_similarity(one, two, x, mode=mode).rows]
        found[device] = {
            "cosines": [r.similarity for r in rows if r.similarity is not None],
            "worst": find_bad_case(*pairs["FvsQ"], [(x,)]).worst[0].sqnr_db,
            "whole": sensitivity(model, [(x,)], kinds=["on"]).whole.sqnr_db,
            "last": step_quantization(model, [(x,)]).steps[-1].first.sqnr_db,
            "conversion": len(bisect_conversion(model, integer, [(x,)]).trials),
        }
    for name, here in found["cpu"].items():
        assert found["cuda"][name] == pytest.approx(here, rel=0.02), name


def _tensors(out: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)
