"""Train the float model: ``python -m examples.digits.train`` in the project root, some seconds.

Writes ``float.safetensors`` beside this file and prints the accuracy.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from examples.digits.digits import Digits, build_data, build_model
from qatlib.atomic import write_bytes

CHECKPOINT = Path(__file__).with_name("float.safetensors")
EPOCHS, BATCH_SIZE, LR, SEED = 30, 32, 2e-3, 0


def train(epochs: int = EPOCHS) -> nn.Module:
    """The trained network, in evaluation mode."""
    torch.manual_seed(SEED)
    model = build_model()
    batches = DataLoader(build_data("train"), BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for images, digits in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), digits).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the digits in ``data`` that ``model`` reads correctly."""
    with torch.no_grad():
        return float((model(data.images).argmax(1) == torch.tensor(data.digits)).float().mean())


def main() -> None:
    """Train, write the checkpoint, print the accuracy."""
    torch.set_num_threads(1)
    model = train()
    write_bytes(CHECKPOINT, safetensors.torch.save(model.state_dict()))
    for split in ("train", "val", "test"):
        data = build_data(split)
        print(f"{split:5} accuracy {accuracy(model, data):.4f} over {len(data)} images")


if __name__ == "__main__":
    main()
