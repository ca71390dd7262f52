"""Batches of real data as analysis takes them: one, or an iterable, with targets or without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qatlib.errors import DataError
from qatlib.fake.calibrate import inputs_of


@dataclass(frozen=True)
class Batch:
    """Input tensors in the model's order; ``targets`` is None where the data has none."""

    inputs: tuple[Tensor, ...]
    targets: Any = None

    def to(self, device: torch.device) -> Batch:
        targets = self.targets.to(device) if isinstance(self.targets, Tensor) else self.targets
        return Batch(tuple(x.to(device) for x in self.inputs), targets)

    def __len__(self) -> int:
        return int(self.inputs[0].shape[0])


def peek(data: Any, names: Sequence[str]) -> tuple[Iterator[Batch], Batch]:
    """All batches, and the first; ``names`` are the model's inputs.

    A tensor, a dict, or a tuple of tensors is one batch. Raises DataError QAT118 if there is none, QAT111 for what is
    no batch.
    """
    one = isinstance(data, Tensor | Mapping) or (isinstance(data, tuple) and all(isinstance(x, Tensor) for x in data))
    source: Iterable[Any] = [data] if one else data
    batches = (Batch(inputs_of(batch, names), _targets_of(batch, names)) for batch in source)
    first = next(batches, None)
    if first is None:
        raise DataError("QAT118", "analysis data", "holds no batch", "Give at least one batch of real input")
    return chain([first], batches), first


def _targets_of(batch: Any, names: Sequence[str]) -> Any:
    """What stands behind the inputs of a batch, as :func:`inputs_of` takes them."""
    if not isinstance(batch, tuple | list):
        return None
    after = batch[1:] if isinstance(batch[0], tuple | list) else batch[len(names) :]
    return after[0] if len(after) else None
