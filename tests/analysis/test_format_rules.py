"""Findings about formats, in models in which they are planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib import QuantStub, get_default_qconfig
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.rules import run_rules
from qatlib.fake.formats import format_rows
from tests.analysis.analysis_nets import Net, Trio
from tests.analysis.planted import record
from tests.models import calibrated, images, model

INT16 = get_default_qconfig("int16")
CODES = ("QAT027", "QAT034", "QAT035")
X = images(4).clamp(-1, 1)


def found(net: nn.Module, x: Tensor = X, rules: Any = None, **facts: Any) -> list[Finding]:
    fake = calibrated(net, x, qconfig_dict={"module_name": rules or {}, "": get_default_qconfig()})
    rows = format_rows(fake)
    if "origin" in facts:
        origin = facts.pop("origin")
        rows = [replace(row, output_rule=origin.get(row.op, row.output_rule)) for row in rows]
    seen = Facts(fvsq=capture_pair(net, fake, [x], "FvsQ"), formats=tuple(rows), **facts)
    return [finding for finding in run_rules(seen) if finding.code in CODES]


def fixed(scale: float) -> Any:
    return get_default_qconfig().with_activation(scale=scale)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()


# -- fixed scales ------------------------------------------------------------------------------------------------------


def test_a_scale_that_cuts_and_one_that_wastes() -> None:
    (cut,) = found(plain(), rules={"input": fixed(1 / 512)})
    assert (cut.code, cut.severity, cut.module) == ("QAT027", "warning", "input.quant")
    assert cut.evidence["ratio"] == pytest.approx(512 / 127)
    assert "are cut" in cut.title
    (wasted,) = found(plain(), rules={"0": fixed(1.0)})
    assert (wasted.code, wasted.module) == ("QAT027", "0")
    assert "unused" in wasted.title
    assert wasted.evidence["range_of_scale"] == 127.0
    for good in (1 / 128, 1 / 100, 1 / 32):
        assert not found(plain(), rules={"input": fixed(good)}), good


def test_the_edit_goes_to_where_the_scale_stands() -> None:
    records = ({"match": "input", "scale": 1 / 512},)
    (cut,) = found(plain(), rules={"input": fixed(1 / 512)}, origin={"input.quant": "qconfig.inputs[0]"},
                   input_formats=records)  # fmt: skip
    assert cut.edit == "qconfig:\n  inputs:\n    - match: input\n      scale: 0.0078125"
    (wasted,) = found(plain(), rules={"0": fixed(1.0)}, origin={"0": "qconfig.overrides[0]"})
    assert wasted.edit.startswith("qconfig:\n  overrides:\n    - match: '0'\n      scale: 0.0")
    (cut,) = found(model(lambda s, x: s.c(s.q(x)), q=QuantStub(scale=1 / 512), c=nn.Conv2d(3, 4, 3)))
    assert cut.module == "q"
    assert cut.edit == "Fix the scale of q to 0.0078125 in the model (QuantStub)"


def test_one_scale_of_a_shared_stub_is_judged_call_by_call() -> None:
    net = model(lambda s, x: s.c(s.q(x)) + s.d(s.q(x * 40)), q=QuantStub(scale=1 / 128), c=nn.Conv2d(3, 4, 3),
                d=nn.Conv2d(3, 4, 3))  # fmt: skip
    (cut,) = found(net)
    assert cut.module == "q (call 2)"
    assert cut.evidence["largest_seen"] == 40.0


# -- 16 bits that meet 8 -----------------------------------------------------------------------------------------------


def joined() -> nn.Module:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "head": nn.Conv2d(8, 2, 1)}
    return model(lambda s, x: s.head(torch.cat([s.a(x), s.b(x)], 1)), **parts)


@pytest.mark.parametrize("wide", [("a",), ("a", "b")])
def test_wide_inputs_of_a_narrow_cat(wide: tuple[str, ...]) -> None:
    (finding,) = found(joined(), rules=dict.fromkeys(wide, INT16))
    assert (finding.code, finding.severity, finding.module) == ("QAT034", "warning", "cat")
    assert finding.edit == "qconfig:\n  overrides:\n    - match: cat\n      activation: int16"


def test_a_wide_output_keeps_what_it_is_given() -> None:
    assert not found(joined(), rules={"a": INT16, "cat": INT16})
    assert not found(joined(), rules={"cat": INT16})


def test_a_wide_addend_of_a_fused_add() -> None:
    net = model(lambda s, x: s.b(s.a(x)) + s.a(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1))
    (finding,) = found(model(lambda s, x: (lambda y: s.b(y) + y)(s.a(x)), a=net.a, b=net.b), rules={"a": INT16})
    assert (finding.code, finding.module, finding.evidence["inputs"]) == ("QAT034", "b", "int16, int16")


def test_a_layer_may_read_16_bits_and_write_8() -> None:
    assert not found(plain(), rules={"0": INT16})
    assert not found(model(lambda s, x: s.c(x).softmax(1), c=nn.Conv2d(3, 4, 3))), "int16 steps of a composite"


# -- weights of 16 bits ------------------------------------------------------------------------------------------------


def test_weights_that_have_no_room_in_the_accumulator() -> None:
    layer = nn.Linear(4096, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(4, 4096) * 0.1 + 0.9)
    x = torch.rand(4, 4096) * 0.1 + 0.9
    wide = get_default_qconfig("int16", weight="int16")
    (finding,) = found(nn.Sequential(layer).eval(), x, {"0": wide, "input": INT16})
    assert (finding.code, finding.severity, finding.module) == ("QAT035", "warning", "0")
    assert finding.evidence["weight_bits"] < 6
    assert finding.edit == "qconfig:\n  overrides:\n    - match: '0'\n      weight: int8"
    assert not found(nn.Sequential(layer).eval(), x, {"0": wide}), "an int8 input leaves 12 bits"


def test_clean_models_have_no_such_finding(trio: Trio) -> None:
    facts = Facts(
        fvsq=capture_pair(trio.float_model, trio.fake, trio.batches, "FvsQ"), formats=tuple(format_rows(trio.fake))
    )
    assert not [f for f in run_rules(facts) if f.code in CODES]
    assert not found(Net().eval(), images(4).clamp(-1, 1), {"x": fixed(1 / 128)})


def test_the_edit_for_a_later_call_names_that_call() -> None:
    seen = record(1, "c#1", "conv", ("x",), module="c", call=2)
    assert (seen.match, seen.title) == ("c#1", "c (call 2)")
    first = record(0, "c", "conv", ("x",), module="c", call=1)
    assert (first.match, first.title) == ("c#0", "c (call 1)"), "c would mean every call"
