"""Train the float model: ``python -m examples.detector.train`` in the project root.

Reads ``train.yaml`` and the model's arguments in ``params.yaml`` of this folder, writes ``float.safetensors`` and
``metrics.json`` beside them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from examples.detector import model, scenes
from examples.detector.loss import detection_loss
from examples.detector.metric import MeanAveragePrecision
from examples.training import Example, channels_last


def measure(net: nn.Module, dataset: TensorDataset, batch_size: int = 200) -> dict[str, float]:
    """Mean average precision at IoU 0.5."""
    net.eval()
    metric = MeanAveragePrecision()
    with torch.no_grad():
        for images, targets in zip(*(torch.split(part, batch_size) for part in dataset.tensors), strict=True):
            metric.update(net(channels_last(images)), targets)
    return {metric.name: metric.compute()}


EXAMPLE = Example(Path(__file__).parent, model.build, scenes.build, detection_loss, measure)
main = EXAMPLE.command()

if __name__ == "__main__":
    main()
