"""LSTM, GRU and RNN, and their cells: unrolled over the time steps that the example input has.

Steps are named ``<call>.l<layer>[r].<step>`` and, inside the loop, ``<call>.l<layer>[r].t<time>.<step>``. States and
gates are int16 unless a qconfig names them; all time steps share the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.ops.base import Call, Ref
from qatlib.ops.composite import INT16, Composite, under

State = tuple[Ref | None, ...]
"""Hidden state ``[N, H]``, of an LSTM also the cell state. None is all zeros."""


class _Cell:
    """One time step of one layer: the linear of the hidden state, and the gates."""

    gates: int
    states = 1

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` ``[gates * H, H]`` and ``bias`` ``[gates * H]`` of the hidden state."""
        self.weight, self.hidden = weight, weight.shape[1]
        self.bias = torch.zeros(weight.shape[0]) if bias is None else bias

    def hh(self, call: Call, h: Ref) -> Ref:
        """``W_hh h + b_hh``, ``[N, gates * H]``."""
        params = {"weight": self.weight, "bias": self.bias}
        return call.emit("linear", [h], {}, params, suffix=".hh", format=INT16)

    def b_hh(self, call: Call, first: int, last: int) -> Ref:
        """``b_hh`` of some gates as a constant: what ``hh`` is for a hidden state of zeros."""
        cut = slice(first * self.hidden, last * self.hidden)
        return call.ref(call.derive(self.bias, f"gates {first} to {last}", lambda bias: bias[cut]))

    def gate(self, call: Call, x: Ref, first: int, last: int, suffix: str) -> Ref:
        """Gates ``first`` to ``last`` (exclusive) of ``[N, gates * H]``."""
        attrs = {"axes": [1], "starts": [first * self.hidden], "stops": [last * self.hidden], "steps": [1]}
        return call.emit("slice", [x], attrs, suffix=suffix)

    def step(self, call: Call, ih: Ref, state: State) -> State:
        """The next state from ``W_ih x + b_ih`` of this time and the state before."""
        raise NotImplementedError


def _two(call: Call, op: str, a: Ref, b: Ref, suffix: str) -> Ref:
    return call.emit(op, [a, b], suffix=suffix, format=INT16)


def _unary(call: Call, function: str, x: Ref, suffix: str) -> Ref:
    return call.emit("unary", [x], {"function": function}, suffix=suffix, format=INT16)


class _Lstm(_Cell):
    gates, states = 4, 2

    def step(self, call: Call, ih: Ref, state: State) -> State:
        h, c = state
        total = _two(call, "add", ih, self.hh(call, h) if h else self.b_hh(call, 0, 4), ".gates")
        i, f, g, o = (
            _unary(call, function, self.gate(call, total, k, k + 1, f".{name}.slice"), f".{name}")
            for k, (name, function) in enumerate([("i", "sigmoid"), ("f", "sigmoid"), ("g", "tanh"), ("o", "sigmoid")])
        )
        new = _two(call, "mul", i, g, ".ig")
        if c:
            new = _two(call, "add", _two(call, "mul", f, c, ".fc"), new, ".c")
        return _two(call, "mul", o, _unary(call, "tanh", new, ".tanh"), ".h"), new


class _Gru(_Cell):
    gates = 3

    def step(self, call: Call, ih: Ref, state: State) -> State:
        (h,) = state
        hh = self.hh(call, h) if h else None
        rz = _two(
            call, "add", self.gate(call, ih, 0, 2, ".ih_rz"),
            self.gate(call, hh, 0, 2, ".hh_rz") if hh else self.b_hh(call, 0, 2), ".rz.sum",
        )  # fmt: skip
        rz = _unary(call, "sigmoid", rz, ".rz")
        r, z = self.gate(call, rz, 0, 1, ".r"), self.gate(call, rz, 1, 2, ".z")
        hidden = self.gate(call, hh, 2, 3, ".hh_n") if hh else self.b_hh(call, 2, 3)
        total = _two(call, "add", self.gate(call, ih, 2, 3, ".ih_n"), _two(call, "mul", r, hidden, ".rn"), ".n.sum")
        n = _unary(call, "tanh", total, ".n")
        if not h:
            return (_two(call, "sub", n, _two(call, "mul", z, n, ".zn"), ".h"),)
        kept = _two(call, "mul", z, _two(call, "sub", h, n, ".h_minus_n"), ".zh")
        return (_two(call, "add", n, kept, ".h"),)


class _Rnn(_Cell):
    gates = 1

    def __init__(self, weight: Tensor, bias: Tensor | None, nonlinearity: str) -> None:
        super().__init__(weight, bias)
        self.nonlinearity = nonlinearity

    def step(self, call: Call, ih: Ref, state: State) -> State:
        (h,) = state
        total = _two(call, "add", ih, self.hh(call, h) if h else self.b_hh(call, 0, 1), ".sum")
        if self.nonlinearity == "relu":
            return (call.emit("clamp", [total], {"clamp": [0.0, None]}, suffix=".h"),)
        return (_unary(call, self.nonlinearity, total, ".h"),)


def _cell(module: nn.Module, suffix: str) -> _Cell:
    """The cell of one layer and direction; ``suffix`` is that of its parameters, such as ``_l0_reverse``."""
    weight, bias = getattr(module, f"weight_hh{suffix}"), getattr(module, f"bias_hh{suffix}", None)
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _Lstm(weight, bias)
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _Gru(weight, bias)
    nonlinearity = getattr(module, "nonlinearity", None) or "tanh"
    return _Rnn(weight, bias, nonlinearity)


def _input_product(call: Call, module: nn.Module, suffix: str, x: Ref) -> Ref:
    """``W_ih x + b_ih`` over the last axis."""
    weight, bias = getattr(module, f"weight_ih{suffix}"), getattr(module, f"bias_ih{suffix}", None)
    params = {"weight": weight, "bias": torch.zeros(weight.shape[0]) if bias is None else bias}
    return call.emit("linear", [x], {}, params, suffix=".ih", format=INT16)


def _initial(call: Call, given: Any, count: int) -> list[Any]:
    """The given state tensors, Refs or constants; None for those that are zero everywhere."""
    parts = list(given) if isinstance(given, tuple | list) else [given] * count if given is None else [given]
    return [None if part is None or (isinstance(part, Tensor) and not part.any()) else call.ref(part) for part in parts]


class RecurrentCell(Composite):
    name = "recurrent_cell"
    modules = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)

    def trace(self, call: Call) -> Any:
        module, found = call.module, call.bind("input", "hx", hx=None)
        assert module is not None
        x = found["input"]
        if not isinstance(x, Ref) or len(x.shape) != 2:
            raise call.refuse("a recurrent cell without a batch axis", "Give it [batch, features]")
        cell = _cell(module, "")
        state = cell.step(call, _input_product(call, module, "", x), tuple(_initial(call, found["hx"], cell.states)))
        return state if cell.states > 1 else state[0]


class Recurrent(Composite):
    name = "recurrent"
    modules = (nn.LSTM, nn.GRU, nn.RNN)

    def trace(self, call: Call) -> Any:
        module, found = call.module, call.bind("input", "hx", hx=None)
        assert isinstance(module, nn.LSTM | nn.GRU | nn.RNN)
        x = found["input"]
        if not isinstance(x, Ref) or len(x.shape) != 3:
            raise call.refuse("a sequence without a batch axis", "Give it three axes")
        if module.proj_size:
            raise call.refuse("proj_size", "Put an nn.Linear behind the LSTM")
        if not module.batch_first:
            x = call.emit("permute", [x], {"dims": [1, 0, 2]}, suffix=".batch_first")
        if x.shape[1] < 0:
            seen = f"the batch on the axis that batch_first={module.batch_first} takes for time"
            fix = "Turn batch_first round, or put x.transpose(0, 1) before it: inputs of the model have the batch first"
            raise call.refuse(seen, fix)
        directions = 2 if module.bidirectional else 1
        initial = _initial(call, found["hx"], 2 if isinstance(module, nn.LSTM) else 1)
        last: list[State] = []
        for layer in range(module.num_layers):
            outputs = []
            for direction in range(directions):
                prefix = f".l{layer}" + ("r" if direction else "")
                part = under(call, prefix)
                index = layer * directions + direction
                state = tuple(_of_layer(part, whole, index, f".h{k}") for k, whole in enumerate(initial))
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                steps, state = _unrolled(part, module, suffix, x, state, bool(direction))
                outputs.append(_joined(part, steps, 1, ".out"))
                last.append(state)
            both = {"axis": 2}
            x = outputs[0] if directions == 1 else call.emit("cat", outputs, both, suffix=f".l{layer}.both")
        out = x if module.batch_first else call.emit("permute", [x], {"dims": [1, 0, 2]}, suffix=".time_first")
        finals = [_joined(call, [state[k] for state in last], 0, f".{'hc'[k]}_n") for k in range(len(last[0]))]
        return out, tuple(finals) if len(finals) > 1 else finals[0]


def _of_layer(call: Call, whole: Ref | None, index: int, suffix: str) -> Ref | None:
    """``[N, H]`` of one layer and direction out of an initial state ``[layers * directions, N, H]``."""
    if whole is None:
        return None
    attrs = {"axes": [0], "starts": [index], "stops": [index + 1], "steps": [1]}
    part = call.emit("slice", [whole], attrs, suffix=f"{suffix}.slice")
    return call.emit("reshape", [part], {"shape": list(whole.shape[1:])}, suffix=suffix)


def _unrolled(
    call: Call, module: nn.Module, suffix: str, x: Ref, state: State, backwards: bool
) -> tuple[list[Ref], State]:
    """Hidden state at every time, in the order of time, and the last state. ``x`` is ``[N, T, I]``."""
    cell, length = _cell(module, suffix), x.shape[1]
    projected = _input_product(call, module, suffix, x)
    hidden: dict[int, Ref] = {}
    for time in reversed(range(length)) if backwards else range(length):
        at = under(call, f".t{time}")
        attrs = {"axes": [1], "starts": [time], "stops": [time + 1], "steps": [1]}
        part = at.emit("slice", [projected], attrs, suffix=".ih.slice")
        ih = at.emit("reshape", [part], {"shape": [part.shape[0], part.shape[2]]}, suffix=".ih")
        state = cell.step(at, ih, state)
        assert state[0] is not None
        hidden[time] = state[0]
    return [hidden[time] for time in range(length)], state


def _joined(call: Call, parts: Sequence[Ref | None], axis: int, suffix: str) -> Ref:
    """Parts ``[N, H]`` stacked along a new axis."""
    raised = []
    for k, part in enumerate(parts):
        assert part is not None
        shape = [*part.shape[:axis], 1, *part.shape[axis:]]
        raised.append(call.emit("reshape", [part], {"shape": shape}, suffix=f"{suffix}.{k}"))
    return raised[0] if len(raised) == 1 else call.emit("cat", raised, {"axis": axis}, suffix=suffix)
