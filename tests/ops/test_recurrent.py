"""LSTM, GRU, RNN and their cells: unrolled graphs against torch, and their integers against float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import GraphError
from qatlib.fake.prepare import fuse_fx
from qatlib.graph.same import evaluate_graph
from qatlib.graph.trace import trace
from tests.models import calibrated, model
from tests.onnx_runtime import assert_same_in_onnx

NETS: dict[str, nn.Module] = {
    "LSTM": nn.LSTM(5, 6),
    "LSTM, batch first, two layers, both ways": nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True),
    "LSTM without bias": nn.LSTM(5, 6, bias=False, batch_first=True),
    "GRU": nn.GRU(5, 6),
    "GRU, two layers, both ways": nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5),
    "GRU without bias": nn.GRU(5, 6, bias=False),
    "RNN": nn.RNN(5, 6, batch_first=True),
    "RNN, relu": nn.RNN(5, 6, nonlinearity="relu"),
}


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


def same(net: nn.Module, *inputs: Tensor) -> None:
    got = evaluate_graph(trace(net, inputs), inputs)
    with torch.no_grad():
        wanted = flat(net(*inputs))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", NETS.values(), ids=NETS.keys())
def test_the_unrolled_graph_equals_torch(layer: nn.Module) -> None:
    def body(s: nn.Module, x: Tensor) -> Any:
        return s.layer(x if s.layer.batch_first else x.transpose(0, 1))

    same(model(body, layer=layer), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_carried_state_goes_in_and_out(kind: type[nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(5, 6, 2, batch_first=True)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            h, c = h.transpose(0, 1), c.transpose(0, 1)  # layers first, as torch has states
            return self.layer(x, (h, c)) if kind is nn.LSTM else self.layer(x, h + c)

    same(Net().eval(), torch.randn(3, 4, 5), torch.randn(3, 2, 6), torch.randn(3, 2, 6))


class Carried(nn.Module):
    """Sequence and state in, both out, as torch has them: states ``[layers * directions, N, H]``."""

    def __init__(self, kind: type[nn.Module], batch_first: bool, two_ways: bool = False) -> None:
        super().__init__()
        self.layer = kind(5, 6, 2, batch_first=batch_first, bidirectional=two_ways)
        self.kind, self.batch_first = kind, batch_first

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None = None) -> Any:
        if c is not None:
            out, (h, c) = self.layer(x, (h, c))
            return out, h, c
        return self.layer(x, h)

    def inputs(self, batch: int, length: int = 4) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        sequence = (batch, length, 5) if self.batch_first else (length, batch, 5)
        state = (4 if self.layer.bidirectional else 2, batch, 6)
        shapes = [sequence, state, state][: 3 if self.kind is nn.LSTM else 2]
        return tuple(torch.rand(shape, generator=generator) * 2 - 1 for shape in shapes)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_state_with_the_batch_second(kind: type[nn.Module], batch_first: bool, batch: int) -> None:
    torch.manual_seed(0)
    net = Carried(kind, batch_first).eval()
    graph = fuse_fx(net, net.inputs(batch))
    assert [node.shape.index(-1) for node in graph.nodes if node.op == "input"] == [
        0 if batch_first else 1, *[1] * (2 if kind is nn.LSTM else 1)
    ]  # fmt: skip
    inputs = net.inputs(5)
    with torch.no_grad():
        for a, b in zip(evaluate_graph(graph, inputs), flat(net(*inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class BatchFirst(nn.Module):
    """The same, with the batch of the states first."""

    def __init__(self, carried: Carried) -> None:
        super().__init__()
        self.carried = carried

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None = None) -> Any:
        return self.carried(x, h.transpose(0, 1), *(() if c is None else (c.transpose(0, 1),)))


@pytest.mark.parametrize(("kind", "two_ways"), [(nn.LSTM, False), (nn.GRU, True)])
def test_its_integers_are_those_with_the_batch_first_and_carry_on(kind: type[nn.Module], two_ways: bool) -> None:
    torch.manual_seed(0)
    net = Carried(kind, True, two_ways).eval()
    x, *states = net.inputs(16, 2)
    program = to_program(calibrated(net, x, *states))
    turned = to_program(calibrated(BatchFirst(net).eval(), x, *(part.transpose(0, 1) for part in states)))
    floats = integers = tuple(part[:, :3] for part in states)
    for _ in range(3):
        with torch.no_grad():
            wanted, *floats = net(x[:3], *floats)
        others = emulate(turned, (x[:3], *(part.transpose(0, 1) for part in integers)))
        got, *integers = emulate(program, (x[:3], *integers))
        for a, b in zip((got, *integers), others, strict=True):
            assert torch.equal(a, b)
        assert float((got - wanted).square().sum() / wanted.square().sum()) < 0.01
    assert [part.shape for part in integers] == [part.shape for part in floats]
    assert_same_in_onnx(program, x[:3], *integers)


def test_a_sequence_with_time_first_alone_says_what_to_do() -> None:
    with pytest.raises(GraphError, match=r"batch_first=False takes for time.*x\.transpose\(0, 1\) before it"):
        trace(nn.Sequential(nn.LSTM(5, 6)), (torch.randn(4, 3, 5),))


def test_states_of_zeros_cost_nothing() -> None:
    layer = nn.GRU(5, 6, batch_first=True)
    given = model(lambda s, x: s.layer(x, x.new_zeros(1, x.size(0), 6))[0], layer=layer)
    absent = model(lambda s, x: s.layer(x)[0], layer=layer)
    x = torch.randn(2, 3, 5)
    same(given, x)
    assert [n.op for n in trace(given, (x,)).nodes] == [n.op for n in trace(absent, (x,)).nodes]


@pytest.mark.parametrize("cell", [nn.LSTMCell(5, 6), nn.GRUCell(5, 6), nn.RNNCell(5, 6)], ids=["LSTM", "GRU", "RNN"])
def test_cells_in_a_loop(cell: nn.Module) -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(3):
            state = s.cell(x[:, t], state)
        return state[0] if isinstance(s.cell, nn.LSTMCell) else state

    same(model(body, cell=cell), torch.randn(2, 3, 5))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_integers_follow_the_float_states(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = model(lambda s, x: s.head(s.layer(x)[0][:, -1]), layer=kind(5, 16, batch_first=True), head=nn.Linear(16, 4))
    x = torch.randn(64, 8, 5)
    fake = calibrated(net, x)
    assert fake.op("layer.l0.t3.hh").weight is fake.op("layer.l0.t7.hh").weight, "time steps share their weights"
    (out,) = emulate(to_program(fake), x)
    with torch.no_grad():
        wanted = net(x)
    noise = float((out - wanted).square().mean() / wanted.var())
    assert noise < 1e-3, f"SQNR {-10 * torch.tensor(noise).log10():.1f} dB"


def test_what_has_no_form() -> None:
    for layer, x in (
        (nn.LSTM(5, 6, proj_size=3), torch.randn(3, 2, 5)),
        (nn.GRU(5, 6), torch.randn(3, 5)),
        (nn.GRU(5, 6, batch_first=False), torch.randn(3, 2, 5)),
    ):
        with pytest.raises(GraphError, match="QAT134"):
            trace(model(lambda s, x: s.layer(x)[0], layer=layer), (x,))
