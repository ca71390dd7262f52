"""Entry point of the model: depthwise separable convolutions whose channels have ranges far apart."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
from torch import Tensor, nn


def build(width: int = 16, decades: float = 3.0, classes: int = 10) -> nn.Module:
    """The untrained network: images ``[N, 1, 28, 28]`` to scores ``[N, classes]``; 9,034 parameters by default.

    ``width`` is the number of channels after the stem. ``decades`` is how far the channels of one tensor are
    apart once the network is trained: see :func:`unbalance`.
    """
    return SeparableNet(width, decades, classes)


class SeparableNet(nn.Module):
    """Stem, three pairs of a 3×3 on each channel and a 1×1 over channels, average, linear; maps of 14×14, then 7×7.

    Every relu is unbounded and there is no residual: a layer's channels are read by the next layer alone.
    """

    def __init__(self, width: int, decades: float, classes: int) -> None:
        super().__init__()
        self.decades = decades
        self.stem = _layer(1, width, 3, stride=2)
        self.blocks = nn.Sequential(
            _pair(width, 2 * width, 1), _pair(2 * width, 4 * width, 2), _pair(4 * width, 4 * width, 1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.stem(x)))))  # type: ignore[no-any-return]

    def layers(self) -> list[nn.Sequential]:
        """Every convolution with its batch norm and relu, in order."""
        return [self.stem, *itertools.chain.from_iterable(self.blocks)]


def unbalance(net: SeparableNet, seed: int = 0) -> None:
    """Give every channel that a depthwise convolution reads a unit of its own, out of ``net.decades`` decades.

    The function stays what it is: relu(k x) = k relu(x) for k > 0, so a batch norm multiplies a channel by k, and the
    convolution that reads it divides by k. Networks are found like this: nothing in float training holds such units
    together, and in MobileNetV2 the ranges of the channels of one depthwise layer differ by more than a hundredfold
    (Nagel et al., 2019, figure 2).
    """
    generator = torch.Generator().manual_seed(seed)
    layers = net.layers()
    with torch.no_grad():
        for layer, reader in itertools.pairwise(layers):
            count = len(layer.bn.weight)
            if reader.conv.groups == count:
                units = torch.logspace(-net.decades / 2, net.decades / 2, count)
                units = units[torch.randperm(count, generator=generator)]
                layer.bn.weight.mul_(units)
                layer.bn.bias.mul_(units)
                reader.conv.weight.div_(units.view(-1, 1, 1, 1))


def _pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(each=_layer(inputs, inputs, 3, stride, groups=inputs), point=_layer(inputs, outputs, 1))
    )


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            bn=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )
