from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from examples.fashion_mnist import data
from examples.recurrent import model, train
from qatlib.errors import ConfigError
from tests.examples import committed, integer

NAME = "recurrent"


@pytest.mark.parametrize(("kind", "parameters"), [("gru", 18_698), ("lstm", 24_714)])
def test_the_trace_computes_the_same(kind: str, parameters: int) -> None:
    torch.manual_seed(0)
    net = model.build(kind).eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    traced = fx.symbolic_trace(net)
    called = [type(net.get_submodule(str(node.target))) for node in traced.graph.nodes if node.op == "call_module"]
    assert called == [model.KINDS[kind], nn.Linear]
    for batch in (1, 5):
        images = torch.rand(batch, 1, 28, 28) * 2 - 1
        assert net(images).shape == (batch, 10)
        assert traced(images).equal(net(images))


def gru_by_hand(layer: nn.GRU, rows: Tensor) -> Tensor:
    """Last state of one image ``[28, 28]``, from the equations in the documentation of ``torch.nn.GRU``."""
    weights = dict(layer.named_parameters())
    state = torch.zeros(layer.hidden_size)
    for row in rows:
        from_row = weights["weight_ih_l0"] @ row + weights["bias_ih_l0"]
        from_state = weights["weight_hh_l0"] @ state + weights["bias_hh_l0"]
        (reset, update, new), (reset_h, update_h, new_h) = from_row.chunk(3), from_state.chunk(3)
        candidate = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
        keep = torch.sigmoid(update + update_h)
        state = (1 - keep) * candidate + keep * state
    return state


def test_time_runs_over_the_rows_and_the_last_state_decides() -> None:
    torch.manual_seed(0)
    net = model.build(hidden=8).eval()
    image = torch.rand(28, 28) * 2 - 1
    assert isinstance(net, model.RowNet)
    assert isinstance(net.rnn, nn.GRU)
    expected = net.head(gru_by_hand(net.rnn, image))
    torch.testing.assert_close(net(image[None, None])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rnn", "GRU", ""])
def test_another_kind_is_one_message(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"QAT105 model.kwargs.kind: is .*gru or lstm"):
        model.build(kind)


def test_measure(root: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(10)[3].expand(len(x), 10)

    val = data.build("val", root=root, limit=300)
    expected = float((val.tensors[1] == 3).double().mean())
    values = train.measure(Fixed(), val)
    assert values["accuracy"] == pytest.approx(expected)
    # -log softmax of (1, 0, …, 0): log(e + 9) - 1 for the right class, log(e + 9) for another
    assert values["loss"] == pytest.approx(float(torch.tensor(1.0).exp().add(9).log()) - expected, rel=1e-5)


# -- integers --------------------------------------------------------------------------------------------------------


def test_the_docs_show_the_scores() -> None:
    assert committed.scores(NAME)["integer"]["accuracy"] >= 0.98 * committed.scores(NAME)["float"]["accuracy"]
    integer.assert_the_docs_show_the_scores(NAME, "accuracy")


@pytest.mark.slow
def test_the_scores_are_the_committed() -> None:
    with integer.made(NAME) as it:
        integer.assert_scores_are_the_committed(it, abs=0.01)


@pytest.mark.slow
def test_every_op_agrees_with_fake_quant(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_ops_agree(it, tmp_path)


@pytest.mark.slow
def test_onnx_runtime_gives_the_integers(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_onnx_runtime_gives_the_integers(it, tmp_path)


@pytest.mark.slow
def test_the_oracle_gives_the_integers() -> None:
    with integer.made(NAME) as it:
        integer.assert_the_oracle_gives_the_integers(it, items=2)
