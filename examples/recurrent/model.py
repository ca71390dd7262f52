"""Entry point of the model: a recurrent layer that reads an image row by row."""

from __future__ import annotations

from torch import Tensor, nn

from qatlib.errors import ConfigError

KINDS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


def build(kind: str = "gru", hidden: int = 64, classes: int = 10) -> nn.Module:
    """The untrained network: images ``[N, 1, 28, 28]`` to scores ``[N, classes]``; 18,698 parameters by default.

    ``kind`` is ``gru`` or ``lstm``, ``hidden`` the size of the state. Raises ConfigError QAT105 for another kind.
    """
    if kind not in KINDS:
        raise ConfigError("QAT105", "model.kwargs.kind", f"is {kind!r}", f"Use {' or '.join(KINDS)}")
    return RowNet(kind, hidden, classes)


class RowNet(nn.Module):
    """28 time steps of 28 pixels; the state after the last row is classified."""

    def __init__(self, kind: str, hidden: int, classes: int) -> None:
        super().__init__()
        self.rnn = KINDS[kind](28, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x.flatten(1, 2))  # [N, 28 steps, hidden]
        return self.head(states[:, -1])  # type: ignore[no-any-return]
