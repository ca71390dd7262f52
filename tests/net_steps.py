"""The steps that a random net is made of: see :mod:`tests.nets`.

A step looks at the values that exist and returns how to make the next one, or None if none of them fits. Its function
takes the net first, which holds the modules and parameters under the names that :meth:`Picked.add` gave.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Draw:
    """Small choices."""

    source: random.Random

    def pick(self, *options: Any) -> Any:
        return self.source.choice(options)

    def between(self, low: int, high: int) -> int:
        return self.source.randint(low, high)

    def uniform(self, low: float, high: float) -> float:
        return round(self.source.uniform(low, high), 3)

    def chance(self, share: float) -> bool:
        return self.source.random() < share

    def some(self, options: Sequence[Any], most: int) -> list[Any]:
        return self.source.sample(list(options), min(len(options), self.source.randint(0, most)))


@dataclass(frozen=True)
class Made:
    """A new value: ``apply(net, *values at inputs)``. A view shares memory with its input."""

    inputs: tuple[int, ...]
    apply: Callable[..., Any]
    view: bool = False
    in_place: bool = False


@dataclass
class Picked:
    """What a step may use: the values so far (by number) and the parts of the net, to which it may add."""

    draw: Draw
    values: Sequence[Tensor]
    parts: dict[str, nn.Module | nn.Parameter] = field(default_factory=dict)

    def add(self, part: nn.Module | nn.Parameter) -> str:
        name = f"part{len(self.parts)}"
        self.parts[name] = part
        return name

    def value(self, rank: int | None = None, fits: Callable[[Tensor], bool] = lambda x: True) -> int | None:
        """A real value, preferably a late one, with ``rank`` axes."""
        found = [
            i
            for i, x in enumerate(self.values)
            if x.is_floating_point() and x.dim() > 1 and rank in (None, x.dim()) and fits(x)
        ]
        if not found:
            return None
        return found[-self.draw.between(1, min(4, len(found)))]

    def pair(self, rank: int | None = None) -> tuple[int, int] | None:
        """Two values whose shapes broadcast."""
        first = self.value(rank)
        if first is None:
            return None
        shape = self.values[first].shape
        second = self.value(len(shape), lambda y: _broadcasts(shape, y.shape))
        return None if second is None else (first, second)


def _broadcasts(a: Sequence[int], b: Sequence[int]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True))


Step = Callable[[Picked], Made | None]
STEPS: dict[str, Step] = {}


def step(weight: int = 1) -> Callable[[Step], Step]:
    """Register a step, ``weight`` times as likely as others."""

    def register(function: Step) -> Step:
        for i in range(weight):
            STEPS[f"{function.__name__}{i}"] = function
        return function

    return register


def unary(
    picked: Picked, functions: Sequence[Callable[[Tensor], Any]], rank: int | None = None, view: bool = False
) -> Made | None:
    """One of ``functions`` on a value."""
    i = picked.value(rank)
    function = picked.draw.pick(*functions)
    return None if i is None else Made((i,), lambda net, x: function(x), view)


# -- layers with weights ------------------------------------------------------------------------------------------


@step(5)
def convolution(p: Picked) -> Made | None:
    """conv, perhaps with batch norm and an activation behind it."""
    i = p.value(4)
    if i is None:
        return None
    channels, d = p.values[i].shape[1], p.draw
    groups = d.pick(1, 1, *(g for g in (2, channels) if channels % g == 0))
    outs = groups * max(1, d.pick(4, 6, 8) // groups)
    kernel = d.pick(1, 3, 3)
    conv = nn.Conv2d(
        channels,
        outs,
        kernel,
        d.pick(1, 1, 2),
        d.between(0, kernel // 2),
        groups=groups,
        bias=d.chance(0.5),
        padding_mode=d.pick("zeros", "zeros", "zeros", "replicate", "circular"),
    )
    if kernel > min(p.values[i].shape[2:]):
        return None
    layers: list[nn.Module] = [conv]
    if d.chance(0.5):
        layers.append(nn.BatchNorm2d(outs))
    if d.chance(0.6):
        layers.append(d.pick(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.LeakyReLU, nn.PReLU, nn.Sigmoid)())
    name = p.add(nn.Sequential(*layers))
    return Made((i,), lambda net, x: getattr(net, name)(x))


@step(2)
def shared(p: Picked) -> Made | None:
    """A module once more, on another value that it takes."""
    modules = [name for name, part in p.parts.items() if isinstance(part, nn.Sequential | nn.Linear)]
    if not modules:
        return None
    name = p.draw.pick(*modules)
    part = p.parts[name]
    if isinstance(part, nn.Linear):
        i = p.value(None, lambda x: x.shape[-1] == part.in_features)
    else:
        first: Any = part[0]  # type: ignore[index]
        size = first.kernel_size[0]
        i = p.value(4, lambda x: x.shape[1] == first.in_channels and min(x.shape[2:]) >= size)
    return None if i is None else Made((i,), lambda net, x: getattr(net, name)(x))


@step(3)
def linear(p: Picked) -> Made | None:
    i = p.value(p.draw.pick(2, 3, 3))
    if i is None:
        return None
    name, relu = p.add(nn.Linear(p.values[i].shape[-1], p.draw.pick(4, 6, 8))), p.draw.chance(0.5)
    return Made((i,), lambda net, x: F.relu(getattr(net, name)(x)) if relu else getattr(net, name)(x))


@step()
def transposed(p: Picked) -> Made | None:
    i = p.value(4, lambda x: x.shape[2] <= 8)
    if i is None:
        return None
    channels = p.values[i].shape[1]
    name = p.add(nn.ConvTranspose2d(channels, p.draw.pick(3, 4), p.draw.pick(2, 3), 2, p.draw.pick(0, 1)))
    return Made((i,), lambda net, x: getattr(net, name)(x))


@step()
def recurrent(p: Picked) -> Made | None:
    i = p.value(3, lambda x: x.shape[1] <= 4)
    if i is None:
        return None
    name = p.add(p.draw.pick(nn.LSTM, nn.GRU)(p.values[i].shape[-1], 4, batch_first=True))
    return Made((i,), lambda net, x: getattr(net, name)(x)[0])


# -- two values ---------------------------------------------------------------------------------------------------


@step(5)
def arithmetic(p: Picked) -> Made | None:
    """Residuals, gates, differences; the shapes may broadcast."""
    pair = p.pair()
    function = p.draw.pick(
        torch.add,
        torch.add,
        torch.sub,
        torch.mul,
        torch.maximum,
        torch.minimum,
        lambda a, b: a + 0.5 * b,
        lambda a, b: F.relu(a + b),
        lambda a, b: torch.where(a > b, a, b * 0.25),
        lambda a, b: a / (b.abs() + 1.0),
        lambda a, b: torch.sub(a, b, alpha=2),
    )
    return None if pair is None else Made(pair, lambda net, a, b: function(a, b))


@step(2)
def joined(p: Picked) -> Made | None:
    first = p.value()
    if first is None:
        return None
    shape = p.values[first].shape
    axis = p.draw.between(1, len(shape) - 1)
    others = (shape[:axis], shape[axis + 1 :])
    second = p.value(len(shape), lambda y: (y.shape[:axis], y.shape[axis + 1 :]) == others)
    third = p.draw.pick((), (first,))
    if second is None:
        return None
    return Made((first, second, *third), lambda net, *xs: torch.cat(xs, p_axis(axis, len(shape))))


def p_axis(axis: int, rank: int) -> int:
    """The same axis counted from the end."""
    return axis - rank


@step(2)
def attention(p: Picked) -> Made | None:
    """Attention of one sequence to another, written out or by torch's function."""
    i = p.value(3)
    if i is None:
        return None
    width = p.values[i].shape[-1]
    j = p.value(3, lambda y: y.shape[-1] == width)
    if j is None:
        return None
    if p.draw.chance(0.5):
        return Made((i, j), lambda net, q, k: F.scaled_dot_product_attention(q, k, k))
    factor = width**-0.5
    return Made((i, j), lambda net, q, k: torch.softmax(q @ k.transpose(-2, -1) * factor, -1) @ k)


@step()
def embedded(p: Picked) -> Made | None:
    """A row of a table for every id."""
    found = [i for i, x in enumerate(p.values) if x.dtype == torch.int64 and x.shape[1:] == (4,)]
    if not found:
        return None
    name = p.add(nn.Embedding(200, p.draw.pick(5, 8)))
    return Made((found[0],), lambda net, ids: getattr(net, name)(ids))


# -- one value ----------------------------------------------------------------------------------------------------


@step(4)
def activation(p: Picked) -> Made | None:
    functions = (
        *(torch.sigmoid, torch.tanh, F.gelu, F.silu, F.hardswish, F.elu, F.softplus, F.relu6, torch.relu),
        *(lambda x: F.leaky_relu(x, 0.1), lambda x: x.clamp(-1.0, 1.5), lambda x: torch.exp(-x.abs())),
        *(lambda x: (x * x + 0.1).sqrt(), lambda x: x**2 * 0.1, torch.abs, torch.neg, lambda x: F.hardtanh(x, -2, 2)),
        *(lambda x: 1.0 / (1.0 + x.abs()), torch.sin, F.mish, lambda x: (x.abs() + 0.5).log()),
    )
    return unary(p, functions)


@step(3)
def normalized(p: Picked) -> Made | None:
    i = p.value()
    if i is None:
        return None
    shape, d = p.values[i].shape, p.draw
    kinds: list[Callable[[Tensor], Tensor] | nn.Module] = [
        lambda x: torch.softmax(x, -1),
        lambda x: F.log_softmax(x, 1),
        nn.LayerNorm(shape[-1]),
        nn.LayerNorm(shape[-1], elementwise_affine=False),
    ]
    if len(shape) == 4:
        groups = d.pick(*(g for g in (1, 2, 3, 4) if shape[1] % g == 0))
        kinds += [nn.GroupNorm(groups, shape[1]), nn.BatchNorm2d(shape[1])]
    chosen = d.pick(*kinds)
    if isinstance(chosen, nn.Module):
        name = p.add(chosen)
        return Made((i,), lambda net, x: getattr(net, name)(x))
    return Made((i,), lambda net, x: chosen(x))


@step(2)
def constants(p: Picked) -> Made | None:
    """Scalars on either side, parameters, tensors written in the model."""
    i = p.value()
    if i is None:
        return None
    shape, c, d = p.values[i].shape, p.draw.uniform(-2, 2), p.draw
    size = d.pick((1,), (shape[-1],), (1, *shape[1:]))
    name = p.add(nn.Parameter(torch.randn(size)))
    functions = (
        *(lambda net, x: x + c, lambda net, x: c - x, lambda net, x: x * c, lambda net, x: x / 3.0),
        *(lambda net, x: x + getattr(net, name), lambda net, x: getattr(net, name) * x),
        *(lambda net, x: x + torch.arange(x.shape[-1]) * 0.1, lambda net, x: 0.5 * x - 1),
        *(lambda net, x: torch.maximum(x, getattr(net, name)), lambda net, x: x.sub(getattr(net, name))),
    )
    return Made((i,), d.pick(*functions))


@step(2)
def masked(p: Picked) -> Made | None:
    c = p.draw.uniform(-1, 1)
    functions = (
        lambda x: x.masked_fill(x > c, -1.5),
        lambda x: torch.softmax(x.masked_fill(x < c, float("-inf")).clamp(min=-1e4), -1),
        lambda x: torch.where(x >= c, x, 0.5),
        lambda x: torch.where((x > c) & ~(x > 1.0), x, torch.tanh(x)),
        lambda x: x * (x > c),
        lambda x: x * (x <= c).float(),
        lambda x: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, -x),
    )
    return unary(p, functions)


@step(2)
def in_place(p: Picked) -> Made | None:
    """A value that is changed where it stands: every later reader sees the new one."""
    i, c = p.value(), p.draw.uniform(0.1, 1)
    functions = (F.relu_, torch.sigmoid_, lambda x: x.add_(c), lambda x: x.mul_(c), lambda x: x.clamp_(-1, 1))
    function = p.draw.pick(*functions)
    return None if i is None else Made((i,), lambda net, x: function(x), in_place=True)


# -- axes ---------------------------------------------------------------------------------------------------------


@step(3)
def moved(p: Picked) -> Made | None:
    """Cut, turned, repeated, padded, split; all kinds of index."""
    functions = (
        *(lambda x: x[:, 1:], lambda x: x[..., ::2], lambda x: x[:, :1], lambda x: x.flip(1), lambda x: x.roll(1, -1)),
        *(lambda x: x.chunk(2, 1)[0], lambda x: x.transpose(1, -1), lambda x: x.split(2, -1)[-1]),
        *(lambda x: F.pad(x, (1, 0)), lambda x: x[:, [0, -1]], lambda x: torch.cat([x, x.neg()], 1)),
        *(lambda x: x.repeat_interleave(2, 1), lambda x: x.narrow(1, 0, 1), lambda x: x.unbind(1)[0]),
        *(lambda x: torch.stack([x, x], 1).flatten(1, 2), lambda x: x.movedim(1, -1)),
    )
    i = p.value(None, lambda x: x.shape[1] > 1 and x.shape[-1] > 1)
    function = p.draw.pick(*functions)
    return None if i is None else Made((i,), lambda net, x: function(x), view=True)


@step(2)
def windows(p: Picked) -> Made | None:
    functions = (
        *(lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.adaptive_avg_pool2d(x, 3)),
        *(lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
        *(lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False), lambda x: F.adaptive_max_pool2d(x, 2)),
        *(lambda x: F.interpolate(x, scale_factor=2), lambda x: F.pad(x, (1, 1, 1, 0), mode="replicate")),
        *(lambda x: F.interpolate(x, size=(5, 7), mode="bilinear"), lambda x: F.pixel_unshuffle(x[..., :4, :4], 2)),
        *(
            lambda x: F.interpolate(x, size=(6, 6), mode="bicubic", align_corners=True),
            lambda x: F.pad(x, (0, -1, 1, 0)),
        ),
    )
    i = p.value(4, lambda x: min(x.shape[2:]) >= 4 and max(x.shape[2:]) <= 12)
    function = p.draw.pick(*functions)
    return None if i is None else Made((i,), lambda net, x: function(x))


@step()
def sampled(p: Picked) -> Made | None:
    """A warp by a constant-free grid that the net itself computes."""
    i = p.value(4, lambda x: x.shape[1] >= 2 and min(x.shape[2:]) >= 2)
    align, mode = p.draw.chance(0.5), p.draw.pick("bilinear", "nearest")
    padding = p.draw.pick("zeros", "border")

    def warp(net: nn.Module, x: Tensor) -> Tensor:
        grid = torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.2
        return F.grid_sample(x, grid, mode, padding, align)

    return None if i is None else Made((i,), warp)


@step(2)
def reduced(p: Picked) -> Made | None:
    functions = (
        *(lambda x: x.mean(-1, keepdim=True), lambda x: x.mean((2, 3)), lambda x: x.sum(1), lambda x: x.amax(-1)),
        *(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), lambda x: x.mean(1), lambda x: x.amin((1, -1))),
        *(lambda x: x.max(1)[0], lambda x: x.topk(2, -1)[0], lambda x: x.var(-1, keepdim=True), lambda x: x.std(-1)),
    )
    i = p.value(p.draw.pick(3, 4, 4))
    function = p.draw.pick(*functions)
    if i is None or p.values[i].shape[-1] < 2:
        return None
    if p.values[i].dim() < 4:
        function = p.draw.pick(functions[0], functions[2], functions[3], *functions[5:])
    return Made((i,), lambda net, x: function(x))


@step(2)
def reshaped(p: Picked) -> Made | None:
    """Images to sequences and vectors, and back."""
    i = p.value()
    if i is None:
        return None
    x, d = p.values[i], p.draw
    functions: list[Callable[[Tensor], Tensor]] = [lambda x: x.flatten(1)]
    if x.dim() == 4:
        functions += [lambda x: x.flatten(2).transpose(1, 2)] * 3
    if x.dim() == 3 and x.shape[1] % 2 == 0:
        functions += [
            lambda x: x.reshape(x.size(0), 2, -1, x.size(2)),
            lambda x: x.reshape(x.shape[0], -1, x.shape[2] * 2),
        ]
    if x.dim() == 2 and x.shape[1] % 2 == 0:
        functions += [lambda x: x.view(-1, 2, x.size(1) // 2), lambda x: torch.unflatten(x, 1, (2, -1))]
    function = d.pick(*functions)
    return Made((i,), lambda net, x: function(x), view=True)


def told_apart(x: Tensor) -> Tensor:
    """``x`` without equal numbers, whose order torch does not define."""
    sizes = x.shape[1:]
    return x + torch.linspace(0, 0.37, math.prod(sizes)).view(1, *sizes)


@step()
def integers(p: Picked) -> Made | None:
    """Positions and truth values, which may be outputs, or come back as numbers."""
    functions = (
        *(
            lambda x: x.argmax(-1),
            lambda x: x.argmin(1, keepdim=True),
            lambda x: told_apart(x).topk(2, 1)[1],
            lambda x: x > 0.25,
        ),
        *(lambda x: (x > 0).sum(-1), lambda x: x.argmax(1) + 1, lambda x: x.argmax(-1).float() * 0.1),
        *(lambda x: x.gather(1, x.argmax(1, keepdim=True)), lambda x: (x > 0).float()),
        lambda x: told_apart(x).argsort(-1),
    )
    i = p.value(None, lambda x: x.shape[1] > 1)
    function = p.draw.pick(*functions)
    return None if i is None else Made((i,), lambda net, x: function(x))
