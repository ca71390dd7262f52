"""Marks that users may place in their model; without them the graph inputs are quantized and outputs dequantized."""

from __future__ import annotations

from torch import Tensor, nn


class QuantStub(nn.Module):
    """Where the network becomes quantized. ``scale`` fixes the scale of the codes; None calibrates it."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x


class DeQuantStub(nn.Module):
    """Where the network becomes float again."""

    def forward(self, x: Tensor) -> Tensor:
        return x
