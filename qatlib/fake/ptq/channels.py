"""Which channel of a dense operator each element of a later tensor comes from."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from qatlib.graph.ir import Graph, Node
from qatlib.ops.base import BY_NAME
from qatlib.ops.dense import Dense

_MOVES = ("reshape", "permute", "slice", "take", "expand", "resize_nearest")
_SUMS = ("avg_pool", "adaptive_avg_pool", "resize_linear", "sum")
_LARGEST = ("max_pool", "adaptive_max_pool", "amax")


def is_homogeneous(node: Node) -> bool:
    """Whether ``f(k * x) = k * f(x)`` for every k > 0: of the network's own numbers, no constant enters."""
    if node.content != "float" or len(node.inputs) != 1:
        return False
    if node.op == "clamp":
        return is_open(node)
    if node.op == "pad":
        return bool(node.attrs["value"] == 0)
    return node.op in (*_MOVES, *_SUMS, *_LARGEST, "prelu")


def is_open(node: Node) -> bool:
    """Whether the output clamp of ``node``, if it has one, is a relu: both of its bounds are 0 or missing."""
    return all(bound in (None, 0) for bound in node.attrs.get("clamp", ()))


def dense(node: Node) -> Dense:
    """The operator of a convolution or linear."""
    operator = BY_NAME[node.op]
    assert isinstance(operator, Dense)
    return operator


def own_channels(node: Node) -> Tensor:
    """Output channel of every element that a convolution or linear makes, int64 ``[1, …]``."""
    shape = _one_item(node.shape)
    vector = torch.arange(len(node.params["weight"]))
    return dense(node).over_channels(vector, len(shape)).expand(shape)


def carried(node: Node, channels: Tensor) -> Tensor | None:
    """Channels of the output of a homogeneous operator on an input of ``channels``; None if it mixes channels.

    The operator runs on one irregular number per channel, and on the same in reverse order: what is made of one channel
    alone is that channel's number times what it would be of ones. A sum of several channels gives no channel's number,
    a maximum of several not the same channel both times. Elements that come from nowhere (padding) are -1.
    """
    count = int(channels.max()) + 1
    numbers = 1 + torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = {role: tensor.detach().cpu().double() for role, tensor in node.params.items()}
    known = (channels >= 0).double()

    def run(values: Tensor) -> Tensor:
        return BY_NAME[node.op].forward(node.attrs, params, values[channels.clamp(min=0)] * known)

    one = run(torch.ones_like(numbers))
    up, down = (run(values) / one for values in (numbers, 3 - numbers))
    order = numbers.argsort()
    place = torch.searchsorted(numbers[order], (up.nan_to_num(0) - 1e-9).contiguous()).clamp(max=count - 1)
    found = order[place]
    nowhere = one == 0
    pure = nowhere | (((numbers[found] - up).abs() < 1e-8) & ((3 - numbers[found] - down).abs() < 1e-8))
    return torch.where(nowhere, -1, found) if bool(pure.all()) else None


def read_channels(node: Node, channels: Tensor) -> Tensor | None:
    """Source channel of each input channel of a convolution or linear, ``[I]``; None if one comes from several."""
    rows = channels.movedim(dense(node).channel_axis, 0).flatten(1)
    top = rows.amax(1)
    return top if bool(((rows == top[:, None]) | (rows < 0)).all()) else None


def readers(
    graph: Graph, users: dict[str, list[Node]], node: Node, fixed: Container[str] = ()
) -> list[tuple[Node, Tensor]] | None:
    """Every convolution and linear that reads the output of ``node``, with the source of its input channels.

    Between them are homogeneous operators that keep the channels apart. None if anything else reads the output, or a
    value in ``fixed`` is among those on the way.
    """
    found: list[tuple[Node, Tensor]] = []
    todo = [(node.name, own_channels(node))]
    while todo:
        name, channels = todo.pop()
        if name in graph.outputs or name in fixed:
            return None
        for user in users[name]:
            is_dense = isinstance(BY_NAME.get(user.op), Dense)
            through = carried(user, channels) if is_homogeneous(user) else None
            source = read_channels(user, channels) if is_dense and name not in user.inputs[1:] else None
            if source is not None:
                found.append((user, source))
            elif through is not None:
                todo.append((user.name, through))
            else:
                return None
    return found


def _one_item(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(abs(size) for size in shape)
