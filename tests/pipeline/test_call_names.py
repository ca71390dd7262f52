"""The name of a module that is called several times means all of its calls, with a number one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx, table_ops
from qatlib.errors import ConfigError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx, prepare_graph
from qatlib.graph.calls import calls_of_shared
from qatlib.graph.ir import CONSTANT, INPUT, Graph
from qatlib.pipeline.config import Config, Override
from qatlib.pipeline.formats import Formats, owners_of, within
from qatlib.pipeline.match import first_owner, resolve
from tests.models import calibrated, images, model


class Head(nn.Module):
    """A convolution with batch norm and an activation of its own, a layer norm, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sigmoid(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.norm(self.act(self.bn(self.conv(x)))), -1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return model(lambda s, x: s.head(s.one(x)) + s.head(s.one(x) * 2), head=Head(), one=nn.Conv2d(3, 3, 1))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return fuse_fx(net(), (images(2, 3, 8),))


def test_owners_of_all_calls_and_of_one(graph: Graph) -> None:
    owners = owners_of(graph)
    assert owners["head.conv"] == owners["head.bn"] == ("head.conv", "head.conv#1")
    assert owners["head.conv#0"] == owners["head.bn#0"] == ("head.conv",)
    assert owners["head.conv#1"] == owners["head.bn#1"] == ("head.conv#1",)
    assert owners["head.act"] == ("head.act", "head.act#1")
    last = {node.composite: node.name for node in graph.nodes if node.composite}
    assert owners["head.norm"] == (last["head.norm"], last["head.norm#1"]), "of a composite what it returns"
    steps = [node.name for node in graph.nodes if node.composite == "head.norm#1"]
    assert all(owners[step] == (step,) for step in steps)
    assert all(owners[step.replace("#1.", ".")] == (step.replace("#1.", "."), step) for step in steps)


def test_functions_are_calls_of_their_own(graph: Graph) -> None:
    owners = owners_of(graph)
    names = [name for name in owners if name.startswith("head.softmax") and "#0" in name]
    assert not names
    assert not set(owners["head.softmax"]) & set(owners["head.softmax#1"])


@pytest.mark.parametrize(("pattern", "calls"), [("head.norm", "12"), ("head.norm#0", "1"), ("head.norm#1", "2")])
def test_lists_cover_every_step_of_the_calls(graph: Graph, pattern: str, calls: str) -> None:
    owners, numbers = owners_of(graph), calls_of_shared(graph.nodes)
    found = {op for name in resolve([pattern], owners, "qat.hybrid") for op in owners[name]}
    expected = {n.name for n in graph.nodes if n.module == "head.norm" and str(numbers[n.name][0]) in calls}
    assert expected
    constants = {node.name for node in graph.nodes if node.op == CONSTANT}
    assert found - constants == expected


def formats(graph: Graph, *records: tuple[str, str]) -> dict[str, str]:
    config = Config.model_validate(
        {
            "model": {"factory": "a:b", "checkpoint": "c", "code": "d"},
            "data": {"factory": "a:b", "code": "d"},
            "qconfig": {"overrides": [{"match": match, "activation": dtype} for match, dtype in records]},
        }
    )
    made = prepare_graph(graph, Formats(config, graph, {}))
    return {node.name: made.dtype(node.name) for node in graph.nodes if node.op != INPUT}


@pytest.mark.parametrize(
    ("records", "wide"),
    [
        ([("head.conv", "int16")], {"head.conv", "head.conv#1"}),
        ([("head.conv#0", "int16")], {"head.conv"}),
        ([("head.conv#1", "int16")], {"head.conv#1"}),
        ([("head.conv#1", "int8"), ("head.conv", "int16")], {"head.conv"}),
        ([("head.bn", "int16")], {"head.conv", "head.conv#1"}),
        ([("*.conv", "int16")], {"head.conv", "head.conv#1"}),
    ],
)
def test_overrides_of_all_calls_and_of_one(graph: Graph, records: list[tuple[str, str]], wide: set[str]) -> None:
    plain, found = formats(graph), formats(graph, *records)
    assert {name for name in found if found[name] != plain[name]} == wide


def test_a_record_whose_calls_are_all_taken_is_an_error(graph: Graph) -> None:
    with pytest.raises(ConfigError, match=r"QAT102 qconfig\.overrides\[1\]\.match.*'head\.conv#1' is never used") as e:
        formats(graph, ("head.conv", "int16"), ("head.conv#1", "int8"))
    assert "qconfig.overrides[0] comes first" in str(e.value)
    with pytest.raises(ConfigError, match="never used"):
        formats(graph, ("head.conv", "int16"), ("head.bn", "int8"))


def test_tables_and_preserved_ops_of_all_calls() -> None:
    fake: FakeQuantModel = calibrated(net(), images(2, 3, 8))
    tables = within(owners_of(fake.graph), table_ops(fake))
    found = first_owner((Override(match="head.act", scale=1.0),), tables, "convert.tables")
    assert set(found) == {"head.act", "head.act#1"}
    owners = owners_of(fake.graph)
    kept = [op for name in resolve(["head.act"], owners, "convert.preserve") for op in owners[name]]
    islands = [op.name for op in convert_fx(fake, kept).program.islands()]
    assert islands == ["head.act", "head.act#1"]
