"""Which format every operator gets, and the model that comes out of ``prepare_qat_fx``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.errors import QConfigError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import QConfig, get_default_qconfig
from qatlib.fake.stubs import DeQuantStub, QuantStub
from qatlib.graph.ir import OPAQUE
from tests.models import calibrated, images, lively, model

INT16 = get_default_qconfig("int16")
FIXED = QConfig().with_activation(scale=0.125)


def net() -> nn.Module:
    torch.manual_seed(0)

    def body(s: nn.Module, x: Tensor) -> Tensor:
        return s.head(s.block(s.stem(x)) + s.side(x))

    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3, 1, 1))
    return model(body, stem=nn.Conv2d(3, 4, 1), block=block, side=nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(3, 4, 1)),
                 head=nn.Conv2d(4, 2, 1))  # fmt: skip


def prepared(
    rules: Any = None, hybrid: bool = False, names: Any = None, source: nn.Module | None = None
) -> FakeQuantModel:
    return prepare_qat_fx(source or net(), rules, hybrid, names, example_inputs=[images(1)])


def formats(quantized: FakeQuantModel) -> dict[str, str]:
    shown = {}
    for name, op in quantized.ops():
        fake = op.activation_post_process
        shown[name] = "float" if op.hybrid else fake.spec.dtype if fake else "as input or int32"
    return shown


def test_defaults() -> None:
    assert formats(prepared()) == {
        "x.quant": "int8", "stem": "int8", "block.0": "int8", "block.2": "int8", "side.0": "int8", "side.1": "int8",
        "head": "as input or int32",
    }  # fmt: skip
    assert formats(prepared({"module_name": {"stem": INT16}})) == formats(prepared()) | {"stem": "int16"}


def test_priority_global_type_name_attribute() -> None:
    source = net()
    rules = {"": QConfig(), "module_type": {nn.Conv2d: INT16}}
    assert formats(prepared(rules))["block.0"] == "int16"
    assert formats(prepared(rules))["block.2"] == "int8"
    rules["module_name"] = {"block.0": FIXED, "block": QConfig()}
    assert formats(prepared(rules))["stem"] == "int16"
    assert prepared(rules).op("block.0").activation_post_process.spec.scale == 0.125, "the longer name wins"
    assert formats(prepared(rules))["block.2"] == "int8"
    source.block[0].qconfig = INT16
    assert formats(prepared(rules, source=source))["block.0"] == "int16"


def test_functions_and_fused_modules_can_be_named() -> None:
    assert formats(prepared({"module_name": {"add": INT16}}))["side.1"] == "int16", "the add is part of side.1"
    assert formats(prepared({"module_name": {"block.1": INT16}}))["block.0"] == "int16", "the relu is part of block.0"
    body = model(lambda s, x: s.c(F.max_pool2d(x, 1) + x), c=nn.Conv2d(3, 2, 1))
    for rules in ({"module_name": {"add": INT16}}, {"module_type": {"operator.add": INT16}}):
        assert formats(prepared(rules, source=body))["add"] == "int16"


def test_none_keeps_an_operator_float() -> None:
    rules = {"": QConfig(), "module_name": {"block": None}}
    with pytest.raises(QConfigError, match=r"QAT146 block\.0: 2 operators"):
        prepared(rules)
    quantized = prepared(rules, hybrid=True)
    assert formats(quantized) == formats(prepared()) | {"block.0": "float", "block.2": "float", "block.2.quant": "int8"}
    source = net()
    source.stem.qconfig = None
    assert formats(prepared(None, True, source=source))["stem"] == "float"


def test_hybrid_by_name_and_type() -> None:
    assert formats(prepared(None, True, {"module_name": ["side.0"]}))["side.0"] == "float"
    by_type = formats(prepared(None, True, {"module_type": [nn.AvgPool2d]}))
    assert [name for name, shown in by_type.items() if shown == "float"] == ["block.2", "side.0"]


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ({"module_name": {"blok": QConfig()}}, None),
        ({"module_type": {nn.Conv3d: QConfig()}}, None),
        (None, {"module_name": ["stem", "nothing"]}),
        (None, {"module_type": [nn.Linear]}),
        ({"modules": {}}, None),
    ],
)
def test_a_name_that_matches_nothing(rules: Any, names: Any) -> None:
    with pytest.raises(QConfigError, match="QAT146"):
        prepared(rules, True, names)


# -- high precision ----------------------------------------------------------------------------------------------------


def test_the_output_layer_keeps_its_accumulator_unless_told() -> None:
    assert prepared().op("head").activation_post_process is None
    assert formats(prepared({"module_name": {"head": INT16}}))["head"] == "int16"


def test_high_precision_inside_names_the_reader() -> None:
    with pytest.raises(QConfigError, match="QAT145") as caught:
        prepared({"module_name": {"stem": get_default_qconfig(high_precision=True)}})
    assert caught.value.where.startswith("stem (")
    assert "read by block.0" in caught.value.seen


def test_high_precision_of_a_pool() -> None:
    with pytest.raises(QConfigError, match=r"QAT145.*avg_pool"):
        prepared({"module_name": {"block.2": get_default_qconfig(high_precision=True)}})


FUSED = {
    "relu": lambda s, x: F.relu(s.a(x)),
    "add": lambda s, x: s.a(x) + s.b(x),
    "add and relu6": lambda s, x: F.relu6(s.a(x) + s.b(x)),
}


@pytest.mark.parametrize("body", FUSED.values(), ids=FUSED.keys())
def test_what_follows_the_accumulator_is_not_lost_at_the_output(body: Any) -> None:
    x = images(8)
    source = model(body, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3))
    quantized = calibrated(source, x)
    integer = convert_fx(quantized)
    step = quantized.qtype(quantized.graph.outputs[0]).scale
    assert step is not None
    assert float((integer(x) - quantized(x)).abs().max()) <= 1.01 * step
    name = quantized.graph.outputs[0]
    with pytest.raises(QConfigError, match=f"QAT145 {name} .*fused into it"):
        prepared({"module_name": {name: get_default_qconfig(high_precision=True)}}, source=source)


# -- stubs, islands, structure -----------------------------------------------------------------------------------------


def test_stubs_mark_the_border() -> None:
    source = model(lambda s, x: s.tail(s.out(s.c(s.quant(x)))), quant=QuantStub(0.05), c=nn.Conv2d(3, 4, 1),
                   out=DeQuantStub(), tail=nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU()))  # fmt: skip
    quantized = calibrated(source, images(2))
    assert formats(quantized) == {"quant": "int8", "c": "as input or int32", "out": "float", "tail.0": "float"}
    assert quantized.qtype("quant").scale == pytest.approx(0.05)
    assert [op.name for op in convert_fx(quantized).program.islands()] == ["tail.0"]


def test_a_stub_between_quantized_layers_requantizes() -> None:
    source = model(lambda s, x: s.d(s.q(s.c(x))), c=nn.Conv2d(3, 4, 1), q=QuantStub(), d=nn.Conv2d(4, 2, 1))
    quantized, x = calibrated(source, images(4)), images(4)
    torch.testing.assert_close(convert_fx(quantized)(x), quantized(x), rtol=0, atol=0.02)


def test_names_of_methods_are_allowed_as_module_names() -> None:
    parts = {"op": nn.Conv2d(3, 3, 1), "ops": nn.Sequential(nn.Conv2d(3, 3, 1)), "compute": nn.Conv2d(3, 2, 1)}
    quantized = calibrated(model(lambda s, x: s.compute(s.ops(s.op(x))), **parts), images(2))
    assert [name for name, _ in quantized.ops()] == ["x.quant", "op", "ops.0", "compute"]
    assert "ops.0.weight" in quantized.state_dict()
    assert quantized(images(2)).shape == (2, 2, 16, 16)


def test_shared_layers_are_one_set_of_parameters() -> None:
    source = model(lambda s, x: s.b(s.c(F.relu(s.b(s.c(x))))), c=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3))
    quantized = calibrated(source, images(2))
    assert quantized.op("c").weight is quantized.op("c#1").weight
    assert quantized.op("c").bias is quantized.op("c#1").bias
    assert len(list(quantized.parameters())) == 2
    assert quantized.op("c").activation_post_process is not quantized.op("c#1").activation_post_process
    twin = copy.deepcopy(quantized)
    assert twin.op("c").weight is twin.op("c#1").weight
    assert twin.op("c").weight is not quantized.op("c").weight


def test_the_float_model_is_left_alone_also_by_training() -> None:
    source = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 2, 1)))
    source.train()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    quantized = prepare_qat_fx(source, None, True, example_inputs=[images(1)], leaf=["2"])
    assert source.training
    assert all(part.training for part in source.modules())
    quantized.eval()
    assert source[2].training
    optimizer = torch.optim.SGD(quantized.parameters(), 0.1)
    quantized(images(2)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def test_opaque_parts_are_copied_once_and_trained() -> None:
    source = model(lambda s, x: s.norm(s.norm(s.c(x))), c=nn.Conv2d(3, 4, 1), norm=nn.GroupNorm(2, 4))
    quantized = prepare_qat_fx(source, example_inputs=[images(1)], leaf=["norm"])
    assert [op.node.op for _, op in quantized.ops()][-2:] == [OPAQUE, OPAQUE]
    assert quantized.op("norm").callee is quantized.op("norm#1").callee
    assert quantized.op("norm").callee is not source.norm
    torch.testing.assert_close(quantized(images(2)), source(images(2)))


def test_the_wrong_number_of_inputs() -> None:
    with pytest.raises(QConfigError, match=r"QAT143.*got 2"):
        prepared()(images(1), images(1))


def test_an_input_cannot_stay_float_where_it_is_read_in_integers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    rules = {"module_name": {"input": None}}
    with pytest.raises(QConfigError, match="QAT146 input: is to stay float, but 0 reads it in integers"):
        prepare_qat_fx(net, rules, example_inputs=(torch.randn(1, 3),))
    floats = {"module_name": {"input": None, "0": None}}
    fake = prepare_qat_fx(net, floats, hybrid=True, example_inputs=(torch.randn(1, 3),))
    assert [name for name, op in fake.ops() if op.node.op == "quantize"] == ["0.quant"]
