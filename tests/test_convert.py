"""Conversion: when it is refused, and what it makes of hybrid and preserved operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx, to_program
from qatlib.emulator import emulate
from qatlib.errors import ProgramError, QConfigError, StateError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel, set_fake_quantize, set_preserve_qat_mode
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import QConfig, get_default_qconfig
from qatlib.fake.state import FakeQuantState
from qatlib.fake.stubs import DeQuantStub, QuantStub
from qatlib.program import Program
from tests.models import calibrated, everything, images, model


@pytest.fixture(scope="module")
def net() -> FakeQuantModel:
    return calibrated(everything(), images(8))


def islands(program: Program) -> list[str]:
    return [op.name for op in program.islands()]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [FakeQuantState.CALIBRATION, FakeQuantState.QAT])
def test_scales_have_to_stand_still(state: FakeQuantState) -> None:
    one = calibrated(everything(), images(2))
    set_fake_quantize(one, state)
    with pytest.raises(StateError, match=f"QAT151.*{state.name}") as caught:
        convert_fx(one)
    assert "set_fake_quantize" in caught.value.fix


def test_an_uncalibrated_model() -> None:
    with pytest.raises(StateError, match="QAT151"):
        convert_fx(prepare_qat_fx(everything(), example_inputs=[images(1)]))


@pytest.mark.parametrize("bits", [7, 22])
def test_multiplier_bits(net: FakeQuantModel, bits: int) -> None:
    with pytest.raises(ProgramError, match="QAT170 multiplier_bits"):
        to_program(net, multiplier_bits=bits)


@pytest.mark.parametrize(("name", "seen"), [("blok.conv", "no op has this name"), ("x.quant", "is a quantize")])
def test_what_cannot_be_preserved(net: FakeQuantModel, name: str, seen: str) -> None:
    with pytest.raises(ProgramError, match="QAT170") as caught:
        convert_fx(net, [name])
    assert seen in caught.value.seen


def odd(x: Tensor) -> Tensor:
    return x.sinh()


@pytest.mark.parametrize("leaf", [(), ("c",)])
def test_opaque_parts_have_no_integer_form(leaf: tuple[str, ...]) -> None:
    source = model(lambda s, x: s.c(odd(x)), c=nn.Conv2d(3, 3, 1))
    one = calibrated(source, images(2), leaf=leaf, wrap=[odd])
    with pytest.raises(ProgramError, match="QAT175 odd"):
        convert_fx(one)


# -- integers and float islands ----------------------------------------------------------------------------------------


def test_a_program_of_integers_only(net: FakeQuantModel) -> None:
    program = convert_fx(net).program
    assert islands(program) == []
    assert program.meta["multiplier_bits"] == 20
    assert program.meta["trained"] is False
    floats = [name for name, value in program.values.items() if value.qtype.is_float]
    assert floats == ["x", "head.dequant"]
    names = [op.name for op in program]
    assert [name for name in names if name != "head.dequant"] == [name for name, _ in net.ops()]
    block = next(op for op in program if op.name == "block.conv")
    assert (block.module, block.origin) == ("block.conv", "Conv2d + block.bn + block.add + block.relu")


@pytest.mark.parametrize("kept", [["stem"], ["block.conv"], ["cat", "shrink"], ["head"], ["add", "pool", "hidden"]])
def test_preserved_operators_are_islands_that_compute_fake_quant(net: FakeQuantModel, kept: list[str]) -> None:
    x = images(4, seed=3)
    integer = convert_fx(net, kept)
    assert islands(integer.program) == kept
    _, values = emulate(integer.program, x, trace=True)
    for op in integer.program.islands():
        reals = []
        for name in op.inputs:
            scale = integer.program.values[name].qtype.scale
            reals.append(values[name].float() * (1.0 if scale is None else scale))
        with torch.no_grad():
            wanted = net.compute(op.name, *reals)
        scale = integer.program.values[op.output].qtype.scale
        got = values[op.output].float() * (1.0 if scale is None else scale)
        assert float((got - wanted).abs().max()) <= 1e-5


def test_everything_preserved_is_the_fake_quant_model(net: FakeQuantModel) -> None:
    x = images(4, seed=3)
    kept = [name for name, op in net.ops() if op.node.op != "quantize"]
    torch.testing.assert_close(convert_fx(net, kept)(x), net(x), rtol=1e-5, atol=1e-5)


def test_preserve_mode_by_prefix_type_and_back() -> None:
    one = calibrated(everything(), images(4))
    assert set_preserve_qat_mode(one, ("block",)) == ["block.conv"]
    assert islands(convert_fx(one).program) == ["block.conv"]
    assert set_preserve_qat_mode(one, types=(nn.Linear,)) == ["hidden", "head"]
    assert islands(convert_fx(one).program) == ["block.conv", "hidden", "head"]
    set_preserve_qat_mode(one, ("block", "hidden", "head"), value=False)
    assert islands(convert_fx(one).program) == []
    with pytest.raises(QConfigError, match="QAT144 blo"):
        set_preserve_qat_mode(one, ("blo",))


def test_preserve_mode_of_a_block_with_a_stub() -> None:
    block = model(lambda s, x: s.c(s.q(x)), q=QuantStub(), c=nn.Conv2d(3, 3, 1))
    one = calibrated(model(lambda s, x: s.b(x), b=block), images(2))
    assert set_preserve_qat_mode(one, ("b",)) == ["b.c"]
    assert islands(convert_fx(one).program) == ["b.c"]


def test_hybrid_operators_are_float_islands() -> None:
    x = images(8)
    one = calibrated(everything(), x, hybrid=True, hybrid_dict={"module_name": ["block", "pool"]})
    integer = convert_fx(one)
    assert islands(integer.program) == ["block.conv", "pool"]
    kinds = {op.name: op.kind for op in integer.program}
    assert kinds["block.conv.quant"] == kinds["pool.quant"] == "quantize"
    assert integer.program.values["block.conv"].qtype.is_float
    with torch.no_grad():
        assert float((integer(x) - one(x)).abs().max()) < 0.05 * float(one(x).abs().max())


def test_all_float_is_the_float_model() -> None:
    x, source = images(4), everything()
    one = calibrated(source, x, qconfig_dict={"": None}, hybrid=True)
    integer = convert_fx(one)
    assert len(integer.program.islands()) == len(integer.program.ops)
    torch.testing.assert_close(integer(x), source(x), rtol=1e-5, atol=1e-5)


# -- outputs, inputs, formats ------------------------------------------------------------------------------------------


STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [b, a],
    "dict": lambda a, b: {"left": a, "right": {"deep": (b,)}},
    "the same twice": lambda a, b: (a, a),
}


@pytest.mark.parametrize("nest", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_outputs_are_nested_as_the_models(nest: Callable[[Tensor, Tensor], Any]) -> None:
    x = images(4)
    source = model(lambda s, x: (lambda y: nest(s.a(y), F.max_pool2d(y, 2)))(F.relu(s.c(x))),
                   c=nn.Conv2d(3, 4, 1), a=nn.Conv2d(4, 2, 1))  # fmt: skip
    one = calibrated(source, x)
    wanted, got = one(x), convert_fx(one)(x)
    flat_wanted, structure = torch.utils._pytree.tree_flatten(wanted)
    flat_got, same = torch.utils._pytree.tree_flatten(got)
    assert structure == same
    for a, b in zip(flat_wanted, flat_got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)


def test_several_inputs_and_another_batch_size() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 3, 1)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return F.relu(self.c(left) + right).flatten(1)

    x, y = images(4), images(4, seed=5)
    one = calibrated(Two().eval(), x, y)
    integer = convert_fx(one)
    assert integer.program.inputs == ("left", "right")
    whole = integer(x, y)
    assert torch.equal(torch.cat([integer(x[:1], y[:1]), integer(x[1:], y[1:])]), whole)
    assert integer.program.values["flatten"].shape == (-1, 768)
    with pytest.raises(ProgramError, match="QAT180"):
        integer(x)


def test_a_model_that_returns_its_input() -> None:
    one = calibrated(model(lambda s, x: (x, F.relu(x))), images(2))
    same, _ = convert_fx(one)(images(2))
    assert torch.equal(same, images(2))


def test_int16_activations_by_override() -> None:
    x = images(8)
    source = model(lambda s, x: s.d(F.relu(s.c(x))), c=nn.Conv2d(3, 8, 3), d=nn.Conv2d(8, 4, 3))
    wide = get_default_qconfig("int16", "min_max")
    coarse, fine = (
        calibrated(source, x),
        calibrated(source, x, qconfig_dict={"": QConfig(), "module_name": {"c": wide, "d": wide}}),
    )
    program = convert_fx(fine).program
    assert [program.values[name].qtype.dtype for name in ("x.quant", "c", "d")] == ["int8", "int16", "int16"]
    assert (next(op for op in program if op.name == "c").attrs["hi"]) == 32767
    with torch.no_grad():
        errors = [float((convert_fx(one)(x) - source(x)).square().mean()) for one in (coarse, fine)]
    assert errors[1] < errors[0]


def test_the_stub_at_the_end_is_the_dequantize() -> None:
    source = model(lambda s, x: s.out(s.c(x)), c=nn.Conv2d(3, 2, 1), out=DeQuantStub())
    program = convert_fx(calibrated(source, images(2))).program
    assert [(op.kind, op.name) for op in program] == [("quantize", "x.quant"), ("conv", "c"), ("dequantize", "out")]


def test_converting_changes_nothing(net: FakeQuantModel) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first, second = convert_fx(net), convert_fx(net)
    x = images(4)
    assert torch.equal(first(x), second(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_calibrating_after_conversion_starts_over(net: FakeQuantModel) -> None:
    one = calibrated(everything(), images(4))
    before = convert_fx(one).program.values["stem"].qtype.scale
    calibrate(one, [images(4) * 3])
    after = convert_fx(one).program.values["stem"].qtype.scale
    assert before is not None
    assert after is not None
    assert after > 1.5 * before


def test_a_channel_of_hardly_any_weight_keeps_its_bias() -> None:
    torch.manual_seed(0)
    net = model(lambda s, x: F.relu(s.conv(x)), conv=nn.Conv2d(3, 4, 1))
    with torch.no_grad():
        net.conv.weight[1] = 0.0
        net.conv.weight[2] = 1e-12
        net.conv.bias.copy_(torch.tensor([0.1, 3.0, 7.0, -0.2]))
    x = images(8) * 0.01
    program = to_program(calibrated(net, x))
    (out,) = emulate(program, x)
    with torch.no_grad():
        assert float((out - net(x)).abs().max()) <= program.values["conv"].qtype.scale
