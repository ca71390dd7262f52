"""Train the float model, then give its channels units far apart: ``python -m examples.hard_case.train``.

Reads ``train.yaml`` and the model's arguments in ``params.yaml`` of this folder, writes ``float.safetensors`` and
``metrics.json`` beside them.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from examples.fashion_mnist import data
from examples.fashion_mnist.train import evaluate
from examples.hard_case import model
from examples.training import Example


def measure(net: nn.Module, dataset: TensorDataset) -> dict[str, float]:
    """Accuracy (0 to 1) and mean cross-entropy."""
    accuracy, loss = evaluate(net, dataset)
    return {"accuracy": accuracy, "loss": loss}


EXAMPLE = Example(Path(__file__).parent, model.build, data.build, F.cross_entropy, measure, model.unbalance)
main = EXAMPLE.command()

if __name__ == "__main__":
    main()
