"""Where a training stands: everything the next step depends on, in memory and in one file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.pipeline.checkpoint import load_weights, read_metadata, save_tensors

Packed = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors by name and numbers as text: what a safetensors file holds."""


@dataclass
class Progress:
    """``step`` counts finished steps over all epochs; ``epoch`` is the one under way.

    ``history`` has one row per finished epoch, ``kept`` the weights after the best of them. ``rewinds`` counts how
    often the training went back after a NaN; each halved the learning rate. ``first_loss`` has the fields of
    :class:`qatlib.fake.first_loss.FirstLoss`, once there was a first step.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    rewinds: int = 0
    first_loss: dict[str, float] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Factor on the learning rate."""
        return float(0.5**self.rewinds)


_NUMBERS = ("epoch", "step", "loss_sum", "rewinds", "first_loss", "history")


def pack(progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> Packed:
    """A copy of everything; training on does not change it."""
    tensors = {f"model/{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for epoch, weights in progress.kept.items():
        tensors |= {f"kept/{epoch}/{name}": tensor for name, tensor in weights.items()}
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)  # not plain tensors: any optimizer's state, and the layout in memory
    tensors["optimizer"] = torch.frombuffer(bytearray(state.getvalue()), dtype=torch.uint8)
    numbers = {name: getattr(progress, name) for name in _NUMBERS}
    return tensors, {"progress": json.dumps(numbers)}


def unpack(packed: Packed, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put model and optimizer where :func:`pack` found them."""
    tensors, metadata = packed
    model.load_state_dict(_under("model/", tensors))
    state = io.BytesIO(tensors["optimizer"].numpy().tobytes())
    optimizer.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
    numbers = json.loads(metadata["progress"])
    progress = Progress(**numbers)
    for epoch in sorted({int(name.split("/")[1]) for name in tensors if name.startswith("kept/")}):
        progress.kept[epoch] = _under(f"kept/{epoch}/", tensors)
    return progress


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save(path: Path, packed: Packed) -> None:
    """Write ``path`` whole or not at all."""
    save_tensors(path, *packed)


def load(path: Path) -> Packed | None:
    """What :func:`save` wrote; None if there is no such file."""
    return (load_weights(path), read_metadata(path)) if path.exists() else None
