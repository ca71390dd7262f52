"""What is not finite first, and what to do about it: the NaN guard of QAT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qatlib.errors import DataError, TrainingError
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.op import FakeOp
from qatlib.fake.state import FakeQuantState
from qatlib.graph.ir import Node

_SHOWN = 16


Items = Callable[[int, int], Sequence[int]]
"""``(epoch, batch) -> dataset indices``, empty if they are not known."""


@dataclass(frozen=True)
class Place:
    """Where the training stands, for messages."""

    epoch: int
    step: int
    batch: int
    lr: float
    items_of: Items

    def items(self) -> Sequence[int]:
        """Dataset indices of the batch."""
        return self.items_of(self.epoch, self.batch)

    def said(self, rows: Sequence[int] = ()) -> str:
        """With the dataset indices of the batch, or of those ``rows`` of it that are at fault."""
        items = self.items()
        named = f", items {_some([items[row] for row in rows] if rows else items)}" if items else ""
        return f"epoch {self.epoch} step {self.step} batch {self.batch} (lr {self.lr:.3g}{named})"


@dataclass(frozen=True)
class Fault:
    """The first tensor that is not finite, in words; ``rows`` are the items of the batch at fault, where known."""

    what: str
    rows: tuple[int, ...] = ()


def forward_fault(model: FakeQuantModel, inputs: Sequence[Tensor]) -> Fault:
    """The first op, in order of execution, with an output that is not finite, and whether a parameter made it so.

    Leaves the model in VALIDATION state: its scales are not to follow what is not finite.
    """
    found: list[Fault] = []

    def visit(node: Node, _: tuple[Tensor, ...], out: Tensor) -> None:
        if not found and _bad(out):
            found.append(_fault_of(node, model.op(node.name), out, len(inputs[0])))

    set_fake_quantize(model, FakeQuantState.VALIDATION)
    with torch.no_grad():
        model.walk(*inputs, visit=visit)
    return found[0] if found else Fault("all activations are finite, so look at the loss and the labels")


def _fault_of(node: Node, op: FakeOp, out: Tensor, items: int) -> Fault:
    for name, tensor in tensors_of(op):
        if _bad(tensor):
            return Fault(f"{node.described()}: its {name} holds {_counted(tensor)}")
    rows = _rows(out) if out.dim() and len(out) == items else []
    return Fault(f"{node.described()}: its output holds {_counted(out)}", tuple(rows))


def gradient_fault(model: FakeQuantModel) -> Fault:
    """The first gradient that is not finite on the way back from the outputs."""
    for name, op in reversed(list(model.ops())):
        for role, parameter in op.named_parameters(recurse=False):
            if parameter.grad is not None and _bad(parameter.grad):
                return Fault(
                    f"first, from the outputs back, in the gradient of {name}.{role}: {_counted(parameter.grad)}"
                )
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _bad(parameter.grad):
            return Fault(f"in the gradient of {name}: {_counted(parameter.grad)}")
    return Fault("every gradient is finite, their norm is not")


def check_weights(model: FakeQuantModel, where: str) -> None:
    """Raise TrainingError (QAT162) for a parameter or scale that is not finite: such weights are not worth keeping."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if _bad(tensor):
            raise TrainingError("QAT162", where, f"{name} holds {_counted(tensor)} after the step", cures())


def check_targets(targets: Any, place: Place) -> None:
    """Raise DataError (QAT112) for real targets ``[N, ...]`` that hold NaN or infinity."""
    for tensor in tree_leaves(targets):
        if isinstance(tensor, Tensor) and _bad(tensor):
            rows = _rows(tensor) if tensor.dim() else []
            raise DataError(
                "QAT112", place.said(rows), f"targets hold {_counted(tensor)}", "Correct or drop those items"
            )


def check_batch_of_one(model: FakeQuantModel, inputs: tuple[Tensor, ...], where: str) -> None:
    """Raise DataError (QAT194) if the model cannot train on a batch of one item: batch norm needs more than one value.

    Tried on a copy, so that the last batch of an epoch does not end a training that ran for an hour.
    """
    trial = copy.deepcopy(model).train()
    set_fake_quantize(trial, FakeQuantState.QAT)
    try:
        with torch.no_grad():
            trial(*inputs)
    except ValueError as error:
        raise batch_of_one(error, where) from None


def batch_of_one(error: ValueError, where: str) -> Exception:
    """The error to raise for ``error``: itself, unless it is batch norm's refusal of a single value."""
    if "more than 1 value per channel" not in str(error):
        return error
    return DataError(
        "QAT194",
        where,
        f"is one item, and batch norm in train mode needs more ({error})",
        "Choose qat.batch_size > 1 that does not leave a last batch of one, or qat.batch_norm: fold",
    )


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more


def cures(lr: float | None = None) -> str:
    """What to try against values that are not finite, in the order of the tuning guide, with the command of each."""
    lower, trial = f"{lr / 10:.2g}" if lr else "1e-5", "dvc exp run --temp -S"
    return (
        "In this order:"
        "\n  1. Is the float model sound? dvc repro --force --single-item float_check"
        "\n  2. NaN, infinity or far too large values in data or labels: look at the items named"
        f"\n  3. A lower rate, or a warm-up: {trial} qat.lr={lower}, {trial} qat.warmup_steps=100"
        f"\n  4. Clipped gradients: {trial} qat.clip_grad_norm=1.0"
        f"\n  Or go on from the last good weights with half the rate: {trial} qat.on_nan=rewind"
    )


def tensors_of(op: FakeOp) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of one op, its quantizers and a module kept whole; not those of ops under its name."""
    yield from chain(op.named_parameters(recurse=False), op.named_buffers(recurse=False))
    for name in ("callee", "weight_fake_quant", "activation_post_process"):
        module = op._modules.get(name)
        if module is not None:
            yield from ((f"{name}.{key}", t) for key, t in chain(module.named_parameters(), module.named_buffers()))


def _bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


def _rows(tensor: Tensor) -> list[int]:
    """Positions along the first axis that hold something not finite."""
    found: list[int] = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist()
    return found


def _counted(tensor: Tensor) -> str:
    nans, bad = int(torch.isnan(tensor).sum()), int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} values that are not finite ({nans} NaN)"
