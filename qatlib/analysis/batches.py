"""Batches of real data as analysis takes them: one, or an iterable, with targets or without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qatlib.errors import DataError
from qatlib.fake.calibrate import inputs_of
from qatlib.graph.ir import INPUT, OPAQUE, Node

VALUE_BYTES = 1 << 24
"""What one value may take: an allocator returns larger blocks to the system, which clears every page for the next."""


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

    def parts(self, most: int) -> Iterator[Batch]:
        """Equal parts of at most ``most`` samples, 0 being no limit; the batch itself if targets cannot be cut."""
        targets, count = self.targets, -(-len(self) // most) if most else 1
        cuttable = targets is None or (isinstance(targets, Tensor) and targets.shape[:1] == (len(self),))
        if count < 2 or not cuttable:
            yield self
            return
        size = -(-len(self) // count)
        for start in range(0, len(self), size):
            inputs = tuple(x[start : start + size] for x in self.inputs)
            yield Batch(inputs, None if targets is None else targets[start : start + size])


def samples_at_once(nodes: Sequence[Node], outputs: Sequence[str] = ()) -> int:
    """How many samples of a batch to run at a time so that every float value stays within :data:`VALUE_BYTES`.

    0, the whole batch, where inputs or ``outputs`` have their batch on another axis than the first, or what is not
    looked into may depend on it.
    """
    boundary = [node for node in nodes if node.op == INPUT or node.name in outputs]
    if any(node.shape[:1] != (-1,) for node in boundary) or any(node.op == OPAQUE for node in nodes):
        return 0
    largest = max((4 * abs(math.prod(node.shape)) for node in nodes), default=1)
    return max(1, VALUE_BYTES // max(1, largest))


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
