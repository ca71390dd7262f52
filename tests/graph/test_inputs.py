"""What goes into a model and what comes out: example inputs, by place or name; named tuples, dataclasses, dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.errors import GraphError, QConfigError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import fuse_fx, prepare_qat_fx
from qatlib.fake.qconfig import get_default_qconfig
from tests.models import images, model


class Detections(NamedTuple):
    boxes: Tensor
    scores: list[Tensor]


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class Both:
    first: Output
    second: Detections


class Named(OrderedDict[str, Tensor]):
    """As the outputs of Hugging Face models."""


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "named tuple": lambda a, b: Detections(a, [b, a + b]),
    "dataclass": lambda a, b: Output(a * b),
    "dataclass with a part left out": lambda a, b: Output(a, (b,)),
    "nested dataclasses": lambda a, b: Both(Output(a), Detections(b, [a])),
    "dict of lists": lambda a, b: {"x": [a, (b,)], "y": {"z": a * b}},
    "own dict": lambda a, b: Named(x=a, y=b),
    "return type of torch": lambda a, b: (a + b).max(1),
}


def flat(value: Any) -> list[Tensor]:
    """Tensors of a result, by its documented structure."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, Output):
        parts = [value.logits, *(value.hidden or ())]
    if isinstance(value, Both):
        parts = [value.first, value.second]
    return [x for part in parts for x in flat(part)]


@pytest.mark.parametrize("result", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_are_nested_as_those_of_the_model(result: Callable[[Tensor, Tensor], Any]) -> None:
    net = model(lambda s, x: result(F.relu(s.a(x)), s.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    x = images(4)
    fake = prepare_qat_fx(net, example_inputs=(x[:1],))
    with torch.no_grad():
        wanted, got = net(x), fake(x)
    if not isinstance(wanted, Named | torch.return_types.max):
        assert type(got) is type(wanted)
    for a, b in zip(flat(wanted), flat(got), strict=True):
        torch.testing.assert_close(a, b)
    if isinstance(wanted, Both):
        assert got.first.hidden is None
    calibrate(fake, [x])
    integers = convert_fx(fake)(x)
    assert isinstance(integers, dict if is_dataclass(got) else tuple if isinstance(got, tuple) else type(got))
    for a, b in zip(flat(got), flat(integers), strict=True):
        assert a.shape == b.shape
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=0.1 * float(a.abs().max()))


@pytest.mark.parametrize(
    ("result", "place"),
    [
        (lambda x: {"x": x, "extra": [None]}, r"output\['extra'\]\[0\]"),
        (lambda x: Output(x, hidden=(3,)), r"output\.hidden\[0\]"),  # type: ignore[arg-type]
        (lambda x: {x}, r"set.*is returned"),
        (lambda x: Unknown(x), r"Unknown.*is returned"),
    ],
)
def test_what_is_no_tensor_is_named_by_its_place(result: Callable[[Tensor], Any], place: str) -> None:
    with pytest.raises(GraphError, match=f"QAT136 .*{place}"):
        fuse_fx(model(lambda s, x: result(F.relu(x))), (images(1),))


class Unknown:
    def __init__(self, x: Tensor) -> None:
        self.x = x


# -- inputs ------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        if mask is not None:
            x = x * mask[..., None]
        return self.head(x if bias is None else x + bias)


IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 9]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def test_inputs_by_name() -> None:
    net = Encoder().eval()
    fake = prepare_qat_fx(net, example_inputs={"mask": MASK, "ids": IDS})
    assert fake.graph.inputs == ("ids", "mask")
    with torch.no_grad():
        wanted = net(IDS, MASK)
        for got in (fake(IDS, MASK), fake(mask=MASK, ids=IDS), fake(IDS, mask=MASK)):
            torch.testing.assert_close(got, wanted)
    for wrong in ({"ids": IDS}, {"ids": IDS, "mask": MASK, "x": MASK}):
        with pytest.raises(QConfigError, match="QAT143"):
            fake(**wrong)
    with pytest.raises(QConfigError, match="QAT143"):
        fake(IDS, MASK, mask=MASK)


def test_integers_take_inputs_by_name() -> None:
    net = Encoder().eval()
    fake = prepare_qat_fx(net, example_inputs={"mask": MASK, "ids": IDS})
    calibrate(fake, [(IDS, MASK)])
    integer = convert_fx(fake)
    for got in (integer(mask=MASK, ids=IDS), integer(IDS, mask=MASK)):
        assert torch.equal(got, integer(IDS, MASK))
    for called in (fake, integer):
        with pytest.raises(QConfigError, match="QAT143"):
            called(IDS, MASK, MASK, mask=MASK)


def test_an_argument_with_the_name_of_a_builtin_keeps_it() -> None:
    class Product(nn.Module):
        def forward(self, input: Tensor, max: Tensor) -> Tensor:
            return input * max

    rules = {"module_name": {"input": get_default_qconfig("int16")}}
    fake = prepare_qat_fx(Product(), rules, example_inputs={"max": MASK, "input": MASK})
    assert fake.graph.inputs == ("input", "max")
    assert fake.dtype("input.quant") == "int16"
    torch.testing.assert_close(fake(max=MASK, input=2 * MASK), 2 * MASK * MASK)


ODD: dict[str, tuple[Any, str]] = {
    "a bare tensor": (IDS, r"one tensor.*\(x,\)"),
    "an array": ((np.ones((1, 3)),), r"example input ids: is a numpy\.ndarray.*from_numpy"),
    "a number": ((IDS, 3), "example input mask: is a int"),
    "None": ((IDS, None), "mask: is a NoneType"),
    "a generator": ((x for x in (IDS,)), "is a generator"),
    "a dict inside": (({"ids": IDS},), "ids: is a dict"),
    "another dtype": ((IDS, MASK.double()), r"mask: is torch\.float64, the model torch\.float32.*float\(\)"),
    "half": ((IDS, MASK.half()), "float16"),
    "complex": ((IDS, MASK.to(torch.complex64)), "complex64"),
    "no sample": ((IDS[:0],), r"shape \[0, 3\]"),
    "no axes": ((torch.tensor(3),), "no axes"),
    "another device": ((IDS.to("meta"),), "is on meta, the model on cpu"),
    "none": ((), "0 inputs, but forward takes ids, mask, bias"),
    "an unknown name": ({"ids": IDS, "labels": IDS}, "'labels' is no argument"),
    "a gap": ({"ids": IDS, "bias": MASK}, "'mask' is left out"),
    "without the first": ({"mask": MASK}, "'ids' is left out"),
}


@pytest.mark.parametrize(("inputs", "says"), ODD.values(), ids=ODD.keys())
def test_odd_example_inputs_are_named(inputs: Any, says: str) -> None:
    with pytest.raises(GraphError, match=says) as caught:
        prepare_qat_fx(Encoder().eval(), example_inputs=inputs)
    assert caught.value.code == "QAT138"


def test_an_argument_by_keyword_alone() -> None:
    class Keyword(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return x + y

    for inputs in ((MASK,), {"x": MASK, "y": MASK}):
        with pytest.raises(GraphError, match="QAT138"):
            fuse_fx(Keyword(), inputs)


def test_an_argument_by_keyword_alone_with_a_default() -> None:
    class Keyword(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor | None = None) -> Tensor:
            return x + 1 if y is None else x + y

    assert fuse_fx(Keyword(), {"x": MASK}).inputs == ("x",)
    with pytest.raises(GraphError, match=r"QAT138.*'y' can only be given by keyword"):
        fuse_fx(Keyword(), {"x": MASK, "y": MASK})
