"""The exact accumulator of convolution and linear: section 6 of ``docs/numerics.md``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qatlib.errors import ProgramError
from qatlib.integer import EXACT_FLOAT32, EXACT_FLOAT64, INT32, Product, Route

_BYTE = 2**7
_SHORT = 64
"""Products per sum below which chunks, which have to be added, are slower than float64: with 4 per sum 4 to 8 times."""


@dataclass(frozen=True)
class Accumulator:
    """``sat32(product(x, weight) + bias)`` by the first route that is proven exact.

    ``weight`` is ``[O, I, ...]`` and ``x`` has I on axis ``channel_axis``. The result is float32 on the route "float32"
    and float64 otherwise. ``bound`` is the largest absolute accumulator.
    """

    route: Route
    bound: int
    product: Product
    weight: Tensor
    bias: Tensor
    channel_axis: int = 1
    splits: tuple[int, ...] = ()

    @classmethod
    def plan(
        cls, weight: Tensor, bias: Tensor, largest: int, product: Product, channel_axis: int, splittable: bool
    ) -> Accumulator:
        """Choose the route for input codes with ``|x| <= largest``."""
        magnitude = weight.to(torch.int64).abs()
        sums = magnitude.flatten(1).sum(1)
        bound = int((sums * largest + bias.to(torch.int64).abs()).max())
        if bound < EXACT_FLOAT32:
            return cls("float32", bound, product, _fast_layout(weight.float()), bias.float(), channel_axis)
        routes = [("float32-split", largest)]
        if weight[0, 0].numel() > 1 and _BYTE < largest <= _BYTE << 8:
            routes.append(("float32-bytes", _BYTE))
        for route, size in routes:
            if splits := _splits(magnitude, size, splittable):
                weight = _fast_layout(weight.float())
                return cls(route, bound, product, weight, bias.double(), channel_axis, splits)
        if bound >= EXACT_FLOAT64:
            raise ProgramError(
                "QAT176", "accumulator", f"may reach {bound}, beyond 2^53", "Reduce the number of input channels"
            )
        return cls("float64", bound, product, weight.double(), bias.double(), channel_axis)

    def __call__(self, x: Tensor) -> Tensor:
        if self.route == "float32":
            return self.product(x.float(), self.weight, self.bias)
        if self.route == "float64":
            acc = self.product(x.double(), self.weight, self.bias)
        else:
            shape = [1] * x.dim()
            shape[self.channel_axis] = -1
            acc = self._in_bytes(x) if self.route == "float32-bytes" else self._chunks(x.float())
            acc += self.bias.view(shape)
        return acc.clamp_(*INT32) if self.bound > INT32[1] else acc

    def _in_bytes(self, x: Tensor) -> Tensor:
        """``x = 256 h + l`` with h and l in [-128, 128]: two float32 products, added in float64.

        For windows of more than one element this takes a half to a seventh of the time of torch's float64 convolution;
        products of matrices are as fast in float64.
        """
        high = (x.float() * 2.0**-8).round_()
        acc = self._chunks(high).mul_(2.0**8)
        acc += self._chunks(torch.add(x.float(), high, alpha=-(2.0**8)))
        return acc

    def _chunks(self, x: Tensor) -> Tensor:
        """Sum of the float32 products of the channels of each split, in float64."""
        if len(self.splits) == 1:
            return self.product(x, self.weight, None).double()
        parts = torch.split_with_sizes(x, self.splits, self.channel_axis)
        weights = torch.split_with_sizes(self.weight, self.splits, 1)
        acc = self.product(parts[0], weights[0], None).double()
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            acc += self.product(part, weight, None)
        return acc


def _fast_layout(weight: Tensor) -> Tensor:
    """Channels last for 2-d convolutions on a CPU: their outputs follow the layout of the weights."""
    if weight.dim() == 4 and weight.device.type == "cpu":
        return weight.contiguous(memory_format=torch.channels_last)
    return weight


def _splits(magnitude: Tensor, largest: int, splittable: bool) -> tuple[int, ...]:
    """Sizes of input-channel chunks whose sums stay exact in float32; empty if that takes too many.

    One chunk holds all channels; only ``splittable`` weights allow more, as long as they are not short.
    """
    at_most = max(1, min(8, magnitude[0].numel() // _SHORT)) if splittable else 1
    channels = magnitude.flatten(2).sum(2) if magnitude.dim() > 2 else magnitude
    per_channel = channels.cpu().numpy() * largest
    if per_channel.max() >= EXACT_FLOAT32:
        return ()
    sums, starts = np.pad(per_channel.cumsum(1), ((0, 0), (1, 0))), [0]
    while starts[-1] < per_channel.shape[1]:
        if len(starts) > at_most:
            return ()
        grown = (sums[:, starts[-1] :] - sums[:, starts[-1], None]).max(0)  # by the number of channels, from 0 on
        starts.append(starts[-1] + int(np.searchsorted(grown, EXACT_FLOAT32)) - 1)
    return tuple(np.diff(starts).tolist())
