"""LSTM, GRU, RNN and their cells: unrolled graphs against torch, and their integers against float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import GraphError
from qatlib.graph.same import evaluate_graph
from qatlib.graph.trace import trace
from tests.models import calibrated, model

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
    x = torch.randn(64, 12, 5)
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
