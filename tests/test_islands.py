"""Float islands of every kind of operator: hybrid before calibration, preserve at convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from qatlib.compiler import check_model
from qatlib.compiler.target import load_target
from qatlib.conversion import convert_fx, to_program
from qatlib.emulator import Emulator, emulate
from qatlib.errors import ProgramError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel, set_preserve_qat_mode
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.program import Program
from tests.kind_nets import INT16, NETS, Net
from tests.models import calibrated, model

BOUNDARY = ("quantize", "dequantize")
MOST, FEW = 8, 2
"""Islands of one op each that are tried in a net; those of a long one are spread over its length."""
LONG = ("gru", "transformer block")
"""Nets of which every island costs a second or two: the default suite tries few."""
TRIED = [*((name, FEW if name in LONG else MOST) for name in NETS),
         *(pytest.param(name, MOST, marks=pytest.mark.slow) for name in LONG)]  # fmt: skip


def computing(fake: FakeQuantModel) -> list[str]:
    return [name for name, op in fake.ops() if op.node.op not in BOUNDARY]


def some(names: list[str], most: int) -> list[str]:
    return names[:: -(-len(names) // most)]


def islands(program: Program) -> list[str]:
    return [op.name for op in program.islands()]


def assert_equal_to_fake_quant(program: Program, fake: FakeQuantModel, net: Net) -> None:
    with torch.no_grad():
        wanted = tree_leaves(fake(*net.inputs))
    for got, want in zip(emulate(program, net.inputs), wanted, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_a_net_preserved_whole_is_the_fake_quant_model(name: str, tmp_path: Path) -> None:
    net = NETS[name]
    fake = net.prepared()
    kept = computing(fake)
    program = to_program(fake, kept)
    assert islands(program) == kept
    assert_equal_to_fake_quant(program, fake, net)
    program.save(tmp_path / "program")
    again = Program.load(tmp_path / "program")
    assert islands(again) == kept
    for one, other in zip(emulate(again, net.inputs), emulate(program, net.inputs), strict=True):
        assert torch.equal(one, other)
    refused = {v.op.split(" ")[0] for v in check_model(program, load_target("bayes-like")) if v.code == "QAT187"}
    assert refused >= set(kept)


@pytest.mark.parametrize(("name", "most"), TRIED)
def test_each_op_alone_may_be_an_island(name: str, most: int) -> None:
    """What it makes of the integers before it is what the fake-quant op makes of them."""
    net = NETS[name]
    fake = net.prepared()
    for kept in some(computing(fake), most):
        program = to_program(fake, [kept])
        (op,) = program.islands()
        assert op.name == kept
        emulator = Emulator(program)
        values = emulator.trace(*net.inputs)
        given = []
        for name_in in op.inputs:
            scale = program.values[name_in].qtype.scale
            given.append(values[name_in] if scale is None else values[name_in].float() * scale)
        with torch.no_grad():
            wanted = fake.compute(kept, *given)
        if program.values[kept].qtype.scale is not None:
            wanted = emulator.codes(kept, wanted)
        assert torch.equal(values[kept].double(), wanted.double()), kept


@pytest.mark.parametrize(("name", "most"), TRIED)
def test_hybrid_ops_stay_float(name: str, most: int) -> None:
    net = NETS[name]
    names = computing(net.prepared())
    for floats in (*([one] for one in some(names, most)), names):
        torch.manual_seed(0)
        rules = {"module_name": dict.fromkeys(net.wide, INT16)} if net.wide else None
        hybrid = {"module_name": floats}
        fake = prepare_qat_fx(net.make(), rules, hybrid=True, hybrid_dict=hybrid, example_inputs=net.inputs)
        calibrate(fake, [(list(net.inputs), None)])
        program = to_program(fake)
        constants = {n for n in floats if fake.op(n).node.op == "constant"}
        assert set(floats) - constants <= set(islands(program))
        outputs = emulate(program, net.inputs)
        if floats == names:
            assert not [op.kind for op in program if op.kind not in (*BOUNDARY, "float_op")]
            torch.manual_seed(0)
            for got, want in zip(outputs, tree_leaves(net.make()(*net.inputs)), strict=True):
                torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)


def test_the_name_of_a_composite_stands_for_all_of_its_steps() -> None:
    net = NETS["attention"]
    fake = net.prepared()
    steps = [name for name in computing(fake) if name.startswith("attention.")]
    assert len(steps) > 10
    assert islands(to_program(fake, ["attention"])) == steps
    assert set_preserve_qat_mode(fake, ("attention",)) == steps
    assert islands(to_program(fake)) == steps


def test_a_part_of_a_composite_by_its_own_name() -> None:
    fake = NETS["attention"].prepared()
    softmax = [name for name in computing(fake) if ".softmax." in name]
    assert islands(to_program(fake, ["attention.softmax"])) == softmax


def test_a_composite_that_returns_several_tensors() -> None:
    x = torch.randn(3, 4, 6)

    def body(s: object, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = torch.topk(x.softmax(-1), 2)
        return values, places

    fake = calibrated(model(body), x)
    program = to_program(fake, ["topk"])
    assert {fake.op(name).node.op for name in islands(program)} == {"topk", "gather"}
    values, places = emulate(program, x)
    with torch.no_grad():
        wanted = fake(x)
    assert torch.equal(places.long(), wanted[1].long())
    torch.testing.assert_close(values, wanted[0])


def test_integers_and_truth_values_cross_an_island_as_they_are() -> None:
    x = torch.randn(3, 5, 8)
    net = model(lambda s, x: torch.where(x > 0.1, x, F.relu(x) * 0.25))
    fake = calibrated(net, x)
    compare = next(name for name, op in fake.ops() if op.node.op == "compare")
    plain, _ = emulate(to_program(fake), x, trace=True)
    program = to_program(fake, [compare])
    value = program.values[compare]
    assert (value.qtype.dtype, value.qtype.scale) == ("int8", 1.0)
    outputs, values = emulate(program, x, trace=True)
    assert set(values[compare].unique().tolist()) == {0, 1}
    assert torch.equal(outputs[0], plain[0])


def test_an_unknown_name_is_refused() -> None:
    fake = NETS["attention"].prepared()
    with pytest.raises(ProgramError, match="QAT170 preserve 'attentio'"):
        convert_fx(fake, ["attentio"])
